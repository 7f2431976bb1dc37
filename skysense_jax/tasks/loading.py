"""A trained network with its weights, from a run's checkpoint or from an exported directory.

Which of the two a directory is, is seen from what it holds. Next: frozen.py, which encodes with it.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from skysense_jax import __version__, assembly, checkpoint, sharding, storage
from skysense_jax import config as config_lib
from skysense_jax.batch import Batch
from skysense_jax.export import from_torch, names, write
from skysense_jax.modalities import LabelMap, Modality, label_map, select
from skysense_jax.models import skysense
from skysense_jax.trees import named_leaves

_PARTS = ("backbone", "fusion")  # what features need; an exported directory may hold no more


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained network.

    Attributes:
      network: with all modalities that it was trained with.
      params: its parameters, on the first device; of an exported directory those of backbone and fusion only.
      rows: the modalities to be read.
      labels: the label map that it was trained with.
      cells: side of the run's global views, the windows of ``eval.features.sample_features``.
      num_dates: per modality, as the run drew them.
      config: of the run.
      name: the run's config, and the step of its weights.
      step, code: of a run, that of its weights, and the digest of the code that wrote them (None: not known).
    """

    network: skysense.SkySense
    params: Any
    rows: tuple[Modality, ...]
    labels: LabelMap
    cells: int
    num_dates: Mapping[str, int]
    config: ConfigDict
    name: str
    step: int = 0
    code: str | None = None


def load(model: str | pathlib.Path, *, modalities: Sequence[str] | None = None, step: str | int | None = None) -> Model:
    """The teacher of a RUN's newest whole checkpoint, or what an exported DIR holds.

    ``modalities`` leaves out others: any subset of those that the model was trained with. ``step``: of another
    checkpoint, or "best" (checkpoint.asked_step).

    Raises:
      ValueError: there is neither, it is of another version of the network or damaged, it has no fusion, or it has
        never seen one of ``modalities``; there is no checkpoint of ``step``.
      RuntimeError: there are checkpoints, and none verifies.
    """
    directory = storage.run_directory(str(model), flag="--model")
    if (directory / "checkpoints").exists():
        return _of_run(directory, modalities, checkpoint.asked_step(directory, step))
    if (directory / write.CONFIG).exists():
        if step is not None:
            raise ValueError(f"--step: got {step}; {directory} is an export, of one step; wanted the workdir of a run")
        return _of_export(pathlib.Path(directory), modalities)
    raise ValueError(
        f"--model: {directory} has neither checkpoints/ nor {write.CONFIG}; wanted the workdir of a run, or what "
        "skysense_jax.export wrote"
    )


def _of_run(directory: storage.Directory, wanted: Sequence[str] | None, step: int | None) -> Model:
    if storage.in_bucket(directory) and (told := storage.problem(str(directory))):
        raise ValueError(f"--model: {directory}: {told}")
    config = config_lib.unflatten(checkpoint.read_meta(directory, step=step)["config"])
    network, rows, batch = _network(config, directory)
    asked = _asked(rows, wanted)
    restored = checkpoint.restore_params(directory, _shapes(network, batch), step=step)
    model = model_of(network, restored.state, asked, config, f"{config.name} at step {restored.step}")
    return dataclasses.replace(model, step=restored.step, code=restored.meta.get("code"))


def _of_export(directory: pathlib.Path, wanted: Sequence[str] | None) -> Model:
    description = write.read_config(directory)
    if description["fusion"] is None:
        raise ValueError(f"--model: {directory} is a backbone alone; wanted an export with --part=fused or --part=all")
    training = description["training"]
    config = _unflatten(training["config"])
    missing = [name for name in ("data", "model", "efficiency") if name not in config]
    if missing:
        raise ValueError(f"--model: {directory / write.CONFIG}: training.config has no {', '.join(missing)} of the run")
    network, rows, batch = _network(config, directory)
    asked = _asked(rows, wanted)
    taken = from_torch.from_directory(directory, config=config, rows=rows, verify=False)
    shapes = _shapes(network, batch)
    taken = from_torch.fitting(named_leaves(shapes), taken)
    parts = {part: shapes[part] for part in shapes if part in _PARTS or set(_under(part, shapes)) <= set(taken.params)}
    missing = [path for path in named_leaves(parts) if path not in taken.params]
    if missing:
        raise ValueError(f"--model: {directory}: no weights for {', '.join(missing[:5])}")
    leaves = [jax.device_put(np.ascontiguousarray(taken.params[path])) for path in named_leaves(parts)]
    params = jax.tree.unflatten(jax.tree.structure(parts), leaves)
    return model_of(network, params, asked, config, f"{config.name} at step {training['step']}, exported")


def check_form(model: Model, *, why: str, **wanted: Any) -> None:
    """Nothing, if the fields of ``config.model.backbone`` are what is ``wanted``; ``why`` says whose form that is.

    Raises:
      ValueError: one is not.
    """
    names.check_form(model.config.model.backbone, why=why, **wanted)


def _asked(rows: tuple[Modality, ...], wanted: Sequence[str] | None) -> tuple[Modality, ...]:
    """The rows called ``wanted``, all without any; raises ValueError if the model has never seen one."""
    if wanted is None:
        return rows
    known = [row.name for row in rows]
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise ValueError(f"--modalities: the model has never seen {unknown or 'none'}; wanted some of {known}")
    return tuple(row for row in rows if row.name in wanted)


def _under(part: str, shapes: Any) -> list[str]:
    return [f"{part}/{path}" for path in named_leaves(shapes[part])]


def _unflatten(fields: Mapping[str, Any]) -> ConfigDict:
    """The locked config of "a.b": value pairs as JSON has them."""
    as_python = lambda value: tuple(map(as_python, value)) if isinstance(value, list) else value  # noqa: E731
    return config_lib.unflatten("".join(f"{field} = {as_python(value)!r}\n" for field, value in fields.items()))


def _network(config: ConfigDict, directory: storage.Directory) -> tuple[skysense.SkySense, tuple[Modality, ...], Batch]:
    """The network, with the attention of the devices here whatever the run had; its rows; shapes of a batch."""
    here = config.copy_and_resolve_references()
    try:
        with here.unlocked():
            here.efficiency.attention = "auto"
        rows = select(config.data.modalities, config.data.new_modalities)
        network = skysense.build(rows, **config.model, **assembly.efficiency(here))
        return network, rows, assembly.batch_shapes(config, rows)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"--model: {directory} is of a config that is not that of skysense_jax {__version__} as it is here: "
            f"{error}; wanted the code that trained it"
        ) from error


def _shapes(network: skysense.SkySense, batch: Batch) -> Any:
    """Shapes of the parameters."""
    boxed = jax.eval_shape(lambda batch: network.init(jax.random.key(0), batch, train=False), batch)["params"]
    return sharding.unbox(boxed)


def model_of(
    network: skysense.SkySense, params: Any, rows: tuple[Modality, ...], config: ConfigDict, name: str
) -> Model:
    """The network of a run of ``config``, read as the run reads its samples."""
    return Model(
        network=network,
        params=params,
        rows=rows,
        labels=label_map(config.data.label_classes),
        cells=config.data.views.global_cells,
        num_dates=dict(config.data.num_dates),
        config=config,
        name=name,
    )
