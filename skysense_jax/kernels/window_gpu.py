"""Window attention on a GPU (Pallas, Triton): a program holds a window and a head in registers.

The forward pass has a program for each window and head. The backward pass has fewer, each of which goes through its
share of the windows and adds up the gradients of bias and scale on the way; XLA adds those of the programs.

Mathematics, arguments and gradients: window.py. Source: Swin V2 (arXiv 2111.09883) sec. 3; the layout is ours.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from skysense_jax.kernels.window_layout import MASKED, TINY, TOKENS, WINDOW, cost, regions

_PROGRAMS = 1024  # of the backward pass at most, over all heads: some for each of a GPU's cores


def problem(*, window: int, width: int, head_width: int, columns: int, itemsize: int, shifted: bool) -> str:
    """Why this kernel cannot take windows, width and heads such as these; empty if it can."""
    del columns, itemsize, shifted  # it takes all maps
    if window != WINDOW:
        return f"windows of {window} x {window} tokens; wanted {WINDOW} x {WINDOW}"
    if head_width not in (16, 32, 64, 128) or width % head_width:
        return f"heads of {head_width} in a width of {width}; wanted 16, 32, 64 or 128, and to divide the width"
    return ""


# ---- inside a kernel


def _dot(a, b):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _unit(x):
    """(1 / length of each row, the row scaled by it), fp32; zeros, as padding is, stay zeros with gradient 1."""
    x = x.astype(jnp.float32)
    square = (x * x).sum(axis=1, keepdims=True)
    inverse = jnp.where(square > TINY, jax.lax.rsqrt(jnp.maximum(square, TINY)), 1.0)
    return inverse, x * inverse


class _Window:
    """One window of one head: where it lies in the maps, around their edge if shifted, and its masked scores."""

    def __init__(self, number, head, query_ref, head_width, shifted):
        _, rows, columns, _ = query_ref.shape
        across, down = columns // WINDOW, rows // WINDOW
        image, place = number // (across * down), number % (across * down)
        row, column = place // across, place % across
        self._edge = 2 * (row == down - 1).astype(jnp.int32) + (column == across - 1).astype(jnp.int32)
        token, by = jnp.arange(TOKENS), WINDOW // 2 if shifted else 0
        # A place for each token, since around the edge they do not follow each other; where nothing is shifted the
        # remainders do nothing.
        self._at = (
            jnp.full(TOKENS, image),
            (row * WINDOW + by + token // WINDOW) % rows,
            (column * WINDOW + by + token % WINDOW) % columns,
        )
        self._channels = pl.ds(head * head_width, head_width)
        self._head = head

    def load(self, ref):
        return ref[(*self._at, self._channels)]

    def store(self, ref, x):
        ref[(*self._at, self._channels)] = x.astype(ref.dtype)

    def weights(self, query, key, bias_ref, seen_ref):
        """The softmax over what is seen, fp32; ``query`` scaled, both unit and in the maps' dtype."""
        kind = self._edge if bias_ref.shape[0] > 1 else 0
        scores = _dot(query, key.T) + bias_ref[kind, self._head]
        scores = jnp.where(seen_ref[self._at][None] > 0, scores, MASKED)
        scores = jnp.exp(scores - scores.max(axis=1, keepdims=True))
        return scores / scores.sum(axis=1, keepdims=True)


def _forward_kernel(query_ref, key_ref, value_ref, bias_ref, scale_ref, seen_ref, out_ref, *, head_width, shifted):
    head = pl.program_id(0)
    window, dtype = _Window(pl.program_id(1), head, query_ref, head_width, shifted), query_ref.dtype
    query = (_unit(window.load(query_ref))[1] * scale_ref[head]).astype(dtype)
    key = _unit(window.load(key_ref))[1].astype(dtype)
    weights = window.weights(query, key, bias_ref, seen_ref)
    window.store(out_ref, _dot(weights.astype(dtype), window.load(value_ref)))


def _backward_kernel(
    query_ref,
    key_ref,
    value_ref,
    upstream_ref,
    bias_ref,
    scale_ref,
    seen_ref,
    d_query_ref,
    d_key_ref,
    d_value_ref,
    d_bias_ref,
    d_scale_ref,
    *,
    head_width,
    shifted,
):
    head, program, dtype = pl.program_id(0), pl.program_id(1), query_ref.dtype
    images, rows, columns, _ = query_ref.shape
    windows = images * (rows // WINDOW) * (columns // WINDOW)
    each = pl.cdiv(windows, pl.num_programs(1))
    scale = scale_ref[head]

    def one(number, sums):
        d_bias, d_scale = sums
        window = _Window(number, head, query_ref, head_width, shifted)
        by_query, unit_query = _unit(window.load(query_ref))
        by_key, unit_key = _unit(window.load(key_ref))
        query, key, value = (unit_query * scale).astype(dtype), unit_key.astype(dtype), window.load(value_ref)
        upstream = window.load(upstream_ref)
        weights = window.weights(query, key, bias_ref, seen_ref)
        d_weights = _dot(upstream, value.T)
        d_scores = weights * (d_weights - (weights * d_weights).sum(axis=1, keepdims=True))
        d_scores16 = d_scores.astype(dtype)
        window.store(d_value_ref, _dot(weights.astype(dtype).T, upstream))
        d_query = _dot(d_scores16, key)
        d_scale += (d_query * unit_query).sum(axis=0)
        d_query *= scale
        d_key = _dot(d_scores16.T, query)
        along_query = (unit_query * d_query).sum(axis=1, keepdims=True)
        along_key = (unit_key * d_key).sum(axis=1, keepdims=True)
        window.store(d_query_ref, by_query * (d_query - unit_query * along_query))
        window.store(d_key_ref, by_key * (d_key - unit_key * along_key))
        return d_bias + d_scores, d_scale

    zeros = jnp.zeros((TOKENS, TOKENS), jnp.float32), jnp.zeros((head_width,), jnp.float32)
    first = program * each
    d_bias, d_scale = jax.lax.fori_loop(first, jnp.minimum(first + each, windows), one, zeros)
    d_bias_ref[program, head] = d_bias
    d_scale_ref[program, head] = d_scale


# ---- from outside


def _operands(bias, scale, seen, shifted):
    bias = bias[None] + regions()[:, None] if shifted else bias[None]
    return bias, scale, seen.astype(jnp.float32)


def _call(kernel, arrays, outputs, *, name, products, programs, head_width, shifted, interpret):
    heads, maps = arrays[0].shape[3] // head_width, [x for x in arrays if x.shape == arrays[0].shape]
    moved = sum(x.size * x.dtype.itemsize for x in (*maps, *jax.tree.leaves(outputs)))
    return pl.pallas_call(
        functools.partial(kernel, head_width=head_width, shifted=shifted),
        grid=(heads, programs),
        out_shape=outputs,
        name=name,
        interpret=interpret,
        cost_estimate=cost(arrays[0].shape, head_width, products=products, num_bytes=moved),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
    )(*arrays)


def forward(query, key, value, bias, scale, seen, *, shifted: bool, head_width: int, interpret: bool = False):
    """What each token gathers; arguments as in ``window.window_attention``, maps of all images in a row."""
    images, rows, columns, _ = query.shape
    return _call(
        _forward_kernel,
        (query, key, value, *_operands(bias, scale, seen, shifted)),
        jax.ShapeDtypeStruct(query.shape, query.dtype),
        name="window_attention_forward",
        products=2,
        programs=images * (rows // WINDOW) * (columns // WINDOW),
        head_width=head_width,
        shifted=shifted,
        interpret=interpret,
    )


def backward(query, key, value, bias, scale, seen, upstream, *, shifted, head_width, interpret: bool = False):
    """Gradients of query, key, value, bias and scale."""
    images, rows, columns, width = query.shape
    heads = width // head_width
    programs = min(images * (rows // WINDOW) * (columns // WINDOW), max(_PROGRAMS // heads, 1))
    of_map = jax.ShapeDtypeStruct(query.shape, query.dtype)
    d_query, d_key, d_value, d_bias, d_scale = _call(
        _backward_kernel,
        (query, key, value, upstream.astype(query.dtype), *_operands(bias, scale, seen, shifted)),
        [
            *[of_map] * 3,
            jax.ShapeDtypeStruct((programs, heads, TOKENS, TOKENS), jnp.float32),
            jax.ShapeDtypeStruct((programs, heads, head_width), jnp.float32),
        ],
        name="window_attention_backward",
        products=5,
        programs=programs,
        head_width=head_width,
        shifted=shifted,
        interpret=interpret,
    )
    return d_query, d_key, d_value, d_bias.sum(0), d_scale.sum((0, 2))
