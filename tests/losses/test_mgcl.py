"""L_MGCL at each granularity against loops over samples, views, dates and tokens; masks; what cannot be compared."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import Standardise, cross_entropy, sinkhorn, unit

from skysense_jax.data.geometry import Box, Orientation, view_affine
from skysense_jax.losses import matching, mgcl, parts
from skysense_jax.losses.contrastive import Term
from skysense_jax.losses.mgcl import GRANULARITIES, Tokens

B, U, L, T, D, Z, CLUSTERS, POSITIONS = 2, 2, 3, 2, 6, 5, 3, 7
TEACHER_CELLS, LOCAL_CELLS = 5, 3
RNG = np.random.default_rng(0)


def draw_affines(num_views, view_cells, sides):
    views = [
        view_affine(
            Box(*RNG.integers(0, 4, 2).tolist(), int(RNG.integers(*sides))),
            Orientation(bool(RNG.integers(2)), int(RNG.integers(4))),
            view_cells=view_cells,
        )
        for _ in range(B * num_views)
    ]
    return np.stack(views).reshape(B, num_views, 2, 3)


AFFINES = [draw_affines(U, TEACHER_CELLS, (6, 9)), draw_affines(L, LOCAL_CELLS, (3, 5))]
GRIDS = [(TEACHER_CELLS,) * 2, (LOCAL_CELLS,) * 2]
SHAPES = [(B, U, T, TEACHER_CELLS**2), (B, L, T, LOCAL_CELLS**2)]
FEATURES = [RNG.normal(size=(*shape, D)).astype(np.float32) for shape in SHAPES]  # of the student
USABLE = [RNG.random(shape) < 0.9 for shape in SHAPES]  # global views' holds for the teacher too
USABLE[0][1, 0, 1] = False  # an absent date of one view
TEACHER = RNG.normal(size=(*SHAPES[0], D)).astype(np.float32)
HEADS = {name: RNG.normal(size=(2, D, Z)).astype(np.float32) / 2 for name in GRANULARITIES}  # teacher, student


MATCHES = [
    jax.jit(
        functools.partial(
            matching.match_views,
            student_grid=grid,
            teacher_grid=GRIDS[0],
            same=group == 0,
            key=jax.random.key(group),
            num_positions=POSITIONS,
        )
    )(affine, AFFINES[0])
    for group, (affine, grid) in enumerate(zip(AFFINES, GRIDS, strict=True))
]


@jax.jit
def terms(student, usable, teacher):
    project = lambda side: lambda name, x: (jnp.tanh(x @ HEADS[name][side]), jnp.eye(Z))  # noqa: E731
    rows = mgcl.teacher_rows(Tokens(teacher, usable[0]), usable, MATCHES, num_clusters=CLUSTERS, cluster_iterations=2)
    targets = mgcl.balance(rows, project=project(0), temperature=0.07, iterations=3)
    tokens = [Tokens(x, mask) for x, mask in zip(student, usable)]
    return mgcl.student_terms(tokens, MATCHES, targets, project=project(1), temperature=0.1)


def read(b, v, u, group, s):
    """(token of teacher view u, bilinear weight) at student token s of the group's view v; None outside the hull."""
    rows, columns = GRIDS[group]
    offset = np.array([s // columns + 0.5 - rows / 2, s % columns + 0.5 - columns / 2])
    affine, teacher = AFFINES[group][b, v].astype(float), AFFINES[0][b, u].astype(float)
    ground = affine[:, :2] @ offset + affine[:, 2]
    place = np.linalg.inv(teacher[:, :2]) @ (ground - teacher[:, 2]) + (TEACHER_CELLS - 1) / 2
    if place.min() < -1e-4 or place.max() > TEACHER_CELLS - 1 + 1e-4:
        return None
    place = np.clip(place, 0, TEACHER_CELLS - 1)
    corner = np.minimum(np.floor(place), TEACHER_CELLS - 2).astype(int)
    part = place - corner
    four = []
    for i, j in itertools.product((0, 1), repeat=2):
        weight = (part[0] if i else 1 - part[0]) * (part[1] if j else 1 - part[1])
        four.append(((corner[0] + i) * TEACHER_CELLS + corner[1] + j, weight))
    return [(n, weight) for n, weight in four if weight > 1e-4]


def readable(usable, b, v, u, t, group, s):
    four = read(b, v, u, group, s)
    if (group == 0 and v == u) or four is None or not usable[group][b, v, t, s]:
        return None
    return four if all(usable[0][b, u, t, n] for n, _ in four) else None


def cluster_loop(x, usable):
    """The assignment [N Nc] of one image's tokens."""
    assignment = np.zeros((len(x), CLUSTERS))
    if not usable.any():
        return assignment
    x = unit((x - x[usable].mean(0)).astype(float))
    tokens = np.flatnonzero(usable)
    centroids = np.stack([x[tokens[int((c + 0.5) / CLUSTERS * len(tokens))]] for c in range(CLUSTERS)])
    for _ in range(2):
        assignment = sinkhorn(x @ centroids.T, usable, 0.1, 3)
        centroids = unit(assignment.T @ np.where(usable[:, None], x, 0))
    return assignment


def pixel_rows(student, usable, teacher):
    """(student row, teacher row's name, teacher row) of every comparison."""
    for group, b, t in itertools.product((0, 1), range(B), range(T)):
        for v, u in itertools.product(range(SHAPES[group][1]), range(U)):
            for s in np.asarray(MATCHES[group].drawn.value)[v]:
                four = readable(usable, b, v, u, t, group, s)
                if four is not None:
                    seen = sum(weight * teacher[b, u, t, n].astype(float) for n, weight in four)
                    yield student[group][b, v, t, s], (group, b, v, u, t, s), seen


def object_rows(student, usable, teacher):
    for group, b, t in itertools.product((0, 1), range(B), range(T)):
        for v, u in itertools.product(range(SHAPES[group][1]), range(U)):
            clusters = cluster_loop(teacher[b, u, t], usable[0][b, u, t])
            for c in range(CLUSTERS):
                mass, ours, theirs = 0.0, 0.0, 0.0
                for s in range(SHAPES[group][3]):
                    four = readable(usable, b, v, u, t, group, s)
                    if four is not None:
                        a = sum(weight * clusters[n, c] for n, weight in four)
                        mass += a
                        ours += a * student[group][b, v, t, s]
                        theirs += a * sum(weight * teacher[b, u, t, n].astype(float) for n, weight in four)
                if mass >= 1:
                    yield ours / mass, (group, b, v, u, t, c), theirs / mass


def image_rows(student, usable, teacher):
    for group, b, t in itertools.product((0, 1), range(B), range(T)):
        for v, u in itertools.product(range(SHAPES[group][1]), range(U)):
            ours, theirs = usable[group][b, v, t], usable[0][b, u, t]
            if ours.any() and theirs.any() and not (group == 0 and v == u):
                mean = student[group][b, v, t][ours].mean(0)
                yield mean, (b, u, t), teacher[b, u, t].astype(float)[theirs].mean(0)


ROWS = {"pixel": pixel_rows, "object": object_rows, "image": image_rows}


def loop(name, student, usable, teacher):
    rows = list(ROWS[name](student, usable, teacher))
    seen = {key: x for _, key, x in rows}  # a teacher image that several students meet is one row
    if name == "image":  # and counts even if none does
        for b, u, t in itertools.product(range(B), range(U), range(T)):
            if usable[0][b, u, t].any():
                seen.setdefault((b, u, t), teacher[b, u, t].astype(float)[usable[0][b, u, t]].mean(0))
    teacher_head, student_head = HEADS[name]
    theirs = np.stack(list(seen.values()))
    standardise = Standardise(theirs)
    logits = np.tanh(standardise(theirs) @ teacher_head)
    probs = dict(zip(seen, sinkhorn(logits, np.ones(len(seen), bool), 0.07, 3), strict=True))
    of_row = [cross_entropy(np.tanh(standardise(x) @ student_head), probs[key], 0.1) for x, key, _ in rows]
    return sum(of_row), len(rows)


@functools.cache
def grads():
    return jax.jit(
        jax.jacrev(lambda student: {name: term.sum for name, term in terms(student, USABLE, TEACHER).items()})
    )(FEATURES)


@pytest.mark.parametrize("name", GRANULARITIES)
def test_student_terms_equal_the_loop_in_value_and_gradient(name):
    term = terms(FEATURES, USABLE, TEACHER)[name]
    total, count = loop(name, FEATURES, USABLE, TEACHER)
    assert term.count == count > 10
    np.testing.assert_allclose(term.sum, total, rtol=2e-5)
    directions = [RNG.normal(size=x.shape) for x in FEATURES]
    moved = [loop(name, [x + h * d for x, d in zip(FEATURES, directions)], USABLE, TEACHER)[0] for h in (1e-5, -1e-5)]
    slope = sum((np.asarray(g) * d).sum() for g, d in zip(grads()[name], directions, strict=True))
    np.testing.assert_allclose(slope, (moved[0] - moved[1]) / 2e-5, rtol=1e-3)


def test_student_terms_what_lies_in_unusable_tokens_changes_nothing():
    hide = lambda x, mask: np.where(mask[..., None], x, np.nan).astype(np.float32)  # noqa: E731
    student = [hide(x, mask) for x, mask in zip(FEATURES, USABLE)]
    first, second = terms(FEATURES, USABLE, TEACHER), terms(student, USABLE, hide(TEACHER, USABLE[0]))
    assert jax.tree.all(jax.tree.map(np.array_equal, first, second))
    for name in GRANULARITIES:
        for grad, mask in zip(grads()[name], USABLE, strict=True):
            np.testing.assert_array_equal(np.asarray(grad)[~mask], 0)


def test_student_terms_masked_batch_is_zero_with_zero_gradient():
    nothing = [mask & False for mask in USABLE]

    def loss(student):
        of_set = terms(student, nothing, TEACHER)
        return mgcl.combine({"s2": of_set}, weights=dict.fromkeys(GRANULARITIES, 1.0)).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(FEATURES)
    assert value == 0
    for grad in gradient:
        np.testing.assert_array_equal(grad, 0)


def test_student_terms_give_the_teacher_no_gradient():
    total = lambda teacher: sum(term.sum for term in terms(FEATURES, USABLE, teacher).values())  # noqa: E731
    np.testing.assert_array_equal(jax.jit(jax.grad(total))(TEACHER), 0)


@pytest.mark.parametrize(("microbatches", "logit_parts"), [(2, 1), (1, 2)])
def test_student_terms_of_a_batch_in_parts_are_the_same_with_their_gradients(microbatches, logit_parts):
    @jax.jit
    def in_parts(student):
        project = lambda side: lambda name, x: (jnp.tanh(x @ HEADS[name][side]), jnp.eye(Z))  # noqa: E731
        see = lambda tree: mgcl.teacher_rows(*tree, num_clusters=CLUSTERS, cluster_iterations=2)  # noqa: E731
        batch = jax.tree.map(jnp.asarray, (Tokens(TEACHER, USABLE[0]), USABLE, MATCHES))
        rows = parts.each(see, batch, parts=microbatches)
        targets = mgcl.balance(rows, project=project(0), temperature=0.07, iterations=3, parts=logit_parts)
        return parts.total(
            lambda part: mgcl.student_terms(*part, project=project(1), temperature=0.1, parts=logit_parts),
            ([Tokens(x, jnp.asarray(mask)) for x, mask in zip(student, USABLE)], MATCHES, targets),
            parts=microbatches,
        )

    whole = terms(FEATURES, USABLE, TEACHER)
    for name, term in in_parts(FEATURES).items():
        np.testing.assert_allclose(term.sum, whole[name].sum, rtol=1e-5)
        assert term.count == whole[name].count
    gradients = jax.jit(jax.jacrev(lambda student: {k: term.sum for k, term in in_parts(student).items()}))(FEATURES)
    for name, wanted in grads().items():
        for got, want in zip(gradients[name], wanted, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5 * float(np.abs(want).max()))


def test_cluster_finds_the_groups_of_separate_tokens():
    centres = np.linalg.qr(RNG.normal(size=(D, D)))[0][:CLUSTERS]
    group = np.arange(15) % CLUSTERS
    x = (4 * centres[group] + 0.1 * RNG.normal(size=(15, D))).astype(np.float32) + 3.0
    usable = np.ones((1, 1, 1, 15), bool)
    usable[..., :3] = False
    got = np.asarray(
        jax.jit(functools.partial(mgcl.cluster, num_clusters=CLUSTERS, iterations=4))(x[None, None, None], usable)
    )[0, 0, 0]
    assert (got[:3] == 0).all()
    np.testing.assert_allclose(got[3:].sum(0), 4, atol=0.2)  # balanced
    assert len({tuple(row) for row in np.eye(CLUSTERS)[got[3:].argmax(1)][group[3:] == 0]}) == 1
    assert got[3:].max(1).min() > 0.9


def test_combine_is_the_mean_over_the_sets_that_say_something():
    term = lambda total, count: Term(jnp.float32(total), jnp.float32(count))  # noqa: E731
    sets = {
        "hr": {"pixel": term(6, 2), "object": term(0, 0), "image": term(5, 1)},  # (2 * 3 + 5) / 3
        "s1": dict.fromkeys(GRANULARITIES, term(0, 0)),
        "fused": {"pixel": term(8, 4), "object": term(9, 1), "image": term(1, 1)},  # (2 * 2 + 3 * 9 + 1) / 6
    }
    got = mgcl.combine(sets, weights={"pixel": 2.0, "object": 3.0, "image": 1.0})
    assert got.count == 2
    np.testing.assert_allclose(got.mean(), (11 / 3 + 32 / 6) / 2, rtol=1e-6)
