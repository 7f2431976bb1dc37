"""Runs and data in gs://bucket, against a server on loopback; addresses and buckets that cannot be used."""

import contextlib
import dataclasses
import pathlib
import re
import sys

import jax
import numpy as np
import pytest
import states
from etils import epath
from micro import StopBehind, assembled_once, created_once
from nano import get_config

from skysense_jax import checkpoint, metrics, outputs, storage, train
from skysense_jax.data import records
from skysense_jax.data.scenes import render
from skysense_jax.export.__main__ import export
from skysense_jax.launch import facts
from skysense_jax.launch.stop import Stopped
from skysense_jax.modalities import select

ROWS = select(("s1",))


@pytest.fixture
def run(emulator, request):
    """The address of a run that nothing is in yet."""
    return epath.Path("gs://bucket") / re.sub(r"\W+", "-", request.node.name)


def _names(run):
    return sorted(path.name for path in run.iterdir())


def _steps(run):
    return [line["step"] for line in metrics.read_json_lines(run / metrics.FILE_NAME)]


# ---- a whole run


def test_run_in_a_bucket_stops_goes_on_and_is_exported_as_one_in_a_directory(run, tmp_path, monkeypatch):
    config = get_config()
    config.run.update(checkpoint_every_steps=2, keep_last=2, tensorboard=True, norms_every_steps=1)
    norms = lambda boxed, state, batch, seed, frozen: {"gradient": {"loss": {"a": 1.0 * state.step}}}  # noqa: E731
    monkeypatch.setattr(train, "assemble", lambda config: dataclasses.replace(assembled_once(config), norms=norms))
    monkeypatch.setattr(train, "create_state", created_once)
    with monkeypatch.context() as patch:
        patch.setattr(outputs.Outputs, "write_pictures", lambda *args: None)
        straight = jax.device_get(train.train(config, tmp_path / "straight"))
        with pytest.raises(Stopped):
            train.train(config, run, stop=StopBehind(1))
    assert _names(run / "checkpoints") == ["1"]
    assert _names(run) == ["checkpoints", "config.txt", "events.jsonl", "metrics.jsonl", "norms.jsonl", "tensorboard"]

    # what a kill right behind a checkpoint would leave
    numbers, save = {}, checkpoint.Checkpoints.save

    def watched(self, step, *args, **kwargs):
        numbers[step] = _steps(run)
        return save(self, step, *args, **kwargs)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", watched)
    resumed = jax.device_get(train.train(config, run))
    assert numbers == {2: [1, 2], 4: [1, 2, 3, 4]}

    wanted, got = (dict(jax.tree_util.tree_leaves_with_path(state)) for state in (straight, resumed))
    for path, value in wanted.items():
        np.testing.assert_array_equal(got[path], value, err_msg=jax.tree_util.keystr(path))
    lines = [metrics.read_json_lines(where / metrics.FILE_NAME) for where in (tmp_path / "straight", run)]
    losses = [[(line["step"], line["loss"]) for line in of_run] for of_run in lines]
    assert losses[0] == losses[1]
    assert _steps(run) == [1, 2, 3, 4]
    assert len(metrics.read_json_lines(run / "events.jsonl")) == 2  # of both starts
    looked = [(line["step"], line["gradient"]["loss"]["a"]) for line in metrics.read_json_lines(run / "norms.jsonl")]
    assert looked == [(1, 0), (2, 1), (3, 2), (4, 3)]  # before each step
    assert _names(run / "checkpoints") == ["2", "4"]
    assert {"views.png", "curves.png"} <= set(_names(run / "pictures"))
    assert len(_names(run / "tensorboard")) == 2  # a file a start
    assert (run / "config.txt").read_text() == (tmp_path / "straight" / "config.txt").read_text()

    weights = []
    for where in (tmp_path / "straight", run):
        out = tmp_path / f"exported-{where.name}"
        assert export(where, out, step=None, weights="teacher", part="fused", licence="", arguments=[]) == 4
        weights.append((out / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert "Losses last logged" in (out / "README.md").read_text()


def test_small_files_that_changed_are_copied_and_kept_if_they_cannot_be(run, monkeypatch):
    (run / "numbers").write_text("a")
    files = storage.SmallFiles(run, fetch=("numbers", "none"))
    assert [path.name for path in files.path.iterdir()] == ["numbers"]
    (files.path / "profile" / "steps").mkdir(parents=True)
    (files.path / "profile" / "steps" / "trace").write_text("t")
    with (files.path / "numbers").open("a") as opened:
        opened.write("b")
    files.send()
    assert (run / "numbers").read_text() == "ab"
    assert (run / "profile" / "steps" / "trace").read_text() == "t"
    (run / "numbers").unlink()
    files.send()
    assert not (run / "numbers").exists()  # it had not changed
    with (files.path / "numbers").open("a") as opened:
        opened.write("c")
    with monkeypatch.context() as patch:
        patch.setattr(type(run), "write_bytes", lambda *args: (_ for _ in ()).throw(OSError("no way")))
        with pytest.raises(OSError, match="no way"):
            files.close()
    assert (files.path / "numbers").read_text() == "abc"
    files.close()
    assert not files.path.exists()
    assert (run / "numbers").read_text() == "abc"


# ---- checkpoints that are not whole


def _restored(run, mesh=(1, 1)):
    opened = states.open_run(run)
    try:
        return opened.restore_latest(states.placed(states.make_state(), mesh))
    finally:
        opened.close()


@pytest.mark.parametrize("damage", ["flipped byte", "no arrays", "no meta"])
def test_damaged_checkpoint_in_a_bucket_is_moved_aside(run, errors, damage):
    states.saved_run(run).close()
    newest = run / "checkpoints" / "2"
    if damage == "flipped byte":
        largest = max((newest / "state" / "d").iterdir(), key=lambda path: path.stat().length)
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 0x10
        largest.write_bytes(bytes(content))
    else:
        (newest / ("state/manifest.ocdbt" if damage == "no arrays" else "meta/metadata")).unlink()
    restored = _restored(run, (2, 4))
    assert restored.step == 1
    states.assert_bits_equal(restored.state, states.make_state(1))
    assert "is damaged" in errors[0]
    assert _names(run / "checkpoints") == ["1"]
    assert _names(run / "damaged_checkpoints") == ["2", "README"]
    assert "state" in _names(run / "damaged_checkpoints" / "2")


def test_checkpoint_that_was_not_finished_is_not_taken(run, errors):
    states.saved_run(run).close()
    (run / "checkpoints" / "2" / "commit_success.txt").unlink()
    assert _restored(run).step == 1
    assert errors == []


def test_checkpoint_copied_from_a_directory_into_a_bucket_is_taken(run, tmp_path):
    states.saved_run(tmp_path, steps=(1,)).close()
    for path in tmp_path.rglob("*"):
        if path.is_file():
            (run / str(path.relative_to(tmp_path))).write_bytes(path.read_bytes())
    restored = _restored(run)
    states.assert_bits_equal(restored.state, states.make_state(1))


@pytest.mark.parametrize("where", [r"2%2Fmeta%2Fmetadata", r"2%2Fstate%2Fmanifest"])
@pytest.mark.parametrize("status", [401, 403])
def test_bucket_that_refuses_to_be_read_is_no_damage(run, emulator, where, status):
    states.saved_run(run).close()
    emulator.failing.append((where, status))
    try:
        with pytest.raises(Exception, match=r"Forbidden|PERMISSION_DENIED|401"):
            _restored(run)
    finally:
        emulator.failing.clear()
    assert _restored(run).step == 2


def test_bucket_that_refuses_a_write_is_told_and_the_checkpoint_before_stays(run, emulator, errors, monkeypatch):
    checkpoints = states.saved_run(run, steps=(1,))
    monkeypatch.setattr(checkpoint, "_SHOWS_UP_S", 0.5)
    emulator.refusing.append([r"upload.*checkpoints%2F2.*state", 403, 1000])
    try:
        with pytest.raises(Exception, match=r"PERMISSION_DENIED|403|Forbidden"):
            states.save_and_wait(checkpoints, 2)
    finally:
        assert emulator.refusing.pop()[2] < 1000
    with contextlib.suppress(Exception):
        checkpoints.close()
    restored = _restored(run)
    assert restored.step == 1
    states.assert_bits_equal(restored.state, states.make_state(1))


def test_bucket_that_does_not_answer_for_a_while_is_asked_again(run, emulator):
    emulator.refusing.append([r"upload.*checkpoints%2F1.*state", 503, 3])
    states.saved_run(run, steps=(1,)).close()
    assert emulator.refusing.pop()[2] == 0
    states.assert_bits_equal(_restored(run).state, states.make_state(1))


# ---- data


def test_records_in_a_bucket_are_read_as_those_in_files(run, tmp_path):
    for shard in range(2):
        with records.ShardWriter(tmp_path / f"{shard}.array_record") as writer:
            for i in range(3):
                scene = render(3 * shard + i, seed=1, extent_cells=8, modalities=("s1",)).sample
                writer.write(records.encode_sample(scene, ROWS))
        (run / f"{shard}.array_record").write_bytes((tmp_path / f"{shard}.array_record").read_bytes())
    here, there = (records.RecordSource(f"{where}/*.array_record", ROWS) for where in (tmp_path, run))
    assert len(here) == len(there) == 6
    for i in range(6):
        assert there[i].id == here[i].id
        np.testing.assert_array_equal(there[i].days("s1"), here[i].days("s1"))
    assert facts.source_facts(f"{run}/*.array_record") == facts.source_facts(f"{tmp_path}/*.array_record")
    assert facts.source_facts(f"{run}/none*")["problem"] == "no file matches"
    with pytest.raises(ValueError, match=r"empty dataset: no file matches 'gs://bucket/.*/none\*'"):
        records.RecordSource(f"{run}/none*", ROWS)


# ---- buckets that cannot be used


def test_bucket_that_is_not_there_is_told_before_anything_starts(emulator):
    told = facts.Token(epath.Path("gs://no-such-bucket/run"), "t").write()
    assert told.startswith("NotFound: ")
    assert "wanted a bucket 'no-such-bucket' that exists, and credentials" in told
    with pytest.raises(ValueError, match=r"config\.data\.sources: 'gs://no-such-bucket/x': NotFound: "):
        records.RecordSource("gs://no-such-bucket/x", ROWS)
    with pytest.raises(ValueError, match="--workdir: gs://no-such-bucket/run: NotFound: "):
        export(
            storage.run_directory("gs://no-such-bucket/run"),
            pathlib.Path("nowhere"),
            step=None,
            weights="teacher",
            part="fused",
            licence="",
            arguments=[],
        )


def test_missing_client_is_told_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    told = storage.problem("gs://bucket/run")
    assert "gcsfs" in told
    assert "pip install --editable '.[gcs]'" in told


def test_missing_credentials_are_told_at_once(emulator, monkeypatch, tmp_path):
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    assert storage.problem("gs://bucket/run").startswith("DefaultCredentialsError: ")


def test_command_ends_in_one_line_before_it_compiles(emulator, start):
    command = ["-m", "skysense_jax.train", "--config=tests/nano.py", "--workdir=gs://no-such-bucket/run"]
    ((status, text),) = start(1, command)
    assert status == 1, text
    assert "--workdir: gs://no-such-bucket/run: NotFound: " in text
    assert "Traceback" not in text


def test_emulator_answers_as_the_service_where_it_matters(run):
    """What the other tests build on: a name that was taken is free again, and listings show what is there."""
    (run / "a" / "x").write_text("1")
    (run / "a").rename(run.parent / f"{run.name}-moved")
    assert not (run / "a").exists()
    assert _names(run.parent / f"{run.name}-moved") == ["x"]


def test_client_that_fails_while_preflight_writes_is_told_in_one_line(monkeypatch):
    token = facts.Token(epath.Path("gs://bucket/run"), "a")

    def fail(*_, **__):
        raise RuntimeError("503, busy\nand more")

    monkeypatch.setattr(storage, "problem", lambda url: "")
    monkeypatch.setattr(type(token._path), "mkdir", fail)
    assert token.write().startswith("RuntimeError: 503, busy (")
