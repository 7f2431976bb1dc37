"""The places that a report looks at: procedural scenes that no run trains on, or records of the run's sources.

``Shown`` hides modalities and dates of a place, so that one compiled network answers what it makes of less.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from skysense_jax.data import scenes
from skysense_jax.data.sample import SampleReader, Window
from skysense_jax.eval import probes
from skysense_jax.eval.features import spread_dates
from skysense_jax.modalities import Modality

SCENES, RECORDS = "scenes", "records"


@dataclasses.dataclass(frozen=True)
class Place:
    """A sample, and what is known of it that no loss saw ({name: [H W] ids, 0 = does not apply}; records: nothing)."""

    sample: SampleReader
    attributes: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def labels(self) -> np.ndarray | None:
        """[H W] uint8 class ids of the label map (0 = nothing mapped), None if there is none."""
        return self.sample.labels_window(0, 0, self.sample.extent_cells)


@dataclasses.dataclass(frozen=True)
class Places:
    """To fit probes on and, others, to score them on and to show; ``told``: what they are, in a sentence."""

    train: Sequence[Place]
    test: Sequence[Place]
    told: str


def from_scenes(
    rows: Sequence[Modality], *, seed: int, extent_cells: int, first_index: int, num_train: int, num_test: int
) -> Places:
    """Complete procedural scenes from ``first_index`` on.

    Raises:
      ValueError: scenes have none of the modalities.
    """
    if not {row.name for row in rows} & set(scenes.MODALITIES):
        raise ValueError(
            f"--samples=scenes: procedural scenes have {scenes.MODALITIES}, the run {tuple(row.name for row in rows)}; "
            "wanted --samples=records"
        )
    held_out = probes.held_out_scenes(
        rows,
        seed=seed,
        extent_cells=extent_cells,
        first_index=first_index,
        num_train_scenes=num_train,
        num_test_scenes=num_test,
    )
    parts = [[Place(scene.sample, scene.attributes) for scene in part] for part in (held_out.train, held_out.test)]
    return Places(*parts, "Places are procedural scenes that the run did not train on.")


def from_records(samples: Sequence[SampleReader], *, num_train: int, num_test: int) -> Places:
    """The last of the samples to score on, the others to fit on; in the proportion asked for if there are fewer.

    Raises:
      ValueError: fewer than two.
    """
    if len(samples) < 2:
        raise ValueError(
            f"--samples=records: {len(samples)} of the records of the run's config.data.sources can be read; wanted 2 "
            "or more, or --samples=scenes"
        )
    count = min(max(1, round(len(samples) * num_test / (num_train + num_test))), len(samples) - 1)
    parts = [[Place(sample) for sample in part] for part in (samples[:-count], samples[-count:])]
    return Places(*parts, "Places are records of the run's own sources: it may have trained on them.")


@dataclasses.dataclass(frozen=True)
class Shown:
    """A sample of which at most ``num_dates`` dates a modality are seen, evenly spread; 0: the modality is not there.

    Implements ``SampleReader``.
    """

    sample: SampleReader
    num_dates: Mapping[str, int]

    @property
    def id(self) -> str:
        return self.sample.id

    @property
    def extent_cells(self) -> int:
        return self.sample.extent_cells

    def _dates(self, modality: str) -> np.ndarray:
        return spread_dates(len(self.sample.days(modality)), self.num_dates[modality])

    def days(self, modality: str) -> np.ndarray:
        return self.sample.days(modality)[self._dates(modality)]

    def window(self, modality: str, date: int, row: int, column: int, side: int) -> Window:
        return self.sample.window(modality, int(self._dates(modality)[date]), row, column, side)

    def labels_window(self, row: int, column: int, side: int) -> np.ndarray | None:
        return self.sample.labels_window(row, column, side)
