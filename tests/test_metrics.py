"""Numbers reach every file, once a step, as valid JSON; the host waits for no step in flight."""

import io
import json
import logging as std_logging
import struct
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from skysense_jax import metrics


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(workdir):
    """(step, tag, value) of every scalar, and the purge steps, read from the record format of event files."""
    scalars, purges = [], []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + size])  # length, its checksum, payload, its checksum
            at += 16 + size
            scalars += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            purges += [event.step] if event.HasField("session_log") else []
    return scalars, purges


def test_write_lands_in_json_lines_and_events(tmp_path):
    with metrics.open_writers(tmp_path / "run") as writer:
        writer.write(5, {"loss": np.float32(1.5), "rate": 2})
        writer.write(10, {"loss": jnp.asarray(0.5)})
    first, second = lines(tmp_path / "run")
    assert {**first, "time": 0} == {"step": 5, "time": 0, "loss": 1.5, "rate": 2.0}
    assert {**second, "time": 0} == {"step": 10, "time": 0, "loss": 0.5}
    assert 0 <= second["time"] - first["time"] < 60
    assert events(tmp_path / "run") == ([(5, "loss", 1.5), (5, "rate", 2.0), (10, "loss", 0.5)], [1])


def test_write_without_tensorboard_makes_no_events(tmp_path):
    with metrics.open_writers(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"loss": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_write_is_on_disk_before_the_writer_is_closed(tmp_path):
    writer = metrics.open_writers(tmp_path, tensorboard=False)
    writer.write(1, {"loss": 1.0})
    assert lines(tmp_path)[0]["loss"] == 1.0
    writer.close()


def test_write_not_finite_is_null_with_its_name(tmp_path):
    with metrics.open_writers(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"loss": float("nan"), "norm": float("-inf"), "rate": 1.0})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line["loss"] is None
    assert line["norm"] is None
    assert line["nonfinite"] == {"loss": "nan", "norm": "-inf"}
    assert line["rate"] == 1.0


def test_resume_drops_later_steps_and_a_line_cut_off(tmp_path):
    with metrics.open_writers(tmp_path) as writer:
        for step in (2, 4, 6, 8):
            writer.write(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # killed while writing
    with metrics.open_writers(tmp_path, resumed_step=4) as writer:
        writer.write(6, {"loss": 66.0})
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(2, 2.0), (4, 4.0), (6, 66.0)]
    assert metrics.read_json_lines(tmp_path / "metrics.jsonl") == lines(tmp_path)
    assert not list(tmp_path.glob("*.tmp"))
    # A viewer hides what was written from step 5 on. Writers begun within one second share a file, the last one's.
    assert events(tmp_path)[1] in ([5], [1, 5])


def test_start_afresh_in_a_directory_without_checkpoint_drops_everything(tmp_path):
    for _ in range(2):
        with metrics.open_writers(tmp_path, resumed_step=0, tensorboard=False) as writer:
            writer.write(1, {"loss": 1.0})
    assert [line["step"] for line in lines(tmp_path)] == [1]


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with metrics.open_writers(tmp_path / "run", wandb_project="never imported") as writer:
        writer.write(1, {"loss": 1.0})
    assert not (tmp_path / "run").exists()


def test_wandb_missing_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # import then fails as if it were not installed
    with pytest.raises(ValueError, match=r'config.run.wandb_project is \'p\'.*pip install --editable ".\[wandb\]"'):
        metrics.open_writers(tmp_path / "run", wandb_project="p")
    assert list((tmp_path / "run").iterdir()) == []


def test_wandb_gets_the_numbers_and_a_resumed_run_goes_on_in_it(tmp_path, monkeypatch):
    inits, logged = [], []
    run = types.SimpleNamespace(log=lambda numbers, step: logged.append((step, numbers)), finish=lambda: None)
    fake = types.SimpleNamespace(
        util=types.SimpleNamespace(generate_id=lambda: f"id{len(inits)}"),
        init=lambda **settings: inits.append(settings) or run,
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (1, 2):
        with metrics.open_writers(
            tmp_path, resumed_step=step - 1, tensorboard=False, wandb_project="p", settings={"optim.seed": 3}
        ) as writer:
            writer.write(step, {"loss": 0.5})
    assert logged == [(1, {"loss": 0.5}), (2, {"loss": 0.5})]
    assert [init["id"] for init in inits] == ["id0", "id0"]
    assert inits[0]["config"] == {"optim.seed": 3}


# ---- what is still on the device


class InFlight:
    """A device array whose reading is recorded; reading one in flight would block."""

    def __init__(self, value, read):
        self.value, self.read = value, read

    def __array__(self, dtype=None, copy=None):
        self.read.append(self.value)
        return np.asarray(self.value)


def test_metric_buffer_never_reads_the_newest_step():
    buffer, read, flushed = metrics.MetricBuffer(), [], []
    for step in range(1, 5):
        buffer.push(step, {"loss": InFlight(step, read)})
        flushed += [(s, int(m["loss"])) for s, m in buffer.flush_ready()]
        assert read == list(range(1, step))
    assert flushed == [(1, 1), (2, 2), (3, 3)]
    assert [(s, int(m["loss"])) for s, m in buffer.flush()] == [(4, 4)]
    assert buffer.flush() == []


def test_metric_buffer_device_arrays_come_back_as_numpy():
    buffer = metrics.MetricBuffer(lag=2)
    for step in range(3):
        buffer.push(step, {"loss": jnp.float32(step), "load": jnp.arange(3) * step})
    ((step, numbers),) = buffer.flush_ready()
    assert step == 0
    assert isinstance(numbers["loss"], np.ndarray)
    assert len(buffer.flush()) == 2


# ---- the progress line


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_progress_terminal_line_has_rate_and_time_left_without_the_first_step():
    clock, stream = Clock(), Terminal()
    progress = metrics.Progress(1000, stream=stream, clock=clock)
    progress.update(1, 9.0)  # compiled for 100 s before
    clock.now += 20
    progress.update(101, 8.0, "input 3%")
    progress.close()
    shown = stream.getvalue().split("\r")
    assert shown[1].endswith("step 1/1000  loss 9.0000")
    assert shown[2].endswith("step 101/1000  loss 8.0000  5.00 steps/s  2 min 59 s left  input 3%\n")


def test_progress_without_terminal_logs_now_and_then_and_the_last(caplog):
    clock, stream = Clock(), io.StringIO()
    progress = metrics.Progress(10, stream=stream, clock=clock, every_seconds=30.0)
    with caplog.at_level(std_logging.INFO):
        for step in range(1, 11):
            progress.update(step, 1.0)
            clock.now += 10
    progress.close()
    assert [record.getMessage().split()[1] for record in caplog.records] == ["1/10", "4/10", "7/10", "10/10"]
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (5, "5 s"),
        (61, "1 min 01 s"),
        (3600 + 120, "1 h 02 min"),
        (86400 * 1.5, "36 h 00 min"),
        (86400 * 82, "82.0 days"),
    ],
)
def test_time_text_is_readable(seconds, text):
    assert metrics._time_text(float(seconds)) == text
