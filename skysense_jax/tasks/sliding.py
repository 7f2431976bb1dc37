"""Logits of an image of any size from windows of one size that overlap, blended; memory is a strip of windows.

Windows lie in rows from north to south. Each adds its logits times a weight that falls from its middle to its rim; what
no later row can reach is divided by the sum of weights and given out. Next: finetune.py.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Float

Place = tuple[int, int]  # north-west cell of a window
WEIGHTINGS = ("hann", "linear")


def starts(extent: int, cells: int, overlap: float) -> tuple[int, ...]:
    """First cells of the fewest windows that cover ``extent``, evenly spread, neighbours sharing ``overlap`` or more.

    ``overlap`` is a share of ``cells``. One window, from 0, where the extent fits into it.
    """
    step = max(1, int(cells * (1 - overlap)))
    span = max(extent - cells, 0)
    count = -(-span // step) + 1
    return tuple(i * span // max(count - 1, 1) for i in range(count))


def profile(size: int, weighting: str) -> Float[np.ndarray, " {size}"]:
    """Weights of a row of ``size`` places, symmetric, above 0 everywhere, about 1 in the middle.

    Raises:
      ValueError: an unknown weighting.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting {weighting!r}; wanted one of {WEIGHTINGS}")
    centres = (np.arange(size) + 0.5) / size
    return np.sin(np.pi * centres) ** 2 if weighting == "hann" else 1 - np.abs(2 * centres - 1)


def blended(
    predict: Callable[[Sequence[Place]], Float[np.ndarray, "N H W L"]],
    *,
    extent: tuple[int, int],
    cells: int,
    per_cell: int = 1,
    overlap: float = 0.5,
    weighting: str = "hann",
) -> Iterator[tuple[int, Float[np.ndarray, "H W L"]]]:
    """Strips of blended logits from north to south, each with its first row; together they are the whole image.

    Args:
      predict: logits of windows of ``cells``, whose side is cells x per_cell; asked for one row of windows at a
        time. A window may reach beyond an image that is smaller than it: that part is cut off.
      extent: rows and columns of the image, in cells.
      per_cell: logits along the side of a cell.
      overlap: the least share of a window that it has in common with its neighbour, from 0 to below 1.

    Raises:
      ValueError: an overlap out of range, or an unknown weighting.
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap {overlap:g}; wanted 0 to below 1")
    rows, columns = (starts(side, cells, overlap) for side in extent)
    side, width = cells * per_cell, extent[1] * per_cell
    line = profile(side, weighting)
    weight = line[:, None] * line
    total = norm = None  # of the rows from ``first`` on, as many as a window has
    first = 0
    for i, row in enumerate(rows):
        logits = predict([(row, column) for column in columns])
        if total is None:
            total, norm = np.zeros((side, width, logits.shape[-1])), np.zeros((side, width, 1))
        for column, window in zip(columns, logits, strict=True):
            place = slice(column * per_cell, min(column * per_cell + side, width))
            inside = place.stop - place.start
            total[:, place] += (window * weight[..., None])[:, :inside]
            norm[:, place] += weight[:, :inside, None]
        end = (rows[i + 1] if i + 1 < len(rows) else extent[0]) * per_cell
        done = end - first
        yield first, (total[:done] / norm[:done]).astype(np.float32)
        for array in (total, norm):  # the rows that the next windows reach move up
            array[: side - done] = array[done:].copy()
            array[max(side - done, 0) :] = 0
        first = end
