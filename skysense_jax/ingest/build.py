"""Makes samples of a manifest: ``python -m skysense_jax.ingest.build --manifest=MANIFEST --out=DIR``.

The unit of work is a shard: some places, in the manifest's order, into one ArrayRecord file. What it made of them lies
beside it in DIR/parts and is written last; a shard that has it is done. So the same command goes on after a kill, and
the bytes do not depend on kills or on how many processes worked. At the end: index.parquet, statistics.json,
rejected.jsonl and README.md, the dataset's card. Next: series.py (reading), card.py.
"""

import argparse
import concurrent.futures
import dataclasses
import fcntl
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import numpy as np

from skysense_jax.data.checks import RecordError
from skysense_jax.data.records import ShardWriter, encode_sample
from skysense_jax.data.sample import UNDATED, Sample
from skysense_jax.ingest import acquisitions as acquisitions_lib
from skysense_jax.ingest import card, osm, places, plan, remote
from skysense_jax.ingest.acquisitions import Acquisition, Rejected
from skysense_jax.ingest.histograms import Histograms, load
from skysense_jax.ingest.index_writer import IndexWriter
from skysense_jax.ingest.labels import Coverage, LabelMaps
from skysense_jax.ingest.places import Place
from skysense_jax.ingest.remote import UNREACHABLE
from skysense_jax.ingest.series import read_series
from skysense_jax.ingest.sources import rows_with

PARTS, FACTS, LOCK, INDEX = "parts", "build.json", ".lock", "index.parquet"


@dataclasses.dataclass(frozen=True)
class Shard:
    """A piece of work: the rows of the table of places from ``start`` to before ``stop``, all of one split."""

    split: str
    number: int
    of: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}-of-{self.of:05d}"


def shards(listed: Sequence[Place], *, places_per_shard: int) -> list[Shard]:
    """The shards of places that are sorted by split."""
    found = []
    for split in (places.TRAIN, places.VALIDATION):
        rows = [row for row, place in enumerate(listed) if place.split == split]
        starts = range(0, len(rows), places_per_shard)
        ends = [min(start + places_per_shard, len(rows)) for start in starts]
        found += [
            Shard(split, number, len(starts), rows[start], rows[end - 1] + 1)
            for number, (start, end) in enumerate(zip(starts, ends))
        ]
    return found


class Builder:
    """Makes the shards of a manifest; picklable.

    Args:
      manifest: what ``plan`` wrote.
      out: where shards go.
      min_clear_share: of a date's pixels, below which it is left out.
      places_per_shard: at most.
    """

    def __init__(self, manifest: pathlib.Path, out: pathlib.Path, *, min_clear_share: float, places_per_shard: int):
        self._out, self._min_clear_share = out, min_clear_share
        facts = json.loads((manifest / plan.SOURCES).read_text())
        self._rows, self._require = rows_with(facts["modalities"]), facts["choice"]["require"]
        self._licences = {source["name"]: source["licence"] for source in facts["sources"]}
        self._signs = {source["name"]: remote.signer(source["sign"]) for source in facts["sources"] if "sign" in source}
        coverages = [Coverage.of(covered) for covered in facts["labels"]]
        self._classes = osm.read_classes(facts.get("classes", ()))
        self._acquisitions = acquisitions_lib.read(manifest / plan.ACQUISITIONS)
        self._places = sorted(places.read(manifest / plan.PLACES), key=lambda place: place.split)
        self._labels = LabelMaps(manifest / plan.LABELS, coverages, self._classes)
        self.shards = shards(self._places, places_per_shard=places_per_shard)

    def build(self, shard: Shard) -> None:
        """Writes one shard.

        Raises:
          OSError: it cannot be written. What cannot be read is listed, and the others go on.
        """
        part = self._out / PARTS / f"{shard.name}.json"
        histograms, rejected, samples = Histograms(self._rows), [], []
        payloads = []
        for place in self._places[shard.start : shard.stop]:
            sample, refused = self.sample(place)
            rejected += refused
            if sample is None:
                continue
            try:
                payloads.append(encode_sample(sample, self._rows, labels=self._classes.map))
            except RecordError as error:
                rejected.append(Rejected("place", place.id, str(error)))
                continue
            num_classes = self._classes.map.num_classes
            samples.append(_facts(sample, place, shard, record=len(payloads) - 1, num_classes=num_classes))
            for name, series in sample.series.items():
                histograms.add(name, series.images, series.valid)
        path = self._out / f"{shard.name}.array_record"
        if not payloads:
            path.unlink(missing_ok=True)  # of a build that reached more
        else:
            with ShardWriter(path) as writer:
                for payload in payloads:
                    writer.write(payload)
        unfinished = part.with_name(f"{shard.name}.incomplete-{os.getpid()}.npz")
        histograms.save(unfinished)
        os.replace(unfinished, part.with_suffix(".npz"))
        found = {"samples": samples, "rejected": [dataclasses.asdict(entry) for entry in rejected]}
        unfinished.write_text(json.dumps(found, indent=1) + "\n")
        os.replace(unfinished, part)

    def sample(self, place: Place) -> tuple[Sample | None, list[Rejected]]:
        """The sample of a place, None if it has not what it must have, and all that was left out, with reasons."""
        of_row: dict[str, list[Acquisition]] = {}
        for index in place.acquisitions:
            acquisition = self._acquisitions[index]
            of_row.setdefault(acquisition.modality, []).append(acquisition)
        series, rejected = {}, []
        for row in self._rows:
            name, found = row.name, of_row.get(row.name, [])
            if not found:
                continue
            how = dict(min_clear_share=self._min_clear_share, signs=self._signs)
            read, refused = read_series(found, place.square, row, **how)
            rejected += [dataclasses.replace(entry, name=f"{place.id} {name}: {entry.name}") for entry in refused]
            if read is not None:
                series[name] = read
        missing = [name for name in self._require if name not in series]
        if missing or not series:
            told = f"no date is left of {', '.join(missing) or 'any row'}"
            return None, [*rejected, Rejected("place", place.id, told)]
        sources = sorted({acquisition.source for name in series for acquisition in of_row[name]})
        mapped = {source.partition("/")[0] for source in self._labels.covering(place.square)}
        longitude, latitude = place.square.centre()
        sample = Sample(
            id=place.id,
            extent_cells=place.cells,
            series=series,
            labels=self._labels.draw(place.square),
            longitude=longitude,
            latitude=latitude,
            provenance=", ".join(sources),
            licence="; ".join(sorted({self._licences[source] for source in mapped.union(sources)})),
        )
        return sample, rejected


def _facts(sample: Sample, place: Place, shard: Shard, *, record: int, num_classes: int) -> dict[str, Any]:
    """What the index says of a sample."""
    dated = [day for series in sample.series.values() for day in series.days.tolist() if day != UNDATED]
    mapped = np.bincount(sample.labels.ravel(), minlength=num_classes + 1) if sample.labels is not None else None
    return dict(
        id=sample.id,
        split=place.split,
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


def build(
    manifest: pathlib.Path,
    out: pathlib.Path,
    *,
    workers: int,
    places_per_shard: int = 64,
    min_clear_share: float = 0.1,
) -> str:
    """What was made, as a table; writes what is missing of ``out``, by ``workers`` processes.

    Raises:
      ValueError: ``manifest`` is none, or ``out`` holds another one's samples, or not one sample came of it.
      OSError: something cannot be written; what is whole stays, and the same call goes on.
    """
    if not (manifest / plan.PLACES).exists():
        raise ValueError(f"--manifest: {manifest} has no {plan.PLACES}; wanted a folder that ingest.plan wrote")
    how = dict(places_per_shard=places_per_shard, min_clear_share=min_clear_share)
    lock = _claim(out, {"manifest": _digest(manifest), **how})
    with lock:
        return _build(manifest, out, workers=workers, **how)


def _build(manifest: pathlib.Path, out: pathlib.Path, *, workers: int, **how: Any) -> str:
    make = functools.partial(Builder, manifest, out, **how)
    builder = make()
    missing = [shard for shard in builder.shards if not _is_done(out / PARTS / f"{shard.name}.json")]
    if workers > 1 and len(missing) > 1:
        context, size = multiprocessing.get_context("spawn"), min(workers, len(missing))
        with concurrent.futures.ProcessPoolExecutor(size, context, initializer=_begin, initargs=(make,)) as pool:
            list(pool.map(_build_one, missing))
    else:
        for shard in missing:
            builder.build(shard)
    return finish(manifest, out, builder.shards)


_WORKER: list[Builder] = []  # a process' own: it is made once, and not sent with each shard


def _begin(make: Callable[[], Builder]) -> None:
    _WORKER[:] = [make()]


def _build_one(shard: Shard) -> None:
    _WORKER[0].build(shard)


def _is_done(part: pathlib.Path) -> bool:
    """Whether a shard is written and nothing of it was out of reach then."""
    if not part.exists():
        return False
    return not any(entry["reason"].startswith(UNREACHABLE) for entry in json.loads(part.read_text())["rejected"])


def finish(manifest: pathlib.Path, out: pathlib.Path, made: Sequence[Shard]) -> str:
    """The table of ``build``; writes index, statistics, rejects and card from the parts, one part after the other.

    Raises:
      ValueError: there is not one sample.
    """
    facts = json.loads((manifest / plan.SOURCES).read_text())
    table, labels = rows_with(facts["modalities"]), osm.read_classes(facts.get("classes", ())).map
    counts, histograms = card.Counts(), Histograms(table)
    unfinished = out / f"{INDEX}.incomplete-{os.getpid()}"
    with IndexWriter(unfinished, table) as index, (out / plan.REJECTED).open("w") as rejected:
        for entry in _rejected(manifest, out, made):
            rejected.write(json.dumps(entry) + "\n")
            counts.rejected[entry["what"]] += 1
        for shard in made:
            part = out / PARTS / f"{shard.name}.json"
            samples = json.loads(part.read_text())["samples"]
            index.add(samples)
            for sample in samples:
                counts.add(sample)
            if shard.split == places.TRAIN:
                histograms.merge(load(part.with_suffix(".npz")))
    if not counts.samples:
        unfinished.unlink()
        first = itertools.islice(_rejected(manifest, out, made), 20)
        reasons = "\n".join(f"  {entry['name']}: {entry['reason']}" for entry in first)
        raise ValueError(f"not one sample came of {manifest}; {out / plan.REJECTED} says why:\n{reasons}")
    os.replace(unfinished, out / INDEX)
    statistics = histograms.summary()
    (out / "statistics.json").write_text(json.dumps(statistics, indent=1) + "\n")
    (out / "README.md").write_text(card.text(counts, statistics, facts["sources"], table, labels))
    return card.table(counts, table)


def _rejected(manifest: pathlib.Path, out: pathlib.Path, made: Sequence[Shard]) -> Iterator[dict[str, str]]:
    """What came to nothing, as JSON has it: in the plan, then shard by shard."""
    with (manifest / plan.REJECTED).open() as lines:
        yield from map(json.loads, lines)
    for shard in made:
        yield from json.loads((out / PARTS / f"{shard.name}.json").read_text())["rejected"]


def _digest(manifest: pathlib.Path) -> str:
    total = hashlib.sha256()
    for name in (plan.PLACES, plan.ACQUISITIONS, plan.LABELS, plan.SOURCES):
        with (manifest / name).open("rb") as file:  # the table of labels may be larger than the memory
            while data := file.read(2**20):
                total.update(data)
    return total.hexdigest()


def _claim(out: pathlib.Path, facts: Mapping[str, Any]) -> TextIO:
    """Makes ``out`` the place of this build while what it returns is open; clears what a killed one left.

    Raises:
      ValueError: another build's place, or one that is at work.
    """
    if out.is_dir() and any(out.iterdir()) and not ((out / FACTS).exists() or (out / LOCK).exists()):
        raise ValueError(f"--out: {out} is not empty and no build of ours; wanted a new folder")
    (out / PARTS).mkdir(parents=True, exist_ok=True)
    path, lock = out / FACTS, (out / LOCK).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"--out: another build is at work in {out}") from error
    if path.exists():
        had = json.loads(path.read_text())
        if had != facts:
            changed = sorted(key for key in facts if had.get(key) != facts[key])
            raise ValueError(
                f"--out: {out} was begun with another {', '.join(changed)}; wanted a new folder, or the same"
            )
    else:
        unfinished = out / f"{FACTS}.incomplete-{os.getpid()}"
        unfinished.write_text(json.dumps(facts, indent=1) + "\n")
        os.replace(unfinished, path)
    for leftover in _leftovers(out):
        leftover.unlink(missing_ok=True)
    return lock


def _leftovers(out: pathlib.Path) -> Iterator[pathlib.Path]:
    yield from out.glob("*.incomplete-*")
    yield from (out / PARTS).glob("*.incomplete-*")


def main(arguments: Sequence[str] | None = None) -> None:
    """Nothing; the command line."""
    parser = argparse.ArgumentParser(description="Samples of a manifest as ArrayRecord files.")
    parser.add_argument("--manifest", type=pathlib.Path, required=True, help="folder that ingest.plan wrote")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the samples; the same one goes on")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--places_per_shard", type=int, default=64)
    parser.add_argument("--min_clear_share", type=float, default=0.1, help="of a date's pixels, else it is left out")
    given = parser.parse_args(arguments)
    if given.workers < 1 or given.places_per_shard < 1 or not 0 <= given.min_clear_share <= 1:
        parser.error("--workers and --places_per_shard: wanted 1 or more; --min_clear_share: wanted 0 to 1")
    how = dict(workers=given.workers, places_per_shard=given.places_per_shard, min_clear_share=given.min_clear_share)
    try:
        print(build(given.manifest, given.out, **how))
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")
    except OSError as error:
        parser.exit(1, f"error: {error}. What is whole stays; the same command goes on\n")


if __name__ == "__main__":
    main()
