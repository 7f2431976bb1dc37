"""Probe arithmetic against hand-computed figures, loops and toy data that a line separates."""

import types

import numpy as np
import pytest
from flax import linen as nn
from sklearn.neighbors import KNeighborsClassifier

from skysense_jax import modalities
from skysense_jax.data import scenes
from skysense_jax.eval import features, probes


def test_score_on_a_hand_computed_table_counts_false_alarms_of_every_class():
    targets = np.array([1, 1, 1, 2, 2, 4])
    predictions = np.array([1, 1, 2, 2, 3, 4])
    scores = probes.score(targets, predictions)
    # IoU: class 1 2/3, class 2 1/3 (one missed, one false), class 4 1/1; class 3 is predicted, but no target has it.
    assert scores.miou == pytest.approx((2 / 3 + 1 / 3 + 1) / 3)
    assert scores.accuracy == pytest.approx(4 / 6)


def test_score_of_random_ids_equals_sets_in_a_loop():
    rng = np.random.default_rng(3)
    targets, predictions = rng.integers(1, 5, 200), rng.integers(1, 7, 200)
    ious = []
    for c in np.unique(targets):
        hit = set(np.flatnonzero(targets == c)), set(np.flatnonzero(predictions == c))
        ious.append(len(hit[0] & hit[1]) / len(hit[0] | hit[1]))
    assert probes.score(targets, predictions).miou == pytest.approx(np.mean(ious))


def test_cell_targets_of_random_ids_equal_a_loop_over_cells():
    rng = np.random.default_rng(0)
    ids = (rng.integers(0, 4, (12, 12)) * (rng.random((12, 12)) < 0.6)).astype(np.uint8)
    got = probes.cell_targets(ids, extent_cells=3, min_share=0.5)
    for p in range(3):
        for q in range(3):
            inside = ids[4 * p : 4 * p + 4, 4 * q : 4 * q + 4]
            counts = [np.sum(inside == i) for i in (1, 2, 3)]
            assert got[p, q] == (1 + int(np.argmax(counts)) if sum(counts) >= 8 else 0)
    assert (got == 0).any()
    assert (got > 0).any()


def test_cell_targets_at_the_share_itself_are_kept_and_below_it_left_out():
    ids = np.zeros((8, 8), np.uint8)
    ids[:2, :2] = 7  # 4 of 16 sub-pixels
    ids[4, 4:7] = 7  # 3 of 16
    assert probes.cell_targets(ids, extent_cells=2, min_share=0.25).tolist() == [[7, 0], [0, 0]]


def _toy(rng, scenes_from, count, noise):
    """Two classes apart along one of three features, in scenes of 20 cells; every fifth cell is not asked about."""
    targets = rng.integers(1, 3, count * 20)
    x = rng.normal(size=(count * 20, 3)).astype(np.float32) * (1.0, 50.0, 0.01)
    x[:, 0] = np.where(targets == 1, -3.0, 3.0) + noise * x[:, 0]
    targets[::5] = 0
    places = scenes_from + np.repeat(np.arange(count), 20)
    return probes.ProbeCells(x.astype(np.float32), {"toy": targets}, places)


def test_linear_probe_on_separable_cells_is_perfect_and_on_shuffled_ones_is_not():
    rng = np.random.default_rng(1)
    train, test = _toy(rng, 0, 9, 0.3), _toy(rng, 100, 4, 0.3)
    assert probes.linear_probe(train, test, task="toy") == probes.Scores(1.0, 1.0)
    shuffled = probes.ProbeCells(train.features[rng.permutation(180)], train.targets, train.scenes)
    assert probes.linear_probe(shuffled, test, task="toy").accuracy < 0.9


def test_neighbour_probe_equals_brute_force_and_tells_classes_that_a_line_does_not():
    rng = np.random.default_rng(1)
    angle, place = rng.uniform(0, 2 * np.pi, 400), np.repeat(np.arange(20), 20)
    targets = 3 + 2 * (np.floor(angle / (np.pi / 3)).astype(int) % 2)  # six sectors, of two classes by turns: 3 and 5
    targets[::7] = 0
    features = np.stack([np.cos(angle), np.sin(angle)], axis=-1).astype(np.float32)
    cells = [
        probes.ProbeCells(features[part], {"toy": targets[part]}, place[part]) for part in (place < 14, place >= 14)
    ]
    asked = [part.targets["toy"] > 0 for part in cells]
    model = KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    )
    model.fit(cells[0].features[asked[0]].astype(np.float64), cells[0].targets["toy"][asked[0]])
    wanted = model.predict(cells[1].features[asked[1]].astype(np.float64))
    found = probes.neighbour_probe(*cells, task="toy")
    assert found == probes.score(cells[1].targets["toy"][asked[1]], wanted)
    assert found.accuracy > 0.85
    assert probes.linear_probe(*cells, task="toy").accuracy < 0.7


def test_neighbour_probe_of_one_class_or_of_shared_scenes_says_so():
    rng = np.random.default_rng(2)
    train, test = _toy(rng, 0, 9, 3.0), _toy(rng, 100, 4, 3.0)
    one = probes.ProbeCells(train.features, {"toy": np.minimum(train.targets["toy"], 1)}, train.scenes)
    assert np.isnan(probes.neighbour_probe(one, test, task="toy").miou)
    with pytest.raises(ValueError, match=r"are in training and test"):
        probes.neighbour_probe(train, train, task="toy")


def test_linear_probe_twice_gives_the_same_scores_and_keeps_to_its_cap():
    rng = np.random.default_rng(2)
    train, test = _toy(rng, 0, 9, 3.0), _toy(rng, 100, 4, 3.0)
    first = probes.linear_probe(train, test, task="toy", max_cells=3)
    assert first == probes.linear_probe(train, test, task="toy", max_cells=3)
    assert first != probes.linear_probe(train, test, task="toy")


def test_linear_probe_with_a_scene_in_both_parts_is_refused():
    rng = np.random.default_rng(2)
    with pytest.raises(ValueError, match=r"scenes \[8\] are in training and test"):
        probes.linear_probe(_toy(rng, 0, 9, 1.0), _toy(rng, 8, 3, 1.0), task="toy")


def test_linear_probe_without_a_second_class_or_a_test_cell_is_nan():
    rng = np.random.default_rng(2)
    train, test = _toy(rng, 0, 4, 1.0), _toy(rng, 9, 2, 1.0)
    one = probes.ProbeCells(train.features, {"toy": np.minimum(train.targets["toy"], 1)}, train.scenes)
    none = probes.ProbeCells(test.features, {"toy": 0 * test.targets["toy"]}, test.scenes)
    assert np.isnan(probes.linear_probe(one, test, task="toy").miou)
    assert np.isnan(probes.linear_probe(train, none, task="toy").miou)


def test_gather_cells_keeps_usable_cells_and_asks_unlabelled_scenes_nothing():
    x = [np.full((2, 2, 3), float(i), np.float32) for i in range(2)]
    usable = [np.array([[True, False], [True, True]]), np.ones((2, 2), bool)]
    labels = [np.kron(np.array([[1, 2], [3, 4]], np.uint8), np.ones((4, 4), np.uint8)), None]
    hidden = [{"crop": np.eye(8, dtype=np.uint8) * 5}, {"crop": np.zeros((8, 8), np.uint8)}]
    cells = probes.gather_cells(x, usable, labels, hidden, first_scene=40)
    assert cells.targets["osm"].tolist() == [1, 3, 4, 0, 0, 0, 0]
    assert cells.targets["crop"].tolist() == [5, 0, 5, 0, 0, 0, 0]
    assert cells.scenes.tolist() == [40] * 3 + [41] * 4
    assert cells.features[:, 0].tolist() == [0.0] * 3 + [1.0] * 4


def test_raw_bands_of_a_cell_are_its_own_and_its_neighbours_numbers():
    rows = modalities.select(("hr", "s1"))
    rng = np.random.default_rng(4)
    images = {
        "hr": rng.integers(0, 255, (1, 96, 96, 3)).astype(np.uint8),
        "s1": rng.normal(-12, 3, (2, 3, 3, 2)).astype(np.float16),
    }
    got = probes.raw_bands(features.WholeSample(images, {}, {}, {}, {}), rows)
    known = {"hr": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)), "s1": ((-12.548, -20.192), (5.257, 5.912))}
    standardised = {
        name: (images[name].astype(np.float64) - np.array(mean)) / np.array(std) for name, (mean, std) in known.items()
    }
    assert got.shape == (3, 3, 9 * (3 + 3 + 2 * 2))
    for p, q in ((0, 2), (1, 1)):
        wanted = []
        for dp in (-1, 0, 1):
            for dq in (-1, 0, 1):
                r, c = np.clip((p + dp, q + dq), 0, 2)
                cell = standardised["hr"][0, 32 * r : 32 * r + 32, 32 * c : 32 * c + 32]
                wanted += [*cell.mean((0, 1)), *cell.std((0, 1)), *standardised["s1"][:, r, c].ravel()]
        np.testing.assert_allclose(got[p, q], wanted, rtol=1e-4, atol=1e-6)


def test_probe_of_less_is_fitted_on_everything_and_scored_on_the_cells_that_all_see(monkeypatch):
    rows = modalities.select(("s2", "s1"))
    which = dict(seed=5, extent_cells=8, first_index=70, num_train_scenes=3, num_test_scenes=4)
    held_out, given, parts = probes.held_out_scenes(rows, **which), [], []
    for scene in held_out.test:
        scene.sample.series["s2"].cloud[:, :, :3] = True

    def sample_features(model, params, shown, samples, *, cells, num_dates, batch_size):
        for sample in samples:
            given.append([row.name for row in shown])
            usable = probes.raw_cells(features.read_whole(sample, shown, num_dates=num_dates), shown)[1]
            yield types.SimpleNamespace(fused=np.ones((8, 8, 2)), fused_usable=usable)

    monkeypatch.setattr(probes, "sample_features", sample_features)
    monkeypatch.setattr(probes, "linear_probe", lambda *of, task: parts.append(of) or probes.Scores(0.5, 0.5))
    num_dates, counts = dict(s2=1, s1=1), []
    for shown in (rows, rows[:1], rows[1:]):
        probes.probe_scenes(nn.Module(), None, rows, held_out, cells=4, num_dates=num_dates, batch_size=2, shown=shown)
        assert given == [["s2", "s1"]] * 3 + [[row.name for row in shown]] * 4
        train, test = parts[-1]
        counts.append((len(train.scenes), len(test.scenes)))
        given.clear()
    cloudless = sum(
        int(features.read_whole(scene.sample, rows[:1], num_dates=num_dates).cell_usable["s2"].any(0).sum())
        for scene in held_out.test
    )
    assert 0 < cloudless <= 4 * 40  # radar alone would see all
    assert counts == [(3 * 64, cloudless)] * 3


def test_probe_raw_bands_on_scenes_splits_them_and_scores_every_task(monkeypatch):
    drawn, real = [], scenes.render
    monkeypatch.setattr(scenes, "render", lambda index, **options: drawn.append(index) or real(index, **options))
    which = dict(seed=5, extent_cells=8, first_index=70, num_train_scenes=4, num_test_scenes=2)
    rows = modalities.select(("s2", "s1"))
    scores = probes.probe_raw_bands(rows, probes.held_out_scenes(rows, **which), num_dates=dict(s2=2, s1=1))
    assert drawn == list(range(70, 76))
    tasks = {"osm", "crop_type", "roof_material", "forest_type"}
    assert set(scores) == {
        f"{task}/{name}" for task in tasks for name in ("miou", "accuracy", "knn_miou", "knn_accuracy")
    }
    assert 0 < scores["osm/accuracy"] <= 1
    assert 0 < scores["osm/knn_accuracy"] <= 1
