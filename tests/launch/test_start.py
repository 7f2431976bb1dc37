"""Real processes that check each other before they start: one report, and all of them end."""

import re

CHECK = ["-m", "skysense_jax.preflight", "--config=tests/nano.py", "--start_timeout_s=60"]


def test_command_reports_all_that_differs_and_ends_everywhere(start, tmp_path):
    own = [[f"--workdir={tmp_path / str(i)}", f"--config.optim.learning_rate={rate}"] for i, rate in enumerate((1, 2))]
    outcomes = start(2, [*CHECK, "--config.data.sources=(('none-*', 1.0),)"], per_process=own, timeout_s=100)
    assert [status for status, _ in outcomes] == [1, 1]
    for _, text in outcomes:
        assert "preflight: 2 processes on 1 hosts" in text
        assert "config.optim.learning_rate: got 2.0; wanted 1.0. Start every process with the same" in text
        assert "config.data.sources: 'none-*': no file matches" in text
        assert "workdir: process 1 on " in text
        assert "what process 0 wrote there does not show up on this host" in text
    assert not list(tmp_path.glob("*/.preflight*"))


def test_missing_device_is_named_by_all_and_ends_everywhere(start, tmp_path):
    command = [*CHECK, f"--workdir={tmp_path}"]
    outcomes = start(2, command, devices=(4, 3), per_process=[["--devices_per_process=4"]] * 2, timeout_s=100)
    for status, text in outcomes:
        assert status == 1
        assert "devices: process 1 on " in text
        assert "3 devices; wanted 4 (--devices_per_process)" in text
    assert re.search(r"devices +FAILED", outcomes[0][1])


def test_one_process_is_checked_and_may_start(start, tmp_path):
    ((status, text),) = start(1, [*CHECK, f"--workdir={tmp_path}"], timeout_s=100)
    assert status == 0, text
    assert "preflight: the run may start" in text
    assert not list(tmp_path.iterdir())


def test_mesh_that_does_not_fit_is_told_before_anything_is_written(start, tmp_path):
    command = [*CHECK, f"--workdir={tmp_path}", "--config.mesh.data=3", "--config.data.batch_size=24"]
    ((status, text),) = start(1, command, timeout_s=100)
    assert status == 1
    assert "mesh" in text
    assert "there are 8" in text
    assert not list(tmp_path.iterdir())


def test_process_that_fails_ends_at_once_and_the_others_after_the_heartbeat(start, tmp_path):
    flags = ["--config=tests/nano.py", f"--workdir={tmp_path}", "--heartbeat_timeout_s=10"]
    (waiting, _), (failed, text) = start(2, ["tests/launch/run_failing.py", *flags], timeout_s=150)
    assert failed == 1
    assert "the disk of this process is full" in text
    assert waiting not in (0, -9)  # it ended by itself, and not as if all were well
