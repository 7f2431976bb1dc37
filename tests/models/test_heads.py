"""Projection and text heads against numpy, and what their parameters mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from skysense_jax import sharding
from skysense_jax.models.heads import ProjectionHead, TextHead

X = np.random.default_rng(0).normal(size=(3, 4, 10)).astype(np.float32)
HEAD = ProjectionHead(hidden_dim=12, bottleneck_dim=6, num_prototypes=7)
TEXT = TextHead(text_dim=5)


@pytest.fixture(scope="module")
def head_params():
    return sharding.unbox(jax.jit(HEAD.init)(jax.random.key(0), X))["params"]


@pytest.fixture(scope="module")
def text_params():
    return sharding.unbox(jax.jit(TEXT.init)(jax.random.key(1), X))["params"]


def norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_projection_head_equals_numpy(head_params):
    params = jax.tree.map(lambda p: np.asarray(p) + 0.1, head_params)  # biases and scales other than the initial
    x = X
    for name in ("hidden1", "hidden2"):
        x = x @ params[name]["kernel"] + params[name]["bias"]
        x = x * (1 + erf(x / np.sqrt(2))) / 2
    x = x @ params["bottleneck"]["kernel"] + params["bottleneck"]["bias"]
    rows, prototypes = jax.jit(HEAD.apply)({"params": params}, X)
    np.testing.assert_allclose(rows, unit(x), atol=1e-5)
    np.testing.assert_allclose(prototypes, unit(params["prototypes"]), atol=1e-6)


def test_projection_head_length_of_prototypes_does_not_matter(head_params):
    longer = {**head_params, "prototypes": head_params["prototypes"] * jnp.arange(1, 8)[:, None]}
    apply = jax.jit(HEAD.apply)
    for got, wanted in zip(apply({"params": longer}, X), apply({"params": head_params}, X), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_projection_head_bfloat16_gives_fp32_rows(head_params):
    rows, prototypes = jax.jit(HEAD.clone(compute_dtype=jnp.bfloat16).apply)({"params": head_params}, X)
    assert rows.dtype == prototypes.dtype == jnp.float32
    np.testing.assert_allclose(rows, HEAD.apply({"params": head_params}, jnp.asarray(X))[0], atol=0.05)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=-1), 1, atol=1e-5)


def test_text_head_rows_are_unit_and_scale_starts_as_clip(text_params):
    rows, scale = jax.jit(TEXT.apply)({"params": text_params}, X)
    kernel, bias = text_params["project"]["kernel"], text_params["project"]["bias"]
    np.testing.assert_allclose(rows, unit(norm(X) @ kernel + bias), atol=1e-5)
    np.testing.assert_allclose(scale, 1 / 0.07, rtol=1e-5)


def test_text_head_scale_stops_at_100_and_can_come_back(text_params):
    def scale(log_temperature):
        return TEXT.apply({"params": {**text_params, "log_temperature": log_temperature}}, jnp.asarray(X))[1]

    value, slope = jax.jit(jax.value_and_grad(scale))(jnp.float32(-7.0))
    np.testing.assert_allclose([value, slope], [100, -100], rtol=1e-5)


def test_heads_kernels_lie_over_fsdp_and_tensor():
    mesh = sharding.make_mesh(1, 2, 2, 2)
    spec = {}
    for module in (HEAD, TEXT):
        boxed = jax.eval_shape(module.init, jax.random.key(0), jnp.asarray(X))
        spec |= jax.tree.map(lambda placed: placed.spec, sharding.tree_shardings(boxed, mesh)["params"])
    assert spec["hidden1"]["kernel"] == jax.sharding.PartitionSpec("fsdp", "tensor")
    assert spec["hidden2"]["kernel"] == jax.sharding.PartitionSpec("tensor", "fsdp")
    assert spec["project"]["kernel"] == jax.sharding.PartitionSpec("fsdp", None)
    assert spec["prototypes"] == jax.sharding.PartitionSpec(None, None)  # 7 rows do not divide by 2
