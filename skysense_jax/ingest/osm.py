"""OpenStreetMap geometries with their tags as the label map: which tags are which class, and who covers whom.

Areas are filled, lines are widened to the usual width of what they stand for; points have no extent and are left out.
Pixels that nothing covers stay 0, "nothing mapped": that a map is empty there says nothing about the ground.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import rasterio.features
import rasterio.warp
import shapely
import shapely.geometry
from jaxtyping import UInt8
from rasterio.crs import CRS

from skysense_jax.ingest.rasters import Refused, Square
from skysense_jax.modalities import OSM

# (tag, its values or None for any, class). The first row that fits is an object's class; later rows do not count.
TAGS: tuple[tuple[str, frozenset[str] | None, str], ...] = tuple(
    (key, values if values is None else frozenset(values.split()), name)
    for key, values, name in (
        ("building", None, "building"),
        ("natural", "water", "water"),
        ("waterway", "river riverbank canal stream ditch drain dock", "water"),
        ("landuse", "reservoir basin", "water"),
        ("natural", "wetland", "wetland"),
        ("railway", "rail light_rail tram subway narrow_gauge", "railway"),
        (
            "highway",
            "motorway motorway_link trunk trunk_link primary primary_link secondary secondary_link tertiary "
            "tertiary_link unclassified residential living_street service road pedestrian",
            "road",
        ),
        ("leisure", "pitch track", "sports_pitch"),
        ("landuse", "orchard", "orchard"),
        ("landuse", "vineyard", "vineyard"),
        ("landuse", "farmland", "farmland"),
        ("natural", "wood", "forest"),
        ("landuse", "forest", "forest"),
        ("natural", "scrub heath", "scrub"),
        ("natural", "grassland", "grassland"),
        ("landuse", "meadow grass", "grassland"),
        ("natural", "sand beach dune", "sand"),
        ("natural", "bare_rock scree shingle", "bare_ground"),
        ("landuse", "quarry", "bare_ground"),
        ("landuse", "industrial commercial retail", "industrial"),
        ("landuse", "residential", "residential"),
    )
)
_NO = frozenset({"", "no", "none"})

# Who lies on top, from the ground up: wide land uses first, what stands on them last.
_ORDER = (
    *("residential", "industrial", "farmland", "grassland", "scrub", "forest", "orchard", "vineyard"),
    *("bare_ground", "sand", "wetland", "water", "sports_pitch", "railway", "road", "building"),
)
assert set(_ORDER) == set(OSM.classes)

_LINE_WIDTH_M = {"road": 7.0, "railway": 4.0, "water": 5.0}  # of lines without a "width" tag


def class_of(tags: Mapping[str, Any]) -> str | None:
    """The class of an object with these tags, None if it has none."""
    for key, values, name in TAGS:
        value = str(tags.get(key) or "").strip()
        if value not in _NO and (values is None or value in values):
            return name
    return None


def rasterise(
    features: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]], square: Square, *, crs: CRS
) -> UInt8[np.ndarray, "H W"]:
    """The label map of ``square``: class id of the topmost object over each pixel's centre, 0 where there is none.

    Args:
      features: (GeoJSON geometry in ``crs``, tags) pairs.
      crs: of the geometries.
    """
    layers: dict[str, list] = {name: [] for name in _ORDER}
    for geometry, tags in features:
        name = class_of(tags)
        if name is not None:
            placed = shapely.geometry.shape(rasterio.warp.transform_geom(crs, square.crs, geometry))
            area = _area(placed, name, tags)
            if not area.is_empty:
                layers[name].append(area)
    side = square.cells * OSM.pixels_per_cell
    labels = np.zeros((side, side), np.uint8)
    transform = square.transform(OSM.pixels_per_cell)
    for name in _ORDER:
        if layers[name]:
            shapes = [(area, OSM.classes.index(name) + 1) for area in layers[name]]
            rasterio.features.rasterize(shapes, out=labels, transform=transform)
    return labels


def _area(geometry: shapely.Geometry, name: str, tags: Mapping[str, Any]) -> shapely.Geometry:
    """What of the ground an object covers; empty for points and for lines of classes that have no width."""
    if geometry.geom_type in ("Polygon", "MultiPolygon"):
        return geometry
    if geometry.geom_type in ("LineString", "MultiLineString") and name in _LINE_WIDTH_M:
        stated = re.fullmatch(r"(\d+(?:\.\d+)?) ?m?", str(tags.get("width") or "").strip())
        width = float(stated[1]) if stated else _LINE_WIDTH_M[name]
        return geometry.buffer(width / 2, cap_style="flat")
    return shapely.Polygon()


def geojson_crs(collection: Mapping[str, Any]) -> CRS:
    """The coordinate system of a GeoJSON collection: its "crs" member, or longitude and latitude as the standard says.

    Raises:
      Refused: a "crs" that names no known system.
    """
    member = collection.get("crs")
    if member is None:
        return CRS.from_epsg(4326)
    name = str(member.get("properties", {}).get("name", ""))
    code = re.search(r"EPSG:+(\d+)$", name)
    if code:
        return CRS.from_epsg(int(code[1]))
    if name.endswith("CRS84"):
        return CRS.from_epsg(4326)
    raise Refused(f"GeoJSON coordinate system {name!r}; wanted an EPSG code")
