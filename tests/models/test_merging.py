"""Adaptive patch merging: a kept grid is a merged one seen at a coarser place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skysense_jax.models.merging import PatchMerging, merged_validity, neighbours
from skysense_jax.sharding import unbox


def _layer(width, separate=()):
    layer = PatchMerging(width, separate)
    params = unbox(layer.init(jax.random.key(0), jnp.zeros((1, 1, 2, 2, width))))["params"]
    noise = lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape)  # noqa: E731
    return layer, {"params": jax.tree.map(noise, params)}


def test_neighbours_odd_grid_equals_loop():
    x = np.random.default_rng(0).normal(size=(1, 2, 3, 5, 4)).astype(np.float32)
    got = neighbours(jnp.asarray(x))
    assert got.shape == (1, 2, 2, 3, 16)
    for p in range(2):
        for q in range(3):
            wanted = [
                x[:, :, row, column] if row < 3 and column < 5 else np.zeros((1, 2, 4))
                for row, column in ((2 * p, 2 * q), (2 * p + 1, 2 * q), (2 * p, 2 * q + 1), (2 * p + 1, 2 * q + 1))
            ]
            np.testing.assert_array_equal(got[:, :, p, q], np.concatenate(wanted, -1))


def test_kept_grid_four_times_equals_merging_of_equal_neighbours():
    layer, params = _layer(6)
    coarse = jax.random.normal(jax.random.key(1), (2, 1, 3, 5, 6))
    fine = jnp.repeat(jnp.repeat(coarse, 2, axis=2), 2, axis=3)

    def before_norm(layer, coarse, fine):
        return layer.reduce(coarse, layer.keep_kernel("s2")), layer.reduce(neighbours(fine), layer.kernel)

    kept, merged = layer.apply(params, coarse, fine, method=before_norm)
    np.testing.assert_allclose(4 * kept, merged, atol=1e-5)


def test_keeping_shares_the_norm_and_owns_no_parameter_when_averaged():
    layer, params = _layer(6)
    shapes = jax.tree.map(jnp.shape, params["params"])
    assert shapes == {"kernel": (24, 12), "norm": {"scale": (12,), "bias": (12,)}}
    x = jax.random.normal(jax.random.key(1), (2, 1, 3, 5, 6))
    kept = layer.apply(params, x, "s2", method="keep")
    kernel, norm = params["params"]["kernel"], params["params"]["norm"]
    y = np.asarray(x) @ sum(np.asarray(kernel[6 * i : 6 * i + 6]) for i in range(4)) / 4
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5) * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(kept, y, atol=1e-5)


def test_separate_keeping_uses_the_modality_kernel_only():
    layer, params = _layer(6, separate=("s2", "s1"))
    x = jax.random.normal(jax.random.key(1), (2, 1, 3, 5, 6))
    s2 = lambda params: layer.apply(params, x, "s2", method="keep").sum()  # noqa: E731
    gradient = jax.grad(s2)(params)["params"]
    moved = {name for name in ("kernel", "keep_s2_kernel", "keep_s1_kernel") if jnp.abs(gradient[name]).max() > 0}
    assert moved == {"keep_s2_kernel"}


@pytest.mark.parametrize("hole", [(2, 2), (0, 3)])
def test_merged_validity_is_any_of_four(hole):
    valid = jnp.zeros((1, 1, 3, 5), bool).at[0, 0, *hole].set(True)
    wanted = np.zeros((1, 1, 2, 3), bool)
    wanted[0, 0, hole[0] // 2, hole[1] // 2] = True
    np.testing.assert_array_equal(merged_validity(valid), wanted)
