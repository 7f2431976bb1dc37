"""Window attention on a TPU (Pallas, Mosaic): windows are blocks of the map, and all between the projections stays in
on-chip memory, forward and backward.

A head is 32 lanes of a register's 128, so four heads (a *group*) are worked on together. Keys of a window are laid out
once a head, zero outside the head's lanes (``Windows.spread``): one product with all 128 lanes then gives the scores
of four heads side by side, 64 keys each; its transpose adds up again (``Windows.own``). Sums over a head's lanes, or
over the keys of a head, are products with zeros and ones too, in two parts where one would round: the matrix units have
more time to spare than those that reduce across lanes. Every stage is written for all windows and groups at hand before
the next begins: the compiler schedules what it finds near, and a chain of dependent products waits for each of them.

Mathematics, arguments and gradients: window.py. Source: Swin V2 (arXiv 2111.09883) sec. 3; the layout is ours.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from skysense_jax.kernels.window_layout import MASKED, TINY, TOKENS, WINDOW, cost, regions
from skysense_jax.kernels.window_tpu_blocks import HALF, LANES, Kernel, Windows, dot, exact_dot

# Of a block at most: 7 stand twice, and of shifted windows what is kept of 3 results, two blocks each: 30 of 48 MiB.
_BLOCK_BYTES = 3 * 2**19


def problem(*, window: int, width: int, head_width: int, columns: int, itemsize: int, shifted: bool) -> str:
    """Why this kernel cannot take windows, width, heads and maps such as these; empty if it can."""
    if window != WINDOW:
        return f"windows of {window} x {window} tokens; wanted {WINDOW} x {WINDOW}"
    if TOKENS % head_width or width % head_width:
        return f"heads of {head_width} in a width of {width}; wanted heads that divide {TOKENS} and the width"
    if shifted and columns > (most := _BLOCK_BYTES // (WINDOW * _padded(width) * itemsize)):
        return (
            f"shifted windows in {columns} columns of width {width}; wanted a row of them on the chip, {most} columns"
        )
    return ""


def columns_of_block(columns: int, width: int, itemsize: int) -> int:
    """Columns of a block of windows that are not shifted: as many whole windows as divide the map and fit."""
    windows = columns // WINDOW
    fits = max(_BLOCK_BYTES // (TOKENS * _padded(width) * itemsize), 1)
    return WINDOW * max(n for n in range(1, windows + 1) if windows % n == 0 and n <= fits)


def traffic_bytes(shape: tuple[int, int, int, int], *, head_width: int, itemsize: int, shifted: bool) -> dict[str, int]:
    """Bytes that the kernels move between main and on-chip memory: {"forward", "backward"}, by blocks and grid.

    ``shape`` is that of the query. A block whose place does not change from one step of the grid to the next is not
    moved again.
    """
    images, rows, columns, width = shape
    heads = width // head_width
    of_map = images * rows * columns * _padded(width) * itemsize
    seen = images * (rows // WINDOW) * (columns // WINDOW) * _group(head_width) * TOKENS * 4
    of_bias, scale = TOKENS * _padded(heads * TOKENS) * 4, _padded(width) * 4
    bias = (4 if shifted else 1) * of_bias
    ones = _group(head_width) * TOKENS * LANES * 4
    return dict(
        forward=4 * of_map + seen + bias + scale + ones,
        backward=7 * of_map + seen + bias + scale + ones + images * (of_bias + scale),
    )


def _padded(width: int) -> int:
    return -(-width // LANES) * LANES


def _group(head_width: int) -> int:
    return LANES // head_width


# ---- inside a kernel


def _unit(windows: Windows, x):
    """(1 / length of each head's part, the part scaled by it); zeros, as padding is, stay zeros with gradient 1."""
    square = windows.head_sums(x * x)
    inverse = jnp.where(square > TINY, jax.lax.rsqrt(jnp.maximum(square, TINY)), 1.0)
    return inverse, x * inverse


def _exponentials(scores):
    """exp(score - the head's largest) of (tokens, heads x tokens)."""
    per_head = [scores[:, first : first + TOKENS] for first in range(0, scores.shape[1], TOKENS)]
    largest = [jnp.broadcast_to(x.max(axis=1, keepdims=True), x.shape) for x in per_head]
    return jnp.exp(scores - jnp.concatenate(largest, axis=1))


def _scores(windows: Windows, work, refs, number, in_last_row):
    """Masked scores of one window and group, from its scaled query and spread key."""
    bias_ref, seen_ref = refs
    keys, column = windows.keys(work["lanes"]), number * windows.step + work["window"]
    kind = 2 * in_last_row + (column == seen_ref.shape[2] - 1) if bias_ref.shape[0] > 1 else 0
    scores = dot(work["query"], work["key"], windows.dtype, transpose_b=True) + bias_ref[kind, :, keys]
    seen = seen_ref[0, 0, column, :, 0 : keys.stop - keys.start]
    return jnp.where(seen > 0, scores, MASKED)


def _forward_kernel(*refs, **static):
    kernel = Kernel(refs, **static)
    windows, (bias_ref, scale_ref, seen_ref, _) = kernel.windows, kernel.small

    def several(number):
        works = []
        for lanes in windows.groups:
            loaded = zip(*(windows.load(halves, number, lanes) for halves in kernel.maps))
            for window, (query, key, value) in enumerate(loaded):
                scaled = _unit(windows, query)[1] * scale_ref[0:1, lanes]
                work = dict(lanes=lanes, window=window, query=scaled.astype(windows.dtype))
                works.append(work | dict(key=windows.spread(_unit(windows, key)[1]), value=windows.spread(value)))
        for work in works:
            work["scores"] = _scores(windows, work, (bias_ref, seen_ref), number, kernel.in_last_row)
        for work in works:
            work["weights"] = _exponentials(work["scores"]).astype(windows.dtype)
        for work in works:
            ones = windows.same(windows.heads(work["lanes"]), work["value"].shape[1])
            total = dot(work["weights"], ones, windows.dtype)
            work["out"] = dot(work["weights"], work["value"], windows.dtype) / total
        for lanes in windows.groups:
            windows.store(kernel.targets[0], number, lanes, [work["out"] for work in works if work["lanes"] == lanes])

    kernel.run(several)


def _backward_kernel(*refs, **static):
    kernel = Kernel(refs, **static)
    windows, (bias_ref, scale_ref, seen_ref, _) = kernel.windows, kernel.small
    (d_bias_ref, d_scale_ref), dtype = kernel.others, windows.dtype

    @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
    def _():
        d_bias_ref[...] = jnp.zeros_like(d_bias_ref)
        d_scale_ref[...] = jnp.zeros_like(d_scale_ref)

    def several(number):
        works = []
        for lanes in windows.groups:
            loaded = zip(*(windows.load(halves, number, lanes) for halves in kernel.maps))
            for window, arrays in enumerate(loaded):
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
            work["scores"] = _scores(windows, work, (bias_ref, seen_ref), number, kernel.in_last_row)
        for work in works:
            # Weights are not yet divided by their sum: what comes from above is instead. Both are rounded once, so that
            # the mean below is that of the products it is taken from.
            work["weights"] = _exponentials(work["scores"]).astype(dtype)
            work["ones"] = windows.same(windows.heads(work["lanes"]), work["value"].shape[1]).astype(dtype)
            inverse = 1 / dot(work["weights"], work["ones"], dtype)
            work["upstream"] = (work["upstream"] * inverse).astype(dtype)
            work["mixed"] = dot(work["weights"], work["value"], dtype) * work["upstream"] * inverse
        for work in works:
            d_weights = dot(work["upstream"], work["value"], dtype, transpose_b=True)
            mean = exact_dot(work["mixed"], work["ones"], dtype, transpose_b=True)  # of it under the softmax
            work["d_scores"] = work["weights"] * (d_weights - mean)
        for work in works:
            d_bias_ref[0, :, windows.keys(work["lanes"])] += work["d_scores"]
        for work in works:
            work["d_query"] = dot(work["d_scores"], work["key"], dtype)
            work["d_key"] = windows.own(dot(work["d_scores"], work["query"], dtype, transpose_a=True))
            work["d_value"] = windows.own(dot(work["weights"], work["upstream"], dtype, transpose_a=True))
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
            for name, ref in zip(("d_query", "d_key", "d_value"), kernel.targets):
                windows.store(ref, number, lanes, [work[name] for work in of_group])

    kernel.run(several)


# ---- from outside


def _row_of_windows(step, *, down: int):
    """Of ``down`` rows of shifted windows that of a step: the last comes first, and the last step reads nothing new."""
    return jnp.where(step == 0, down - 1, jnp.clip(step, 1, max(down - 1, 1)) - 1)


class _Call:
    """What both kernels are called with besides maps: the grid, blocks and the small operands."""

    def __init__(self, query, bias, scale, seen, *, shifted, head_width):
        images, rows, columns, width = query.shape
        down, across = rows // WINDOW, columns // WINDOW
        block = columns if shifted else columns_of_block(columns, width, query.dtype.itemsize)
        heads, group = width // head_width, _group(head_width)
        self.grid = (images, down + shifted, columns // block)
        self.static = dict(step=2 if block % (2 * WINDOW) == 0 else 1, head_width=head_width, shifted=shifted)
        window = functools.partial(_row_of_windows, down=down) if shifted else lambda step: step
        rows_of = lambda rows, index: pl.BlockSpec(  # noqa: E731
            (1, rows, block, width), lambda image, step, column: (image, index(step), column, 0)
        )
        self.map = [rows_of(WINDOW, window)]
        self.result = rows_of(WINDOW, lambda step: jnp.maximum(step - 1, 0) if shifted else step)
        if shifted:
            self.map = [
                rows_of(HALF, lambda step: 2 * window(step) + 1),
                rows_of(HALF, lambda step: (2 * window(step) + 2) % (2 * down)),
            ]
        self.kept = [pltpu.VMEM((1, 2 * WINDOW, block, width), query.dtype)] * shifted
        token, head = np.arange(group * TOKENS) // TOKENS, np.arange(LANES) // head_width
        same = jnp.asarray(token[:, None] == head[None, :], jnp.float32)
        bias = bias.transpose(1, 0, 2).reshape(1, TOKENS, heads * TOKENS)
        if shifted:
            bias = bias + np.tile(regions(), (1, 1, heads))
            seen = jnp.roll(seen, (-HALF, -HALF), axis=(1, 2))
        scale = jnp.repeat(scale, head_width)[None]
        seen = seen.reshape(images, down, WINDOW, across, WINDOW).swapaxes(2, 3)
        seen = jnp.tile(seen.reshape(*seen.shape[:3], 1, TOKENS).astype(jnp.float32), group)
        self.operands = (bias, scale, seen, same)
        whole = lambda x: pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim)  # noqa: E731
        of_seen = pl.BlockSpec(
            (1, 1, block // WINDOW, 1, group * TOKENS), lambda image, step, column: (image, window(step), column, 0, 0)
        )
        self.specs = [whole(bias), whole(scale), of_seen, whole(same)]

    def __call__(self, which, maps, others=(), *, interpret):
        """The maps that the kernel writes, then ``others``, of which a block is an image's."""
        kernel, num_results, products = _KERNELS[which]
        like = jax.ShapeDtypeStruct(maps[0].shape, maps[0].dtype)
        how = {key: self.static[key] for key in ("head_width", "shifted")}
        traffic = traffic_bytes(like.shape, itemsize=like.dtype.itemsize, **how)[which]
        of_others = [pl.BlockSpec((1, *x.shape[1:]), lambda image, step, column: (image, 0, 0)) for x in others]
        return pl.pallas_call(
            functools.partial(kernel, num_maps=len(maps), num_results=num_results, **self.static),
            grid=self.grid,
            in_specs=self.map * len(maps) + self.specs,
            out_specs=[self.result] * num_results + of_others,
            out_shape=[like] * num_results + list(others),
            scratch_shapes=self.kept * num_results,
            name=f"window_attention_{which}",
            interpret=interpret,
            cost_estimate=cost(like.shape, how["head_width"], products=products, num_bytes=traffic),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=48 * 2**20
            ),
        )(*(x for x in maps for _ in self.map), *self.operands)


# Kernel, maps that it writes, products of scores and channels.
_KERNELS = dict(forward=(_forward_kernel, 1, 2), backward=(_backward_kernel, 3, 5))


def forward(query, key, value, bias, scale, seen, *, shifted: bool, head_width: int, interpret: bool = False):
    """What each token gathers; arguments as in ``window.window_attention``."""
    call = _Call(query, bias, scale, seen, shifted=shifted, head_width=head_width)
    return call("forward", (query, key, value), interpret=interpret)[0]


def backward(query, key, value, bias, scale, seen, upstream, *, shifted, head_width, interpret: bool = False):
    """Gradients of query, key, value, bias and scale."""
    call = _Call(query, bias, scale, seen, shifted=shifted, head_width=head_width)
    (images, _, _, width), heads = query.shape, bias.shape[0]
    others = [jax.ShapeDtypeStruct((images, *sizes), jnp.float32) for sizes in ((TOKENS, heads * TOKENS), (1, width))]
    maps = query, key, value, upstream.astype(query.dtype)
    *d_maps, d_bias, d_scale = call("backward", maps, others, interpret=interpret)
    d_bias = d_bias.sum(0).reshape(TOKENS, heads, TOKENS).transpose(1, 0, 2)
    return *d_maps, d_bias, d_scale.sum((0, 1)).reshape(heads, head_width).sum(1)
