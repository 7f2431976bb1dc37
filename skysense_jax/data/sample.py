"""A sample in memory: what a record holds, what a procedural scene renders, what views are cut from.

``Sample`` holds whole arrays; a record (records.py) offers the same reading interface, ``SampleReader``, and decodes
only what a window needs. Next: records.py (on disk), views.py (crops).
"""

import dataclasses
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np

UNDATED = -(2**31)  # day of a date whose acquisition day is not known
ORBITS = ("unknown", "ascending", "descending")


@dataclasses.dataclass(frozen=True)
class Window:
    """Pixels of one date in a square of ground.

    Attributes:
      pixels: [H W C], the modality's dtype and unit; arbitrary where not ``valid``.
      valid: [H W] bool, the sensor has data here.
      cloud: [H W] bool, the ground is hidden (all False where no cloud mask is known).
    """

    pixels: np.ndarray
    valid: np.ndarray
    cloud: np.ndarray


@dataclasses.dataclass(frozen=True)
class Series:
    """All dates of one modality over the whole extent.

    Attributes:
      images: [T H W C], the modality's dtype and unit.
      valid, cloud: [T H W] bool, as in ``Window``.
      days: [T] int32 days since 1970-01-01, or ``UNDATED``.
      orbits: [T] uint8 index into ``ORBITS``; 0 for sensors that have none.
      native_gsd_m: ground sample distance of the source before resampling, metres.
    """

    images: np.ndarray
    valid: np.ndarray
    cloud: np.ndarray
    days: np.ndarray
    orbits: np.ndarray
    native_gsd_m: float


@runtime_checkable  # beartype asks
class SampleReader(Protocol):
    """What views are cut from."""

    id: str
    extent_cells: int

    def days(self, modality: str) -> np.ndarray:
        """[T] int32 days since 1970-01-01 or ``UNDATED``; empty if the sample lacks the modality."""

    def window(self, modality: str, date: int, row: int, column: int, side: int) -> Window:
        """The square of ``side`` cells whose north-west corner is cell (row, column); it lies inside the extent."""

    def labels_window(self, row: int, column: int, side: int) -> np.ndarray | None:
        """[H W] uint8 class ids of that square, None if the sample has no label map."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One place. Implements ``SampleReader`` by slicing.

    Attributes:
      id: unique within a dataset.
      extent_cells: side of the place in cells of 10 m.
      series: per modality name; a modality that was never seen has no entry (zeros never stand for "missing").
      labels: [4 extent, 4 extent] uint8 ids of modalities.OSM (0 = nothing mapped), or None.
      longitude, latitude: of the centre, degrees, or None.
      provenance, licence: where it comes from and under which SPDX id or terms.
    """

    id: str
    extent_cells: int
    series: Mapping[str, Series]
    labels: np.ndarray | None = None
    longitude: float | None = None
    latitude: float | None = None
    provenance: str = ""
    licence: str = ""

    def days(self, modality: str) -> np.ndarray:
        return self.series[modality].days if modality in self.series else np.zeros(0, np.int32)

    def window(self, modality: str, date: int, row: int, column: int, side: int) -> Window:
        series = self.series[modality]
        pixels_per_cell = series.images.shape[1] // self.extent_cells
        rows = slice(row * pixels_per_cell, (row + side) * pixels_per_cell)
        columns = slice(column * pixels_per_cell, (column + side) * pixels_per_cell)
        return Window(*(a[date, rows, columns] for a in (series.images, series.valid, series.cloud)))

    def labels_window(self, row: int, column: int, side: int) -> np.ndarray | None:
        if self.labels is None:
            return None
        per_cell = self.labels.shape[0] // self.extent_cells
        return self.labels[row * per_cell : (row + side) * per_cell, column * per_cell : (column + side) * per_cell]
