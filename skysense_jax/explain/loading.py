"""A run and the network of its newest whole checkpoint, and the places to look at with it.

An exported directory will not do: it may lack the queries, and knows nothing of how the run went.
Next: tasks/loading.py, report.py.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from skysense_jax import __version__, assembly, storage
from skysense_jax.data import pipeline as pipeline_lib
from skysense_jax.explain import places
from skysense_jax.parameters import parameters_per_part
from skysense_jax.tasks import loading


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained network and what a report tells of its run.

    Attributes:
      directory: of the run.
      model: the teacher.
      name: of the config.
      batch_size: windows encoded at a time.
      num_steps, sources, samples_a_step: of the config; sources with their shares.
      num_devices: None where the config leaves it to those that there were.
      parameters: their number by part of the network, heads included.
    """

    directory: storage.Directory
    model: loading.Model
    name: str
    batch_size: int
    num_steps: int
    sources: Sequence[tuple[str, int | float]]
    samples_a_step: int
    num_devices: int | None
    parameters: Mapping[str, int]


def load(workdir: str, *, step: str | None = None) -> Run:
    """The run in ``workdir``, a directory or gs://bucket/name; ``step`` as in ``tasks.loading.load``.

    Raises:
      ValueError: it is no run, has no checkpoint (of that step), its checkpoints are of another network than their
        config says, or it has a backbone for each modality.
      RuntimeError: there are checkpoints, and none verifies.
    """
    directory = storage.run_directory(workdir, flag="RUN")
    if not storage.in_bucket(directory) and not (directory / "checkpoints").exists():
        raise ValueError(
            f"RUN: {directory} has no folder checkpoints; wanted the --workdir of skysense_jax.train, behind its first "
            "checkpoint (config.run.checkpoint_every_steps)"
        )
    try:
        model = loading.load(workdir, step=step)
        loading.check_form(model, shared=True, why="a report shows one backbone, not one for each modality")
        config = model.config
        sizes = list(config.mesh.values())
        return Run(
            directory=directory,
            model=model,
            name=config.name,
            batch_size=config.eval.batch_size,
            num_steps=config.optim.num_steps,
            sources=[tuple(source) for source in config.data.sources],
            samples_a_step=config.data.batch_size,
            num_devices=math.prod(sizes) if min(sizes) > 0 else None,
            parameters=parameters_per_part(model.params),
        )
    except (AttributeError, KeyError) as error:  # a field that this version adds
        raise ValueError(
            f"RUN: the config of {directory} is not one of skysense_jax {__version__}: {error}; wanted the version "
            "that trained it"
        ) from error
    except ValueError as error:
        raise ValueError(f"RUN: {str(error).removeprefix('--workdir: ').removeprefix('--model: ')}") from error


def find_places(run: Run, kind: str | None, *, num_train: int, num_test: int) -> places.Places:
    """Places of ``kind`` (places.SCENES, places.RECORDS); None: scenes if the run trained on scenes, else records.

    Raises:
      ValueError: there are none.
    """
    config = run.model.config
    on_scenes = any(name == pipeline_lib.SCENES for name, _ in config.data.sources)
    if (kind or (places.SCENES if on_scenes else places.RECORDS)) == places.SCENES:
        if config.data.label_classes:
            raise ValueError(
                "--samples=scenes: procedural scenes have OpenStreetMap's classes, the run its own "
                "(config.data.label_classes); wanted --samples=records"
            )
        return places.from_scenes(
            run.model.rows,
            seed=config.data.scenes.seed,
            extent_cells=config.data.scenes.extent_cells,
            first_index=config.eval.first_index,
            num_train=num_train,
            num_test=num_test,
        )
    try:
        samples = assembly.make_pipeline(config).samples(num_train + num_test)
    except (ValueError, OSError) as error:  # gone, or the run was copied from another machine
        raise ValueError(f"--samples=records: {error}; wanted the run's records, or --samples=scenes") from error
    return places.from_records(samples, num_train=num_train, num_test=num_test)
