"""Makes samples of a manifest: ``python -m skysense_jax.ingest.build --manifest=MANIFEST --out=DIR``.

The samples of a shard are those of some places, in the manifest's order. The same command goes on after a kill, and the
bytes depend neither on kills nor on who worked. At the end: index.parquet, statistics.json, modalities.json,
rejected.jsonl and README.md, the dataset's card. Next: series.py (reading), folder.py, engines.py.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence

from etils import epath

from skysense_jax import storage
from skysense_jax.data.sample import Sample
from skysense_jax.ingest import acquisitions as acquisitions_lib
from skysense_jax.ingest import engines, folder, osm, places, remote
from skysense_jax.ingest import manifest as files
from skysense_jax.ingest.acquisitions import Acquisition, Rejected
from skysense_jax.ingest.engines import Engine
from skysense_jax.ingest.folder import Made, Maker, Shard
from skysense_jax.ingest.labels import Coverage, LabelMaps
from skysense_jax.ingest.places import Place
from skysense_jax.ingest.series import read_series

_MANIFEST = (files.PLACES, files.ACQUISITIONS, files.LABELS, files.SOURCES)  # what the samples depend on


class Builder(Maker):
    """Makes the samples of a manifest.

    Args:
      manifest: what ``plan`` wrote.
      min_clear_share: of a date's pixels, below which it is left out.
      places_per_shard: at most.
    """

    def __init__(self, manifest: storage.Directory, *, min_clear_share: float, places_per_shard: int):
        self._min_clear_share = min_clear_share
        manifest = self._read_here(manifest)
        facts = json.loads((manifest / files.SOURCES).read_text())
        self.rows, self._require = files.rows_with(facts["modalities"]), facts["choice"]["require"]
        self.sources = facts["sources"]
        self._refused = manifest / files.REJECTED
        self._licences = {source["name"]: source["licence"] for source in self.sources}
        self._signs = {source["name"]: remote.signer(source["sign"]) for source in self.sources if "sign" in source}
        coverages = [Coverage.of(covered) for covered in facts["labels"]]
        classes = osm.read_classes(facts.get("classes", ()))
        self.labels = classes.map
        self._acquisitions = acquisitions_lib.read(manifest / files.ACQUISITIONS)
        listed = places.read(manifest / files.PLACES)
        self._places = {
            split: [place for place in listed if place.split == split] for split in (places.TRAIN, places.VALIDATION)
        }
        self._maps = LabelMaps(manifest / files.LABELS, coverages, classes)
        self.shards = folder.shards({split: len(of) for split, of in self._places.items()}, size=places_per_shard)

    def _read_here(self, manifest: storage.Directory) -> pathlib.Path:
        """The manifest in a folder of this machine."""
        if not storage.in_bucket(manifest):
            return pathlib.Path(manifest)
        self._copy = tempfile.TemporaryDirectory()  # as long as this is there
        for name in (*_MANIFEST, files.REJECTED):
            (pathlib.Path(self._copy.name) / name).write_bytes((manifest / name).read_bytes())
        return pathlib.Path(self._copy.name)

    def rejected(self) -> Iterator[Rejected]:
        with self._refused.open() as lines:
            yield from (Rejected(**json.loads(line)) for line in lines)

    def made(self, shard: Shard) -> Iterator[Made]:
        for place in self._places[shard.split][shard.start : shard.stop]:
            yield folder.one(place.id, lambda place=place: Made(*self.sample(place)))

    def sample(self, place: Place) -> tuple[Sample | None, list[Rejected]]:
        """The sample of a place, None if it has not what it must have, and all that was left out, with reasons."""
        of_row: dict[str, list[Acquisition]] = {}
        for index in place.acquisitions:
            acquisition = self._acquisitions[index]
            of_row.setdefault(acquisition.modality, []).append(acquisition)
        series, rejected = {}, []
        for row in self.rows:
            name, found = row.name, of_row.get(row.name, [])
            if not found:
                continue
            how = dict(min_clear_share=self._min_clear_share, signs=self._signs)
            read, refused = read_series(found, place.square, row, **how)
            told = functools.partial(acquisitions_lib.date_over, place.id, name)
            rejected += [dataclasses.replace(entry, name=told(entry.name)) for entry in refused]
            if read is not None:
                series[name] = read
        missing = [name for name in self._require if name not in series]
        if missing or not series:
            told = f"no date is left of {', '.join(missing) or 'any row'}"
            return None, [*rejected, Rejected("place", place.id, told)]
        sources = sorted({acquisition.source for name in series for acquisition in of_row[name]})
        mapped = {source.partition("/")[0] for source in self._maps.covering(place.square)}
        longitude, latitude = place.square.centre()
        sample = Sample(
            id=place.id,
            extent_cells=place.cells,
            series=series,
            labels=self._maps.draw(place.square),
            longitude=longitude,
            latitude=latitude,
            provenance=", ".join(sources),
            licence="; ".join(sorted({self._licences[source] for source in mapped.union(sources)})),
        )
        return sample, rejected


def build(
    manifest: str | os.PathLike,
    out: str | os.PathLike,
    *,
    engine: Engine,
    places_per_shard: int = 64,
    min_clear_share: float = 0.1,
) -> str:
    """What was made, as a table; writes what is missing of ``out``.

    Raises:
      ValueError: ``manifest`` is none, or as of ``engines.build``.
      OSError: as there.
    """
    manifest, out = folder.directory(manifest, flag="--manifest"), folder.directory(out, flag="--out")
    if not (manifest / files.PLACES).exists():
        raise ValueError(f"--manifest: {manifest} has no {files.PLACES}; wanted a folder that ingest.plan wrote")
    how = dict(places_per_shard=places_per_shard, min_clear_share=min_clear_share)
    facts = {"manifest": _digest(manifest), **how}
    return engines.build(functools.partial(Builder, manifest, **how), out, facts=facts, engine=engine)


def _digest(manifest: epath.Path) -> str:
    total = hashlib.sha256()
    for name in _MANIFEST:
        with (manifest / name).open("rb") as file:  # the table of labels may be larger than the memory
            while data := file.read(2**20):
                total.update(data)
    return total.hexdigest()


def main(arguments: Sequence[str] | None = None) -> None:
    """Nothing; the command line."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Samples of a manifest as ArrayRecord files.",
    )
    parser.add_argument("--manifest", required=True, help="folder that ingest.plan wrote; also gs://bucket/name")
    parser.add_argument("--out", required=True, help="folder for the samples, also in a bucket; the same one goes on")
    parser.add_argument("--places_per_shard", type=int, default=64)
    parser.add_argument("--min_clear_share", type=float, default=0.1, help="of a date's pixels, else it is left out")
    engines.add_flags(parser)
    given = parser.parse_args(arguments)
    if given.places_per_shard < 1 or not 0 <= given.min_clear_share <= 1:
        parser.error("--places_per_shard: wanted 1 or more; --min_clear_share: wanted 0 to 1")
    how = dict(places_per_shard=given.places_per_shard, min_clear_share=given.min_clear_share)
    engines.command(parser, lambda: build(given.manifest, given.out, engine=engines.engine_of(given), **how))


if __name__ == "__main__":
    from skysense_jax.ingest import build as itself  # workers find Builder under this name, not under __main__

    itself.main()
