"""Checkpoints of a run: saved in the background, verified when read, restored onto any mesh.

Orbax writes and reads the arrays, but does not notice a flipped byte (30 of 30 trials restored wrong numbers), so a
digest of every array is saved beside them and checked after a restore, and a manifest of all files is the last that is
written: the newest without it was killed before its end and does not count. One that cannot be read or does not verify
is reported, set aside, and the one before it is used (restore.py). What a state consists of: train_state.py. Next:
digests.py, manifest.py.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from skysense_jax import manifest, storage
from skysense_jax.digests import tree_digests
from skysense_jax.restore import (
    CheckMeta,
    DamagedError,
    Restored,
    accept,
    read_notes,
    restore_newest,
    shape_text,
    text_digest,
)
from skysense_jax.trees import named_leaves

_MARKER = "commit_success.txt"  # Orbax's last file
_LOOK_EVERY_S, _SHOWS_UP_S = 0.1, 10.0  # for the marker; network file systems may show it late
DISTIL = "distil"  # of a run's parameters, those that it needs for no longer than it distils
_UNKNOWN = dict(saved_s=0, score=None)
# What several devices hold alike each writes a slice of, but no smaller one: every shape that is cut is a program to
# compile and a copy on every device (mono of the tests on eight virtual ones: 20 s the first time, 4 s with this).
_LEAST_SLICE_BYTES = 2**18
_ASIDE = {
    "damaged": "Checkpoints that did not verify.\n",
    "unfinished": "Checkpoints that the run was killed in.\n",
    "rewound": "Checkpoints of steps that were taken back: the loss had jumped.\n",
}


class _Sealing:
    """Waits in the background for Orbax, which names a checkpoint when it is written, and adds the manifest."""

    def __init__(self, directory: epath.Path):
        self._directory, self._error = directory, None
        self._written, self._given_up = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="seal")
        self._thread.start()

    def _run(self) -> None:
        try:
            # A bucket is asked less often than a file system.
            every_s = _LOOK_EVERY_S * (10 if storage.in_bucket(self._directory) else 1)
            while not (self._directory / _MARKER).exists():
                if self._given_up.wait(every_s):
                    return
            self._written.set()
            manifest.write(self._directory)
        except BaseException as error:  # raised by ``wait``
            self._error = error

    def give_up(self) -> None:
        """Nothing will come that could be sealed."""
        self._given_up.set()

    def wait(self) -> None:
        """The manifest is there, or what went wrong is raised; to be called when Orbax is done.

        Raises:
          OSError: the checkpoint is not there, though Orbax told of no error.
        """
        if not self._written.wait(_SHOWS_UP_S):
            self.give_up()
            raise OSError(f"{self._directory} was not written to its end; is the disk full?")
        self._thread.join()
        if self._error is not None:
            raise self._error


@dataclasses.dataclass
class _Preserved:
    """Preserves, as Orbax asks it, what was saved so long after the last so kept, and the best.

    Attributes:
      notes: of the checkpoints by step, the same on every process: ``saved_s``, seconds since 1970, and ``score``.
      every_s: 0: nothing for its time.
    """

    notes: dict[int, dict[str, Any]]
    every_s: int
    best: bool

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        steps, kept, last = [saved.step for saved in checkpoints], set(), None
        known = [step for step in steps if step in self.notes]
        for step in known if self.every_s else ():
            at = self.notes[step]["saved_s"]
            if last is None or at - last >= self.every_s:
                kept.add(step)
                last = at
        scored = [(self.notes[step]["score"], step) for step in known if self.notes[step]["score"] is not None]
        before = [of_step for of_step in scored if of_step[1] != steps[-1]]
        for best in (max(scored, default=None), max(before, default=None)) if self.best else ():
            if best is not None:  # the newest of equals; while it is being written, also the best before it
                kept.add(best[1])
        return [step in kept for step in steps]


def _handlers() -> dict[str, ocp.CheckpointHandler]:
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_LEAST_SLICE_BYTES)
    types = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return dict(
        state=ocp.PyTreeCheckpointHandler(type_handler_registry=types, use_compression=False),
        data=ocp.JsonCheckpointHandler(),
        meta=ocp.JsonCheckpointHandler(),
    )


class Checkpoints:
    """The checkpoints of one run, under WORKDIR/checkpoints.

    Kept: the newest ``keep_last``; for ever those whose step is a multiple of ``keep_every_steps``, and, if
    ``keep_every_hours`` is not 0, the first and each that was saved so long after the one kept before; with
    ``keep_best`` the one that was saved with the highest score.
    """

    def __init__(
        self,
        workdir: Any,
        *,
        every_steps: int,
        keep_last: int,
        keep_every_steps: int,
        keep_every_hours: float = 0.0,
        keep_best: bool = False,
    ):
        self._workdir = epath.Path(workdir)
        self._sealing: _Sealing | None = None
        self._preserved = _Preserved({}, round(3600 * keep_every_hours), keep_best)
        policies = ocp.checkpoint_managers
        kept = [policies.LatestN(keep_last), policies.EveryNSteps(keep_every_steps), self._preserved]
        self._manager = ocp.CheckpointManager(
            self._workdir / "checkpoints",
            item_handlers=_handlers(),
            options=ocp.CheckpointManagerOptions(
                save_decision_policy=policies.FixedIntervalPolicy(every_steps),
                preservation_policy=policies.AnyPreservationPolicy(kept),
                cleanup_tmp_directories=True,
            ),
        )
        if (keep_every_hours or keep_best) and self.steps():
            self._read_preserved()

    def _read_preserved(self) -> None:
        """What process 0 can read of the checkpoints of before; the rest is kept for nothing."""
        steps = self.steps()
        read = [_UNKNOWN] * len(steps)
        for i, step in enumerate(steps if jax.process_index() == 0 else ()):
            with contextlib.suppress(DamagedError):
                read[i] = read_notes(self._manager, step)["meta"]["kept"]
        self._preserved.notes |= {step: note for step, note in zip(steps, _of_process_0(read)) if note != _UNKNOWN}

    def maybe_save(
        self,
        step: int,
        state: Any,
        *,
        data_state: dict[str, Any],
        meta: dict[str, Any],
        score: float | None = None,
        before: Callable[[], None] = lambda: None,
    ) -> bool:
        """Whether ``state`` is being saved: every ``every_steps``.

        ``before`` is called first: what must be kept by the time that the checkpoint counts.
        """
        if not self._manager.should_save(step):
            return False
        before()
        return self.save(step, state, data_state=data_state, meta=meta, score=score)

    def save(
        self, step: int, state: Any, *, data_state: dict[str, Any], meta: dict[str, Any], score: float | None = None
    ) -> bool:
        """Whether ``state`` is being saved: False if this step was saved before.

        ``data_state`` and ``meta`` are what JSON can hold; ``score`` is what the best is told by. Returns when the
        arrays are copied, so that the next step may overwrite (donate) them; ``wait`` for the files.
        """
        if step in self._manager.all_steps():
            return False
        if json.loads(json.dumps(data_state)) != data_state:
            raise ValueError(f"data_state {data_state!r} does not survive JSON; wanted dicts with string keys, lists")
        self.wait()
        digests = tree_digests(state)
        # behind the digests, for which the step has to be done: on CPUs what processes exchange must not overtake it
        (kept,) = _of_process_0([dict(saved_s=int(time.time()), score=score)])
        self._preserved.notes[step] = kept
        leaves = {path: [shape_text(leaf), digests[path]] for path, leaf in named_leaves(state).items()}
        saving = self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(state),
                data=ocp.args.JsonSave(data_state),
                meta=ocp.args.JsonSave(
                    {
                        "leaves": leaves,
                        "run": meta,
                        "kept": kept,
                        "sha256": text_digest(data_state, leaves, meta, kept),
                    }
                ),
            ),
            force=True,
        )
        if saving and jax.process_index() == 0:
            self._sealing = _Sealing(self._workdir / "checkpoints" / str(step))
        return saving

    def restore_latest(self, abstract_state: Any, *, check_meta: CheckMeta = accept) -> Restored | None:
        """The newest checkpoint that verifies, or None if there is none at all.

        ``abstract_state``: shapes with shardings; the mesh may be another than the one that saved. ``check_meta`` sees
        the saved ``meta`` first and may raise: a changed config is better told by its fields than by its arrays.
        Damaged checkpoints newer than the restored one are moved to WORKDIR/damaged_checkpoints, so that their steps
        can be saved again, one that was not written to its end to WORKDIR/unfinished_checkpoints.

        Raises:
          ValueError: the checkpoint is of another model.
          RuntimeError: there are checkpoints, and none verifies.
        """
        self.wait()
        self._set_unfinished_aside()
        restored, damaged = restore_newest(self._manager, self.steps(), abstract_state, check_meta=check_meta)
        self._set_aside(damaged, "damaged")
        return restored

    def restore_before(self, step: int, abstract_state: Any) -> Restored | None:
        """The newest checkpoint of an earlier step that verifies, or None if there is none.

        Later ones are moved to WORKDIR/rewound_checkpoints, so that no run goes on from them.

        Raises:
          RuntimeError: there are earlier ones, and none verifies.
        """
        self.wait()
        earlier = [saved for saved in self.steps() if saved < step]
        restored, damaged = restore_newest(self._manager, earlier, abstract_state)
        if restored is not None:
            self._set_aside(damaged, "damaged")
            self._set_aside([saved for saved in self.steps() if saved >= step], "rewound")
        return restored

    def _set_unfinished_aside(self) -> None:
        """Of a run that was killed between Orbax's last file and the manifest: no damage, and perhaps all there is."""
        newest = self.steps()[-1:]
        unsealed = any(not manifest.is_there(self._workdir / "checkpoints" / str(step)) for step in newest)
        if multihost_utils.broadcast_one_to_all(np.asarray(unsealed)):
            logging.error("the checkpoint of step %d was not written to its end", *newest)
            self._set_aside(newest, "unfinished")

    def _set_aside(self, steps: Sequence[int], why: str) -> None:
        if not steps:
            return
        if jax.process_index() == 0:
            aside = self._workdir / f"{why}_checkpoints"
            aside.mkdir(exist_ok=True)
            (aside / "README").write_text(_ASIDE[why])  # a bucket has no empty folder
            for step in steps:
                number = sum(path.name.split(".")[0] == str(step) for path in aside.iterdir())
                target = aside / (f"{step}.{number}" if number else str(step))
                (self._workdir / "checkpoints" / str(step)).rename(target)
                logging.error("%s checkpoint moved to %s", why, target)
        multihost_utils.sync_global_devices(f"{why} checkpoints set aside")
        self._manager.reload()

    def steps(self) -> list[int]:
        """Steps that are saved, ascending."""
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Returns when all files are written; raises what went wrong with them."""
        sealing, self._sealing = self._sealing, None
        try:
            self._manager.wait_until_finished()
        except BaseException:
            if sealing is not None:
                sealing.give_up()
            raise
        if sealing is not None:
            sealing.wait()

    def close(self) -> None:
        """Waits, and lets the background threads go."""
        try:
            self.wait()
        finally:
            self._manager.close()


def _of_process_0(notes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """When checkpoints were saved, and their scores, as process 0 has them: all processes must keep the same ones."""
    saved_s = np.asarray([note["saved_s"] for note in notes], np.uint32)
    scores = np.asarray([np.nan if note["score"] is None else note["score"] for note in notes], np.float32)
    told = zip(*(array.tolist() for array in multihost_utils.broadcast_one_to_all((saved_s, scores))))
    return [dict(saved_s=saved_s, score=score if math.isfinite(score) else None) for saved_s, score in told]


def _steps_of_process_0(steps: Sequence[int]) -> Sequence[int]:
    """The steps that process 0 lists: of a run that trains on, each process may find others, and all must read one."""
    if jax.process_count() == 1:
        return steps
    count = int(multihost_utils.broadcast_one_to_all(np.asarray(len(steps), np.int32)))
    return multihost_utils.broadcast_one_to_all(np.resize(np.asarray(steps, np.int32), count)).tolist()


def restore_params(
    workdir: Any,
    abstract_params: Any,
    *,
    weights: str = "teacher",
    parts: Sequence[str] | None = None,
    step: int | None = None,
    check_meta: CheckMeta = accept,
) -> Restored:
    """Parameters (``Restored.state``) of the newest checkpoint that verifies, or of ``step``; nothing else is read.

    ``weights`` is "teacher" or "student", ``parts`` names entries of the tree (None: all), ``check_meta`` is as in
    ``restore_latest``. Shapes without a sharding come to the first device. The layers that a distillation needs beside
    the network (models/heads.py) are left where they are, unless ``abstract_params`` has them.

    Raises:
      ValueError: there is no such checkpoint, or it is of another model.
      RuntimeError: there are checkpoints, and none verifies.
    """
    assert weights in ("teacher", "student"), weights
    with _reading(workdir, step) as (manager, steps):
        steps = _steps_of_process_0(steps) if step is None else steps
        first = SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or first),
            abstract_params if parts is None else {part: abstract_params[part] for part in parts},
        )
        prefixes = (f"{weights}/",) if parts is None else tuple(f"{weights}/{part}/" for part in parts)
        without = () if DISTIL in abstract_params else (f"{weights}/{DISTIL}/",)
        restored, _ = restore_newest(
            manager, steps, {weights: abstract}, prefixes=prefixes, without=without, check_meta=check_meta
        )
        return dataclasses.replace(restored, state=restored.state[weights])


def read_meta(workdir: Any, *, step: int | None = None) -> dict[str, Any]:
    """What was saved beside the newest checkpoint whose notes can be read, or that of ``step``: the run's config.

    Raises:
      ValueError: there is no such checkpoint.
      RuntimeError: there are checkpoints, and the notes of none can be read.
    """
    with _reading(workdir, step) as (manager, steps):
        failures = {}
        for step in reversed(steps):
            try:
                return read_notes(manager, step)["meta"]["run"]
            except DamagedError as error:
                failures[step] = str(error)
        raise RuntimeError(f"no checkpoint in {manager.directory} can be read: {failures}")


def asked_step(workdir: Any, asked: str | int | None) -> int | None:
    """The step that ``--step`` says: a number, or "best", that with the highest score of its probe; None: not given.

    Raises:
      ValueError: it is neither, or no checkpoint has a score.
    """
    if asked != "best":
        if asked is not None and not str(asked).isdecimal():
            raise ValueError(f"--step: got {asked!r}; wanted a number, or best")
        return None if asked is None else int(asked)
    scored = []
    with _reading(workdir, None) as (manager, steps):
        for step in steps:
            with contextlib.suppress(DamagedError):
                scored.append((read_notes(manager, step)["meta"]["kept"]["score"], step))
    scored = [of_step for of_step in scored if of_step[0] is not None]
    if not scored:
        raise ValueError(f"--step: no checkpoint in {workdir} was probed (config.eval.probe_every_steps)")
    return max(scored)[1]


@contextlib.contextmanager
def _reading(workdir: Any, step: int | None) -> Iterator[tuple[ocp.CheckpointManager, list[int]]]:
    """A manager that only reads, and the steps to try: all, ascending, or ``step``."""
    if not storage.in_bucket(workdir):
        workdir = pathlib.Path(workdir).resolve()  # Orbax takes absolute paths only
    directory = epath.Path(workdir) / "checkpoints"
    if not directory.exists():
        raise ValueError(f"--workdir: there is no {directory}")
    with ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
        steps = sorted(manager.all_steps())
        if not steps or (step is not None and step not in steps):
            wanted = "at least one" if step is None else f"step {step}"
            raise ValueError(f"--workdir: {directory} holds checkpoints of the steps {steps}; wanted {wanted}")
        yield manager, steps if step is None else [step]
