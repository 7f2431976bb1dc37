"""Options of compilers: those of GPUs are known to this jaxlib; those of TPUs are given to libtpu in tests/plan."""

import jax
import pytest

from skysense_jax import compiler


def test_options_for_gpus_are_known_to_this_jaxlib():
    options = compiler.options("gpu")
    assert options
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2
    with pytest.raises(Exception, match="xla_gpu_no_such_option"):
        jax.jit(lambda x: x + 1, compiler_options={**options, "xla_gpu_no_such_option": True})(1)


def test_options_of_a_cpu_are_its_defaults():
    assert compiler.options("cpu") == {}
