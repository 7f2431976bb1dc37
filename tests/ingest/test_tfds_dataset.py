"""TensorFlow Datasets and our pipeline read the same shards, to the same samples, and TensorFlow is not asked for."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath

from skysense_jax.data.records import Record, RecordSource
from skysense_jax.data.sample import UNDATED, Sample
from skysense_jax.ingest import engines, folder
from skysense_jax.ingest import tfds as of_tfds
from skysense_jax.modalities import MODALITIES, Modality, from_json
from tests.data.random_samples import make_sample, with_series

ROOT = pathlib.Path(__file__).parents[2]
PAN = Modality(
    name="pan",
    bands=("PAN",),
    dtype="uint16",
    unit="digital number",
    value_range=(1, 65535),
    typical_range=(20, 20000),
    wrong_unit_hint="reflectance",
    pixels_per_cell=2,
    patch=1,
    mean=(455.0,),
    std=(257.0,),
    statistics_source="made up",
)
ROWS = (MODALITIES["hr"], MODALITIES["s2"], MODALITIES["s1"], PAN)
NO_TENSORFLOW = 'import pathlib\npathlib.Path(__file__).with_name("asked").touch()\nraise ImportError("TensorFlow")\n'


class Few(folder.Maker):
    """Samples with what a sample may lack lacking in some; the second shard of three comes to nothing."""

    rows, sources = ROWS, (dict(name="random", kind="made up", licence="CC0-1.0"),)
    shards = folder.shards({"train": 8, "validation": 2}, size=3)

    def made(self, shard):
        for number in range(shard.start, shard.stop):
            if shard.split == "train" and 3 <= number < 6:
                yield folder.Made(None)
                continue
            dates = [dict(hr=1, s2=2, s1=1), dict(s2=3), dict(pan=1, s1=2), dict(hr=1)][number % 4]
            how = dict(dates=dates, labels=number % 2 == 0, rows=ROWS, name=f"{shard.split} {number}")
            sample = make_sample(number, extent_cells=3 + number, **how)
            if number == 1:
                sample = dataclasses.replace(sample, longitude=None, latitude=None)
                sample = with_series(sample, "s2", days=np.full(3, UNDATED, np.int32))
            yield folder.Made(sample)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    out = tmp_path_factory.mktemp("few") / "samples"
    engines.build(Few, epath.Path(out), facts={}, engine=engines.Engine())
    return out


@pytest.fixture(scope="module")
def data_dir(samples):
    where = samples.parent / "tfds"
    of_tfds.main(["--samples", str(samples), "--data_dir", str(where)])
    return where


def _equal(element, sample: Sample):
    for name in ("id", "provenance", "licence"):
        assert element[name].decode() == getattr(sample, name)
    for name in ("longitude", "latitude"):
        np.testing.assert_equal(element[name], np.nan if getattr(sample, name) is None else getattr(sample, name))
    assert element["extent_cells"] == sample.extent_cells
    if sample.labels is None:
        assert element["labels"].shape == (0, 0)
    else:
        np.testing.assert_array_equal(element["labels"], sample.labels, strict=True)
    for row in ROWS:
        found, series = element[row.name], sample.series.get(row.name)
        if series is None:
            side = sample.extent_cells * row.pixels_per_cell
            assert found["images"].shape == (0, side, side, row.num_bands)
            assert len(found["days"]) == len(found["valid"]) == len(found["cloud"]) == len(found["orbits"]) == 0
            assert np.isnan(found["native_gsd_m"])
            continue
        assert found["native_gsd_m"] == series.native_gsd_m
        for part in ("images", "valid", "cloud", "days", "orbits"):
            np.testing.assert_array_equal(found[part], getattr(series, part), strict=True)


@pytest.mark.parametrize(("split", "length"), [("train", 5), ("validation", 2)])
def test_both_readers_read_the_same_files_to_the_same_samples(samples, data_dir, split, length):
    source = tfds.data_source(of_tfds.SkysenseSamples.name, data_dir=data_dir, split=split)
    ours = RecordSource(str(data_dir / "skysense_samples" / "1.0.0" / f"*-{split}.array_record*"), ROWS)
    assert len(source) == len(ours) == length
    for index in range(length):
        _equal(source[index], ours[index].decode())
    written = sorted((samples).glob(f"{split}-*.array_record"))
    named = sorted((data_dir / "skysense_samples" / "1.0.0").glob(f"*-{split}.array_record*"))
    assert [path.stat().st_ino for path in named] == [path.stat().st_ino for path in written]
    assert [path.name for path in named] == [
        f"skysense_samples-{split}.array_record-{number:05d}-of-{len(written):05d}" for number in range(len(written))
    ]


def test_elements_are_what_features_json_says(data_dir):
    """By the library's own account of types and shapes, of one mould for all samples."""
    builder = tfds.builder_from_directory(data_dir / "skysense_samples" / "1.0.0")
    wanted = builder.info.features.get_tensor_info()
    for element in builder.as_data_source("train"):
        assert element.keys() == wanted.keys()
        for name, info in wanted.items():
            for key, part in info.items() if isinstance(info, dict) else [(None, info)]:
                got = np.asarray(element[name] if key is None else element[name][key])
                if part.np_dtype == np.object_:
                    continue  # texts
                assert got.dtype == part.np_dtype, (name, key)
                assert got.ndim == len(part.shape), (name, key)
                assert all(size in (None, of) for size, of in zip(part.shape, got.shape)), (name, key)
    assert builder.info.features.modalities == ROWS
    assert builder.info.features["pan"]["images"].doc.desc == "digital number"


def test_grain_shuffles_and_maps_what_tensorflow_datasets_reads(data_dir):
    source = tfds.data_source(of_tfds.SkysenseSamples.name, data_dir=data_dir, split="train")
    dataset = grain.MapDataset.source(source).shuffle(seed=3).map(lambda element: element["id"].decode())
    assert sorted(dataset) == [f"train {number}" for number in (0, 1, 2, 6, 7)]


def test_raw_bytes_are_records_of_which_a_window_is_decoded_alone(data_dir):
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    source = tfds.builder("skysense_samples", data_dir=data_dir).as_data_source("train", deserialize_method=raw)
    record = Record(source[0], ROWS)
    whole = tfds.data_source("skysense_samples", data_dir=data_dir, split="train")[0]["s2"]["images"]
    np.testing.assert_array_equal(record.window("s2", 1, row=1, column=0, side=2).pixels, whole[1, 1:3, 0:2])
    with pytest.raises(ValueError, match="decoders: wanted none"):
        tfds.data_source(
            "skysense_samples", data_dir=data_dir, split="train", decoders={"id": tfds.decode.SkipDecoding()}
        )[0]


def test_reading_asks_for_neither_tensorflow_nor_what_building_needs(data_dir, tmp_path):
    """With a package of TensorFlow's name in the way, and in a process that has imported nothing of ours."""
    fake = tmp_path / "tensorflow"
    fake.mkdir()
    (fake / "__init__.py").write_text(NO_TENSORFLOW)
    code = (
        "import sys, tensorflow_datasets as tfds\n"
        f"source = tfds.data_source('skysense_samples', data_dir={str(data_dir)!r}, split='train')\n"
        "assert source[0]['s2']['images'].shape == (2, 3, 3, 10)\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))\n"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not (fake / "asked").exists()
    loaded = set(done.stdout.split())
    assert {"skysense_jax", "array_record"} <= loaded
    assert not loaded & {"tensorflow", "jax", "rasterio", "osmium", "apache_beam"}


def test_command_of_tensorflow_datasets_builds_the_same(samples, data_dir, tmp_path):
    """What ``tfds build`` runs when it has read its flags; to read them it needs TensorFlow, Beam and Croissant."""
    from tensorflow_datasets.scripts.cli import build, cli_utils

    arguments = build.Args(
        positional_datasets=["skysense_samples"],
        paths=cli_utils.PathOptions(data_dir=tfds.core.Path(tmp_path), manual_dir=tfds.core.Path(samples)),
        generation=cli_utils.GenerationOptions(imports="skysense_jax.ingest.tfds"),
    )
    arguments.execute()
    made, wanted = (where / "skysense_samples" / "1.0.0" for where in (tmp_path, data_dir))
    names = sorted(path.name for path in wanted.iterdir())
    assert sorted(path.name for path in made.iterdir()) == names
    assert {name: (made / name).read_bytes() for name in names} == {
        name: (wanted / name).read_bytes() for name in names
    }


def test_dataset_is_built_once_and_of_samples_that_are_whole(samples, data_dir, tmp_path, capsys):
    with pytest.raises(SystemExit):
        of_tfds.main(["--samples", str(samples), "--data_dir", str(data_dir)])
    assert "--data_dir: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        of_tfds.main(["--samples", str(tmp_path), "--data_dir", str(tmp_path / "new")])
    assert "has no index.parquet; wanted a folder that ingest.build" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="file_format: got tfrecord; wanted array_record"):
        of_tfds.SkysenseSamples(data_dir=tmp_path, file_format="tfrecord")


def test_shards_are_copied_where_they_cannot_be_linked(samples, tmp_path, monkeypatch):
    def other_file_system(source, target):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_file_system)
    of_tfds.prepare(samples, tmp_path)
    assert len(tfds.data_source("skysense_samples", data_dir=tmp_path, split="train")) == 5


def test_folder_of_samples_says_which_rows_it_has(samples):
    rows = json.loads((samples / "modalities.json").read_text())
    assert tuple(from_json(row) for row in rows) == ROWS
    assert "where they lie is unknown" not in (samples / "README.md").read_text()


def test_card_of_samples_of_unknown_place_says_so(tmp_path):
    class Nowhere(Few):
        def made(self, shard):
            for made in super().made(shard):
                if made.sample is not None:
                    yield folder.Made(dataclasses.replace(made.sample, longitude=None, latitude=None))

    engines.build(functools.partial(Nowhere), epath.Path(tmp_path / "out"), facts={}, engine=engines.Engine())
    assert "- where they lie is not known" in (tmp_path / "out" / "README.md").read_text()
