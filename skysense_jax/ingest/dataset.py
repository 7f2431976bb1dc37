"""A dataset on disk as tables: the index, figures of pixels, statistics, and its records by place.

What a build wrote is taken as it is. Figures that are not there (of an older build, or of a folder that holds nothing
but records) are measured on some samples, always the same ones. Next: survey.py, suspicions.py, inspect.py.
"""

import dataclasses
import heapq
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset

from skysense_jax.data.records import RecordError, RecordSource
from skysense_jax.data.sample import Sample
from skysense_jax.ingest import figures, index
from skysense_jax.ingest.histograms import Histograms, load
from skysense_jax.ingest.suspicions import Where
from skysense_jax.modalities import LabelMap, Modality

_INDEX, _STATISTICS = "index.parquet", "statistics.json"
_SUFFIX = ".array_record"
_MOST_PARTS = 400  # whose counts are added up for the shape of the histograms: each is some MB when unpacked


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What can be known of a folder of samples without reading all of them.

    Attributes:
      rows: of the modality table, that samples may have; ``labels``: their label map.
      num_samples: in the folder; ``index`` has a row for each of them, or for those that were read.
      index, figures: as index.py and figures.py have them; figures of ``num_measured`` samples.
      statistics: as ``Histograms.summary``, of ``described``.
      counts: as ``Histograms.counts``, of ``counted``.
      unreadable: records that were wanted and are damaged, and what was said of them.
    """

    folder: pathlib.Path
    rows: tuple[Modality, ...]
    labels: LabelMap
    num_samples: int
    index: pa.dataset.Dataset
    figures: pa.dataset.Dataset
    num_measured: int
    statistics: Mapping[str, Mapping[str, Any]]
    described: str
    counts: Mapping[str, np.ndarray]
    counted: str
    unreadable: Mapping[Where, str]

    @property
    def indexed(self) -> bool:
        """Whether the folder has an index, so that ``index`` has all samples."""
        return (self.folder / _INDEX).exists()

    def read(self, where: Where) -> Sample:
        """One sample; raises RecordError if it is damaged."""
        return read(self.folder, where, self.rows, self.labels)


def open_dataset(folder: pathlib.Path, *, examine: int, seed: int) -> Dataset:
    """The dataset in a folder.

    Args:
      examine: how many samples to read where figures are not there.
      seed: of which ones.

    Raises:
      ValueError: no folder, or none with records, or not one record can be read.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; wanted one that ingest.build wrote, or one with *{_SUFFIX} files")
    reader = _built if (folder / _INDEX).exists() else _of_records
    return reader(folder, index.read_rows(folder), index.read_labels(folder), examine=examine, seed=seed)


def read(folder: pathlib.Path, where: Where, rows: Sequence[Modality], labels: LabelMap) -> Sample:
    """One sample of a folder.

    Raises:
      RecordError: it is damaged, or its file is not there.
    """
    path = folder / f"{where[0]}{_SUFFIX}"
    try:
        return RecordSource([path], rows, labels)[where[1]].decode()
    except (ValueError, IndexError) as error:  # RecordError is a ValueError; no file, or a shorter one
        raise RecordError(str(error)) from error


def drawn(names: Iterable[str], *, num: int, seed: int) -> list[int]:
    """Places of up to ``num`` names that a hash of each puts first, so that others do not change who is drawn."""
    rank = lambda pair: blake2b(f"{seed} {pair[1]}".encode(), digest_size=8).digest()  # noqa: E731
    return [place for place, _ in heapq.nsmallest(num, enumerate(names), key=rank)]


def _built(folder: pathlib.Path, rows: tuple[Modality, ...], labels: LabelMap, *, examine: int, seed: int) -> Dataset:
    indexed = pa.dataset.dataset(folder / _INDEX)
    num = indexed.count_rows()
    tables, archives = (sorted((folder / "parts").glob(pattern)) for pattern in ("*.parquet", "train-*.npz"))
    statistics = json.loads((folder / _STATISTICS).read_text()) if (folder / _STATISTICS).exists() else {}
    found = None
    if not tables or not archives:
        places = indexed.to_table(columns=["id", "shard", "record"])
        chosen = sorted(drawn(places["id"].to_pylist(), num=examine, seed=seed))
        some = places.take(pa.array(chosen, pa.int64()))
        found = _measure(folder, rows, labels, list(zip(some["shard"].to_pylist(), some["record"].to_pylist())))
    counts, counted = _counts(archives) if archives else (found.counts, f"{found.num} samples that were read")
    return Dataset(
        folder=folder,
        rows=rows,
        labels=labels,
        num_samples=num,
        index=indexed,
        figures=pa.dataset.dataset(tables, schema=figures.SCHEMA) if tables else found.figures,
        num_measured=num if tables else found.num,
        statistics=statistics,
        described="all samples to train on",
        counts=counts,
        counted=counted,
        unreadable=found.unreadable if found else {},
    )


def _counts(archives: Sequence[pathlib.Path]) -> tuple[Mapping[str, np.ndarray], str]:
    """The counts of up to ``_MOST_PARTS`` shards, evenly over all of them, added up, and of what they are."""
    total = Histograms(())
    picked = sorted({round(place) for place in np.linspace(0, len(archives) - 1, _MOST_PARTS)})
    for place in picked:
        total.merge(load(archives[place]))
    shards = f"{len(picked)} of {len(archives)} shards of " if len(picked) < len(archives) else ""
    return total.counts, f"{shards}all samples to train on"


def _of_records(
    folder: pathlib.Path, rows: tuple[Modality, ...], labels: LabelMap, *, examine: int, seed: int
) -> Dataset:
    files = sorted(folder.glob(f"*{_SUFFIX}"))
    if not files:
        raise ValueError(f"{folder} has neither {_INDEX} nor *{_SUFFIX} files; wanted a folder that ingest.build wrote")
    lengths = [len(RecordSource([file], rows)) for file in files]
    places = [
        (file.name.removesuffix(_SUFFIX), record) for file, length in zip(files, lengths) for record in range(length)
    ]
    chosen = sorted(drawn((f"{shard} {record}" for shard, record in places), num=examine, seed=seed))
    found = _measure(folder, rows, labels, [places[place] for place in chosen])
    if not found.rows:
        raise ValueError(
            f"{folder}: none of the {len(chosen)} records read can be used: {next(iter(found.unreadable.values()))}"
        )
    summary = Histograms(rows)
    summary.merge(found.counts)
    words = f"{found.num} of {len(places)} samples"
    return Dataset(
        folder=folder,
        rows=rows,
        labels=labels,
        num_samples=len(places),
        index=pa.dataset.dataset(pa.Table.from_pylist(found.rows)),
        figures=found.figures,
        num_measured=found.num,
        statistics=summary.summary(),
        described=words,
        counts=found.counts,
        counted=words,
        unreadable=found.unreadable,
    )


@dataclasses.dataclass(frozen=True)
class _Measured:
    """Samples that were read: rows of an index, figures, counts of numbers, and those that are damaged."""

    rows: list[dict[str, Any]]
    figures: pa.dataset.Dataset
    counts: Mapping[str, np.ndarray]
    unreadable: Mapping[Where, str]

    @property
    def num(self) -> int:
        return len(self.rows)


def _measure(folder: pathlib.Path, rows: tuple[Modality, ...], labels: LabelMap, places: Sequence[Where]) -> _Measured:
    histograms, listed, measured, unreadable = Histograms(rows), [], [], {}
    for shard, record in places:
        try:
            sample = read(folder, (shard, record), rows, labels)
        except RecordError as error:
            unreadable[shard, record] = str(error)
            continue
        where = dict(shard=shard, record=record)
        listed.append(index.row(index.facts(sample, split=shard.split("-")[0], labels=labels, **where), rows))
        measured += figures.measure(sample, rows, **where)
        for name, series in sample.series.items():
            histograms.add(name, series.images, series.valid)
    table = pa.Table.from_pylist(measured, figures.SCHEMA)
    return _Measured(listed, pa.dataset.dataset(table), histograms.counts, unreadable)
