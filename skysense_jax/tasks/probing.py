"""Probes of a run on labelled datasets of its user, beside those on procedural scenes (``config.eval.datasets``).

What the command ``python -m skysense_jax.eval`` takes as --dataset and --task, without fine-tuning; each image is
encoded once for both protocols. Next: frozen.py, which does the work; outputs.py, which asks.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from skysense_jax.eval.features import read_whole
from skysense_jax.eval.probes import MAX_CELLS
from skysense_jax.tasks import evaluate, folders, frozen, linear
from skysense_jax.tasks.examples import CHANGE, MULTI_LABEL, SCENE, SEGMENTATION, Examples
from skysense_jax.tasks.loading import Model

FIELD = "config.eval.datasets"
MAIN = {SCENE: "accuracy", MULTI_LABEL: "map_micro", SEGMENTATION: "miou", CHANGE: "f1"}  # the score that ranks


@dataclasses.dataclass(frozen=True)
class Probed:
    """A labelled dataset as a run reads it.

    Attributes:
      name: in metrics.
      model: the run's network, without weights, with the modalities that the dataset has.
      train, test: what is fitted on and scored on.
      options: of the use of features.
    """

    name: str
    model: Model
    train: Examples
    test: Examples
    options: frozen.Options

    def __str__(self) -> str:
        count = f"{len(self.train.classes)} classes; {len(self.train)} to train on, {len(self.test)} to test on"
        return f"{self.name}, {self.train.kind}, {', '.join(row.name for row in self.model.rows)}, {count}"

    @property
    def facts(self) -> str:
        """What must be the same in every process: the images of all examples, in order, and what is read of them."""
        dates = str(sorted(self.model.num_dates.items()))
        return "\n".join((str(self), *self.train.classes, dates, *self.train.image_names, *self.test.image_names))

    @property
    def main(self) -> str:
        """The name of the score that tells checkpoints apart: of the linear protocol."""
        return f"{self.name}/{MAIN[self.train.kind]}"

    def scores(self, params: Any) -> dict[str, float]:
        """{name/score, name/knn_score}, scores of single classes left out.

        Empty, and logged, where the dataset cannot be read or fitted any more, in any process: a run of weeks goes on
        without it.
        """
        if jax.process_count() > 1 and not self._readable_everywhere():
            return {}
        protocols = (frozen.LINEAR,) if self.train.kind == MULTI_LABEL else frozen.PROTOCOLS
        model = dataclasses.replace(self.model, params=params)
        try:
            found = frozen.evaluate(model, self.train, self.test, self.options, protocols=protocols)
        except (ValueError, OSError) as error:
            if jax.process_count() > 1 and not isinstance(error, linear.NothingToFitError):
                raise  # the others may wait for this one
            logging.error("%s: %r was not probed: %s", FIELD, self.name, error)
            return {}
        prefix = {frozen.LINEAR: "", frozen.KNN: "knn_"}
        told = (
            (protocol, name, value) for protocol, of in found.items() for name, value in of.items() if "/" not in name
        )
        return {
            f"{self.name}/{prefix[protocol]}{name}": value for protocol, name, value in told if math.isfinite(value)
        }

    def _readable_everywhere(self) -> bool:
        """Whether no process fails on a file, found before any waits for the others within a batch."""
        problem = None
        try:
            for example in (*self.train, *self.test):
                for sample in (example.before, example.after):
                    if sample is not None:
                        read_whole(sample, self.model.rows, num_dates=self.model.num_dates)
        except (ValueError, OSError) as error:
            problem = error
        failed = np.flatnonzero(multihost_utils.process_allgather(np.asarray([problem is not None])))
        if failed.size:
            logging.error(
                "%s: %r was not probed: processes %s cannot read it%s",
                *(FIELD, self.name, failed.tolist(), f": {problem}" if problem else ""),
            )
        return not failed.size


def read(datasets: Sequence[tuple[str, str, str]], model: Model, *, batch_size: int) -> tuple[Probed, ...]:
    """The datasets of (name, --dataset, --task or ""), all targets looked at.

    Raises:
      ValueError: one is not what it says it is, or has none of the run's modalities; names the field and the entry.
    """
    found = []
    for name, dataset, task in datasets:
        request = evaluate.Request(
            model="",
            dataset=dataset,
            task=task or None,
            protocol=frozen.LINEAR,
            batch_size=batch_size,
            max_cells=MAX_CELLS,
        )
        try:
            card, place = evaluate.asked_dataset(request)
            narrowed, splits = evaluate.labelled(request, model, card, place)
        except ValueError as error:
            raise ValueError(f"{FIELD}: {name!r}: {error}") from error
        train, test = (splits[split] for split in folders.SPLITS)
        found.append(Probed(name, narrowed, train, test, evaluate.frozen_options(request, card)))
    return tuple(found)
