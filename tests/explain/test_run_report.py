"""The report of a run, opened in a real browser: it tells what the network gives, on a phone and by night too."""

import re
import shutil

import jax
import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from skysense_jax import checkpoint
from skysense_jax import config as config_lib
from skysense_jax.eval import pictures, report
from skysense_jax.eval.features import sample_features
from skysense_jax.explain import attention, course, loading, places, retrieval
from skysense_jax.explain.report import report as page_of

FEW = dict(num_train=3, num_test=3)
OPTIONS = ["--num_train=3", "--num_test=3", "--num_shown=2"]
SECTIONS = [
    "How it went",
    "Features",
    "What the queries select",
    "Where experts work",
    "Neighbours across modalities",
    "With less to see",
]


@pytest.fixture(scope="module")
def mixture(mixture_run):
    """The page of the mixture of experts, and what it is made of."""
    report.main([str(mixture_run), *OPTIONS])
    run = loading.load(str(mixture_run))
    return mixture_run / "report.html", run, loading.find_places(run, None, **FEW)


def _text(shown):
    return shown.evaluate("document.body.innerText")


def _tables(shown):
    return shown.evaluate(
        "Object.fromEntries([...document.querySelectorAll('table')].map(t => [t.caption.textContent,"
        " Object.fromEntries([...t.tBodies[0].rows].map(r => [r.cells[0].textContent,"
        " [...r.cells].slice(1).map(c => c.textContent)]))]))"
    )


@pytest.mark.parametrize(("width", "dark"), [(390, True), (1280, False)])
def test_page_of_a_mixture_has_nothing_wrong_and_all_its_pictures(mixture, browser, width, dark):
    path = mixture[0]
    with browser.open(path, width=width, dark=dark) as shown:
        assert shown.problems() == []
        assert shown.evaluate("[...document.querySelectorAll('h2')].map(e => e.textContent)") == SECTIONS
        assert shown.evaluate("document.querySelector('h1').textContent") == "micro, step 10"
        sides = shown.evaluate("[...document.images].map(i => [i.naturalWidth, i.naturalHeight])")
        # two places: 3 modalities and the map, 3 and 4 of features; 3 queries; 3 and 3 of experts; then neighbours
        assert len(sides) > 2 * (4 + 3 + 4) + 2 * 3 + 2 * 6
        assert min(min(side) for side in sides) >= 8
    text = path.read_text()
    assert len(text) < 6e6
    assert "<script" not in text
    assert not re.search(r"(src|href)=\"(?!#|data:)", text)


def test_tables_tell_what_the_network_gives(mixture, browser):
    path, run, found = mixture
    with browser.open(path, width=1280) as shown:
        tables = _tables(shown)
        tiles = shown.evaluate("[...document.querySelectorAll('.tiles li')].map(e => e.innerText.replace('\\n', ' '))")
        assert "every token takes the same way" not in _text(shown)
        assert "In the last of the 2 blocks of stages 3 and 4 every token goes to one of" in _text(shown)
    head = tables["The run"]
    assert head["weights"] == ["the teacher's behind step 10 of 10"]
    assert head["modalities"] == ["hr (1 date), s2 (2 dates), s1 (2 dates)"]
    assert head["data"] == ["scenes (share 1)"]
    num = sum(leaf.size for leaf in jax.tree.leaves(run.model.params))
    assert head["parameters"][0].startswith(f"{num:,} (backbone ")
    closing = tables["Closing probes behind step 10, in points; on held-out procedural scenes: osm"]
    assert closing == {"osm, linear": ["25.0"]}

    seen = list(
        sample_features(
            run.model.network,
            run.model.params,
            run.model.rows,
            [place.sample for place in found.test],
            cells=run.model.cells,
            num_dates=run.model.num_dates,
            batch_size=run.batch_size,
        )
    )
    cells = retrieval.common_cells(found.test, seen, "s2", "s1")
    both = [f.modality_usable["s2"] & f.modality_usable["s1"] for f in seen]
    assert len(cells.a) == sum(mask.sum() for mask in both) < retrieval.MOST_CELLS
    a, b = (np.concatenate([f.modality[name][m] for f, m in zip(seen, both)]) for name in ("s2", "s1"))
    index = NearestNeighbors(n_neighbors=5, metric="cosine").fit(b - b.mean(0, dtype=float))
    near = index.kneighbors(a - a.mean(0, dtype=float), return_distance=False)
    counts = [len(of.a) for of in retrieval.ordered_pairs(found.test, seen, run.model.rows).values()]
    for k, told in ((1, "The same cell is the nearest"), (5, "The same cell is among the 5 nearest")):
        (caption,) = (name for name in tables if name.startswith(told))
        hits = np.mean([i in near[i, :k] for i in range(len(near))])
        assert f"of {min(counts)} to {max(counts)} cells; chance: {k / max(counts):.1%}" in caption
        assert tables[caption]["from s2"][2] == f"{hits:.1%}"
    loads = tables["Share of tokens that each expert of mixture block 0 takes; even: 50%"]
    assert set(loads) == {"hr", "s2", "s1"}
    assert all(abs(sum(int(share[:-1]) for share in shares) - 100) <= 1 for shares in loads.values())
    scores = tables["Mean IoU by task, in points"]
    assert list(scores) == [
        "everything",
        *(f"without {name}" for name in ("hr", "s2", "s1")),
        *(f"{name} alone" for name in ("hr", "s2", "s1")),
        "at most 1 date",
        "the commonest class",
    ]
    assert len(tables["Queries by what they select"]) == 3
    loss, probe, _, own, less = tiles
    assert loss.startswith("9 \u2192 1")
    assert probe.startswith("25.0 ")
    nearest = [
        float(x[:-1])
        for name, of in tables.items()
        if name.startswith("The same cell is the nearest")
        for row in of.values()
        for x in row
        if x
    ]
    assert float(own.split("%")[0]) == pytest.approx(np.mean(nearest), abs=0.11)
    without = {name: float(of[0]) for name, of in scores.items() if name.startswith("without ")}
    worst = min(without, key=without.get)
    assert less.startswith(f"{scores['everything'][0]} \u2192 {without[worst]} ")
    assert f"and {worst};" in less


def test_maps_of_attention_are_those_of_the_decoder_window_by_window(mixture):
    run = mixture[1]
    rng = np.random.default_rng(0)
    fused = rng.normal(size=(6, 6, run.model.network.fusion.width)).astype(np.float32)
    usable = rng.random((6, 6)) > 0.2
    maps = attention.attention_maps(run.model.network, run.model.params, fused, usable, cells=4)
    wanted = np.zeros_like(maps)
    for row in (0, 2):
        for column in (0, 2):  # the last counts
            window = slice(row, row + 4), slice(column, column + 4)
            seen = pictures.query_attention(run.model.network, run.model.params, fused[window], usable[window])
            wanted[(slice(None), *window)] = np.where(usable[window], seen * usable[window].sum(), 0)
    np.testing.assert_allclose(maps, wanted, atol=1e-5)
    assert maps[0].std() > 0.01
    small = attention.attention_maps(run.model.network, run.model.params, fused[:3, :3], usable[:3, :3], cells=4)
    np.testing.assert_allclose(small.sum((1, 2)), usable[:3, :3].sum(), rtol=1e-5)


def test_same_run_gives_the_same_page(mixture):
    path, run, found = mixture
    assert page_of(run, found, num_shown=2) == path.read_text()


def test_page_of_a_dense_run_on_records_says_what_there_is_not(dense_run, browser, tmp_path, capsys):
    out = tmp_path / "page.html"
    report.main([str(dense_run), *OPTIONS, "--out", str(out)])
    assert re.fullmatch(rf"{out}: \d\.\d MB\n", capsys.readouterr().out)
    with browser.open(out, width=390) as shown:
        assert shown.problems() == []
        text, tables = _text(shown), _tables(shown)
    assert "The network has no mixture of experts: every token takes the same way." in text
    assert "No cell is seen by two modalities" in text
    assert "The run has no metrics.jsonl" in text
    assert "Places are records of the run's own sources" in text
    assert tables["The run"]["data"] == ["records/*.array_record (share 1)"]
    assert list(tables["Mean IoU by task, in points"]) == ["everything", "the commonest class"]
    assert next(iter(tables["Mean IoU by task, in points"].values())) != [""]


def test_dense_run_may_be_shown_on_scenes_instead(dense_run):
    run = loading.load(str(dense_run))
    found = loading.find_places(run, places.SCENES, **FEW)
    assert [len(found.train), len(found.test)] == [3, 3]
    first = run.model.config.eval.first_index
    assert [place.sample.id for place in found.test] == [f"scene-0-{first + i}" for i in (3, 4, 5)]


def test_curves_of_probes_begin_with_the_untrained_network_and_end_with_the_closing_one():
    scores = {"teacher": {"osm/miou": 0.5, "osm/knn_miou": 0.3}, "untrained": {"osm/miou": 0.2, "osm/knn_miou": 0.1}}
    lines = [{"step": 4, "loss": 3.0, "probe/osm/miou": 0.4}, {"step": 9, "loss": 2.0}]
    along = course.Probes(9, scores).along(lines)
    curve = [(line["step"], line["probe/osm/miou"]) for line in along if "probe/osm/miou" in line]
    assert curve == [(0, 0.2), (4, 0.4), (9, 0.5)]
    logged = [*lines[:1], {"step": 9, "loss": 2.0, "probe/osm/miou": 0.5}]
    assert [line["step"] for line in course.Probes(9, scores).along(logged)] == [0, 4, 9]
    alone = course.Probes(9, {"teacher": scores["teacher"]})
    assert alone.along(logged) == logged
    assert alone.along(lines[1:]) == lines[1:]  # one point is no curve


def test_closing_probes_on_labelled_data_are_told_apart_from_those_on_scenes():
    teacher = {
        "osm/miou": 0.5,
        "osm/knn_miou": 0.25,
        "forest_type/miou": None,
        "my_fields/miou": 0.125,
        "my_fields/mf1": 0.75,
        "my_fields/knn_mf1": 0.375,
        "<towns>/map_micro": 0.0625,
        "<towns>/map_macro": 0.5,
        "changed/f1": 0.25,
        "changed/precision": 1.0,
        "changed/knn_f1": 0.5,
        "share_of_time": 0.01,
    }
    untrained = {key: value and value / 2 for key, value in teacher.items()}
    lines = [{"step": 4, "probe/changed/f1": 0.2, "probe/share_of_time": 0.3}]
    made = course.section(lines, course.Probes(8, {"teacher": teacher, "untrained": untrained}))
    caption = "on held-out procedural scenes: osm; on labelled data: &lt;towns&gt;, changed, my fields"
    assert f"<caption>Closing probes behind step 8, in points; {caption}</caption>" in made
    head, *rows = (re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in made.split("<tr>")[1:])
    names = ["mIoU", "mF1", "micro mAP", "macro mAP", "F1", "precision"]
    assert head == ["task", *(f"{name}, {network}" for name in names for network in ("teacher", "untrained"))]
    found = {name: dict(zip(names, zip(cells[::2], cells[1::2]))) for name, *cells in rows}
    told = {name: {score: both for score, both in of.items() if any(both)} for name, of in found.items()}
    assert told == {
        "&lt;towns&gt;, linear": {"micro mAP": ("6.2", "3.1"), "macro mAP": ("50.0", "25.0")},
        "changed, linear": {"F1": ("25.0", "12.5"), "precision": ("100.0", "50.0")},
        "changed, nearest neighbours": {"F1": ("50.0", "25.0")},
        "my fields, linear": {"mIoU": ("12.5", "6.2"), "mF1": ("75.0", "37.5")},
        "my fields, nearest neighbours": {"mF1": ("37.5", "18.8")},
        "osm, linear": {"mIoU": ("50.0", "25.0")},
        "osm, nearest neighbours": {"mIoU": ("25.0", "12.5")},
    }
    for curve in ("changed: 0.125 to 0.25", "&lt;towns&gt;: 0.03125 to 0.0625"):
        assert f"<title>{curve}</title>" in made.partition("Linear probe, micro mAP, or F1 of change")[2]
    assert "<towns>" not in made
    assert "share of time" not in made
    assert "<table" not in course.section(lines, course.Probes(8, {"teacher": {"osm/miou": None}}))


# ---- what is refused


def test_run_with_a_backbone_for_each_modality_is_refused(dense_run, monkeypatch):
    model = loading.load(str(dense_run)).model
    with model.config.unlocked():
        model.config.model.backbone.shared = False
    monkeypatch.setattr(loading.loading, "load", lambda workdir, step: model)
    with pytest.raises(ValueError, match=r"^RUN: config\.model\.backbone\.shared: got False; wanted True: a report"):
        loading.load(str(dense_run))


def test_records_that_are_gone_are_refused_and_scenes_offered(dense_run):
    run = loading.load(str(dense_run))
    with run.model.config.unlocked():
        run.model.config.data.sources = (("gone/*.array_record", 1.0),)
    with pytest.raises(
        ValueError, match=r"--samples=records: .*gone/.*; wanted the run's records, or --samples=scenes"
    ):
        loading.find_places(run, None, **FEW)


def test_scenes_for_a_run_with_label_classes_of_its_own_are_refused(dense_run):
    run = loading.load(str(dense_run))
    with run.model.config.unlocked():
        run.model.config.data.label_classes = ("water", "field")
    with pytest.raises(
        ValueError, match=r"--samples=scenes: .*\(config\.data\.label_classes\); wanted --samples=records"
    ):
        loading.find_places(run, places.SCENES, **FEW)


def _say(monkeypatch, run, change):
    """As if the checkpoint of ``run`` said of itself what ``change`` makes of its config."""
    config = config_lib.unflatten(checkpoint.read_meta(run)["config"])
    with config.unlocked():
        change(config)
    meta = {"config": config_lib.flat_text(config)}
    monkeypatch.setattr(checkpoint, "read_meta", lambda directory, step: meta)


def test_weights_of_another_network_are_refused(dense_run, monkeypatch):
    _say(monkeypatch, dense_run, lambda config: config.model.queries.update(num_queries=5))
    with pytest.raises(ValueError, match=r"^RUN: [^$]*teacher/queries/queries: saved \(3, 32\).* wanted \(5, 32\)"):
        loading.load(str(dense_run))


def test_config_of_another_version_is_refused(dense_run, monkeypatch):
    _say(monkeypatch, dense_run, lambda config: config.model.backbone.update(colour="red"))
    with pytest.raises(ValueError, match=r"^RUN: .* not that of skysense_jax .* unexpected keyword argument 'colour'"):
        loading.load(str(dense_run))


def test_config_that_lacks_a_field_of_this_version_is_refused(dense_run, monkeypatch):
    _say(monkeypatch, dense_run, lambda config: config.eval.__delattr__("batch_size"))
    with pytest.raises(ValueError, match=r"^RUN: .*is not one of skysense_jax .*batch_size.*the version that trained"):
        loading.load(str(dense_run))


def test_run_without_a_whole_checkpoint_is_refused(dense_run, tmp_path, capsys):
    run = shutil.copytree(dense_run, tmp_path / "run")
    for path in (run / "checkpoints").rglob("*"):
        if path.is_file() and path.parent.name == "d":  # the arrays
            path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SystemExit):
        report.main([str(run)])
    said = capsys.readouterr().err
    assert said.startswith("error: no checkpoint in ")
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: None, "has no folder checkpoints; wanted the --workdir of skysense_jax.train"),
        (lambda path: path.mkdir(), "has no folder checkpoints"),
        (lambda path: (path / "checkpoints").mkdir(parents=True), "holds checkpoints of the steps []; wanted at least"),
        (lambda path: path.write_text("no run"), "got the file"),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(make, told, tmp_path, capsys):
    make(tmp_path / "run")
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert said.startswith("error: RUN: ")
    assert told in said
    assert said.count("\n") == 1


def test_damaged_metrics_and_options_are_refused(dense_run, tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text("{not json}\n")
    with pytest.raises(ValueError, match=r"RUN: .*metrics.jsonl is no file of JSON lines"):
        course.read_lines(path)
    path.write_text('{"step": 1, "loss": 2.0}\n{"loss": 1.0}\n')
    with pytest.raises(ValueError, match=r"RUN: .*metrics.jsonl, line 2: wanted an object with a step"):
        course.read_lines(path)
    for text in ("[1]", '{"teacher": {"osm/miou": 1}}', '{"step": 3, "teacher": 4}', "{"):
        (tmp_path / "probe.json").write_text(text)
        with pytest.raises(ValueError, match=r"RUN: .*probe.json is not what skysense_jax.train writes"):
            course.read_probes(tmp_path / "probe.json")
    with pytest.raises(SystemExit):
        report.main([str(dense_run), "--num_test=0"])
    assert "--num_train, --num_test, --num_shown: wanted 1 or more" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        report.main(["gs://bucket/run"])
    assert "--out: wanted a file" in capsys.readouterr().err
    for out in (tmp_path, tmp_path / "nowhere" / "page.html"):
        with pytest.raises(SystemExit):
            report.main([str(dense_run), f"--out={out}"])
        assert f"--out: got {out}; wanted a file in a folder" in capsys.readouterr().err
