"""What the window kernels of a TPU have at hand: blocks of maps, the windows in them, and the way through both.

Shifted windows are read as two blocks of half a window's rows, and columns are turned on the chip. What comes out of a
row of them ends one row of blocks and begins the next: a step of the grid keeps its lower half for the one after it,
and the last row, which holds the map's first rows, comes first. Next: window_tpu.py, which says what is computed.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from skysense_jax.kernels.window_layout import TOKENS, WINDOW

LANES = 128
HALF = WINDOW // 2


def dot(a, b, dtype, *, transpose_a=False, transpose_b=False):
    """``a b`` in fp32, its operands in ``dtype``."""
    contract = ((0 if transpose_a else 1,), (1 if transpose_b else 0,))
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a.astype(dtype), b.astype(dtype), (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def exact_dot(a, ones, dtype, **transpose):
    """``a`` (fp32) times zeros and ones, without rounding ``a``: in two parts of 8 bits each where operands have 8."""
    if dtype == jnp.float32:
        return dot(a, ones, dtype, **transpose)
    high = a.astype(dtype)
    return dot(high, ones, dtype, **transpose) + dot(a - high.astype(jnp.float32), ones, dtype, **transpose)


class Windows:
    """The windows of a block that are worked on together, ``step`` side by side, and the lanes of each group."""

    def __init__(self, map_ref, same_ref, *, step: int, head_width: int):
        _, _, columns, width = map_ref.shape
        self.dtype, self.head_width, self.step = map_ref.dtype, head_width, step
        self._columns, self.num_steps = step * WINDOW, columns // (step * WINDOW)
        self._same_ref = same_ref  # (heads of a group x tokens, lanes): 1 where the lane is the head's
        self.groups = [slice(first, min(first + LANES, width)) for first in range(0, width, LANES)]

    def heads(self, lanes: slice) -> int:
        return (lanes.stop - lanes.start) // self.head_width

    def keys(self, lanes: slice) -> slice:
        """Where a group's scores stand among those of all heads."""
        first = lanes.start // self.head_width * TOKENS
        return slice(first, first + self.heads(lanes) * TOKENS)

    def at(self, number):
        """The columns of the windows ``number``; behind the last come the first again."""
        return pl.ds(number % self.num_steps * self._columns, self._columns)

    def load(self, halves, number, lanes) -> list:
        """The tokens of each window, (tokens, lanes), fp32; of shifted ones from their upper and lower half."""
        read = lambda number: jnp.concatenate(  # noqa: E731
            [ref[0, :, self.at(number), lanes].astype(jnp.float32) for ref in halves]
        )
        block = read(number)
        if len(halves) == 2:
            block = jnp.concatenate((block, read(number + 1)), axis=1)[:, HALF : HALF + self._columns]
        return [block[:, i * WINDOW : (i + 1) * WINDOW].reshape(TOKENS, -1) for i in range(self.step)]

    def store(self, ref, number, lanes, windows) -> None:
        block = jnp.concatenate([window.reshape(WINDOW, WINDOW, -1) for window in windows], axis=1)
        ref[0, 0:WINDOW, self.at(number), lanes] = block.astype(ref.dtype)

    def same(self, heads: int, lanes: int):
        return self._same_ref[0 : heads * TOKENS, 0:lanes]

    def head_sums(self, x):
        """For each lane the sum over its head's lanes."""
        stride = TOKENS // self.head_width
        ones = self._same_ref[0 : x.shape[1] * stride : stride, 0 : x.shape[1]]
        return exact_dot(x, ones, self.dtype)

    def spread(self, x):
        """(tokens, lanes) once a head, (heads x tokens, lanes), zero outside the head's lanes."""
        heads = x.shape[1] // self.head_width
        return (jnp.concatenate([x] * heads) * self.same(heads, x.shape[1])).astype(self.dtype)

    def own(self, x):
        """The transpose of ``spread``."""
        heads = x.shape[1] // self.head_width
        x = x * self.same(heads, x.shape[1])
        return sum(x[head * TOKENS : (head + 1) * TOKENS] for head in range(heads))


class Kernel:
    """The operands of a kernel's call, and the order in which it goes through them.

    Attributes:
      maps: the blocks of each map that is read: one, or the halves of shifted windows.
      small: bias, scale, seen, same.
      targets: where the windows of each map that is written go: its block, or what ``_put_back`` takes them from.
      others: further results.
      windows: how they are worked on.
      in_last_row: 1 in the last row of shifted windows.
    """

    def __init__(self, refs, *, num_maps: int, num_results: int, shifted: bool, step: int, head_width: int):
        halves = 1 + shifted
        self.maps = [refs[i * halves : (i + 1) * halves] for i in range(num_maps)]
        self.small, refs = refs[num_maps * halves :][:4], refs[num_maps * halves + 4 :]
        self._results, refs = refs[:num_results], refs[num_results:]
        self.others, kept = (refs[:-num_results], refs[-num_results:]) if shifted else (refs, ())
        self.targets = kept or self._results
        self.windows = Windows(self.maps[0][0], self.small[3], step=step, head_width=head_width)
        self._step, self._shifted = pl.program_id(1), shifted
        self.in_last_row = (self._step == 0).astype(jnp.int32) if shifted else 0  # which comes first

    def run(self, several) -> None:
        """``several(number)`` for all windows of the block, ``step`` by ``step``."""
        loop = functools.partial(jax.lax.fori_loop, 0, self.windows.num_steps, init_val=None)
        if not self._shifted:
            loop(lambda number, _: several(number))
            return
        last = self._step == pl.num_programs(1) - 1

        @pl.when(~last)
        def _():
            loop(lambda number, _: several(number))
            loop(lambda number, _: self._put_back(number))

        @pl.when(last)
        def _():
            for kept, result in zip(self.targets, self._results):
                result[...] = kept[:, WINDOW:]

    def _put_back(self, number) -> None:
        """Some columns of a row of shifted windows, the first rows of a target, to where they came from.

        Behind them it keeps the lower half of the row of windows before, and the upper half of the map's last.
        """
        windows, at = self.windows, self.windows.at(number)
        for (kept, result), lanes in itertools.product(zip(self.targets, self._results), windows.groups):
            before = windows.at(number + windows.num_steps - 1)
            around = [kept[0, 0:WINDOW, place, lanes].astype(jnp.float32) for place in (before, at)]
            num_columns = around[0].shape[1]
            block = jnp.concatenate(around, axis=1)[:, num_columns - HALF : 2 * num_columns - HALF].astype(kept.dtype)
            # In the first step not yet set: the second writes the same block again before it leaves the chip.
            result[0, 0:HALF, at, lanes] = kept[0, WINDOW : WINDOW + HALF, at, lanes]
            result[0, HALF:WINDOW, at, lanes] = block[:HALF]
            kept[0, WINDOW : WINDOW + HALF, at, lanes] = block[HALF:]

            @pl.when(self._step == 0)
            def _(kept=kept, lanes=lanes, block=block):
                kept[0, WINDOW + HALF :, at, lanes] = block[:HALF]
