"""Fused window attention against the plain one of models/swin.py: values, gradients, meshes, what it cannot take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skysense_jax.kernels import window, window_tpu
from skysense_jax.models.swin import SwinBlock
from skysense_jax.sharding import make_mesh
from tests.kernels.grid import moved
from tests.kernels.nearness import assert_as_near, assert_near


def _block(implementation, *, heads=3, head_width=32, dtype=jnp.float32, shifted=True, window_side=8, mlp_ratio=1):
    return SwinBlock(
        head_width=head_width,
        window=window_side,
        shifted=shifted,
        mlp_ratio=mlp_ratio,
        window_attention=implementation,
        compute_dtype=dtype,
    ), heads * head_width


def _case(rows, columns, width, *, batch=2, images=1, share=0.7, seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(batch, images, rows, columns, width)), jnp.float32)
    valid = jnp.asarray(rng.random(x.shape[:-1]) < share)
    return x, valid


def _run(block, params, *cases):
    """Output, and gradients of parameters and tokens, of each case; nothing comes from above to invalid tokens."""

    def loss(params, x, valid, upstream):
        out = block.apply(params, x, valid=valid).astype(jnp.float32)
        return (out * upstream * valid[..., None]).sum(), out

    step, found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)), []
    for x, valid, upstream in cases:
        (_, out), gradients = step(params, x, valid, upstream)
        out = jnp.where(valid[..., None], out, 0)
        found.append({"out": out, **dict(jax.tree_util.tree_leaves_with_path(gradients))})
    return {name: np.stack([one[name] for one in found]) for name in found[0]}


def _upstream(x, seed=2):
    return jnp.asarray(np.random.default_rng(seed).normal(size=x.shape), jnp.float32)


def _both(kernel, *, rows, columns, share=0.7, images=1, **sizes):
    plain, width = _block("xla", **sizes)
    fused, _ = _block(f"{kernel} interpreted", **sizes)
    x, valid = _case(rows, columns, width, images=images, share=share)
    params = jax.jit(plain.init)(jax.random.key(1), x, valid=valid)
    return [_run(block, params, (x, valid, _upstream(x))) for block in (plain, fused)]


KERNELS = pytest.mark.parametrize("kernel", ["mosaic", "triton"])


@KERNELS
@pytest.mark.parametrize(
    ("rows", "columns", "sizes"),
    [
        (8, 16, dict(shifted=False)),
        (16, 24, dict()),  # shifted; an odd number of windows in a row
        (13, 18, dict(heads=5)),  # padded, and a last group of one head
        (24, 32, dict(heads=4, images=3)),  # pairs of windows, several in a row
        (16, 16, dict(heads=2, head_width=64)),
        (16, 8, dict(heads=9, head_width=16)),  # eight heads a group, one window wide: not shifted
    ],
)
def test_block_with_the_kernel_equals_the_plain_one_in_values_and_gradients(kernel, rows, columns, sizes):
    plain, fused = _both(kernel, rows=rows, columns=columns, **sizes)
    assert_near(fused, plain)


@KERNELS
def test_bfloat16_kernel_is_as_near_to_fp32_as_the_plain_one(kernel):
    """Over three draws: a vector's gradient has 96 numbers, and the tenth largest error of so few is chance."""
    whole, width = _block("xla")
    half = dict(dtype=jnp.bfloat16)
    cases = [(*case, _upstream(case[0], 2 + seed)) for seed in range(3) for case in [_case(24, 32, width, seed=seed)]]
    params = jax.jit(whole.init)(jax.random.key(1), cases[0][0], valid=cases[0][1])
    blocks = whole, _block("xla", **half)[0], _block(f"{kernel} interpreted", **half)[0]
    exact, plain, fused = (_run(block, params, *cases) for block in blocks)
    assert_as_near(fused, plain, exact)


@KERNELS
def test_kernel_on_a_mesh_equals_one_device(kernel):
    fused, width = _block(f"{kernel} interpreted")
    x, valid = _case(16, 16, width, batch=8)
    params = jax.jit(fused.init)(jax.random.key(1), x, valid=valid)
    alone = _run(fused, params, (x, valid, _upstream(x)))
    mesh = make_mesh(2, 2, 1, 2)
    with jax.set_mesh(mesh):
        spread = _run(fused, params, (x, valid, _upstream(x)))
    assert_near(spread, alone)


SIZES = dict(window=8, width=96, head_width=32, columns=16, itemsize=2, shifted=True, tensor_devices=1)


@KERNELS
@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        (dict(window=7), "windows of 7 x 7 tokens; wanted 8 x 8"),
        (dict(head_width=48), "heads of 48 in a width of 96"),
        (dict(tensor_devices=2), "heads over 2 devices"),
    ],
)
def test_what_a_kernel_cannot_take_is_told(kernel, sizes, told):
    assert told in window.problem(kernel, **SIZES | sizes)


def test_shifted_windows_of_which_no_row_fits_a_chip_are_told():
    assert window.problem("mosaic", **SIZES | dict(width=352, columns=256)) == ""
    told = window.problem("mosaic", **SIZES | dict(width=704, columns=136))
    assert "136 columns of width 704; wanted a row of them on the chip, 128 columns" in told
    assert window.problem("mosaic", **SIZES | dict(width=704, columns=136, shifted=False)) == ""


def test_row_too_wide_for_the_chip_is_plain_if_shifted_and_else_of_several_blocks(monkeypatch, caplog):
    monkeypatch.setattr(window_tpu, "_BLOCK_BYTES", 16 * 8 * 128 * 4)  # two windows
    with caplog.at_level("INFO"):
        plain, fused = _both("mosaic", rows=16, columns=32)
    assert "'mosaic interpreted': shifted windows in 32 columns of width 96" in caplog.text
    for name, wanted in plain.items():
        np.testing.assert_array_equal(fused[name], wanted)
    assert window_tpu.columns_of_block(32, 96, itemsize=4) == 16
    plain, fused = _both("mosaic", rows=16, columns=32, shifted=False)
    assert_near(fused, plain)


@KERNELS
def test_block_that_no_kernel_takes_is_plain_and_says_so(caplog, kernel):
    with caplog.at_level("INFO"):
        plain, fused = _both(kernel, rows=14, columns=14, window_side=7)
    assert f"window attention 'xla' and not '{kernel} interpreted': windows of 7 x 7 tokens" in caplog.text
    for name, wanted in plain.items():
        np.testing.assert_array_equal(fused[name], wanted)


@pytest.mark.parametrize(
    ("kernel", "window_side", "whole"),
    [
        ("triton interpreted", 8, False),
        ("triton interpreted", 4, True),
        ("mosaic interpreted", 8, True),
        ("xla", 8, True),
    ],
)
def test_hidden_layer_of_a_whole_map_stands_in_memory_but_beside_the_gpu_kernel(kernel, window_side, whole):
    block, width = _block(kernel, window_side=window_side, mlp_ratio=2)
    x, valid = _case(32, 16, width)
    params = jax.eval_shape(block.init, jax.random.key(1), x, valid=valid)
    loss = lambda params, x: block.apply(params, x, valid=valid).sum()  # noqa: E731
    text = str(jax.make_jaxpr(jax.grad(loss))(params, x))
    hidden = block.mlp_ratio * width
    assert f"f32[2,1,{32 // 16},16,{hidden}]" in text or whole
    biased = f"f32[2,1,32,16,{hidden}] = add"  # the hidden layer with its bias; mlp_ratio is 2, so nothing else is
    assert (biased in text) == whole


def test_blocks_hold_whole_windows_and_fit_the_chip():
    for columns, width in ((128, 352), (64, 704), (24, 96), (512, 1408)):
        block = window_tpu.columns_of_block(columns, width, itemsize=2)
        assert columns % block == block % 8 == 0
        assert 20 * 8 * block * (-(-width // 128) * 128) * 2 < 32 * 2**20  # of 48, shifted ones too


@pytest.mark.parametrize("shifted", [False, True])
def test_traffic_is_that_of_the_blocks_that_the_grid_visits(shifted):
    """Against the specs that the kernels are called with: each block that is not where it was before, moved once."""
    shape = (2, 16, 24, 96)
    query = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    bias, scale = jax.ShapeDtypeStruct((3, 64, 64), jnp.float32), jax.ShapeDtypeStruct((3,), jnp.float32)
    seen = jax.ShapeDtypeStruct(shape[:3], jnp.bool_)
    static = dict(shifted=shifted, head_width=32)
    wanted = window_tpu.traffic_bytes(shape, head_width=32, itemsize=2, shifted=shifted)
    small = (query, query, query, bias, scale, seen)
    for name, traced in (
        ("forward", jax.make_jaxpr(lambda *a: window_tpu.forward(*a, **static))(*small)),
        ("backward", jax.make_jaxpr(lambda *a: window_tpu.backward(*a, **static))(*small, query)),
    ):
        (call,) = [eqn for eqn in traced.eqns if eqn.primitive.name == "pallas_call"]
        assert moved(call.params["grid_mapping"]) == wanted[name], name
