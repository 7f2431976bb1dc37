"""The label map against point-in-polygon tests, pixel by pixel."""

import numpy as np
import pytest
import shapely
import shapely.geometry
from rasterio.crs import CRS

from skysense_jax.ingest import osm
from skysense_jax.ingest.rasters import Refused, Square, lon_lat
from skysense_jax.modalities import OSM

UTM = CRS.from_epsg(32633)
SQUARE = Square(west=500_000.0, north=5_000_000.0, cells=3, crs=UTM)  # 12 x 12 pixels of 2.5 m


def id_of(name):
    return OSM.classes.index(name) + 1


def place(shape):
    """A shape in metres east and south of the corner, as GeoJSON geometry on the ground."""
    moved = shapely.affinity.affine_transform(shape, [1, 0, 0, -1, SQUARE.west, SQUARE.north])
    return shapely.geometry.mapping(moved)


@pytest.mark.parametrize(
    ("tags", "name"),
    [
        (dict(building="yes"), "building"),
        (dict(building="no", landuse="forest"), "forest"),
        (dict(building=None, highway="", natural="wood"), "forest"),
        (dict(building="house", landuse="residential"), "building"),
        (dict(highway="residential"), "road"),
        (dict(highway="bus_stop"), None),
        (dict(landuse="basin"), "water"),
        (dict(railway="abandoned"), None),
        (dict(name="Foo", osm_id=3), None),
        ({}, None),
    ],
)
def test_class_of_tags(tags, name):
    assert osm.class_of(tags) == name


def test_every_class_has_a_tag_and_a_place_in_the_order():
    assert {name for _, _, name in osm.TAGS} == set(OSM.classes)


def test_areas_cover_the_pixels_whose_centres_they_hold():
    """As GDAL without "all touched": an outline through a pixel does not make it the object's."""
    rng = np.random.default_rng(0)
    outer = shapely.Point(14, 13).buffer(9.3, quad_segs=3)
    shape = outer.difference(shapely.box(11.1, 10.3, 17.4, 14.9))  # a courtyard
    other = shapely.Polygon(rng.uniform(0, 30, (3, 2)))
    features = [(place(shape), dict(natural="wood")), (place(other), dict(landuse="farmland"))]
    got = osm.rasterise(features, SQUARE, crs=UTM)
    touched = 0
    for row in range(12):
        for column in range(12):
            centre = shapely.Point(2.5 * (column + 0.5), 2.5 * (row + 0.5))
            wanted = "forest" if shape.contains(centre) else "farmland" if other.contains(centre) else None
            assert got[row, column] == (id_of(wanted) if wanted else 0)
            pixel = shapely.box(2.5 * column, 2.5 * row, 2.5 * column + 2.5, 2.5 * row + 2.5)
            touched += shape.intersects(pixel) and not shape.contains(centre)
    assert touched > 5  # so that the other rule would differ


def test_what_stands_on_the_ground_covers_it_whatever_the_order_given():
    ground = (place(shapely.box(0, 0, 30, 30)), dict(landuse="residential"))
    pond = (place(shapely.box(0, 0, 20, 20)), dict(natural="water"))
    house = (place(shapely.box(0, 0, 10, 10)), dict(building="yes"))
    for features in ([ground, pond, house], [house, pond, ground]):
        got = osm.rasterise(features, SQUARE, crs=UTM)
        assert (got[:4, :4] == id_of("building")).all()
        assert (got[4:8, :8] == id_of("water")).all()
        assert (got[8:] == id_of("residential")).all()


def test_lines_have_the_width_of_what_they_are_and_points_none():
    line = shapely.LineString([(0, 12.5), (30, 12.5)])  # through the edge between pixel rows 4 and 5
    road = osm.rasterise([(place(line), dict(highway="primary"))], SQUARE, crs=UTM)
    assert sorted(set(np.argwhere(road)[:, 0].tolist())) == [4, 5]  # 7 m: centres within 3.5 m
    wide = osm.rasterise([(place(line), dict(highway="primary", width="12 m"))], SQUARE, crs=UTM)
    assert sorted(set(np.argwhere(wide)[:, 0].tolist())) == [3, 4, 5, 6]
    nothing = [
        (place(line), dict(landuse="farmland")),
        (place(shapely.Point(9, 9)), dict(building="yes")),
        (place(shapely.box(0, 0, 30, 30)), dict(name="no class")),
    ]
    assert not osm.rasterise(nothing, SQUARE, crs=UTM).any()


def test_degrees_are_brought_onto_the_square():
    corners = [lon_lat(x, y, UTM) for x, y in ((5e5, 5e6), (5e5 + 15, 5e6), (5e5 + 15, 5e6 - 10), (5e5, 5e6 - 10))]
    geometry = dict(type="Polygon", coordinates=[[*corners, corners[0]]])
    got = osm.rasterise([(geometry, dict(natural="sand"))], SQUARE, crs=osm.geojson_crs({}))
    wanted = np.zeros((12, 12), np.uint8)
    wanted[:4, :6] = id_of("sand")
    assert np.array_equal(got, wanted)


def test_geojson_crs_is_the_one_named():
    def named(name):
        return dict(crs=dict(type="name", properties=dict(name=name)))

    assert osm.geojson_crs(named("urn:ogc:def:crs:EPSG::32616")).to_epsg() == 32616
    assert osm.geojson_crs(named("EPSG:25832")).to_epsg() == 25832
    assert osm.geojson_crs(named("urn:ogc:def:crs:OGC:1.3:CRS84")).to_epsg() == 4326
    with pytest.raises(Refused, match="'local'"):
        osm.geojson_crs(named("local"))
