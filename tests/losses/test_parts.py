"""Parts of a batch: nothing is lost, nothing is seen twice, and cutting moves nothing between devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skysense_jax.losses import parts
from skysense_jax.losses.parts import Shared

X = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_fold_total_and_each_equal_the_whole_batch_in_value_and_gradient(count):
    tree = {"x": jnp.asarray(X), "weight": Shared(jnp.arange(3.0))}
    rows = lambda part: jnp.sin(part["x"]) * part["weight"].value  # noqa: E731
    want = np.sin(X) * np.arange(3)
    np.testing.assert_allclose(parts.each(rows, tree, parts=count), want, rtol=1e-6)
    of_part = lambda part: {"sum": rows(part).sum(), "rows": jnp.int32(len(part["x"]))}  # noqa: E731
    got = parts.total(of_part, tree, parts=count)
    np.testing.assert_allclose(got["sum"], want.sum(), rtol=1e-5)
    assert got["rows"] == 12
    largest = parts.fold(lambda so_far, part: jnp.maximum(so_far, rows(part).max()), -jnp.inf, tree, parts=count)
    np.testing.assert_allclose(largest, want.max(), rtol=1e-6)
    gradient = jax.grad(lambda tree: parts.total(of_part, tree, parts=count)["sum"], allow_int=True)(tree)
    np.testing.assert_allclose(gradient["x"], np.cos(X) * np.arange(3), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient["weight"].value, np.sin(X).sum(0), rtol=1e-5)


def test_split_takes_every_nth_sample_and_join_puts_them_back():
    cut = parts.split(jnp.asarray(X), 3)
    np.testing.assert_array_equal(cut[1], X[1::3])
    np.testing.assert_array_equal(parts.join(cut), X)


def test_cutting_and_joining_moves_nothing_between_devices():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    work = jax.jit(lambda x: parts.each(jnp.sin, x, parts=4), out_shardings=placed)
    text = work.lower(jax.ShapeDtypeStruct((64, 3), jnp.float32, sharding=placed)).compile().as_text()
    assert "while" in text
    assert not [name for name in ("all-gather", "all-to-all", "collective-permute", "all-reduce") if name in text]
