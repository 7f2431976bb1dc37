"""What a source has: acquisitions, each one look of one sensor at one piece of ground, and the table that keeps them.

Finding them opens no more than headers and metadata; pixels are read by series.py, place by place.
Next: sources.py (who finds them), places.py (which ground becomes samples).
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from skysense_jax.data.sample import UNDATED


@dataclasses.dataclass(frozen=True)
class Layer:
    """One band of one file.

    Attributes:
      path: or a URL that GDAL opens.
      band: its number there, from 1.
      variable: of a NetCDF or HDF5 file, whose plane ``index`` it is (the axes before rows and columns); else empty.
      scale, add: its numbers times and plus these are in the row's unit, but for an offset of the acquisition.
      crs, transform: where it lies, if the file does not say it as GDAL reads it.
    """

    path: str
    band: int = 1
    variable: str = ""
    index: tuple[int, ...] = ()
    scale: float = 1.0
    add: float = 0.0
    crs: str = ""
    transform: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Acquisition:
    """One look of a sensor.

    Attributes:
      id: its path in its source.
      source: name of the source in the list of sources.
      modality: row of the table that its pixels go to.
      bounds: west, south, east, north of what its files cover, degrees; west > east where it crosses 180 degrees.
      layers: a file and a band for each band of the row, by the row's names.
      classes: Sentinel-2's scene classification, which tells clouds.
      clouds: probabilities of what hides the ground, percent.
      day: since 1970-01-01, or ``UNDATED``.
      orbit: of Sentinel-1, one of ``data.sample.ORBITS``.
      offset: what to subtract from its numbers.
      unit: "linear" or "dB" of a radar, else empty.
      rank: of several that show the same ground on the same day the highest counts (processing baseline).
      footprint: the part of ``bounds`` that has data, where metadata tell it; known to plan.py alone.
    """

    id: str
    source: str
    modality: str
    bounds: tuple[float, float, float, float]
    layers: Mapping[str, Layer]
    classes: Layer | None = None
    clouds: tuple[Layer, ...] = ()
    day: int = UNDATED
    orbit: str = "unknown"
    offset: int = 0
    unit: str = ""
    rank: int = 0
    footprint: shapely.Geometry | None = None


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A file, a place or a date that came to nothing: what, where, and why.

    Attributes:
      what: "source", "file", "place" or "date".
      name: of the place or the acquisition, or the path of the file.
    """

    what: str
    name: str
    reason: str


def date_over(place: str, row: str, date: str) -> str:
    """The name of a rejected date: of which place, which row of the table, and which acquisitions."""
    return f"{place} {row}: {date}"


def row_of_date(name: str) -> str:
    """The row of the table in what ``date_over`` gave; of another name something that is none."""
    return name.partition(": ")[0].rpartition(" ")[2]


_JSON = ("layers", "classes", "clouds")
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("id", "source", "modality", "orbit", "unit", *_JSON)),
        *((name, pa.int32()) for name in ("day", "offset", "rank")),
        ("bounds", pa.list_(pa.float64(), 4)),
    ]
)


def write(acquisitions: Iterable[Acquisition], path: pathlib.Path) -> None:
    """Writes a Parquet table of them, in their order."""
    rows = [{**vars(a), **{name: json.dumps(vars(a)[name], default=_told) for name in _JSON}} for a in acquisitions]
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path)


def _told(layer: Layer) -> dict[str, Any]:
    """The fields that are not as they are by default: of a raster its path, and of most the band."""
    return {
        field.name: getattr(layer, field.name)
        for field in dataclasses.fields(Layer)
        if getattr(layer, field.name) != field.default
    }


def read(path: pathlib.Path) -> list[Acquisition]:
    """What ``write`` wrote."""
    return [_acquisition(row) for row in pq.read_table(path, schema=SCHEMA).to_pylist()]


def _acquisition(row: Mapping[str, Any]) -> Acquisition:
    layers, classes, clouds = (json.loads(row[name]) for name in _JSON)
    return Acquisition(
        **{key: value for key, value in row.items() if key not in (*_JSON, "bounds")},
        bounds=tuple(row["bounds"]),
        layers={name: _layer(layer) for name, layer in layers.items()},
        classes=classes and _layer(classes),
        clouds=tuple(_layer(layer) for layer in clouds),
    )


def _layer(told: Mapping[str, Any]) -> Layer:
    return Layer(**{key: tuple(value) if isinstance(value, list) else value for key, value in told.items()})


def by_date(acquisitions: Sequence[Acquisition]) -> list[list[Acquisition]]:
    """Those of one day and orbit together, in the order of days; in each group the highest rank first, then by name.

    Tiles that were cut from one image so become one date again.
    """
    groups: dict[tuple[int, str, str], list[Acquisition]] = {}
    for acquisition in sorted(acquisitions, key=lambda a: (a.day, a.orbit, a.source, -a.rank, a.id)):
        groups.setdefault((acquisition.day, acquisition.orbit, acquisition.source), []).append(acquisition)
    return list(groups.values())
