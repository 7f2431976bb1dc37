"""The kernel of global attention against the plain one and PyTorch's: values, gradients, meshes, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from skysense_jax.kernels import full, full_tpu
from skysense_jax.models.attention import rotation
from skysense_jax.models.vit import GlobalBlock
from skysense_jax.sharding import make_mesh
from tests.kernels.grid import moved
from tests.kernels.nearness import assert_as_near, assert_near


def _both(
    *, num_tokens, heads=2, head_width=32, turned=True, batch=2, images=2, dtype=jnp.float32, share=0.7, mesh=None
):
    """{name: array} of a plain global block and of one with the kernel: output, gradients of parameters and tokens.

    Nothing comes from above to invalid tokens. ``mesh``: the kernel's alone runs on it.
    """
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(batch, images, num_tokens, heads * head_width)), jnp.float32)
    valid = jnp.asarray(rng.random(x.shape[:-1]) < 0.7)
    upstream = jnp.asarray(rng.normal(size=x.shape), jnp.float32)
    turn = rotation(rng.normal(size=(num_tokens, 2)) * 5, head_width=head_width) if turned else None
    results = []
    for implementation in ("xla", "mosaic interpreted"):
        block = GlobalBlock(head_width, 1, attention=implementation, compute_dtype=dtype)
        params = jax.jit(block.init, static_argnames="train")(jax.random.key(1), x, valid=valid, turn=turn)

        def loss(params, x, block=block):
            out = block.apply(params, x, valid=valid, turn=turn)[0].astype(jnp.float32)
            return (out * upstream * valid[..., None]).sum(), out

        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        if mesh is not None and implementation != "xla":
            with jax.set_mesh(mesh):
                (_, out), gradients = run(params, x)
        else:
            (_, out), gradients = run(params, x)
        out = jnp.where(valid[..., None], out, 0)
        results.append({"out": out, **dict(jax.tree_util.tree_leaves_with_path(gradients))})
    return results


@pytest.mark.parametrize(
    "sizes",
    [
        dict(num_tokens=20),  # in half a register of lanes
        dict(num_tokens=260, heads=8, batch=1),  # 256 tokens and four prompts; two groups
        dict(num_tokens=137, heads=4),
        dict(num_tokens=68, heads=2, head_width=64, turned=False),
        dict(num_tokens=14, heads=3, head_width=16, turned=False, images=19),  # short: eight at a time, three left
        dict(num_tokens=31, heads=4, head_width=64, images=9),
        dict(num_tokens=33, heads=2, head_width=128),
        dict(num_tokens=1, heads=4, turned=False),
        dict(num_tokens=530, heads=4, batch=1, images=1),  # columns in several rounds, the last not full
    ],
)
def test_block_with_the_kernel_equals_the_plain_one_in_values_and_gradients(sizes):
    plain, fused = _both(**sizes)
    assert_near(fused, plain)


def test_kernel_equals_pytorch():
    rng = np.random.default_rng(0)
    query, key, value, upstream = (rng.normal(size=(3, 75, 128)).astype(np.float32) for _ in range(4))
    seen = rng.random((3, 75)) < 0.6
    given = [torch.tensor(x, requires_grad=True) for x in (query, key, value)]
    heads = [x.reshape(3, 75, 4, 32).transpose(1, 2) for x in given]
    out = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=torch.tensor(seen)[:, None, None])
    out = out.transpose(1, 2).reshape(3, 75, 128)
    out.backward(torch.tensor(upstream))
    how = dict(head_width=32, interpret=True)
    arrays = [jnp.asarray(x)[None] for x in (query, key, value, seen)]
    np.testing.assert_allclose(full_tpu.forward(*arrays, None, **how)[0], out.detach(), rtol=0, atol=1e-5)
    for got, wanted in zip(full_tpu.backward(*arrays, None, jnp.asarray(upstream)[None], **how), given):
        np.testing.assert_allclose(got[0], wanted.grad, rtol=0, atol=1e-5)


def test_bfloat16_kernel_is_as_near_to_fp32_as_the_plain_one():
    sizes = dict(num_tokens=260, heads=4, batch=1)
    exact, _ = _both(**sizes)
    plain, fused = _both(**sizes, dtype=jnp.bfloat16)
    assert_as_near(fused, plain, exact)


def test_image_without_a_token_that_is_seen_is_finite_with_finite_gradients():
    x = jax.random.normal(jax.random.key(0), (1, 2, 20, 32))
    seen = jnp.asarray([[[True] * 20, [False] * 20]])

    def out(x):
        return full.full_attention(x, x, x, seen, None, head_width=32, implementation="mosaic interpreted")

    value, pull = jax.vjp(out, x)
    assert jnp.isfinite(value).all()
    assert jnp.isfinite(pull(jnp.ones_like(value))[0]).all()


@pytest.mark.parametrize("axes", [(2, 2, 1, 2), (1, 2, 2, 2)])
def test_kernel_on_a_mesh_equals_one_device(axes):
    """The second divides heads too."""
    plain, spread = _both(num_tokens=20, heads=4, batch=8, mesh=make_mesh(*axes))
    assert_near(spread, plain)


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        (dict(num_tokens=20, width=96, head_width=48, tensor_devices=1), "heads of 48 in a width of 96"),
        (dict(num_tokens=20, width=160, head_width=32, tensor_devices=1), "heads of 32 in a width of 160"),
        (dict(num_tokens=20, width=96, head_width=32, tensor_devices=2), "3 heads over 2 devices"),
        (dict(num_tokens=9000, width=128, head_width=32, tensor_devices=1), "9000 tokens, which take"),
    ],
)
def test_what_the_kernel_cannot_take_is_told(sizes, told):
    assert told in full.problem(**sizes, itemsize=2)


def test_a_view_of_768_pixels_fits():
    assert not full.problem(num_tokens=48 * 48 + 4, width=1408, head_width=32, itemsize=2, tensor_devices=1)


def test_block_that_the_kernel_does_not_take_is_plain_and_says_so_once(caplog):
    with caplog.at_level("INFO"):
        plain, fused = _both(num_tokens=12, heads=5)
        _both(num_tokens=13, heads=5)
    assert caplog.text.count("attention 'xla' and not 'mosaic interpreted': heads of 32 in a width of 160") == 1
    for name, wanted in plain.items():
        np.testing.assert_array_equal(fused[name], wanted)


@pytest.mark.parametrize(
    ("shape", "turned"), [((1, 2, 260, 256), True), ((1, 2, 260, 256), False), ((2, 20, 14, 256), False)]
)
def test_traffic_is_that_of_the_blocks_that_the_grid_visits(shape, turned):
    query, seen = jax.ShapeDtypeStruct(shape, jnp.bfloat16), jax.ShapeDtypeStruct(shape[:3], jnp.bool_)
    turn = (jax.ShapeDtypeStruct((260, 16), jnp.float32),) * 2 if turned else None
    wanted = full_tpu.traffic_bytes(shape, head_width=32, itemsize=2, turned=turned)
    for name, maps in (("forward", (query,) * 3), ("backward", (query,) * 4)):

        def call(*maps, name=name, seen, turn):
            rest = maps[3:]
            return getattr(full_tpu, name)(*maps[:3], seen, turn, *rest, head_width=32)

        traced = jax.make_jaxpr(call)(*maps, seen=seen, turn=turn)
        (kernel,) = [eqn for eqn in traced.eqns if eqn.primitive.name == "pallas_call"]
        assert moved(kernel.params["grid_mapping"]) == wanted[name], name
