"""Sinkhorn-Knopp and cross entropy against loops, and what they do with nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import Standardise, layer_norm
from oracles import cross_entropy as cross_entropy_loop
from oracles import sinkhorn as sinkhorn_loop

from skysense_jax.losses import contrastive
from skysense_jax.losses.contrastive import Term

RNG = np.random.default_rng(0)
LOGITS = RNG.uniform(-1, 1, (11, 5)).astype(np.float32)
VALID = np.array([True, False, True, True, False, True, True, True, False, True, True])
sinkhorn = jax.jit(contrastive.sinkhorn, static_argnames="iterations")
cross_entropy = jax.jit(contrastive.cross_entropy)
row_statistics, standardise = jax.jit(contrastive.row_statistics), jax.jit(contrastive.standardise)
target_entropy = jax.jit(contrastive.target_entropy, static_argnames="parts")


def test_standardise_equals_numpy_and_invalid_rows_change_nothing():
    teacher = np.where(VALID[:, None], 3 + RNG.normal(size=(11, 6)), np.nan).astype(np.float32)
    student = RNG.normal(size=(2, 4, 6)).astype(np.float32)
    statistics = row_statistics(teacher, VALID)
    want = Standardise(teacher[VALID])
    np.testing.assert_allclose(standardise(student, statistics), want(student), atol=1e-5)
    own = np.asarray(standardise(teacher, statistics))[VALID]
    np.testing.assert_allclose(own.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(own.std(0), 1, atol=1e-4)


def test_standardise_by_nothing_is_the_layer_norm_with_finite_gradients_everywhere():
    statistics = row_statistics(np.zeros((11, 6), np.float32), VALID & False)
    rows = np.stack([np.zeros(6), np.arange(6)]).astype(np.float32)
    np.testing.assert_allclose(standardise(rows, statistics), layer_norm(rows), atol=1e-6)
    grad = jax.grad(lambda x: jnp.square(standardise(x, statistics)).sum())(rows)
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_equals_the_loop(iterations):
    got = sinkhorn(LOGITS, VALID, temperature=0.07, iterations=iterations)
    np.testing.assert_allclose(got, sinkhorn_loop(LOGITS, VALID, 0.07, iterations), atol=1e-5)


def test_sinkhorn_invalid_rows_are_zero_and_change_nothing():
    other = LOGITS.copy()
    other[~VALID] = np.nan
    first, second = (sinkhorn(x, VALID, temperature=0.1, iterations=3) for x in (LOGITS, other))
    np.testing.assert_array_equal(first, second)
    assert (np.asarray(first)[~VALID] == 0).all()


def test_sinkhorn_many_iterations_balances_the_prototypes():
    probs = np.asarray(sinkhorn(LOGITS, VALID, temperature=0.2, iterations=100))
    np.testing.assert_allclose(probs[VALID].sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(probs.sum(0), VALID.sum() / 5, atol=1e-3)


def test_sinkhorn_extreme_logits_stay_finite():
    probs = np.asarray(sinkhorn(LOGITS * 1e4, VALID, temperature=0.04, iterations=3))
    assert np.isfinite(probs).all()
    np.testing.assert_allclose(probs[VALID].sum(1), 1, atol=1e-5)


def test_sinkhorn_without_valid_rows_is_zero():
    probs = sinkhorn(LOGITS, np.zeros(11, bool), temperature=0.04, iterations=3)
    np.testing.assert_array_equal(probs, 0)


def test_sinkhorn_has_no_gradient():
    grad = jax.grad(lambda x: sinkhorn(x, VALID, temperature=0.1, iterations=3)[0, 0])(LOGITS)
    np.testing.assert_array_equal(grad, 0)


def test_sinkhorn_sharded_rows_equal_one_device():
    rows = np.tile(LOGITS, (8, 1))
    valid = np.tile(VALID, 8)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    placed = jax.device_put((rows, valid), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    sharded, plain = (sinkhorn(*args, temperature=0.07, iterations=3) for args in (placed, (rows, valid)))
    np.testing.assert_allclose(sharded, plain, atol=1e-6)


def test_cross_entropy_equals_the_loop_in_value_and_gradient():
    student = RNG.normal(size=(3, 4, 5)).astype(np.float32)
    probs = RNG.dirichlet(np.ones(5), (3, 4)).astype(np.float32)
    weight = RNG.integers(0, 3, (3, 4)).astype(np.float32)

    def loop(student):
        return sum(
            weight[i, j] * cross_entropy_loop(student[i, j], probs[i, j], 0.1) for i in range(3) for j in range(4)
        )

    term = cross_entropy(student, probs, weight, temperature=0.1)
    np.testing.assert_allclose(term.sum, loop(student), rtol=1e-5)
    assert term.count == weight.sum()
    grad = jax.grad(lambda x: cross_entropy(x, probs, weight, temperature=0.1).sum)(student)
    direction = RNG.normal(size=student.shape)
    slope = (loop(student + 1e-5 * direction) - loop(student - 1e-5 * direction)) / 2e-5
    np.testing.assert_allclose((np.asarray(grad) * direction).sum(), slope, rtol=1e-4)


def test_cross_entropy_gives_the_teacher_no_gradient():
    probs = np.full((2, 5), 0.2, np.float32)
    grad = jax.grad(lambda p: cross_entropy(LOGITS[:2], p, jnp.ones(2), temperature=0.1).sum)(probs)
    np.testing.assert_array_equal(grad, 0)


def test_term_adds_and_its_mean_of_nothing_is_zero_with_zero_gradient():
    total = Term(jnp.float32(3), jnp.float32(2)) + Term(jnp.float32(1), jnp.float32(6))
    assert (float(total.sum), float(total.count), float(total.mean())) == (4, 8, 0.5)
    value, grad = jax.value_and_grad(lambda x: Term(x * 0.0, jnp.float32(0)).mean())(jnp.float32(7))
    assert (float(value), float(grad)) == (0, 0)


def _balance(prototypes=8):
    """A balance whose rows say the prototype that they are."""
    statistics = contrastive.RowStatistics(np.zeros(prototypes), np.ones(prototypes))
    return contrastive.Balance(np.eye(prototypes, dtype=np.float32), np.zeros(prototypes), np.float32(1e-3), statistics)


def test_target_entropy_tells_the_two_collapses():
    valid = np.array([[True, True], [True, False]])
    of = lambda *which: np.eye(8, dtype=np.float32)[np.array(which).reshape(2, 2)]  # noqa: E731
    uniform = target_entropy(of(0, 1, 2, 3) * 0, valid, _balance())
    np.testing.assert_allclose([uniform.of_rows, uniform.of_mean], np.log(8), rtol=1e-6)
    constant = target_entropy(of(2, 2, 2, 5), valid, _balance())
    np.testing.assert_allclose([constant.of_rows, constant.of_mean], 0, atol=1e-6)
    for parts in (1, 2):
        spread = target_entropy(of(0, 1, 2, 5), valid, _balance(), parts=parts)
        np.testing.assert_allclose([spread.of_rows, spread.of_mean], [0, np.log(3)], atol=1e-6)
    nothing = target_entropy(of(0, 1, 2, 5), valid & False, _balance())
    assert (float(nothing.of_rows), float(nothing.of_mean)) == (0, 0)


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("iterations", [1, 3])
def test_balance_in_parts_equals_sinkhorn_of_all_logits(parts, iterations):
    features = RNG.normal(size=(4, 5, 6)).astype(np.float32)
    valid = RNG.random((4, 5)) < 0.7
    prototypes = np.asarray(contrastive.unit(jnp.asarray(RNG.normal(size=(7, 6)))))
    project = lambda x: (contrastive.unit(x), jnp.asarray(prototypes))  # noqa: E731
    balance = jax.jit(contrastive.balance, static_argnames=("project", "iterations", "parts"))
    rows, found = balance(features, valid, project=project, temperature=0.07, iterations=iterations, parts=parts)
    want = np.asarray(contrastive.unit(jnp.asarray(Standardise(features[valid])(features))))
    rows = np.asarray(rows)
    np.testing.assert_allclose(rows[valid], want[valid], atol=1e-5)
    logits = (rows @ prototypes.T).reshape(20, 7)
    plain = sinkhorn(logits, valid.reshape(20), temperature=0.07, iterations=iterations)
    probs = found.probs(jnp.asarray(rows), jnp.asarray(valid)).reshape(20, 7)
    np.testing.assert_allclose(probs, plain, atol=1e-5)


def test_balance_extreme_temperature_and_no_valid_row_stay_finite():
    project = lambda x: (contrastive.unit(x), jnp.eye(6))  # noqa: E731
    features = jnp.asarray(RNG.normal(size=(2, 3, 6)), jnp.float32)
    for valid in (jnp.ones((2, 3), bool), jnp.zeros((2, 3), bool)):
        rows, found = contrastive.balance(features, valid, project=project, temperature=1e-4, iterations=3)
        assert np.isfinite(found.columns).all()
        probs = np.asarray(found.probs(rows, valid))
        np.testing.assert_allclose(probs.sum(-1), valid, atol=1e-5)


def test_balance_has_no_gradient():
    project, valid = lambda x: (contrastive.unit(x), jnp.eye(6)), jnp.ones((2, 3), bool)

    def total(features):
        rows, found = contrastive.balance(features, valid, project=project, temperature=0.1, iterations=2)
        return rows.sum() + found.columns.sum() + found.probs(rows, valid)[0, 0, 0]

    np.testing.assert_array_equal(jax.grad(total)(jnp.asarray(RNG.normal(size=(2, 3, 6)), jnp.float32)), 0)


def test_cosines_are_not_left_to_the_default_precision_of_an_accelerator():
    text = str(jax.make_jaxpr(contrastive.cosines)(jnp.ones((3, 4)), jnp.ones((5, 4))))
    assert "precision=(Precision.HIGH, Precision.HIGH)" in text
