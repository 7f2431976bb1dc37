"""The benchmark of few labels: what each row is fitted on, what is stored, what the table says."""

import dataclasses
import sys
import types

import jax
import numpy as np
import pytest
from micro import mono_config

from benchmarks import few_labels, figures, learning, study
from skysense_jax import assembly, sharding
from skysense_jax import config as config_lib
from skysense_jax.checkpoint import Checkpoints
from skysense_jax.data.pipeline import FIRST_STATE
from skysense_jax.eval import probes
from skysense_jax.eval.scores import IGNORED
from skysense_jax.modalities import select
from skysense_jax.tasks import frozen
from skysense_jax.train_state import create_state
from skysense_jax.trees import named_leaves


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setattr(few_labels, "NUM_TRAIN", 10)
    monkeypatch.setattr(few_labels, "NUM_TEST", 2)
    config = study.study_config("configs/tiny.py", steps=300)
    config.data.scenes.extent_cells = 6
    return config


def test_labels_are_those_of_the_scenes_and_raw_bands_those_of_the_probes(config):
    examples = few_labels.labelled_scenes(config, 7, 2)
    rows, num_dates = select(("hr", "s2", "s1")), dict(config.data.num_dates)
    pairs = list(few_labels.raw_reader(rows, num_dates)(examples))
    assert [example.id for example, _ in pairs] == ["7", "8"]
    for example, cells in pairs:
        ids = example.before.labels_window(0, 0, 6)
        assert np.array_equal(np.where(example.target == IGNORED, 0, example.target + 1), ids)
        assert cells.usable.all()
        whole = few_labels.read_whole(example.before, rows, num_dates=num_dates)
        assert np.array_equal(cells.features, probes.raw_bands(whole, rows))


def test_each_share_is_measured_once_and_told(config, tmp_path, monkeypatch, capsys):
    asked = []

    def score(row, config, networks, train, test, seed):
        ids = [int(example.id) for part in (train, test) for example in part]
        assert len(set(ids)) == len(ids)
        assert min(ids) >= config.eval.first_index  # no run trains on these
        name = next(name for name, other in few_labels.ROWS.items() if other is row)
        asked.append((name, len(train), len(test), seed))
        value = dict(miou=0.01 * len(train) + 0.1 * seed + 0.2 * (name == "tuned"))
        protocols = (few_labels.TUNED,) if row.protocol == few_labels.TUNED else frozen.PROTOCOLS
        return dict.fromkeys(protocols, value)

    monkeypatch.setattr(few_labels, "score", score)
    given = dict(seeds=2, store=figures.Store(tmp_path), networks=None)
    assert few_labels.measure(config, ["raw"], **given, until=0.0) == {}
    found = few_labels.measure(config, ["raw", "scratch"], **given)
    wanted = [(row, n, 2, seed) for seed in (0, 1) for row in ("raw", "scratch") for n in (1, 1, 10)]
    assert asked == wanted
    assert few_labels.measure(config, ["raw", "scratch"], **given) == found  # from what is stored
    assert asked == wanted
    lines = few_labels.table(found).splitlines()
    assert lines[2] == "| raw bands 3x3 | linear | 6.0 ± 63.5 | 6.0 ± 63.5 | 15.0 ± 63.5 | 2 |"  # t of one degree: 12.7
    assert "| untrained | knn | not run | not run | not run | 0 |" in lines
    assert "| supervised from scratch, all weights | tuned | 6.0 ± 63.5 | 6.0 ± 63.5 | 15.0 ± 63.5 | 2 |" in lines
    alone = few_labels.measure(config, ["tuned"], seeds=1, store=figures.Store(tmp_path), networks=None)
    lines = few_labels.table({**found, **alone}).splitlines()
    tuned, scratch = few_labels.ROWS["tuned"].title, few_labels.ROWS["scratch"].title
    assert f"| {tuned} - {scratch} | tuned | +20.0 | +20.0 | +20.0 | 1 |" in lines
    assert "| pre-trained - raw bands 3x3 | knn | not run | not run | not run | 0 |" in lines
    monkeypatch.setattr(sys, "argv", ["few_labels", f"--out={tmp_path}", f"--json={tmp_path / 'raw.json'}"])
    with monkeypatch.context() as command:
        command.setattr(few_labels, "measure", lambda config, rows, **given: {**found, **alone})
        command.setattr(learning, "write_records", lambda config, out: out / "records")
        few_labels.main()
    assert capsys.readouterr().out.splitlines() == lines
    store, made_by = figures.Store(tmp_path / "other", tmp_path / "raw.json"), few_labels.fingerprint(config, "tuned")
    assert store.get("few_labels/scratch_0.1", 1, made_by=made_by) == found["few_labels/scratch_0.1"][1]
    again = lambda row: few_labels.measure(config, [row], **given)  # noqa: E731
    slower = dataclasses.replace(few_labels.TUNING, learning_rate=1e-4)
    for name, value, rows in (
        ("TUNING", slower, ["scratch"]),
        ("NUM_TRAIN", 11, ["raw", "scratch"]),
        ("NUM_TEST", 3, ["raw", "scratch"]),
    ):
        with monkeypatch.context() as edited:
            edited.setattr(few_labels, name, value)
            for row in rows:
                with pytest.raises(ValueError, match="another config"):
                    again(row)
            assert rows == ["raw", "scratch"] or again("raw")
    monkeypatch.setattr(few_labels.linear, "INVERSE_PENALTIES", (1.0,))
    assert again("scratch")
    with pytest.raises(ValueError, match="another config"):
        again("raw")
    config.optim.num_steps += 1
    with pytest.raises(ValueError, match="another config"):
        again("scratch")


def test_raw_bands_are_those_of_the_config_and_need_no_run(config, monkeypatch):
    read = lambda rows, num_dates: ([row.name for row in rows], num_dates)  # noqa: E731
    monkeypatch.setattr(few_labels, "raw_reader", read)
    monkeypatch.setattr(frozen, "evaluate_cells", lambda read, *_, protocols: read)
    found = few_labels.score(few_labels.ROWS["raw"], config, None, None, None, 0)
    assert found == (["hr", "s2", "s1"], dict(config.data.num_dates))


def test_rows_ask_for_the_weights_and_the_protocol_that_they_name(config, monkeypatch):
    networks = types.SimpleNamespace(of=lambda fields, seed: fields)
    monkeypatch.setattr(frozen, "evaluate", lambda model, *_, protocols: (model, protocols))
    monkeypatch.setattr(frozen, "evaluate_cells", lambda read, *_, protocols: ("raw", protocols))
    tune = lambda model, *_, task, options: (model, task, options.seed)  # noqa: E731
    monkeypatch.setattr(few_labels.finetune, "finetune", tune)
    found = {name: few_labels.score(row, config, networks, None, None, 3) for name, row in few_labels.ROWS.items()}
    without = {"objective.weights.text_alignment": 0.0}
    assert found == {
        "raw": ("raw", frozen.PROTOCOLS),
        "untrained": (None, frozen.PROTOCOLS),
        "no_text": (without, frozen.PROTOCOLS),
        "teacher": ({}, frozen.PROTOCOLS),
        "scratch": {"tuned": (None, "segmentation", 3)},
        "no_text_tuned": {"tuned": (without, "segmentation", 3)},
        "tuned": {"tuned": ({}, "segmentation", 3)},
    }


def test_networks_are_what_a_run_starts_from_and_its_teacher(tmp_path, monkeypatch):
    """Of both benchmarks: this one's, and the probe that the study scores with."""
    config = mono_config()
    config.model.backbone.num_moe_blocks = 0
    run = assembly.assemble(config)
    mesh, shapes = sharding.make_mesh(**config.mesh), assembly.batch_shapes(config, run.modalities)
    with jax.set_mesh(mesh):
        start = create_state(run.network, run.optimizer, shapes, seed=3, mesh=mesh)
        trained = start.replace(step=start.step + 5, teacher=jax.tree.map(lambda x: x + 1, start.teacher))
        checkpoints = Checkpoints(tmp_path, every_steps=1, keep_last=2, keep_every_steps=100)
        checkpoints.save(5, trained, data_state=FIRST_STATE, meta={"config": config_lib.flat_text(config)})
        checkpoints.close()
    asked = []

    def train(changed, fields, seed):
        asked.append((changed.optim.seed, changed.data.seed, changed.objective.weights.text_alignment, fields))
        return tmp_path, 0.0

    networks = few_labels.Networks(config, types.SimpleNamespace(train=train))
    _same(networks.of(None, 3).params, start.teacher)
    assert asked == []
    _same(networks.of({}, 3).params, trained.teacher)
    _same(networks.of(few_labels.NO_TEXT, 4).params, trained.teacher)
    seeds = lambda seed: {"optim.seed": seed, "data.seed": seed}  # noqa: E731
    weight = config.objective.weights.text_alignment
    assert asked == [(3, 3, weight, seeds(3)), (4, 4, 0.0, {**few_labels.NO_TEXT, **seeds(4)})]
    monkeypatch.setattr(learning, "_held_out_scenes", lambda rows, **which: None)
    monkeypatch.setattr(learning.Probe, "_scores", lambda self, params: params)
    probe = learning.Probe(config)
    _same(probe.untrained(3), start.teacher)
    _same(probe.trained(tmp_path), trained.teacher)


def _same(got, wanted):
    got, wanted = named_leaves(got), named_leaves(wanted)
    assert got.keys() == wanted.keys()
    for path, leaf in wanted.items():
        np.testing.assert_array_equal(np.asarray(got[path]), np.asarray(leaf), err_msg=path)
