"""OpenStreetMap files as one table of classified objects, from which each place's label map is drawn.

Written once, sorted by where objects lie, so that a place reads a few thousand rows of it and not the planet. What a
place shows depends on whether the file covers it at all: outside there is no label map, which is not an empty one.
Next: osm.py (classes, and what lies on top), sources.py.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import osmium
import pyarrow as pa
import pyarrow.parquet as pq
import rasterio.warp
import shapely
import shapely.geometry
from jaxtyping import UInt8
from rasterio.crs import CRS

from skysense_jax.ingest import osm
from skysense_jax.ingest.places import boxes_of
from skysense_jax.ingest.rasters import Refused, Square

_LON_LAT = CRS.from_epsg(4326)
_BANDS_PER_DEGREE = 20  # objects are sorted by latitude in such bands, then by longitude
_METRES_PER_DEGREE = 110_000.0  # of latitude, at least
_ROW_GROUP = 10_000  # objects that are read or left unread together
# Ways whose class comes from these tags are lines although they are closed, unless they say area=yes.
_LINES = ("highway", "railway", "waterway")
_AREAS_OF_WATERWAYS = ("riverbank", "dock")


@dataclasses.dataclass(frozen=True)
class Coverage:
    """The ground that a source has objects of, degrees, and its name."""

    source: str
    bounds: tuple[float, float, float, float]


SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("name", pa.string()),
        ("width_m", pa.float32()),
        ("geometry", pa.binary()),
        *((side, pa.float64()) for side in ("west", "south", "east", "north")),
    ]
)


def read_file(path: pathlib.Path, *, table: osm.Table = osm.TAGS) -> tuple[list[osm.Feature], tuple, list[str]]:
    """Classified objects of a .osm.pbf, .osm or GeoJSON file in degrees, its bounds, and what could not be placed.

    Raises:
      Refused: the file cannot be read, or holds nothing that has a place.
    """
    read = _geojson if path.suffix.lower() in (".json", ".geojson") else _openstreetmap
    try:
        features, bounds, lost = read(path, table)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"no OpenStreetMap file or GeoJSON: {error}") from error
    if bounds is None and features:
        bounds = tuple(float(edge) for edge in shapely.total_bounds([feature.geometry for feature in features]))
    if bounds is None:
        raise Refused("no bounds and no object that has a class and a place")
    west, south, east, north = bounds
    if not (-180 <= west <= 180 and -180 <= east <= 180 and -90 <= south <= north <= 90):
        raise Refused(
            f"longitudes {west:.6g} to {east:.6g}, latitudes {south:.6g} to {north:.6g} (swapped, or metres?)"
        )
    return features, bounds, lost


def _geojson(path: pathlib.Path, table: osm.Table):
    collection = json.loads(path.read_text())
    crs = osm.geojson_crs(collection)
    features = []
    for feature in collection["features"]:
        tags = feature["properties"] or {}
        name = osm.class_of(tags, table)
        if name and feature["geometry"]:
            placed = rasterio.warp.transform_geom(crs, _LON_LAT, feature["geometry"])
            features.append(osm.Feature(name, shapely.geometry.shape(placed), osm.width_of(tags, name)))
    return features, None, []


def _openstreetmap(path: pathlib.Path, table: osm.Table):
    box = osmium.io.Reader(str(path)).header().box()
    corners = (box.bottom_left, box.top_right) if box.valid() else ()
    bounds = tuple(edge for corner in corners for edge in (corner.lon, corner.lat)) or None
    factory, features, num_lost = osmium.geom.WKBFactory(), [], 0
    for entry in osmium.FileProcessor(str(path)).with_areas().with_filter(osmium.filter.EmptyTagFilter()):
        tags = dict(entry.tags)
        key, name = next(osm.rules_of(tags, table), (None, None))
        line = tags.get("area") == "no" or (key in _LINES and tags.get("waterway") not in _AREAS_OF_WATERWAYS)
        if name is None or not (entry.is_area() or entry.is_way()):
            continue
        if entry.is_area():
            if line and entry.from_way() and tags.get("area") != "yes":
                continue
            try:
                geometries = [shapely.from_wkb(factory.create_multipolygon(entry))]
            except RuntimeError:  # rings that do not close in the file
                geometries = []
        elif entry.is_closed() and not line:
            continue  # comes again as an area
        else:
            geometries = list(_runs(entry))
        num_lost += not geometries
        width = osm.width_of(tags, name)
        features += [osm.Feature(name, geometry, width) for geometry in geometries]
    lost = [f"{num_lost} objects without the places of their nodes"] if num_lost else []
    return features, bounds, lost


def _runs(way: osmium.osm.Way) -> Iterator[shapely.LineString]:
    """The parts of a way whose nodes are in the file: extracts cut ways at their edge."""
    run: list[tuple[float, float]] = []
    for node in way.nodes:
        if node.location.valid():
            run.append((node.location.lon, node.location.lat))
            continue
        if len(run) > 1:
            yield shapely.LineString(run)
        run = []
    if len(run) > 1:
        yield shapely.LineString(run)


def write(found: Iterable[tuple[str, Sequence[osm.Feature]]], path: pathlib.Path) -> None:
    """Writes a Parquet table of the objects of each source."""
    columns: dict[str, list] = {name: [] for name in SCHEMA.names}
    for source, features in found:
        columns["source"] += [source] * len(features)
        columns["name"] += [feature.name for feature in features]
        columns["width_m"] += [feature.width_m for feature in features]
        geometries = [feature.geometry for feature in features]
        columns["geometry"] += shapely.to_wkb(geometries).tolist() if geometries else []
        bounds = _with_width(
            shapely.bounds(geometries).reshape(-1, 4), [feature.width_m or 0.0 for feature in features]
        )
        for side, edges in zip(("west", "south", "east", "north"), bounds.T):
            columns[side] += edges.tolist()
    order = np.lexsort((columns["west"], np.floor(np.multiply(columns["south"], _BANDS_PER_DEGREE))))
    pq.write_table(pa.table(columns, SCHEMA).take(pa.array(order)), path, row_group_size=_ROW_GROUP)


def _with_width(bounds: np.ndarray, widths_m: Sequence[float]) -> np.ndarray:
    """Bounds in degrees of what lines of such widths cover."""
    degrees = np.asarray(widths_m, float) / 2 / _METRES_PER_DEGREE
    across = degrees / np.maximum(np.cos(np.radians(np.abs(bounds[:, [1, 3]]).max(1, initial=0.0))), 0.01)
    return bounds + np.stack([-across, -degrees, across, degrees], axis=1)


class LabelMaps:
    """Draws label maps from a table of objects.

    Args:
      path: what ``write`` wrote.
      coverages: of the sources in it; where several cover a place their objects are drawn together.
    """

    def __init__(self, path: pathlib.Path, coverages: Sequence[Coverage]):
        self._path = path
        self._ground = [shapely.union_all(boxes_of(coverage.bounds)) for coverage in coverages]
        self._sources = [coverage.source for coverage in coverages]

    def covering(self, square: Square) -> list[str]:
        """The sources that cover all of ``square``."""
        box = shapely.box(*rasterio.warp.transform_bounds(square.crs, _LON_LAT, *square.bounds))
        return [source for source, ground in zip(self._sources, self._ground) if ground.covers(box)]

    def draw(self, square: Square) -> UInt8[np.ndarray, "H W"] | None:
        """The label map of ``square``; None if no source covers all of it."""
        west, south, east, north = rasterio.warp.transform_bounds(square.crs, _LON_LAT, *square.bounds)
        covering = self.covering(square)
        if not covering:
            return None
        filters = [
            *(("west", "<=", east), ("east", ">=", west), ("south", "<=", north), ("north", ">=", south)),
            ("source", "in", covering),
        ]
        table = pq.read_table(self._path, filters=filters, columns=["name", "width_m", "geometry"])
        rows = zip(*(table[name].to_pylist() for name in table.column_names))
        features = [osm.Feature(name, shapely.from_wkb(geometry), width) for name, width, geometry in rows]
        return osm.draw(features, square, crs=_LON_LAT)
