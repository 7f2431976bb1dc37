"""Cuts the aligned training views of a sample: the keys of batch.Batch, without its B, as numpy arrays.

Per sample an anchor square is drawn and decoded once; all views are boxes in it, resized, mirrored and turned alike in
every modality. Shapes never depend on the sample: an absent modality or date is ``present`` False, its masks are False
and its images hold the band mean. Photometric changes are not made here (photometric.py, inside jit).
Next: geometry.py (the arithmetic), pipeline.py (who calls this).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from skysense_jax.data import geometry
from skysense_jax.data.geometry import Box, Orientation
from skysense_jax.data.sample import UNDATED, SampleReader, Window
from skysense_jax.modalities import OSM, Modality

_DAYS_OF_YEAR = 366


@dataclasses.dataclass(frozen=True)
class _Shape:
    """One of the two view shapes: how many, from boxes of which sides, resized to how many cells."""

    num: int
    box_cells: tuple[int, int]
    cells: int


class MultiView:
    """Called with a sample and a generator, the views of that sample; the same arguments give the same views.

    Args:
      modalities: rows of the table, all of which are in every result.
      num_dates: per modality, how many dates are drawn.
      day_jitter: days by which a day of the year may move, either way.
      anchor_cells, tile_cells: side of the square that holds all views; grid on which its corner lies.
      num_global, global_box_cells, global_cells: views, (smallest, largest) side of their boxes, side after the resize.
      num_local, local_box_cells, local_cells: likewise.
      num_classes: of the label map.
    """

    def __init__(
        self,
        *,
        modalities: Sequence[Modality],
        num_dates: Mapping[str, int],
        day_jitter: int,
        anchor_cells: int,
        tile_cells: int,
        num_global: int,
        global_box_cells: Sequence[int],
        global_cells: int,
        num_local: int,
        local_box_cells: Sequence[int],
        local_cells: int,
        num_classes: int = OSM.num_classes,
    ):
        self.modalities = tuple(modalities)
        self._num_dates = {modality.name: int(num_dates[modality.name]) for modality in self.modalities}
        self._day_jitter, self._num_classes = day_jitter, num_classes
        self._anchor_cells, self._tile_cells = anchor_cells, tile_cells
        self._shapes = {
            "global_views": _Shape(num_global, tuple(global_box_cells), global_cells),
            "local_views": _Shape(num_local, tuple(local_box_cells), local_cells),
        }
        for key, shape in self._shapes.items():  # what a person may ask for is said by config_checks.py
            low, high = shape.box_cells
            assert 1 <= low <= high <= anchor_cells, (key, shape, anchor_cells)
            assert max(high / shape.cells, shape.cells / low) < 2, (key, shape)
        self._fill = {m.name: band_means(m) for m in self.modalities}

    def __call__(
        self, reader: SampleReader, rng: np.random.Generator, *, record: int = 0, bad_record: int = -1
    ) -> dict[str, Any]:
        """The element; ``record`` and ``bad_record`` are passed on. Decodes the anchor once per modality and date."""
        anchor = geometry.draw_anchor(
            rng, extent_cells=reader.extent_cells, anchor_cells=self._anchor_cells, tile_cells=self._tile_cells
        )
        boxes = {
            key: [
                (geometry.draw_box(rng, anchor, box_cells=shape.box_cells), geometry.draw_orientation(rng))
                for _ in range(shape.num)
            ]
            for key, shape in self._shapes.items()
        }
        element = {"present": {}, "day_of_year": {}, "record": np.int32(record), "bad_record": np.int32(bad_record)}
        labels = reader.labels_window(anchor.row, anchor.column, anchor.side)
        for key, shape in self._shapes.items():
            element[key] = self._empty(shape)
            for view, (box, orientation) in enumerate(boxes[key]):
                element[key]["affine"][view] = geometry.view_affine(box, orientation, view_cells=shape.cells)
                if labels is not None:
                    element[key]["labels"][view] = _cut_labels(
                        labels, anchor, box, orientation, shape.cells, self._num_classes
                    )
        for modality in self.modalities:
            name = modality.name
            dates, present, days = self._draw_dates(rng, reader.days(name), self._num_dates[name])
            element["present"][name], element["day_of_year"][name] = present, days
            for slot, date in enumerate(dates):
                window = reader.window(name, int(date), anchor.row, anchor.column, anchor.side)
                for key, shape in self._shapes.items():
                    for view, (box, orientation) in enumerate(boxes[key]):
                        images, valid, usable = _cut(
                            window, modality, self._fill[name], anchor, box, orientation, shape.cells
                        )
                        element[key]["images"][name][view, slot] = images
                        element[key]["token_valid"][name][view, slot] = valid
                        element[key]["cell_usable"][name][view, slot] = usable
            for key in self._shapes:
                element[key]["images"][name][:, ~present] = self._fill[name]
        return element

    def _empty(self, shape: _Shape) -> dict[str, Any]:
        """Views in which nothing is present; their images are not set."""
        images, token_valid, cell_usable = {}, {}, {}
        for modality in self.modalities:
            lead = (shape.num, self._num_dates[modality.name])
            pixels, tokens = (shape.cells * n for n in (modality.pixels_per_cell, modality.tokens_per_cell))
            images[modality.name] = np.empty((*lead, pixels, pixels, modality.num_bands), modality.dtype)
            token_valid[modality.name] = np.zeros((*lead, tokens, tokens), bool)
            cell_usable[modality.name] = np.zeros((*lead, shape.cells, shape.cells), bool)
        return {
            "images": images,
            "token_valid": token_valid,
            "cell_usable": cell_usable,
            "labels": np.zeros((shape.num, shape.cells, shape.cells, self._num_classes), np.float16),
            "affine": np.zeros((shape.num, 2, 3), np.float32),
        }

    def _draw_dates(
        self, rng: np.random.Generator, days: np.ndarray, num_slots: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Indices of the drawn dates in time order (undated first), which slots they fill, days of the year there."""
        drawn = rng.permutation(len(days))[:num_slots]
        drawn = drawn[np.lexsort((drawn, days[drawn]))]
        present = np.arange(num_slots) < len(drawn)
        days_of_year = np.zeros(num_slots, np.int32)
        jitter = rng.integers(-self._day_jitter, self._day_jitter + 1, num_slots)
        for slot, date in enumerate(drawn):
            if days[date] != UNDATED:
                moved = day_of_year(int(days[date])) - 1 + int(jitter[slot])
                days_of_year[slot] = moved % _DAYS_OF_YEAR + 1
        return drawn, present, days_of_year


def day_of_year(day: int) -> int:
    """1 to 366 for a day counted from 1970-01-01."""
    date = np.datetime64(int(day), "D")
    return int((date - date.astype("datetime64[Y]").astype("datetime64[D]")).astype(int)) + 1


def band_means(modality: Modality) -> np.ndarray:
    """What pixels without data hold: the table's means, rounded to the modality's type."""
    means = np.asarray(modality.mean)
    return (means if np.dtype(modality.dtype).kind == "f" else np.rint(means)).astype(modality.dtype)


def _place(anchor: Box, box: Box, pixels_per_cell: int) -> tuple[tuple[slice, slice], tuple[int, int]]:
    """The pixels of the anchor that lie in the box, and where in the box they start."""
    source = tuple(slice(s.start * pixels_per_cell, s.stop * pixels_per_cell) for s in anchor.overlap(box))
    offset = tuple(s.start * pixels_per_cell for s in box.overlap(anchor))
    return source, offset


def _cut(
    window: Window,
    modality: Modality,
    fill: np.ndarray,
    anchor: Box,
    box: Box,
    orientation: Orientation,
    view_cells: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images [H W C], token_valid [P Q] and cell_usable [P Q] of one view of one date."""
    per_cell = modality.pixels_per_cell
    source, offset = _place(anchor, box, per_cell)
    size = dict(box_size=box.side * per_cell, out_size=view_cells * per_cell)
    pixels, valid = window.pixels[source], window.valid[source]
    whole = valid.shape == (size["box_size"],) * 2 and valid.all()
    if whole and pixels.dtype == np.uint8 and modality.num_bands in geometry.PILLOW_MODES:
        images = geometry.resize_uint8(pixels, out_size=size["out_size"], orientation=orientation)
        mask = np.ones(images.shape[:2], bool)
    else:
        resized, masks = geometry.resize_masked(pixels[None], valid[None], offset=offset, **size)
        images = resized[0] if fill.dtype.kind == "f" else np.rint(resized[0])
        images[~masks[0]] = fill
        images = geometry.turn(images.astype(fill.dtype), orientation, axes=(0, 1))
        mask = geometry.turn(masks[0], orientation, axes=(0, 1))
    usable = mask
    cloud = window.cloud[source]
    if cloud.any():
        clear = geometry.resize_mask((valid & ~cloud)[None], offset=offset, **size)[0]
        usable = geometry.turn(clear, orientation, axes=(0, 1))
    token_valid = geometry.share_true(mask, block=modality.patch) >= 0.5
    return images, token_valid, geometry.share_true(usable, block=per_cell) >= 0.5


def _cut_labels(
    labels: np.ndarray, anchor: Box, box: Box, orientation: Orientation, view_cells: int, num_classes: int
) -> np.ndarray:
    """[P Q L] share of each class in each cell of the view."""
    source, offset = _place(anchor, box, OSM.pixels_per_cell)
    shares = geometry.class_shares(
        labels[source],
        num_classes=num_classes,
        box_size=box.side * OSM.pixels_per_cell,
        out_size=view_cells,
        offset=offset,
    )
    return geometry.turn(shares, orientation, axes=(0, 1))
