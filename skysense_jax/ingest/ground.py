"""Pieces of ground that a user names: a box in degrees, or a file with polygons: .poly, GeoJSON or WKT.

A .poly is what OpenStreetMap extracts are cut by: a name, then sections, each with a name ("!" before it: a hole), a
line of longitude and latitude for each corner, and END; a further END closes the file.
Source: https://wiki.openstreetmap.org/wiki/Osmosis/Polygon_Filter_File_Format.
"""

import json
import math
import pathlib
from collections.abc import Iterator

import shapely
import shapely.geometry
from shapely.errors import ShapelyError

# Degrees. Outlines are straight on another map than images: 2 km off along 250 km at 60 degrees north.
_LOOSE = 0.03


def read_ground(path: pathlib.Path) -> shapely.Geometry:
    """The area that a file holds, degrees; by its suffix .poly, WKT (.wkt, .txt) or else GeoJSON.

    Raises:
      ValueError: the file holds no area on Earth; of a .poly with the line.
      OSError: it cannot be read.
    """
    text = path.read_text()
    try:
        if path.suffix.lower() == ".poly":
            area = read_poly(text)
        elif path.suffix.lower() in (".wkt", ".txt"):
            area = shapely.from_wkt(text.strip())
        else:
            content = json.loads(text)
            features = content.get("features", [content])
            area = shapely.union_all([shapely.geometry.shape(entry.get("geometry", entry)) for entry in features])
    except (ShapelyError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error or type(error).__name__}; wanted .poly, GeoJSON or WKT") from error
    parts = shapely.get_parts(shapely.make_valid(area))
    area = shapely.union_all(parts[shapely.area(parts) > 0])
    west, south, east, north = area.bounds
    if area.is_empty or not (-180 <= west < east <= 180 and -90 <= south < north <= 90):
        raise ValueError(f"{path}: polygons with bounds {area.bounds}; wanted some, in degrees, south before north")
    return area


def footprint(outline: shapely.Geometry, bounds: tuple[float, float, float, float]) -> shapely.Geometry | None:
    """The part of ``bounds`` that an image has data in by an ``outline`` in its metadata, degrees, a little widened.

    None if the outline is none, does not lie within the bounds (axes swapped, say), or these cross 180 degrees.
    """
    outline = shapely.make_valid(outline)
    if bounds[0] >= bounds[2] or not outline.area > 0 or not shapely.box(*bounds).buffer(_LOOSE).covers(outline):
        return None
    return outline.buffer(_LOOSE).intersection(shapely.box(*bounds))


def read_poly(text: str) -> shapely.Geometry:
    """The area of a .poly file's text: its sections together, without its holes.

    Raises:
      ValueError: with the number of the line that is wrong.
    """
    lines = ((number, line.strip()) for number, line in enumerate(text.splitlines(), 1))
    lines = iter([(number, line) for number, line in lines if line])
    if next(lines, None) is None:
        raise ValueError("line 1: nothing; wanted a name")
    filled, holes = [], []
    for number, line in lines:
        if line == "END":
            break
        ring = shapely.Polygon(_corners(lines, line, number))
        (holes if line.startswith("!") else filled).append(shapely.make_valid(ring))
    else:
        raise ValueError(f"line {len(text.splitlines())}: the file ends here; wanted END")
    further = next(lines, None)
    if further is not None:
        raise ValueError(f"line {further[0]}: {further[1]!r} after the last END")
    if not filled:
        raise ValueError("no section that is filled")
    return shapely.union_all(filled).difference(shapely.union_all(holes))


def _corners(lines: Iterator[tuple[int, str]], name: str, start: int) -> list[tuple[float, float]]:
    """Those of the section that begins at line ``start``; reads on to its END."""
    corners = []
    for number, line in lines:
        if line == "END":
            if len(set(corners)) < 3:
                raise ValueError(f"line {number}: section {name!r} has {len(set(corners))} corners; wanted 3 or more")
            return corners
        try:
            longitude, latitude = (float(part) for part in line.split())
        except ValueError as error:
            raise ValueError(f"line {number}: {line!r}; wanted longitude and latitude, or END") from error
        if not (math.isfinite(longitude) and -180 <= longitude <= 180 and -90 <= latitude <= 90):
            raise ValueError(f"line {number}: longitude {longitude:g}, latitude {latitude:g}; wanted degrees")
        corners.append((longitude, latitude))
    raise ValueError(f"section {name!r} of line {start}: no END")
