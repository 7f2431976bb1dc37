"""Our records as TensorFlow Datasets sees them, so that ``tfds.data_source`` reads the shards that training reads.

TensorFlow Datasets keeps ``tf.train.Example`` messages; ours are maps of blocks (records.py), which cost a quarter of
the time to parse and of which a crop decodes only its tiles. So the shards stay as they are, and features.json names
``Records``, which TensorFlow Datasets imports by itself and which decodes them. Needs tensorflow-datasets (extra
``tfds``), no TensorFlow; only what that library reads and ingest/tfds.py import this module.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from skysense_jax.data.records import Record
from skysense_jax.data.sample import Sample
from skysense_jax.modalities import from_json, label_map

_CONTENT = "jsonFeature"  # where features.json has what ``to_json_content`` gives


class Records(tfds.features.FeaturesDict):
    """Samples: what ``Sample`` has, and under the name of each modality what ``Series`` has.

    The structure is the same for all samples: a modality that one lacks has no dates (first axis 0), a sample without a
    label map one of no pixels, and unknown degrees are NaN. Texts are bytes, as everywhere in TensorFlow Datasets.
    """

    def __init__(self, modalities: Sequence[Mapping[str, Any]] = (), classes: Sequence[str] = (), *, doc: Any = None):
        """``modalities``: rows of the table, as JSON has them; ``classes``: of the label map (ours)."""
        self.modalities = tuple(from_json(row) for row in modalities)
        self.label_map = label_map(classes)
        named = ", ".join(self.label_map.classes)
        tensor, text = tfds.features.Tensor, tfds.features.Text
        features = {
            "id": text(doc="unique in the dataset"),
            "extent_cells": tensor(shape=(), dtype=np.int32, doc="side of the place in cells of 10 m"),
            "longitude": tensor(shape=(), dtype=np.float64, doc="of the centre, degrees; NaN: unknown"),
            "latitude": tensor(shape=(), dtype=np.float64, doc="of the centre, degrees; NaN: unknown"),
            "provenance": text(doc="sources"),
            "licence": text(doc="SPDX id or terms"),
            "labels": tensor(shape=(None, None), dtype=np.uint8, doc=f"0: nothing mapped; from 1: {named}"),
        }
        for row in self.modalities:
            mask = lambda doc: tensor(shape=(None, None, None), dtype=np.bool_, doc=doc)  # noqa: E731
            features[row.name] = {
                "images": tensor(shape=(None, None, None, row.num_bands), dtype=np.dtype(row.dtype).type, doc=row.unit),
                "valid": mask("the sensor has data here"),
                "cloud": mask("the ground is hidden"),
                "days": tensor(shape=(None,), dtype=np.int32, doc="since 1970-01-01; -2**31: unknown"),
                "orbits": tensor(shape=(None,), dtype=np.uint8, doc="0 unknown, 1 ascending, 2 descending"),
                "native_gsd_m": tensor(shape=(), dtype=np.float64, doc="metres; NaN: no dates"),
            }
        super().__init__(features, doc=doc)

    def to_json_content(self) -> dict[str, Any]:
        rows = [dataclasses.asdict(row) for row in self.modalities]
        return {"modalities": rows, "classes": list(self.label_map.classes)}

    @classmethod
    def from_json_content(cls, value: Mapping[str, Any]) -> "Records":
        return cls(**value)

    def take(self, modalities: Sequence[Mapping[str, Any]], classes: Sequence[str] = ()) -> None:
        """Makes these the modalities and classes: a builder knows them when it has seen the samples."""
        self.__init__(modalities, classes)

    def load_metadata(self, data_dir: str | os.PathLike, feature_name: str | None = None) -> None:
        """Takes the modalities and classes of the dataset in ``data_dir``."""
        saved = json.loads((tfds.core.Path(data_dir) / "features.json").read_text())
        self.take(**json.loads(saved[_CONTENT]["json"]))

    def deserialize_example_np(self, serialized_example: bytes | memoryview, *, decoders: Any = None) -> dict[str, Any]:
        """The sample of a record.

        Raises:
          RecordError: it is damaged.
          ValueError: ``decoders`` are given.
        """
        if decoders is not None:
            raise ValueError(
                "decoders: wanted none; to decode a part of a sample read tfds.decode.DeserializeMethod.RAW_BYTES and "
                "take skysense_jax.data.records.Record"
            )
        return self._arrays(Record(bytes(serialized_example), self.modalities, self.label_map).decode())

    def _arrays(self, sample: Sample) -> dict[str, Any]:
        unknown = lambda value: np.float64(np.nan if value is None else value)  # noqa: E731
        found = {
            "id": sample.id.encode(),
            "extent_cells": np.int32(sample.extent_cells),
            "longitude": unknown(sample.longitude),
            "latitude": unknown(sample.latitude),
            "provenance": sample.provenance.encode(),
            "licence": sample.licence.encode(),
            "labels": np.zeros((0, 0), np.uint8) if sample.labels is None else sample.labels,
        }
        for row in self.modalities:
            if row.name in sample.series:
                series = sample.series[row.name]
                parts = {name: getattr(series, name) for name in ("images", "valid", "cloud", "days", "orbits")}
            else:
                side = sample.extent_cells * row.pixels_per_cell
                none = np.zeros((0, side, side), bool)
                parts = dict(images=np.zeros((0, side, side, row.num_bands), row.dtype), valid=none, cloud=none)
                parts |= dict(days=np.zeros(0, np.int32), orbits=np.zeros(0, np.uint8))
            gsd = sample.series[row.name].native_gsd_m if row.name in sample.series else None
            found[row.name] = parts | {"native_gsd_m": unknown(gsd)}
        return found
