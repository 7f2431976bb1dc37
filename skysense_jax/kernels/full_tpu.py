"""Attention of all tokens of a sequence to each other on a TPU (Pallas, Mosaic), rotary embedding inside.

A step of the grid takes some sequences and a *group* of heads, as many as fill a register's 128 lanes, with all of
their tokens: rows of scores never leave on-chip memory and nothing has to be merged, so the backward pass needs neither
the output nor sums of the forward one. Scores stand transposed, a column for each query of each head: queries are laid
out once a head, zero outside the head's lanes (``_Pack.spread``), and worked on some columns at a time, whichever head
they belong to. So four prompts beside 1024 tokens cost four tokens' work and not a block's; sums over keys run down the
sublanes; and what is summed over queries needs no turning round.

Short sequences (the tokens of a cell, in the fusion encoder) are worked on eight at a time, a *pack*, and masked from
each other: one product for all of them. Their maps lie with the sequences, not the tokens, along the sublanes, which is
how XLA lays out what it multiplies when a sequence does not fill registers; so nothing is copied or filled up.

Mathematics, arguments and gradients: full.py. Source: RoFormer (arXiv 2104.09864) for the rotation; the layout is ours.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
_SUBLANES = 16  # of a register of 16-bit numbers: a sequence is rounded up to these
_MASKED = -2.0e38  # added to the score of a key that may not be looked at; finite: all of them may be
_SHORT = 32  # tokens of a short sequence at most
_BLOCK_ROWS = 1024  # of a block, unless one sequence has more
_SCORES = 2 * 2**20  # bytes of one array of scores at most
_MEMORY = 48 * 2**20  # on-chip bytes of a kernel at most; a v5p's core has 64 MiB


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How B x I sequences of N tokens lie in memory: [B I N D], or [B N I D] if they are short."""

    batch: int
    images: int
    num_tokens: int
    lanes: int
    head_width: int

    @property
    def heads(self) -> int:
        return self.lanes // self.head_width

    @property
    def short(self) -> bool:
        return self.num_tokens <= _SHORT

    @property
    def side_by_side(self) -> int:
        """Sequences of a pack."""
        return 8 if self.short else 1

    @property
    def rows(self) -> int:
        """Of a pack."""
        return 8 * self.num_tokens if self.short else _round_up(self.num_tokens, _SUBLANES)

    @property
    def blocks(self) -> int:
        """Of one element of the batch; the last one may overhang."""
        return -(-self._needed // min(max(_BLOCK_ROWS // self.rows, 1), self._needed))

    @property
    def packs(self) -> int:
        """Of a block."""
        return -(-self._needed // self.blocks)

    @property
    def _needed(self) -> int:
        return -(-self.images // self.side_by_side)

    @property
    def block(self) -> pl.BlockSpec:
        if self.short:
            shape = (1, self.num_tokens, self.packs * self.side_by_side, self.lanes)
            return pl.BlockSpec(shape, lambda batch, block, group: (batch, 0, block, group))
        return pl.BlockSpec(
            (1, self.packs, self.rows, self.lanes), lambda batch, block, group: (batch, block, 0, group)
        )

    @property
    def columns(self) -> tuple[int, int]:
        """(columns worked on together, how often): their scores fit, and as few as can be are left empty."""
        tiles = -(-self.heads * self.rows // LANES)
        fitting = [n for n in (4, 3, 2) if 4 * n * LANES * self.rows <= _SCORES] + [1]
        together = min(fitting, key=lambda n: -(-tiles // n) * n)
        return together * LANES, -(-tiles // together)

    def memory_bytes(self, itemsize: int) -> int:
        """Of the backward kernel: blocks twice, what is laid out, sums, and four arrays of scores."""
        columns, times = self.columns
        blocks = 2 * LANES * (7 * itemsize * self.packs * self.rows + 2 * 4 * self.rows)
        return blocks + LANES * columns * times * (2 * itemsize + 4) + self.rows * LANES * 24 + 16 * self.rows * columns


def problem(*, num_tokens: int, width: int, head_width: int, itemsize: int) -> str:
    """Why this kernel cannot take sequences, width and heads such as these; empty if it can."""
    if LANES % head_width or width % min(LANES, width) or width % head_width:
        return f"heads of {head_width} in a width of {width}; wanted heads that divide {LANES}, and a width they fill"
    wanted = _Layout(1, 1, num_tokens, LANES, head_width).memory_bytes(itemsize)
    if wanted > _MEMORY:
        return f"{num_tokens} tokens, which take {wanted >> 20} MiB on the chip; wanted {_MEMORY >> 20} or less"
    return ""


def traffic_bytes(shape: tuple[int, int, int, int], *, head_width: int, itemsize: int, turned: bool) -> dict[str, int]:
    """Bytes that the kernels move between main and on-chip memory: {"forward", "backward"}, by blocks and grid.

    ``shape`` is that of the query. Angles stay; of a block that overhangs its array the inner part alone is moved.
    """
    batch, images, num_tokens, width = shape
    layout = _Layout(batch, images, num_tokens, min(LANES, width), head_width)
    beside, along = (num_tokens, images) if layout.short else (images, num_tokens)
    of_map = batch * beside * _round_up(along, 8) * _round_up(width, LANES) * itemsize
    registers = -(-layout.rows // LANES)
    of_pack = (_round_up(registers, 8) if registers > 1 else 1) * LANES * 4
    small = batch * layout.blocks * layout.packs * of_pack + 2 * turned * layout.rows * LANES * 4
    return dict(forward=4 * of_map + small, backward=7 * of_map + small)


# ---- inside a kernel


class _Pack:
    """A pack of the block at hand and the lanes of its heads."""

    def __init__(self, block, at, layout: _Layout, angles, *, dtype, interpret: bool):
        self.at, self.layout, self.dtype, self._interpret = at, layout, dtype, interpret
        self._angles = angles  # refs to cosine and signed sine, (rows, lanes), or none
        row, self._lane = (jax.lax.broadcasted_iota(jnp.int32, (layout.rows, layout.lanes), axis) for axis in (0, 1))
        first = (block * layout.packs + at) * layout.side_by_side
        self._is_token = first + row % 8 < layout.images if layout.short else row < layout.num_tokens

    def dot(self, a, b, *, transpose_b: bool = False):
        """``a b`` in fp32, its operands in the dtype of the maps."""
        a, b = a.astype(self.dtype), b.astype(self.dtype)
        if self._interpret:  # a CPU has not all products of 16-bit numbers; these are the same
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        contract = ((1,), (1 if transpose_b else 0,))
        precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
        return jax.lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)

    def _place(self):
        if self.layout.short:
            return 0, slice(None), pl.ds(self.at * 8, 8)
        return 0, self.at

    def load(self, ref):
        """The pack's tokens, (rows, lanes), fp32; zeros where there is none."""
        x = ref[self._place()].astype(jnp.float32).reshape(self._is_token.shape)
        return jnp.where(self._is_token, x, 0.0)

    def store(self, ref, x) -> None:
        ref[self._place()] = (x.reshape(-1, 8, x.shape[-1]) if self.layout.short else x).astype(ref.dtype)

    def turn(self, x, *, back: bool = False):
        """``x`` with each head's pairs turned by their token's angle, or back by it."""
        if not self._angles:
            return x
        cos, sin = (ref[...] for ref in self._angles)
        half = self.layout.head_width // 2
        ahead, behind = pltpu.roll(x, self.layout.lanes - half, 1), pltpu.roll(x, half, 1)
        other = jnp.where(self._lane % self.layout.head_width < half, ahead, behind)
        return x * cos - other * sin if back else x * cos + other * sin

    def _of_head(self, x, head: int):
        return jnp.where(self._lane // self.layout.head_width == head, x, 0.0)

    def _rows_of(self, head: int) -> slice:
        return slice(head * self.layout.rows, (head + 1) * self.layout.rows)

    def spread(self, x, ref) -> None:
        """Into ``ref`` the tokens once a head, zero outside the head's lanes, and zeros behind."""
        for head in range(self.layout.heads):
            ref[self._rows_of(head)] = self._of_head(x, head).astype(ref.dtype)
        behind = self.layout.heads * self.layout.rows
        if ref.shape[0] > behind:
            ref[behind:] = jnp.zeros_like(ref[behind:])

    def own(self, ref):
        """The transpose of ``spread``."""
        return sum(self._of_head(ref[self._rows_of(head)], head) for head in range(self.layout.heads))

    def hidden(self, seen_ref):
        """What to add to scores, (rows, columns): keys that are not seen, no tokens, or of another sequence."""
        rows, (columns, _) = self.layout.rows, self.layout.columns
        seen = [jnp.broadcast_to(seen_ref[self.at, i : i + 1], (LANES, LANES)).T for i in range(seen_ref.shape[1])]
        seen = jnp.concatenate([jnp.concatenate(seen)[:rows]] * (columns // LANES), axis=1)
        hidden = jnp.where(seen > 0, 0.0, jnp.where(seen < 0, -jnp.inf, _MASKED))
        if not self.layout.short:
            return hidden
        key, query = (jax.lax.broadcasted_iota(jnp.int32, (rows, columns), axis) for axis in (0, 1))
        return jnp.where(key % 8 == query % 8, hidden, -jnp.inf)

    def each(self, work) -> None:
        """``work`` on each of the pack's column ranges."""
        columns, times = self.layout.columns

        def step(at, carry):
            work(pl.ds(at * columns, columns))
            return carry

        jax.lax.fori_loop(0, times, step, 0)


def _scale(head_width: int) -> float:
    """Of queries, for powers of two instead of e."""
    return math.log2(math.e) / math.sqrt(head_width)


def _exponentials(pack, key, queries, hidden):
    """(exp(score - the largest of the column), one over its sum down the column)."""
    scores = pack.dot(key, queries, transpose_b=True) + hidden
    weights = jnp.exp2(scores - scores.max(axis=0, keepdims=True))
    return weights, 1 / weights.sum(axis=0, keepdims=True)


def _each_pack(kernel):
    """``kernel`` (pack, refs) on each pack of its block."""

    def of_block(*refs, layout, num_angles, num_maps, interpret):
        maps, angles, rest = refs[:num_maps], refs[num_maps + 1 :][:num_angles], refs[num_maps + 1 + num_angles :]

        block = pl.program_id(1)

        def step(at, carry):
            pack = _Pack(block, at, layout, angles, dtype=maps[0].dtype, interpret=interpret)
            kernel(pack, *maps, refs[num_maps], *rest)
            return carry

        jax.lax.fori_loop(0, layout.packs, step, 0)

    return of_block


@_each_pack
def _forward_kernel(pack, query_ref, key_ref, value_ref, seen_ref, out_ref, queries_ref, outs_ref):
    pack.spread(pack.turn(pack.load(query_ref)) * _scale(pack.layout.head_width), queries_ref)
    key = pack.turn(pack.load(key_ref)).astype(pack.dtype)
    turned_value = pack.load(value_ref).T.astype(pack.dtype)
    hidden = pack.hidden(seen_ref)

    def some(here):
        weights, inverse = _exponentials(pack, key, queries_ref[here], hidden)
        outs_ref[here] = (pack.dot(turned_value, weights) * inverse).T

    pack.each(some)
    pack.store(out_ref, pack.own(outs_ref))


@_each_pack
def _backward_kernel(
    pack,
    query_ref,
    key_ref,
    value_ref,
    upstream_ref,
    seen_ref,
    d_query_ref,
    d_key_ref,
    d_value_ref,
    queries_ref,
    upstreams_ref,
    d_queries_ref,
    d_keys_ref,
    d_values_ref,
):
    pack.spread(pack.turn(pack.load(query_ref)) * _scale(pack.layout.head_width), queries_ref)
    pack.spread(pack.load(upstream_ref), upstreams_ref)
    key = pack.turn(pack.load(key_ref))
    turned_key, key = key.T.astype(pack.dtype), key.astype(pack.dtype)
    value = pack.load(value_ref).astype(pack.dtype)
    hidden = pack.hidden(seen_ref)
    d_keys_ref[...] = jnp.zeros_like(d_keys_ref)
    d_values_ref[...] = jnp.zeros_like(d_values_ref)

    def some(here):
        queries, upstreams = queries_ref[here], upstreams_ref[here]
        weights, inverse = _exponentials(pack, key, queries, hidden)
        weights = weights * inverse
        d_weights = pack.dot(value, upstreams, transpose_b=True)
        mean = (weights * d_weights).sum(axis=0, keepdims=True)
        d_scores = (weights * (d_weights - mean)).astype(pack.dtype)
        d_values_ref[...] += pack.dot(weights, upstreams)
        d_keys_ref[...] += pack.dot(d_scores, queries)
        d_queries_ref[here] = pack.dot(turned_key, d_scores).T

    pack.each(some)
    pack.store(d_query_ref, pack.turn(pack.own(d_queries_ref), back=True) / math.sqrt(pack.layout.head_width))
    pack.store(d_key_ref, pack.turn(d_keys_ref[...], back=True) / math.log2(math.e))
    pack.store(d_value_ref, d_values_ref[...])


# ---- from outside


def _call(kernel, maps, seen, turn, outputs, *, head_width, scratch, name, products, traffic, interpret):
    batch, images, num_tokens, width = maps[0].shape
    layout = _Layout(batch, images, num_tokens, min(LANES, width), head_width)
    if layout.short:
        maps, seen = [x.swapaxes(1, 2) for x in maps], seen.swapaxes(1, 2)
    seen = _rows_of_lanes(seen, layout)
    of_block = pl.BlockSpec(
        (layout.packs, *seen.shape[1:]), lambda batch, block, group: (batch * layout.blocks + block, 0, 0)
    )
    whole = pl.BlockSpec((layout.rows, layout.lanes), lambda batch, block, group: (0, 0))
    angles = () if turn is None else _angles(*turn, layout)
    static = dict(layout=layout, num_angles=len(angles), num_maps=len(maps), interpret=interpret)
    columns, times = layout.columns
    scores = batch * images * num_tokens**2
    found = pl.pallas_call(
        functools.partial(kernel, **static),
        grid=(batch, layout.blocks, width // layout.lanes),
        in_specs=[layout.block] * len(maps) + [of_block] + [whole] * len(angles),
        out_specs=[layout.block] * outputs,
        out_shape=[jax.ShapeDtypeStruct(maps[0].shape, maps[0].dtype)] * outputs,
        scratch_shapes=scratch(columns * times, layout.rows, layout.lanes),
        name=name,
        interpret=interpret,
        cost_estimate=pl.CostEstimate(
            flops=2 * products * scores * width,
            transcendentals=scores * (width // head_width),
            bytes_accessed=traffic,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel"), vmem_limit_bytes=_MEMORY + 8 * 2**20
        ),
    )(*maps, seen, *angles)
    return [x.swapaxes(1, 2) for x in found] if layout.short else found


def _rows_of_lanes(seen, layout):
    """(packs, ., 128), fp32: 1 for a token that is seen, 0 for one that is not, -1 for none."""
    images = layout.blocks * layout.packs * layout.side_by_side  # those that are not there have tokens, unseen
    axis, seen = (2 if layout.short else 1), seen.astype(jnp.float32)
    seen = jnp.pad(seen, [(0, images - seen.shape[axis] if i == axis else 0) for i in range(3)])
    if layout.short:
        seen = seen.reshape(layout.batch, layout.num_tokens, -1, 8).swapaxes(1, 2)
    else:
        seen = jnp.pad(seen, ((0, 0), (0, 0), (0, layout.rows - layout.num_tokens)), constant_values=-1)
    seen = seen.reshape(-1, layout.rows)
    return jnp.pad(seen, ((0, 0), (0, -layout.rows % LANES)), constant_values=-1).reshape(len(seen), -1, LANES)


def _angles(cos, sin, layout):
    """Of each row and lane of a pack, and signed: a pair's first channel gets minus the sine times its second."""

    def lanes(first, second):
        angles = jnp.tile(jnp.concatenate((first, second), axis=1), (1, layout.heads))
        if layout.short:
            return jnp.repeat(angles, 8, axis=0)
        return jnp.pad(angles, ((0, layout.rows - len(angles)), (0, 0)))

    return lanes(cos, cos), lanes(-sin, sin)


def _traffic(query, turn, head_width):
    how = dict(head_width=head_width, itemsize=query.dtype.itemsize, turned=turn is not None)
    return traffic_bytes(query.shape, **how)


def forward(query, key, value, seen, turn, *, head_width: int, interpret: bool = False):
    """What each token gathers; arguments as in ``full.full_attention``."""
    traffic = _traffic(query, turn, head_width)["forward"]
    scratch = lambda columns, rows, lanes: [  # noqa: E731
        pltpu.VMEM((columns, lanes), query.dtype),
        pltpu.VMEM((columns, lanes), jnp.float32),
    ]
    how = dict(head_width=head_width, products=2, traffic=traffic, interpret=interpret)
    return _call(
        _forward_kernel, (query, key, value), seen, turn, 1, scratch=scratch, name="full_attention_forward", **how
    )[0]


def backward(query, key, value, seen, turn, upstream, *, head_width: int, interpret: bool = False):
    """Gradients of query, key and value."""
    traffic = _traffic(query, turn, head_width)["backward"]
    scratch = lambda columns, rows, lanes: [  # noqa: E731
        *[pltpu.VMEM((columns, lanes), query.dtype)] * 2,
        pltpu.VMEM((columns, lanes), jnp.float32),
        *[pltpu.VMEM((rows, lanes), jnp.float32)] * 2,
    ]
    how = dict(head_width=head_width, products=5, traffic=traffic, interpret=interpret)
    maps = (query, key, value, upstream.astype(query.dtype))
    return _call(_backward_kernel, maps, seen, turn, 3, scratch=scratch, name="full_attention_backward", **how)
