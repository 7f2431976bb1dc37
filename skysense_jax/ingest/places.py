"""Which ground becomes samples: squares of a fixed grid in each UTM zone, and which of them are held out.

The grid's lines are multiples of a square's side, so that squares never overlap, and the same ground is the same square
whatever area is asked for. Validation squares lie in blocks of
many kilometres, and none touches a square to train on. Next: plan.py (the command), build.py (what is made of them).
"""

import dataclasses
import hashlib
import itertools
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import rasterio.warp
import shapely
from rasterio.crs import CRS

from skysense_jax.ingest.acquisitions import Acquisition
from skysense_jax.ingest.rasters import Square, zone_of
from skysense_jax.modalities import METRES_PER_CELL

_LON_LAT = CRS.from_epsg(4326)
_SOUTH_END, _NORTH_END = -80.0, 84.0  # of UTM, degrees
TRAIN, VALIDATION = "train", "validation"


@dataclasses.dataclass(frozen=True)
class Place:
    """A square of the grid.

    Attributes:
      epsg: of its UTM zone.
      west, north: its corner, metres.
      cells: along a side.
      split: ``TRAIN`` or ``VALIDATION``.
      acquisitions: rows of the table of acquisitions whose bounds meet it, ascending.
    """

    epsg: int
    west: int
    north: int
    cells: int
    split: str = TRAIN
    acquisitions: tuple[int, ...] = ()

    @property
    def id(self) -> str:
        return f"{self.epsg}_{self.west}_{self.north}"

    @property
    def square(self) -> Square:
        return Square(float(self.west), float(self.north), self.cells, CRS.from_epsg(self.epsg))


SCHEMA = pa.schema(
    [
        *((name, pa.int32()) for name in ("epsg", "west", "north", "cells")),
        ("split", pa.string()),
        ("acquisitions", pa.list_(pa.int32())),
    ]
)


def write(places: Iterable[Place], path: pathlib.Path) -> None:
    """Writes a Parquet table of them, in their order."""
    pq.write_table(pa.Table.from_pylist([dataclasses.asdict(place) for place in places], SCHEMA), path)


def read(path: pathlib.Path) -> list[Place]:
    """What ``write`` wrote."""
    rows = pq.read_table(path, schema=SCHEMA).to_pylist()
    return [Place(**{**row, "acquisitions": tuple(row["acquisitions"])}) for row in rows]


def grid(area: shapely.Geometry, *, cells: int) -> Iterator[Place]:
    """The squares whose centre lies in ``area`` (degrees) and all of whose corners in their zone, part by part.

    What lies across the border of two zones is left out: squares of both would overlap there.
    """
    for part in shapely.get_parts(area):
        shapely.prepare(part)
        west, south, east, north = part.bounds
        for hemisphere, low, high in ((32600, 0.0, _NORTH_END), (32700, _SOUTH_END, 0.0)):
            for zone in range(math.floor((west + 180) / 6), math.floor((east + 180) / 6) + 1):
                meridian = 6.0 * zone - 180
                strip = (max(west, meridian), max(south, low), min(east, meridian + 6), min(north, high))
                if strip[0] < strip[2] and strip[1] < strip[3]:
                    yield from _of_zone(part, CRS.from_epsg(hemisphere + zone % 60 + 1), strip, cells)


def _of_zone(area: shapely.Geometry, crs: CRS, strip: tuple[float, float, float, float], cells: int) -> Iterator[Place]:
    """Those of one zone, from the north and from the west."""
    side = round(cells * METRES_PER_CELL)
    west, south, east, north = rasterio.warp.transform_bounds(_LON_LAT, crs, *strip, densify_pts=101)
    corners = np.arange(math.floor(west / side), math.ceil(east / side) + 1) * side

    def degrees(xs: np.ndarray, y: int | float) -> np.ndarray:
        return np.array(rasterio.warp.transform(crs, _LON_LAT, xs.tolist(), [y] * len(xs)))

    for top in range(math.ceil(north / side) * side, math.floor(south / side) * side, -side):
        upper, lower = degrees(corners, top), degrees(corners, top - side)
        at_home = np.array([zone_of(*point) == crs for row in (upper, lower) for point in row.T]).reshape(2, -1).all(0)
        inside = shapely.contains_xy(area, *degrees(corners[:-1] + side / 2, top - side / 2))
        for left in corners[:-1][inside & at_home[:-1] & at_home[1:]]:
            yield Place(crs.to_epsg(), int(left), top, cells)


def seen_by(places: Sequence[Place], acquisitions: Sequence[Acquisition]) -> list[Place]:
    """The places with the acquisitions that may show them; those that none shows are left out."""
    parts, rows = [], []
    for row, acquisition in enumerate(acquisitions):
        for part in shown_by(acquisition):
            parts.append(part)
            rows.append(row)
    tree = shapely.STRtree(parts)
    found = []
    for place in places:
        meeting = set()
        for box in boxes_of(place.square.degrees()):
            meeting |= {rows[i] for i in tree.query(box, predicate="intersects")}
        if meeting:
            found.append(dataclasses.replace(place, acquisitions=tuple(sorted(meeting))))
    return found


def shown_by(acquisition: Acquisition) -> list[shapely.Geometry]:
    """The ground that an acquisition may show, degrees: its footprint where it is known, else its bounds."""
    return boxes_of(acquisition.bounds) if acquisition.footprint is None else [acquisition.footprint]


def boxes_of(bounds: Sequence[float]) -> list[shapely.Polygon]:
    """Bounds in degrees as boxes: two where they cross 180 degrees."""
    west, south, east, north = bounds
    if west <= east:
        return [shapely.box(west, south, east, north)]
    return [shapely.box(west, south, 180, north), shapely.box(-180, south, east, north)]


def with_splits(places: Sequence[Place], *, share: float, block_km: float, seed: int) -> list[Place]:
    """The places, blocks of them held out; of these the squares that touch one to train on are left out.

    A block is held out by a hash of its place and ``seed``: more places do not move others from one split to the other.
    """
    side_m = 1000 * block_km

    def held_out(place: Place) -> bool:
        block = f"{seed} {place.epsg} {place.west // side_m:.0f} {place.north // side_m:.0f}"
        digest = hashlib.sha256(block.encode()).digest()
        return int.from_bytes(digest[:8], "big") < share * 2**64

    split = [dataclasses.replace(place, split=VALIDATION if held_out(place) else TRAIN) for place in places]
    train = {(place.epsg, place.west, place.north) for place in split if place.split == TRAIN}

    def touches(place: Place) -> bool:
        side = round(place.cells * METRES_PER_CELL)
        around = itertools.product((-side, 0, side), repeat=2)
        return any((place.epsg, place.west + i, place.north + j) in train for i, j in around)

    return [place for place in split if place.split == TRAIN or not touches(place)]


def balanced(places: Sequence[Place], classes: Mapping[str, int], *, most: int, seed: int) -> list[Place]:
    """At most ``most`` places of each class (by id), drawn by a hash of each place, in their order."""
    rank = lambda place: hashlib.sha256(f"{seed} {place.id}".encode()).digest()  # noqa: E731
    taken: dict[int, int] = {}
    kept = set()
    for place in sorted(places, key=rank):
        kind = classes[place.id]
        taken[kind] = taken.get(kind, 0) + 1
        if taken[kind] <= most:
            kept.add(place.id)
    return [place for place in places if place.id in kept]
