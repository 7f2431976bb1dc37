"""OpenStreetMap geometries with their tags as the label map: which tags are which class, and who covers whom.

Tags and classes can be replaced by a user's own (``read_table``, ``read_classes``).

Areas are filled, lines are widened to the usual width of what they stand for; points have no extent and are left out.
Pixels that nothing covers stay 0, "nothing mapped": that a map is empty there says nothing about the ground.
"""

import csv
import dataclasses
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import rasterio.features
import rasterio.warp
import shapely
import shapely.geometry
from jaxtyping import UInt8
from rasterio.crs import CRS

from skysense_jax.ingest.rasters import Refused, Square
from skysense_jax.modalities import OSM, LabelMap, label_map

Table = tuple[tuple[str, frozenset[str] | None, str], ...]
# (tag, its values or None for any, class). The first row that fits is an object's class; later rows do not count.
TAGS: Table = tuple(
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


@dataclasses.dataclass(frozen=True)
class Classes:
    """What a label map can show.

    Attributes:
      map: names in the order of their ids, and what a text encoder reads for each.
      order: names from the ground up: what stands on the ground comes after it.
      line_width_m: of lines without a tag "width"; lines of a class that is not here cover nothing.
    """

    map: LabelMap
    order: tuple[str, ...]
    line_width_m: Mapping[str, float]


CLASSES = Classes(OSM, _ORDER, _LINE_WIDTH_M)
_FIELDS = {"name": str, "text": str, "width_m": (int, float)}


def read_classes(entries: Sequence[Mapping[str, Any]]) -> Classes:
    """A user's own classes, from the ground up: name, text (else the name) and perhaps width_m of each; none: ours.

    Raises:
      ValueError: another field or type, a name twice, or too many for a label map of bytes.
    """
    if not entries:
        return CLASSES
    for number, entry in enumerate(entries, 1):
        where = f"[[class]] {entry.get('name', number)!r}"
        for field, value in entry.items():
            if field not in _FIELDS or not isinstance(value, _FIELDS[field]):
                raise ValueError(f"{where}: {field} = {value!r}; wanted name and text, texts, and width_m, metres")
        if not entry.get("name") or not entry.get("width_m", 1.0) > 0:
            raise ValueError(f"{where}: {dict(entry)}; wanted a name, and width_m above 0 or left out")
    names = tuple(entry["name"] for entry in entries)
    texts = tuple(entry.get("text", entry["name"]) for entry in entries)
    try:
        found = label_map(names, texts)
    except ValueError as error:
        raise ValueError(f"[[class]]: {error}") from error
    return Classes(found, names, {e["name"]: float(e["width_m"]) for e in entries if "width_m" in e})


def read_table(path: pathlib.Path, classes: Classes = CLASSES) -> Table:
    """A user's own ``TAGS``: a CSV with the columns tag, values (apart by spaces, empty for any) and class.

    Raises:
      ValueError: another header, or a class that is none of ``classes``.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or set(rows[0]) != {"tag", "values", "class"}:
        raise ValueError(f"{path}: columns {sorted(rows[0]) if rows else 'none'}; wanted tag, values and class")
    for number, row in enumerate(rows, 2):
        if row["class"] not in classes.map.classes:
            raise ValueError(f"{path}, line {number}: class {row['class']!r}; wanted one of {classes.map.classes}")
    return tuple((row["tag"], frozenset(row["values"].split()) or None, row["class"]) for row in rows)


def class_of(tags: Mapping[str, Any], table: Table = TAGS) -> str | None:
    """The class of an object with these tags, None if it has none."""
    return next((name for _, name in rules_of(tags, table)), None)


def rules_of(tags: Mapping[str, Any], table: Table = TAGS) -> Iterator[tuple[str, str]]:
    """The rows of the table that fit an object, as tag and class; the first one counts."""
    for key, values, name in table:
        value = str(tags.get(key) or "").strip()
        if value not in _NO and (values is None or value in values):
            yield key, name


def width_of(tags: Mapping[str, Any], name: str, classes: Classes = CLASSES) -> float | None:
    """Metres that a line of this class is wide, by its tag "width" or as usual; None: such lines have no width."""
    if name not in classes.line_width_m:
        return None
    stated = re.fullmatch(r"(\d+(?:\.\d+)?) ?m?", str(tags.get("width") or "").strip())
    return float(stated[1]) if stated else classes.line_width_m[name]


@dataclasses.dataclass(frozen=True)
class Feature:
    """An object of the map: its class, its geometry, and how wide its lines are in metres (None: not at all)."""

    name: str
    geometry: shapely.Geometry
    width_m: float | None = None


def rasterise(
    features: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]], square: Square, *, crs: CRS
) -> UInt8[np.ndarray, "H W"]:
    """``draw`` of the objects that have a class.

    Args:
      features: (GeoJSON geometry in ``crs``, tags) pairs.
      crs: of the geometries.
    """
    named = ((class_of(tags), geometry, tags) for geometry, tags in features)
    found = [
        Feature(name, shapely.geometry.shape(geometry), width_of(tags, name)) for name, geometry, tags in named if name
    ]
    return draw(found, square, crs=crs)


def draw(
    features: Iterable[Feature], square: Square, *, crs: CRS, classes: Classes = CLASSES
) -> UInt8[np.ndarray, "H W"]:
    """The label map of ``square``: class id of the topmost object over each pixel's centre, 0 where there is none."""
    layers: dict[str, list] = {name: [] for name in classes.order}
    for feature in features:
        geometry = shapely.geometry.mapping(feature.geometry)
        area = _area(shapely.geometry.shape(rasterio.warp.transform_geom(crs, square.crs, geometry)), feature.width_m)
        if not area.is_empty:
            layers[feature.name].append(area)
    side = square.cells * OSM.pixels_per_cell
    labels = np.zeros((side, side), np.uint8)
    transform = square.transform(OSM.pixels_per_cell)
    for name in classes.order:
        if layers[name]:
            shapes = [(area, classes.map.classes.index(name) + 1) for area in layers[name]]
            rasterio.features.rasterize(shapes, out=labels, transform=transform)
    return labels


def _area(geometry: shapely.Geometry, width_m: float | None) -> shapely.Geometry:
    """What of the ground an object covers; empty for points and for lines of classes that have no width."""
    if geometry.geom_type in ("Polygon", "MultiPolygon"):
        return geometry
    if geometry.geom_type in ("LineString", "MultiLineString") and width_m is not None:
        return geometry.buffer(width_m / 2, cap_style="flat")
    return shapely.Polygon()


def geojson_crs(collection: Mapping[str, Any]) -> CRS:
    """The coordinate system of a GeoJSON collection: its "crs" member, or longitude and latitude as the standard says.

    Raises:
      Refused: a "crs" that names no known system.
    """
    member = collection.get("crs")
    if member is None:
        return CRS.from_epsg(4326)
    properties = member.get("properties") if isinstance(member, Mapping) else None
    name = str(properties.get("name", "") if isinstance(properties, Mapping) else member)
    code = re.search(r"EPSG:+(\d+)$", name)
    if code:
        return CRS.from_epsg(int(code[1]))
    if name.endswith("CRS84"):
        return CRS.from_epsg(4326)
    raise Refused(f"GeoJSON coordinate system {name!r}; wanted an EPSG code")
