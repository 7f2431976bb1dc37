"""L_QSACL against its published sum, written as loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import Standardise, cross_entropy, sinkhorn
from sklearn import metrics as sklearn_metrics

from skysense_jax.losses import contrastive, qsacl

RNG = np.random.default_rng(0)
B, G, L, R, D, Z = 3, 2, 4, 5, 8, 6
TEACHER_GLOBAL, STUDENT_GLOBAL = RNG.normal(size=(2, B, G, R, D)).astype(np.float32)
TEACHER_LOCAL, STUDENT_LOCAL = RNG.normal(size=(2, B, L, R, D)).astype(np.float32)
TEACHER_HEAD, STUDENT_HEAD = RNG.normal(size=(2, D, Z)).astype(np.float32) / 8
PROTOTYPES = jnp.eye(Z)  # rows are then the logits
GLOBAL_VALID = np.array([[1, 1], [0, 1], [1, 1]], bool)
LOCAL_VALID = np.array([[1, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]], bool)


@jax.jit
def loss(student_global, student_local, teacher_global, teacher_local, global_valid, local_valid):
    targets = qsacl.query_targets(
        teacher_global,
        teacher_local,
        global_valid,
        local_valid,
        project=lambda x: (x @ TEACHER_HEAD, PROTOTYPES),
        temperature=0.07,
        iterations=3,
    )
    return qsacl.query_term(
        student_global,
        student_local,
        targets,
        project=lambda x: (x @ STUDENT_HEAD, PROTOTYPES),
        temperature=0.1,
    )


def loop(student_global, student_local, teacher_global, teacher_local, global_valid, local_valid):
    rows = [(b, "g", v, i) for b in range(B) for v in range(G) for i in range(R) if global_valid[b, v]]
    rows += [(b, "l", v, i) for b in range(B) for v in range(L) for i in range(R) if local_valid[b, v]]
    theirs = np.array([{"g": teacher_global, "l": teacher_local}[s][b, v, i] for b, s, v, i in rows]).reshape(-1, D)
    standardise = Standardise(theirs)
    student_global, student_local = (standardise(x) @ STUDENT_HEAD for x in (student_global, student_local))
    logits = standardise(theirs) @ TEACHER_HEAD
    probs = dict(zip(rows, sinkhorn(logits, np.ones(len(rows), bool), 0.07, 3), strict=True))
    total, count = 0.0, 0
    for b in range(B):
        for g in range(G):
            for l in range(L):  # noqa: E741
                for i in range(R):
                    if global_valid[b, g] and local_valid[b, l]:
                        total += cross_entropy(student_global[b, g, i], probs[b, "l", l, i], 0.1) / 2
                        total += cross_entropy(student_local[b, l, i], probs[b, "g", g, i], 0.1) / 2
                        count += 1
    return total, count


ARRAYS = (STUDENT_GLOBAL, STUDENT_LOCAL, TEACHER_GLOBAL, TEACHER_LOCAL, GLOBAL_VALID, LOCAL_VALID)


def test_query_term_equals_the_loop_in_value_and_gradient():
    term = loss(*ARRAYS)
    total, count = loop(*ARRAYS)
    np.testing.assert_allclose(term.sum, total, rtol=1e-5)
    assert term.count == count == (2 * 3 + 1 * 4) * R
    grads = jax.grad(lambda *a: loss(*a, *ARRAYS[2:]).sum, argnums=(0, 1))(*ARRAYS[:2])
    directions = [RNG.normal(size=x.shape) for x in ARRAYS[:2]]
    moved = [loop(*(x + h * d for x, d in zip(ARRAYS, directions)), *ARRAYS[2:])[0] for h in (1e-5, -1e-5)]
    slope = sum((np.asarray(g) * d).sum() for g, d in zip(grads, directions, strict=True))
    np.testing.assert_allclose(slope, (moved[0] - moved[1]) / 2e-5, rtol=1e-4)


def test_query_term_permuted_queries_of_both_sides_change_nothing_of_one_side_do():
    order = RNG.permutation(R)
    both = [x[:, :, order] for x in ARRAYS[:4]]
    np.testing.assert_allclose(loss(*both, *ARRAYS[4:]).sum, loss(*ARRAYS).sum, rtol=1e-5)
    one = loss(*both[:2], *ARRAYS[2:]).sum
    assert abs(one - loss(*ARRAYS).sum) > 1.0


def test_query_term_without_usable_views_is_zero_with_zero_gradient():
    nothing = (ARRAYS[4] & False, ARRAYS[5])
    value, grad = jax.value_and_grad(lambda x: loss(x, *ARRAYS[1:4], *nothing).mean())(STUDENT_GLOBAL)
    assert value == 0
    np.testing.assert_array_equal(grad, 0)


def _says(probs, valid, parts):
    """Of rows whose distributions are ``probs``."""
    temperature, num_prototypes = 1e-3, probs.shape[-1]  # rows are logs of distributions, so this is undone in them
    statistics = contrastive.RowStatistics(np.zeros(num_prototypes), np.ones(num_prototypes))
    prototypes = np.eye(num_prototypes, dtype=np.float32)
    balance = contrastive.Balance(prototypes, np.zeros(num_prototypes), np.float32(temperature), statistics)
    rows = (temperature * np.log(probs + 1e-30)).astype(np.float32)
    return jax.jit(qsacl.query_says, static_argnames="parts")(rows, valid, balance, parts=parts)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(
    ("probs", "share"),
    [(np.eye(4), 1.0), (np.eye(4)[[2] * 4], 0.25), (np.full((4, 4), 0.25), 0.25), (np.eye(4)[[0, 0, 1, 1]], 0.5)],
)
def test_usage_counts_the_queries_that_can_be_told_apart_and_a_constant_per_query_has_no_content(probs, share, parts):
    valid = np.ones((3, 2, 4), bool)
    valid[1] = False
    says = _says(np.broadcast_to(probs, (3, 2, 4, 4)), valid, parts)
    np.testing.assert_allclose(says.usage, share, rtol=1e-5)
    np.testing.assert_allclose(says.content, 0, atol=1e-5)
    nothing = _says(np.broadcast_to(probs, (3, 2, 4, 4)), valid & False, parts)
    assert (nothing.usage, nothing.content) == (0, 0)


@pytest.mark.parametrize("parts", [1, 5])
def test_usage_and_content_are_the_mutual_informations_of_scikit_learn(parts):
    rng = np.random.default_rng(3)
    prototype, query = rng.integers(0, 7, (5, 4, 3)), np.broadcast_to(np.arange(3), (5, 4, 3))
    prototype[..., 0] //= 4  # a query that says less
    valid = np.broadcast_to(rng.random((5, 4, 1)) < 0.7, prototype.shape)
    says = _says(np.eye(7)[prototype], valid, parts)
    seen = prototype[valid], query[valid]
    of_query = sklearn_metrics.mutual_info_score(*seen)
    np.testing.assert_allclose(says.usage, np.exp(of_query) / 3, rtol=1e-5)
    np.testing.assert_allclose(says.content, sklearn_metrics.mutual_info_score(seen[0], seen[0]) - of_query, rtol=1e-4)
