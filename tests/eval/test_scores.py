"""Scores that add up over images against scikit-learn on the whole."""

import numpy as np
import pytest
from sklearn import metrics

from skysense_jax.eval import scores


def _maps(seed, *, classes, absent=()):
    rng = np.random.default_rng(seed)
    maps = []
    for side in (5, 9, 3, 13):
        targets = rng.integers(0, classes, (side, side + 2))
        targets[np.isin(targets, absent)] = 0
        predictions = np.where(rng.random(targets.shape) < 0.6, targets, rng.integers(0, classes, targets.shape))
        maps.append((np.where(rng.random(targets.shape) < 0.2, 255, targets).astype(np.uint8), predictions))
    return maps


@pytest.mark.parametrize("absent", [(), (2,), (3, 4)])
def test_confusion_over_images_equals_sklearn_on_all_pixels(absent):
    maps = _maps(1, classes=6, absent=absent)
    confusion = scores.Confusion(6)
    for targets, predictions in maps:
        confusion.add(targets, predictions)
    known = [targets != 255 for targets, _ in maps]
    targets, predictions = (np.concatenate([m[i][k] for m, k in zip(maps, known)]) for i in (0, 1))
    np.testing.assert_array_equal(confusion.counts, metrics.confusion_matrix(targets, predictions, labels=range(6)))
    present, found = np.unique(targets), confusion.scores()
    assert set(range(6)) - set(present.tolist()) == set(absent)
    assert found.miou == pytest.approx(
        metrics.jaccard_score(targets, predictions, labels=present, average="macro"), abs=1e-9
    )
    assert found.mf1 == pytest.approx(metrics.f1_score(targets, predictions, labels=present, average="macro"), abs=1e-9)
    assert found.accuracy == pytest.approx(metrics.accuracy_score(targets, predictions), abs=1e-9)
    each = metrics.jaccard_score(targets, predictions, labels=range(6), average=None, zero_division=0)
    np.testing.assert_allclose(found.iou[present], each[present], atol=1e-9)
    assert np.isnan(found.iou[list(absent)]).all()
    some = [c for c in present if c not in (1, 3)]
    left_out = confusion.scores(left_out=(1, 3))
    assert left_out.mf1 == pytest.approx(metrics.f1_score(targets, predictions, labels=some, average="macro"), abs=1e-9)
    assert left_out.accuracy == found.accuracy


def test_change_scores_equal_sklearn_of_the_changed_class():
    maps = _maps(2, classes=2)
    confusion = scores.Confusion(2)
    for targets, predictions in maps:
        confusion.add(targets, predictions)
    targets, predictions = (np.concatenate([m[i][m[0] != 255] for m in maps]) for i in (0, 1))
    found = scores.change_scores(confusion)
    wanted = dict(
        f1=metrics.f1_score(targets, predictions),
        iou=metrics.jaccard_score(targets, predictions),
        precision=metrics.precision_score(targets, predictions),
        recall=metrics.recall_score(targets, predictions),
        accuracy=metrics.accuracy_score(targets, predictions),
    )
    assert found == pytest.approx(wanted, abs=1e-9)


def test_change_scores_without_a_change_said_or_there():
    confusion = scores.Confusion(2)
    confusion.add(np.array([[0, 1]]), np.array([[0, 0]]))
    found = scores.change_scores(confusion)
    assert (found["f1"], found["iou"], found["precision"], found["recall"], found["accuracy"]) == (0, 0, 0, 0, 0.5)
    confusion = scores.Confusion(2)
    confusion.add(np.array([[0, 255]]), np.array([[0, 1]]))
    found = scores.change_scores(confusion)
    assert found.pop("accuracy") == 1
    assert np.isnan(list(found.values())).all()


def test_confusion_refuses_ids_that_no_class_has_and_knows_nothing_of_nothing():
    confusion = scores.Confusion(3)
    with pytest.raises(ValueError, match="class ids 1 to 3; wanted 0 to 2"):
        confusion.add(np.array([1, 2, 255]), np.array([1, 3, 9]))
    assert np.isnan([confusion.scores().miou, confusion.scores().accuracy]).all()


def test_scene_scores_equal_a_count_and_a_sort():
    rng = np.random.default_rng(3)
    targets, class_scores = rng.integers(0, 7, 60), rng.normal(size=(60, 7))
    class_scores[np.arange(60), targets] += 1
    found = scores.scene_scores(targets, class_scores.argmax(1), class_scores)
    top = np.argsort(-class_scores, axis=1)
    assert found["accuracy"] == pytest.approx(np.mean(top[:, 0] == targets))
    assert found["top_5"] == pytest.approx(np.mean((top[:, :5] == targets[:, None]).any(1)))
    assert 0 < found["accuracy"] < found["top_5"] < 1
    assert set(scores.scene_scores(targets % 4, targets % 4, class_scores[:, :4])) == {"accuracy"}


def test_multi_label_scores_equal_areas_under_hand_made_curves():
    rng = np.random.default_rng(4)
    targets = rng.random((40, 5)) < 0.3
    targets[:, 3] = False
    class_scores = rng.normal(size=(40, 5)) + targets

    def average_precision(wanted, values):
        order = np.argsort(-values)
        hits = np.cumsum(wanted[order])
        return np.sum((hits / np.arange(1, len(order) + 1))[wanted[order]]) / wanted.sum()

    found = scores.multi_label_scores(targets, class_scores)
    assert found["map_micro"] == pytest.approx(average_precision(targets.ravel(), class_scores.ravel()))
    macro = [average_precision(targets[:, c], class_scores[:, c]) for c in (0, 1, 2, 4)]
    assert found["map_macro"] == pytest.approx(np.mean(macro))
    assert np.isnan(list(scores.multi_label_scores(np.zeros((3, 2), bool), np.ones((3, 2))).values())).all()
