"""Places lie on a fixed grid, never overlap, and what is held out touches nothing that is trained on."""

import itertools

import numpy as np
import pytest
import rasterio.warp
import shapely

from skysense_jax.ingest import places
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
