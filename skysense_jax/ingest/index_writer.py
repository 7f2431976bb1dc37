"""Writes a dataset's index, index.parquet, a row a sample, with no more than one of its row groups in memory."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from skysense_jax.modalities import Modality

_ROW_GROUP = 2**16  # samples, some 20 MB of them
_FIELDS = {
    **dict(id=pa.string(), split=pa.string(), shard=pa.string(), record=pa.int64()),
    **dict(longitude=pa.float64(), latitude=pa.float64(), first_day=pa.int64(), last_day=pa.int64()),
    **dict(classes=pa.list_(pa.int64()), licence=pa.string()),
}
_PER_ROW = dict(dates=pa.int64(), hidden=pa.float64())


class IndexWriter:
    """A context manager that ends the file.

    Args:
      path: of the file.
      table: rows that samples may have; each has columns of its own.
    """

    def __init__(self, path: pathlib.Path, table: Sequence[Modality]):
        self._names, self._waiting = [row.name for row in table], []
        per_row = {f"{key}_{name}": kind for key, kind in _PER_ROW.items() for name in self._names}
        self._file = pq.ParquetWriter(path, pa.schema(_FIELDS | per_row))

    def add(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """Takes what parts say of samples."""
        rows = [
            {key: value for key, value in sample.items() if key not in _PER_ROW}
            | {f"{key}_{name}": sample[key].get(name) for key in _PER_ROW for name in self._names}
            for sample in samples
        ]
        if rows:
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
