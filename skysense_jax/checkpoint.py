"""Checkpoints of a run: saved in the background, verified when read, restored onto any mesh.

Orbax writes and reads the arrays, but does not notice a flipped byte (30 of 30 trials restored wrong numbers), so a
digest of every array is saved beside them and checked after a restore. A checkpoint that cannot be read or does not
verify is reported, set aside, and the one before it is used. What a state consists of: train_state.py.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Array, Shaped, UInt32

from skysense_jax import storage
from skysense_jax.trees import named_leaves

CheckMeta = Callable[[dict[str, Any]], None]
_MAX_NAMED = 5  # leaves that an error message lists
# In what tensorstore says of a bucket.
_OF_SERVICE = re.compile(
    "PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|CANCELLED|http_response"
)
_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


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


def _accept(meta: dict[str, Any]) -> None:
    del meta


class _DamagedError(Exception):
    """A checkpoint whose arrays are not those that were saved."""


# ---- digests


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A one-to-one scramble in which every input bit moves about half of the output bits (MurmurHash3's last step)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def leaf_digest(x: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    """A number that any single changed element changes, whatever mesh the array is spread over.

    A sum over elements of a scramble of (bits, position): a sum does not care in which order devices add it.
    """
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    if x.dtype.itemsize not in _UNSIGNED:
        raise ValueError(f"an array of dtype {x.dtype} has no digest; wanted elements of 1, 2 or 4 bytes")
    bits = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
    position, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        position += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * np.uint32(stride % 2**32)
        stride *= x.shape[axis]
    return jnp.sum(_mix(bits ^ _mix(position + np.uint32(1))), dtype=jnp.uint32)


@functools.lru_cache
def _digest_on(mesh: Mesh | None) -> Callable[[jax.Array], jax.Array]:
    # The answer must be on every device: a process can read only what its own devices hold.
    where = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return jax.jit(leaf_digest, out_shardings=where)


def tree_digests(tree: Any) -> dict[str, int]:
    """Path to digest, for every leaf. Compiled once per shape, and shared by student, teacher and moments."""
    digests = {}
    for path, leaf in named_leaves(tree).items():
        leaf = jnp.asarray(leaf)
        digests[path] = _digest_on(leaf.sharding.mesh if isinstance(leaf.sharding, NamedSharding) else None)(leaf)
    return {path: int(digest) for path, digest in jax.device_get(digests).items()}


def _text_digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


# ---- comparing trees


def _shape_text(leaf: Any) -> str:
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


# ---- writing and reading


class Checkpoints:
    """The checkpoints of one run, under WORKDIR/checkpoints.

    Kept: the newest ``keep_last``, and for ever those whose step is a multiple of ``keep_every_steps``.
    """

    def __init__(self, workdir: Any, *, every_steps: int, keep_last: int, keep_every_steps: int):
        self._workdir = epath.Path(workdir)
        policies = ocp.checkpoint_managers
        self._manager = ocp.CheckpointManager(
            self._workdir / "checkpoints",
            options=ocp.CheckpointManagerOptions(
                save_decision_policy=policies.FixedIntervalPolicy(every_steps),
                preservation_policy=policies.AnyPreservationPolicy(
                    [policies.LatestN(keep_last), policies.EveryNSteps(keep_every_steps)]
                ),
                cleanup_tmp_directories=True,
            ),
        )

    def maybe_save(
        self,
        step: int,
        state: Any,
        *,
        data_state: dict[str, Any],
        meta: dict[str, Any],
        before: Callable[[], None] = lambda: None,
    ) -> bool:
        """Whether ``state`` is being saved: every ``every_steps``.

        ``before`` is called first: what must be kept by the time that the checkpoint counts.
        """
        if not self._manager.should_save(step):
            return False
        before()
        return self.save(step, state, data_state=data_state, meta=meta)

    def save(self, step: int, state: Any, *, data_state: dict[str, Any], meta: dict[str, Any]) -> bool:
        """Whether ``state`` is being saved: False if this step was saved before.

        ``data_state`` and ``meta`` are what JSON can hold. Returns when the arrays are copied, so that the next step
        may overwrite (donate) them; ``wait`` for the files.
        """
        if step in self._manager.all_steps():
            return False
        if json.loads(json.dumps(data_state)) != data_state:
            raise ValueError(f"data_state {data_state!r} does not survive JSON; wanted dicts with string keys, lists")
        digests = tree_digests(state)
        leaves = {path: [_shape_text(leaf), digests[path]] for path, leaf in named_leaves(state).items()}
        return self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=ocp.args.JsonSave(data_state),
                meta=ocp.args.JsonSave(
                    {"leaves": leaves, "run": meta, "sha256": _text_digest(data_state, leaves, meta)}
                ),
            ),
            force=True,
        )

    def restore_latest(self, abstract_state: Any, *, check_meta: CheckMeta = _accept) -> Restored | None:
        """The newest checkpoint that verifies, or None if there is none at all.

        ``abstract_state``: shapes with shardings; the mesh may be another than the one that saved. ``check_meta`` sees
        the saved ``meta`` first and may raise: a changed config is better told by its fields than by its arrays.
        Damaged checkpoints newer than the restored one are moved to WORKDIR/damaged_checkpoints, so that their steps
        can be saved again.

        Raises:
          ValueError: the checkpoint is of another model.
          RuntimeError: there are checkpoints, and none verifies.
        """
        self._manager.wait_until_finished()
        restored, damaged = _restore_newest(self._manager, self.steps(), abstract_state, check_meta=check_meta)
        if damaged:
            self._set_aside(damaged)
        return restored

    def _set_aside(self, steps: list[int]) -> None:
        if jax.process_index() == 0:
            aside = self._workdir / "damaged_checkpoints"
            aside.mkdir(exist_ok=True)
            (aside / "README").write_text("Checkpoints that did not verify.\n")  # a bucket has no empty folder
            for step in steps:
                number = sum(path.name.split(".")[0] == str(step) for path in aside.iterdir())
                target = aside / (f"{step}.{number}" if number else str(step))
                (self._workdir / "checkpoints" / str(step)).rename(target)
                logging.error("damaged checkpoint moved to %s", target)
        multihost_utils.sync_global_devices("damaged checkpoints set aside")
        self._manager.reload()

    def steps(self) -> list[int]:
        """Steps that are saved, ascending."""
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Returns when all files are written; raises what went wrong with them."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets the background threads go."""
        self._manager.wait_until_finished()
        self._manager.close()


def restore_params(
    workdir: Any,
    abstract_params: Any,
    *,
    weights: str = "teacher",
    parts: Sequence[str] | None = None,
    step: int | None = None,
) -> Restored:
    """Parameters (``Restored.state``) of the newest checkpoint that verifies, or of ``step``; nothing else is read.

    ``weights`` is "teacher" or "student", ``parts`` names entries of the tree (None: all). Shapes without a sharding
    come to the first device.

    Raises:
      ValueError: there is no such checkpoint, or it is of another model.
      RuntimeError: there are checkpoints, and none verifies.
    """
    assert weights in ("teacher", "student"), weights
    with _reading(workdir, step) as (manager, steps):
        first = SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or first),
            abstract_params if parts is None else {part: abstract_params[part] for part in parts},
        )
        prefixes = (f"{weights}/",) if parts is None else tuple(f"{weights}/{part}/" for part in parts)
        restored, _ = _restore_newest(manager, steps, {weights: abstract}, prefixes=prefixes)
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
                return _read_notes(manager, step)["meta"]["run"]
            except _DamagedError as error:
                failures[step] = str(error)
        raise RuntimeError(f"no checkpoint in {manager.directory} can be read: {failures}")


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


def _restore_newest(
    manager: ocp.CheckpointManager,
    steps: Sequence[int],
    abstract: Any,
    *,
    prefixes: tuple[str, ...] | None = None,
    check_meta: CheckMeta = _accept,
) -> tuple[Restored | None, list[int]]:
    """The last of ``steps`` that verifies, and the steps passed over for it.

    ``prefixes``: ``abstract`` is a dict of what stands under these paths of the state, and the rest is not read.
    """
    failures: dict[int, str] = {}
    for step in reversed(steps):
        try:
            restored = _restore_step(manager, step, abstract, prefixes=prefixes, check_meta=check_meta)
            return restored, list(failures)
        except _DamagedError as error:
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
    check_meta: CheckMeta,
) -> Restored:
    wanted = named_leaves(abstract)
    notes = _together(lambda: _read_notes(manager, step))
    data_state, saved, meta = notes["data"], notes["meta"]["leaves"], notes["meta"]["run"]
    check_meta(meta)
    if prefixes is not None:
        saved = {path: leaf for path, leaf in saved.items() if path.startswith(prefixes)}
    _check_same_leaves(
        {path: shape for path, (shape, _) in saved.items()},
        {path: _shape_text(leaf) for path, leaf in wanted.items()},
        f"the checkpoint of step {step} in {manager.directory}",
    )
    how = ocp.checkpoint_utils.construct_restore_args(abstract)
    arguments = ocp.args.PyTreeRestore(item=abstract, partial_restore=prefixes is not None, restore_args=how)
    state = _together(lambda: _read_item(manager, step, "state", ocp.PyTreeCheckpointHandler(), arguments))
    wrong = [path for path, digest in tree_digests(state).items() if digest != saved[path][1]]
    if wrong:
        raise _DamagedError(f"{len(wrong)} arrays are not what was saved: {', '.join(wrong[:_MAX_NAMED])}")
    return Restored(step, state, data_state, meta)


def _read_item(manager: ocp.CheckpointManager, step: int, name: str, handler: Any, arguments: Any) -> Any:
    """An item of a checkpoint, by its handler: the manager's own ``restore`` waits for the other processes behind it,
    for ever if one of them met damage."""
    with _any_error_is_damage(manager.directory):
        return handler.restore(manager.directory / str(step) / name, args=arguments)


def _read_notes(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """The JSON of a checkpoint, "data" and "meta", compared with its digest."""
    notes = {
        name: _read_item(manager, step, name, ocp.JsonCheckpointHandler(), ocp.args.JsonRestore())
        for name in ("data", "meta")
    }
    with _any_error_is_damage(manager.directory):
        if _text_digest(notes["data"], notes["meta"]["leaves"], notes["meta"]["run"]) != notes["meta"]["sha256"]:
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
    except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        of_files = isinstance(error, ValueError | KeyError | FileNotFoundError) and not _OF_SERVICE.search(str(error))
        if storage.in_bucket(directory) and not of_files:
            raise
        raise _DamagedError(f"{type(error).__name__}: {error}".split("\n")[0][:500]) from error


def _together(read: Callable[[], Any]) -> Any:
    """What ``read`` gives; damage that one process finds is damage for all, before they do anything together."""
    found, damage = None, None
    try:
        found = read()
    except _DamagedError as error:
        damage = error
    if not np.all(multihost_utils.process_allgather(np.asarray(damage is None))):
        raise damage or _DamagedError("another process could not read it")
    return found
