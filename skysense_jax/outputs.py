"""What a run shows of itself: pictures, and the probes of its teacher on procedural scenes and on labelled data.

Next: eval/pictures.py, eval/probes.py.
"""

import functools
import hashlib
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from skysense_jax import metrics, sharding
from skysense_jax.assembly import Run, batch_shapes
from skysense_jax.batch import Batch
from skysense_jax.data import pipeline as pipeline_lib
from skysense_jax.data import scenes
from skysense_jax.data.sample import SampleReader
from skysense_jax.eval import pictures, probes
from skysense_jax.train_state import TrainState, create_state

_DATASETS = "config.eval.datasets"
_PICTURED = 3  # samples in a picture


@runtime_checkable
class Labelled(Protocol):
    """A labelled dataset to probe on (tasks/probing.py)."""

    main: str
    facts: str

    def scores(self, params: Any) -> dict[str, float]: ...


class Outputs:
    """What a run of ``config`` shows in ``directory``. Every process calls each method; process 0 writes.

    Attributes:
      probe_seconds: spent in probes of the teacher so far.
    """

    def __init__(
        self,
        config: ConfigDict,
        run: Run,
        pipeline: pipeline_lib.Pipeline,
        directory: pathlib.Path,
        labelled: Sequence[Labelled] = (),
    ):
        """``labelled``: of ``read_labelled``."""
        self._config, self._run, self._pipeline, self._directory = config, run, pipeline, directory
        self._labelled = labelled
        self._probed: tuple[int, dict[str, float | None]] | None = None  # the last step whose teacher was
        self.probe_seconds = 0.0

    def write_pictures(self, teacher: Any, element: dict[str, Any]) -> None:
        """Writes ``pictures/`` anew. ``teacher``: its parameters; ``element``: any host batch.

        Features and queries are shown on records of the run's sources, or on held-out scenes if it trains on them.
        """
        paths = pictures.write_all(
            self._directory / "pictures",
            model=self._run.network,
            params=teacher,
            modalities=self._run.modalities,
            samples=self._pictured(),
            batch=Batch.from_dict(element),
            metrics_path=self._directory / metrics.FILE_NAME,
            classes=self._run.labels.classes,
            **_encoding(self._config),
        )
        for path in paths:
            logging.info("picture: %s", path)

    def probe(self, step: int, teacher: Any) -> dict[str, float | None]:
        """Scores of the probes of the teacher behind ``step``; logged too.

        None where there is nothing to tell apart. Of procedural scenes, if the config asks for them and they have any
        of the run's modalities, and of labelled datasets. The same in every process.
        """
        began = time.monotonic()
        self._probed = step, self._scores("teacher", teacher)
        self.probe_seconds += time.monotonic() - began
        return self._probed[1]

    def rank(self, scores: Mapping[str, float | None]) -> float | None:
        """What tells the best checkpoint: the mean main score of labelled datasets, or else the mean mIoU of scenes.

        None if there was nothing to tell apart, or if one of the datasets has no score: a mean of others is no measure.
        """
        if self._labelled:
            found = [scores.get(each.main) for each in self._labelled]
            return None if None in found else float(np.mean(found))
        found = [value for name, value in scores.items() if name.endswith("/miou") and value is not None]
        return float(np.mean(found)) if found else None

    def write_probe(self, step: int, state: TrainState, mesh: sharding.Mesh) -> None:
        """Writes ``probe.json``: the teacher's scores behind ``step`` and, if asked, those of the untrained network."""
        config, run = self._config, self._run
        known = self._probed is not None and self._probed[0] == step
        scores = {"teacher": self._probed[1] if known else self.probe(step, state.teacher)}
        if config.eval.probe_untrained:
            shapes, seed = batch_shapes(config, run.modalities), config.optim.seed
            untrained = create_state(run.network, run.optimizer, shapes, seed=seed, mesh=mesh).teacher
            scores["untrained"] = self._scores("untrained", untrained)
        if jax.process_index() == 0 and any(scores.values()):
            (self._directory / "probe.json").write_text(json.dumps({"step": step, **scores}, indent=2) + "\n")

    def _pictured(self) -> list[SampleReader]:
        """Held-out scenes of a run on scenes; of others the records with most modalities among some of each source."""
        config, rows = self._config, self._run.modalities
        if any(name == pipeline_lib.SCENES for name, _ in config.data.sources):
            names = tuple(row.name for row in rows if row.name in scenes.MODALITIES)
            indices = range(config.eval.first_index, config.eval.first_index + _PICTURED)
            return [scenes.render(i, complete=True, modalities=names, **_held_out(config)).sample for i in indices]
        found = self._pipeline.samples(3 * _PICTURED)
        return sorted(found, key=lambda sample: -sum(len(sample.days(row.name)) > 0 for row in rows))[:_PICTURED]

    @functools.cached_property
    def _probe_scenes(self) -> probes.HeldOut:
        which = {key: self._config.eval[key] for key in ("first_index", "num_train_scenes", "num_test_scenes")}
        return probes.held_out_scenes(self._run.modalities, **_held_out(self._config), **which)

    def _scores(self, name: str, params: Any) -> dict[str, float | None]:
        rows, found = self._run.modalities, {}
        if self._config.eval.num_test_scenes and {row.name for row in rows} & set(scenes.MODALITIES):
            found |= probes.probe_scenes(self._run.network, params, rows, self._probe_scenes, **_encoding(self._config))
        for each in self._labelled:
            found |= each.scores(params)
        if not found:
            logging.info("no probe: nothing of config.eval.datasets, and no scenes of %s", scenes.MODALITIES)
            return {}
        if jax.process_count() > 1:  # sums may be rounded in another way on another host; the best is one for all
            found = dict(zip(found, map(float, multihost_utils.broadcast_one_to_all(np.array([*found.values()])))))
        points = "  ".join(f"{key} {100 * value:.1f}" for key, value in found.items())
        logging.info("probes, %s: %s", name, points)
        return {key: value if np.isfinite(value) else None for key, value in found.items()}


def read_labelled(config: ConfigDict, run: Run) -> tuple[Labelled, ...]:
    """The labelled datasets that a run is to be probed on, the same in every process.

    Raises:
      ValueError: one is not what it says, here or in another process; names the field and the entry.
    """
    if not config.eval.datasets:
        return ()
    found, problem = (), None
    try:
        from skysense_jax.tasks import probing  # of the extra "ingest"
        from skysense_jax.tasks.loading import model_of

        model = model_of(run.network, None, run.modalities, config, config.name)
        found = probing.read(config.eval.datasets, model, batch_size=config.eval.batch_size)
    except ValueError as error:
        problem = error  # the other processes wait to hear of it
    except (OSError, ModuleNotFoundError) as error:
        problem = ValueError(f"{_DATASETS}: {error}")
    if jax.process_count() > 1:
        digest = hashlib.sha256("\n".join([repr(problem), *(each.facts for each in found)]).encode()).digest()
        told = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
        others = np.flatnonzero((told != told[0]).any(axis=1)).tolist()
        if others and problem is None:
            problem = ValueError(
                f"{_DATASETS}: processes {others} read other examples than process 0; wanted the same files on "
                "every host"
            )
    if problem is not None:
        raise problem
    return found


def _held_out(config: ConfigDict) -> dict[str, int]:
    return dict(seed=config.data.scenes.seed, extent_cells=config.data.scenes.extent_cells)


def _encoding(config: ConfigDict) -> dict[str, Any]:
    return dict(
        cells=config.data.views.global_cells,
        num_dates=dict(config.data.num_dates),
        batch_size=config.eval.batch_size,
    )
