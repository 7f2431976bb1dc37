"""Counted FLOPs against those worked out by hand, and against the compiler's where it has no loop to miscount."""

import jax
import jax.numpy as jnp
import pytest
from jax.extend import core

from skysense_jax.kernels import window
from skysense_jax.plan import flops
from skysense_jax.sharding import make_mesh


def counted(function, *shapes):
    return flops.of_jaxpr(jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).jaxpr)


def test_product_counts_two_per_multiply_add_over_batch_and_contracted_axes():
    assert counted(lambda x, w: jnp.einsum("bnd,bdf->bnf", x, w), (2, 3, 5), (2, 5, 7)) == 2 * 2 * 3 * 5 * 7


def test_convolution_counts_its_kernel_at_each_place():
    def convolve(x, w):
        return jax.lax.conv_general_dilated(x, w, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert counted(convolve, (2, 8, 6, 3), (2, 2, 3, 5)) == 2 * (2 * 4 * 3 * 5) * (2 * 2 * 3)


def test_scan_counts_every_turn_and_its_gradient_three_times():
    def chain(w, x):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=5)[0].sum()

    forward = 5 * 2 * 3 * 7 * 7
    assert counted(chain, (7, 7), (3, 7)) == forward
    both = counted(jax.grad(chain, argnums=(0, 1)), (7, 7), (3, 7))
    assert both == 3 * forward
    again = counted(jax.value_and_grad(jax.checkpoint(chain), argnums=(0, 1)), (7, 7), (3, 7))
    assert again == 4 * forward  # the recomputation counts


def test_what_no_result_needs_does_not_count():
    def some(x, w):
        def body(carry, _):
            return (carry[0] @ w, carry[1] + 1.0), (carry[0] @ w).sum()

        (_, count), _ = jax.lax.scan(jax.checkpoint(body), (x, 0.0), None, length=5)
        return x @ w, count

    assert counted(some, (3, 7), (7, 7)) == 2 * 3 * 7 * 7


def test_branches_count_the_dearest_and_unknown_loops_are_refused():
    def branch(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

    assert counted(branch, (3, 7), (7, 7)) == 2 * 2 * 3 * 7 * 7

    def loop(x, w):
        return jax.lax.while_loop(lambda c: c.sum() > 0, lambda c: c @ w, x)

    with pytest.raises(ValueError, match="how often"):
        counted(loop, (3, 7), (7, 7))


def test_count_equals_the_compilers_on_an_unrolled_mlp():
    def mlp(x, w, v):
        return ((x @ w) @ v).sum()

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((64, 96), (96, 384), (384, 96))]
    compiled = jax.jit(jax.value_and_grad(mlp, argnums=(0, 1, 2))).lower(*shapes).compile()
    ours = counted(jax.value_and_grad(mlp, argnums=(0, 1, 2)), *(s.shape for s in shapes))
    assert compiled.cost_analysis()["flops"] == pytest.approx(ours, rel=0.02)


@pytest.mark.parametrize(("name", "products"), [("fwd", 2), ("bwd", 5)])
def test_attention_of_cudnn_counts_its_products(name, products):
    primitive = core.Primitive(f"dot_product_attention_{name}_wrapper")  # as jax calls it where cuDNN is installed
    primitive.def_abstract_eval(lambda q, k, v: q)
    shapes = (2, 64, 4, 32), (2, 128, 4, 32), (2, 128, 4, 32)
    assert counted(primitive.bind, *shapes) == products * 2 * 2 * 64 * 4 * 32 * 128


def test_kernel_of_ours_counts_what_it_says_on_every_device_of_a_mesh():
    maps, images = (8, 8, 16, 64), 8
    heads = 2

    def mixed(query, bias, scale):
        seen = jnp.ones(query.shape[:4], bool)
        how = dict(shifted=False, head_width=32, implementation="mosaic", batch_axes=("data",))
        return window.window_attention(query, query, query, bias, scale, seen, **how)

    shapes = ((images, 1, *maps[1:]), (heads, 64, 64), (heads,))
    wanted = 2 * 2 * images * 8 * 16 * 64 * 64
    assert counted(mixed, *shapes) == wanted
    with jax.set_mesh(make_mesh(8, 1, 1, 1)):
        assert counted(mixed, *shapes) == wanted
