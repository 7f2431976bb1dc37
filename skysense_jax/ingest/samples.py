"""Turns a folder of small real samples into records: ``python -m skysense_jax.ingest.samples --source=DIR --out=DIR``.

One ArrayRecord file per kind of sample, ``rejected.jsonl`` with a reason for every file that became none, and
``statistics.json`` with means and deviations per kind. The folder under --out appears when everything in it is written.
Kinds and the folders that they come from: ``KINDS``. What trains on the result: configs/real_mix.py, whose
``new_modalities`` are the rows that the table lacks. A place is what one source says is one place; nothing is joined.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from skysense_jax.data.checks import RecordError
from skysense_jax.data.records import ShardWriter, encode_sample
from skysense_jax.data.sample import Sample
from skysense_jax.ingest import index, read_aerial, read_sentinel
from skysense_jax.ingest.acquisitions import Rejected
from skysense_jax.ingest.histograms import Histograms
from skysense_jax.ingest.rasters import Refused
from skysense_jax.ingest.read_sentinel import Item
from skysense_jax.modalities import Modality

_Find = Callable[[pathlib.Path, Mapping[str, Modality]], list[Item]]

KINDS: dict[str, tuple[str, _Find]] = {  # kind: (folder of the source, what finds its items)
    "triple": ("treesatai_ts_sample", lambda folder, rows: read_sentinel.find_triples(folder)),
    "sentinel_series": ("worldcereal_patches", lambda folder, rows: read_sentinel.find_patches(folder)),
    "sentinel_single": ("terramesh_examples", lambda folder, rows: read_sentinel.find_tiles(folder)),
    "scenes": ("s2_scenes", lambda folder, rows: read_sentinel.find_scenes(folder)),
    "hr": ("aerial_hr", lambda folder, rows: read_aerial.find_aerial(folder)),
    "naip": ("chesapeake_naip_1m", read_aerial.find_naip),
    "pan_osm": ("spacenet_samples", read_aerial.find_panchromatic),
    "extracts": ("osm_extracts", lambda folder, rows: read_aerial.find_extracts(folder)),
}
_FOLDERS = ", ".join(folder for folder, _ in KINDS.values())
_NOTES = (".md", ".csv")  # files that describe others


@dataclasses.dataclass
class Kind:
    """What one kind came to.

    Attributes:
      samples, dates, rejected: how many; dates over all modalities.
      histograms: of the numbers of its valid pixels.
    """

    histograms: Histograms
    samples: int = 0
    dates: int = 0
    rejected: int = 0

    def add(self, sample: Sample) -> None:
        self.samples += 1
        for name, series in sample.series.items():
            self.dates += len(series.days)
            self.histograms.add(name, series.images, series.valid)


@dataclasses.dataclass(frozen=True)
class Report:
    """What a conversion made; ``rejected`` are files, named by their path from the source."""

    kinds: Mapping[str, Kind]
    rejected: Sequence[Rejected]

    def table(self) -> str:
        lines = [f"{'kind':16} {'samples':>7} {'dates':>6} {'rejected':>8}"]
        lines += [f"{name:16} {k.samples:7} {k.dates:6} {k.rejected:8}" for name, k in self.kinds.items()]
        unread = len(self.rejected) - sum(kind.rejected for kind in self.kinds.values())
        return "\n".join([*lines, f"{'(no reader)':16} {0:7} {0:6} {unread:8}"])

    def statistics(self) -> dict[str, dict[str, dict]]:
        """Per kind and modality: ``Histograms.summary``, over valid pixels, clouds included."""
        rounded = lambda found: {key: np.round(value, 3).tolist() for key, value in found.items()}  # noqa: E731
        return {
            name: {modality: rounded(found) for modality, found in kind.histograms.summary().items()}
            for name, kind in self.kinds.items()
            if kind.samples
        }


def convert(source: pathlib.Path, out: pathlib.Path, *, modalities: Sequence[Modality]) -> Report:
    """What was made of ``source``; writes ``out``, which must not exist or be empty.

    Raises:
      ValueError: ``source`` is no folder of samples, ``out`` holds something, or not one sample came of it.
    """
    folders = [folder for folder, _ in KINDS.values()]
    if not any((source / folder).is_dir() for folder in folders):
        parent = f" (wanted its parent, {source.parent})" if source.resolve().name in folders else ""
        raise ValueError(f"--source: {source} has none of the folders {_FOLDERS}{parent}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out: {out} exists and is not empty; wanted a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f"{out.name}.incomplete-{os.getpid()}")
    unfinished.mkdir()
    try:
        report = _convert_into(source, unfinished, modalities)
        if not sum(kind.samples for kind in report.kinds.values()):
            reasons = "\n".join(f"  {r.name}: {r.reason}" for r in report.rejected)
            raise ValueError(f"--source: {source} holds no sample; rejected:\n{reasons}")
        os.replace(unfinished, out)
    finally:
        if unfinished.exists():
            shutil.rmtree(unfinished)
    return report


def _convert_into(source: pathlib.Path, out: pathlib.Path, modalities: Sequence[Modality]) -> Report:
    rows = {row.name: row for row in modalities}
    kinds: dict[str, Kind] = {}
    rejected: list[Rejected] = []
    claimed: set[pathlib.Path] = set()
    for name, (folder, find) in KINDS.items():
        kind = kinds[name] = Kind(Histograms(modalities))
        items = find(source / folder, rows) if (source / folder).is_dir() else []
        payloads: list[bytes] = []
        for item in items:
            claimed.update(item.files)
            try:
                samples = _read(item)
                encoded = [encode_sample(sample, modalities) for sample in samples]  # all of a place, or nothing
            except (Refused, RecordError) as error:
                kind.rejected += 1
                rejected.append(Rejected("file", str(item.path.relative_to(source)), str(error)))
                continue
            payloads += encoded
            for sample in samples:
                kind.add(sample)
        if payloads:
            with ShardWriter(out / f"{name}-00000-of-00001.array_record") as writer:
                for payload in payloads:
                    writer.write(payload)
    for path in sorted(p for p in source.rglob("*") if p.is_file() and p.suffix not in _NOTES):
        if path not in claimed:
            rejected.append(Rejected("file", str(path.relative_to(source)), "no reader for this file"))
    with (out / "rejected.jsonl").open("w") as file:
        file.writelines(json.dumps(dataclasses.asdict(r)) + "\n" for r in rejected)
    report = Report(kinds=kinds, rejected=rejected)
    index.write_rows(modalities, out / index.ROWS)
    (out / "statistics.json").write_text(json.dumps(report.statistics(), indent=1) + "\n")
    return report


def _read(item: Item) -> list[Sample]:
    """The samples of one place; whatever its library says of a file must not cost the other places."""
    try:
        return list(item.read())
    except (Refused, RecordError, MemoryError):
        raise
    except Exception as error:
        raise Refused(f"{type(error).__name__}: {error}") from error


def main(arguments: Sequence[str] | None = None) -> None:
    """Nothing; the command line."""
    from configs import real_mix  # the rows that its runs read are the rows that are written
    from skysense_jax.modalities import MODALITIES, select

    parser = argparse.ArgumentParser(description="Small real samples as ArrayRecord files, one per kind.")
    parser.add_argument(
        "--source",
        type=pathlib.Path,
        required=True,
        help=f"the folder that holds these folders, any of them: {_FOLDERS}",
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="new folder for the records")
    options = parser.parse_args(arguments)
    new = real_mix.get_config().data.new_modalities
    try:
        report = convert(
            options.source,
            options.out,
            modalities=select([*MODALITIES, *(row["name"] for row in new)], new),
        )
    except ValueError as error:
        parser.exit(1, f"{error}\n")
    for entry in report.rejected:
        print(f"rejected {entry.name}: {entry.reason}")
    print(report.table())
    if all(report.kinds[name].samples for name in real_mix.SHARES):
        print(f"Train on it: python -m skysense_jax.train --config=configs/real_mix.py:{options.out} --workdir=RUN")
    for kind, found in report.statistics().items():
        for modality, numbers in found.items():
            print(f"{kind} {modality}: {', '.join(f'{name} {value}' for name, value in numbers.items())}")


if __name__ == "__main__":
    main()
