"""Ground positions and sampling weights, over all crops and orientations of the input pipeline's own geometry."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from scipy.interpolate import RegularGridInterpolator

from skysense_jax.data.geometry import Box, Orientation, turn, view_affine
from skysense_jax.losses import matching

ORIENTATIONS = [Orientation(mirrored, turns) for mirrored in (False, True) for turns in range(4)]
BOXES = [Box(3, 5, 9), Box(0, 8, 16), Box(6, 2, 11), Box(7, 7, 8)]
sampling_matrix, ground_positions = (
    jax.jit(function, static_argnames=("rows", "columns"))
    for function in (matching.sampling_matrix, matching.ground_positions)
)


def affines(boxes, view_cells):
    return np.stack([view_affine(b, o, view_cells=view_cells) for b, o in itertools.product(boxes, ORIENTATIONS)])


def test_ground_positions_equal_a_turned_map_of_coordinates():
    ground = np.stack(np.meshgrid(np.arange(24) + 0.5, np.arange(24) + 0.5, indexing="ij"), -1)
    box = Box(4, 9, 6)
    cut = ground[4:10, 9:15]
    for orientation in ORIENTATIONS:
        affine = view_affine(box, orientation, view_cells=6)
        got = ground_positions(affine, rows=6, columns=6)
        np.testing.assert_allclose(got, turn(cut, orientation, axes=(0, 1)).reshape(-1, 2), atol=1e-5)


def test_pixel_matching_of_coordinates_returns_the_same_coordinates():
    num_inside = 0
    for student_cells in (8, 4):
        student, teacher = affines(BOXES, student_cells), affines(BOXES, 8)
        positions = ground_positions(student, rows=student_cells, columns=student_cells)
        features = np.asarray(ground_positions(teacher, rows=8, columns=8))
        every_pair = (len(student), len(teacher))
        weights_inside = sampling_matrix(
            jnp.broadcast_to(positions[:, None], (*every_pair, *positions.shape[1:])),
            jnp.broadcast_to(teacher[None], (*every_pair, 2, 3)),
            rows=8,
            columns=8,
        )
        read = np.einsum("vusn,und->vusd", np.asarray(weights_inside.weights), features)
        inside = np.asarray(weights_inside.inside)
        error = np.abs(read - np.asarray(positions)[:, None])[inside]
        assert error.max() < 1e-4
        num_inside += inside.sum()
        # the hull of a teacher's token centres is an upright square: half a token short of its box
        low, high = features.min(1), features.max(1)
        wanted = ((positions[:, None] >= low[:, None] - 1e-3) & (positions[:, None] <= high[:, None] + 1e-3)).all(-1)
        np.testing.assert_array_equal(inside, wanted)
    assert num_inside > 10_000


def test_sampling_matrix_equals_scipy_on_a_rectangular_grid():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(3, 5))
    affine = np.array([[1, 0, 1.5], [0, 1, 2.5]], np.float32)  # the view's corner is the sample's
    positions = rng.uniform(0, 5, (40, 2)).astype(np.float32)
    got = sampling_matrix(positions, affine, rows=3, columns=5)
    read = RegularGridInterpolator((np.arange(3) + 0.5, np.arange(5) + 0.5), features, bounds_error=False)(positions)
    inside = np.asarray(got.inside)
    np.testing.assert_array_equal(inside, np.isfinite(read))
    np.testing.assert_allclose((np.asarray(got.weights) @ features.reshape(-1))[inside], read[inside], atol=1e-5)
    np.testing.assert_allclose(np.asarray(got.weights).sum(-1), 1, atol=1e-6)


def test_view_pairs_same_views_are_not_compared_with_themselves():
    np.testing.assert_array_equal(matching.view_pairs(2, 2, same=True), [[False, True], [True, False]])
    assert matching.view_pairs(3, 2, same=False).all()


def test_draw_positions_are_different_tokens_per_view_and_all_where_there_are_few():
    drawn = np.asarray(matching.draw_positions(jax.random.key(0), num_views=3, num_tokens=20, num_positions=7))
    assert drawn.shape == (3, 7)
    assert all(len(set(row)) == 7 for row in drawn)
    assert (drawn[0] != drawn[1]).any()
    assert drawn.max() < 20
    every = matching.draw_positions(jax.random.key(0), num_views=2, num_tokens=5, num_positions=7)
    np.testing.assert_array_equal(every, [range(5)] * 2)


def test_match_views_geometry_has_no_gradient():
    def total(affine):
        match = matching.match_views(
            affine, affine, student_grid=(2, 2), teacher_grid=(2, 2), same=True, key=jax.random.key(0), num_positions=3
        )
        return match.weights.sum()

    affine = affines(BOXES[:1], 2)[None, :2]
    np.testing.assert_array_equal(jax.jit(jax.grad(total))(affine), 0)
