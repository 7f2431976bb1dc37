"""The folder of a dataset that is being made: whose it is, its shards, and what is written beside them.

The unit of work is a shard: some samples in one ArrayRecord file. What it came to lies beside it in DIR/parts; what is
written last says how long each of its files is, and a shard whose files are so is whole. Every file appears under its
name whole or not at all, whoever else writes the same one at the same time, and an unfinished one ends in no suffix
that anybody looks for. A folder is one of a file system or gs://bucket/name.
Next: engines.py (who makes the shards), build.py and from_tfds.py (of what).
"""

import abc
import contextlib
import dataclasses
import fcntl
import hashlib
import io
import itertools
import json
import os
import pathlib
import tempfile
import time
import types
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
from etils import epath

from skysense_jax import storage
from skysense_jax.data.checks import RecordError
from skysense_jax.data.records import ShardWriter, encode_sample
from skysense_jax.data.sample import Sample
from skysense_jax.ingest import card, figures, remote
from skysense_jax.ingest import index as index_lib
from skysense_jax.ingest.acquisitions import Rejected
from skysense_jax.ingest.histograms import Histograms, load
from skysense_jax.ingest.rasters import Refused
from skysense_jax.ingest.remote import UNREACHABLE
from skysense_jax.modalities import OSM, LabelMap, Modality

PARTS, FACTS, LOCK, REJECTED, INDEX = "parts", "build.json", ".lock", "rejected.jsonl", "index.parquet"
TRAIN = "train"  # the split whose numbers statistics.json has
_NOTHING = hashlib.sha256().digest()


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
      labels: the label map that samples may have.
      columns: of the index, beyond those of every index: those of ``Made.facts``.
    """

    rows: Sequence[Modality]
    shards: Sequence[Shard]
    sources: Sequence[Mapping[str, str]]
    labels: LabelMap = OSM
    columns: Mapping[str, pa.DataType] = types.MappingProxyType({})

    def rejected(self) -> Iterator[Rejected]:
        """What came to nothing before the first shard."""
        return iter(())

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


def put(path: epath.Path, write: Callable[[pathlib.Path], Any]) -> bytes:
    """A digest of the file that ``write`` writes at the path it is given; it appears as ``path`` when it is whole."""
    if storage.in_bucket(path):
        with tempfile.TemporaryDirectory() as local:
            unfinished = pathlib.Path(local) / path.name
            write(unfinished)
            path.write_bytes(unfinished.read_bytes())  # an object is there when all of it is
            return _digest(unfinished)
    unfinished = pathlib.Path(f"{path}.incomplete-{uuid.uuid4().hex}")
    try:
        write(unfinished)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())  # a name must not outlive a loss of power without its content
        digest = _digest(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return digest


def _digest(path: os.PathLike) -> bytes:
    """Of a file's content; that of an empty one if there is none."""
    path = epath.Path(path)
    if not path.exists():
        return _NOTHING
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def one(name: str, make: Callable[[], Made]) -> Made:
    """What ``make`` makes of the place ``name``; what it raises, of a library or of damaged bytes, costs no other."""
    try:
        return make()
    except MemoryError:
        raise
    except (Refused, RecordError, OSError) as error:
        told = remote.reason(error)
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    return Made(None, [Rejected("place", name, told)])


@dataclasses.dataclass(frozen=True)
class Written:
    """What came of a shard: how many samples, what came to nothing, and in which time."""

    shard: Shard
    samples: int
    rejected: int
    seconds: float


def write_shard(maker: Maker, shard: Shard, out: epath.Path) -> Written:
    """What came of one shard, which is written.

    Raises:
      OSError: it cannot be written, or another worker made something else of it at the same time. What cannot be read
        is listed, and the others go on.
    """
    begun = time.monotonic()
    histograms, rejected, samples, measured, payloads = Histograms(maker.rows), [], [], [], []
    for made in maker.made(shard):
        rejected += made.rejected
        if made.sample is None:
            continue
        try:
            payloads.append(encode_sample(made.sample, maker.rows, labels=maker.labels))
        except RecordError as error:
            rejected.append(Rejected("place", made.sample.id, str(error)))
            continue
        where = dict(shard=shard.name, record=len(payloads) - 1)
        samples.append(index_lib.facts(made.sample, split=shard.split, labels=maker.labels, **where) | made.facts)
        measured += figures.measure(made.sample, maker.rows, **where)
        for name, series in made.sample.series.items():
            histograms.add(name, series.images, series.valid)
    records, counts, figured, part = _files(out, shard)
    if payloads:
        written = [put(records, lambda file: _write_records(file, payloads))]
    else:
        records.unlink(missing_ok=True)  # of a build that reached more
        written = [_NOTHING]
    written += [put(counts, histograms.save), put(figured, lambda file: figures.write(measured, file))]
    found = {
        "bytes": [_size(path) for path in (records, counts, figured)],
        "samples": samples,
        "rejected": [dataclasses.asdict(entry) for entry in rejected],
    }
    put(part, lambda file: file.write_text(json.dumps(found, indent=1) + "\n"))
    # Of workers that have a shard at once, the one whose part is the last sees what is left of all their files.
    if written != [_digest(path) for path in (records, counts, figured)]:
        part.unlink(missing_ok=True)
        raise OSError(f"{records}: another worker made something else of it at the same time")
    return Written(shard, len(samples), len(rejected), time.monotonic() - begun)


def _files(out: epath.Path, shard: Shard) -> tuple[epath.Path, epath.Path, epath.Path, epath.Path]:
    """Of a shard: its records, what is counted of them, their figures, and what is written last."""
    return out / shard.file, *(out / PARTS / f"{shard.name}{suffix}" for suffix in (".npz", ".parquet", ".json"))


def _write_records(path: pathlib.Path, payloads: Sequence[bytes]) -> None:
    with ShardWriter(path) as writer:
        for payload in payloads:
            writer.write(payload)


def _size(path: epath.Path) -> int:
    return path.stat().length if path.exists() else 0


def to_make(out: epath.Path, made: Sequence[Shard]) -> list[Shard]:
    """The shards that are not whole, or something of which was out of reach."""
    if storage.in_bucket(out):
        storage.forget()
    return [shard for shard in made if not _is_done(out, shard)]


def _is_done(out: epath.Path, shard: Shard) -> bool:
    try:
        part = _part(out, shard)
    except OSError:
        return False
    return not any(entry["reason"].startswith(UNREACHABLE) for entry in part["rejected"])


def _part(out: epath.Path, shard: Shard) -> dict[str, Any]:
    """What a shard came to.

    Raises:
      OSError: it is not whole: not made, or a file is gone or cut.
    """
    *files, part = _files(out, shard)
    try:
        said = json.loads(part.read_text()) if part.exists() else {}
    except ValueError:  # cut by a loss of power
        said = {}
    if said.get("bytes") != [_size(file) for file in files]:
        raise OSError(f"{out / shard.file} is not whole")
    return said


def finish(maker: Maker, out: epath.Path) -> str:
    """What was made, as a table; writes index, statistics, rows, rejects and card, a shard's part after the other.

    Raises:
      ValueError: not one sample was made.
      OSError: a shard is not whole.
    """
    counts, histograms = card.Counts(), Histograms(maker.rows)

    def rejected() -> Iterator[dict[str, str]]:
        yield from map(dataclasses.asdict, maker.rejected())
        for shard in maker.shards:
            yield from _part(out, shard)["rejected"]

    def write_rejected(path: pathlib.Path) -> None:
        with path.open("w") as file:
            for entry in rejected():
                file.write(json.dumps(entry) + "\n")
                counts.reject(entry)

    def write_index(path: pathlib.Path) -> None:
        with index_lib.IndexWriter(path, maker.rows, maker.columns) as index:
            for shard in maker.shards:
                samples = _part(out, shard)["samples"]
                index.add(samples)
                for sample in samples:
                    counts.add(sample)
                if shard.split == TRAIN:
                    histograms.merge(load(io.BytesIO((out / PARTS / f"{shard.name}.npz").read_bytes())))
        if not counts.samples:
            reasons = "\n".join(f"  {e['name']}: {e['reason']}" for e in itertools.islice(rejected(), 20))
            raise ValueError(f"not one sample was made; {out / REJECTED} says why:\n{reasons}")

    put(out / REJECTED, write_rejected)
    put(out / INDEX, write_index)
    seen, statistics = [row for row in maker.rows if counts.having[row.name]], histograms.summary()
    told = card.text(counts, statistics, maker.sources, maker.rows, maker.labels)
    put(out / "statistics.json", lambda file: file.write_text(json.dumps(statistics, indent=1) + "\n"))
    put(out / index_lib.CLASSES, lambda file: index_lib.write_classes(maker.labels, file))
    put(out / index_lib.ROWS, lambda file: index_lib.write_rows(seen, file))
    put(out / "README.md", lambda file: file.write_text(told))
    return card.table(counts, maker.rows)


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
    try:
        had = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"--out: {path} is damaged ({error}); wanted a new folder") from error
    if had != facts:
        changed = sorted(key for key in had.keys() | facts.keys() if had.get(key) != facts.get(key))
        told = f"--out: {path.parent} was begun with another {', '.join(changed)}; wanted a new folder, or the same"
        raise ValueError(told)
