"""OpenStreetMap objects as one table on disk, from which each place's label map is drawn.

Written once, sorted by where objects lie, so that a place reads a few thousand rows of it and not the planet; no more
of it stands in memory than one band of latitude. What a place shows depends on whether a source covers it at all:
outside there is no label map, which is not an empty one. Next: osm_files.py (reading), osm.py (what lies on top).
"""

import contextlib
import dataclasses
import errno
import functools
import itertools
import pathlib
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq
import shapely
from jaxtyping import Bool, Float, UInt8
from rasterio.crs import CRS
from shapely.errors import ShapelyError

from skysense_jax.ingest import osm, osm_files
from skysense_jax.ingest.places import boxes_of
from skysense_jax.ingest.rasters import Refused, Square

_LON_LAT = CRS.from_epsg(4326)
_BANDS_PER_DEGREE = 20  # objects are sorted by latitude in such bands, then by longitude
_METRES_PER_DEGREE = 110_000.0  # of latitude, at least
_ROW_GROUP = 10_000  # objects that are read or left unread together
_BATCH = 20_000  # objects that stand in memory as they are read
_SLIVER = 1e-4  # share of a place that two outlines of one border may leave open
_SIDES = ("west", "south", "east", "north")


@dataclasses.dataclass(frozen=True)
class Coverage:
    """The ground that a source has objects of.

    Attributes:
      source: its name, followed by a file's where each of its files covers what is the file's own.
      bounds: west, south, east, north, degrees.
      polygons: what is covered within them, WKT in degrees; empty: all.
    """

    source: str
    bounds: tuple[float, float, float, float]
    polygons: str = ""

    def ground(self) -> shapely.Geometry:
        """What is covered, degrees."""
        return shapely.from_wkt(self.polygons) if self.polygons else shapely.union_all(boxes_of(self.bounds))

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "Coverage":
        """That of what ``facts`` gave."""
        return cls(**{**facts, "bounds": tuple(facts["bounds"])})

    def facts(self) -> dict[str, Any]:
        """As JSON has it, without what is empty."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value}


SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("name", pa.string()),
        ("width_m", pa.float32()),
        ("geometry", pa.binary()),
        *((side, pa.float64()) for side in _SIDES),
    ]
)


class Near:
    """Tells which boxes lie near some others: in one of the squares of 1/20 degree that these touch."""

    def __init__(self, boxes: Float[np.ndarray, "N 4"]):
        """``boxes``: west, south, east, north, degrees."""
        low, high = (np.floor(boxes[:, sides] * _BANDS_PER_DEGREE).astype(int) for sides in (slice(2), slice(2, 4)))
        self._origin = low.min(0)
        self._size = high.max(0) + 1 - self._origin
        touched = np.zeros(self._size, bool)
        for (left, bottom), (right, top) in zip(low - self._origin, high - self._origin):
            touched[left : right + 1, bottom : top + 1] = True
        self._sums = np.pad(touched.cumsum(0, dtype=np.int32).cumsum(1, dtype=np.int32), ((1, 0), (1, 0)))

    def __call__(self, boxes: Float[np.ndarray, "N 4"]) -> Bool[np.ndarray, "N"]:
        low, high = (np.floor(boxes[:, sides] * _BANDS_PER_DEGREE).astype(int) for sides in (slice(2), slice(2, 4)))
        left, bottom = np.clip(low - self._origin, 0, self._size).T
        right, top = np.clip(high + 1 - self._origin, 0, self._size).T
        sums = self._sums
        return sums[right, top] - sums[left, top] - sums[right, bottom] + sums[left, bottom] > 0


class Writer:
    """Writes a Parquet table of objects, sorted by band of latitude and then by longitude.

    Until ``close`` they wait in a file for each band, and each band is sorted on its own.

    Args:
      path: of the table.
      near: which objects are kept; None: all.
    """

    def __init__(self, path: pathlib.Path, *, near: Near | None = None):
        self._path, self._near = path, near
        self.folder = path.with_name(f"{path.name}.parts")
        self.folder.mkdir()

    def add(self, source: str, features: Sequence[osm.Feature]) -> Float[np.ndarray, "4"]:
        """Takes objects of a source; returns the bounds of all of them, those that are not near included."""
        geometries = np.array([feature.geometry for feature in features])
        widths = [feature.width_m for feature in features]
        bounds = shapely.bounds(geometries)
        edges = _with_width(bounds, [width or 0.0 for width in widths])
        kept = np.flatnonzero(np.isfinite(edges).all(1))  # not what is empty
        if self._near is not None:
            kept = kept[self._near(edges[kept])]
        bands = np.floor(edges[kept, 1] * _BANDS_PER_DEGREE).astype(int)
        order = np.argsort(bands, kind="stable")
        kept, bands = kept[order], bands[order]
        columns = {
            "source": [source] * len(kept),
            "name": [features[row].name for row in kept],
            "width_m": [widths[row] for row in kept],
            "geometry": shapely.to_wkb(geometries[kept]).tolist(),
            **{side: edges[kept, number] for number, side in enumerate(_SIDES)},
        }
        table = pa.table(columns, SCHEMA)
        for band, start, num in zip(*np.unique(bands, return_index=True, return_counts=True)):
            with (self.folder / str(band)).open("ab") as file, pa.ipc.new_stream(file, SCHEMA) as stream:
                stream.write_table(table.slice(start, num))
        return np.concatenate([np.fmin.reduce(bounds[:, :2]), np.fmax.reduce(bounds[:, 2:])])

    def close(self, sources: Collection[str]) -> None:
        """Writes the table of what ``sources`` have; others were refused before their end."""
        wanted, waiting = pa.array(sorted(sources), pa.string()), SCHEMA.empty_table()
        with pq.ParquetWriter(self._path, SCHEMA) as file:
            for path in sorted(self.folder.iterdir(), key=lambda path: int(path.name)):
                table = _read_streams(path)
                table = table.filter(pc.is_in(table["source"], wanted))
                table = table.take(pa.array(np.argsort(table["west"].to_numpy(), kind="stable")))
                waiting = pa.concat_tables([waiting, table])
                whole = len(waiting) - len(waiting) % _ROW_GROUP
                for start in range(0, whole, _ROW_GROUP):
                    file.write_table(waiting.slice(start, _ROW_GROUP))
                waiting = waiting.slice(whole)
            if len(waiting):
                file.write_table(waiting)
        shutil.rmtree(self.folder)


def _read_streams(path: pathlib.Path) -> pa.Table:
    """What was written to a file one Arrow stream after the other."""
    tables = []
    with pa.OSFile(str(path)) as file:
        while file.tell() < file.size():
            with pa.ipc.open_stream(file) as stream:
                tables.append(stream.read_all())
    return pa.concat_tables(tables)


def _with_width(bounds: np.ndarray, widths_m: Sequence[float]) -> np.ndarray:
    """Bounds in degrees of what lines of such widths cover."""
    degrees = np.asarray(widths_m, float) / 2 / _METRES_PER_DEGREE
    across = degrees / np.maximum(np.cos(np.radians(np.abs(bounds[:, [1, 3]]).max(1, initial=0.0))), 0.01)
    return bounds + np.stack([-across, -degrees, across, degrees], axis=1)


def read_file(
    path: pathlib.Path,
    writer: Writer,
    *,
    source: str,
    table: osm.Table = osm.TAGS,
    classes: osm.Classes = osm.CLASSES,
) -> tuple[tuple[float, float, float, float], list[str]]:
    """Bounds of a .osm.pbf, .osm or GeoJSON file, degrees, and what could not be placed; its objects go to ``writer``.

    The bounds are those that its header states, else those of its objects that have a class.

    Raises:
      Refused: the file cannot be read, or holds nothing that has a place.
      OSError: nothing can be written.
    """
    lost: Counter[str] = Counter()
    edges = np.array([np.inf, np.inf, -np.inf, -np.inf])
    found = osm_files.objects(path, table=table, classes=classes, folder=writer.folder.parent, lost=lost)
    with _refusing():
        stated = osm_files.header_bounds(path)
    while True:
        with _refusing():
            batch = list(itertools.islice(found, _BATCH))
        if not batch:
            break
        some = writer.add(source, batch)
        edges = np.concatenate([np.fmin(edges[:2], some[:2]), np.fmax(edges[2:], some[2:])])
    bounds, left_out = stated or tuple(edges.tolist()), [f"{num} {what}" for what, num in lost.items()]
    if not np.isfinite(bounds).all():
        raise Refused("; ".join(["no bounds and no object that has a class and a place", *left_out]))
    west, south, east, north = bounds
    if not (-180 <= west <= 180 and -180 <= east <= 180 and -90 <= south <= north <= 90):
        raise Refused(
            f"longitudes {west:.6g} to {east:.6g}, latitudes {south:.6g} to {north:.6g} (swapped, or metres?)"
        )
    return bounds, left_out


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """A context in which a file's errors, and no full disk, become Refused."""
    try:
        yield
    except (ShapelyError, RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise
        raise Refused(f"no OpenStreetMap file or GeoJSON: {error}") from error


class LabelMaps:
    """Draws label maps from a table of objects.

    Args:
      path: what a ``Writer`` wrote.
      coverages: of the sources in it; where several cover a place their objects are drawn together.
      classes: those of its objects.
    """

    def __init__(self, path: pathlib.Path, coverages: Sequence[Coverage], classes: osm.Classes = osm.CLASSES):
        self._table, self._classes = pyarrow.dataset.dataset(path), classes  # its footer is read once
        self._ground = [coverage.ground() for coverage in coverages]
        shapely.prepare(self._ground)
        self._sources = [coverage.source for coverage in coverages]

    def covering(self, square: Square) -> list[str]:
        """The sources that cover all of ``square``; if none does alone, those that do together; else none."""
        box = shapely.box(*square.degrees())
        alone = [source for source, ground in zip(self._sources, self._ground) if ground.covers(box)]
        if alone:
            return alone
        parts = {source: ground for source, ground in zip(self._sources, self._ground) if ground.intersects(box)}
        left = functools.reduce(shapely.difference, parts.values(), box)
        return list(parts) if left.area <= _SLIVER * box.area else []

    def draw(self, square: Square) -> UInt8[np.ndarray, "H W"] | None:
        """The label map of ``square``; None if the sources do not cover all of it."""
        west, south, east, north = square.degrees()
        covering = self.covering(square)
        if not covering:
            return None
        filters = [
            *(("west", "<=", east), ("east", ">=", west), ("south", "<=", north), ("north", ">=", south)),
            ("source", "in", covering),
        ]
        columns = ["name", "width_m", "geometry"]
        table = self._table.to_table(columns=columns, filter=pq.filters_to_expression(filters))
        rows = zip(*(table[name].to_pylist() for name in table.column_names))
        features = [osm.Feature(name, shapely.from_wkb(geometry), width) for name, width, geometry in rows]
        return osm.draw(features, square, crs=_LON_LAT, classes=self._classes)
