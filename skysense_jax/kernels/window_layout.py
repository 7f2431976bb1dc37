"""What both window kernels agree on: the window they are written for, and the masks of shifted windows."""

import math

import numpy as np
from jax.experimental import pallas as pl

WINDOW = 8  # tokens along a side
TOKENS = WINDOW * WINDOW
MASKED = -0.7 * float(np.finfo(np.float32).max)  # the score of what may not be looked at; finite, as in jax.nn
TINY = 1e-24  # a square length from which on a vector is scaled to length 1


def regions() -> np.ndarray:
    """(4, tokens, tokens) to add to scores of shifted windows: ``MASKED`` where two tokens are no neighbours.

    First axis: 2 x (in the last row of windows) + (in the last column). These hold, behind their middle, tokens of the
    map's first rows and columns.
    """
    row, column = np.divmod(np.arange(TOKENS), WINDOW)
    differ = lambda place: (place[:, None] < WINDOW // 2) != (place[None, :] < WINDOW // 2)  # noqa: E731
    none = np.zeros((TOKENS, TOKENS), bool)
    kinds = np.stack([none, differ(column), differ(row), differ(row) | differ(column)])
    return np.where(kinds, np.float32(MASKED), np.float32(0))


def cost(shape: tuple[int, ...], head_width: int, *, products: int, num_bytes: int) -> pl.CostEstimate:
    """Of a kernel that multiplies scores with channels ``products`` times; ``shape`` is that of the query.

    FLOPs are those that are asked for. A unit that multiplies whole registers does more: window_tpu.py fills them with
    four heads of 32, of which each product uses a quarter.
    """
    scores = math.prod(shape[:3]) * TOKENS
    return pl.CostEstimate(
        flops=2 * products * scores * shape[3],
        transcendentals=scores * (shape[3] // head_width),
        bytes_accessed=num_bytes,
    )
