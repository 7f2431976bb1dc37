"""Probes of a run on labelled datasets: the scores of the command, asked for where training asks."""

import shutil
from unittest import mock

import jax
import made_folders
import numpy as np
import pytest
from micro import task_config

from skysense_jax import assembly, outputs
from skysense_jax.assembly import make_pipeline
from skysense_jax.eval.probes import MAX_CELLS
from skysense_jax.tasks import evaluate, frozen, linear, loading, probing


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return made_folders.labelled_records(tmp_path_factory.mktemp("probed") / "records")


@pytest.fixture(scope="module")
def run():
    return assembly.assemble(task_config())


def _config(*datasets):
    config = task_config()
    config.eval.update(datasets=datasets, num_test_scenes=0, batch_size=8)
    return config


def _shown(config, run, directory):
    return outputs.Outputs(config, run, make_pipeline(config), directory, outputs.read_labelled(config, run))


def test_scores_are_those_of_the_command_and_the_main_ones_rank(run, run_dir, folder, tmp_path, monkeypatch):
    shown = _shown(
        _config(("land", str(folder), "segmentation"), ("kinds", f"bigearthnet:{folder}", "")), run, tmp_path
    )
    encoded, encode = [], frozen.encode
    monkeypatch.setattr(frozen, "encode", lambda *args, **how: encoded.append(0) or encode(*args, **how))
    found = shown.probe(4, loading.load(run_dir).params)
    assert len(encoded) == 4  # train and test of two datasets, whatever is asked of the features
    monkeypatch.undo()
    wanted = {}
    for name, task, protocol in (("land/", "segmentation", "linear"), ("land/knn_", "segmentation", "knn")):
        request = dict(dataset=str(folder), task=task, protocol=protocol, max_cells=MAX_CELLS)
        scores = evaluate.evaluate(evaluate.Request(model=str(run_dir), **request))["scores"]
        wanted |= {f"{name}{score}": value for score, value in scores.items() if not score.startswith("iou/")}
    request = dict(dataset=f"bigearthnet:{folder}", protocol="linear")
    scores = evaluate.evaluate(evaluate.Request(model=str(run_dir), **request))["scores"]
    wanted |= {f"kinds/{score}": value for score, value in scores.items()}
    assert found == pytest.approx(wanted, abs=1e-9)
    assert shown.rank(found) == pytest.approx(np.mean([wanted["land/miou"], wanted["kinds/map_micro"]]))
    assert shown.rank({**found, "kinds/map_micro": None}) is None  # a mean over fewer is another measure
    assert shown.rank({"land/miou": 0.5}) is None
    assert shown.probe_seconds > 0


def test_scenes_rank_where_nothing_labelled_is_given(run, tmp_path):
    shown = _shown(_config(), run, tmp_path)
    assert shown.rank({"osm/miou": 0.25, "height/miou": 0.75, "road/miou": None, "osm/knn_miou": 0.9}) == 0.5
    assert shown.rank({}) is None
    assert shown.probe(1, None) == {}


def test_dataset_that_is_torn_meanwhile_costs_a_run_its_own_probe_only(run, run_dir, folder, tmp_path, caplog):
    mine = shutil.copytree(folder, tmp_path / "mine")
    entries = (("torn", f"bigearthnet:{mine}", ""), ("there", f"bigearthnet:{folder}", ""))
    shown = _shown(_config(*entries), run, tmp_path)
    for path in mine.glob("*.array_record"):
        path.write_bytes(bytes(path.stat().st_size))
    found = shown.probe(4, loading.load(run_dir).params)
    assert set(found) == {"there/map_micro", "there/map_macro"}
    assert "config.eval.datasets: 'torn' was not probed" in caplog.text


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (("a", "nowhere", "scene"), "'a': --dataset: nowhere is no folder"),
        (("b", "{folder}", ""), "'b': --task: missing; records do not say theirs"),
        (("c", "{folder}", "change"), "'c': --task: records hold no 'change'"),
        (("d", "{folder}", "scene"), "'d': --task: 'train/0' has several classes"),
        (("e", "levir_cd:{folder}", "scene"), "'e': --task: got scene; the card 'levir_cd' is of change"),
    ],
)
def test_wrong_entry_is_named_before_anything_is_encoded(run, folder, entry, said):
    config = _config(tuple(text.format(folder=folder) for text in entry))
    with pytest.raises(ValueError, match=f"config.eval.datasets: {said}"):
        outputs.read_labelled(config, run)


def _several(monkeypatch, told):
    """As if there were ``len(told)`` processes; each is None for one that says what this one says."""
    gather = lambda mine: np.stack([mine if each is None else each for each in told])  # noqa: E731
    monkeypatch.setattr(outputs.jax, "process_count", lambda: len(told))
    monkeypatch.setattr(outputs.multihost_utils, "process_allgather", gather)


def test_processes_that_read_other_examples_are_told_apart(run, folder, monkeypatch):
    config = _config(("kinds", f"bigearthnet:{folder}", ""))
    _several(monkeypatch, [None, None])
    (probed,) = outputs.read_labelled(config, run)
    assert probed.facts.splitlines()[1:6] == [
        "dark",
        "dry",
        "wet",
        str(sorted(probed.model.num_dates.items())),
        "train/0",
    ]
    assert probed.model.num_dates["s1"] == 1  # as many as the records have
    _several(monkeypatch, [None, np.zeros(32, np.uint8), None])
    with pytest.raises(ValueError, match=r"config.eval.datasets: processes \[1\] read other examples than process 0"):
        outputs.read_labelled(config, run)
    with pytest.raises(ValueError, match="'kinds': --dataset: nowhere"):  # what this one could not read comes first
        outputs.read_labelled(_config(("kinds", "nowhere", "scene")), run)


def test_processes_of_which_one_cannot_read_a_dataset_any_more_all_go_on_without_it(run, folder, monkeypatch, errors):
    (probed,) = outputs.read_labelled(_config(("kinds", f"bigearthnet:{folder}", "")), run)
    _several(monkeypatch, [None, np.array([True])])
    assert probed.scores(None) == {}
    monkeypatch.setattr(probing, "read_whole", mock.Mock(side_effect=OSError("half a record")))
    _several(monkeypatch, [None, np.array([False])])
    assert probed.scores(None) == {}
    assert "'kinds' was not probed: processes [1] cannot read it" in errors[0]
    assert "processes [0] cannot read it: half a record" in errors[1]


def test_processes_that_find_nothing_to_fit_all_go_on_and_another_error_ends_them(run, folder, monkeypatch, errors):
    (probed,) = outputs.read_labelled(_config(("kinds", f"bigearthnet:{folder}", "")), run)
    _several(monkeypatch, [None, None])
    monkeypatch.setattr(frozen, "evaluate", mock.Mock(side_effect=linear.NothingToFitError("no cell")))
    assert probed.scores(None) == {}
    assert "'kinds' was not probed: no cell" in errors[0]
    monkeypatch.setattr(frozen, "evaluate", mock.Mock(side_effect=ValueError("half a record")))
    with pytest.raises(ValueError, match="half a record"):
        probed.scores(None)


def test_dataset_that_may_not_be_read_is_told_by_its_field(run, folder, monkeypatch):
    denied = mock.Mock(side_effect=PermissionError(13, "Permission denied"))
    monkeypatch.setattr("skysense_jax.tasks.evaluate.asked_dataset", denied)
    with pytest.raises(ValueError, match=r"^config\.eval\.datasets: .*Permission denied"):
        outputs.read_labelled(_config(("kinds", f"bigearthnet:{folder}", "")), run)


def test_dry_run_says_what_is_probed(run, folder):
    (probed,) = outputs.read_labelled(_config(("kinds", f"bigearthnet:{folder}", "")), run)
    assert str(probed) == "kinds, multi_label, s2, s1, 3 classes; 4 to train on, 4 to test on"
    assert jax.tree.leaves(probed.model.params) == []
