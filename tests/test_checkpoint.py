"""What is saved comes back to the bit on any mesh; what is damaged is found, told and passed over."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from states import assert_bits_equal, make_state, open_run, placed, put, save, save_and_wait, saved_run

from skysense_jax import checkpoint, manifest
from skysense_jax.checkpoint import restore_params
from skysense_jax.digests import tree_digests

TESTS = pathlib.Path(__file__).parent


def largest_file(directory: pathlib.Path) -> pathlib.Path:
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_bytes(path: pathlib.Path, *, places=(0.5,)):
    content = bytearray(path.read_bytes())
    for place in places:
        content[int(len(content) * place)] ^= 0x10
    path.write_bytes(bytes(content))


def damage(directory: pathlib.Path):
    flip_bytes(largest_file(directory / "state"))  # arrays: random numbers do not compress, so half-way is payload


@pytest.mark.parametrize("least_slice_bytes", [0, checkpoint._LEAST_SLICE_BYTES])
def test_round_trip_over_three_meshes_keeps_every_bit(tmp_path, monkeypatch, least_slice_bytes):
    monkeypatch.setattr(checkpoint, "_LEAST_SLICE_BYTES", least_slice_bytes)
    want = make_state(1)
    checkpoints = open_run(tmp_path)
    assert save(checkpoints, 1, put(want, (2, 4)))
    for step, shape in ((2, (4, 2)), (3, (1, 1))):
        restored = checkpoints.restore_latest(placed(want, shape))
        assert restored.step == step - 1
        assert restored.data_state == {"global_next_index": 8 * (step - 1), "nested": {"epochs": [1, 2]}}
        assert restored.meta == {"config": "a = 1\n"}
        assert_bits_equal(restored.state, want)
        kernel = restored.state.student["stage"]["kernel"]
        assert kernel.sharding == placed(want, shape).student["stage"]["kernel"].sharding
        assert save(checkpoints, step, restored.state)
    checkpoints.close()


def test_save_compiles_nothing_for_small_arrays_that_many_devices_hold(tmp_path, monkeypatch):
    state, events = put(make_state(width=24), (2, 4)), []
    digests = tree_digests(state)
    monkeypatch.setattr(checkpoint, "tree_digests", lambda saved: digests)
    listener = lambda event, seconds, **more: events.append(event)  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    checkpoints = open_run(tmp_path)
    assert save(checkpoints, 1, state)
    checkpoints.close()
    jax.monitoring.unregister_event_duration_listener(listener)
    assert not [event for event in events if event.endswith("backend_compile_duration")]


def test_restore_latest_of_a_fresh_workdir_is_none(tmp_path):
    checkpoints = open_run(tmp_path / "new")
    assert checkpoints.restore_latest(placed(make_state(), (1, 1))) is None
    checkpoints.close()


def test_save_then_overwrite_of_donated_arrays_is_safe(tmp_path):
    want = make_state(1)
    state = jax.tree.map(jnp.array, put(want, (2, 4)))
    scramble = jax.jit(lambda s: jax.tree.map(lambda x: -x - x.dtype.type(7), s), donate_argnums=0)
    spare = jax.tree.map(jnp.array, state)
    scramble(spare)  # compiled here, so that it runs while the save below still reads
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(spare))
    checkpoints = open_run(tmp_path)
    assert save(checkpoints, 1, state)
    for _ in range(5):
        state = scramble(state)
    jax.block_until_ready(state)
    assert_bits_equal(checkpoints.restore_latest(placed(want, (2, 4))).state, want)
    checkpoints.close()


def test_save_happens_on_the_interval_when_forced_and_once_a_step(tmp_path):
    checkpoints = open_run(tmp_path, every_steps=5, keep_last=10)
    state = put(make_state(), (1, 1))
    assert [step for step in range(1, 12) if save(checkpoints, step, state)] == [5, 10]
    assert save(checkpoints, 11, state, force=True)
    assert not save(checkpoints, 11, state, force=True)
    checkpoints.wait()
    assert checkpoints.steps() == [5, 10, 11]
    checkpoints.close()


def test_keep_policies_keep_the_newest_and_the_multiples(tmp_path):
    checkpoints = saved_run(tmp_path, steps=range(1, 9), keep_last=2, keep_every_steps=3)
    checkpoints.close()
    with pytest.raises(ValueError, match=r"--step: no checkpoint in .* was probed"):
        checkpoint.asked_step(tmp_path, "best")
    assert checkpoints.steps() == [3, 6, 7, 8]


def _save_scored(checkpoints, scores):
    for step, score in scores.items():
        checkpoints.save(step, put(make_state(step), (1, 1)), data_state={}, meta={"config": ""}, score=score)
    checkpoints.wait()


def test_keep_best_keeps_the_newest_of_the_best_also_across_a_restart(tmp_path, errors):
    with pytest.raises(ValueError, match="--step: got 'worst'; wanted a number, or best"):
        checkpoint.asked_step(tmp_path, "worst")
    checkpoints = open_run(tmp_path, keep_last=2, keep_best=True)
    _save_scored(checkpoints, {1: 0.2, 2: 0.7, 3: 0.7, 4: None, 5: 0.1, 6: 0.3})
    checkpoints.close()
    assert checkpoints.steps() == [3, 5, 6]
    assert [checkpoint.asked_step(tmp_path, asked) for asked in ("best", "5", 6, None)] == [3, 5, 6, None]
    (tmp_path / "checkpoints" / "5" / "meta" / "metadata").write_bytes(b"{")  # its score is not known any more
    checkpoints = open_run(tmp_path, keep_last=2, keep_best=True)
    assert checkpoints.restore_latest(placed(make_state(), (1, 1))).meta == {"config": ""}
    _save_scored(checkpoints, {7: 0.6, 8: 0.8})
    assert checkpoints.steps() == [3, 7, 8]  # the best before stays until the new one has its manifest
    _save_scored(checkpoints, {9: 0.0, 10: 0.0})
    checkpoints.close()
    assert checkpoints.steps() == [8, 9, 10]


def test_keep_by_hours_keeps_what_was_saved_so_long_after_the_last_kept_also_across_restarts(tmp_path, monkeypatch):
    hour = 0.0
    monkeypatch.setattr(checkpoint.time, "time", lambda: 1.8e9 + 3600 * hour)
    for step, saved_at in enumerate([0.0, 0.4, 0.9, 1.0, 1.5, 2.1, 2.2, 2.3], 1):
        hour = saved_at
        checkpoints = open_run(tmp_path, keep_last=2, keep_every_hours=1.0)
        save_and_wait(checkpoints, step)
        hour += 0.05  # when its last file is written
        checkpoints.close()
    assert checkpoints.steps() == [1, 4, 6, 7, 8]


def test_save_data_state_that_json_changes_is_refused(tmp_path):
    checkpoints = open_run(tmp_path)
    with pytest.raises(ValueError, match="does not survive JSON"):
        checkpoints.save(1, put(make_state(), (1, 1)), data_state={"position": (1, 2)}, meta={})
    checkpoints.close()


def test_restore_flipped_byte_behind_the_manifest_falls_back_and_the_run_goes_on(tmp_path, errors):
    """Damage that the files' hashes do not show, as of memory before they were written."""
    saved_run(tmp_path).close()
    newest = tmp_path / "checkpoints" / "2"
    damage(newest)
    manifest.write(epath.Path(newest))
    checkpoints = open_run(tmp_path)
    restored = checkpoints.restore_latest(placed(make_state(), (1, 1)))
    assert restored.step == 1
    assert_bits_equal(restored.state, make_state(1))
    assert "step 2" in errors[0]
    assert "is damaged: 1 arrays are not what was saved: " in errors[0]  # Orbax itself restored it without a word
    assert (tmp_path / "damaged_checkpoints" / "2" / "state").exists()
    assert save(checkpoints, 2, put(make_state(2), (1, 1)))  # the step is reached again
    assert_bits_equal(checkpoints.restore_latest(placed(make_state(), (1, 1))).state, make_state(2))
    checkpoints.close()


def _damaged(content: bytes, how: str) -> bytes | None:
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :] if content else b"?"
    return dict(truncated=content[:middle], emptied=b"", flipped=flipped, removed=None)[how]


def test_every_file_truncated_emptied_flipped_or_removed_is_found_and_passed_over(tmp_path, errors):
    """All damages of all files: none is restored, none ends in anything but the checkpoint before."""
    checkpoints = saved_run(tmp_path, steps=(1, 2))
    newest = tmp_path / "checkpoints" / "2"
    files = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file())
    assert {"MANIFEST.json", "commit_success.txt", "_CHECKPOINT_METADATA"} <= set(map(str, files))
    assert len(files) > 15
    kept = tmp_path / "kept"
    shutil.copytree(newest, kept)
    found = {}
    for file in files:
        for how in ("truncated", "emptied", "flipped", "removed"):
            content = (kept / file).read_bytes()
            damaged = _damaged(content, how)
            if damaged == content:
                continue  # nothing of an empty file can be taken away
            if damaged is None:
                (newest / file).unlink()
            else:
                (newest / file).write_bytes(damaged)
            errors.clear()
            restored = checkpoints.restore_latest(placed(make_state(), (1, 1)))
            found[file, how] = restored.step == 1 and "step 2" in errors[0] and not newest.exists()
            if how == "flipped":
                assert_bits_equal(restored.state, make_state(1))
            shutil.copytree(kept, newest)
            checkpoints = open_run(tmp_path)
    checkpoints.close()
    assert len(found) > 3 * len(files)
    assert all(found.values()), [what for what, was_found in found.items() if not was_found]


@pytest.mark.parametrize("damage", ["truncated", "no meta", "no state", "another position"])
def test_restore_unreadable_newest_falls_back_whatever_its_manifest_says(tmp_path, errors, monkeypatch, damage):
    monkeypatch.setattr(manifest, "problem", lambda directory: "")
    saved_run(tmp_path).close()
    newest = tmp_path / "checkpoints" / "2"
    if damage == "truncated":
        path = largest_file(newest / "state")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "no meta":
        largest_file(newest / "meta").write_text("{")
    elif damage == "another position":
        (path,) = (p for p in (newest / "data").rglob("*") if p.is_file() and b"global_next_index" in p.read_bytes())
        path.write_text(path.read_text().replace("16", "17"))
    else:
        (newest / "state").rename(tmp_path / "elsewhere")
    checkpoints = open_run(tmp_path)
    assert checkpoints.restore_latest(placed(make_state(), (1, 1))).step == 1
    assert len(errors) == 2  # damaged, moved
    checkpoints.close()


@pytest.mark.parametrize("error", [PermissionError, MemoryError, jax.errors.JaxRuntimeError])
def test_restore_error_that_says_nothing_of_the_files_is_not_damage(tmp_path, errors, monkeypatch, error):
    saved_run(tmp_path).close()
    checkpoints = open_run(tmp_path)

    def fail(*args, **kwargs):
        raise error("not the files")

    monkeypatch.setattr(checkpoint.ocp.PyTreeCheckpointHandler, "restore", fail)
    with pytest.raises(error, match="not the files"):
        checkpoints.restore_latest(placed(make_state(), (1, 1)))
    assert checkpoints.steps() == [1, 2]
    assert errors == []
    checkpoints.close()


def test_restore_all_damaged_is_an_error_that_names_each_and_moves_nothing(tmp_path, errors):
    saved_run(tmp_path).close()
    for step in (1, 2):
        damage(tmp_path / "checkpoints" / str(step))
    checkpoints = open_run(tmp_path)
    with pytest.raises(RuntimeError, match=r"(?s)no checkpoint in .*step 2: .*step 1: "):
        checkpoints.restore_latest(placed(make_state(), (1, 1)))
    assert checkpoints.steps() == [1, 2]
    checkpoints.close()


def test_restore_newest_that_was_not_sealed_does_not_count_and_a_run_killed_in_its_first_begins_anew(tmp_path, errors):
    """Killed between Orbax's last file and the manifest."""
    saved_run(tmp_path).close()
    (tmp_path / "checkpoints" / "2" / manifest.NAME).unlink()
    checkpoints = open_run(tmp_path)
    assert checkpoints.restore_latest(placed(make_state(), (1, 1))).step == 1
    assert "the checkpoint of step 2 was not written to its end" in errors[0]
    assert (tmp_path / "unfinished_checkpoints" / "2" / "state").exists()
    checkpoints.close()
    (tmp_path / "checkpoints" / "1" / manifest.NAME).unlink()
    checkpoints = open_run(tmp_path)
    assert checkpoints.restore_latest(placed(make_state(), (1, 1))) is None
    assert save(checkpoints, 1, put(make_state(1), (1, 1)))
    checkpoints.close()


def test_restore_older_without_a_manifest_is_damaged(tmp_path, errors):
    saved_run(tmp_path).close()
    (tmp_path / "checkpoints" / "1" / manifest.NAME).unlink()
    damage(tmp_path / "checkpoints" / "2")
    checkpoints = open_run(tmp_path)
    with pytest.raises(RuntimeError, match=r"(?s)step 2: state/.* is changed.*step 1: there is no MANIFEST.json"):
        checkpoints.restore_latest(placed(make_state(), (1, 1)))
    checkpoints.close()


_SAVE_ON_A_FULL_DISK = """
import resource, sys
from skysense_jax import checkpoint
from states import open_run, save_and_wait
checkpoint._SHOWS_UP_S = 0.5
checkpoints = open_run(sys.argv[1])
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, most))  # writes beyond it fail as on a full disk
save_and_wait(checkpoints, 2)
"""


def test_disk_that_is_full_is_told_and_the_checkpoint_before_stays(tmp_path):
    saved_run(tmp_path, steps=(1,)).close()
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(TESTS), str(TESTS.parent)]))
    command = [sys.executable, "-c", _SAVE_ON_A_FULL_DISK, str(tmp_path)]  # its writers end with it, as a run's would
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert re.search("File too large|EFBIG|is the disk full", done.stderr), done.stderr
    checkpoints = open_run(tmp_path)
    restored = checkpoints.restore_latest(placed(make_state(), (1, 1)))
    assert restored.step == 1
    assert_bits_equal(restored.state, make_state(1))
    assert save(checkpoints, 2, put(make_state(2), (1, 1)))
    checkpoints.close()


def test_directory_that_vanishes_is_told(tmp_path):
    checkpoints = saved_run(tmp_path, steps=(1,))
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("a file stands where the directory was")
    with pytest.raises(OSError, match="checkpoints"):
        save_and_wait(checkpoints, 2)


def test_restore_partially_written_directory_is_ignored(tmp_path, errors):
    saved_run(tmp_path).close()
    newest = tmp_path / "checkpoints" / "2"
    newest.rename(newest.with_name("2.orbax-checkpoint-tmp"))
    checkpoints = open_run(tmp_path)
    assert checkpoints.restore_latest(placed(make_state(), (1, 1))).step == 1
    assert errors == []
    checkpoints.close()


def test_restore_another_model_says_which_leaves(tmp_path):
    saved_run(tmp_path).close()
    checkpoints = open_run(tmp_path)
    other = make_state(width=24)
    del other.teacher["half"]
    other.student["prompts"] = np.zeros(2, np.float32)
    with pytest.raises(ValueError, match="holds another state than this config builds") as error:
        checkpoints.restore_latest(placed(other, (1, 1)))
    text = str(error.value)
    assert "1 only in the checkpoint: teacher/half" in text
    assert "1 only in this run: student/prompts" in text
    assert "student/stage/kernel: saved (16, 8) float32, wanted (16, 24) float32" in text
    assert "config.model" in text
    assert checkpoints.steps() == [1, 2]
    checkpoints.close()


def test_restore_meta_is_checked_before_the_arrays(tmp_path):
    saved_run(tmp_path).close()
    checkpoints, seen = open_run(tmp_path), []

    def refuse(meta):
        seen.append(meta)
        raise ValueError("config.model.width differs")

    with pytest.raises(ValueError, match="width differs"):
        checkpoints.restore_latest(placed(make_state(width=24), (1, 1)), check_meta=refuse)
    assert seen == [{"config": "a = 1\n"}]
    checkpoints.close()


def test_restore_another_dtype_is_refused_rather_than_cast(tmp_path):
    saved_run(tmp_path, steps=(1,)).close()
    other = make_state().replace(teacher=jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_state().teacher))
    checkpoints = open_run(tmp_path)
    with pytest.raises(ValueError, match=r"teacher/half: saved .* float32, wanted .* bfloat16"):
        checkpoints.restore_latest(placed(other, (1, 1)))
    checkpoints.close()


def test_restore_params_needs_to_know_the_teacher_only(tmp_path):
    saved_run(tmp_path, mesh=(2, 4)).close()
    teacher = make_state().teacher
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), teacher)
    restored = restore_params(tmp_path, shapes)
    assert restored.step == 2
    assert_bits_equal(restored.state, make_state(2).teacher)
    assert all(leaf.sharding.device_set == {jax.local_devices()[0]} for leaf in jax.tree.leaves(restored.state))
    assert_bits_equal(restore_params(tmp_path, shapes, step=1).state, make_state(1).teacher)
    with pytest.raises(ValueError, match=r"steps \[1, 2\]; wanted step 7"):
        restore_params(tmp_path, shapes, step=7)
    with pytest.raises(ValueError, match="there is no"):
        restore_params(tmp_path / "nowhere", shapes)


def test_restore_params_takes_the_steps_that_process_0_found(tmp_path, monkeypatch):
    """Of a run that trains on, another process lists one more."""
    saved_run(tmp_path).close()
    shapes = placed(make_state(), (1, 1)).teacher
    assert restore_params(tmp_path, shapes).step == 2
    process_0 = {"broadcast_one_to_all": lambda here: np.asarray([1] if np.ndim(here) else 1)}
    monkeypatch.setattr(checkpoint, "multihost_utils", types.SimpleNamespace(**process_0))
    monkeypatch.setattr(checkpoint, "jax", types.SimpleNamespace(**{**vars(jax), "process_count": lambda: 2}))
    assert restore_params(tmp_path, shapes).step == 1
    assert restore_params(tmp_path, shapes, step=2).step == 2


def test_restore_params_damaged_newest_falls_back_without_touching_the_files(tmp_path, errors):
    saved_run(tmp_path).close()
    for path in (tmp_path / "checkpoints" / "2" / "state").rglob("*"):
        if path.is_file() and path.stat().st_size > 4096:  # which of the data files hold the teacher differs by save
            flip_bytes(path, places=[i / 64 for i in range(8, 60)])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_state().teacher)
    assert restore_params(tmp_path, shapes).step == 1
    assert (tmp_path / "checkpoints" / "2").exists()
    with pytest.raises(RuntimeError, match="step 2: "):
        restore_params(tmp_path, shapes, step=2)
