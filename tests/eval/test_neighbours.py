"""k nearest neighbours against scikit-learn's brute force, on meshes, and on what it cannot take."""

import jax
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from skysense_jax.eval import neighbours
from skysense_jax.sharding import make_mesh


def _blobs(num_rows, *, seed, width=13, num_classes=5):
    """Rows around class means that overlap, none of length one."""
    rng = np.random.default_rng(seed)
    means = np.random.default_rng(0).normal(size=(num_classes, width))
    labels = rng.integers(num_classes, size=num_rows)
    scales = rng.uniform(0.1, 9, size=(num_rows, 1))
    return (scales * (means[labels] + rng.normal(size=(num_rows, width)))).astype(np.float32), labels


def _brute_force(train, labels, test, *, k):
    model = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    )
    return model.fit(train.astype(np.float64), labels).predict(test.astype(np.float64))


@pytest.mark.parametrize("k", [1, 7, 20])
@pytest.mark.parametrize("block", [16, 4096])
def test_prediction_equals_brute_force(k, block):
    train, labels = _blobs(211, seed=1)
    test, wanted = _blobs(57, seed=2)
    found = neighbours.classifier(train, labels, num_classes=5, k=k, block=block)(test)
    np.testing.assert_array_equal(found, _brute_force(train, labels, test, k=k))
    assert 0.5 < (found == wanted).mean() < 1  # neither chance nor too easy to tell two rules apart


def test_many_training_rows_are_compared_with_fewer_at_once(monkeypatch):
    train, labels = _blobs(211, seed=1)
    test, _ = _blobs(57, seed=2)
    sizes, vote = [], neighbours._vote
    monkeypatch.setattr(neighbours, "_MOST_SIMILARITIES", 211 * 10 + 5)
    monkeypatch.setattr(neighbours, "_vote", lambda *args, **how: sizes.append(len(args[2])) or vote(*args, **how))
    classes_of = neighbours.classifier(train, labels, num_classes=5)
    np.testing.assert_array_equal(classes_of(test), _brute_force(train, labels, test, k=20))
    assert sizes == [10] * 6
    np.testing.assert_array_equal(classes_of(test[:3]), _brute_force(train, labels, test[:3], k=20))


def test_mesh_does_not_change_a_prediction():
    train, labels = _blobs(211, seed=1)
    test, _ = _blobs(57, seed=2)
    alone = neighbours.classifier(train, labels, num_classes=5)(test)
    with jax.set_mesh(make_mesh(2, 2, 1, 2)):
        np.testing.assert_array_equal(neighbours.classifier(train, labels, num_classes=5, block=10)(test), alone)


def test_fewer_rows_than_neighbours_all_vote_and_weights_decide():
    train = np.array([[1, 0], [0.1, 1], [0.1, 1]], np.float32)
    found = neighbours.classifier(train, np.array([2, 0, 0]), num_classes=3)(np.array([[5, 0.5]], np.float32))
    assert found.tolist() == [2]  # one near vote against two far ones


def test_no_row_asked_is_no_answer():
    train, labels = _blobs(9, seed=1)
    assert neighbours.classifier(train, labels, num_classes=5)(train[:0]).shape == (0,)


def test_no_neighbour_and_labels_out_of_range_are_refused():
    train, labels = _blobs(9, seed=1)
    with pytest.raises(ValueError, match="no training row"):
        neighbours.classifier(train[:0], labels[:0], num_classes=5)(train)
    with pytest.raises(ValueError, match=r"got labels .* wanted 0 to 2"):
        neighbours.classifier(train, np.full(9, 3), num_classes=3)(train)
