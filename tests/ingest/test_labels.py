"""OpenStreetMap files through pyosmium and GeoJSON to label maps, by a table that lies on disk."""

import json
import os
import pathlib

import numpy as np
import pytest
import rasterio.warp
import shapely
from rasterio.crs import CRS

from skysense_jax.ingest import labels, osm
from skysense_jax.ingest.rasters import Refused, Square
from skysense_jax.modalities import OSM

WEST, NORTH = 704_000.0, 5_504_000.0
SQUARE = Square(WEST, NORTH, 16, CRS.from_epsg(32632))
ID = {name: i + 1 for i, name in enumerate(OSM.classes)}


def _degrees(east, south):
    """Longitude and latitude of a point so many metres from the square's corner."""
    (x,), (y,) = rasterio.warp.transform(SQUARE.crs, "EPSG:4326", [WEST + east], [NORTH - south])
    return x, y


def _osm(path, *, bounds=True):
    """A file with a building, a park's relation of two ways, a roundabout, a road that leaves the file, a lone node."""
    points, ways = [], []

    def node(east, south):
        points.append(_degrees(east, south))
        return len(points)

    def way(corners, tags, closed=True, missing=False):
        refs = [node(*corner) for corner in corners]
        refs += [refs[0]] if closed else []
        refs += [999] if missing else []
        ways.append((refs, tags))
        return len(ways)

    way([(10, 10), (50, 10), (50, 50), (10, 50)], {"building": "yes"})
    outer = way([(80, 10), (150, 10), (150, 80), (80, 80)], {})
    inner = way([(100, 30), (130, 30), (130, 60), (100, 60)], {})
    way([(30, 100), (60, 100), (60, 130), (30, 130)], {"highway": "residential"})  # a roundabout
    way([(5, 150), (155, 150)], {"highway": "residential", "width": "10 m"}, closed=False, missing=True)
    west, south, east, north = rasterio.warp.transform_bounds(SQUARE.crs, "EPSG:4326", *SQUARE.bounds)
    margin = 0.001
    text = ['<?xml version="1.0"?><osm version="0.6">']
    if bounds:
        text.append(
            f'<bounds minlon="{west - margin}" minlat="{south - margin}" '
            f'maxlon="{east + margin}" maxlat="{north + margin}"/>'
        )
    text += [f'<node id="{i}" version="1" lon="{x:.9f}" lat="{y:.9f}"/>' for i, (x, y) in enumerate(points, 1)]
    for i, (refs, tags) in enumerate(ways, 1):
        text.append(f'<way id="{i}" version="1">' + "".join(f'<nd ref="{ref}"/>' for ref in refs))
        text += [f'<tag k="{key}" v="{value}"/>' for key, value in tags.items()] + ["</way>"]
    text.append(
        f'<relation id="1" version="1"><member type="way" ref="{outer}" role="outer"/><member type="way" ref="{inner}" '
        'role="inner"/><tag k="type" v="multipolygon"/><tag k="landuse" v="forest"/></relation></osm>'
    )
    path.write_text("".join(text))
    return path


def _maps(path, features, bounds):
    labels.write([("map", features)], path / "labels.parquet")
    return labels.LabelMaps(path / "labels.parquet", [labels.Coverage("map", bounds)])


def test_objects_of_a_file_are_drawn_where_they_lie(tmp_path):
    features, bounds, lost = labels.read_file(_osm(tmp_path / "a.osm"))
    assert not lost
    found = _maps(tmp_path, features, bounds).draw(SQUARE)
    assert found.shape == (64, 64)
    at = lambda east, south: found[int(south / 2.5), int(east / 2.5)]  # noqa: E731
    assert at(30, 30) == ID["building"]
    assert at(90, 20) == ID["forest"]
    assert at(115, 45) == 0  # the relation's hole
    assert at(45, 101) == ID["road"]
    assert at(45, 115) == 0  # within the roundabout
    assert [at(80, 150 + metres) for metres in (-3, 3, -8)] == [ID["road"], ID["road"], 0]  # 10 m wide
    assert (found == ID["building"]).sum() == 16 * 16


def test_areas_with_another_tag_of_lines_are_areas(tmp_path):
    _osm(tmp_path / "a.osm")
    text = (tmp_path / "a.osm").read_text()
    station = '<tag k="building" v="train_station"/><tag k="railway" v="station"/><tag k="barrier" v="fence"/>'
    (tmp_path / "a.osm").write_text(text.replace('<tag k="building" v="yes"/>', station))
    features, bounds, _ = labels.read_file(tmp_path / "a.osm")
    assert (_maps(tmp_path, features, bounds).draw(SQUARE) == ID["building"]).sum() == 16 * 16


def test_wide_river_beside_a_place_reaches_into_it(tmp_path):
    river = osm.Feature("water", shapely.LineString([_degrees(-65, -500), _degrees(-65, 700)]), width_m=200.0)
    found = _maps(tmp_path, [river], (11.0, 49.0, 12.5, 50.5)).draw(SQUARE)
    wanted = osm.draw([river], SQUARE, crs=CRS.from_epsg(4326))
    assert (wanted > 0).any()
    np.testing.assert_array_equal(found, wanted)


def test_place_that_a_file_does_not_cover_has_no_map(tmp_path):
    features, bounds, _ = labels.read_file(_osm(tmp_path / "a.osm"))
    maps = _maps(tmp_path, features, bounds)
    assert maps.draw(Square(WEST + 10_000, NORTH, 16, SQUARE.crs)) is None
    assert maps.draw(Square(WEST + 120, NORTH, 16, SQUARE.crs)) is None  # in part
    west, south, east, north = bounds
    empty = _maps(tmp_path, [], (west - 1, south, east + 1, north))
    assert not empty.draw(SQUARE).any()  # covered, and nothing mapped


def test_file_without_bounds_covers_its_objects(tmp_path):
    features, bounds, _ = labels.read_file(_osm(tmp_path / "a.osm", bounds=False))
    assert bounds == tuple(shapely.total_bounds([feature.geometry for feature in features]))


def test_table_finds_the_objects_of_a_place_among_many(tmp_path):
    rng = np.random.default_rng(0)
    corners = rng.uniform((11.7, 49.5), (12.0, 49.8), (30_000, 2))
    many = [osm.Feature("building", shapely.box(x, y, x + 2e-4, y + 1e-4)) for x, y in corners]
    maps = _maps(tmp_path, many, (11.7, 49.5, 12.1, 49.9))
    square = Square(WEST, NORTH, 64, SQUARE.crs)
    wanted = osm.draw(many, square, crs=CRS.from_epsg(4326))
    assert (wanted > 0).any()
    np.testing.assert_array_equal(maps.draw(square), wanted)


def test_users_own_table_of_tags_decides(tmp_path):
    (tmp_path / "tags.csv").write_text("tag,values,class\nbuilding,,industrial\nlanduse,forest wood,scrub\n")
    table = osm.read_table(tmp_path / "tags.csv")
    features, _, _ = labels.read_file(_osm(tmp_path / "a.osm"), table=table)
    assert sorted(feature.name for feature in features) == ["industrial", "scrub"]
    for text, told in (("a,b\n1,2\n", "columns"), ("tag,values,class\nx,,lava\n", "line 2: class 'lava'")):
        (tmp_path / "tags.csv").write_text(text)
        with pytest.raises(ValueError, match=told):
            osm.read_table(tmp_path / "tags.csv")


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.osm", "no xml", "no OpenStreetMap file or GeoJSON"),
        ("a.osm.pbf", "no pbf", "no OpenStreetMap file or GeoJSON"),
        ("a.geojson", "{}", "no OpenStreetMap file or GeoJSON"),
        ("a.geojson", json.dumps(dict(features=[])), "no bounds and no object"),
        (
            "a.geojson",
            json.dumps(
                dict(
                    features=[
                        dict(
                            geometry=dict(type="Polygon", coordinates=[[[48, 111], [48, 112], [49, 111], [48, 111]]]),
                            properties=dict(building="yes"),
                        )
                    ]
                )
            ),
            "latitudes 111 to 112",
        ),
    ],
)
def test_file_that_is_no_map_is_refused(tmp_path, name, text, told):
    (tmp_path / name).write_text(text)
    with pytest.raises(Refused, match=told):
        labels.read_file(tmp_path / name)


def test_extracts_are_read(tmp_path):
    """Real ones where they are at hand, else a made-up one."""
    real = os.environ.get("SKYSENSE_REALDATA")
    paths = sorted(pathlib.Path(real).glob("osm_extracts/*.osm*")) if real else [_osm(tmp_path / "a.osm")]
    assert paths
    for path in paths:
        features, bounds, _ = labels.read_file(path)
        inside = shapely.box(*bounds)
        assert sum(inside.intersects(feature.geometry) for feature in features) > 0.9 * len(features) > 3
