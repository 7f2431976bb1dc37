"""What a run shows of itself: pictures, and the linear probe of its teacher on held-out procedural scenes.

Every process calls these; process 0 writes. Next: eval/pictures.py, eval/probes.py.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from skysense_jax import metrics, sharding
from skysense_jax.assembly import Run, batch_shapes
from skysense_jax.batch import Batch
from skysense_jax.data import pipeline as pipeline_lib
from skysense_jax.data import scenes
from skysense_jax.data.sample import SampleReader
from skysense_jax.eval import pictures, probes
from skysense_jax.train_state import TrainState, create_state

_PICTURED = 3  # samples in a picture


def write_pictures(
    config: ConfigDict,
    run: Run,
    pipeline: pipeline_lib.Pipeline,
    params: Any,
    element: dict[str, Any],
    workdir: pathlib.Path,
) -> None:
    """Writes WORKDIR/pictures anew. ``params``: the teacher's; ``element``: any host batch. Every process calls it.

    Features and queries are shown on records of the run's own sources, or on held-out scenes if it trains on scenes.
    """
    paths = pictures.write_all(
        workdir / "pictures",
        model=run.network,
        params=params,
        modalities=run.modalities,
        samples=_picture_samples(config, run, pipeline),
        batch=Batch.from_dict(element),
        metrics_path=workdir / metrics.FILE_NAME,
        **_encoding(config),
    )
    for path in paths:
        logging.info("picture: %s", path)


def _picture_samples(config: ConfigDict, run: Run, pipeline: pipeline_lib.Pipeline) -> list[SampleReader]:
    """Held-out scenes of a run on scenes; of other runs the records with most modalities among some of each source."""
    if any(name == pipeline_lib.SCENES for name, _ in config.data.sources):
        names = tuple(row.name for row in run.modalities if row.name in scenes.MODALITIES)
        indices = range(config.eval.first_index, config.eval.first_index + _PICTURED)
        return [scenes.render(i, complete=True, modalities=names, **_held_out(config)).sample for i in indices]
    found = pipeline.samples(3 * _PICTURED)
    return sorted(found, key=lambda sample: -sum(len(sample.days(row.name)) > 0 for row in run.modalities))[:_PICTURED]


def write_probe(config: ConfigDict, run: Run, state: TrainState, mesh: sharding.Mesh, directory: pathlib.Path) -> None:
    """Probes the teacher, and if asked the network as it was at the start; process 0 writes ``probe.json``."""
    networks = {"teacher": state.teacher}
    if config.eval.probe_untrained:
        shapes = batch_shapes(config, run.modalities)
        networks["untrained"] = create_state(
            run.network, run.optimizer, shapes, seed=config.optim.seed, mesh=mesh
        ).teacher
    scores = probe(config, run, networks)
    if jax.process_index() == 0 and any(scores.values()):
        scores = {"step": config.optim.num_steps, **scores}
        (directory / "probe.json").write_text(json.dumps(scores, indent=2) + "\n")


def probe(config: ConfigDict, run: Run, networks: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Scores of a linear probe on held-out procedural scenes, for the parameters of each network; logged too.

    None where there is nothing to tell apart. Nothing of any network if the config asks for none, or if scenes have
    none of its modalities. Every process calls it.
    """
    which = {key: config.eval[key] for key in ("first_index", "num_train_scenes", "num_test_scenes")}
    if not which["num_test_scenes"]:
        return {name: {} for name in networks}
    if not {row.name for row in run.modalities} & set(scenes.MODALITIES):
        logging.info("no linear probe: procedural scenes have %s, this run none of them", scenes.MODALITIES)
        return {name: {} for name in networks}
    held_out = probes.held_out_scenes(run.modalities, **_held_out(config), **which)
    scores = {}
    for name, params in networks.items():
        found = probes.probe_scenes(run.network, params, run.modalities, held_out, **_encoding(config))
        scores[name] = {key: value if np.isfinite(value) else None for key, value in found.items()}
        points = "  ".join(f"{key} {100 * value:.1f}" for key, value in found.items())
        logging.info("linear probe on held-out scenes, %s: %s", name, points)
    return scores


def mean_miou(scores: Mapping[str, float | None]) -> float | None:
    """One number of a network's scores: over the tasks that had something to tell apart, None if none had."""
    found = [value for name, value in scores.items() if name.endswith("/miou") and value is not None]
    return float(np.mean(found)) if found else None


def _held_out(config: ConfigDict) -> dict[str, int]:
    return dict(seed=config.data.scenes.seed, extent_cells=config.data.scenes.extent_cells)


def _encoding(config: ConfigDict) -> dict[str, Any]:
    return dict(
        cells=config.data.views.global_cells,
        num_dates=dict(config.data.num_dates),
        batch_size=config.eval.batch_size,
    )
