"""Where the numbers of a run go: JSON lines always, TensorBoard and Weights & Biases on request, a progress line.

Only process 0 writes. ``MetricBuffer`` keeps a step's numbers on the device until a later step is under way, so that
the host never waits for the step in flight. What is logged is decided in train.py, pictures are drawn in eval/.
The directory is one of a file system, since object stores cannot append: storage.py copies it into a bucket.
"""

import collections
import importlib
import io
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from absl import logging

from skysense_jax.storage import Directory

FILE_NAME = "metrics.jsonl"
_ID_FILE = "wandb_id.txt"
CONTINUED = (FILE_NAME, _ID_FILE)  # files that a run which goes on reads again


@runtime_checkable
class Sink(Protocol):
    """Something that keeps numbers by step."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Keeps the numbers of ``step``."""

    def close(self) -> None:
        """Everything is on disk (or sent) when it returns."""


class JsonLines:
    """``WORKDIR/metrics.jsonl``: an object per write with "step", "time" (seconds since 1970) and the numbers.

    JSON has no NaN: what is not finite is null there, and "nonfinite" says what it was, e.g. {"loss": "nan"}.
    """

    def __init__(self, path: pathlib.Path, *, resumed_step: int):
        _drop_after(path, resumed_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        line: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        for name, number in numbers.items():
            line[name] = number if math.isfinite(number) else None
        nonfinite = {name: str(number) for name, number in numbers.items() if not math.isfinite(number)}
        if nonfinite:
            line["nonfinite"] = nonfinite
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_json_lines(path: Directory) -> list[dict[str, Any]]:
    """The objects of a metrics file; a last line that was cut off while being written is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _drop_after(path: pathlib.Path, step: int) -> None:
    """Leaves the lines up to ``step``, so that a step which a resumed run takes again does not stand there twice."""
    if not path.exists():
        return
    kept = [line for line in read_json_lines(path) if line["step"] <= step]
    replacement = path.with_suffix(".jsonl.tmp")
    replacement.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(replacement, path)


class TensorBoard:
    """Event files; a viewer hides events after ``resumed_step`` that an earlier process wrote."""

    def __init__(self, directory: pathlib.Path, *, resumed_step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=resumed_step + 1)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of that service; the id is kept in the working directory, so that a resumed run goes on in it."""

    def __init__(self, workdir: pathlib.Path, *, project: str, settings: Mapping[str, Any]):
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise ValueError(
                f"config.run.wandb_project is {project!r}, but the package wandb is not installed: "
                'pip install --editable ".[wandb]", or set config.run.wandb_project=""'
            ) from error
        id_file = workdir / _ID_FILE
        if not id_file.exists():
            id_file.write_text(wandb.util.generate_id())
        self._run = wandb.init(
            project=project, id=id_file.read_text(), resume="allow", dir=str(workdir), config=dict(settings)
        )

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


class Writers:
    """Several sinks as one; a context manager that closes them."""

    def __init__(self, sinks: Sequence[Sink]):
        self._sinks = tuple(sinks)

    def write(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Keeps the numbers (anything that ``float`` takes) of ``step``."""
        numbers = {name: float(number) for name, number in numbers.items()}
        for sink in self._sinks:
            sink.write(step, numbers)

    def close(self) -> None:
        """Everything is on disk (or sent) when it returns."""
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> "Writers":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


def open_writers(
    workdir: str | pathlib.Path,
    *,
    resumed_step: int = 0,
    tensorboard: bool = True,
    wandb_project: str = "",
    settings: Mapping[str, Any] | None = None,
) -> Writers:
    """The writers of this process: none but on process 0.

    ``resumed_step``: the step the run goes on from (0: none was saved); what JSON lines and TensorBoard hold of later
    steps is dropped. ``settings``: the config's fields, for a service that shows them.

    Raises:
      ValueError: Weights & Biases is asked for and not installed.
    """
    if jax.process_index() != 0:
        return Writers([])
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    sinks: list[Sink] = []
    if wandb_project:  # first: if it is not installed, nothing has been touched
        sinks.append(WeightsAndBiases(workdir, project=wandb_project, settings=settings or {}))
    sinks.append(JsonLines(workdir / FILE_NAME, resumed_step=resumed_step))
    if tensorboard:
        sinks.append(TensorBoard(workdir / "tensorboard", resumed_step=resumed_step))
    return Writers(sinks)


class MetricBuffer:
    """Numbers of steps that may still be running.

    ``flush_ready`` converts those of all but the newest ``lag`` steps: the host waits for earlier steps at most, and
    so never runs further ahead of the device than ``lag`` steps.
    """

    def __init__(self, *, lag: int = 1):
        self._lag = lag
        self._pending: collections.deque[tuple[int, Any]] = collections.deque()

    def push(self, step: int, metrics: Any) -> None:
        """Takes a tree of device arrays and starts their way to the host."""
        for leaf in jax.tree.leaves(metrics):
            if isinstance(leaf, jax.Array):
                leaf.copy_to_host_async()
        self._pending.append((step, metrics))

    def flush_ready(self) -> list[tuple[int, Any]]:
        """(step, the same tree of numpy arrays) of every step but the newest ``lag``, oldest first."""
        return self._take(self._lag)

    def flush(self) -> list[tuple[int, Any]]:
        """The same for all steps; waits for the last."""
        return self._take(0)

    def _take(self, left: int) -> list[tuple[int, Any]]:
        taken = []
        while len(self._pending) > left:
            step, metrics = self._pending.popleft()
            taken.append((step, jax.tree.map(np.asarray, metrics)))
        return taken


class Progress:
    """A line on the terminal, rewritten in place, or a log line now and then where there is no terminal.

    The rate does not count the first update after the start, which compiles.
    """

    def __init__(
        self,
        num_steps: int,
        *,
        stream: io.TextIOBase | None = None,
        every_seconds: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._num_steps, self._clock, self._every_seconds = num_steps, clock, every_seconds
        self._stream = sys.stderr if stream is None else stream
        self._first: tuple[int, float] | None = None
        self._last_shown = -math.inf
        self._silent = jax.process_index() != 0

    def update(self, step: int, loss: Any, remarks: str = "") -> None:
        """Says where the run is, ``step`` steps being done; ``remarks`` stand at the line's end."""
        now = self._clock()
        if self._first is None:
            self._first = (step, now)
        due = self._stream.isatty() or now - self._last_shown >= self._every_seconds or step == self._num_steps
        if self._silent or not due:
            return
        self._last_shown = now
        steps, seconds = step - self._first[0], now - self._first[1]
        text = f"step {step}/{self._num_steps}  loss {float(loss):.4f}"
        if steps and seconds > 0:
            text += f"  {_rate_text(steps / seconds)}  {_time_text((self._num_steps - step) * seconds / steps)} left"
        if remarks:
            text += f"  {remarks}"
        if self._stream.isatty():
            self._stream.write(f"\r\x1b[2K{text}")
            self._stream.flush()
        else:
            logging.info("%s", text)

    def close(self) -> None:
        """Leaves the line on the terminal."""
        if self._stream.isatty() and not self._silent:
            self._stream.write("\n")
            self._stream.flush()


def _rate_text(steps_per_second: float) -> str:
    return f"{steps_per_second:.2f} steps/s" if steps_per_second >= 1 else f"{1 / steps_per_second:.2f} s/step"


def _time_text(seconds: float) -> str:
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if days >= 2:
        return f"{days:.1f} days"
    if hours >= 1:
        return f"{int(hours)} h {int(minutes % 60):02d} min"
    return f"{int(minutes)} min {int(seconds % 60):02d} s" if minutes >= 1 else f"{int(seconds)} s"
