"""Distillation against plain loops: positions by inverse matrices, bilinear reading by hand, distances row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import Standardise

from skysense_jax.losses import distil, matching
from skysense_jax.losses.contrastive import Term
from skysense_jax.losses.mgcl import Tokens

B, V, U, T, WIDTH, FROZEN_WIDTH = 2, 3, 2, 2, 3, 5
FAR, NEAR = (2, 3), (5, 4)  # cells of local and of global views
WEIGHTS = {"stage3": 0.5, "stage4": 2.0, "fused": 1.0}


def _affine(rng, num_views, spread):
    """Turned, flipped, stretched views somewhere in the sample."""
    turns = np.array([[[1, 0], [0, 1]], [[0, 1], [-1, 0]], [[1, 0], [0, -1]]], float)
    turn = turns[rng.integers(3, size=(B, num_views))] * rng.uniform(0.8, 1.2, (B, num_views, 1, 1))
    place = rng.uniform(-spread, spread, (B, num_views, 2, 1)) + 10
    return np.concatenate((turn, place), axis=-1).astype(np.float32)


def _tokens(rng, num_views, dates, cells, width, per_cell=1):
    shape = (B, num_views, dates, cells[0] * cells[1] * per_cell**2)
    return Tokens(
        jnp.asarray(rng.normal(size=(*shape, width)) * 3 + 1, jnp.float32), jnp.asarray(rng.uniform(size=shape) < 0.8)
    )


LEVELS = {"stage3": ({"hr": 2, "s1": 1}, T), "stage4": ({"hr": 1}, T), "fused": ({"fused": 1}, 1)}


@pytest.fixture
def case():
    """Sets of both networks by level, affines, and the projections as matrices."""
    rng = np.random.default_rng(3)
    made = {}
    for side, num_views, cells, width in (
        ("near", U, NEAR, WIDTH),
        ("far", V, FAR, WIDTH),
        ("frozen", U, NEAR, FROZEN_WIDTH),
    ):
        made[side] = {
            level: {m: _tokens(rng, num_views, dates, cells, width, k) for m, k in sets.items()}
            for level, (sets, dates) in LEVELS.items()
        }
    affine = {"near": _affine(rng, U, 1.0), "far": _affine(rng, V, 2.0)}
    kernels = {level: rng.normal(size=(WIDTH, FROZEN_WIDTH)).astype(np.float32) for level in LEVELS}
    return made, affine, kernels


def _targets(made, affine):
    sampling = {}
    for level, (sets, _) in LEVELS.items():
        sampling[level] = {}
        for name, k in sets.items():
            grids = {"student_grid": tuple(k * n for n in FAR), "teacher_grid": tuple(k * n for n in NEAR)}
            given = (jnp.asarray(affine["far"]), jnp.asarray(affine["near"]))
            sampling[level][name] = matching.sample_views(*given, **grids, tokens_per_cell=k)
    return distil.Targets(distil.standardised(made["frozen"]), sampling)


def _terms(made, affine, kernels, distance):
    project = lambda level, x: x @ kernels[level]  # noqa: E731
    views = [made["near"], made["far"]]
    return distil.student_terms(views, _targets(made, affine), project=project, distance=distance)


def _apart(row, target, distance):
    row, target = row.astype(float), target.astype(float)
    if distance == "cosine":
        return 1 - row @ target / np.sqrt((row @ row) * (target @ target))
    total = 0.0
    for x in np.abs(row - target):
        total += 0.5 * x * x if x < 1 else x - 0.5
    return total / len(row)


def _read(values, usable, affine, ground, cells, k):
    """Bilinear reading of a view's tokens at a place of the ground; None outside, or where an unusable one is read."""
    offset = np.linalg.inv(affine[:, :2].astype(float)) @ (ground - affine[:, 2])
    index = [offset[axis] * k + (cells[axis] * k - 1) / 2 for axis in (0, 1)]
    if any(not 0 <= index[axis] <= cells[axis] * k - 1 for axis in (0, 1)):
        return None
    total, low = np.zeros(values.shape[-1]), [int(np.floor(i)) for i in index]
    for row in (low[0], low[0] + 1):
        for column in (low[1], low[1] + 1):
            weight = (1 - abs(index[0] - row)) * (1 - abs(index[1] - column))
            if weight < 1e-9:
                continue
            n = row * cells[1] * k + column
            if not usable[n]:
                return None
            total += weight * values[n]
    return total


def _by_loops(near, far, frozen, affine, kernel, k, distance):
    """Sum and count of one set."""
    features, usable = np.asarray(frozen.features, float), np.asarray(frozen.usable)
    measured = Standardise(features[usable])
    y = measured(features)
    total, count = 0.0, 0
    for b, u, t, n in np.ndindex(near.usable.shape):
        if near.usable[b, u, t, n] and usable[b, u, t, n]:
            total += _apart(np.asarray(near.features[b, u, t, n]) @ kernel, y[b, u, t, n], distance)
            count += 1
    for b, v, t, n in np.ndindex(far.usable.shape):
        if not far.usable[b, v, t, n]:
            continue
        row, column = divmod(n, FAR[1] * k)
        offset = np.array([(row + 0.5) / k - FAR[0] / 2, (column + 0.5) / k - FAR[1] / 2])
        ground = affine["far"][b, v][:, :2].astype(float) @ offset + affine["far"][b, v][:, 2]
        read = [_read(y[b, u, t], usable[b, u, t], affine["near"][b, u], ground, NEAR, k) for u in range(U)]
        read = [x for x in read if x is not None]
        if read:
            total += _apart(np.asarray(far.features[b, v, t, n]) @ kernel, np.mean(read, axis=0), distance)
            count += 1
    return total, count


@pytest.mark.parametrize("distance", distil.DISTANCES)
def test_terms_of_every_level_equal_loops(case, distance):
    made, affine, kernels = case
    terms, far_counts = _terms(made, affine, kernels, distance), 0
    means = {}
    for level, (sets, _) in LEVELS.items():
        for name, k in sets.items():
            sides = [made[side][level][name] for side in ("near", "far", "frozen")]
            total, count = _by_loops(*sides, affine, kernels[level], k, distance)
            assert int(terms[level][name].count) == count
            far_counts += count - int((sides[0].usable & sides[2].usable).sum())
            np.testing.assert_allclose(terms[level][name].sum, total, rtol=2e-5)
            means.setdefault(level, []).append(total / count)
    assert far_counts > 20  # local views do read
    wanted = sum(WEIGHTS[level] * np.mean(of_level) for level, of_level in means.items()) / sum(WEIGHTS.values())
    np.testing.assert_allclose(distil.combine(terms, weights=WEIGHTS).mean(), wanted, rtol=1e-5)


def test_what_is_not_usable_changes_nothing_and_the_frozen_side_has_no_gradient(case):
    made, affine, kernels = case

    def loss(near, far, frozen):
        terms = _terms({"near": near, "far": far, "frozen": frozen}, affine, kernels, "cosine")
        return distil.combine(terms, weights=WEIGHTS).mean()

    features = {side: jax.tree.map(lambda t: t.features, sets, is_leaf=_is_tokens) for side, sets in made.items()}
    put = lambda side, given: jax.tree.map(  # noqa: E731
        lambda tokens, x: Tokens(x, tokens.usable), made[side], given, is_leaf=_is_tokens
    )
    value = lambda given: loss(*(put(side, given[side]) for side in ("near", "far", "frozen")))  # noqa: E731
    gradient = jax.grad(value)(features)
    assert not any(np.any(x) for x in jax.tree.leaves(gradient["frozen"]))
    for side in ("near", "far"):
        for level, sets in gradient[side].items():
            for name, x in sets.items():
                usable = np.asarray(made[side][level][name].usable)
                assert np.isfinite(x).all()
                assert np.any(x[usable])
                assert not np.any(x[~usable])
    wild = {
        side: jax.tree.map(
            lambda tokens: jnp.where(tokens.usable[..., None], tokens.features, 1e4), sets, is_leaf=_is_tokens
        )
        for side, sets in made.items()
    }
    np.testing.assert_allclose(value(wild), value(features), rtol=1e-5)


def _is_tokens(x):
    return isinstance(x, Tokens)


def test_combine_leaves_out_sets_and_levels_that_hold_no_token():
    term = lambda total, count: Term(jnp.float32(total), jnp.float32(count))  # noqa: E731
    terms = {
        "stage3": {"hr": term(6, 2), "s1": term(0, 0)},
        "stage4": {"hr": term(0, 0)},
        "fused": {"fused": term(5, 1)},
    }
    assert float(distil.combine(terms, weights=WEIGHTS).mean()) == pytest.approx((0.5 * 3 + 5) / 1.5)
    nothing = {"fused": {"fused": term(0, 0)}}
    assert float(distil.combine(nothing, weights=WEIGHTS).mean()) == 0


def test_distances_of_an_unknown_name_are_refused():
    with pytest.raises(ValueError, match=r"config\.objective\.distil\.distance: got 'l3'"):
        distil.distances(jnp.ones((2, 3)), jnp.ones((2, 3)), distance="l3")
