"""The protocols against scikit-learn, PyTorch and loops, on features that a stand-in for the network makes."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from micro import mono_config
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, jaccard_score
from sklearn.preprocessing import StandardScaler

from skysense_jax.eval.features import SampleFeatures, WholeSample
from skysense_jax.modalities import OSM, select
from skysense_jax.models import skysense
from skysense_jax.tasks import frozen, linear
from skysense_jax.tasks.examples import Example, Examples
from skysense_jax.tasks.loading import Model


def _blobs(rng, count, classes, dim=12, noise=2.0):
    """Classes whose centres overlap, features of very different scale."""
    centres, y = rng.normal(size=(classes, dim)), rng.integers(0, classes, count)
    x = (centres[y] + noise * rng.normal(size=(count, dim))) * np.geomspace(1e-3, 1e3, dim)
    return x.astype(np.float32), y


def test_linear_is_within_half_a_point_of_plain_sklearn_with_the_best_penalty():
    rng = np.random.default_rng(0)
    x, y = _blobs(rng, 3200, 5)
    train, test = np.s_[:1200], np.s_[1200:]
    found = linear.fit(x[train], y[train], np.arange(1200), num_classes=5, seed=0)(x[test]).argmax(1)
    scaler = StandardScaler().fit(x[train])
    plain = [
        LogisticRegression(C=c, max_iter=5000)
        .fit(scaler.transform(x[train]), y[train])
        .score(scaler.transform(x[test]), y[test])
        for c in linear.INVERSE_PENALTIES
    ]
    assert abs((found == y[test]).mean() - max(plain)) <= 0.005
    assert 0.4 < max(plain) < 0.9


def test_linear_of_classes_that_training_lacks_never_says_them():
    rng = np.random.default_rng(1)
    x, y = _blobs(rng, 90, 2, noise=0.3)
    y = np.where(y == 0, 1, 4)
    found = linear.fit(x, y, np.arange(90) // 9, num_classes=6, seed=0, by_class=True)(x)
    assert found.shape == (90, 6)
    assert np.isfinite(found).all()
    assert (found.argmax(1) == y).mean() > 0.95
    with pytest.raises(ValueError, match="has class 1; wanted two classes or more"):
        linear.fit(x[y == 1], y[y == 1], np.arange((y == 1).sum()), num_classes=6, seed=0)


@pytest.mark.parametrize("several", [False, True])
def test_penalty_is_chosen_on_some_of_many_rows_and_all_are_fitted(monkeypatch, several):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 200)
    x = rng.normal(size=(200, 6)) + 2 * np.eye(6)[y]
    fitted, fit = [], linear._fit
    monkeypatch.setattr(linear, "_MOST_CHOSEN_ON", 80)
    monkeypatch.setattr(linear, "_fit", lambda rows, *rest: fitted.append(len(rows)) or fit(rows, *rest))
    if several:
        linear.fit_multi_label(x, np.eye(3, dtype=bool)[y], seed=2)
        fitted = fitted[::3]
    else:
        score = linear.fit(x, y, np.arange(200), num_classes=3, seed=2)
        assert (score(x).argmax(1) == y).mean() > 0.85
    assert len(set(fitted[:5])) == 1
    assert 45 < fitted[0] < 75  # three quarters of 80
    assert fitted[5:] == [200]


def test_linear_of_one_image_a_class_fits_without_anything_held_out():
    x = np.array([[0.0, 1], [1, 0], [3, 3]], np.float32)
    found = linear.fit(x, np.array([0, 1, 2]), np.arange(3), num_classes=3, seed=0)(x)
    assert found.argmax(1).tolist() == [0, 1, 2]


def test_multi_label_equals_a_classifier_a_class_and_knows_columns_without_choice():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(900, 6)).astype(np.float32)
    y = np.stack(
        [x[:, 0] + 0.5 * rng.normal(size=900) > 0, x[:, 1] > 1, np.zeros(900, bool), np.ones(900, bool)], axis=1
    )
    train, test = np.s_[:500], np.s_[500:]
    found = linear.fit_multi_label(x[train], y[train], seed=0)(x[test])
    assert (found[:, 2] < found[:, :2].min(1)).all()  # none has it, all have it: below and above what is not sure
    assert (found[:, 3] > found[:, :2].max(1)).all()
    scaler = StandardScaler().fit(x[train])
    for column in (0, 1):
        plain = max(
            average_precision_score(
                y[test, column],
                LogisticRegression(C=c)
                .fit(scaler.transform(x[train]), y[train, column])
                .decision_function(scaler.transform(x[test])),
            )
            for c in linear.INVERSE_PENALTIES
        )
        assert abs(average_precision_score(y[test, column], found[:, column]) - plain) <= 0.005


@pytest.mark.parametrize(("num", "side"), [(3, 12), (4, 4), (1, 5), (5, 35)])
def test_enlarge_equals_pytorch(num, side):
    grid = np.random.default_rng(0).normal(size=(num, num, 2))
    wanted = torch.nn.functional.interpolate(
        torch.from_numpy(grid).permute(2, 0, 1)[None], size=(side, side), mode="bilinear", align_corners=False
    )
    np.testing.assert_allclose(frozen.enlarge(grid, side), wanted[0].permute(1, 2, 0).numpy(), atol=1e-12)


def test_enlarge_to_fewer_pixels_than_cells_is_their_mean():
    grid = np.random.default_rng(0).normal(size=(6, 6, 2))
    np.testing.assert_allclose(frozen.enlarge(grid, 2), grid.reshape(2, 3, 2, 3, 2).mean((1, 3)))


def test_cell_targets_equal_a_loop():
    rng = np.random.default_rng(1)
    target = np.where(rng.random((12, 12)) < 0.4, 255, rng.integers(0, 3, (12, 12))).astype(np.uint8)
    found = frozen.cell_targets(target, 3)
    for p in range(3):
        for q in range(3):
            inside = target[4 * p : 4 * p + 4, 4 * q : 4 * q + 4]
            counts = [int((inside == c).sum()) for c in range(3)]
            assert found[p, q] == (np.argmax(counts) if sum(counts) >= 8 else 255)
    coarse = np.array([[0, 1], [2, 255]], np.uint8)
    np.testing.assert_array_equal(frozen.cell_targets(coarse, 4), coarse.repeat(2, 0).repeat(2, 1))


# ---- whole tasks: the stand-in's features are the numbers that an example carries


@dataclasses.dataclass(frozen=True)
class Carrier:
    """A sample whose features are given."""

    id: str
    features: np.ndarray
    usable: np.ndarray

    @property
    def extent_cells(self):
        return len(self.features)

    def days(self, modality):
        return np.zeros(1, np.int32)

    window = labels_window = days


@pytest.fixture
def stand_in(monkeypatch):
    def sample_features(network, params, rows, samples, *, cells, num_dates, batch_size, fused_only):
        assert (params, rows, cells, num_dates, fused_only) == ({}, (), 4, {}, True)
        for sample in list(samples):  # all are asked for before the first is given, as by whole batches
            yield SampleFeatures(sample.features, sample.usable, {}, {}, WholeSample({}, {}, {}, {}, {}))

    monkeypatch.setattr(frozen, "sample_features", sample_features)

    config = mono_config()
    network = skysense.build(select(("s1",)), **config.model)
    return Model(network, {}, (), OSM, 4, {}, config, "stand-in")


def _run(model, train, test, protocol, **options):
    return frozen.evaluate(model, train, test, frozen.Options(**options), protocols=(protocol,))[protocol]


def _scene_examples(rng, count, classes=3):
    made = []
    for i in range(count):
        features = rng.normal(size=(3, 3, 8)).astype(np.float32)
        features[..., i % classes] += 3.0
        usable = np.ones((3, 3), bool)
        usable[0] = False
        features[0] = 1e6  # what must not enter the mean
        made.append(Example(str(i), Carrier(str(i), features, usable), None, np.array(i % classes)))
    return Examples(made, tuple("abc"[:classes]), "scene")


@pytest.mark.parametrize("protocol", ["knn", "linear"])
def test_scenes_that_features_tell_apart_are_told_apart(stand_in, protocol):
    rng = np.random.default_rng(0)
    found = _run(stand_in, _scene_examples(rng, 30), _scene_examples(rng, 18), protocol)
    assert found == {"accuracy": 1.0}


def test_one_class_or_no_labelled_cell_is_told_from_targets_alone():
    rng = np.random.default_rng(0)
    frozen.check_classes(_scene_examples(rng, 2))
    with pytest.raises(ValueError, match="all that is trained on has class 'a'; wanted two"):
        frozen.check_classes(_scene_examples(rng, 1))
    maps = _map_examples(rng, 3)
    frozen.check_classes(maps)
    for value, told in ((1, "has class 'b'"), (255, "no cell to train on")):
        for example in maps:
            example.target[...] = value
        with pytest.raises(ValueError, match=told):
            frozen.check_classes(maps)


def test_image_feature_is_the_mean_of_usable_cells():
    cells = frozen.Cells(np.arange(8.0).reshape(2, 2, 2), np.array([[True, False], [False, True]]))
    assert frozen.image_feature(cells).tolist() == [3.0, 4.0]
    nothing = frozen.Cells(cells.features, np.zeros((2, 2), bool))
    assert frozen.image_feature(nothing).tolist() == [3.0, 4.0]


def _map_examples(rng, count, kind="segmentation", per_cell=2):
    """Cells of three classes, features that say which; of change, dates that differ where it is."""
    made = []
    for i in range(count):
        ids = rng.integers(0, 3 if kind == "segmentation" else 2, (4, 4))
        base = rng.normal(size=(4, 4, 6)).astype(np.float32)
        usable = rng.random((4, 4)) < 0.8
        if kind == "segmentation":
            before, after = Carrier("x", 0.3 * base + 4 * np.eye(6, dtype=np.float32)[ids], usable), None
        else:
            moved = base + 2 * (ids * rng.choice((-1, 1), (4, 4)))[..., None].astype(np.float32)
            before, after = Carrier("x", base, usable), Carrier("y", moved, np.ones((4, 4), bool))
        target = np.kron(ids, np.ones((per_cell, per_cell), int)).astype(np.uint8)
        target[0, 0] = 255
        made.append(Example(str(i), before, after, target))
    classes = ("a", "b", "c") if kind == "segmentation" else ("unchanged", "changed")
    return Examples(made, classes, kind)


@pytest.mark.parametrize("protocol", ["knn", "linear"])
def test_maps_are_scored_on_all_pixels(stand_in, protocol):
    rng = np.random.default_rng(1)
    train, test = _map_examples(rng, 12), _map_examples(rng, 5, per_cell=1)
    found = _run(stand_in, train, test, protocol)
    assert found["miou"] == found["accuracy"] == found["mf1"] == 1.0
    assert set(found) == {"miou", "mf1", "accuracy", "iou/a", "iou/b", "iou/c"}
    fine = _run(stand_in, train, _map_examples(rng, 5, per_cell=8), protocol, left_out=(2,))
    assert 0.6 < fine["miou"] < 1  # bilinear enlarging rounds the corners of cells
    assert fine["miou"] == pytest.approx(np.mean([fine["iou/a"], fine["iou/b"]]))


def test_training_cells_are_no_more_than_asked_and_of_few_parts_evenly_over_images(stand_in):
    examples = _map_examples(np.random.default_rng(4), 60)
    # seven images of five or six parts, twenty of one
    names = [f"{i % 7}#{i},0" if i < 40 else f"{i}#0,0" for i in range(60)]
    named = [dataclasses.replace(example, id=name) for example, name in zip(examples, names)]
    examples = dataclasses.replace(examples, examples=named)
    read = []

    def reader(drawn):
        read.extend(example.id for example in drawn)
        return frozen.encode(stand_in, drawn, batch_size=8)

    x, y, groups = frozen._training_cells(reader, examples, frozen.Options(max_cells=130, seed=5))
    assert len(x) == len(y) == len(groups) == 130
    assert len(read) == 33  # four cells a part
    of_image = np.unique([name.partition("#")[0] for name in read], return_counts=True)[1]
    assert len(of_image) == 27
    assert of_image.max() == 2
    everything = frozen._training_cells(reader, examples, frozen.Options(max_cells=10_000))
    assert len(everything[0]) > 500
    again = frozen._training_cells(reader, examples, frozen.Options(max_cells=130, seed=6))
    assert not np.array_equal(again[0], x)


def test_pixel_scores_equal_sklearn_on_a_prediction_by_hand(stand_in):
    rng = np.random.default_rng(2)
    train, test = _map_examples(rng, 8), _map_examples(rng, 3, per_cell=4)
    found = _run(stand_in, train, test, "linear", max_cells=40, seed=3)
    x, y, groups = frozen._training_cells(
        functools.partial(frozen.encode, stand_in, batch_size=8), train, frozen.Options(max_cells=40, seed=3)
    )
    assert len(x) <= 40
    assert set(groups) == set(range(8))
    score = linear.fit(x, y, groups, num_classes=3, seed=3, by_class=True)
    targets, predictions = [], []
    for example in test:
        grid = score(example.before.features.reshape(-1, 6)).reshape(4, 4, 3)
        resized = torch.nn.functional.interpolate(
            torch.from_numpy(grid).permute(2, 0, 1)[None], size=(16, 16), mode="bilinear", align_corners=False
        )
        known = example.target != 255
        targets.append(example.target[known])
        predictions.append(resized[0].argmax(0).numpy()[known])
    wanted = jaccard_score(np.concatenate(targets), np.concatenate(predictions), average="macro")
    assert found["miou"] == pytest.approx(wanted, abs=1e-9)


def test_change_is_seen_in_the_difference_whatever_its_sign(stand_in):
    rng = np.random.default_rng(3)
    train, test = _map_examples(rng, 25, "change"), _map_examples(rng, 6, "change", per_cell=1)
    found = _run(stand_in, train, test, "linear")
    assert set(found) == {"f1", "iou", "precision", "recall", "accuracy"}
    assert found["f1"] > 0.97


def test_multi_label_images_and_what_is_refused(stand_in):
    rng = np.random.default_rng(4)

    def several(count):
        made = []
        for i in range(count):
            target = rng.random(3) < 0.5
            features = rng.normal(size=(2, 2, 6)).astype(np.float32)
            features[..., :3] += 4 * target
            made.append(Example(str(i), Carrier("x", features, np.ones((2, 2), bool)), None, target))
        return Examples(made, ("a", "b", "c"), "multi_label")

    found = _run(stand_in, several(60), several(30), "linear")
    assert found["map_micro"] > 0.97
    assert found["map_macro"] > 0.97
    with pytest.raises(ValueError, match="knn gives one class an image; wanted linear"):
        _run(stand_in, several(4), several(2), "knn")
    train = _map_examples(rng, 3)
    blind = [dataclasses.replace(e, before=Carrier("x", e.before.features, np.zeros((4, 4), bool))) for e in train]
    with pytest.raises(linear.NothingToFitError, match="no cell to train on"):
        _run(stand_in, dataclasses.replace(train, examples=blind), train, "linear")
    flat = [dataclasses.replace(e, target=np.zeros_like(e.target)) for e in train]
    with pytest.raises(linear.NothingToFitError, match="all that is trained on has class 0"):
        _run(stand_in, dataclasses.replace(train, examples=flat), train, "linear")
