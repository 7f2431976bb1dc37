"""Options of compilers: those of GPUs are known to this jaxlib; those of TPUs are given to libtpu in tests/plan."""

import jax

from skysense_jax import compiler


def test_options_for_gpus_are_known_to_this_jaxlib():
    known = set()
    for name, value in compiler._GPU.items():
        try:
            assert jax.jit(lambda x: x + 1, compiler_options={name: value})(1) == 2
        except jax.errors.JaxRuntimeError as error:
            assert f"No such compile option: '{name}'" in str(error)  # noqa: PT017
        else:
            known.add(name)
    assert "xla_gpu_enable_latency_hiding_scheduler" in known


def test_option_that_a_compiler_does_not_know_is_left_out_and_told(monkeypatch, caplog):
    monkeypatch.setitem(compiler._OPTIONS, "cpu", {"xla_gpu_no_such_option": True, **compiler._GPU})
    compiler._known.cache_clear()
    device = jax.devices()[0]
    with caplog.at_level("WARNING"):
        options = compiler.options(device)
    compiler._known.cache_clear()
    assert "xla_gpu_no_such_option" not in options
    assert options["xla_gpu_enable_latency_hiding_scheduler"] is True
    assert "the compiler of cpu knows no option xla_gpu_no_such_option: left out" in caplog.text


def test_options_of_a_cpu_are_its_defaults():
    assert compiler.options(jax.devices()[0]) == {}
