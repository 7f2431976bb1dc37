"""The benchmark of few labels: what each row is fitted on, what is stored, what the table says."""

import types

import numpy as np
import pytest

from benchmarks import few_labels, study
from skysense_jax.eval import probes
from skysense_jax.eval.scores import IGNORED
from skysense_jax.modalities import select
from skysense_jax.tasks import frozen


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
        asked.append((row, len(train), len(test), seed))
        value = dict(miou=0.01 * len(train) + 0.1 * seed)
        return {few_labels.TUNED: value} if row == "scratch" else dict.fromkeys(frozen.PROTOCOLS, value)

    monkeypatch.setattr(few_labels, "score", score)
    given = dict(seeds=2, store=study.Store(tmp_path), networks=None)
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
    slower = few_labels.dataclasses.replace(few_labels.TUNING, learning_rate=1e-4)
    for name, value in (("TUNING", slower), ("NUM_TRAIN", 11), ("NUM_TEST", 3)):
        with monkeypatch.context() as edited:
            edited.setattr(few_labels, name, value)
            with pytest.raises(ValueError, match="another config"):
                few_labels.measure(config, ["raw"], **given)
    config.optim.num_steps += 1
    with pytest.raises(ValueError, match="another config"):
        few_labels.measure(config, ["raw"], **given)


def test_raw_bands_are_those_of_the_config_and_need_no_run(config, monkeypatch):
    read = lambda rows, num_dates: ([row.name for row in rows], num_dates)  # noqa: E731
    monkeypatch.setattr(few_labels, "raw_reader", read)
    monkeypatch.setattr(frozen, "evaluate_cells", lambda read, *_, protocols: read)
    found = few_labels.score("raw", config, None, None, None, 0)
    assert found == (["hr", "s2", "s1"], dict(config.data.num_dates))


def test_rows_ask_for_the_weights_and_the_protocol_that_they_name(config, monkeypatch):
    named = lambda name: lambda seed: types.SimpleNamespace(name=name, rows=(), num_dates={})  # noqa: E731
    networks = types.SimpleNamespace(teacher=named("teacher"), untrained=named("untrained"))
    monkeypatch.setattr(frozen, "evaluate", lambda model, *_, protocols: (model.name, protocols))
    monkeypatch.setattr(frozen, "evaluate_cells", lambda read, *_, protocols: ("raw", protocols))
    tune = lambda model, *_, task, options: (model.name, task, options.seed)  # noqa: E731
    monkeypatch.setattr(few_labels.finetune, "finetune", tune)
    found = {row: few_labels.score(row, config, networks, None, None, 3) for row in few_labels.ROWS}
    assert found == {
        "raw": ("raw", frozen.PROTOCOLS),
        "untrained": ("untrained", frozen.PROTOCOLS),
        "teacher": ("teacher", frozen.PROTOCOLS),
        "scratch": {"tuned": ("untrained", "segmentation", 3)},
        "tuned": {"tuned": ("teacher", "segmentation", 3)},
    }
