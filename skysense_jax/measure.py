"""How fast a run is: seconds a step, input that is waited for, use of the rated FLOPs, device memory.

The loop runs ahead of the device, and nothing here makes it wait: the numbers come from when the host learns that
earlier steps are done (metrics.MetricBuffer) and from how long it stood waiting for batches. What a step spends inside
the device is seen by a trace only. Next: profiling.py (the trace), chips.py (the rates).
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from skysense_jax import chips


class StepClock:
    """Numbers of the interval between two logged steps.

    The loop dispatches step n + 1 and then learns that step n is done; in a steady run that is when the device ends
    it, so that the time from one logged step to the next, over the steps between, is the step time: also when a single
    look comes late, since the next interval is shorter by as much. What else falls into the interval is in it (a
    checkpoint, pictures), but for what ``restart`` leaves out. The first interval begins where the first step of this
    process ended, so that compilation is in none.

    ``numbers`` holds

    - ``step_seconds`` and ``samples_per_second``;
    - ``input_wait_seconds``: a step's share of the time in which the loop stood waiting for a batch to be read and
      placed, and ``input_wait_share``, the same over ``step_seconds``. A wait costs nothing while a step is running on
      the device, hence
    - ``input_late_share``: steps of which the batch came when the device had nothing to do any more;
    - ``device_teraflops_per_second``: the model's FLOPs by formula that a device does (cost.py; 1e12 a second);
    - ``model_flops_utilization``: the same over the bf16 rate of the chip (chips.py); absent where the device is not in
      that table;
    - ``device_memory_gib`` and ``device_memory_peak_gib``: in use now, and at most so far, on that device of this
      process which has most; absent where the backend does not count, as on a CPU.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        batch_flops: float,
        devices: Sequence[Any],
        clock: Callable[[], float] = time.monotonic,
    ):
        """``batch_flops``: of the model in a step over all ``devices``, those of other processes among them."""
        self._batch_size, self._batch_flops, self._clock = batch_size, batch_flops, clock
        self._num_devices = len(devices)
        self._local = [device for device in devices if device.process_index == jax.process_index()]
        rated = [chips.of_device_kind(device.device_kind) for device in devices]
        self._rated_flops = None if None in rated else sum(chip.flops for chip in rated)
        self._in_flight = None
        self._since: tuple[int, float] | None = None
        self._first, self._wait_seconds, self._late = 0, 0.0, 0
        self.summary = ""  # of the last numbers, for the terminal

    def watch(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches; how long each was waited for is noted."""
        while True:
            before = self._clock()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._wait_seconds += self._clock() - before
            if self._in_flight is not None:
                self._late += all(leaf.is_ready() for leaf in jax.tree.leaves(self._in_flight))
            yield batch

    def dispatched(self, results: Any) -> None:
        """A step is on its way; ``results``: arrays that are ready when it is done."""
        self._in_flight = results

    def ended(self, step: int) -> None:
        """The host has just learnt that ``step`` is done; to be called for every step."""
        if self._since is None and step >= self._first:
            self._start(step)

    def restart(self, step: int) -> None:
        """Leaves out what is not yet in ``numbers``, and all up to where the host learns that ``step`` is done."""
        self._since, self._first = None, max(step, self._first)

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """What the host does meanwhile is no part of a step's time; waits for the step in flight first."""
        jax.block_until_ready(self._in_flight)
        began = self._clock()
        yield
        if self._since is not None:
            step, since = self._since
            self._since = step, since + self._clock() - began

    def numbers(self, step: int) -> dict[str, float]:
        """Those of the steps after the last call up to ``step``, which has just ended."""
        found = _memory(self._local)
        if self._since is not None and step > self._since[0]:
            num_steps, seconds = step - self._since[0], max(self._clock() - self._since[1], 1e-9)
            per_device = self._batch_flops * num_steps / seconds / self._num_devices
            found |= {
                "step_seconds": seconds / num_steps,
                "samples_per_second": self._batch_size * num_steps / seconds,
                "input_wait_seconds": self._wait_seconds / num_steps,
                "input_wait_share": self._wait_seconds / seconds,
                "input_late_share": self._late / num_steps,
                "device_teraflops_per_second": per_device / 1e12,
            }
            if self._rated_flops is not None:
                found["model_flops_utilization"] = per_device * self._num_devices / self._rated_flops
            self.summary = _summary(found)
            self._start(step)
        return found

    def _start(self, step: int) -> None:
        self._since, self._wait_seconds, self._late = (step, self._clock()), 0.0, 0


def _memory(devices: Sequence[Any]) -> dict[str, float]:
    """Bytes in use and their peak, in GiB, the largest over ``devices``; what a backend does not count is absent."""
    stats = [device.memory_stats() or {} for device in devices]
    names = {"bytes_in_use": "device_memory_gib", "peak_bytes_in_use": "device_memory_peak_gib"}
    counted = {name: [s[key] for s in stats if key in s] for key, name in names.items()}
    return {name: max(values) / chips.GIB for name, values in counted.items() if values}


def _summary(numbers: dict[str, float]) -> str:
    parts = [f"input {numbers['input_wait_share']:.0%}"]
    if "model_flops_utilization" in numbers:
        parts.append(f"MFU {numbers['model_flops_utilization']:.0%}")
    if "device_memory_peak_gib" in numbers:
        parts.append(f"{numbers['device_memory_peak_gib']:.1f} GiB")
    return "  ".join(parts)
