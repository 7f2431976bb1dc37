"""An MLP whose rows go through in parts: the same numbers as of all at once, in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skysense_jax.models.layers import Mlp
from skysense_jax.sharding import make_mesh
from tests.kernels.nearness import assert_as_near, assert_near


def _compiled(parts, x, params, dtype=jnp.float32):
    """Output, and gradients of parameters and input, as a compiled function of both."""
    mlp = Mlp(4 * x.shape[-1], dtype, parts)
    loss = lambda params, x: jnp.sum(jnp.sin(mlp.apply(params, x).astype(jnp.float32)))  # noqa: E731
    both = lambda params, x: (mlp.apply(params, x), *jax.grad(loss, argnums=(0, 1))(params, x))  # noqa: E731
    return jax.jit(both).lower(params, x).compile()


def _case(shape, parts):
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    params = Mlp(4 * x.shape[-1], parts=parts).init(jax.random.key(1), x)
    move = lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(2), leaf.shape)  # noqa: E731  zeros of biases too
    return x, jax.tree.map(move, params)


def _run(*args, **kwargs):
    parts, x, params = args
    return dict(jax.tree_util.tree_leaves_with_path(_compiled(parts, x, params, **kwargs)(params, x)))


@pytest.mark.parametrize("parts", [2, 6, 12])
def test_parts_give_the_numbers_of_the_whole(parts):
    x, params = _case((2, 3, 12, 5, 16), parts)
    whole, apart = _run(1, x, params), _run(parts, x, params)
    assert len(whole) == 6  # output, four parameters, input
    assert_near(apart, whole)
    in_bfloat16 = [_run(n, x, params, dtype=jnp.bfloat16) for n in (1, parts)]
    assert_as_near(in_bfloat16[1], in_bfloat16[0], whole)


@pytest.mark.parametrize("batch", [8, 6])  # over eight devices, or on each of them
def test_parts_on_a_mesh_are_those_of_one_device(batch):
    x, params = _case((batch, 1, 4, 6, 16), parts=4)
    alone = _run(4, x, params)
    with jax.set_mesh(make_mesh(2, 2, 1, 2)):
        assert_near(_run(4, x, params), alone)


def test_hidden_width_stands_in_memory_for_one_part():
    x, params = _case((1, 4, 64, 64, 32), parts=16)
    whole, apart = (_compiled(n, x, params).memory_analysis().temp_size_in_bytes for n in (1, 16))
    hidden = 4 * x.nbytes
    assert whole > 2 * hidden
    assert apart < 2 * x.nbytes + hidden / 2  # its output and its gradient, and a few arrays of a sixteenth
