"""Which token of one view lies on which ground of another: bilinear sampling weights, and pairs of views.

Geometry is in cells, (row, column); tokens lie on the final grid, one a cell of their view. Nothing here carries a
gradient or reads a feature: a match is made once a step and shared by all dates, modalities and granularities.
In shapes, Ns are a student view's tokens, Nt a teacher view's, Nd those drawn for pixel comparison.
Next: mgcl.py.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from skysense_jax.losses.parts import Shared

# A position this far (cells) outside the hull of token centres is on its edge: rounding of turned coordinates.
_HULL_TOLERANCE = 1e-4
_HIDDEN_SHARE = 1e-4  # of bilinear weight on unusable teacher tokens that rounding may leave


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to read a teacher view's tokens at given ground positions.

    Attributes:
      weights: bilinear weight of each teacher token; few are not zero, and they sum to 1 inside. Dense, because a small
        matrix product is the fast form on an accelerator.
      inside: whether the position lies in the hull of the teacher's token centres.
    """

    weights: Any  # ... Ns Nt
    inside: Any  # ... Ns, bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Match:
    """How the student views of one shape lie on the teacher's views.

    Attributes:
      weights, inside: ``Sampling`` of teacher view u at the tokens of student view v.
      paired: whether v and u are compared at all: False where they are the same view.
      drawn: the tokens of each student view at which pixels are compared, the same for all samples.
    """

    weights: Any  # B V U Ns Nt
    inside: Any  # B V U Ns, bool
    paired: Shared  # V U, bool
    drawn: Shared  # V Nd, int


def token_offsets(rows: int, columns: int) -> Float[np.ndarray, "N 2"]:
    """Offset of each token's centre from the centre of its view, in cells of the view, row-major."""
    axes = (np.arange(n, dtype=np.float32) + 0.5 - n / 2 for n in (rows, columns))
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)


def ground_positions(affine: Float[Array, "*views 2 3"], *, rows: int, columns: int) -> Float[Array, "*views N 2"]:
    """Where the token centres lie in the sample, in ground cells: ``affine[:, :2] @ offset + affine[:, 2]``."""
    offsets = token_offsets(rows, columns)
    turned = jnp.einsum("...ij,nj->...ni", affine[..., :2], offsets, precision=jax.lax.Precision.HIGHEST)
    return turned + affine[..., None, :, 2]


def sampling_matrix(
    positions: Float[Array, "*views Ns 2"], teacher_affine: Float[Array, "*views 2 3"], *, rows: int, columns: int
) -> Sampling:
    """How to read a teacher view of ``rows`` x ``columns`` tokens at these ground positions."""
    moved = positions - teacher_affine[..., None, :, 2]
    (a, b), (c, d) = (tuple(jnp.moveaxis(teacher_affine[..., row, :2], -1, 0)[..., None]) for row in (0, 1))
    determinant = a * d - b * c  # the inverse written out: solvers are slow and inexact on accelerators
    row_offset = (d * moved[..., 0] - b * moved[..., 1]) / determinant
    column_offset = (a * moved[..., 1] - c * moved[..., 0]) / determinant

    def along(offset, n):  # hat functions of the n token centres
        index = offset + (n - 1) / 2
        inside = (index >= -_HULL_TOLERANCE) & (index <= n - 1 + _HULL_TOLERANCE)
        index = jnp.clip(index, 0, n - 1)
        return jax.nn.relu(1 - jnp.abs(index[..., None] - jnp.arange(n))), inside

    (row_weights, row_inside), (column_weights, column_inside) = along(row_offset, rows), along(column_offset, columns)
    weights = row_weights[..., :, None] * column_weights[..., None, :]
    weights = weights.reshape(*weights.shape[:-2], rows * columns)
    return Sampling(weights, row_inside & column_inside)


def sample_views(
    student_affine: Float[Array, "B V 2 3"],
    teacher_affine: Float[Array, "B U 2 3"],
    *,
    student_grid: tuple[int, int],
    teacher_grid: tuple[int, int],
    tokens_per_cell: int = 1,
) -> Sampling:
    """How to read all teacher views at the tokens of all student views: [B V U Ns Nt]; grids are (rows, columns).

    ``tokens_per_cell``: along a side of a view's cell, on both grids.
    """
    per_token = jnp.asarray([1.0 / tokens_per_cell] * 2 + [1.0])  # of the turn, not of the place
    student_affine, teacher_affine = student_affine * per_token, teacher_affine * per_token
    positions = ground_positions(student_affine, rows=student_grid[0], columns=student_grid[1])
    shape = (len(student_affine), student_affine.shape[1], teacher_affine.shape[1])
    return sampling_matrix(
        jnp.broadcast_to(positions[:, :, None], (*shape, *positions.shape[2:])),
        jnp.broadcast_to(teacher_affine[:, None], (*shape, 2, 3)),
        rows=teacher_grid[0],
        columns=teacher_grid[1],
    )


def comparable(
    sampling: Any, student_usable: Bool[Array, "B V T Ns"], teacher_usable: Bool[Array, "B U T Nt"]
) -> Bool[Array, "B V U T Ns"]:
    """Student tokens that are usable and whose ground the teacher sees, by a ``Sampling`` or a ``Match``."""
    hidden = jnp.einsum(
        "bvusn,butn->bvuts",
        sampling.weights,
        (~teacher_usable).astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return sampling.inside[:, :, :, None] & student_usable[:, :, None] & (hidden < _HIDDEN_SHARE)


def view_pairs(num_student: int, num_teacher: int, *, same: bool) -> Bool[np.ndarray, "V U"]:
    """Which student views are compared with which teacher views.

    ``same``: the student's views are the teacher's own, and a view is not compared with itself.
    """
    return ~np.eye(num_student, num_teacher, dtype=bool) if same else np.ones((num_student, num_teacher), bool)


def draw_positions(key: PRNGKeyArray, *, num_views: int, num_tokens: int, num_positions: int) -> Int[Array, "V Nd"]:
    """For each view ``num_positions`` different token indices; all of them in order where there are not more."""
    if num_positions >= num_tokens:
        return jnp.broadcast_to(jnp.arange(num_tokens), (num_views, num_tokens))
    one = lambda key: jax.random.permutation(key, num_tokens)[:num_positions]  # noqa: E731
    return jax.vmap(one)(jax.random.split(key, num_views))


def match_views(
    student_affine: Float[Array, "B V 2 3"],
    teacher_affine: Float[Array, "B U 2 3"],
    *,
    student_grid: tuple[int, int],
    teacher_grid: tuple[int, int],
    same: bool,
    key: PRNGKeyArray,
    num_positions: int,
) -> Match:
    """How all student views of one shape lie on all teacher views; grids are (rows, columns)."""
    (num_student, num_teacher), num_tokens = (student_affine.shape[1], teacher_affine.shape[1]), np.prod(student_grid)
    sampling = sample_views(student_affine, teacher_affine, student_grid=student_grid, teacher_grid=teacher_grid)
    drawn = draw_positions(key, num_views=num_student, num_tokens=int(num_tokens), num_positions=num_positions)
    paired = jnp.asarray(view_pairs(num_student, num_teacher, same=same))
    match = Match(sampling.weights, sampling.inside & paired[:, :, None], Shared(paired), Shared(drawn))
    return jax.lax.stop_gradient(match)
