"""The frozen teacher of a distillation: a trained run whose network, of any size, another run learns from.

Its weights are an argument of the step, divided over the mesh as a run's own, and no part of the state: no checkpoint
of the run that learns holds them, and each start reads them from the teacher's run anew. What is compared:
losses/distil.py. Next: assembly.py, which builds on it before anything is compiled.
"""

import dataclasses
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from skysense_jax import checkpoint, digests, dry_run, modalities, sharding, storage
from skysense_jax import config as config_lib
from skysense_jax.models import skysense

_FIELD = "config.objective.distil.teacher"
_PARTS = ("backbone", "fusion")  # heads and queries of the teacher say nothing here
# Fields of a modality that change nothing of what a network sees.
_NOT_SEEN = ("statistics_source", "photometric", "codec", "wrong_unit_hint", "typical_range")


@dataclasses.dataclass(frozen=True)
class FrozenTeacher:
    """A trained run to learn from, nothing of its weights read yet.

    Attributes:
      directory: of the run.
      step: of its checkpoint; None: the newest.
      config: of the run.
      network: its network, in the precision of the run that learns.
      widths: of its features, by level (losses/distil.py).
    """

    directory: storage.Directory
    step: int | None
    config: ConfigDict
    network: skysense.SkySense
    widths: Mapping[str, int]

    def boxed(self) -> Any:
        """Shapes, dtypes and logical axes of the parameters that are used."""
        data, fields = self.config.data, ("num_dates", "views", "label_classes")
        rows = modalities.select(data.modalities, data.new_modalities)
        batch = dry_run.batch_shapes(rows, batch_size=1, **{field: data[field] for field in fields})
        whole = jax.eval_shape(lambda batch: self.network.init(jax.random.key(0), batch, train=False), batch)["params"]
        return {part: whole[part] for part in _PARTS}

    def abstract(self, mesh: Mesh) -> Any:
        """Shapes of the parameters that are used, with their places on the mesh."""
        return sharding.abstract(self.boxed(), mesh)

    def restore(self, mesh: Mesh) -> "FrozenWeights":
        """The weights of the run's own teacher, on the mesh; those that it does not divide are told.

        Raises:
          ValueError: there is no such checkpoint, it is of another version of the network, or none verifies.
        """
        boxed = self.boxed()
        if whole := sharding.undivided(boxed, mesh):
            logging.warning(
                "config.mesh does not divide %d parameters of the teacher (%s), whole on every device: %s",
                len(whole),
                _FIELD,
                whole,
            )
        abstract = sharding.abstract(boxed, mesh)
        try:
            found = checkpoint.restore_params(self.directory, abstract, parts=_PARTS, step=self.step)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{_FIELD}: {str(error).removeprefix('--workdir: ')}") from error
        digest = checkpoint.text_digest(digests.tree_digests(found.state))[:16]
        return FrozenWeights(found.state, {"step": found.step, "digest": digest})


@dataclasses.dataclass(frozen=True)
class FrozenWeights:
    """Parameters on the mesh, and what tells them from others: step and digest, as JSON can hold them."""

    params: Any
    facts: Mapping[str, Any]


def frozen_teacher(
    config: ConfigDict,
    rows: Sequence[modalities.Modality],
    kernels: Callable[[ConfigDict], Mapping[str, Any]],
) -> FrozenTeacher | None:
    """What ``config`` distils, None if nothing; of the teacher's run its notes are read.

    ``rows``: of the run that learns; ``kernels``: of a network of these ``config.model`` in it.

    Raises:
      ValueError: there is no such run, or it cannot teach this one: a line for each reason.
    """
    asked = config.objective.distil
    if not config.objective.weights.distil:
        return None
    directory = storage.run_directory(asked.teacher, flag=_FIELD)
    if storage.in_bucket(directory) and (told := storage.problem(str(directory))):
        raise ValueError(f"{_FIELD}: {directory}: {told}")
    step = asked.step or None
    try:
        of_teacher = config_lib.unflatten(checkpoint.read_meta(directory, step=step)["config"])
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"{_FIELD}: got {asked.teacher!r} (step {step or 'newest'}); wanted the --workdir of a trained run: "
            f"{str(error).removeprefix('--workdir: ')}"
        ) from error
    if problems := list(_problems(config, rows, of_teacher)):
        raise ValueError("\n".join(problems))
    model = ConfigDict(of_teacher.model.to_dict() | {"compute_dtype": config.model.compute_dtype})
    theirs = modalities.select(of_teacher.data.modalities, of_teacher.data.new_modalities)
    try:
        network = skysense.build(theirs, **model, **kernels(model))
    except TypeError as error:
        raise ValueError(f"{_FIELD}: {directory} is of another version of the network: {error}") from error
    backbone, levels = of_teacher.model.backbone, dict(stage3=4, stage4=8)
    widths = {name: backbone.width * times for name, times in levels.items()} | {"fused": of_teacher.model.fusion.width}
    on = {name: width for name, width in widths.items() if asked[f"{name}_weight"] > 0}
    return FrozenTeacher(directory, step, of_teacher, network, on)


def _problems(config: ConfigDict, rows: Sequence[modalities.Modality], of_teacher: ConfigDict) -> Iterator[str]:
    """Why the run of ``of_teacher`` cannot teach that of ``config``."""
    known = {row.name: row for row in modalities.select(of_teacher.data.modalities, of_teacher.data.new_modalities)}
    unknown = [row.name for row in rows if row.name not in known]
    if unknown:
        yield (
            f"config.data.modalities: got {tuple(row.name for row in rows)}; wanted some of {tuple(known)}, which the "
            f"teacher ({_FIELD}) was trained with"
        )
    for row in (row for row in rows if row.name in known):
        for field in (field.name for field in dataclasses.fields(row) if field.name not in _NOT_SEEN):
            ours, theirs = getattr(row, field), getattr(known[row.name], field)
            if ours != theirs:
                yield (
                    f"config.data.new_modalities: {row.name!r} has {field} {ours}; wanted {theirs}, as the teacher "
                    f"({_FIELD}) has it: both see the same images"
                )
    ours, theirs = config.data.views.global_cells, of_teacher.data.views.global_cells
    if ours != theirs:
        views = {key: of_teacher.data.views.get(key) for key in config.data.views}
        flags = (
            f"--config.data.views.{key}={value}" for key, value in views.items() if value != config.data.views[key]
        )
        yield (
            f"config.data.views.global_cells: got {ours}; wanted {theirs}, the side of the views that the teacher "
            f"({_FIELD}) was trained on; all of its views: {shlex.join(flags)}"
        )
