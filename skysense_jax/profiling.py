"""A trace of some steps of a run, for xprof and TensorBoard, and what it says of the devices' time (trace.py).

Asked for with ``--profile_steps``, a flag and no field of the config: it is a question about one process' run, not part
of what the run is; a field would be saved with every checkpoint and named as changed on the next start. Every process
traces its own host.
"""

import pathlib
import platform
import re
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import jax
from absl import logging

from skysense_jax import trace

FOLDER = "profile"  # under the run's directory
_MOST_STEPS = 100  # a trace grows by megabytes a step, and nothing is learnt after a few


def parse_steps(text: str | None, *, num_steps: int) -> range | None:
    """The steps START to END, both included, of "START:END"; None of nothing.

    Raises:
      ValueError: no such range, or not inside the run of ``num_steps``.
    """
    if not text:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text.strip())
    if match is None:
        raise ValueError(f"--profile_steps: got {text!r}; wanted START:END, the first and the last step, e.g. 20:22")
    first, last = int(match[1]), int(match[2])
    if first < 2:
        raise ValueError(f"--profile_steps: got {text!r}; wanted a START of 2 or more: the first step compiles")
    if last < first:
        raise ValueError(f"--profile_steps: got {text!r}; wanted an END not before START")
    if last > num_steps:
        raise ValueError(
            f"--profile_steps: got {text!r}; wanted an END in the run, {num_steps} (config.optim.num_steps)"
        )
    if last - first >= _MOST_STEPS:
        raise ValueError(f"--profile_steps: got {text!r}, {last - first + 1} steps; wanted at most {_MOST_STEPS}")
    return range(first, last + 1)


class Profiler:
    """Runs the steps of a process, and traces some."""

    def __init__(
        self,
        steps: range | None,
        workdir: pathlib.Path,
        *,
        after_step: int,
        begins: Callable[[int], None],
        report: Callable[[int, dict[str, float]], None],
    ):
        """``steps``: those to trace, if any; a file a process in ``workdir/profile/plugins/profile/steps_START_END``.

        ``after_step``: the step that this process goes on from. The next one compiles; of ``steps`` those after it are
        traced, since a run that was stopped and starts again with the same command must go on. ``begins`` is told the
        last of them when the first is about to run, ``report`` the last and the numbers of the trace when it is read.
        """
        self._steps, self._workdir, self._begins, self._report = steps, workdir, begins, report
        self._folder: tempfile.TemporaryDirectory | None = None  # while a trace is being written
        if steps is not None and steps.start < after_step + 2:
            self._steps = range(after_step + 2, steps.stop) if after_step + 2 < steps.stop else None
            logging.warning(
                "--profile_steps: steps %s are asked for; this process goes on after step %d and compiles first: %s",
                _text(steps),
                after_step,
                f"traced are {_text(self._steps)}" if self._steps else "no trace",
            )

    def run(self, step: int, step_fn: Callable, state: Any, batch: Any) -> tuple[Any, Any]:
        """What ``step_fn(state, batch)`` returns, a new state and a tree of arrays.

        Only before the first and after the last step of a trace the host waits for the device, so that whole steps
        stand in it.
        """
        if self._steps is None or step not in self._steps:
            return step_fn(state, batch)
        if step == self._steps.start:
            self._begins(self._steps.stop - 1)
            jax.block_until_ready(state)
            self._start()
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            state, results = step_fn(state, batch)
        if step == self._steps.stop - 1:
            jax.block_until_ready((state, results))
            self._finish()
        return state, results

    def close(self) -> None:
        """Drops a trace that is being written: the run ends inside it."""
        if self._folder is not None:
            jax.profiler.stop_trace()
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every call of a function on the host would slow down what is measured
        self._folder = tempfile.TemporaryDirectory()
        jax.profiler.start_trace(self._folder.name, profiler_options=options)

    def _finish(self) -> None:
        folder, self._folder = self._folder, None
        jax.profiler.stop_trace()
        # jax names the file after the host alone, and the folder after the second: processes of a host would write
        # over each other, and hosts into folders of their own.
        target = self._workdir / FOLDER / "plugins" / "profile" / f"steps_{self._steps.start}_{self._steps.stop - 1}"
        target.mkdir(parents=True, exist_ok=True)
        name = f"{platform.node() or 'host'}_process{jax.process_index()}"
        with folder:
            for suffix in (".xplane.pb", ".trace.json.gz"):
                for written in sorted(pathlib.Path(folder.name).rglob(f"*{suffix}"))[:1]:
                    shutil.move(written, target / (name + suffix))
        logging.info(
            "trace of steps %s: %s; tensorboard --logdir=%s", _text(self._steps), target, self._workdir / FOLDER
        )
        try:
            found = trace.split(trace.read(target / f"{name}.xplane.pb"), num_steps=len(self._steps))
        except Exception:  # whatever a trace of hardware never seen holds: a run does not end for a question about it
            logging.exception("the trace cannot be read here: no split of its time")
            return
        if found is None:
            logging.warning("the trace holds no operation of a device that is known here: no split of its time")
        else:
            logging.info("%s", found.text())
            self._report(self._steps.stop - 1, found.numbers())


def _text(steps: range) -> str:
    return f"{steps.start} to {steps.stop - 1}"
