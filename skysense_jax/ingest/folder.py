"""The folder of a dataset that is being made: whose it is, its shards, and what is written beside them.

The unit of work is a shard: some samples in one ArrayRecord file. What it came to lies beside it in DIR/parts and is
written last; a shard that has it is whole. Every file appears under its name whole or not at all, whoever else writes
the same one at the same time. A folder is one of a file system or gs://bucket/name.
Next: engines.py (who makes the shards), build.py and from_tfds.py (of what).
"""

import abc
import contextlib
import dataclasses
import fcntl
import io
import json
import os
import pathlib
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from skysense_jax import storage
from skysense_jax.data.checks import RecordError
from skysense_jax.data.records import ShardWriter, encode_sample
from skysense_jax.data.sample import UNDATED, Sample
from skysense_jax.ingest import card, places, plan
from skysense_jax.ingest.acquisitions import Rejected
from skysense_jax.ingest.histograms import Histograms, load
from skysense_jax.ingest.series import UNREACHABLE
from skysense_jax.modalities import OSM, Modality

PARTS, FACTS, LOCK, ROWS = "parts", "build.json", ".lock", "modalities.json"


@dataclasses.dataclass(frozen=True)
class Shard:
    """A piece of work: what ``split`` has from ``start`` to before ``stop``."""

    split: str
    number: int
    of: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}-of-{self.of:05d}"

    @property
    def file(self) -> str:
        return f"{self.name}.array_record"


def shards(lengths: Mapping[str, int], *, size: int) -> list[Shard]:
    """The shards of splits of these lengths, at most ``size`` of a split in each."""
    return [
        Shard(split, number, -(-length // size), start, min(start + size, length))
        for split, length in lengths.items()
        for number, start in enumerate(range(0, length, size))
    ]


@dataclasses.dataclass(frozen=True)
class Made:
    """What came of one place: its sample or None, what was left out and why, and what the index says beyond."""

    sample: Sample | None
    rejected: Sequence[Rejected] = ()
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Maker(abc.ABC):
    """Makes the samples of shards. Each process makes its own, by a function that is sent to it.

    Attributes:
      rows: of the table, that samples may have.
      shards: all of them.
      sources: name, kind and licence of each.
      rejected: what came to nothing before the first shard.
    """

    rows: Sequence[Modality]
    shards: Sequence[Shard]
    sources: Sequence[Mapping[str, str]]
    rejected: Sequence[Rejected]

    @abc.abstractmethod
    def made(self, shard: Shard) -> Iterator[Made]:
        """What comes of a shard, place by place, always the same."""


def directory(path: str | os.PathLike, *, flag: str) -> epath.Path:
    """A folder, absolute, or one in a bucket.

    Raises:
      ValueError: an address of another kind, or a bucket that cannot be used from here.
    """
    if not storage.is_url(path):
        return epath.Path(os.path.abspath(path))
    if told := storage.problem(str(path)):
        raise ValueError(f"{flag}: got {path}: {told}")
    return epath.Path(path)


def put(path: epath.Path, write: Callable[[pathlib.Path], Any]) -> None:
    """Makes the file that ``write`` writes at the path it is given appear as ``path`` when it is whole."""
    if storage.in_bucket(path):
        with tempfile.TemporaryDirectory() as local:
            unfinished = pathlib.Path(local) / path.name
            write(unfinished)
            path.write_bytes(unfinished.read_bytes())  # an object is there when all of it is
        return
    unfinished = pathlib.Path(path).with_name(f"{path.stem}.incomplete-{uuid.uuid4().hex}{path.suffix}")
    try:
        write(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_shard(maker: Maker, shard: Shard, out: epath.Path) -> None:
    """Writes one shard.

    Raises:
      OSError: it cannot be written. What cannot be read is listed, and the others go on.
    """
    histograms, rejected, samples, payloads = Histograms(maker.rows), [], [], []
    for made in maker.made(shard):
        rejected += made.rejected
        if made.sample is None:
            continue
        try:
            payloads.append(encode_sample(made.sample, maker.rows))
        except RecordError as error:
            rejected.append(Rejected("place", made.sample.id, str(error)))
            continue
        samples.append(_facts(made.sample, shard, record=len(payloads) - 1) | made.facts)
        for name, series in made.sample.series.items():
            histograms.add(name, series.images, series.valid)
    path = out / shard.file
    if payloads:
        put(path, lambda file: _write_records(file, payloads))
    else:
        path.unlink(missing_ok=True)  # of a build that reached more
    found = {
        "bytes": _size(path),
        "samples": samples,
        "rejected": [dataclasses.asdict(entry) for entry in rejected],
    }
    put(out / PARTS / f"{shard.name}.npz", histograms.save)
    put(out / PARTS / f"{shard.name}.json", lambda file: file.write_text(json.dumps(found, indent=1) + "\n"))


def _write_records(path: pathlib.Path, payloads: Sequence[bytes]) -> None:
    with ShardWriter(path) as writer:
        for payload in payloads:
            writer.write(payload)


def _size(path: epath.Path) -> int:
    return path.stat().length if path.exists() else 0


def _facts(sample: Sample, shard: Shard, *, record: int) -> dict[str, Any]:
    """What the index says of a sample."""
    dated = [day for series in sample.series.values() for day in series.days.tolist() if day != UNDATED]
    mapped = np.bincount(sample.labels.ravel(), minlength=OSM.num_classes + 1) if sample.labels is not None else None
    return dict(
        id=sample.id,
        split=shard.split,
        shard=shard.name,
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


def whole(out: epath.Path, made: Sequence[Shard]) -> dict[str, dict[str, Any]]:
    """What the shards that are whole came to, by name.

    One is not whose file is gone, or is not that of its part: two workers had it at once, and a source answered one.
    """
    if storage.in_bucket(out):
        storage.forget()
    found = {}
    for shard in made:
        part = out / PARTS / f"{shard.name}.json"
        if part.exists():
            said = json.loads(part.read_text())
            if said.get("bytes") == _size(out / shard.file):
                found[shard.name] = said
    return found


def to_make(out: epath.Path, made: Sequence[Shard]) -> list[Shard]:
    """The shards that are not whole, or something of which was out of reach."""
    found = whole(out, made)
    reached = {
        name
        for name, part in found.items()
        if not any(entry["reason"].startswith(UNREACHABLE) for entry in part["rejected"])
    }
    return [shard for shard in made if shard.name not in reached]


def finish(maker: Maker, out: epath.Path) -> str:
    """What was made, as a table; writes index, statistics, rows, rejects and card from the parts.

    Raises:
      ValueError: not one sample was made.
      OSError: a shard is not whole.
    """
    parts, rejected = whole(out, maker.shards), list(maker.rejected)
    rows, histograms = [], Histograms(maker.rows)
    for shard in maker.shards:
        if shard.name not in parts:
            raise OSError(f"{out / shard.file} is not whole")
        rows += parts[shard.name]["samples"]
        rejected += [Rejected(**entry) for entry in parts[shard.name]["rejected"]]
        if shard.split == places.TRAIN:
            histograms.merge(load(io.BytesIO((out / PARTS / f"{shard.name}.npz").read_bytes())))
    put(out / plan.REJECTED, lambda file: plan.write_rejected(rejected, file))
    if not rows:
        reasons = "\n".join(f"  {entry.name}: {entry.reason}" for entry in rejected[:20])
        raise ValueError(f"not one sample was made; {out / plan.REJECTED} says why:\n{reasons}")
    names = {name for row in rows for name in row["dates"]}
    seen = [dataclasses.asdict(row) for row in maker.rows if row.name in names]
    statistics = histograms.summary()
    index = pa.Table.from_pylist([_row(row, maker.rows) for row in rows])
    told = card.text(rows, statistics, maker.sources, maker.rows, num_rejected=len(rejected))
    put(out / "index.parquet", lambda file: pq.write_table(index, file))
    put(out / "statistics.json", lambda file: file.write_text(json.dumps(statistics, indent=1) + "\n"))
    put(out / ROWS, lambda file: file.write_text(json.dumps(seen, indent=1) + "\n"))
    put(out / "README.md", lambda file: file.write_text(told))
    return card.table(rows, rejected, maker.rows)


def _row(row: Mapping[str, Any], table: Sequence[Modality]) -> dict[str, Any]:
    per_row = {f"{key}_{m.name}": row[key].get(m.name) for key in ("dates", "hidden") for m in table}
    return {key: value for key, value in row.items() if key not in ("dates", "hidden")} | per_row


@contextlib.contextmanager
def claimed(out: epath.Path, facts: Mapping[str, Any]) -> Iterator[None]:
    """A context in which ``out`` is the place of the build that ``facts`` describe; clears what a killed one left.

    A bucket has no locks: who builds there twice at once does the work twice, to the same bytes.

    Raises:
      ValueError: another build's place, or one that is at work.
    """
    if out.is_dir() and any(out.iterdir()) and not ((out / FACTS).exists() or (out / LOCK).exists()):
        raise ValueError(f"--out: {out} is not empty and no build of ours; wanted a new folder")
    (out / PARTS).mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if not storage.in_bucket(out):
            lock = stack.enter_context(open(out / LOCK, "w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"--out: another build is at work in {out}") from error
        _be(out / FACTS, facts)
        for leftover in (*out.glob("*.incomplete-*"), *(out / PARTS).glob("*.incomplete-*")):
            leftover.unlink(missing_ok=True)
        yield


def _be(path: epath.Path, facts: Mapping[str, Any]) -> None:
    """Makes ``path`` say ``facts``; raises ValueError if it says others."""
    if not path.exists():
        put(path, lambda file: file.write_text(json.dumps(facts, indent=1) + "\n"))
        return
    had = json.loads(path.read_text())
    if had != facts:
        changed = sorted(key for key in had.keys() | facts.keys() if had.get(key) != facts.get(key))
        told = f"--out: {path.parent} was begun with another {', '.join(changed)}; wanted a new folder, or the same"
        raise ValueError(told)
