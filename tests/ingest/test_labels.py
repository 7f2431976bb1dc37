"""OpenStreetMap files through pyosmium and GeoJSON to label maps, by a table that lies on disk."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import tempfile

import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio.warp
import shapely
from rasterio.crs import CRS

from skysense_jax.ingest import build, labels, osm, osm_files, plan
from skysense_jax.ingest.rasters import Refused, Square
from skysense_jax.modalities import OSM
from tests.ingest import earth

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


class Kept(labels.Writer):
    """A table of objects that also keeps them."""

    def __init__(self, folder, **options):
        super().__init__(folder / "labels.parquet", **options)
        self.features = []

    def add(self, source, features):
        self.features += features
        return super().add(source, features)


def _read(path, **options):
    """Objects, bounds and what was lost of a file."""
    with tempfile.TemporaryDirectory() as folder:
        kept = Kept(pathlib.Path(folder))
        bounds, lost = labels.read_file(path, kept, source="map", **options)
        return kept.features, bounds, lost


def _maps(folder, features, bounds, **coverage):
    writer = labels.Writer(folder / "labels.parquet")
    if features:
        writer.add("map", features)
    writer.close(["map"])
    return labels.LabelMaps(folder / "labels.parquet", [labels.Coverage("map", bounds, **coverage)])


def test_objects_of_a_file_are_drawn_where_they_lie(tmp_path):
    features, bounds, lost = _read(_osm(tmp_path / "a.osm"))
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
    features, bounds, _ = _read(tmp_path / "a.osm")
    assert (_maps(tmp_path, features, bounds).draw(SQUARE) == ID["building"]).sum() == 16 * 16


@pytest.mark.parametrize(("area", "kind"), [("yes", "Polygon"), ("no", "LineString"), ("", "LineString")])
def test_square_of_a_town_is_an_area_without_a_rim(tmp_path, area, kind):
    """A closed way of pedestrians is the square itself where it says area=yes, and else the way around."""
    text = _osm(tmp_path / "a.osm").read_text()
    tags = '<tag k="highway" v="pedestrian"/>' + (f'<tag k="area" v="{area}"/>' if area else "")
    (tmp_path / "a.osm").write_text(text.replace('<tag k="building" v="yes"/>', tags))
    features, bounds, _ = _read(tmp_path / "a.osm")
    around = shapely.box(*bounds).intersection(shapely.box(*_degrees(0, 60), *_degrees(60, 0)))
    (found,) = [feature for feature in features if around.contains(feature.geometry)]
    assert found.geometry.geom_type.removeprefix("Multi") == kind
    if area == "yes":
        assert (_maps(tmp_path, [found], bounds).draw(SQUARE) == ID["road"]).sum() == 16 * 16


def test_wide_river_beside_a_place_reaches_into_it(tmp_path):
    river = osm.Feature("water", shapely.LineString([_degrees(-65, -500), _degrees(-65, 700)]), width_m=200.0)
    found = _maps(tmp_path, [river], (11.0, 49.0, 12.5, 50.5)).draw(SQUARE)
    wanted = osm.draw([river], SQUARE, crs=CRS.from_epsg(4326))
    assert (wanted > 0).any()
    np.testing.assert_array_equal(found, wanted)


def test_place_that_a_file_does_not_cover_has_no_map(tmp_path):
    features, bounds, _ = _read(_osm(tmp_path / "a.osm"))
    maps = _maps(tmp_path, features, bounds)
    assert maps.draw(Square(WEST + 10_000, NORTH, 16, SQUARE.crs)) is None
    assert maps.draw(Square(WEST + 120, NORTH, 16, SQUARE.crs)) is None  # in part
    west, south, east, north = bounds
    empty = _maps(tmp_path, [], (west - 1, south, east + 1, north))
    assert not empty.draw(SQUARE).any()  # covered, and nothing mapped


@pytest.mark.parametrize(
    ("gap", "covering"),
    [(0.0, ["east", "west"]), (-1e-4, ["east", "west"]), (1e-9, ["east", "west"]), (1e-4, []), (-1.0, ["both"])],
)
def test_place_at_the_border_of_two_extracts_shows_what_both_have(tmp_path, gap, covering):
    """Neither covers it alone; a gap of 7 m (1e-4 degrees) is one."""
    features, bounds, _ = _read(_osm(tmp_path / "a.osm"))
    west, south, east, north = bounds
    middle = (west + east) / 2
    writer = labels.Writer(tmp_path / "labels.parquet")
    for name, low, high in (("east", middle, east), ("west", west, middle)):
        writer.add(name, [f for f in features if low <= f.geometry.centroid.x < high])
    writer.close(["east", "west"])
    grounds = dict(
        east=(middle + gap, south, east, north), west=(west, south, middle, north), away=(0.0, 0.0, 1.0, 1.0)
    )
    if covering == ["both"]:
        grounds = dict(both=bounds, west=grounds["west"])
    maps = labels.LabelMaps(tmp_path / "labels.parquet", [labels.Coverage(*item) for item in grounds.items()])
    assert maps.covering(SQUARE) == covering
    found, wanted = maps.draw(SQUARE), osm.draw(features, SQUARE, crs=CRS.from_epsg(4326))
    if len(covering) == 2:
        assert {ID["building"], ID["forest"], ID["road"]} <= set(np.unique(wanted).tolist())
        np.testing.assert_array_equal(found, wanted)
    else:
        assert found is None or not found.any()


def test_file_without_bounds_covers_its_objects(tmp_path):
    features, bounds, _ = _read(_osm(tmp_path / "a.osm", bounds=False))
    assert bounds == tuple(shapely.total_bounds([feature.geometry for feature in features]))


def test_table_finds_the_objects_of_a_place_among_many(tmp_path, monkeypatch):
    monkeypatch.setattr(labels, "_ROW_GROUP", 300)
    rng = np.random.default_rng(0)
    corners = rng.uniform((11.77, 49.59), (11.92, 49.74), (4_000, 2))
    many = [osm.Feature("building", shapely.box(x, y, x + 2e-4, y + 1e-4)) for x, y in corners]
    maps = _maps(tmp_path, many, (11.7, 49.5, 12.1, 49.9))
    square = Square(WEST, NORTH, 64, SQUARE.crs)
    wanted = osm.draw(many, square, crs=CRS.from_epsg(4326))
    assert pq.ParquetFile(tmp_path / "labels.parquet").metadata.num_row_groups == 14
    assert (wanted > 0).any()
    np.testing.assert_array_equal(maps.draw(square), wanted)


def test_users_own_table_of_tags_decides(tmp_path):
    (tmp_path / "tags.csv").write_text("tag,values,class\nbuilding,,industrial\nlanduse,forest wood,scrub\n")
    table = osm.read_table(tmp_path / "tags.csv")
    features, _, _ = _read(_osm(tmp_path / "a.osm"), table=table)
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
        _read(tmp_path / name)


WOOD = dict(
    type="Feature",
    properties=dict(natural="wood"),
    geometry=dict(type="Polygon", coordinates=[[[11, 48], [12, 48], [12, 49], [11, 48]]]),
)


@pytest.mark.parametrize(
    "change",
    [
        dict(properties=[1]),
        dict(properties="wood"),
        dict(geometry=dict(type="LineString", coordinates=[[11, 48]])),
        dict(geometry=dict(type="Polygon", coordinates="abc")),
        dict(geometry=dict(type="Heap", coordinates=[[11, 48]])),
        None,
    ],
)
def test_feature_that_is_none_is_counted_and_the_others_go_on(tmp_path, change):
    bad = None if change is None else {**WOOD, **change}
    (tmp_path / "a.geojson").write_text(json.dumps(dict(features=[bad, WOOD])))
    features, bounds, lost = _read(tmp_path / "a.geojson")
    assert [feature.name for feature in features] == ["forest"]
    assert bounds == (11, 48, 12, 49)
    assert lost == ["1 features that are not as GeoJSON has them"]
    (tmp_path / "a.geojson").write_text(json.dumps(dict(features=[bad])))
    with pytest.raises(Refused, match="no object that has a class and a place; 1 features that are not as GeoJSON"):
        _read(tmp_path / "a.geojson")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([WOOD], "no FeatureCollection: wanted a list of features"),
        (dict(features=WOOD), "no FeatureCollection: wanted a list of features"),
        (dict(features=[WOOD], crs="here"), "GeoJSON coordinate system 'here'; wanted an EPSG code"),
        (dict(features=[WOOD], crs=dict(properties=[1])), "GeoJSON coordinate system .*; wanted an EPSG code"),
    ],
)
def test_geojson_of_another_shape_is_refused(tmp_path, content, told):
    (tmp_path / "a.geojson").write_text(json.dumps(content))
    with pytest.raises(Refused, match=told):
        _read(tmp_path / "a.geojson")


def test_extracts_are_read(tmp_path):
    """Real ones where they are at hand, else a made-up one."""
    real = os.environ.get("SKYSENSE_REALDATA")
    paths = sorted(pathlib.Path(real).glob("osm_extracts/*.osm*")) if real else [_osm(tmp_path / "a.osm")]
    assert paths
    for path in paths:
        features, bounds, _ = _read(path)
        inside = shapely.box(*bounds)
        assert sum(inside.intersects(feature.geometry) for feature in features) > 0.9 * len(features) > 3


# ---- how the table is written


def _boxes(rng, num, west=11.0, east=13.0, south=49.0, north=50.0):
    corners = rng.uniform((west, south), (east, north), (num, 2))
    return [osm.Feature("building", shapely.box(x, y, x + 3e-4, y + 2e-4)) for x, y in corners]


def test_table_is_that_of_one_sort_of_everything(tmp_path):
    rng, added = np.random.default_rng(1), []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    writers = [labels.Writer(tmp_path / name / "labels.parquet") for name in ("a", "b")]
    for source, num in (("x", 9_000), ("refused", 500), ("y", 8_000), ("x", 7_001)):
        features = _boxes(rng, num)
        added += [(source, feature) for feature in features if source != "refused"]
        for writer in writers:
            writer.add(source, features)
    for writer in writers:
        writer.close(["y", "x"])
        assert [path.name for path in writer.folder.parent.iterdir()] == ["labels.parquet"]
    first, second = ((tmp_path / name / "labels.parquet").read_bytes() for name in ("a", "b"))
    assert first == second
    file = pq.ParquetFile(tmp_path / "a" / "labels.parquet")
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    assert sizes == [10_000, 10_000, 4_001]
    table = file.read()
    bounds = shapely.bounds([feature.geometry for _, feature in added])
    order = np.lexsort((bounds[:, 0], np.floor(bounds[:, 1] * 20)))
    assert table["source"].to_pylist() == [added[row][0] for row in order]
    assert [shapely.from_wkb(wkb) for wkb in table["geometry"].to_pylist()] == [added[row][1].geometry for row in order]


def test_objects_far_from_the_places_are_not_kept_and_no_map_changes(tmp_path):
    features = _boxes(np.random.default_rng(2), 3_000, 11.76, 11.96, 49.56, 49.78)
    places = [Square(WEST, NORTH + 900.0 * number, 32, SQUARE.crs) for number in (0, 9)]
    near = labels.Near(np.array([place.degrees() for place in places]))
    writer = labels.Writer(tmp_path / "labels.parquet", near=near)
    writer.add("map", features)
    writer.close(["map"])
    kept = pq.read_table(tmp_path / "labels.parquet")
    squares = [
        shapely.box(x / 20, y / 20, (x + 1) / 20, (y + 1) / 20) for x in range(230, 246) for y in range(980, 1000)
    ]
    around = [square for square in squares if any(square.intersects(shapely.box(*p.degrees())) for p in places)]
    wanted = sum(any(square.intersects(feature.geometry) for square in around) for feature in features)
    assert kept.num_rows == wanted < len(features) / 4
    maps = labels.LabelMaps(tmp_path / "labels.parquet", [labels.Coverage("map", (11.0, 49.0, 13.0, 50.0))])
    for place in places:
        drawn = osm.draw(features, place, crs=CRS.from_epsg(4326))
        assert (drawn > 0).any()
        np.testing.assert_array_equal(maps.draw(place), drawn)


@pytest.mark.parametrize(("limit", "kind"), [("_IN_MEMORY_BYTES", "sparse"), ("_DENSE_BYTES", "dense")])
def test_places_of_many_nodes_lie_on_disk_and_objects_stay_the_same(tmp_path, monkeypatch, limit, kind):
    wanted = _read(_osm(tmp_path / "a.osm"))
    monkeypatch.setattr(osm_files, "_IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(osm_files, limit, 0)
    monkeypatch.setattr(labels, "_BATCH", 2)
    assert osm_files._index(tmp_path / "a.osm", str(tmp_path)).startswith(f"{kind}_file_array,")
    assert _read(tmp_path / "a.osm") == wanted
    assert [path.name for path in tmp_path.iterdir()] == ["a.osm"]
    usage = dataclasses.make_dataclass("Usage", ["free"])
    monkeypatch.setattr(osm_files.shutil, "disk_usage", lambda folder: usage(100))
    with pytest.raises(OSError, match=r"GB free; wanted .* for the nodes of .*a\.osm"):
        _read(tmp_path / "a.osm")


# ---- what a source covers


def _planned(folder, options, *, text="", tmp_path):
    """The manifest of a place around ``SQUARE`` and further ones to the east, by the commands."""
    earth.write_radar(folder / "s1.tif", west=WEST - 160, north=NORTH + 160, side_m=960)
    (folder / "list.toml").write_text(
        '[[source]]\nname = "r"\nkind = "s1"\nfiles = "s1.tif"\nlicence = "x"\n'
        f'[[source]]\nname = "map"\nkind = "osm"\nfiles = "*.osm"\nlicence = "ODbL-1.0"\n{options}\n{text}'
    )
    plan.main(["--sources", str(folder / "list.toml"), "--out", str(tmp_path / "m"), "--cells", "16"])
    return json.loads((tmp_path / "m" / "sources.json").read_text()), tmp_path / "m"


def test_extract_that_a_polygon_cut_covers_the_polygon_alone(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    text = _osm(folder / "a.osm").read_text()
    box = re.search(r"<bounds[^>]*/>", text)[0]
    (folder / "a.osm").write_text(text.replace(box, '<bounds minlon="11" minlat="49" maxlon="13" maxlat="50"/>'))
    beside = Square(WEST + 160, NORTH, 16, SQUARE.crs)  # the header's box covers it, and the polygon does not
    corners = [(-9, -9), (169, -9), (169, 169), (-9, 169)]
    lines = [f" {x:.9f} {y:.9f}" for x, y in (_degrees(*corner) for corner in corners)]
    (folder / "area.poly").write_text("\n".join(["area", "1", *lines, "END", "END", ""]))
    facts, manifest = _planned(folder, "", tmp_path=tmp_path)
    assert facts["labels"] == [dict(source="map/a.osm", bounds=[11.0, 49.0, 13.0, 50.0])]
    maps = labels.LabelMaps(manifest / "labels.parquet", [labels.Coverage.of(facts["labels"][0])])
    assert not maps.draw(beside).any()  # empty, which is a lie
    shutil.rmtree(manifest)
    facts, manifest = _planned(folder, 'coverage = "area.poly"', tmp_path=tmp_path)
    (covered,) = facts["labels"]
    assert covered["source"] == "map"
    maps = labels.LabelMaps(manifest / "labels.parquet", [labels.Coverage.of(covered)])
    assert maps.draw(beside) is None
    assert (maps.draw(SQUARE) == ID["building"]).sum() == 16 * 16
    build.main(["--manifest", str(manifest), "--out", str(tmp_path / "d"), "--workers", "1"])
    rows = {row["id"]: row for row in pq.read_table(tmp_path / "d" / "index.parquet").to_pylist()}
    assert rows[f"32632_{WEST:.0f}_{NORTH:.0f}"]["licence"] == "ODbL-1.0; x"
    assert [row["id"] for row in rows.values() if row["classes"]] == [f"32632_{WEST:.0f}_{NORTH:.0f}"]


def test_source_that_lacks_a_file_of_its_ground_covers_nothing(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    _osm(folder / "a.osm")
    (folder / "b.osm").write_text("no xml")
    (folder / "area.wkt").write_text(shapely.box(11, 49, 13, 50).wkt)
    facts, manifest = _planned(folder, 'coverage = "area.wkt"', tmp_path=tmp_path)
    assert facts["labels"] == []
    assert pq.read_table(manifest / "labels.parquet").num_rows == 0
    rejected = [json.loads(line) for line in (manifest / "rejected.jsonl").read_text().splitlines()]
    assert [entry["name"] for entry in rejected] == ["map/b.osm", "map"]
    assert "1 of its 2 files cannot be read: it covers nothing" in rejected[1]["reason"]


def test_malformed_coverage_ends_the_plan_with_its_line(tmp_path, capsys):
    _osm(tmp_path / "a.osm")
    (tmp_path / "area.poly").write_text("area\n1\n 11 49\n 12 49\n 11,50\nEND\nEND\n")
    with pytest.raises(SystemExit):
        _planned(tmp_path, 'coverage = "area.poly"', tmp_path=tmp_path)
    told = capsys.readouterr().err
    assert "source 'map'" in told
    assert "area.poly: line 5: '11,50'; wanted longitude and latitude" in told
