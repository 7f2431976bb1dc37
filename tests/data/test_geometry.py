"""Geometry: boxes stay where they may, arrays and affines agree, the filters equal loops and Pillow."""

import numpy as np
import pytest
from PIL import Image

from skysense_jax.data import geometry
from skysense_jax.data.geometry import Box, Orientation

ORIENTATIONS = [Orientation(mirrored, turns) for mirrored in (False, True) for turns in range(4)]


def pixel_offsets(size, view_cells):
    """[size, size, 2] offsets from the centre of a view, in its axes, of its pixel centres; in cells."""
    along = (np.arange(size) + 0.5) * (view_cells / size) - view_cells / 2
    return np.stack(np.meshgrid(along, along, indexing="ij"), -1)


@pytest.mark.parametrize("orientation", ORIENTATIONS, ids=str)
def test_affine_of_a_turned_view_gives_the_ground_of_its_pixels(orientation):
    box, side, view_cells = Box(3, 11, 7), 7 * 4, 5
    rows, columns = np.meshgrid(*(start + (np.arange(side) + 0.5) / 4 for start in (3, 11)), indexing="ij")
    seen = geometry.turn(np.stack([rows, columns], -1), orientation, axes=(0, 1))
    affine = geometry.view_affine(box, orientation, view_cells=view_cells)
    predicted = pixel_offsets(side, view_cells) @ affine[:, :2].T + affine[:, 2]
    np.testing.assert_allclose(predicted, seen, atol=1e-5)


def test_turn_all_orientations_are_the_eight_symmetries():
    square = np.arange(9).reshape(3, 3)
    results = {geometry.turn(square, o, axes=(0, 1)).tobytes() for o in ORIENTATIONS}
    assert len(results) == 8
    determinants = [round(float(np.linalg.det(o.matrix))) for o in ORIENTATIONS]
    assert determinants == [1] * 4 + [-1] * 4


@pytest.mark.parametrize("bands", [1, 3, 4])
@pytest.mark.parametrize("orientation", ORIENTATIONS, ids=str)
def test_resize_uint8_turns_like_turn(orientation, bands):
    pixels = np.random.default_rng(0).integers(0, 256, (11, 11, bands), dtype=np.uint8)
    got = geometry.resize_uint8(pixels, out_size=11, orientation=orientation)
    np.testing.assert_array_equal(got, geometry.turn(pixels, orientation, axes=(0, 1)))


@pytest.mark.parametrize("extent_cells", [6, 24, 25, 64])
def test_boxes_lie_in_the_anchor_and_the_anchor_on_the_tile_grid(extent_cells):
    rng = np.random.default_rng(extent_cells)
    corners, sides = set(), set()
    for _ in range(300):
        anchor = geometry.draw_anchor(rng, extent_cells=extent_cells, anchor_cells=24, tile_cells=8)
        assert anchor.side == min(24, extent_cells)
        assert anchor.row % 8 == anchor.column % 8 == 0
        assert max(anchor.row, anchor.column) + anchor.side <= extent_cells
        corners.add((anchor.row, anchor.column))
        for box_cells in ((16, 24), (6, 15)):
            box = geometry.draw_box(rng, anchor, box_cells=box_cells)
            assert box_cells[0] <= box.side <= box_cells[1]
            sides.add(box.side)
            for corner, start in ((box.row, anchor.row), (box.column, anchor.column)):
                if box.side <= anchor.side:
                    assert start <= corner
                    assert corner + box.side <= start + anchor.side
                else:  # covers it
                    assert corner <= start
                    assert corner + box.side >= start + anchor.side
    assert sides == set(range(6, 25))
    steps = {6: 1, 24: 1, 25: 1, 64: 6}[extent_cells]
    assert len(corners) == steps**2


def test_box_larger_than_the_extent_lies_at_every_offset():
    rng = np.random.default_rng(0)
    boxes = [geometry.draw_box(rng, Box(0, 0, 6), box_cells=(8, 8)) for _ in range(200)]
    assert {box.row for box in boxes} == {box.column for box in boxes} == {-2, -1, 0}


def test_overlap_is_what_two_boxes_share():
    outer, inner = Box(4, 8, 6), Box(2, 11, 5)
    assert outer.overlap(inner) == (slice(0, 3), slice(3, 6))
    assert inner.overlap(outer) == (slice(2, 5), slice(0, 3))


def loop_weight(position, size, out_size, index):
    """The triangle filter's weight of input ``index`` for output ``position``, not normalised."""
    scale = size / out_size
    centre = (position + 0.5) * scale
    return max(0.0, 1.0 - abs(index + 0.5 - centre) / max(scale, 1.0))


def loop_resize(pixels, mask, box_size, out_size, offset):
    """The definition: weighted mean over the pixels with data; share of the weight of all pixels that has data."""
    out = np.zeros((out_size, out_size, pixels.shape[-1]))
    share = np.zeros((out_size, out_size))
    for i in range(out_size):
        for j in range(out_size):
            total = data = 0.0
            for r in range(box_size):
                for c in range(box_size):
                    weight = loop_weight(i, box_size, out_size, r) * loop_weight(j, box_size, out_size, c)
                    total += weight
                    inside = 0 <= r - offset[0] < mask.shape[0] and 0 <= c - offset[1] < mask.shape[1]
                    if inside and mask[r - offset[0], c - offset[1]]:
                        out[i, j] += weight * pixels[r - offset[0], c - offset[1]]
                        data += weight
            out[i, j] /= max(data, 1e-9)
            share[i, j] = data / total
    return out, share


@pytest.mark.parametrize(("box_size", "out_size"), [(11, 7), (5, 8), (6, 6), (9, 4)])
def test_resize_masked_equals_the_loop(box_size, out_size):
    rng = np.random.default_rng(box_size)
    offset, shape = (1, 0), (box_size - 2, box_size)  # a row above and one below lie outside the sample
    pixels = rng.normal(size=(2, *shape, 3))
    mask = rng.random((2, *shape)) < 0.7
    got, valid = geometry.resize_masked(pixels, mask, box_size=box_size, out_size=out_size, offset=offset)
    only_mask = geometry.resize_mask(mask, box_size=box_size, out_size=out_size, offset=offset)
    for date in range(2):
        wanted, share = loop_resize(pixels[date], mask[date], box_size, out_size, offset)
        clear_cut = np.abs(share - 0.5) > 1e-3
        np.testing.assert_array_equal(valid[date][clear_cut], (share >= 0.5)[clear_cut])
        np.testing.assert_array_equal(only_mask[date], valid[date])
        np.testing.assert_allclose(got[date][valid[date]], wanted[valid[date]], atol=1e-5)
    assert valid.any()
    assert not valid.all()


def test_resize_masked_exactly_half_counts_as_data():
    mask = np.array([[[True, False], [True, False]]])
    _, valid = geometry.resize_masked(np.ones((1, 2, 2, 1)), mask, box_size=2, out_size=1)
    assert valid.all()


def test_resize_masked_nodata_never_bleeds():
    pixels = np.full((1, 12, 12, 2), 7.0)
    mask = np.random.default_rng(0).random((1, 12, 12)) < 0.6
    pixels[~mask] = [np.nan, 1e9]
    got, valid = geometry.resize_masked(pixels, mask, box_size=12, out_size=8)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got[valid], 7.0, rtol=1e-5)


@pytest.mark.parametrize(("size", "out_size"), [(24, 16), (48, 32), (15, 8), (12, 17), (20, 20)])
@pytest.mark.parametrize("bands", [1, 3, 4])
def test_resize_equals_pillow_to_rounding(size, out_size, bands):
    pixels = np.random.default_rng(size).integers(0, 256, (size, size, bands), dtype=np.uint8)
    mask = np.ones((1, size, size), bool)
    matrix, valid = geometry.resize_masked(pixels[None], mask, box_size=size, out_size=out_size)
    assert valid.all()
    fast = geometry.resize_uint8(pixels, out_size=out_size, orientation=Orientation(False, 0))
    assert np.abs(matrix[0] - fast.astype(float)).max() <= 1.01  # Pillow rounds after each of two passes
    for band in range(bands):  # Pillow's float path does not round
        image = Image.fromarray(pixels[..., band].astype(np.float32))
        exact = np.asarray(image.resize((out_size, out_size), Image.Resampling.BILINEAR))
        np.testing.assert_allclose(matrix[0, ..., band], exact, atol=1e-3)


@pytest.mark.parametrize(("cells", "out_size", "offset"), [(6, 4, 0), (3, 5, 0), (6, 4, 2)])
def test_class_shares_equal_counting_fine_subpixels(cells, out_size, offset):
    rng = np.random.default_rng(cells)
    size = cells * 4
    labels = rng.integers(0, 4, (size - offset, size - offset)).astype(np.uint8)
    shares = geometry.class_shares(labels, num_classes=3, box_size=size, out_size=out_size, offset=(offset, offset))
    padded = np.zeros((size, size), np.uint8)
    padded[offset:, offset:] = labels
    fine = padded.repeat(out_size, 0).repeat(out_size, 1)  # every output cell is now a whole block of sub-pixels
    for row in range(out_size):
        for column in range(out_size):
            block = fine[row * size : (row + 1) * size, column * size : (column + 1) * size]
            counts = [np.mean(block == c) for c in (1, 2, 3)]
            np.testing.assert_allclose(shares[row, column], counts, atol=1e-6)


def test_share_true_equals_block_means():
    mask = np.random.default_rng(0).random((2, 6, 9)) < 0.4
    got = geometry.share_true(mask, block=3)
    for date in range(2):
        for row in range(2):
            for column in range(3):
                block = mask[date, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
                assert got[date, row, column] == np.float32(block.sum() / 9)
    assert geometry.share_true(np.ones((4, 4), bool), block=2).tolist() == [[1, 1], [1, 1]]
