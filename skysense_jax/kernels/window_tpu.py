"""Window attention on a TPU (Pallas, Mosaic): windows are blocks of the map, and all between the projections stays in
on-chip memory, forward and backward.

A head is 32 lanes of a register's 128, so four heads (a *group*) are worked on together. Keys of a window are laid out
once a head, zero outside the head's lanes (``_Windows.spread``): one product with all 128 lanes then gives the scores
of four heads side by side, 64 keys each; its transpose adds up again (``_Windows.own``). Sums over a head's lanes, or
over the keys of a head, are products with zeros and ones too, in two parts where one would round: the matrix units have
more time to spare than those that reduce across lanes. Every stage is written for all windows and groups at hand before
the next begins: the compiler schedules what it finds near, and a chain of dependent products waits for each of them.

Mathematics, arguments and gradients: window.py. Source: Swin V2 (arXiv 2111.09883) sec. 3; the layout is ours.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from skysense_jax.kernels.window_layout import MASKED, TINY, TOKENS, WINDOW, cost, regions

LANES = 128
_BLOCK_BYTES = 3 * 2**19  # of a block at most: 7 of them stand twice in 32 MiB


def problem(*, window: int, width: int, head_width: int) -> str:
    """Why this kernel cannot take windows, width and heads such as these; empty if it can."""
    if window != WINDOW:
        return f"windows of {window} x {window} tokens; wanted {WINDOW} x {WINDOW}"
    if TOKENS % head_width or width % head_width:
        return f"heads of {head_width} in a width of {width}; wanted heads that divide {TOKENS} and the width"
    return ""


def columns_of_block(columns: int, width: int, itemsize: int) -> int:
    """Columns of a block: as many whole windows as divide the map and fit; a block has one row of windows."""
    windows = columns // WINDOW
    fits = max(_BLOCK_BYTES // (TOKENS * _padded(width) * itemsize), 1)
    return WINDOW * max(n for n in range(1, windows + 1) if windows % n == 0 and n <= fits)


def traffic_bytes(shape: tuple[int, int, int, int], *, head_width: int, itemsize: int) -> dict[str, int]:
    """Bytes that the kernels move between main and on-chip memory: {"forward", "backward"}, by blocks and grid.

    ``shape`` is that of the query. A block whose place does not change from one step of the grid to the next is not
    moved again.
    """
    images, rows, columns, width = shape
    heads = width // head_width
    of_map = images * rows * columns * _padded(width) * itemsize
    seen = images * (rows // WINDOW) * (columns // WINDOW) * _group(head_width) * TOKENS * 4
    bias, scale = TOKENS * _padded(heads * TOKENS) * 4, _padded(width) * 4
    ones = _group(head_width) * TOKENS * LANES * 4
    return dict(
        forward=4 * of_map + seen + bias + scale + ones,
        backward=7 * of_map + seen + bias + scale + ones + images * (bias + scale),
    )


def _padded(width: int) -> int:
    return -(-width // LANES) * LANES


def _group(head_width: int) -> int:
    return LANES // head_width


# ---- inside a kernel


def _dot(a, b, dtype, *, transpose_a=False, transpose_b=False):
    """``a b`` in fp32, its operands in ``dtype``."""
    contract = ((0 if transpose_a else 1,), (1 if transpose_b else 0,))
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a.astype(dtype), b.astype(dtype), (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _exact_dot(a, ones, dtype, **transpose):
    """``a`` (fp32) times zeros and ones, without rounding ``a``: in two parts of 8 bits each where operands have 8."""
    if dtype == jnp.float32:
        return _dot(a, ones, dtype, **transpose)
    high = a.astype(dtype)
    return _dot(high, ones, dtype, **transpose) + _dot(a - high.astype(jnp.float32), ones, dtype, **transpose)


class _Windows:
    """The windows of a block that are worked on together, ``step`` side by side, and the lanes of each group."""

    def __init__(self, same_ref, *, step: int, width: int, head_width: int, dtype: Any):
        self.step, self.dtype, self.head_width = step, dtype, head_width
        self._same_ref = same_ref  # (heads of a group x tokens, lanes): 1 where the lane is the head's
        self.groups = [slice(first, min(first + LANES, width)) for first in range(0, width, LANES)]

    def heads(self, lanes: slice) -> int:
        return (lanes.stop - lanes.start) // self.head_width

    def keys(self, lanes: slice) -> slice:
        """Where a group's scores stand among those of all heads."""
        first = lanes.start // self.head_width * TOKENS
        return slice(first, first + self.heads(lanes) * TOKENS)

    def load(self, ref, at, lanes) -> list:
        """The tokens of each window, (tokens, lanes), fp32."""
        block = ref[0, :, pl.ds(at * self.step * WINDOW, self.step * WINDOW), lanes].astype(jnp.float32)
        return [block[:, i * WINDOW : (i + 1) * WINDOW].reshape(TOKENS, -1) for i in range(self.step)]

    def store(self, ref, at, lanes, windows) -> None:
        block = jnp.concatenate([window.reshape(WINDOW, WINDOW, -1) for window in windows], axis=1)
        ref[0, :, pl.ds(at * self.step * WINDOW, self.step * WINDOW), lanes] = block.astype(ref.dtype)

    def same(self, heads: int, lanes: int):
        return self._same_ref[0 : heads * TOKENS, 0:lanes]

    def head_sums(self, x):
        """For each lane the sum over its head's lanes."""
        stride = TOKENS // self.head_width
        ones = self._same_ref[0 : x.shape[1] * stride : stride, 0 : x.shape[1]]
        return _exact_dot(x, ones, self.dtype)

    def spread(self, x):
        """(tokens, lanes) once a head, (heads x tokens, lanes), zero outside the head's lanes."""
        heads = x.shape[1] // self.head_width
        return (jnp.concatenate([x] * heads) * self.same(heads, x.shape[1])).astype(self.dtype)

    def own(self, x):
        """The transpose of ``spread``."""
        heads = x.shape[1] // self.head_width
        x = x * self.same(heads, x.shape[1])
        return sum(x[head * TOKENS : (head + 1) * TOKENS] for head in range(heads))


def _unit(windows: _Windows, x):
    """(1 / length of each head's part, the part scaled by it); zeros, as padding is, stay zeros with gradient 1."""
    square = windows.head_sums(x * x)
    inverse = jnp.where(square > TINY, jax.lax.rsqrt(jnp.maximum(square, TINY)), 1.0)
    return inverse, x * inverse


def _exponentials(scores):
    """exp(score - the head's largest) of (tokens, heads x tokens)."""
    per_head = [scores[:, first : first + TOKENS] for first in range(0, scores.shape[1], TOKENS)]
    largest = [jnp.broadcast_to(x.max(axis=1, keepdims=True), x.shape) for x in per_head]
    return jnp.exp(scores - jnp.concatenate(largest, axis=1))


def _at_edge() -> tuple:
    """Whether this block is of the last row of windows, and holds the last column of them."""
    return tuple((pl.program_id(axis) == pl.num_programs(axis) - 1).astype(jnp.int32) for axis in (1, 2))


def _scores(windows: _Windows, work, refs, at, at_edge):
    """Masked scores of one window and group, from its scaled query and spread key."""
    bias_ref, seen_ref = refs
    keys, column = windows.keys(work["lanes"]), at * windows.step + work["window"]
    kind = 0
    if bias_ref.shape[0] > 1:
        last_row, last_block = at_edge
        kind = 2 * last_row + last_block * (column == seen_ref.shape[2] - 1)
    scores = _dot(work["query"], work["key"], windows.dtype, transpose_b=True) + bias_ref[kind, :, keys]
    seen = seen_ref[0, 0, column, :, 0 : keys.stop - keys.start]
    return jnp.where(seen > 0, scores, MASKED)


def _forward_kernel(query_ref, key_ref, value_ref, bias_ref, scale_ref, seen_ref, same_ref, out_ref, **static):
    windows, at_edge = _Windows(same_ref, width=query_ref.shape[-1], dtype=query_ref.dtype, **static), _at_edge()

    def several(at, carry):
        works = []
        for lanes in windows.groups:
            loaded = zip(*(windows.load(ref, at, lanes) for ref in (query_ref, key_ref, value_ref)))
            for window, (query, key, value) in enumerate(loaded):
                scaled = _unit(windows, query)[1] * scale_ref[0:1, lanes]
                work = dict(lanes=lanes, window=window, query=scaled.astype(windows.dtype))
                works.append(work | dict(key=windows.spread(_unit(windows, key)[1]), value=windows.spread(value)))
        for work in works:
            work["scores"] = _scores(windows, work, (bias_ref, seen_ref), at, at_edge)
        for work in works:
            work["weights"] = _exponentials(work["scores"]).astype(windows.dtype)
        for work in works:
            ones = windows.same(windows.heads(work["lanes"]), work["value"].shape[1])
            total = _dot(work["weights"], ones, windows.dtype)
            work["out"] = _dot(work["weights"], work["value"], windows.dtype) / total
        for lanes in windows.groups:
            windows.store(out_ref, at, lanes, [work["out"] for work in works if work["lanes"] == lanes])
        return carry

    jax.lax.fori_loop(0, query_ref.shape[2] // (WINDOW * windows.step), several, 0)


def _backward_kernel(
    query_ref,
    key_ref,
    value_ref,
    upstream_ref,
    bias_ref,
    scale_ref,
    seen_ref,
    same_ref,
    d_query_ref,
    d_key_ref,
    d_value_ref,
    d_bias_ref,
    d_scale_ref,
    **static,
):
    windows, at_edge = _Windows(same_ref, width=query_ref.shape[-1], dtype=query_ref.dtype, **static), _at_edge()
    dtype = windows.dtype

    @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
    def _():
        d_bias_ref[...] = jnp.zeros_like(d_bias_ref)
        d_scale_ref[...] = jnp.zeros_like(d_scale_ref)

    def several(at, carry):
        works = []
        for lanes in windows.groups:
            refs = (query_ref, key_ref, value_ref, upstream_ref)
            for window, arrays in enumerate(zip(*(windows.load(ref, at, lanes) for ref in refs))):
                query, key, value, upstream = arrays
                by_query, query = _unit(windows, query)
                by_key, key = _unit(windows, key)
                works.append(
                    dict(
                        lanes=lanes,
                        window=window,
                        upstream=upstream,
                        unit_query=query,
                        unit_key=key,
                        by_query=by_query,
                        by_key=by_key,
                        query=(query * scale_ref[0:1, lanes]).astype(dtype),
                        key=windows.spread(key),
                        value=windows.spread(value),
                    )
                )
        for work in works:
            work["scores"] = _scores(windows, work, (bias_ref, seen_ref), at, at_edge)
        for work in works:
            # Weights are not yet divided by their sum: what comes from above is instead. Both are rounded once, so that
            # the mean below is that of the products it is taken from.
            work["weights"] = _exponentials(work["scores"]).astype(dtype)
            work["ones"] = windows.same(windows.heads(work["lanes"]), work["value"].shape[1]).astype(dtype)
            inverse = 1 / _dot(work["weights"], work["ones"], dtype)
            work["upstream"] = (work["upstream"] * inverse).astype(dtype)
            work["mixed"] = _dot(work["weights"], work["value"], dtype) * work["upstream"] * inverse
        for work in works:
            d_weights = _dot(work["upstream"], work["value"], dtype, transpose_b=True)
            mean = _exact_dot(work["mixed"], work["ones"], dtype, transpose_b=True)  # of it under the softmax
            work["d_scores"] = work["weights"] * (d_weights - mean)
        for work in works:
            d_bias_ref[0, :, windows.keys(work["lanes"])] += work["d_scores"]
        for work in works:
            work["d_query"] = _dot(work["d_scores"], work["key"], dtype)
            work["d_key"] = windows.own(_dot(work["d_scores"], work["query"], dtype, transpose_a=True))
            work["d_value"] = windows.own(_dot(work["weights"], work["upstream"], dtype, transpose_a=True))
        for work in works:
            d_query, unit_query, unit_key = work["d_query"], work["unit_query"], work["unit_key"]
            d_scale_ref[0, 0:1, work["lanes"]] += (d_query * unit_query).sum(axis=0, keepdims=True)
            d_query = d_query * scale_ref[0:1, work["lanes"]]
            along_query = windows.head_sums(unit_query * d_query)
            along_key = windows.head_sums(unit_key * work["d_key"])
            work["d_query"] = work["by_query"] * (d_query - unit_query * along_query)
            work["d_key"] = work["by_key"] * (work["d_key"] - unit_key * along_key)
        for lanes in windows.groups:
            of_group = [work for work in works if work["lanes"] == lanes]
            for name, ref in (("d_query", d_query_ref), ("d_key", d_key_ref), ("d_value", d_value_ref)):
                windows.store(ref, at, lanes, [work[name] for work in of_group])
        return carry

    jax.lax.fori_loop(0, query_ref.shape[2] // (WINDOW * windows.step), several, 0)


# ---- from outside


class _Call:
    """What both kernels are called with besides maps: the grid, blocks and the small operands."""

    def __init__(self, query, bias, scale, seen, *, shifted, head_width):
        images, rows, columns, width = query.shape
        block = columns_of_block(columns, width, query.dtype.itemsize)
        heads, group = width // head_width, _group(head_width)
        self.grid = (images, rows // WINDOW, columns // block)
        self.map = pl.BlockSpec((1, WINDOW, block, width), lambda image, row, column: (image, row, column, 0))
        self.static = dict(step=2 if block % (2 * WINDOW) == 0 else 1, head_width=head_width)
        token, head = np.arange(group * TOKENS) // TOKENS, np.arange(LANES) // head_width
        same = jnp.asarray(token[:, None] == head[None, :], jnp.float32)
        bias = bias.transpose(1, 0, 2).reshape(1, TOKENS, heads * TOKENS)
        if shifted:
            bias = bias + np.tile(regions(), (1, 1, heads))
        scale = jnp.repeat(scale, head_width)[None]
        seen = seen.reshape(images, rows // WINDOW, WINDOW, columns // WINDOW, WINDOW).swapaxes(2, 3)
        seen = jnp.tile(seen.reshape(*seen.shape[:3], 1, TOKENS).astype(jnp.float32), group)
        self.operands = (bias, scale, seen, same)
        whole = lambda x: pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim)  # noqa: E731
        of_seen = pl.BlockSpec(
            (1, 1, block // WINDOW, 1, group * TOKENS), lambda image, row, column: (image, row, column, 0, 0)
        )
        self.specs = [whole(bias), whole(scale), of_seen, whole(same)]

    def __call__(self, kernel, maps, outputs, out_specs, *, name, products, traffic, interpret):
        return pl.pallas_call(
            functools.partial(kernel, **self.static),
            grid=self.grid,
            in_specs=[self.map] * len(maps) + self.specs,
            out_specs=out_specs,
            out_shape=outputs,
            name=name,
            interpret=interpret,
            cost_estimate=cost(maps[0].shape, self.static["head_width"], products=products, num_bytes=traffic),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=48 * 2**20
            ),
        )(*maps, *self.operands)


def forward(query, key, value, bias, scale, seen, *, shifted: bool, head_width: int, interpret: bool = False):
    """What each token gathers; arguments as in ``window.window_attention``."""
    call = _Call(query, bias, scale, seen, shifted=shifted, head_width=head_width)
    traffic = traffic_bytes(query.shape, head_width=head_width, itemsize=query.dtype.itemsize)["forward"]
    out = jax.ShapeDtypeStruct(query.shape, query.dtype)
    return call(
        _forward_kernel,
        (query, key, value),
        out,
        call.map,
        name="window_attention_forward",
        products=2,
        traffic=traffic,
        interpret=interpret,
    )


def backward(query, key, value, bias, scale, seen, upstream, *, shifted, head_width, interpret: bool = False):
    """Gradients of query, key, value, bias and scale."""
    call = _Call(query, bias, scale, seen, shifted=shifted, head_width=head_width)
    images, heads = query.shape[0], bias.shape[0]
    traffic = traffic_bytes(query.shape, head_width=head_width, itemsize=query.dtype.itemsize)["backward"]
    of_image = lambda *sizes: pl.BlockSpec((1, *sizes), lambda image, row, column: (image, 0, 0))  # noqa: E731
    d_query, d_key, d_value, d_bias, d_scale = call(
        _backward_kernel,
        (query, key, value, upstream.astype(query.dtype)),
        [jax.ShapeDtypeStruct(query.shape, query.dtype)] * 3
        + [
            jax.ShapeDtypeStruct((images, TOKENS, heads * TOKENS), jnp.float32),
            jax.ShapeDtypeStruct((images, 1, query.shape[3]), jnp.float32),
        ],
        [call.map] * 3 + [of_image(TOKENS, heads * TOKENS), of_image(1, query.shape[3])],
        name="window_attention_backward",
        products=5,
        traffic=traffic,
        interpret=interpret,
    )
    d_bias = d_bias.sum(0).reshape(TOKENS, heads, TOKENS).transpose(1, 0, 2)
    return d_query, d_key, d_value, d_bias, d_scale.sum((0, 1)).reshape(heads, head_width).sum(1)
