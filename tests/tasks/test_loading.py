"""A run and its export load as one network; what is no model is refused before anything is built."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from skysense_jax import checkpoint
from skysense_jax import config as config_lib
from skysense_jax.data import scenes
from skysense_jax.eval.features import sample_features
from skysense_jax.export import write
from skysense_jax.tasks import loading
from skysense_jax.trees import named_leaves


def _features(model, *, seen=True):
    sample = scenes.render(3, seed=1, extent_cells=6, modalities=("s2", "s1"), complete=True).sample
    if not seen:
        blind = lambda series: dataclasses.replace(series, valid=np.zeros_like(series.valid))  # noqa: E731
        sample = dataclasses.replace(sample, series={name: blind(series) for name, series in sample.series.items()})
    (found,) = sample_features(
        model.network, model.params, model.rows, [sample], cells=model.cells, num_dates=model.num_dates, batch_size=4
    )
    return found


def test_run_and_its_export_are_one_network(run_dir, model_dir, tmp_path):
    fused = shutil.copytree(model_dir, tmp_path / "fused")
    (fused / write.HEADS).unlink()  # as --part=fused writes it
    of_run, whole = loading.load(run_dir), loading.load(model_dir, modalities=("s1", "s2"))
    of_export = loading.load(fused)
    assert jax.tree.structure(of_run.params) == jax.tree.structure(whole.params)
    assert of_run.name == "task at step 4"
    assert [row.name for row in of_run.rows] == [row.name for row in of_export.rows] == ["hr", "s2", "s1"]
    assert (of_run.cells, of_run.num_dates) == (of_export.cells, of_export.num_dates) == (4, dict(hr=1, s2=2, s1=2))
    assert of_run.labels == of_export.labels
    ours, theirs = named_leaves(of_run.params), named_leaves(of_export.params)
    assert {path for path in ours if path.split("/")[0] in ("backbone", "fusion")} == set(theirs)
    for path, leaf in theirs.items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(ours[path]), err_msg=path)
    assert [row.name for row in whole.rows] == ["s2", "s1"]
    first, second = _features(whole), _features(dataclasses.replace(of_run, rows=whole.rows))
    np.testing.assert_array_equal(first.fused, second.fused)
    assert first.fused_usable.all()
    nothing = _features(whole, seen=False)
    assert not nothing.fused_usable.any()
    assert np.isfinite(nothing.fused).all()


def test_modality_that_the_model_has_never_seen_is_refused(run_dir):
    with pytest.raises(ValueError, match=r"has never seen \['naip'\]; wanted some of \['hr', 's2', 's1'\]"):
        loading.load(run_dir, modalities=("s2", "naip"))


def test_step_is_that_of_a_checkpoint_of_a_run(run_dir, model_dir):
    assert loading.load(run_dir, step="4").step == 4
    with pytest.raises(ValueError, match=r"of the steps \[4\]; wanted step 3"):
        loading.load(run_dir, step="3")
    with pytest.raises(ValueError, match=r"--step: no checkpoint in .* was probed"):
        loading.load(run_dir, step="best")
    with pytest.raises(ValueError, match=r"--step: got 4; .* is an export, of one step"):
        loading.load(model_dir, step="4")


@pytest.mark.parametrize("field", ["data.label_classes", "efficiency", "model.queries"])
def test_run_of_another_version_is_refused(run_dir, monkeypatch, field):
    """Its config lacks what this version added."""
    config = config_lib.unflatten(checkpoint.read_meta(run_dir)["config"])
    lines = [line for line in config_lib.flat_text(config).splitlines() if not line.startswith(field)]
    monkeypatch.setattr(checkpoint, "read_meta", lambda directory, step: {"config": "\n".join(lines)})
    with pytest.raises(ValueError, match=r"--model: .*run.* is of a config that is not that of skysense_jax"):
        loading.load(run_dir)


def test_what_is_no_model_is_refused(tmp_path, model_dir):
    with pytest.raises(ValueError, match=r"neither checkpoints/ nor config\.json"):
        loading.load(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="wanted at least one"):
        loading.load(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="--model: got the file"):
        loading.load(tmp_path / "file")
    other = tmp_path / "other"
    other.mkdir()
    (other / write.CONFIG).write_text(json.dumps({"model_type": "swinv2"}))
    with pytest.raises(ValueError, match=r"wanted a directory that skysense_jax\.export wrote"):
        loading.load(other)


def _changed(model_dir, out, change):
    shutil.copytree(model_dir, out)
    description = json.loads((out / write.CONFIG).read_text())
    change(description)
    (out / write.CONFIG).write_text(json.dumps(description))
    (out / write.CHECKSUMS).write_text(
        "".join(f"{write._sha256(out / name)}  {name}\n" for name in (write.CONFIG, write.WEIGHTS, write.HEADS))
    )
    return out


def test_export_of_another_architecture_is_refused(tmp_path, model_dir):
    wider = _changed(model_dir, tmp_path / "wider", lambda d: d["backbone"].update(width=64))
    with pytest.raises(ValueError, match=r"config\.model\.backbone\.width: 64, the config has 32"):
        loading.load(wider)
    alone = _changed(model_dir, tmp_path / "alone", lambda d: d.update(fusion=None))
    with pytest.raises(ValueError, match="is a backbone alone"):
        loading.load(alone)
    unknown = _changed(model_dir, tmp_path / "unknown", lambda d: d["training"]["config"].update({"model.turbo": 1}))
    with pytest.raises(ValueError, match=r"is of a config that is not that of skysense_jax"):
        loading.load(unknown)
    bare = _changed(model_dir, tmp_path / "bare", lambda d: d["training"].update(config={"name": "x"}))
    with pytest.raises(ValueError, match=r"training\.config has no data, model, efficiency"):
        loading.load(bare)
    damaged = shutil.copytree(model_dir, tmp_path / "damaged")
    with (damaged / write.WEIGHTS).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(ValueError, match="SHA-256"):
        loading.load(damaged)
