"""Attention of all tokens of an image to each other on a TPU (Pallas, Mosaic), rotary embedding inside.

A step of the grid takes an image and a *group* of heads, as many as fill a register's 128 lanes, with all of its
tokens: rows of scores never leave on-chip memory and nothing has to be merged, so the backward pass needs neither the
output nor sums of the forward one. Scores stand transposed, a column for each query of each head: queries are laid out
once a head, zero outside the head's lanes (``_Group.spread``), and worked on ``columns`` at a time, whichever head they
belong to. So four prompts beside 1024 tokens cost four tokens' work and not a block's; sums over keys run down the
sublanes; and what is summed over queries needs no turning round.

Mathematics, arguments and gradients: full.py. Source: RoFormer (arXiv 2104.09864) for the rotation; the layout is ours.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
_ROWS = 16  # sublanes of a register of 16-bit numbers: a sequence is rounded up to these
_MASKED = -2.0e38  # added to the score of a key that may not be looked at; finite: all of them may be
_SCORES = 2 * 2**20  # bytes of one array of scores at most
_MEMORY = 48 * 2**20  # on-chip bytes of a kernel at most; a v5p's core has 64 MiB


def problem(*, num_tokens: int, width: int, head_width: int, itemsize: int) -> str:
    """Why this kernel cannot take sequences, width and heads such as these; empty if it can."""
    if LANES % head_width or width % min(LANES, width) or width % head_width:
        return f"heads of {head_width} in a width of {width}; wanted heads that divide {LANES}, and a width they fill"
    wanted = _memory_bytes(num_tokens, LANES // head_width, itemsize=itemsize)
    if wanted > _MEMORY:
        return f"{num_tokens} tokens, which take {wanted >> 20} MiB on the chip; wanted {_MEMORY >> 20} or less"
    return ""


def traffic_bytes(shape: tuple[int, int, int], *, itemsize: int, turned: bool) -> dict[str, int]:
    """Bytes that the kernels move between main and on-chip memory: {"forward", "backward"}, by blocks and grid.

    ``shape`` is that of the query. Angles stay; of a block that overhangs its array the inner part alone is moved.
    """
    images, num_tokens, width = shape
    of_map = images * _round_up(num_tokens, 8) * _round_up(width, LANES) * itemsize
    seen, angles = (_round_up(num_tokens, step) * LANES * 4 for step in (8, _ROWS))
    small = images * seen + 2 * turned * angles
    return dict(forward=4 * of_map + small, backward=7 * of_map + small)


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def _columns(num_tokens: int, heads: int) -> tuple[int, int]:
    """(columns worked on together, how often): their scores fit, and as few as can be are left empty."""
    rows = _round_up(num_tokens, _ROWS)
    tiles = -(-heads * rows // LANES)
    fitting = [n for n in (4, 3, 2) if 4 * n * LANES * rows <= _SCORES] + [1]
    together = min(fitting, key=lambda n: -(-tiles // n) * n)
    return together * LANES, -(-tiles // together)


def _memory_bytes(num_tokens: int, heads: int, *, itemsize: int) -> int:
    """On-chip memory of the backward kernel: blocks twice, what is laid out, sums, and four arrays of scores."""
    rows, (columns, times) = _round_up(num_tokens, _ROWS), _columns(num_tokens, heads)
    blocks = 2 * rows * LANES * (7 * itemsize + 3 * 4)
    return blocks + LANES * columns * times * (2 * itemsize + 4) + rows * LANES * 24 + 4 * 4 * rows * columns


# ---- inside a kernel


class _Group:
    """The heads of a block and its tokens, ``rows`` of them with what fills up the last register."""

    def __init__(self, like_ref, angles, *, num_tokens: int, head_width: int, columns: int, interpret: bool):
        _, self.rows, self.lanes = like_ref.shape
        self.dtype, self.columns, self._interpret = like_ref.dtype, columns, interpret
        self.num_tokens, self.head_width, self.heads = num_tokens, head_width, self.lanes // head_width
        self._angles = angles  # refs to cosine and signed sine, (rows, lanes), or none
        self._lane = jax.lax.broadcasted_iota(jnp.int32, (self.rows, self.lanes), 1)

    def dot(self, a, b, *, transpose_b: bool = False):
        """``a b`` in fp32, its operands in the dtype of the maps."""
        a, b = a.astype(self.dtype), b.astype(self.dtype)
        if self._interpret:  # a CPU has not all products of 16-bit numbers; these are the same
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        contract = ((1,), (1 if transpose_b else 0,))
        precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
        return jax.lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)

    def load(self, ref):
        """The tokens, fp32; zeros beyond the last."""
        row = jax.lax.broadcasted_iota(jnp.int32, (self.rows, self.lanes), 0)
        return jnp.where(row < self.num_tokens, ref[0].astype(jnp.float32), 0.0)

    def turn(self, x, *, back: bool = False):
        """``x`` with each head's pairs turned by their token's angle, or back by it."""
        if not self._angles:
            return x
        cos, sin = (ref[...] for ref in self._angles)
        half = self.head_width // 2
        ahead, behind = pltpu.roll(x, self.lanes - half, 1), pltpu.roll(x, half, 1)
        other = jnp.where(self._lane % self.head_width < half, ahead, behind)
        return x * cos - other * sin if back else x * cos + other * sin

    def _of_head(self, x, head: int):
        return jnp.where(self._lane // self.head_width == head, x, 0.0)

    def spread(self, x, ref):
        """Into ``ref`` the tokens once a head, zero outside the head's lanes, and zeros behind."""
        for head in range(self.heads):
            ref[head * self.rows : (head + 1) * self.rows] = self._of_head(x, head).astype(ref.dtype)
        if ref.shape[0] > self.heads * self.rows:
            ref[self.heads * self.rows :] = jnp.zeros_like(ref[self.heads * self.rows :])

    def own(self, ref):
        """The transpose of ``spread``."""
        return sum(self._of_head(ref[head * self.rows : (head + 1) * self.rows], head) for head in range(self.heads))

    def hidden(self, seen_ref):
        """What to add to scores, the same in each column: keys that are not seen, and those behind the last."""
        row = jax.lax.broadcasted_iota(jnp.int32, (self.rows, self.columns), 0)
        seen = jnp.broadcast_to(seen_ref[0], (self.rows, self.columns))
        return jnp.where(row < self.num_tokens, jnp.where(seen > 0, 0.0, _MASKED), -jnp.inf)


def _scale(head_width: int) -> float:
    """Of queries, for powers of two instead of e."""
    return math.log2(math.e) / math.sqrt(head_width)


def _exponentials(group, key, queries, hidden):
    """(exp(score - the largest of the column), one over its sum down the column)."""
    scores = group.dot(key, queries, transpose_b=True) + hidden
    weights = jnp.exp2(scores - scores.max(axis=0, keepdims=True))
    return weights, 1 / weights.sum(axis=0, keepdims=True)


def _forward_kernel(query_ref, key_ref, value_ref, seen_ref, *refs, times, **static):
    *angles, out_ref, queries_ref, outs_ref = refs
    group = _Group(query_ref, angles, **static)
    group.spread(group.turn(group.load(query_ref)) * _scale(group.head_width), queries_ref)
    key = group.turn(group.load(key_ref)).astype(group.dtype)
    turned_value = group.load(value_ref).T.astype(group.dtype)
    hidden = group.hidden(seen_ref)

    def some(at, carry):
        here = pl.ds(at * group.columns, group.columns)
        weights, inverse = _exponentials(group, key, queries_ref[here], hidden)
        outs_ref[here] = (group.dot(turned_value, weights) * inverse).T
        return carry

    jax.lax.fori_loop(0, times, some, 0)
    out_ref[0] = group.own(outs_ref).astype(out_ref.dtype)


def _backward_kernel(query_ref, key_ref, value_ref, upstream_ref, seen_ref, *refs, times, **static):
    *angles, d_query_ref, d_key_ref, d_value_ref = refs[:-5]
    queries_ref, upstreams_ref, d_queries_ref, d_keys_ref, d_values_ref = refs[-5:]
    group = _Group(query_ref, angles, **static)
    group.spread(group.turn(group.load(query_ref)) * _scale(group.head_width), queries_ref)
    group.spread(group.load(upstream_ref), upstreams_ref)
    key = group.turn(group.load(key_ref))
    turned_key, key = key.T.astype(group.dtype), key.astype(group.dtype)
    value = group.load(value_ref).astype(group.dtype)
    hidden = group.hidden(seen_ref)
    d_keys_ref[...] = jnp.zeros_like(d_keys_ref)
    d_values_ref[...] = jnp.zeros_like(d_values_ref)

    def some(at, carry):
        here = pl.ds(at * group.columns, group.columns)
        queries, upstreams = queries_ref[here], upstreams_ref[here]
        weights, inverse = _exponentials(group, key, queries, hidden)
        weights = weights * inverse
        d_weights = group.dot(value, upstreams, transpose_b=True)
        mean = (weights * d_weights).sum(axis=0, keepdims=True)
        d_scores = (weights * (d_weights - mean)).astype(group.dtype)
        d_values_ref[...] += group.dot(weights, upstreams)
        d_keys_ref[...] += group.dot(d_scores, queries)
        d_queries_ref[here] = group.dot(turned_key, d_scores).T
        return carry

    jax.lax.fori_loop(0, times, some, 0)
    d_query = group.turn(group.own(d_queries_ref), back=True) / math.sqrt(group.head_width)
    d_key = group.turn(d_keys_ref[...], back=True) / math.log2(math.e)
    for ref, gradient in ((d_query_ref, d_query), (d_key_ref, d_key), (d_value_ref, d_values_ref[...])):
        ref[0] = gradient.astype(ref.dtype)


# ---- from outside


def _call(kernel, maps, seen, turn, outputs, *, head_width, scratch, name, products, traffic, interpret):
    images, num_tokens, width = maps[0].shape
    lanes = min(LANES, width)
    rows, (columns, times) = _round_up(num_tokens, _ROWS), _columns(num_tokens, lanes // head_width)
    of_group = pl.BlockSpec((1, rows, lanes), lambda image, group: (image, 0, group))
    of_image = pl.BlockSpec((1, rows, 1), lambda image, group: (image, 0, 0))
    whole = pl.BlockSpec((rows, lanes), lambda image, group: (0, 0))
    angles = () if turn is None else _angles(*turn, rows=rows, heads=lanes // head_width)
    static = dict(num_tokens=num_tokens, head_width=head_width, columns=columns, times=times, interpret=interpret)
    scores = images * num_tokens**2
    return pl.pallas_call(
        functools.partial(kernel, **static),
        grid=(images, width // lanes),
        in_specs=[of_group] * len(maps) + [of_image] + [whole] * len(angles),
        out_specs=[of_group] * outputs,
        out_shape=[jax.ShapeDtypeStruct(maps[0].shape, maps[0].dtype)] * outputs,
        scratch_shapes=scratch(columns * times, rows, lanes),
        name=name,
        interpret=interpret,
        cost_estimate=pl.CostEstimate(
            flops=2 * products * scores * width,
            transcendentals=scores * (width // head_width),
            bytes_accessed=traffic,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=_MEMORY + 8 * 2**20
        ),
    )(*maps, seen[:, :, None].astype(jnp.float32), *angles)


def _angles(cos, sin, *, rows, heads):
    """Of each row and lane, and signed: a pair's first channel gets minus the sine times its second."""

    def lanes(first, second):
        angles = jnp.tile(jnp.concatenate((first, second), axis=1), (1, heads))
        return jnp.pad(angles, ((0, rows - len(angles)), (0, 0)))

    return lanes(cos, cos), lanes(-sin, sin)


def forward(query, key, value, seen, turn, *, head_width: int, interpret: bool = False):
    """What each token gathers; arguments as in ``full.full_attention``, images first."""
    traffic = traffic_bytes(query.shape, itemsize=query.dtype.itemsize, turned=turn is not None)["forward"]
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
    traffic = traffic_bytes(query.shape, itemsize=query.dtype.itemsize, turned=turn is not None)["backward"]
    scratch = lambda columns, rows, lanes: [  # noqa: E731
        *[pltpu.VMEM((columns, lanes), query.dtype)] * 2,
        pltpu.VMEM((columns, lanes), jnp.float32),
        *[pltpu.VMEM((rows, lanes), jnp.float32)] * 2,
    ]
    how = dict(head_width=head_width, products=5, traffic=traffic, interpret=interpret)
    maps = (query, key, value, upstream.astype(query.dtype))
    return _call(_backward_kernel, maps, seen, turn, 3, scratch=scratch, name="full_attention_backward", **how)
