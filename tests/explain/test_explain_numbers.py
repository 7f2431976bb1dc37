"""What a report tells of features, queries, experts and neighbours, against loops, scikit-learn and scipy."""

import base64
import io
import re

import numpy as np
import pytest
import scipy.stats
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import jaccard_score
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skysense_jax.data.sample import Sample
from skysense_jax.drawing import NOTHING
from skysense_jax.eval import probes
from skysense_jax.eval.features import read_whole
from skysense_jax.explain import attention, colours, imagery, missing, retrieval, routing
from skysense_jax.explain.places import Place, Shown, from_records
from skysense_jax.modalities import select
from skysense_jax.page import charts
from tests.data.random_samples import make_sample

# ---- features as colours


def _sources():
    rng = np.random.default_rng(0)
    basis = rng.normal(size=(3, 7)) * [[5], [3], [1]]
    maps, masks = {}, {}
    for name, offset in (("a", 0.0), ("b", 20.0)):
        shapes = ((4, 5), (3, 3))
        maps[name] = [rng.normal(size=(*shape, 3)) @ basis + rng.normal(size=(*shape, 7)) + offset for shape in shapes]
        masks[name] = [rng.random(shape) > 0.2 for shape in shapes]
    return maps, masks


def test_colours_are_the_principal_components_of_all_sources_together():
    maps, masks = _sources()
    painted = colours.paint(maps, masks)
    rows = {name: np.concatenate([x[m] for x, m in zip(maps[name], masks[name])]) for name in maps}
    centred = np.concatenate([x - x.mean(0) for x in rows.values()])
    pca = PCA(3).fit(centred)
    assert painted.held == pytest.approx(pca.explained_variance_ratio_.sum())
    scores = pca.transform(centred)
    low, high = np.percentile(scores, (2, 98), axis=0)
    for name in maps:
        for x, mask, got in zip(maps[name], masks[name], painted.maps[name]):
            wanted = np.clip((pca.transform(x[mask] - rows[name].mean(0)) - low) / (high - low), 0, 1)
            for k in range(3):  # a component's sign is free
                apart = min(np.abs(got[mask][:, k] - w).max() for w in (wanted[:, k], 1 - wanted[:, k]))
                assert apart < 1e-6
            assert (got[~mask] == NOTHING).all()
    everything = np.concatenate(list(rows.values()))
    within = sum(((x - x.mean(0)) ** 2).sum() for x in rows.values())
    assert painted.offsets == pytest.approx(1 - within / ((everything - everything.mean(0)) ** 2).sum())


def test_colours_of_the_same_ground_are_the_same_whatever_the_offset_of_a_modality():
    maps, masks = _sources()
    maps["b"], masks["b"] = [x + np.arange(7.0) for x in maps["a"]], masks["a"]
    painted = colours.paint(maps, masks)
    for a, b in zip(painted.maps["a"], painted.maps["b"]):
        np.testing.assert_allclose(a, b, atol=1e-9)
    assert colours.paint({"a": [maps["a"][0][:1, :1]]}, {"a": [np.ones((1, 1), bool)]}) is None


# ---- queries


def test_selected_classes_are_those_that_loops_find():
    rng = np.random.default_rng(1)
    ids = [rng.choice([0, 1, 2, 4], (11, 13)), rng.choice([0, 1, 2, 4], (3, 4))]
    ids[0][0, 0] = 5  # one cell of 156
    maps = [rng.random((4, *x.shape)) for x in ids]
    for x, of in zip(maps, ids):
        x[2, of == 5] = 99.0  # far more than any other, on a class that is hardly there
        x[1, of == 4] += 2.0
        x[3, of == 4] += 5.0
    found = attention.select(maps, ids, num_classes=5)
    for query in range(4):
        looks = {k: [] for k in range(1, 6)}
        for x, of in zip(maps, ids):
            for (row, column), k in np.ndenumerate(of):
                if k:
                    looks[k].append(x[query, row, column])
        mean = np.mean([look for of in looks.values() for look in of])
        lifts = {k: np.mean(v) / mean for k, v in looks.items() if v}
        assert np.isnan(found.lift[query, 2])  # class 3 is nowhere
        for k, lift in lifts.items():
            assert found.lift[query, k - 1] == pytest.approx(lift)
        wanted = scipy.stats.entropy(list(lifts.values())) / np.log(len(lifts))
        assert found.entropy[query] == pytest.approx(wanted)
        assert found.top[query] == max((k for k in lifts if k != 5), key=lifts.get) - 1
    assert found.order[:2].tolist() == [3, 1]
    assert sorted(found.order) == [0, 1, 2, 3]
    # an order of queries comes with them
    turned = attention.select([x[::-1] for x in maps], ids, num_classes=5)
    assert (3 - turned.order).tolist() == found.order.tolist()


def test_queries_without_a_labelled_cell_select_nothing():
    found = attention.select([np.ones((2, 3, 3))], [np.zeros((3, 3), int)], num_classes=4)
    assert np.isnan(found.lift).all()
    assert found.top.tolist() == [-1, -1]
    assert found.order.tolist() == [0, 1]


# ---- experts


def test_load_of_experts_counts_tokens_and_their_classes():
    rng = np.random.default_rng(2)
    chosen = {
        "fine": [rng.integers(-1, 3, (1, 6, 6)), rng.integers(-1, 3, (1, 4, 4))],
        "coarse": [rng.integers(-1, 3, (2, 3, 3)), np.full((2, 2, 2), -1)],
        "absent": [np.full((1, 3, 3), -1)] * 2,
    }
    labels = [np.kron(rng.integers(0, 3, (6, 6)), np.ones((2, 2), int)), None]  # 4 pixels a cell of 3 cells
    found = routing.load(chosen, labels, num_experts=3, num_classes=4)
    joint = np.zeros((3, 4))
    for name in ("fine", "coarse"):
        counts = [sum(int((x == e).sum()) for x in chosen[name]) for e in range(3)]
        np.testing.assert_allclose(found.share[name], np.array(counts) / sum(counts))
        tokens, block = chosen[name][0], 12 // chosen[name][0].shape[1]
        for date, row, column in np.ndindex(tokens.shape):
            pixels = labels[0][row * block :, column * block :][:block, :block].ravel()
            mapped = pixels[pixels > 0]
            if tokens[date, row, column] >= 0 and len(mapped) * 2 >= len(pixels):
                k = np.bincount(mapped).argmax()
                joint[tokens[date, row, column], k - 1] += 1
    assert np.isnan(found.share["absent"]).all()
    for e, k in np.ndindex(3, 2):
        wanted = (joint[e, k] / joint[e].sum()) / (joint[:, k].sum() / joint.sum())
        assert found.lift[e, k] == pytest.approx(wanted)
    assert np.isnan(found.lift[:, 2:]).all()


def test_blocks_with_experts_are_told_where_they_are():
    assert routing.mixture_blocks((2, 2, 6, 2), 3, "end") == "the last 3 of the 8 blocks of stages 3 and 4"
    assert routing.mixture_blocks((2, 2, 6, 2), 3, "start") == "the first 3 of the 8 blocks of stages 3 and 4"
    assert routing.mixture_blocks((1, 1, 1, 1), 1, "start") == "the first of the 2 blocks of stages 3 and 4"


# ---- neighbours


def _cells(num=40):
    rng = np.random.default_rng(3)
    a = rng.normal(size=(num, 5)) + 30
    b = a + 0.8 * rng.normal(size=(num, 5)) - 70
    return retrieval.Cells(a, b, rng.integers(0, 3, num), *rng.integers(0, 9, (2, num)), rng.integers(0, 4, num))


def test_same_cell_is_found_as_often_as_nearest_neighbours_find_it():
    cells = _cells()
    index = NearestNeighbors(n_neighbors=5, metric="cosine").fit(cells.b - cells.b.mean(0))
    near = index.kneighbors(cells.a - cells.a.mean(0), return_distance=False)
    wanted = {k: np.mean([i in near[i, :k] for i in range(len(near))]) for k in (1, 5)}
    assert retrieval.found_at(cells) == pytest.approx(wanted)
    assert 0.1 < wanted[1] < wanted[5] < 1
    alike = retrieval.Cells(cells.a, cells.b * 0, *(getattr(cells, n) for n in ("place", "row", "column", "target")))
    assert retrieval.found_at(alike) == {1: 0.0, 5: 0.0}


def test_nearest_elsewhere_lies_in_another_place_and_class_agreement_is_that_of_loops():
    cells = _cells()
    a, b = (x - x.mean(0) for x in (cells.a, cells.b))
    near = retrieval.nearest_elsewhere(cells, count=2)
    cosine = lambda x, y: x @ y / np.linalg.norm(x) / np.linalg.norm(y)  # noqa: E731
    for i in range(len(a)):
        others = [j for j in range(len(b)) if cells.place[j] != cells.place[i]]
        assert near[i].tolist() == sorted(others, key=lambda j: -cosine(a[i], b[j]))[:2]
    labelled = np.flatnonzero(cells.target)
    a, b = (x[labelled] - x[labelled].mean(0) for x in (cells.a, cells.b))
    place, target = cells.place[labelled], cells.target[labelled]
    hits, chance = [], []
    for i in range(len(a)):
        others = [j for j in range(len(b)) if place[j] != place[i]]
        hits.append(target[max(others, key=lambda j: cosine(a[i], b[j]))] == target[i])
        chance.append(np.mean([target[j] == target[i] for j in others]))
    assert retrieval.same_class(cells) == pytest.approx((np.mean(hits), np.mean(chance)))
    one = retrieval.Cells(cells.a, cells.b, cells.place * 0, cells.row, cells.column, cells.target)
    assert (retrieval.nearest_elsewhere(one, count=2) == -1).all()
    assert np.isnan(retrieval.same_class(one)).all()


@pytest.mark.parametrize(("row", "column"), [(0, 6), (3, 3), (6, 1)])
def test_square_shows_the_ground_around_a_cell_and_frames_that_cell(row, column):
    image = np.zeros((7 * 20, 7 * 20, 3))
    image[row * 20 : row * 20 + 20, column * 20 : column * 20 + 20] = (1, 0, 0)
    head, data = imagery.square(image, 7, row, column, around=2).split(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as opened:
        shown = np.asarray(opened.convert("RGB")).astype(int)
    assert shown.shape == (102, 102, 3)  # five cells of twenty pixels, and room for the frame
    red = np.argwhere((shown[..., 0] > 150) & (shown[..., 1] < 90))
    top, left = 20 * (row - min(max(row - 2, 0), 2)), 20 * (column - min(max(column - 2, 0), 2))
    assert np.abs(red.min(0) - (top + 2, left + 2)).max() <= 1
    assert np.abs(red.max(0) - (top + 19, left + 19)).max() <= 1
    yellow = np.argwhere((shown[..., 0] > 150) & (shown[..., 1] > 130) & (shown[..., 2] < 110))
    assert np.abs(yellow.min(0) - (top + 1, left + 1)).max() <= 1
    assert np.abs(yellow.max(0) - (top + 20, left + 20)).max() <= 1


# ---- less to see


def test_conditions_leave_out_each_modality_once_and_never_repeat():
    three = missing.conditions(dict(hr=1, s2=5, s1=2))
    assert [c.name for c in three] == [
        "everything",
        "without hr",
        "without s2",
        "without s1",
        "hr alone",
        "s2 alone",
        "s1 alone",
        "at most 2 dates",
        "at most 1 date",
    ]
    assert three[2].num_dates == dict(hr=1, s2=0, s1=2)
    assert three[5].num_dates == dict(hr=0, s2=5, s1=0)
    assert three[7].num_dates == dict(hr=1, s2=2, s1=2)
    assert [c.name for c in missing.conditions(dict(hr=1, s1=1))] == ["everything", "hr alone", "s1 alone"]
    assert [c.name for c in missing.conditions(dict(s1=1))] == ["everything"]


def test_hidden_modality_and_dates_read_as_if_the_sample_had_none():
    rows, num_dates = select(("hr", "s2", "s1")), dict(hr=1, s2=3, s1=2)
    sample = make_sample(4, extent_cells=3, dates=dict(hr=1, s2=6, s1=2))
    series = {name: one for name, one in sample.series.items() if name != "hr"}
    few = [1, 4]  # the middles of two halves of six
    take = lambda one: type(one)(*(getattr(one, n)[few] for n in ("images", "valid", "cloud", "days", "orbits")), 10.0)  # noqa: E731
    wanted = read_whole(Sample("x", 3, {**series, "s2": take(series["s2"])}, sample.labels), rows, num_dates=num_dates)
    shown = Shown(sample, dict(hr=0, s2=2, s1=2))
    got = read_whole(shown, rows, num_dates=num_dates)
    for field in ("images", "token_valid", "cell_usable", "present", "day_of_year"):
        for name in num_dates:
            np.testing.assert_array_equal(getattr(got, field)[name], getattr(wanted, field)[name])
    np.testing.assert_array_equal(shown.labels_window(1, 0, 2), sample.labels_window(1, 0, 2))


def _probed(num_places, seed):
    """Places of 4 x 4 cells whose features tell their class, up to noise."""
    rng = np.random.default_rng(seed)
    places, features = [], []
    for number in range(num_places):
        ids = rng.choice([0, 1, 1, 2, 3], (4, 4))
        places.append(Place(Sample(f"p{number}", 4, {}, np.kron(ids, np.ones((4, 4), int)).astype(np.uint8))))
        features.append(np.eye(6)[ids] + rng.normal(0, 0.5, (4, 4, 6)))
    return places, features


def test_scores_are_those_of_a_probe_fitted_on_everything_on_cells_that_all_see():
    train_places, train_features = _probed(8, 0)
    places, features = _probed(5, 1)
    train = probes.gather_cells(
        train_features, [np.ones((4, 4), bool)] * 8, [p.labels for p in train_places], [{}] * 8, first_scene=0
    )
    rng = np.random.default_rng(2)
    fused = {"everything": features, "less": [x + rng.normal(0, 1.0, x.shape) for x in features]}
    usable = {"everything": [np.ones((4, 4), bool)] * 5, "less": [rng.random((4, 4)) > 0.3 for _ in range(5)]}
    found = missing.compare(train, places, fused, usable)
    keep = [mask & (p.labels[::4, ::4] > 0) for mask, p in zip(usable["less"], places)]
    targets = np.concatenate([p.labels[::4, ::4][m] for p, m in zip(places, keep)])
    assert found.num_cells == sum(mask.sum() for mask in usable["less"])
    asked = train.targets["osm"] > 0
    for name in fused:
        test = np.concatenate([x[m] for x, m in zip(fused[name], keep)])
        possible = set()
        for penalty in probes.INVERSE_PENALTIES:
            model = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=2000, tol=1e-3))
            model.fit(train.features[asked], train.targets["osm"][asked])
            possible.add(round(jaccard_score(targets, model.predict(test), average="macro"), 9))
        assert round(found.scores[name]["osm"].miou, 9) in possible
    assert found.scores["everything"]["osm"].miou > found.scores["less"]["osm"].miou + 0.05
    common = np.bincount(train.targets["osm"][asked]).argmax()
    assert found.constant["osm"].accuracy == pytest.approx((targets == common).mean())
    assert found.constant["osm"].miou == pytest.approx((targets == common).mean() / 3)


def test_scores_without_a_cell_that_all_see_are_nan_and_the_page_says_so():
    places, features = _probed(3, 0)
    train = probes.gather_cells(
        features, [np.ones((4, 4), bool)] * 3, [p.labels for p in places], [{}] * 3, first_scene=0
    )
    never = {"everything": [np.ones((4, 4), bool)] * 3, "less": [np.zeros((4, 4), bool)] * 3}
    found = missing.compare(train, places, {"everything": features, "less": features}, never)
    assert np.isnan(found.scores["everything"]["osm"].miou)
    assert found.num_cells == 0
    assert "No probe could be scored" in missing.section([], found)


def test_records_are_divided_in_proportion_and_none_stands_on_both_sides():
    samples = [make_sample(seed, extent_cells=1) for seed in range(7)]
    divided = from_records(samples, num_train=48, num_test=24)
    assert [place.sample for place in divided.train] == samples[:5]
    assert [place.sample for place in divided.test] == samples[5:]
    with pytest.raises(ValueError, match="--samples=records: 1 of the records"):
        from_records(samples[:1], num_train=48, num_test=24)


# ---- charts


def test_curves_lie_where_their_numbers_are_and_long_ones_are_means():
    x, y = np.arange(7.0), np.array([3, np.nan, 5, 1, 2, np.inf, 9])
    drawn = charts.curve_chart([charts.Curve("k", x, y)], title="t", axis="step", from_zero=True)
    points = np.array(re.findall(r"[ML]([\d.]+) ([\d.]+)", re.search(r'd="(M[^"]+L[^"]+)" class="curve', drawn)[1]))
    points, there = points.astype(float), np.isfinite(y)
    assert len(points) == 5
    for axis, numbers, sign in ((0, x[there], 1), (1, y[there], -1)):
        slope, start = np.polyfit(numbers, points[:, axis], 1)
        assert np.abs(slope * numbers + start - points[:, axis]).max() < 0.11
        assert np.sign(slope) == sign
    long = charts.thinned(charts.Curve("k", np.arange(401.0), np.arange(401.0) ** 2))
    assert len(long.x) == 134
    assert long.y[1] == pytest.approx((9 + 16 + 25) / 3)
    assert long.y[-1] == pytest.approx((399**2 + 400**2) / 2)
    assert charts.curve_chart([charts.Curve("k", x, y * np.nan)], title="t", axis="step") == ""
