"""Swin V2 blocks, stages and merging against ``transformers`` with the same random weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.swinv2.configuration_swinv2 import Swinv2Config
from transformers.models.swinv2.modeling_swinv2 import Swinv2Layer, Swinv2PatchMerging, Swinv2Stage

from skysense_jax import sharding
from skysense_jax.modalities import MODALITIES
from skysense_jax.models.backbone import Backbone
from skysense_jax.models.merging import PatchMerging
from skysense_jax.models.swin import SwinBlock
from skysense_jax.models.tokenizers import Tokenizer

WIDTH, NUM_HEADS, WINDOW = 64, 2, 8


def _config():
    return Swinv2Config(embed_dim=WIDTH, num_heads=[NUM_HEADS], depths=[2], window_size=WINDOW, drop_path_rate=0.0)


def _randomise(module, seed, clamped=False):
    """Weights far from their initial values, so that norms, biases and logit scales count.

    ``clamped``: one head's logit scale lies above the clamp. Its logits reach 100, where fp32 steps are 8e-6: on grids
    larger than 4x4 the worst of many values comes within a few percent of 1e-5 or, on some processors, passes it.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = 0.3 if parameter.ndim < 2 or "continuous" in name else 0.5 / parameter.shape[-1] ** 0.5
            noise = torch.randn(parameter.shape, generator=generator) * scale
            centred = name.endswith(("layernorm_before.weight", "layernorm_after.weight", "norm.weight", "logit_scale"))
            parameter.copy_(parameter + noise if centred else noise)
        for name, parameter in module.named_parameters():
            if clamped and name.endswith("logit_scale"):
                parameter[0] = 5.0
    return module.eval()


def _array(tensor):
    return jnp.asarray(tensor.detach().numpy())


def _linear(layer):
    weights = {"kernel": _array(layer.weight).T}
    return weights if layer.bias is None else {**weights, "bias": _array(layer.bias)}


def _norm(layer):
    return {"scale": _array(layer.weight), "bias": _array(layer.bias)}


def _block_params(layer):
    attention = layer.attention.self
    position_hidden, _, position_output = attention.continuous_position_bias_mlp
    return {
        "attention": {
            "query": _linear(attention.query),
            "key": _linear(attention.key),
            "value": _linear(attention.value),
            "output": _linear(layer.attention.output.dense),
            "logit_scale": _array(attention.logit_scale).reshape(-1),
            "position_bias": {"hidden": _linear(position_hidden), "output": _linear(position_output)},
        },
        "attention_norm": _norm(layer.layernorm_before),
        "mlp": {"hidden": _linear(layer.intermediate.dense), "output": _linear(layer.output.dense)},
        "mlp_norm": _norm(layer.layernorm_after),
    }


@functools.partial(jax.jit, static_argnames="shifted")
def _ours(params, x, probe, shifted):
    block = SwinBlock(head_width=WIDTH // NUM_HEADS, window=WINDOW, shifted=shifted)

    def loss(params, x):
        y = block.apply({"params": params}, x[:, None], valid=jnp.ones((x.shape[0], 1, *x.shape[1:3]), bool))[:, 0]
        return (y * probe).sum(), y

    gradients, y = jax.grad(loss, (0, 1), has_aux=True)(params, x)
    return y, gradients


@pytest.mark.parametrize(
    ("grid", "shifted"),
    [((16, 16), False), ((24, 16), True), ((13, 11), True), ((4, 4), True)],
    ids=["plain", "shifted", "padded_and_shifted", "below_window"],
)
def test_swin_block_equals_transformers_in_values_and_gradients(grid, shifted):
    clamped = grid == (4, 4)
    shift = WINDOW // 2 if shifted else 0
    layer = _randomise(Swinv2Layer(_config(), WIDTH, grid, NUM_HEADS, shift_size=shift), sum(grid), clamped)
    rng = np.random.default_rng(0)
    x, probe = (rng.normal(size=(2, *grid, WIDTH)).astype(np.float32) for _ in range(2))
    probe /= 10
    y, (params_gradient, x_gradient) = _ours(_block_params(layer), jnp.asarray(x), jnp.asarray(probe), shifted)

    torch_x = torch.tensor(x.reshape(2, -1, WIDTH), dtype=torch.float64, requires_grad=True)
    wanted = layer.double()(torch_x, grid)[0]  # the oracle in double precision: what differs is our own rounding
    (wanted * torch.tensor(probe).reshape(wanted.shape)).sum().backward()
    np.testing.assert_allclose(y.reshape(wanted.shape), wanted.detach(), atol=1e-5)
    np.testing.assert_allclose(x_gradient.reshape(wanted.shape), torch_x.grad, atol=1e-5)
    wanted_gradient = _block_params(_gradients(layer))
    assert (wanted_gradient["attention"]["logit_scale"][0] == 0) == clamped
    _assert_close(params_gradient, wanted_gradient)


def _gradients(module):
    """The module with the gradients in place of its weights."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.grad)
    return module


def _assert_close(got, wanted):
    """Every leaf to 1e-5 of its largest value, or of 1."""
    got, wanted = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (got, wanted))
    assert got.keys() == wanted.keys()
    for path, want in wanted.items():
        tolerance = 1e-5 * max(1.0, float(jnp.abs(want).max()))
        np.testing.assert_allclose(got[path], want, rtol=0, atol=tolerance, err_msg=jax.tree_util.keystr(path))


def test_swin_stage_with_merging_equals_transformers_in_values_and_gradients():
    grid = (13, 11)
    stage = _randomise(Swinv2Stage(_config(), WIDTH, grid, 2, NUM_HEADS, [0.0, 0.0], Swinv2PatchMerging), seed=3)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, *grid, WIDTH)).astype(np.float32)
    probe = rng.normal(size=(2, 7, 6, 2 * WIDTH)).astype(np.float32) / 10

    def stage_params(stage):
        merging = {"kernel": _array(stage.downsample.reduction.weight).T, "norm": _norm(stage.downsample.norm)}
        return {"blocks": [_block_params(layer) for layer in stage.blocks], "merging": merging}

    @jax.jit
    def ours(params, x):
        tokens = x[:, None]
        for i, block_params in enumerate(params["blocks"]):
            block = SwinBlock(head_width=WIDTH // NUM_HEADS, window=WINDOW, shifted=bool(i % 2))
            tokens = block.apply({"params": block_params}, tokens, valid=jnp.ones(tokens.shape[:-1], bool))
        return PatchMerging(WIDTH).apply({"params": params["merging"]}, tokens)[:, 0]

    merged, pull = jax.vjp(ours, stage_params(stage), jnp.asarray(x))
    params_gradient, x_gradient = pull(jnp.asarray(probe))

    torch_x = torch.tensor(x.reshape(2, -1, WIDTH), dtype=torch.float64, requires_grad=True)
    wanted = stage.double()(torch_x, grid)[0]
    (wanted * torch.tensor(probe).reshape(wanted.shape)).sum().backward()
    assert merged.shape == probe.shape
    np.testing.assert_allclose(merged.reshape(wanted.shape), wanted.detach(), atol=1e-5)
    np.testing.assert_allclose(x_gradient.reshape(torch_x.shape), torch_x.grad, atol=1e-5)
    _assert_close(params_gradient, stage_params(_gradients(stage)))


def test_backbone_runs_its_swin_stages_as_transformers_does():
    """Two blocks a stage, so that every other one is shifted; the second stage's 12 rows are padded to 16."""
    model, grids = Backbone((MODALITIES["hr"],), width=WIDTH, depths=(2, 2, 1, 1), window=WINDOW), ((24, 32), (12, 16))
    stages = [
        _randomise(
            Swinv2Stage(_config(), WIDTH * 2**i, grid, 2, NUM_HEADS * 2**i, [0.0] * 2, Swinv2PatchMerging), seed=i
        )
        for i, grid in enumerate(grids)
    ]
    rng = np.random.default_rng(3)
    images = {"hr": jnp.asarray(rng.normal(size=(2, 1, 96, 128, 3)), jnp.float32)}
    valid = {"hr": jnp.ones((2, 1, 24, 32), bool)}
    probe = rng.normal(size=(2, 1, 12, 16, 2 * WIDTH)).astype(np.float32) / 10
    params = sharding.unbox(jax.jit(functools.partial(model.init, train=False))(jax.random.key(0), images, valid))

    def swin_params(stages):
        first, second = stages
        merging = {"kernel": _array(first.downsample.reduction.weight).T, "norm": _norm(first.downsample.norm)}
        blocks = {
            f"stage{s}_{i}": _block_params(b) for s, x in ((1, first), (2, second)) for i, b in enumerate(x.blocks)
        }
        return {**blocks, "merging_2": merging}

    @jax.jit
    def ours(swin):
        def loss(swin):
            out = model.apply({"params": {**params["params"], **swin}}, images, valid, train=False, return_stages=True)
            return (out.stages["hr"][1] * probe).sum(), out.stages["hr"][:2]

        return jax.grad(loss, has_aux=True)(swin)

    gradient, after_stage = ours(swin_params(stages))

    tokenizer = {"params": params["params"]["tokenizer_hr"]}
    tokens = Tokenizer(MODALITIES["hr"].patch, WIDTH).apply(tokenizer, images["hr"])
    x, wanted = torch.tensor(np.asarray(tokens).reshape(2, -1, WIDTH), dtype=torch.float64), []
    for stage, grid in zip(stages, grids):
        merged, before_merging = stage.double()(x, grid)[:2]
        wanted, x = [*wanted, before_merging], merged
    (wanted[1] * torch.tensor(probe).reshape(wanted[1].shape)).sum().backward()
    for got, want in zip(after_stage, wanted):
        np.testing.assert_allclose(got.reshape(want.shape), want.detach(), atol=1e-5)
    for parameter in stages[1].downsample.parameters():
        parameter.grad = torch.zeros_like(parameter)  # comes after what is compared
    _assert_close(gradient, swin_params([_gradients(stage) for stage in stages]))


def test_swin_block_masked_tokens_change_nothing_and_all_masked_is_finite():
    layer = _randomise(Swinv2Layer(_config(), WIDTH, (13, 11), NUM_HEADS, shift_size=4), seed=4)
    block = SwinBlock(head_width=WIDTH // NUM_HEADS, window=WINDOW, shifted=True)
    rng = np.random.default_rng(2)
    x, other = (jnp.asarray(rng.normal(size=(1, 2, 13, 11, WIDTH)), jnp.float32) for _ in range(2))
    valid = jnp.asarray(rng.random((1, 2, 13, 11)) < 0.5).at[0, 1].set(False)
    params = {"params": _block_params(layer)}

    @jax.jit
    def run(x):
        used = lambda x: jnp.where(valid[..., None], block.apply(params, x, valid=valid), 0)  # noqa: E731
        y, pull = jax.vjp(used, x)
        return y, pull(jnp.ones_like(y))[0]

    (y, gradient), (changed, _) = run(x), run(jnp.where(valid[..., None], x, 10 * other))
    np.testing.assert_array_equal(y, changed)
    assert jnp.isfinite(gradient).all()
    np.testing.assert_array_equal(jnp.where(valid[..., None], 0, gradient), 0)
