"""The numbers of speed, on a clock that the test turns: what is counted into which interval, and what is left out."""

import types

import pytest

from skysense_jax import measure


class Loop:
    """A loop as train.py's, of steps that take ``seconds`` on the device and batches that take ``wait`` to come."""

    def __init__(self, *, kind="cpu", memory=(None, None, None, None)):
        self.now, self.step, self.free_at = 100.0, 0, 0.0
        self.wait = self.seconds = 0.0
        devices = [
            types.SimpleNamespace(
                device_kind=kind, process_index=0 if i < 3 else 1, memory_stats=lambda stats=stats: stats
            )
            for i, stats in enumerate(memory)
        ]
        self.clock = measure.StepClock(batch_size=6, batch_flops=8e15, devices=devices, clock=lambda: self.now)
        self.batches = self.clock.watch(self._read())

    def _read(self):
        while True:
            self.now += self.wait
            yield object()

    def turn(self):
        """A batch, a step under way, and the news that the one before is done."""
        next(self.batches)
        before_ended_at = self.free_at
        self.free_at = ended_at = max(self.now, self.free_at) + self.seconds
        self.step += 1
        self.clock.dispatched({"loss": types.SimpleNamespace(is_ready=lambda: self.now >= ended_at)})
        if self.step > 1:
            self.now = max(self.now, before_ended_at)
            self.clock.ended(self.step - 1)
        return self.step - 1

    def run(self, num_steps, *, seconds, wait):
        self.seconds, self.wait = seconds, wait
        for _ in range(num_steps):
            ended = self.turn()
        return ended


def test_interval_starts_where_the_first_step_ended_so_that_it_holds_no_compilation():
    loop = Loop()
    loop.run(1, seconds=600.0, wait=30.0)
    ended = loop.run(5, seconds=2.0, wait=0.5)
    numbers = loop.clock.numbers(ended)
    assert numbers["step_seconds"] == pytest.approx(2.0)
    assert numbers["samples_per_second"] == pytest.approx(3.0)


def test_what_is_left_out_is_no_part_of_a_step_and_waits_for_the_one_in_flight(monkeypatch):
    loop = Loop()
    waited = []
    monkeypatch.setattr(measure.jax, "block_until_ready", waited.append)
    loop.run(2, seconds=2.0, wait=0.5)
    loop.clock.numbers(1)
    loop.run(3, seconds=2.0, wait=0.5)
    with loop.clock.left_out():
        loop.now += 1000.0
        loop.free_at += 1000.0
    ended = loop.run(3, seconds=2.0, wait=0.5)
    assert loop.clock.numbers(ended)["step_seconds"] == pytest.approx(2.0)
    assert len(waited) == 1


def test_no_interval_no_rates():
    loop = Loop()
    ended = loop.run(2, seconds=2.0, wait=0.5)
    assert loop.clock.numbers(ended) == {}
    assert loop.clock.summary == ""


def test_wait_that_a_running_step_hides_is_counted_and_late_is_nothing():
    loop = Loop()
    loop.clock.numbers(loop.run(3, seconds=2.0, wait=0.5))
    numbers = loop.clock.numbers(loop.run(4, seconds=2.0, wait=0.5))
    assert numbers["step_seconds"] == pytest.approx(2.0)
    assert numbers["input_wait_seconds"] == pytest.approx(0.5)
    assert numbers["input_wait_share"] == pytest.approx(0.25)
    assert numbers["input_late_share"] == 0


def test_input_slower_than_the_step_makes_the_step_time_and_every_batch_late():
    loop = Loop()
    loop.clock.numbers(loop.run(3, seconds=2.0, wait=5.0))
    numbers = loop.clock.numbers(loop.run(4, seconds=2.0, wait=5.0))
    assert numbers["step_seconds"] == pytest.approx(5.0)
    assert numbers["input_wait_share"] == pytest.approx(1.0)
    assert numbers["input_late_share"] == 1
    assert loop.clock.summary == "input 100%"


def test_intervals_do_not_mix():
    loop = Loop()
    loop.clock.numbers(loop.run(4, seconds=2.0, wait=5.0))
    numbers = loop.clock.numbers(loop.run(100, seconds=2.0, wait=0.5))
    # the batch that came before the last look belongs to the interval before it
    assert numbers["input_wait_seconds"] == pytest.approx(0.5)
    assert numbers["step_seconds"] == pytest.approx(2.0, rel=0.02)
    assert numbers["input_late_share"] <= 0.01


def test_utilization_is_the_formulas_flops_over_the_rates_of_all_devices():
    loop = Loop(kind="NVIDIA H200")
    loop.clock.numbers(loop.run(3, seconds=4.0, wait=0.0))
    numbers = loop.clock.numbers(loop.run(3, seconds=4.0, wait=0.0))
    assert numbers["device_teraflops_per_second"] == pytest.approx(8e3 / 4 / 4)
    assert numbers["model_flops_utilization"] == pytest.approx(500 / 989)
    assert loop.clock.summary == "input 0%  MFU 51%"


def test_utilization_of_an_unknown_device_is_absent():
    loop = Loop(kind="NVIDIA H200 NVL")
    numbers = loop.clock.numbers(loop.run(5, seconds=4.0, wait=0.0))
    assert "model_flops_utilization" not in numbers
    assert numbers["device_teraflops_per_second"] == pytest.approx(500)


def test_memory_is_that_of_the_fullest_device_of_this_process():
    gib = 2**30
    stats = [
        dict(bytes_in_use=use * gib, peak_bytes_in_use=peak * gib) for use, peak in ((3, 9), (5, 8), (1, 2), (7, 99))
    ]
    loop = Loop(memory=stats)
    assert loop.clock.numbers(0) == {"device_memory_gib": 5, "device_memory_peak_gib": 9}  # the last is another's
    loop.clock.numbers(loop.run(4, seconds=2.0, wait=0.0))
    assert loop.clock.summary == "input 0%  9.0 GiB"


def test_memory_that_a_backend_counts_in_part_is_given_in_part():
    loop = Loop(memory=[dict(bytes_in_use=2**30), None, None, None])
    assert loop.clock.numbers(0) == {"device_memory_gib": 1}


def test_restart_leaves_out_what_happened_and_begins_with_the_step_it_names():
    loop = Loop()
    loop.clock.numbers(loop.run(4, seconds=2.0, wait=0.5))
    loop.clock.restart(5)
    assert "step_seconds" not in loop.clock.numbers(loop.run(1, seconds=2.0, wait=0.5))
    loop.now += 60.0  # step 5, and what came of it
    ended = loop.run(3, seconds=2.0, wait=0.5)
    assert ended == 7
    assert loop.clock.numbers(ended)["step_seconds"] == pytest.approx(2.0)


def test_watch_ends_with_the_batches():
    loop = Loop()
    assert list(loop.clock.watch(iter("abc"))) == ["a", "b", "c"]
