"""The query decoder against PyTorch's pre-norm decoder layer, masks, and permuted queries."""

import jax
import numpy as np
import pytest
import torch

from skysense_jax import sharding
from skysense_jax.models.queries import QueryDecoder

RNG = np.random.default_rng(0)
CELLS = RNG.normal(size=(2, 3, 7, 8)).astype(np.float32)
USABLE = RNG.random((2, 3, 7)) < 0.7
DECODER = QueryDecoder(num_queries=5, width=8, head_width=4, mlp_ratio=3)
apply = jax.jit(DECODER.apply, static_argnames="return_attention")


@pytest.fixture(scope="module")
def params():
    init = sharding.unbox(jax.jit(DECODER.init)(jax.random.key(0), CELLS, USABLE))["params"]
    return jax.tree.map(lambda p: p + 0.1 * RNG.normal(size=p.shape).astype(np.float32), init)


def torch_decoder(params):
    params = jax.tree.map(np.asarray, params)
    kernel = lambda *path: params[path[0]][path[1]]["kernel"].T if path[1:] else params[path[0]]["kernel"].T  # noqa: E731
    bias = lambda *path: params[path[0]][path[1]]["bias"] if path[1:] else params[path[0]]["bias"]  # noqa: E731
    own = [("attention", name) for name in ("query", "key", "value", "output")]
    cross = [(f"cross_{name}",) for name in ("query", "key", "value", "output")]
    state = {}
    for target, paths in (("self_attn", own), ("multihead_attn", cross)):
        state[f"{target}.in_proj_weight"] = np.concatenate([kernel(*path) for path in paths[:3]])
        state[f"{target}.in_proj_bias"] = np.concatenate([bias(*path) for path in paths[:3]])
        state[f"{target}.out_proj.weight"], state[f"{target}.out_proj.bias"] = kernel(*paths[3]), bias(*paths[3])
    for target, name in (("linear1", "hidden"), ("linear2", "output")):
        state[f"{target}.weight"], state[f"{target}.bias"] = kernel("mlp", name), bias("mlp", name)
    for target, name in (("norm1", "attention_norm"), ("norm2", "cross_norm"), ("norm3", "mlp_norm")):
        state[f"{target}.weight"], state[f"{target}.bias"] = params[name]["scale"], params[name]["bias"]
    layer = torch.nn.TransformerDecoderLayer(8, 2, 24, 0.0, "gelu", norm_first=True, batch_first=True)
    layer.load_state_dict({name: torch.tensor(x) for name, x in state.items()})
    return layer


def test_query_decoder_equals_torch_in_value_and_gradient(params):
    layer, weight = torch_decoder(params), RNG.normal(size=(2, 3, 5, 8)).astype(np.float32)
    cells = torch.tensor(CELLS).flatten(0, 1).requires_grad_()
    queries = torch.tensor(np.asarray(params["queries"])).expand(6, 5, 8)
    wanted = layer(queries, cells, memory_key_padding_mask=~torch.tensor(USABLE).flatten(0, 1))
    (wanted * torch.tensor(weight).flatten(0, 1)).sum().backward()
    got, attention = apply({"params": params}, CELLS, USABLE)
    assert attention is None
    np.testing.assert_allclose(got.reshape(6, 5, 8), wanted.detach(), atol=1e-5)
    loss = lambda x, usable: (DECODER.apply({"params": params}, x, usable)[0] * weight).sum()  # noqa: E731
    grad = jax.jit(jax.grad(loss))(CELLS, USABLE)
    np.testing.assert_allclose(grad.reshape(6, 7, 8), cells.grad, atol=1e-5)


def test_query_decoder_attention_is_torchs_mean_over_heads(params):
    layer, got = torch_decoder(params), apply({"params": params}, CELLS, USABLE, return_attention=True)
    with torch.no_grad():
        x = torch.tensor(np.asarray(params["queries"])).expand(6, 5, 8)
        x = x + layer._sa_block(layer.norm1(x), None, None)
        _, wanted = layer.multihead_attn(
            layer.norm2(x), *[torch.tensor(CELLS).flatten(0, 1)] * 2, ~torch.tensor(USABLE).flatten(0, 1)
        )
    np.testing.assert_allclose(got[1].reshape(6, 5, 7), wanted, atol=1e-5)


def test_query_decoder_permuted_queries_give_permuted_features(params):
    order = RNG.permutation(5)
    permuted = {**params, "queries": params["queries"][order]}
    got, wanted = apply({"params": permuted}, CELLS, USABLE)[0], apply({"params": params}, CELLS, USABLE)[0]
    np.testing.assert_allclose(got, wanted[:, :, order], atol=1e-5)


def test_query_decoder_masked_cells_change_nothing_and_none_usable_is_finite(params):
    other = np.where(USABLE[..., None], CELLS, 7.0).astype(np.float32)
    np.testing.assert_array_equal(
        apply({"params": params}, other, USABLE)[0], apply({"params": params}, CELLS, USABLE)[0]
    )
    features, attention = apply({"params": params}, CELLS, USABLE & False, return_attention=True)
    assert np.isfinite(features).all()
    assert np.isfinite(attention).all()
