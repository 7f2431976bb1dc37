"""What the monitor writes and stops at, on made-up numbers; whole runs under it: test_train.py."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from micro import assembled_once, mono_config

from skysense_jax import metrics, train


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class _Pipeline(train.pipeline_lib.Pipeline):
    def __init__(self):
        pass

    def describe(self, index):
        return f"record {index}"

    def reason(self, index):
        return "truncated"


def _monitor(directory, sinks=(), **fields):
    config = mono_config()
    config.run.update(fields)
    writers = lambda resumed_step: metrics.Writers(sinks)  # noqa: E731
    return train._monitor(config, assembled_once(config), _Pipeline(), writers, start=0, directory=directory)


def _element(bad=(-1,)):
    return {"bad_record": np.array(bad), "record": np.arange(len(bad))}


@pytest.mark.parametrize(("every", "written_with"), [(1, [4]), (3, [6])])
def test_notes_are_written_once_and_not_before_their_step(every, written_with, tmp_path):
    class Sink:
        def __init__(self):
            self.steps = []

        def write(self, step, numbers):
            self.steps += [step] * ("profile/step_seconds" in numbers)

        def close(self):
            pass

    sink = Sink()
    monitor = _monitor(tmp_path, [sink], log_every_steps=every)
    numbers, element = {"loss": jnp.float32(1), "nonfinite_in_row": jnp.float32(0)}, _element()
    for step in range(1, 10):
        if step == 4:
            monitor.note(4, {"profile/step_seconds": 1.0})  # before the numbers of step 3 are written
        monitor.after_step(step, numbers, element)
    monitor.close()
    assert sink.steps == written_with


def test_run_stops_above_the_share_of_bad_records_and_names_them(tmp_path):
    monitor = _monitor(tmp_path, max_bad_record_share=0.02)
    good, bad = (_element([value] + [-1] * 49) for value in (-1, 7))
    numbers = {"loss": jnp.float32(1), "nonfinite_in_row": jnp.float32(0)}
    monitor.after_step(1, numbers, good)
    monitor.after_step(2, numbers, bad)
    monitor.after_step(3, numbers, good)  # 1 of 150: still allowed
    with pytest.raises(RuntimeError, match=r"5 of 200 .*config\.run\.max_bad_record_share=0\.02"):
        monitor.after_step(4, numbers, _element([6, 7, 8, 9] + [-1] * 46))
    lines = lines_of(tmp_path / "quarantine.jsonl")
    assert [(line["step"], line["record"], line["reason"]) for line in lines] == [
        (step, f"record {index}", "truncated") for step, index in ((2, 7), (4, 6), (4, 8), (4, 9))
    ]


def test_run_stops_after_skipped_updates_in_a_row_and_names_their_samples(tmp_path):
    monitor = _monitor(tmp_path, max_nonfinite_in_row=3)
    for step in (1, 2, 3):
        numbers = {"loss": jnp.float32(np.nan), "nonfinite_in_row": jnp.float32(step)}
        monitor.after_step(step, numbers, _element([-1, -1]))
    with pytest.raises(RuntimeError, match=r"config\.run\.max_nonfinite_in_row=3"):
        monitor.close()
    lines = lines_of(tmp_path / "events.jsonl")
    assert [(line["event"], line["in_row"]) for line in lines] == [("update skipped", n) for n in (1, 2, 3)]
    assert lines[1]["samples"] == {"2": ["record 0", "record 1"]}
