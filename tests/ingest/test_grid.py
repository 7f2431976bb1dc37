"""Places lie on a fixed grid, never overlap, and what is held out touches nothing that is trained on."""

import itertools

import numpy as np
import pytest
import rasterio
import rasterio.transform
import rasterio.warp
import shapely

from skysense_jax.ingest import ground, places, plan
from skysense_jax.ingest.acquisitions import Acquisition


def _in_degrees(place):
    return shapely.box(*rasterio.warp.transform_bounds(place.square.crs, "EPSG:4326", *place.square.bounds))


def _outline(place):
    west, south, east, north = place.square.bounds
    ring = ([west, east, east, west], [north, north, south, south])
    return shapely.Polygon(np.transpose(rasterio.warp.transform(place.square.crs, "EPSG:4326", *ring)))


@pytest.mark.parametrize(
    ("area", "zones"),
    [
        (shapely.box(11.95, 48.0, 12.05, 48.06), {32632, 32633}),  # across a border of zones
        (shapely.box(30.0, -0.03, 30.1, 0.03), {32636, 32736}),  # across the equator
        (shapely.box(179.95, -17.05, 180.0, -17.0), {32760}),
    ],
)
def test_squares_of_a_grid_do_not_overlap_and_fill_their_area(area, zones):
    found = list(places.grid(area, cells=64))
    assert {place.epsg for place in found} == zones
    assert all(place.west % 640 == 0 and place.north % 640 == 0 for place in found)
    assert len({place.id for place in found}) == len(found)
    boxes = [_in_degrees(place) for place in found]
    shapes = [_outline(place) for place in found]
    for here, there in shapely.STRtree(shapes).query(shapes, predicate="overlaps").T:
        assert shapes[here].intersection(shapes[there]).area < 1e-6 * shapes[here].area
    square_degrees = np.mean([box.area for box in boxes])
    assert 0.7 < len(found) * square_degrees / area.area < 1.1


def test_area_of_parts_far_from_each_other_is_the_squares_of_each():
    parts = [shapely.box(-119.0, 37.0, -118.98, 37.02), shapely.box(11.0, 48.0, 11.02, 48.02)]
    found = [
        place.id for place in places.grid(shapely.union_all(parts), cells=8)
    ]  # at once: nothing between is looked at
    assert sorted(found) == sorted(place.id for part in parts for place in places.grid(part, cells=8))


def test_same_ground_is_the_same_square_whatever_area_is_asked_for():
    large = {place.id for place in places.grid(shapely.box(11.0, 48.0, 11.1, 48.1), cells=64)}
    small = {place.id for place in places.grid(shapely.box(11.02, 48.03, 11.05, 48.06), cells=64)}
    assert small
    assert small < large


def test_held_out_places_touch_none_to_train_on_and_stay_when_more_come():
    found = list(places.grid(shapely.box(11.0, 48.0, 11.6, 48.3), cells=64))
    how = dict(share=0.3, block_km=5.0, seed=1)
    split = places.with_splits(found, **how)
    train = [place for place in split if place.split == places.TRAIN]
    held = [place for place in split if place.split == places.VALIDATION]
    assert 0.1 < len(held) / len(found) < 0.4
    assert len(split) < len(found)  # the rims of held-out blocks
    corners = {(place.west, place.north) for place in train}
    for place in held:
        for i, j in itertools.product((-640, 0, 640), repeat=2):
            assert (place.west + i, place.north + j) not in corners
    of_half = {place.id: place.split for place in places.with_splits(found[: len(found) // 2], **how)}
    of_all = {place.id: place.split for place in split}
    assert all(of_all.get(name, places.VALIDATION) == kind for name, kind in of_half.items())
    assert {place.split for place in places.with_splits(found, share=0.0, block_km=5.0, seed=1)} == {places.TRAIN}


def test_places_know_the_acquisitions_that_may_show_them():
    found = list(places.grid(shapely.box(11.0, 48.0, 11.1, 48.1), cells=64))
    bounds = ((11.0, 48.0, 11.05, 48.1), (11.04, 48.0, 11.06, 48.1), (20.0, 48.0, 21.0, 48.1))
    looks = [Acquisition(str(i), "x", "s2", b, {}) for i, b in enumerate(bounds)]
    seen = places.seen_by(found, looks)
    assert {place.acquisitions for place in seen} == {(0,), (0, 1), (1,)}
    assert len(seen) < len(found)
    for place in seen:
        assert (0 in place.acquisitions) == shapely.box(*bounds[0]).intersects(_in_degrees(place))


def test_acquisition_with_a_footprint_shows_no_more_than_that():
    found = list(places.grid(shapely.box(11.0, 48.0, 11.3, 48.1), cells=64))
    bounds, outline = (11.0, 48.0, 11.3, 48.1), shapely.Polygon([(11.0, 48.0), (11.1, 48.0), (11.2, 48.1), (11, 48.1)])
    known = ground.footprint(outline, bounds)
    looks = [Acquisition(str(i), "x", "s2", bounds, {}, footprint=f) for i, f in enumerate((None, known))]
    seen = places.seen_by(found, looks)
    assert len(seen) == len(found)
    showing = {place.id for place in seen if place.acquisitions == (0, 1)}
    assert {place.id for place in seen if outline.intersects(_in_degrees(place))} <= showing
    far = [place for place in seen if _in_degrees(place).distance(outline) > 0.05]
    assert len(far) > 100
    assert not showing & {place.id for place in far}


@pytest.mark.parametrize(
    "outline",
    [
        shapely.Polygon([(48.0, 11.0), (48.0, 11.3), (48.1, 11.0)]),  # latitude first
        shapely.box(-179.0, 48.0, 179.0, 48.1),  # across 180 degrees as one ring
        shapely.LineString([(11.0, 48.0), (11.3, 48.1)]),
        shapely.Polygon(),
    ],
)
def test_outline_that_is_none_of_the_bounds_is_no_footprint(outline):
    assert ground.footprint(outline, (11.0, 48.0, 11.3, 48.1)) is None


def test_class_of_a_place_west_of_greenwich_is_that_of_a_raster_that_goes_on_to_360(tmp_path):
    path, size = tmp_path / "cover.tif", 0.5
    west_to_east, to_360 = np.meshgrid(np.arange(720), np.arange(360))[0], tmp_path / "to_360.tif"
    classes = (1 + west_to_east // 10).astype(np.uint8)  # of 5 degrees, from 180 west
    how = dict(driver="GTiff", height=360, width=720, count=1, dtype="uint8", crs="EPSG:4326")
    for name, west, pixels in ((path, -180, classes), (to_360, 0, np.roll(classes, 360, axis=1))):
        with rasterio.open(name, "w", transform=rasterio.transform.from_origin(west, 90, size, size), **how) as file:
            file.write(pixels, 1)
    squares = [
        place
        for longitude in (-179.5, -61.0, -0.5, 0.5, 11.0, 179.5)
        for place in itertools.islice(places.grid(shapely.box(longitude, 48.0, longitude + 0.02, 48.02), cells=64), 1)
    ]
    found = plan._classes(squares, to_360)
    assert list(found.values()) == [1, 24, 36, 37, 39, 72]
    assert plan._classes(squares, path) == found
    with rasterio.open(path, "w", **{**how, "crs": None}) as file:
        file.write(classes, 1)
    with pytest.raises(ValueError, match=r"--land_cover: .*cover\.tif has no coordinate system"):
        plan._classes(squares, path)


def test_bounds_across_180_degrees_are_two_boxes():
    assert [box.bounds for box in places.boxes_of((179.0, -1.0, -179.0, 1.0))] == [
        (179, -1, 180, 1),
        (-180, -1, -179, 1),
    ]


def test_classes_are_balanced_by_a_draw_that_does_not_depend_on_order():
    found = list(places.grid(shapely.box(11.0, 48.0, 11.2, 48.1), cells=64))
    classes = {place.id: index % 10 == 0 for index, place in enumerate(found)}
    kept = places.balanced(found, classes, most=8, seed=3)
    assert sum(classes[place.id] for place in kept) == 8
    assert len(kept) == 16
    again = places.balanced(found[::-1], classes, most=8, seed=3)
    assert {place.id for place in again} == {place.id for place in kept}
    assert {place.id for place in places.balanced(found, classes, most=8, seed=4)} != {place.id for place in kept}
