"""Two real processes and any mesh over them: a batch is whole, and copies of a sample are the same sample."""

import json
import re

import made_folders
import numpy as np
import pytest


@pytest.mark.parametrize(
    ("mesh", "wanted"),
    [
        ((1, 1, 2, 2), [list(range(8)), list(range(8))]),  # the processes differ along tensor: both read all
        ((2, 1, 2, 1), [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ((1, 2, 1, 2), [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ],
)
def test_batch_over_two_processes_is_whole_whatever_axis_is_between_them(start, mesh, wanted):
    command = ["tests/launch/place_batch.py", ",".join(map(str, mesh)), "8"]
    outcomes = start(2, command, devices=(2, 2))
    assert [status for status, _ in outcomes] == [0, 0], outcomes
    results = [json.loads(re.search(r"RESULT (.*)", text)[1]) for _, text in outcomes]
    assert [places for places, _, _ in results] == wanted
    rows = 8 // (mesh[0] * mesh[1] * mesh[3])
    for _, whole, held in results:
        assert whole == list(range(8))
        for samples in held.values():
            assert samples == list(range(samples[0], samples[0] + rows))
    of_devices = np.asarray([held[device] for _, _, held in results for device in sorted(held)])
    by_axis = of_devices.reshape(*mesh, rows)
    np.testing.assert_array_equal(by_axis, np.broadcast_to(by_axis[:, :, :1], by_axis.shape))  # alike along tensor


def test_damage_that_one_process_finds_is_damage_for_both(start, tmp_path):
    outcomes = start(2, ["tests/launch/restore_damaged.py", str(tmp_path)], devices=(2, 2), timeout_s=120)
    assert [status for status, _ in outcomes] == [0, 0], outcomes
    assert all("RESTORED 1 1" in text for _, text in outcomes)
    assert "another process could not read it" in outcomes[0][1]
    assert "step 2" in outcomes[1][1]
    assert (tmp_path / "damaged_checkpoints" / "2").is_dir()


def test_labelled_probe_of_two_processes_is_that_of_one_and_other_files_end_both(start, tmp_path):
    command = ["tests/launch/probe_labelled.py", str(made_folders.labelled_records(tmp_path / "mine"))]
    alone = start(1, command, devices=(4,))
    both = start(2, command, devices=(2, 2))
    assert [status for status, _ in alone + both] == [0, 0, 0], alone + both
    wanted, *found = (json.loads(re.search(r"RESULT (.*)", text)[1]) for _, text in alone + both)
    assert {"land/miou", "land/knn_miou"} <= set(wanted)
    assert found == [pytest.approx(wanted, abs=0.02)] * 2  # rounding of sums may move a pixel
    assert found[0] == found[1]
    other = made_folders.labelled_records(tmp_path / "other", each=3)
    outcomes = start(2, command, devices=(2, 2), per_process=[[], [str(other)]], timeout_s=120)
    for status, text in outcomes:
        assert status == 1, text
        assert "config.eval.datasets: processes [1] read other examples than process 0" in text
