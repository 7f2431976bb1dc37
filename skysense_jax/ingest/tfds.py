"""Samples as a dataset of TensorFlow Datasets: ``python -m skysense_jax.ingest.tfds --samples=DIR --data_dir=DIR``.

The shards that build.py or from_tfds.py wrote get a second name, by the convention of TensorFlow Datasets, and its
dataset_info.json and features.json beside; they are not copied where both folders lie on one file system. Where
TensorFlow is installed ``tfds build`` does the same; its command line cannot be imported without (tfds 4.9.10).
Reading: data/tfds_records.py.
"""

import argparse
import json
import os
import pathlib
import shutil
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow.parquet as pq

try:
    import tensorflow_datasets as tfds
except ImportError as error:
    raise ModuleNotFoundError(f"{error}; this needs: pip install --editable '.[tfds]'") from error

from skysense_jax.data.tfds_records import Records
from skysense_jax.ingest import index

_FORMAT = tfds.core.FileFormat.ARRAY_RECORD.value
_BESIDE = ("README.md", "index.parquet", "statistics.json")


class SkysenseSamples(tfds.core.DatasetBuilder):
    """``skysense_samples``: the samples in the folder that --manual_dir names."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Records of schema 1."}  # noqa: RUF012
    MANUAL_DOWNLOAD_INSTRUCTIONS = "--manual_dir: a folder that skysense_jax.ingest.build or from_tfds wrote"

    def __init__(self, *, file_format: Any = _FORMAT, **kwargs: Any):
        super().__init__(**kwargs)
        if tfds.core.FileFormat.from_value(file_format).value != _FORMAT:
            raise ValueError(f"file_format: got {file_format}; wanted {_FORMAT}, which the shards are")
        self.info.set_file_format(file_format)

    def _info(self) -> tfds.core.DatasetInfo:
        told = "Aligned samples of several sensors, made by skysense_jax.ingest. Their card is README.md beside this."
        return tfds.core.DatasetInfo(builder=self, description=told, features=Records())

    def _download_and_prepare(self, dl_manager: Any, download_config: Any) -> None:
        samples, target = pathlib.Path(dl_manager.manual_dir), pathlib.Path(self.data_dir)
        lengths = lengths_of(samples)
        splits = []
        for split in dict.fromkeys(split for split, _ in lengths):
            files = [(file, length) for (of, file), length in lengths.items() if of == split]
            template = tfds.core.ShardedFileTemplate(
                data_dir=tfds.core.Path(target), dataset_name=self.name, split=split, filetype_suffix=_FORMAT
            )
            for (file, _), path in zip(files, template.sharded_filepaths(len(files))):
                _link(samples / file, pathlib.Path(path))
            splits.append(
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=[length for _, length in files],
                    num_bytes=sum((samples / file).stat().st_size for file, _ in files),
                    filename_template=template,
                )
            )
        for name in _BESIDE:
            _link(samples / name, target / name)
        self.info.set_splits(tfds.core.SplitDict(splits))
        rows = json.loads((samples / index.ROWS).read_text())
        self.info.features.take(rows, index.read_labels(samples).classes)

    def _as_dataset(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("ArrayRecord files are read by tfds.data_source, not by tf.data")


def lengths_of(samples: pathlib.Path) -> dict[tuple[str, str], int]:
    """How many samples each shard holds, by split and file name.

    Raises:
      ValueError: no such folder, or its build has not ended.
    """
    if not (samples / "index.parquet").exists():
        raise ValueError(f"{samples} has no index.parquet; wanted a folder that ingest.build or from_tfds ended in")
    table = pq.read_table(samples / "index.parquet", columns=["split", "shard"]).to_pylist()
    return dict(Counter((row["split"], f"{row['shard']}.array_record") for row in table))


def _link(source: pathlib.Path, target: pathlib.Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)


def prepare(samples: pathlib.Path, data_dir: pathlib.Path) -> str:
    """Where the dataset lies that it made of the folder ``samples``.

    Raises:
      ValueError: as of ``lengths_of``, or there is one already.
    """
    lengths_of(samples)
    builder = SkysenseSamples(data_dir=data_dir)
    if builder.is_prepared():
        raise ValueError(f"--data_dir: {builder.data_dir} exists; wanted another folder, or that one removed")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=samples))
    return builder.data_dir


def main(arguments: Sequence[str] | None = None) -> None:
    """Nothing; the command line."""
    parser = argparse.ArgumentParser(description="Samples as a dataset of TensorFlow Datasets.")
    parser.add_argument("--samples", type=pathlib.Path, required=True, help="folder that build or from_tfds wrote")
    parser.add_argument("--data_dir", type=pathlib.Path, required=True, help="of TensorFlow Datasets")
    given = parser.parse_args(arguments)
    try:
        where = prepare(given.samples, given.data_dir)
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")
    print(f"Read it: tfds.data_source('{SkysenseSamples.name}', data_dir='{given.data_dir}')")
    print(f"Train on it: --config.data.sources=\"(('{where}/*-train.*', 1.0),)\"")


if __name__ == "__main__":
    from skysense_jax.ingest import tfds as itself  # dataset_info.json names the module, which is not __main__

    itself.main()
