"""Square windows of examples as a network takes them: read, cut, turned, stacked; in an order that a seed fixes.

An element holds the fields of eval.features.WholeSample with a leading axis of its one or two dates of change
detection, and "target". Next: forward.py, which computes on stacked elements.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from skysense_jax.eval.ahead import ahead
from skysense_jax.eval.features import read_whole
from skysense_jax.eval.scores import IGNORED
from skysense_jax.modalities import Modality
from skysense_jax.tasks.examples import IMAGES_AT_ONCE, MAPS, Example, Examples, Part

Element = dict[str, Any]
_SPATIAL = ("images", "token_valid", "cell_usable")  # rows and columns are their axes 2 and 3


def label_pixels(example: Example) -> int:
    """Pixels of the label map along the side of a cell; 1 for a map coarser than cells, whose pixels are repeated."""
    return max(1, example.target.shape[0] // example.before.extent_cells)


def label_map(example: Example, *, per_cell: int) -> np.ndarray:
    """The label map with ``per_cell`` pixels a cell.

    Raises:
      ValueError: it has another number.
    """
    if label_pixels(example) != per_cell:
        raise ValueError(
            f"--dataset: example {example.id!r} has {label_pixels(example)} label pixels a cell where others have "
            f"{per_cell}; wanted the same in all, of both splits"
        )
    times = max(1, example.before.extent_cells // example.target.shape[0])
    return example.target if times == 1 else example.target.repeat(times, axis=0).repeat(times, axis=1)


def read_window(
    example: Example,
    rows: Sequence[Modality],
    *,
    num_dates: Mapping[str, int],
    kind: str,
    place: tuple[int, int],
    cells: int,
    per_cell: int,
) -> Element:
    """The window of ``cells`` whose north-west cell is ``place``; beyond the sample nothing is valid or labelled."""
    extent = min(cells, example.before.extent_cells)
    samples = [example.before] if example.after is None else [example.before, example.after]
    wholes = [read_whole(Part(s.id, s, *place, extent), rows, num_dates=num_dates, min_cells=cells) for s in samples]
    stacked = lambda field: {m.name: np.stack([getattr(w, field)[m.name] for w in wholes]) for m in rows}  # noqa: E731
    element = {field: stacked(field) for field in (*_SPATIAL, "present", "day_of_year")}
    if kind not in MAPS:
        return {**element, "target": np.asarray(example.target)}
    target = np.full((cells * per_cell,) * 2, IGNORED, np.uint8)
    cut = tuple(slice(first * per_cell, (first + extent) * per_cell) for first in place)
    target[: extent * per_cell, : extent * per_cell] = label_map(example, per_cell=per_cell)[cut]
    return {**element, "target": target}


def turned(element: Element, *, mirrored: bool, quarters: int) -> Element:
    """The element, its columns reversed if ``mirrored``, then turned anticlockwise: pixels, masks and a map alike."""

    def turn(x: np.ndarray, axes: tuple[int, int]) -> np.ndarray:
        return np.rot90(np.flip(x, axes[1]) if mirrored else x, quarters, axes)

    out = {**element, **{field: {m: turn(x, (2, 3)) for m, x in element[field].items()} for field in _SPATIAL}}
    if element["target"].ndim == 2:
        out["target"] = turn(element["target"], (0, 1))
    return out


def stack(elements: Sequence[Element]) -> Element:
    """A batch of elements."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *elements)


def epoch_order(examples: Examples, rng: np.random.Generator) -> np.ndarray:
    """Every example once: images in a drawn order, the parts of a few at a time mixed, since to read a part of a
    picture is to decode all of it."""
    if len(examples.images) == len(examples):
        return rng.permutation(len(examples))
    drawn = rng.permutation(len(examples.images))
    parts = ([examples.images[i] for i in some] for some in np.array_split(drawn, -(-len(drawn) // IMAGES_AT_ONCE)))
    return np.concatenate([rng.permutation(np.concatenate(group)) for group in parts])


def training_batches(
    examples: Examples, rows: Sequence[Modality], *, batch_size: int, num_steps: int, seed: int, **window: Any
) -> Iterator[Element]:
    """``num_steps`` batches: epoch after epoch in a new order, each window at a drawn place, mirrored and turned.

    ``window``: the other arguments of ``read_window`` but its place. What is drawn for the n-th window depends on the
    seed and n alone.
    """
    order_of = functools.lru_cache(maxsize=2)(
        lambda epoch: epoch_order(examples, np.random.default_rng((seed, 0, epoch)))
    )

    def drawn(number: int) -> Element:
        epoch, within = divmod(number, len(examples))
        example, rng = examples[int(order_of(epoch)[within])], np.random.default_rng((seed, 1, number))
        free = max(example.before.extent_cells - window["cells"], 0)
        place = (int(rng.integers(free + 1)), int(rng.integers(free + 1)))
        element = read_window(example, rows, kind=examples.kind, place=place, **window)
        return turned(element, mirrored=bool(rng.integers(2)), quarters=int(rng.integers(4)))

    elements = ahead(drawn, range(num_steps * batch_size), depth=batch_size)
    while batch := list(itertools.islice(elements, batch_size)):
        yield stack(batch)
