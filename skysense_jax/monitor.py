"""What a run tells people while it goes: numbers of its steps, and what happened to it, with the samples that it saw.

Numbers of a step are looked at behind the next one, on every process behind the same: so a verdict (watch.py) is one
for all. Next: metrics.py (where numbers go), train.py (what follows from a verdict).
"""

import collections
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from skysense_jax import measure, metrics, watch
from skysense_jax.data.pipeline import Pipeline

_EVENTS, _QUARANTINE, _NORMS = "events", "quarantine", "norms"
_REMEMBERED = 64  # steps whose samples can be named


class Journal:
    """``DIRECTORY/NAME.jsonl``, of further processes ``NAME.PROCESS.jsonl``: a line for each thing that happened.

    Lines are added and never taken away, also where a run goes back or goes on elsewhere.
    """

    def __init__(self, directory: pathlib.Path, name: str):
        self._path = directory / _file(name)

    def write(self, step: int, **facts: Any) -> None:
        """Adds a line with "step", "time" (seconds since 1970) and the facts, which JSON must be able to hold."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "time": round(time.time(), 3), **facts}, allow_nan=False) + "\n")


def _file(name: str) -> str:
    process = jax.process_index()
    return f"{name}.{process}.jsonl" if process else f"{name}.jsonl"


def continued() -> tuple[str, ...]:
    """Files of this process that a run which goes on adds to."""
    return _file(_EVENTS), _file(_QUARANTINE), _file(_NORMS)


class WentWrong(Exception):
    """The loss jumped and stayed high: the run has to go back.

    Attributes:
      spike: the jump.
    """

    def __init__(self, spike: watch.Spike):
        super().__init__(
            f"step {spike.last_step}: the loss is {spike.loss:.4g} and above {spike.limit:.4g} since step "
            f"{spike.first_step}"
        )
        self.spike = spike


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the monitor stops at; fields of ``config.run``."""

    log_every_steps: int
    max_nonfinite_in_row: int
    max_bad_record_share: float
    collapse_stops: bool


class Monitor:
    """Metrics of earlier steps, speed, skipped updates, unreadable records, jumps of the loss, collapse.

    Attributes:
      clock: takes the time of the steps.
    """

    def __init__(
        self,
        *,
        num_steps: int,
        limits: Limits,
        clock: measure.StepClock,
        spikes: watch.LossSpikes,
        collapses: watch.Collapses,
        pipeline: Pipeline,
        open_writers: Callable[..., metrics.Writers],
        start: int,
        directory: pathlib.Path,
    ):
        """``open_writers``: called with ``resumed_step``, at ``start`` and wherever the run goes back to."""
        self._num_steps, self._limits, self.clock = num_steps, limits, clock
        self._spikes, self._collapses = spikes, collapses
        self._notes: tuple[int, dict[str, float]] = (0, {})
        self._pipeline, self._open_writers = pipeline, open_writers
        self._writers = open_writers(resumed_step=start)
        self._events, self._quarantine, self._norms = (
            Journal(directory, name) for name in (_EVENTS, _QUARANTINE, _NORMS)
        )
        self._buffer, self._progress = metrics.MetricBuffer(), metrics.Progress(num_steps)
        self._records = self._bad_records = 0
        self._named: set[int] = set()
        self._samples: collections.deque[tuple[int, list[int]]] = collections.deque(maxlen=_REMEMBERED)

    def after_step(self, step: int, step_metrics: dict[str, jax.Array], element: dict[str, Any]) -> None:
        """Takes the numbers of a step in flight and writes those of earlier ones.

        Raises:
          WentWrong: the loss jumped.
          RuntimeError: a limit is passed.
        """
        self._samples.append((step, np.asarray(element["record"]).tolist()))
        self._count_bad_records(step, element)
        self._buffer.push(step, step_metrics)
        self.clock.dispatched(step_metrics)
        for ready in self._buffer.flush_ready():
            self._write(*ready)

    def note(self, step: int, numbers: dict[str, float]) -> None:
        """Takes numbers that are written with those of ``step``, or of the next step whose are written."""
        self._notes = (step, {**self._notes[1], **numbers})

    def event(self, step: int, event: str, **facts: Any) -> None:
        """Keeps what happened, for people and programs."""
        self._events.write(step, event=event, **facts)

    def keep_norms(self, step: int, norms: Mapping[str, Any]) -> None:
        """Writes norms by layer (norms.py), known to every process alike; null where one is not finite."""
        if jax.process_index() == 0:
            self._norms.write(step, **jax.tree.map(lambda norm: float(norm) if np.isfinite(norm) else None, norms))

    def catch_up(self, step: int) -> None:
        """Writes the numbers up to ``step``, the newest, and waits for it; times begin anew behind the next."""
        self._write_all()
        self.clock.restart(step + 1)

    def go_back(self, step: int, wrong: WentWrong) -> None:
        """The run has gone back to ``step``: numbers of later ones are dropped, their events stay."""
        spike = wrong.spike
        told = f"{wrong}: back to step {step}, past the data of the steps since"
        logging.error("%s; the samples of steps %d to %d are in events.jsonl", told, spike.first_step, spike.last_step)
        self.event(spike.last_step, "went back", to_step=step)
        self._buffer.flush()
        self._writers.close()
        self._writers = self._open_writers(resumed_step=step)
        self.clock.restart(step + 2)

    def close_writers(self) -> None:
        """What was written is on disk (or sent) when it returns."""
        self._writers.close()

    def close(self) -> None:
        """Writes what is left."""
        self._write_all()
        self._progress.close()

    def _write_all(self) -> None:
        for ready in self._buffer.flush():
            self._write(*ready)

    def samples(self, first_step: int, last_step: int) -> dict[str, list[str]]:
        """Step to the names of the samples that this process gave it, as far as it remembers."""
        return {
            str(step): [self._pipeline.describe(index) for index in indices]
            for step, indices in self._samples
            if first_step <= step <= last_step
        }

    def _write(self, step: int, numbers: Mapping[str, np.ndarray]) -> None:
        self.clock.ended(step)
        numbers = {name: float(number) for name, number in numbers.items()}
        self._progress.update(step, numbers["loss"], self.clock.summary)
        in_row = int(numbers["nonfinite_in_row"])
        if in_row:
            logging.warning("step %d: loss or gradient not finite; update skipped, %d in a row", step, in_row)
            self.event(
                step, "update skipped", loss=str(numbers["loss"]), in_row=in_row, samples=self.samples(step, step)
            )
        if step % self._limits.log_every_steps == 0 or step in (1, self._num_steps) or in_row:
            shown = {**numbers, "bad_records": self._bad_records, **self.clock.numbers(step)}
            if step >= self._notes[0]:
                shown, self._notes = {**shown, **self._notes[1]}, (0, {})
            self._writers.write(step, shown)
        if in_row >= self._limits.max_nonfinite_in_row:
            raise RuntimeError(
                f"step {step}: {in_row} updates in a row were skipped because loss or gradient was not finite "
                f"(config.run.max_nonfinite_in_row={self._limits.max_nonfinite_in_row}); the last checkpoint is good. "
                "Lower config.optim.learning_rate, or look at the records of these steps: events.jsonl names them"
            )
        self._judge(step, numbers)

    def _judge(self, step: int, numbers: Mapping[str, float]) -> None:
        told = []
        for found in self._collapses.see(step, numbers):
            told.append(f"{found.signal} is {found.value:.4g}, beyond {found.limit:.4g} for long: {found.means}")
            logging.warning("step %d: collapse: %s", step, told[-1])
            self.event(step, "collapse", **dataclasses.asdict(found))
        if told and self._limits.collapse_stops:
            raise RuntimeError(
                f"step {step}: collapse: {'; '.join(told)} (config.run.watch.collapse_stops). "
                "Look at config.objective's temperatures and config.optim.ema_momentum, and begin again from an "
                "earlier checkpoint"
            )
        if spike := self._spikes.see(step, numbers["loss"]):
            facts = dataclasses.asdict(spike)
            self.event(step, "loss spike", **facts, samples=self.samples(spike.first_step, spike.last_step))
            raise WentWrong(spike)

    def _count_bad_records(self, step: int, element: dict[str, Any]) -> None:
        bad = element["bad_record"]
        self._records += len(bad)
        self._bad_records += int((bad >= 0).sum())
        for index in sorted({int(i) for i in bad if i >= 0} - self._named):
            self._named.add(index)
            name, reason = self._pipeline.describe(index), self._pipeline.reason(index)
            logging.warning("unreadable record skipped: %s: %s", name, reason)
            self._quarantine.write(step, record=name, index=index, reason=reason)
        share, seen_enough = self._bad_records / self._records, self._records >= 100
        if seen_enough and share > self._limits.max_bad_record_share:
            raise RuntimeError(
                f"{self._bad_records} of {self._records} records could not be read "
                f"(config.run.max_bad_record_share={self._limits.max_bad_record_share}); quarantine.jsonl names them"
            )
