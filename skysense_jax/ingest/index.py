"""What a dataset says of itself: rows of the modality table, classes of its label map, and a row for each sample.

The index is written with no more than one of its row groups in memory.

Next: figures.py (of a sample's pixels), dataset.py (who reads it).
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from skysense_jax.data.sample import UNDATED, Sample
from skysense_jax.modalities import MODALITIES, OSM, LabelMap, Modality, from_json, label_map

ROWS, CLASSES = "modalities.json", "classes.json"
_ROW_GROUP = 2**16  # samples, some 20 MB of them
_COLUMNS = {
    **dict(id=pa.string(), split=pa.string(), shard=pa.string(), record=pa.int64()),
    **dict(longitude=pa.float64(), latitude=pa.float64(), first_day=pa.int64(), last_day=pa.int64()),
    **dict(classes=pa.list_(pa.int64()), licence=pa.string()),
}
# A column for each row of the modality table; the shares are of pixels under cloud and of pixels without data.
_PER_ROW = dict(dates=pa.int64(), hidden=pa.float64(), missing=pa.float64())


def write_rows(rows: Sequence[Modality], path: pathlib.Path) -> None:
    """Writes the rows of the modality table that the samples of a folder are of, to its file ``ROWS``."""
    path.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")


def read_rows(folder: pathlib.Path) -> tuple[Modality, ...]:
    """What ``write_rows`` wrote; the table's own rows if it wrote nothing."""
    path = folder / ROWS
    if not path.exists():
        return tuple(MODALITIES.values())
    return tuple(from_json(row) for row in json.loads(path.read_text()))


def write_classes(labels: LabelMap, path: pathlib.Path) -> None:
    """Writes the names of a label map's classes to its file ``CLASSES``."""
    path.write_text(json.dumps(list(labels.classes), indent=1) + "\n")


def read_labels(folder: pathlib.Path) -> LabelMap:
    """The label map of the samples of a folder: the table's own if ``write_classes`` wrote nothing."""
    path = folder / CLASSES
    return label_map(json.loads(path.read_text()) if path.exists() else ())


def facts(sample: Sample, *, split: str, shard: str, record: int, labels: LabelMap = OSM) -> dict[str, Any]:
    """What is said of the sample that is ``record`` of the file ``shard`` (without its suffix)."""
    dated = [day for series in sample.series.values() for day in series.days.tolist() if day != UNDATED]
    mapped = np.bincount(sample.labels.ravel(), minlength=labels.num_classes + 1) if sample.labels is not None else None
    return dict(
        id=sample.id,
        split=split,
        shard=shard,
        record=record,
        longitude=sample.longitude,
        latitude=sample.latitude,
        dates={name: len(series.days) for name, series in sample.series.items()},
        hidden={name: float(series.cloud.mean()) for name, series in sample.series.items()},
        missing={name: float(1 - series.valid.mean()) for name, series in sample.series.items()},
        first_day=min(dated, default=None),
        last_day=max(dated, default=None),
        classes=None if mapped is None else mapped.tolist(),
        licence=sample.licence,
    )


def row(found: Mapping[str, Any], table: Sequence[Modality]) -> dict[str, Any]:
    """``facts`` as a row of the index: dates and shares in a column for each row of the modality table."""
    # A shard of an older build says nothing of missing pixels.
    per_row = {f"{key}_{m.name}": found.get(key, {}).get(m.name) for key in _PER_ROW for m in table}
    return {key: value for key, value in found.items() if key not in _PER_ROW} | per_row


class IndexWriter:
    """Writes an index, a row a sample; a context manager that ends the file.

    Args:
      path: of the file.
      table: rows of the modality table that samples may have.
      columns: beyond those that every index has.
    """

    def __init__(self, path: pathlib.Path, table: Sequence[Modality], columns: Mapping[str, pa.DataType] | None = None):
        self._table, self._waiting = table, []
        per_row = {f"{key}_{m.name}": kind for key, kind in _PER_ROW.items() for m in table}
        self._file = pq.ParquetWriter(path, pa.schema(_COLUMNS | dict(columns or {}) | per_row))

    def add(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """Takes ``facts`` of samples."""
        if samples:
            rows = [row(sample, self._table) for sample in samples]
            self._waiting.append(pa.Table.from_pylist(rows, self._file.schema))
        if sum(map(len, self._waiting)) >= _ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        self._file.write_table(pa.concat_tables(self._waiting).combine_chunks())
        self._waiting = []

    def __enter__(self) -> "IndexWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        with self._file:
            if self._waiting and kind is None:
                self._flush()
