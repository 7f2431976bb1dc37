"""OpenStreetMap files as a stream of classified objects in degrees: .osm.pbf and .osm by pyosmium, GeoJSON.

An OpenStreetMap file is read twice and never as a whole: what stands in memory are the relations that may become areas
with their ways, and the places of all nodes, of large files on disk instead. GeoJSON is read as a whole.
Next: osm.py (which tags are which class), labels.py (where the objects go).
"""

import errno
import json
import pathlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import osmium
import rasterio.warp
import shapely
import shapely.geometry
from rasterio.crs import CRS
from shapely.errors import ShapelyError

from skysense_jax.ingest import osm

_LON_LAT = CRS.from_epsg(4326)
# Ways whose class comes from these tags are lines although they are closed, unless they say area=yes.
_LINES = ("highway", "railway", "waterway")
_AREAS_OF_WATERWAYS = ("riverbank", "dock")
_IN_MEMORY_BYTES = 2**28  # of a file whose nodes' places stay in memory: some 0.4 GB of them
_DENSE_BYTES = 30 * 2**30  # of a file whose nodes are most of the world's


def is_geojson(path: pathlib.Path) -> bool:
    return path.suffix.lower() in (".json", ".geojson")


def header_bounds(path: pathlib.Path) -> tuple[float, float, float, float] | None:
    """Bounds in degrees that a file's header states, None if it states none."""
    if is_geojson(path):
        return None
    box = osmium.io.Reader(str(path), osmium.osm.NOTHING).header().box()
    return (box.bottom_left.lon, box.bottom_left.lat, box.top_right.lon, box.top_right.lat) if box.valid() else None


def objects(
    path: pathlib.Path, *, table: osm.Table, classes: osm.Classes, folder: pathlib.Path, lost: Counter[str]
) -> Iterator[osm.Feature]:
    """The objects of a file that have a class.

    Args:
      folder: for the places of a large file's nodes, 16 bytes each.
      lost: what could not be placed is counted here.

    Raises:
      ShapelyError, RuntimeError, ValueError, KeyError, TypeError: the file is none, or damaged.
      OSError: it cannot be read, or ``folder`` is too full (ENOSPC).
    """
    if is_geojson(path):
        yield from _geojson(path, table, classes, lost)
        return
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        yield from _openstreetmap(path, table, classes, index=_index(path, scratch), lost=lost)


def _geojson(path: pathlib.Path, table: osm.Table, classes: osm.Classes, lost: Counter[str]) -> Iterator[osm.Feature]:
    collection = json.loads(path.read_text())
    if not isinstance(collection, dict) or not isinstance(collection.get("features"), list):
        raise ValueError("no FeatureCollection: wanted a list of features")
    crs = osm.geojson_crs(collection)
    for entry in collection["features"]:
        try:
            found = _feature(entry, crs, table, classes)
        except (ShapelyError, ValueError, KeyError, TypeError, AttributeError):
            lost["features that are not as GeoJSON has them"] += 1
            continue
        if found:
            yield found


def _feature(entry: Mapping[str, Any], crs: CRS, table: osm.Table, classes: osm.Classes) -> osm.Feature | None:
    """That of a GeoJSON feature in ``crs``; None if it has no class or no place."""
    tags = entry["properties"] or {}
    name = osm.class_of(tags, table)
    if not name or not entry["geometry"]:
        return None
    placed = rasterio.warp.transform_geom(crs, _LON_LAT, entry["geometry"])
    return osm.Feature(name, shapely.geometry.shape(placed), osm.width_of(tags, name, classes))


def _index(path: pathlib.Path, scratch: str) -> str:
    """Osmium's name of the table of nodes: 16 bytes a node, or 8 a number up to the highest where that is less."""
    size = path.stat().st_size
    if size < _IN_MEMORY_BYTES:
        return "flex_mem"
    free = shutil.disk_usage(scratch).free
    if free < 2 * size:  # told before, since a disk that fills up under a mapped file ends the process without a word
        raise OSError(errno.ENOSPC, f"{free / 1e9:.3g} GB free; wanted {2 * size / 1e9:.3g} for the nodes of {path}")
    return f"{'sparse' if size < _DENSE_BYTES else 'dense'}_file_array,{scratch}/nodes"


def _openstreetmap(
    path: pathlib.Path, table: osm.Table, classes: osm.Classes, *, index: str, lost: Counter[str]
) -> Iterator[osm.Feature]:
    factory, known = osmium.geom.WKBFactory(), osmium.filter.KeyFilter(*{key for key, _, _ in table})
    # Relations are asked for although they come again as areas: areas that are ready are handed out between objects.
    kinds = osmium.filter.EntityFilter(osmium.osm.WAY | osmium.osm.RELATION | osmium.osm.AREA)
    processor = osmium.FileProcessor(str(path)).with_locations(index).with_areas(known)
    for entry in processor.with_filter(kinds).with_filter(known):
        if entry.is_relation():
            continue
        tags = dict(entry.tags)
        key, name = next(osm.rules_of(tags, table), (None, None))
        usual = key in _LINES and tags.get("waterway") not in _AREAS_OF_WATERWAYS
        line = {"yes": False, "no": True}.get(tags.get("area"), usual)
        if name is None:
            continue
        if entry.is_area():
            if line and entry.from_way():
                continue
            try:
                geometries = [shapely.from_wkb(factory.create_multipolygon(entry))]
            except RuntimeError:  # rings that do not close in the file
                geometries = []
        elif entry.is_closed() and not line:
            continue  # comes again as an area
        else:
            geometries = list(_runs(entry))
        if not geometries:
            lost["objects without the places of their nodes"] += 1
        width = osm.width_of(tags, name, classes)
        yield from (osm.Feature(name, geometry, width) for geometry in geometries)


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
