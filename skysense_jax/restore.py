"""Reading a checkpoint: files against their manifest, notes and arrays against their digests, leaves against the run's.

What is damaged is told and passed over; what says nothing of the files (no memory, no right to read) is raised. All
processes come to the same verdict before they do anything together. Next: checkpoint.py, which writes all of it.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from skysense_jax import manifest, storage
from skysense_jax.digests import tree_digests
from skysense_jax.trees import named_leaves

CheckMeta = Callable[[dict[str, Any]], None]
_MAX_NAMED = 5  # leaves that an error message lists
# In what tensorstore says of a bucket.
_OF_SERVICE = re.compile(
    "PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|CANCELLED|http_response"
)


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint held.

    Attributes:
      step: the step it was saved at.
      state: arrays where the given shardings want them.
      data_state: of the input pipeline.
      meta: what the caller saved beside.
    """

    step: int
    state: Any
    data_state: dict[str, Any]
    meta: dict[str, Any]


def accept(meta: dict[str, Any]) -> None:
    del meta


class DamagedError(Exception):
    """A checkpoint whose arrays are not those that were saved."""


def text_digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


# ---- comparing trees


def shape_text(leaf: Any) -> str:
    return f"({', '.join(map(str, leaf.shape))}) {leaf.dtype}"


def _check_same_leaves(saved: Mapping[str, str], wanted: Mapping[str, str], where: str) -> None:
    """Nothing, if the saved leaves are the wanted ones.

    Raises:
      ValueError: naming leaves that only one side has or that differ in shape or dtype.
    """
    differing = [f"{p}: saved {saved[p]}, wanted {wanted[p]}" for p in saved if p in wanted and saved[p] != wanted[p]]
    groups = {
        "only in the checkpoint": [path for path in saved if path not in wanted],
        "only in this run": [path for path in wanted if path not in saved],
        "of another shape or dtype": differing,
    }
    if any(groups.values()):
        lines = [
            f"  {len(names)} {what}: {'; '.join(names[:_MAX_NAMED])}{'; ...' if len(names) > _MAX_NAMED else ''}"
            for what, names in groups.items()
            if names
        ]
        raise ValueError(
            f"{where} holds another state than this config builds:\n"
            + "\n".join(lines)
            + "\nGive the config.model it was trained with, or another --workdir."
        )


# ---- reading


def restore_newest(
    manager: ocp.CheckpointManager,
    steps: Sequence[int],
    abstract: Any,
    *,
    prefixes: tuple[str, ...] | None = None,
    without: tuple[str, ...] = (),
    check_meta: CheckMeta = accept,
) -> tuple[Restored | None, list[int]]:
    """The last of ``steps`` that verifies, and the steps passed over for it.

    ``prefixes``: ``abstract`` is a dict of what stands under these paths of the state, but for what stands under those
    of ``without``, and the rest is not read.
    """
    failures: dict[int, str] = {}
    for step in reversed(steps):
        try:
            restored = _restore_step(manager, step, abstract, prefixes=prefixes, without=without, check_meta=check_meta)
            return restored, list(failures)
        except DamagedError as error:
            failures[step] = str(error)
        logging.error("the checkpoint of step %d in %s is damaged: %s", step, manager.directory, failures[step])
    if failures:
        told = "\n".join(f"  step {step}: {failure}" for step, failure in failures.items())
        raise RuntimeError(f"no checkpoint in {manager.directory} can be restored:\n{told}")
    return None, []


def _restore_step(
    manager: ocp.CheckpointManager,
    step: int,
    abstract: Any,
    *,
    prefixes: tuple[str, ...] | None,
    without: tuple[str, ...],
    check_meta: CheckMeta,
) -> Restored:
    wanted = named_leaves(abstract)
    _together(lambda: _check_files(manager.directory / str(step)))
    notes = _together(lambda: read_notes(manager, step))
    data_state, saved, meta = notes["data"], notes["meta"]["leaves"], notes["meta"]["run"]
    check_meta(meta)
    if prefixes is not None:
        saved = {path: leaf for path, leaf in saved.items() if path.startswith(prefixes)}
    saved = {path: leaf for path, leaf in saved.items() if not path.startswith(without)}
    _check_same_leaves(
        {path: shape for path, (shape, _) in saved.items()},
        {path: shape_text(leaf) for path, leaf in wanted.items()},
        f"the checkpoint of step {step} in {manager.directory}",
    )
    how = ocp.checkpoint_utils.construct_restore_args(abstract)
    arguments = ocp.args.PyTreeRestore(item=abstract, partial_restore=prefixes is not None, restore_args=how)
    state = _together(lambda: _read_item(manager, step, "state", ocp.PyTreeCheckpointHandler(), arguments))
    wrong = [path for path, digest in tree_digests(state).items() if digest != saved[path][1]]
    if wrong:
        raise DamagedError(f"{len(wrong)} arrays are not what was saved: {', '.join(wrong[:_MAX_NAMED])}")
    return Restored(step, state, data_state, meta)


def _check_files(directory: epath.Path) -> None:
    """Every file against the manifest; by process 0 for all, since it is one directory that they see."""
    if jax.process_index() == 0:
        with _any_error_is_damage(directory):
            if told := manifest.problem(directory):
                raise DamagedError(told)


def _read_item(manager: ocp.CheckpointManager, step: int, name: str, handler: Any, arguments: Any) -> Any:
    """An item of a checkpoint, by its handler: the manager's own ``restore`` waits for the other processes behind it,
    for ever if one of them met damage."""
    with _any_error_is_damage(manager.directory):
        return handler.restore(manager.directory / str(step) / name, args=arguments)


def read_notes(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """The JSON of a checkpoint, "data" and "meta", compared with its digest."""
    notes = {
        name: _read_item(manager, step, name, ocp.JsonCheckpointHandler(), ocp.args.JsonRestore())
        for name in ("data", "meta")
    }
    with _any_error_is_damage(manager.directory):
        if (
            text_digest(notes["data"], *(notes["meta"][name] for name in ("leaves", "run", "kept")))
            != notes["meta"]["sha256"]
        ):
            raise ValueError("its JSON is not what was saved")
    return notes


@contextlib.contextmanager
def _any_error_is_damage(directory: epath.Path) -> Iterator[None]:
    """Whatever Orbax, tensorstore or JSON raise on files that are not what was written.

    Not what says nothing of the files: memory that ran out, on the host or a device, files one may not read, and a
    bucket that does not answer or has other credentials than when the run began.
    """
    try:
        yield
    except (MemoryError, PermissionError, jax.errors.JaxRuntimeError, DamagedError):
        raise
    except Exception as error:
        of_files = isinstance(error, ValueError | KeyError | FileNotFoundError) and not _OF_SERVICE.search(str(error))
        if storage.in_bucket(directory) and not of_files:
            raise
        raise DamagedError(f"{type(error).__name__}: {error}".split("\n")[0][:500]) from error


def _together(read: Callable[[], Any]) -> Any:
    """What ``read`` gives; damage that one process finds is damage for all, before they do anything together."""
    found, damage = None, None
    try:
        found = read()
    except DamagedError as error:
        damage = error
    if not np.all(multihost_utils.process_allgather(np.asarray(damage is None))):
        raise damage or DamagedError("another process could not read it")
    return found
