"""What a dataset says of itself: the rows of the modality table that its samples are of, and a row for each sample.

Next: figures.py (of a sample's pixels), dataset.py (who reads it).
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from skysense_jax.data.sample import UNDATED, Sample
from skysense_jax.modalities import MODALITIES, OSM, Modality

ROWS = "modalities.json"


def write_rows(rows: Sequence[Modality], folder: pathlib.Path) -> None:
    """Writes the rows of the modality table that samples in ``folder`` are of."""
    (folder / ROWS).write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")


def read_rows(folder: pathlib.Path) -> tuple[Modality, ...]:
    """What ``write_rows`` wrote; the table's own rows if it wrote nothing."""
    path = folder / ROWS
    if not path.exists():
        return tuple(MODALITIES.values())
    listed = json.loads(path.read_text())
    lists = lambda row: {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}  # noqa: E731
    return tuple(Modality(**lists(row)) for row in listed)


def facts(sample: Sample, *, split: str, shard: str, record: int) -> dict[str, Any]:
    """What is said of the sample that is ``record`` of the file ``shard`` (without its suffix)."""
    dated = [day for series in sample.series.values() for day in series.days.tolist() if day != UNDATED]
    mapped = np.bincount(sample.labels.ravel(), minlength=OSM.num_classes + 1) if sample.labels is not None else None
    return dict(
        id=sample.id,
        split=split,
        shard=shard,
        record=record,
        longitude=sample.longitude,
        latitude=sample.latitude,
        dates={name: len(series.days) for name, series in sample.series.items()},
        hidden={name: float(series.cloud.mean()) for name, series in sample.series.items()},
        first_day=min(dated, default=None),
        last_day=max(dated, default=None),
        classes=None if mapped is None else mapped.tolist(),
        licence=sample.licence,
    )


def row(found: Mapping[str, Any], table: Sequence[Modality]) -> dict[str, Any]:
    """``facts`` as a row of the index: dates and hidden shares in a column for each row of the modality table."""
    per_row = {f"{key}_{m.name}": found[key].get(m.name) for key in ("dates", "hidden") for m in table}
    return {key: value for key, value in found.items() if key not in ("dates", "hidden")} | per_row
