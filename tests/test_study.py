"""benchmarks/study.py: every row can be built, a killed study goes on, tables of known figures."""

import json
import math
import sys
import threading
from concurrent import futures

import jax
import numpy as np
import pytest

from benchmarks import distil, study
from configs import tiny
from skysense_jax import assembly, modalities, sharding
from skysense_jax import config as config_lib
from skysense_jax.data import scenes
from skysense_jax.export import names
from skysense_jax.models import skysense

TASKS = ("osm", *scenes.ATTRIBUTES)


def _boxed(config):
    """Shapes of the network's parameters."""
    rows = modalities.select(config.data.modalities)
    network = skysense.build(rows, **config.model)
    shapes = assembly.batch_shapes(config, rows)
    init = lambda batch: network.init(jax.random.key(0), batch, train=False)  # noqa: E731
    return sharding.unbox(jax.eval_shape(init, shapes)["params"])


def _size(params, *parts):
    return sum(leaf.size for part in parts for leaf in jax.tree.leaves(params[part]))


def test_every_row_is_a_config_that_is_taken_and_differs_from_its_questions_first():
    for question, rows in study.QUESTIONS.items():
        texts = set()
        for row, variant in rows.items():
            config = study.applied(tiny.get_config(), variant.fields)
            config_lib.validate(config, num_devices=4)
            texts.add((config_lib.flat_text(config), variant.reads, variant.trained))
            assert set(variant.reads) <= set(config.data.modalities), f"{question}/{row}"
        assert len(texts) == len(rows), question


def test_every_network_of_the_study_can_be_built_and_sharing_compares_equal_sizes():
    models = {}
    for row, variant in study.ROWS.items():
        config = study.applied(tiny.get_config(), variant.fields)
        if row not in ("queries/4", "queries/64"):  # as the other queries
            models.setdefault(str(config.model), (row, config))
    built = {row: _boxed(config) for row, config in models.values()}
    assert len(built) == 7
    sizes = {row: _size(params, "backbone") for row, params in built.items()}
    base = sizes["losses/all"]
    assert sizes["sharing/per_modality"] == pytest.approx(base, rel=0.03)
    assert sizes["prompts/off"] < base < sizes["experts/last"]
    assert sizes["merging/separate"] > base
    assert built["queries/256"]["queries"]["queries"].shape[0] == 256
    assert "stage3" not in built["experts/first"]["backbone"]
    assert "stage4" not in built["experts/last"]["backbone"]
    with_prompts = _size(built["losses/all"], "backbone", "fusion")
    assert study.num_parameters(tiny.get_config()) == with_prompts


@pytest.mark.parametrize("row", ["sharing/per_modality", "experts/first"])
def test_export_refuses_a_form_that_is_there_to_compare_with(row):
    config = study.applied(tiny.get_config(), study.ROWS[row].fields)
    rows = modalities.select(config.data.modalities)
    with pytest.raises(ValueError, match=r"config\.model\.backbone\.(shared: got False|moe_from: got 'start')"):
        list(names.weights(rows, backbone=config.model.backbone, fusion=config.model.fusion))


# ---- going on


class Killed(Exception):
    pass


class Trained:
    """In the place of training and probing: what was asked for, and a kill at the n-th run."""

    def __init__(self, kill_at=None):
        self.runs, self.probes, self._kill_at = [], [], kill_at

    def train(self, config, fields, seed):
        if len(self.runs) == self._kill_at:
            raise Killed
        self.runs.append((fields.get("model.backbone.num_prompts", 4), seed))
        assert config.optim.seed == seed
        return None, 1.5

    def score(self, config, workdir, variant):
        self.probes.append(variant.title)
        scores = {task: 0.1 * config.optim.seed + 0.01 * i for i, task in enumerate(TASKS)}
        return {f"{task}/{kind}": score for task, score in scores.items() for kind in ("miou", "knn_miou")}


def _measure(tmp_path, trained, *, config=None, rows=None, **given):
    rows = rows or {row: study.ROWS[row] for row in ("prompts/on", "prompts/off")}
    given = dict(seeds=2, store=study.Store(tmp_path), train=trained.train, score=trained.score) | given
    return study.measure(rows, config or tiny.get_config(), **given)


@pytest.fixture(autouse=True)
def _no_networks(request, monkeypatch):
    if "network" not in request.node.name:
        monkeypatch.setattr(study, "num_parameters", lambda config: 1000 + config.model.backbone.num_prompts)


def test_study_that_was_killed_goes_on_with_what_is_missing(tmp_path):
    first = Trained(kill_at=3)
    with pytest.raises(Killed):
        _measure(tmp_path, first)
    assert first.runs == [(4, 0), (0, 0), (4, 1)]
    second = Trained()
    found = _measure(tmp_path, second)
    assert second.runs == [(0, 1)]
    assert {row: sorted(of_row) for row, of_row in found.items()} == {"prompts/on": [0, 1], "prompts/off": [0, 1]}
    assert found["prompts/off"][1]["parameters"] == 1000
    assert _measure(tmp_path, Trained(kill_at=0)) == found
    assert not list(tmp_path.rglob("*.incomplete"))


def test_study_out_of_minutes_begins_no_run_and_gives_what_is_there(tmp_path):
    trained = Trained()
    _measure(tmp_path, trained, seeds=1)
    late = Trained(kill_at=0)
    found = _measure(tmp_path, late, until=-math.inf)
    assert {row: sorted(of_row) for row, of_row in found.items()} == {"prompts/on": [0], "prompts/off": [0]}


def test_figures_of_another_config_are_refused(tmp_path):
    _measure(tmp_path, Trained(), seeds=1)
    config = tiny.get_config()
    config.optim.num_steps = 77
    with pytest.raises(ValueError, match="another config or number of steps; take another --out"):
        _measure(tmp_path, Trained(), config=config, seeds=1)


def test_run_asked_by_several_rows_is_trained_once(tmp_path, monkeypatch):
    asked = []

    def train(config, config_file, workdir, records, **fields):
        workdir.mkdir(parents=True)
        asked.append(fields)
        return {"minutes": 2.0}

    monkeypatch.setattr(study.learning, "train", train)
    runs = study.Runs("configs/tiny.py", tmp_path, tmp_path / "records")
    for row in ("losses/all", "dropped/hr", "merging/averaged", "queries/16", "prompts/off"):
        fields = {**study.ROWS[row].fields, "optim.seed": 0}
        assert runs.train(study.applied(tiny.get_config(), fields), fields, 0)[1] == 2.0
    assert asked == [{"optim.seed": 0}, {"model.backbone.num_prompts": 0, "optim.seed": 0}]


def test_rows_of_one_config_are_scored_once(tmp_path):
    trained = Trained()
    rows = {
        row: study.ROWS[row]
        for row in ("losses/all", "losses/mgcl_off", "prompts/on", "merging/averaged", "dropped/hr")
    }
    found = _measure(tmp_path, trained, rows=rows, seeds=1)
    assert trained.probes == ["all losses", "L_MGCL left out", "without hr"]
    assert found["prompts/on"] == found["merging/averaged"] == found["losses/all"]
    assert found.keys() == rows.keys()


def test_untrained_network_is_scored_without_a_run(tmp_path):
    trained = Trained()
    rows = {row: study.ROWS[row] for row in ("losses/all", "losses/untrained")}
    found = _measure(tmp_path, trained, rows=rows, seeds=2)
    assert trained.runs == [(4, 0), (4, 1)]
    assert trained.probes == ["all losses", "untrained"] * 2
    assert [found[row][1]["steps"] for row in rows] == [300, 0]
    assert _measure(tmp_path, Trained(kill_at=0), rows=rows) == found


def test_run_that_another_process_is_at_is_waited_for(tmp_path, monkeypatch):
    begun, go_on, asked = threading.Event(), threading.Event(), []

    def train(config, config_file, workdir, records, **fields):
        asked.append(workdir.name)
        begun.set()
        assert go_on.wait(60)
        return {"minutes": 2.0}

    monkeypatch.setattr(study.learning, "train", train)
    ask = lambda: study.Runs("configs/tiny.py", tmp_path, tmp_path / "records").train(tiny.get_config(), {}, 0)  # noqa: E731
    with futures.ThreadPoolExecutor() as pool:
        first = pool.submit(ask)
        assert begun.wait(60)
        second = pool.submit(ask)
        assert futures.wait([second], timeout=0.5).not_done
        go_on.set()
        assert first.result() == second.result()
    assert len(asked) == 1


def test_kill_while_a_run_is_noted_leaves_no_half_a_note(tmp_path, monkeypatch):
    def train(config, config_file, workdir, records, **fields):
        workdir.mkdir(parents=True, exist_ok=True)
        return {"minutes": 2.0}

    def half(path, text):
        with path.open("w") as file:
            file.write(text[: len(text) // 2])
        raise Killed

    monkeypatch.setattr(study.learning, "train", train)
    given = (tiny.get_config(), {"optim.seed": 0}, 0)
    with monkeypatch.context() as killed:
        killed.setattr(study.pathlib.Path, "write_text", half)
        with pytest.raises(Killed):
            study.Runs("configs/tiny.py", tmp_path, tmp_path / "records").train(*given)
    assert study.Runs("configs/tiny.py", tmp_path, tmp_path / "records").train(*given)[1] == 2.0
    assert not list(tmp_path.rglob("*.incomplete"))


# ---- tables


def _figures(*seeds, parameters=2000):
    """Of each seed the label classes' mIoU; the other tasks have twice that, neighbours half."""
    made = {}
    for seed, value in enumerate(seeds):
        scores = {f"{task}/miou": 2 * value for task in TASKS} | {"osm/miou": value}
        scores |= {f"{task}/knn_miou": value / 2 for task in TASKS}
        made[seed] = {"scores": scores, "steps": 300, "parameters": parameters}
    return made


def test_interval_is_students():
    values = [0.30, 0.34, 0.35]
    half = 4.302653 * np.std(values, ddof=1) / np.sqrt(3)  # the quantile of two degrees of freedom, from a table
    found = study.interval(values)
    assert found.mean == pytest.approx(0.33)
    assert found.half == pytest.approx(half, rel=1e-6)
    assert str(found) == f"33.0 ± {100 * half:.1f}"
    assert str(study.interval([0.25])) == "25.0"


def test_table_pairs_differences_by_seed_and_says_what_was_not_run():
    found = {
        "losses/all": _figures(0.30, 0.34, 0.35),
        "losses/mgcl_off": _figures(0.28, 0.32, parameters=1999),
        "prompts/off": _figures(0.2),
    }
    text = study.table(found)
    heads = "osm | hidden attributes | osm, neighbours | hidden attributes, neighbours"
    assert text.startswith(f"| losses | parameters | seeds | {heads} |")
    assert "| all losses | 2,000 | 3 | 33.0 ± 6.6 | 66.0 ± 13.1 | 16.5 ± 3.3 | 16.5 ± 3.3 |" in text
    assert "| L_MGCL left out | 1,999 | 2 | -2.0 ± 0.0 | -4.0 ± 0.0 | -1.0 ± 0.0 | -1.0 ± 0.0 |" in text
    assert "| L_QSACL left out | not run |" in text
    alone = study.table({**found, "losses/mgcl_off": _figures(0.28, 0.32, 0.33, 0.9)})
    assert "| L_MGCL left out | 2,000 | 3 | -2.0 ± 0.0 |" in alone  # of four seeds three have a pair
    found["losses/all"][0]["scores"][f"{TASKS[-1]}/miou"] = None
    assert "| all losses | 2,000 | 3 | 33.0 ± 6.6 | - | 16.5 ± 3.3 | 16.5 ± 3.3 |" in study.table(found)
    assert "| no prompts | 2,000 | 1 | 20.0 | 40.0 | 10.0 | 10.0 |" in text  # nothing to be above of
    assert "| granularity |" not in text
    assert "6 figures, runs of 300 steps" in text


def test_picture_shows_each_seed_of_each_row_that_was_run(tmp_path, monkeypatch):
    found = {"losses/all": _figures(0.3, 0.4), "losses/mgcl_off": _figures(0.2)}
    drawn, save = [], study.drawing.save
    monkeypatch.setattr(study.drawing, "save", lambda figure, path: drawn.append(figure) or save(figure, path))
    path = study.picture(tmp_path / "study.png", found)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    labels, hidden = drawn[0].axes
    assert [label.get_text() for label in labels.get_yticklabels()] == ["all losses", "L_MGCL left out"]
    assert [axes.get_xlabel() for axes in (labels, hidden)] == [
        f"{x}, mIoU in points" for x in ("osm", "hidden attributes")
    ]
    for axes, times in ((labels, 1), (hidden, 2)):
        dots = [line for line in axes.lines if line.get_marker() == "."]
        shown = [line.get_xdata() / times for line in dots]
        assert [list(of_row.round(9)) for of_row in shown] == [[30.0, 40.0], [20.0]]
        assert [list(line.get_ydata()) for line in dots] == [[0, 0], [1]]
        assert [float(bar.lines[0].get_xdata()[0]) / times for bar in axes.containers] == pytest.approx([35.0, 20.0])
    for nothing in ({}, {"losses/all": _figures(0.3, 0.4), "merging/averaged": _figures(0.3, 0.4)}):
        assert study.picture(tmp_path / "none.png", nothing) is None
    assert not (tmp_path / "none.png").exists()


# ---- the command


def test_list_says_what_is_there_and_runs_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study.learning, "write_records", lambda *args: pytest.fail("a run was begun"))
    study.run(study.parse([f"--out={tmp_path}", "--list", "--only=prompts"]))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["prompts/on", "prompts/off"]
    assert all(line.endswith("seeds there: none") for line in lines)


def test_command_writes_raw_figures_and_prints_the_table(tmp_path, capsys, monkeypatch):
    trained = Trained()
    monkeypatch.setattr(study.learning, "write_records", lambda config, out: out / "records")
    monkeypatch.setattr(study.Runs, "train", lambda self, *args: trained.train(*args))
    monkeypatch.setattr(study.Runs, "score", lambda self, *args: trained.score(*args))
    flags = [f"--out={tmp_path}", "--only=prompts/off", "--seeds=2", "--steps=40", f"--json={tmp_path / 'raw.json'}"]
    study.run(study.parse(flags))
    assert "| no prompts | 1,000 | 2 | 5.0 ± 63.5 |" in capsys.readouterr().out
    raw = json.loads((tmp_path / "raw.json").read_text())
    assert raw["prompts/off"]["1"]["scores"]["osm/miou"] == 0.1
    assert raw["prompts/off"]["1"]["steps"] == 40


def test_study_whose_directory_is_gone_goes_on_from_the_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study.learning, "write_records", lambda config, out: out / "records")
    raw = tmp_path / "raw.json"

    def run(out, row, seeds):
        trained = Trained()
        monkeypatch.setattr(study.Runs, "train", lambda self, *args: trained.train(*args))
        monkeypatch.setattr(study.Runs, "score", lambda self, *args: trained.score(*args))
        study.run(study.parse([f"--out={tmp_path / out}", f"--json={raw}", f"--only={row}", f"--seeds={seeds}"]))
        return trained.runs

    assert run("a", "prompts/off", 1) == [(0, 0)]
    assert run("b", "prompts", 2) == [(4, 0), (4, 1), (0, 1)]
    assert run("c", "prompts/on", 1) == []
    with pytest.raises(ValueError, match=r"raw.json: prompts/on was made with another config or number of steps"):
        study.run(study.parse([f"--out={tmp_path / 'd'}", f"--json={raw}", "--only=prompts/on", "--steps=40"]))
    study.run(study.parse([f"--out={tmp_path / 'd'}", f"--json={raw}", "--only=prompts", "--list"]))
    assert not (tmp_path / "d").exists()  # nothing of another config stands in its way
    rows = json.loads(raw.read_text())
    assert {row: list(of_row) for row, of_row in rows.items()} == {"prompts/off": ["0", "1"], "prompts/on": ["0", "1"]}
    for wrong in ("[1]", "{", '{"prompts/on": {"first": {}}}'):
        raw.write_text(wrong)
        with pytest.raises(ValueError, match=r"--json: .*raw.json holds something else than figures of a benchmark"):
            run("d", "prompts/on", 1)
        assert raw.read_text() == wrong


def test_unknown_row_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        study.parse([f"--out={tmp_path}", "--only=loses"])
    assert "--only: no loses; wanted one of losses, granularity" in capsys.readouterr().err


# ---- distillation


def test_distilled_row_learns_from_its_own_seeds_teacher(tmp_path, monkeypatch, capsys):
    asked = []

    def train(config, config_file, workdir, records, **fields):
        workdir.mkdir(parents=True)
        asked.append((workdir, config.optim.num_steps, fields))
        return {"minutes": 2.0}

    monkeypatch.setattr(study.learning, "train", train)
    config = study.study_config("configs/tiny.py", steps=50)
    runs = distil.Runs("configs/tiny.py", tmp_path, tmp_path / "records")
    score = lambda *args: {f"{task}/{kind}": 0.5 for task in TASKS for kind in ("miou", "knn_miou")}  # noqa: E731
    rows = {row: distil.ROWS[row] for row in ("distillation/distilled", "distillation/teacher")}
    found = study.measure(rows, config, seeds=2, store=study.Store(tmp_path), train=runs.train, score=score)
    assert [fields["optim.seed"] for _, _, fields in asked] == [0, 0, 1, 1]  # teachers are trained once
    for teacher, student in (asked[:2], asked[2:]):
        assert teacher[2]["model.backbone.width"] == 64
        assert student[2]["objective.distil.teacher"] == str(teacher[0])
        assert student[2]["objective.weights.distil"] == 1
        assert student[2]["objective.weights.mgcl"] == 0
        assert teacher[1] == student[1] == 50
    made_by = found["distillation/teacher"][1]["config"]
    text = study.table(found, distil.QUESTIONS)
    monkeypatch.setattr(study, "measure", lambda rows, config, *, store, **given: found)
    monkeypatch.setattr(study.learning, "write_records", lambda config, out: out / "records")
    monkeypatch.setattr(sys, "argv", ["distil", f"--out={tmp_path}", f"--json={tmp_path / 'raw.json'}"])
    distil.main()
    assert capsys.readouterr().out == f"{text}\n"
    assert study.Store(tmp_path / "other", tmp_path / "raw.json").get("distillation/teacher", 1, made_by=made_by)
    assert "| tiny alone | not run |" in text
    assert "| tiny distilled | 1,004 | 2 | 50.0 ± 0.0 |" in text
