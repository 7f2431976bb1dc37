"""Attention against loops, the rotary embedding, and the global block against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F

from skysense_jax.models.attention import attend, rotate, rotation, token_offsets
from skysense_jax.models.vit import GlobalBlock
from skysense_jax.sharding import unbox


def test_attend_masked_and_biased_equals_loop():
    rng = np.random.default_rng(0)
    num_heads, head_width = 3, 4
    query, key, value = (rng.normal(size=(2, n, 12)).astype(np.float32) for n in (3, 5, 5))
    mask = rng.random((2, 3, 5)) < 0.6
    mask[:, :, 0] = True
    bias = rng.normal(size=(num_heads, 3, 5)).astype(np.float32)
    got = attend(*map(jnp.asarray, (query, key, value)), head_width=4, mask=jnp.asarray(mask), bias=jnp.asarray(bias))
    for row in range(2):
        for n in range(3):
            for head in range(num_heads):
                channels = slice(head * head_width, (head + 1) * head_width)
                seen = np.flatnonzero(mask[row, n])
                scores = [query[row, n, channels] @ key[row, m, channels] / 2 + bias[head, n, m] for m in seen]
                weights = np.exp(scores) / np.exp(scores).sum()
                wanted = weights @ value[row, seen][:, channels]
                np.testing.assert_allclose(got[row, n, channels], wanted, atol=1e-5)


def test_attend_all_keys_masked_is_finite_with_finite_gradient():
    x = jax.random.normal(jax.random.key(0), (2, 3, 8))
    mask = jnp.zeros((2, 1, 3), bool)
    f = lambda x: attend(x, x, x, head_width=4, mask=mask).sum()  # noqa: E731
    value, gradient = jax.value_and_grad(f)(x)
    assert jnp.isfinite(value)
    assert jnp.isfinite(gradient).all()


def test_token_offsets_fine_and_coarse_grids_agree_on_ground():
    cells = (6, 4)
    fine, coarse = token_offsets((12, 8), cells), token_offsets(cells, cells)
    fine = fine.reshape(6, 2, 4, 2, 2).mean((1, 3)).reshape(-1, 2)  # centre of the 2x2 fine tokens of a cell
    np.testing.assert_allclose(fine, coarse, atol=1e-12)
    np.testing.assert_allclose(coarse.reshape(6, 4, 2)[0, 0], (-2.5, -1.5))


def test_rotation_scores_depend_on_offset_difference_only():
    head_width, rng = 32, np.random.default_rng(1)
    query, key = rng.normal(size=(2, 1, 64)).astype(np.float32)
    places = np.array([[0.0, 0.0], [3.5, -2.0]])

    def score(query_place, key_place):
        turned = [
            np.asarray(rotate(jnp.asarray(x), rotation(place[None], head_width=head_width), head_width=head_width))
            for x, place in ((query, query_place), (key, key_place))
        ]
        return (turned[0] * turned[1]).sum()

    move = np.array([1.25, 7.5])
    first, moved = score(*places), score(*(places + move))
    np.testing.assert_allclose(first, moved, atol=2e-5)
    assert abs(first - score(places[0], places[1][::-1])) > 1e-3  # rows and columns are not the same
    np.testing.assert_array_equal(
        rotate(jnp.asarray(query), rotation(np.zeros((1, 2)), head_width=32), head_width=32), query
    )


def _torch_block(p, x, valid, angles, num_heads):
    """The block written with PyTorch's own attention and complex numbers for the rotation."""
    width, (rows, tokens) = x.shape[-1], x.shape[:2]
    norm = lambda name, y: F.layer_norm(y, (width,), p[name]["scale"], p[name]["bias"], 1e-5)  # noqa: E731

    def turn(y):
        first, second = y.chunk(2, dim=-1)
        turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((turned.real, turned.imag), dim=-1)

    attention, mlp = p["attention"], p["mlp"]
    y = norm("attention_norm", x)
    heads = lambda name: (y @ attention[name]["kernel"] + attention[name]["bias"]).view(rows, tokens, num_heads, -1)  # noqa: E731
    query, key, value = (heads(name).transpose(1, 2) for name in ("query", "key", "value"))
    y = F.scaled_dot_product_attention(turn(query), turn(key), value, attn_mask=valid[:, None, None, :])
    y = y.transpose(1, 2).reshape(rows, tokens, width)
    x = x + p["attention_layer_scale"] * (y @ attention["output"]["kernel"] + attention["output"]["bias"])
    y = F.gelu(norm("mlp_norm", x) @ mlp["hidden"]["kernel"] + mlp["hidden"]["bias"])
    return x + p["mlp_layer_scale"] * (y @ mlp["output"]["kernel"] + mlp["output"]["bias"])


def test_global_block_equals_pytorch_in_values_and_gradients():
    head_width, grid, num_prompts = 8, (3, 5), 2
    offsets = np.concatenate((token_offsets(grid, (3, 5)), np.zeros((num_prompts, 2))))
    rng = np.random.default_rng(2)
    x = rng.normal(size=(2, 2, len(offsets), 16)).astype(np.float32)
    valid = rng.random(x.shape[:3]) < 0.7
    valid[..., 0] = True
    probe = rng.normal(size=x.shape).astype(np.float32)
    block = GlobalBlock(head_width, layer_scale_init=0.5)
    inputs = dict(valid=jnp.asarray(valid), turn=rotation(offsets, head_width=head_width))
    shapes = unbox(block.init(jax.random.key(0), jnp.asarray(x), **inputs))["params"]
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.3).astype(np.float32), shapes)

    ours = jax.jit(jax.value_and_grad(lambda p, x: (block.apply({"params": p}, x, **inputs)[0] * probe).sum(), (0, 1)))
    value, gradients = ours(params, jnp.asarray(x))

    # wavelengths written out: 8 channels are 4 pairs, 2 turn with the row and 2 with the column, of 1 and 128 cells
    row, column = offsets.T
    angles = 2 * np.pi * np.stack((row, row / 128, column, column / 128), axis=-1)
    torch_params = jax.tree.map(lambda leaf: torch.tensor(leaf, requires_grad=True), params)
    torch_x = torch.tensor(x, requires_grad=True)
    y = _torch_block(
        torch_params,
        torch_x.view(4, -1, 16),
        torch.tensor(valid).view(4, -1),
        torch.tensor(angles, dtype=torch.float32),
        num_heads=2,
    )
    total = (y * torch.tensor(probe).view(4, -1, 16)).sum()
    total.backward()
    np.testing.assert_allclose(
        block.apply({"params": params}, jnp.asarray(x), **inputs)[0].reshape(4, -1, 16), y.detach(), atol=1e-5
    )
    np.testing.assert_allclose(value, total.item(), rtol=1e-5)
    np.testing.assert_allclose(gradients[1], torch_x.grad, atol=5e-5)
    wanted = jax.tree.map(lambda leaf: leaf.grad.numpy(), torch_params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), gradients[0], wanted)
