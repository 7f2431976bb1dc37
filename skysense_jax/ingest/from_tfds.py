"""Samples of sets that TensorFlow Datasets knows: ``python -m skysense_jax.ingest.from_tfds --dataset=eurosat/all``.

For pre-training on one sensor. A set must have been built as ArrayRecord files; no TensorFlow is needed to read it.
What a set says goes into the samples: units, dates and places where it has them, and names of scene classes into the
column ``scene_classes`` of index.parquet (a record has no room for one). Which sets, and what of them: tfds_sets.py.
Next: folder.py (what is written), engines.py (who works).
"""

import argparse
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

try:
    import tensorflow_datasets as tfds
except ImportError as error:
    raise ModuleNotFoundError(f"{error}; this needs: pip install --editable '.[tfds]'") from error

from skysense_jax.data.sample import Sample
from skysense_jax.ingest import engines, folder
from skysense_jax.ingest.engines import Engine
from skysense_jax.ingest.folder import Made, Maker, Shard
from skysense_jax.ingest.rasters import MAX_STRETCH
from skysense_jax.ingest.tfds_sets import OF_UNKNOWN_SIZE, S2_L1C, SETS, Options, text_of
from skysense_jax.modalities import METRES_PER_CELL, MODALITIES

_COARSEST_M = MAX_STRETCH * METRES_PER_CELL / MODALITIES["hr"].pixels_per_cell  # of pixels that hr takes


class FromTfds(Maker):
    """Makes the samples of a set, those of its splits.

    Args:
      dataset: one of ``SETS``.
      data_dir: of TensorFlow Datasets.
      options: as the command has them.
      samples_per_shard: at most.

    Raises:
      ValueError: the set is not there, not as ArrayRecord files, or not what it was.
    """

    columns = {"scene_classes": pa.list_(pa.string())}  # noqa: RUF012

    def __init__(self, dataset: str, data_dir: str, *, options: Options, samples_per_shard: int):
        self._dataset, self._set, self._options = dataset, SETS[dataset], options
        self._builder = _opened(dataset, data_dir)
        lengths = {name: info.num_examples for name, info in self._builder.info.splits.items()}
        self._elements = {split: self._builder.as_data_source(split) for split in lengths}
        self._names = class_names(self._builder.info.features[self._set.scenes])
        self.rows = tuple(MODALITIES["s2"] if row is S2_L1C and options.l1c_as_s2 else row for row in self._set.rows)
        self.shards = folder.shards(lengths, size=samples_per_shard)
        self.sources = [dict(name=dataset, kind="TensorFlow Datasets", licence=self._set.licence)]

    def made(self, shard: Shard) -> Iterator[Made]:
        for number in range(shard.start, shard.stop):
            name = f"{self._dataset} {shard.split} {number}"
            yield folder.one(name, functools.partial(self._made, shard, number))

    def _made(self, shard: Shard, number: int) -> Made:
        element = self._elements[shard.split][number]
        content = self._set.read(element, self._options)
        sample = Sample(
            id=f"{self._dataset}/{shard.split}/{text_of(element[self._set.name])}",
            extent_cells=content.cells,
            series=content.series,
            longitude=content.longitude,
            latitude=content.latitude,
            provenance=f"{self._dataset} {self._builder.version} of TensorFlow Datasets ({self._set.told})",
            licence=self._set.licence,
        )
        classes = np.atleast_1d(element[self._set.scenes])
        return Made(sample, facts={"scene_classes": [self._names[int(one)] for one in classes]})


def class_names(feature: Any) -> list[str]:
    """Of the classes of a ClassLabel, or of a sequence of them."""
    return getattr(feature, "feature", feature).names


def _opened(dataset: str, data_dir: str) -> tfds.core.DatasetBuilder:
    builder = tfds.builder(dataset, data_dir=data_dir)
    how = f"tfds build {dataset} --file_format=array_record --data_dir={data_dir} (needs TensorFlow)"
    if not builder.is_prepared():
        raise ValueError(f"--data_dir: {data_dir} has no {builder.info.full_name}; wanted what this writes: {how}")
    has = builder.info.file_format.value
    if has != tfds.core.FileFormat.ARRAY_RECORD.value:
        raise ValueError(f"--data_dir: {builder.data_dir} holds {has} files; wanted array_record, by another: {how}")
    features = builder.info.features
    for name, shape in SETS[dataset].shapes.items():
        got = tuple(features[name].shape) if name in features else None
        if got != shape:
            raise ValueError(f"{builder.info.full_name}: feature {name!r} has shape {got}; wanted {shape}")
    return builder


def build(
    dataset: str, data_dir: str, out: str, *, options: Options, engine: Engine, samples_per_shard: int = 1024
) -> str:
    """What was made, as a table, and how to train on it; writes what is missing of ``out``.

    Raises:
      ValueError: no such set, or it is not fit for training, or as of ``FromTfds`` and ``engines.build``.
      OSError: as of ``engines.build``.
    """
    _check(dataset, options)
    data_dir = str(folder.directory(data_dir, flag="--data_dir"))
    opened = _opened(dataset, data_dir)
    info = (tfds.core.Path(opened.data_dir) / "dataset_info.json").read_bytes()
    facts = dict(dataset=opened.info.full_name, info=hashlib.sha256(info).hexdigest(), **dataclasses.asdict(options))
    make = functools.partial(FromTfds, dataset, data_dir, options=options, samples_per_shard=samples_per_shard)
    where = folder.directory(out, flag="--out")
    table = engines.build(make, where, facts=facts | {"samples_per_shard": samples_per_shard}, engine=engine)
    rows = make().rows
    new = f' --config.data.new_modalities="({dataclasses.asdict(S2_L1C)},)"' if S2_L1C in rows else ""
    return (
        f"{table}\nTrain on it: python -m skysense_jax.train --config=configs/tiny.py --workdir=RUN "
        f"--config.data.sources=\"(('{where}/train-*.array_record', 1.0),)\" "
        f'--config.data.modalities="{tuple(row.name for row in rows)}" '
        f'--config.data.num_dates="{ {row.name: 1 for row in rows} }"{new}'
    )


def _check(dataset: str, options: Options) -> None:
    if dataset.endswith("/rgb"):
        raise ValueError(
            f"--dataset: got {dataset}: 8-bit pixels of 10 m, stretched for the eye, are no reflectance for s2, and hr "
            f"wants pixels of {_COARSEST_M:g} m or less; wanted {dataset.removesuffix('rgb')}all"
        )
    if dataset not in SETS:
        raise ValueError(f"--dataset: got {dataset}; wanted one of {', '.join(SETS)}")
    if dataset in OF_UNKNOWN_SIZE and options.gsd_m is None:
        raise ValueError(
            f"--gsd_m: missing: pixels of {dataset} are 0.2 to 30 m and no file says which; wanted the size that all "
            "count as, such as 0.3125 (training on hr alone, sizes of things then mean nothing)"
        )
    if dataset not in OF_UNKNOWN_SIZE and options.gsd_m is not None:
        raise ValueError(f"--gsd_m: got {options.gsd_m:g}; wanted none: the size of {dataset}'s pixels is known")
    if options.gsd_m is not None and not 0 < options.gsd_m <= _COARSEST_M:
        raise ValueError(f"--gsd_m: got {options.gsd_m:g}; wanted above 0, at most {_COARSEST_M:g} (hr stretches by 2)")
    if options.l1c_as_s2 and S2_L1C not in SETS[dataset].rows:
        raise ValueError(f"--l1c_as_s2: {dataset} is no Level-1C; wanted it left out")


def main(arguments: Sequence[str] | None = None) -> None:
    """Nothing; the command line."""
    parser = argparse.ArgumentParser(description="Sets of TensorFlow Datasets as samples.")
    parser.add_argument("--dataset", required=True, help=f"one of {', '.join(SETS)}")
    parser.add_argument("--data_dir", required=True, help="of TensorFlow Datasets, where the set is as array_record")
    parser.add_argument("--out", required=True, help="folder for the samples, also in a bucket; the same one goes on")
    parser.add_argument("--gsd_m", type=float, help="metres of a pixel, of a set that does not say")
    parser.add_argument("--l1c_as_s2", action="store_true", help="Level-1C as row s2 and not as a row of its own")
    parser.add_argument("--samples_per_shard", type=int, default=1024)
    engines.add_flags(parser)
    given = parser.parse_args(arguments)
    if given.samples_per_shard < 1:
        parser.error("--samples_per_shard: wanted 1 or more")
    options = Options(given.gsd_m, given.l1c_as_s2)
    places = (given.dataset, given.data_dir, given.out)
    engines.command(
        parser,
        lambda: build(
            *places, options=options, engine=engines.engine_of(given), samples_per_shard=given.samples_per_shard
        ),
    )


if __name__ == "__main__":
    from skysense_jax.ingest import from_tfds as itself  # workers find FromTfds under this name, not under __main__

    itself.main()
