"""Sets of TensorFlow Datasets become samples in the right unit: files of the real builders' features, made up here."""

import ast
import datetime
import io
import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio.warp
import tensorflow_datasets as tfds
from PIL import Image
from rasterio.crs import CRS
from rasterio.transform import from_origin

from skysense_jax.data.records import RecordSource
from skysense_jax.data.sample import UNDATED
from skysense_jax.ingest import from_tfds, plan, tfds_sets
from skysense_jax.modalities import MODALITIES, from_json, select
from tests.ingest import earth

# Means of the channels of EuroSAT, as published with it (benchmarks quote them to all digits), by band.
EUROSAT = dict(B1=1354.4, B2=1118.2, B3=1042.9, B4=947.6, B5=1199.5, B6=1999.8, B7=2369.2, B8=2296.8)
EUROSAT |= dict(B9=732.1, B10=12.1, B11=1819.0, B12=1118.9, B8A=2594.1)
# Of So2Sat: filtered intensities of VH and VV, and reflectances of its ten bands.
SO2SAT_VH, SO2SAT_VV = 0.04420110660000, 0.25761027100000
SO2SAT_S2 = (0.123757, 0.109277, 0.101086, 0.114240, 0.159266, 0.181472, 0.174574, 0.195016, 0.154285, 0.109051)


def prepare(dataset, data_dir, **splits):
    """Writes elements as the set's own builder does, which has its features from the installed library."""
    builder = tfds.builder(dataset, data_dir=data_dir, file_format="array_record")
    numbered = {name: ((number, element) for number, element in enumerate(of)) for name, of in splits.items()}
    builder._split_generators = lambda *args, **kwargs: numbered
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=data_dir))
    return builder


def convert(dataset, data_dir, out, *flags):
    from_tfds.main(["--dataset", dataset, "--data_dir", str(data_dir), "--out", str(out), "--workers=1", *flags])


def read(out, *rows, split="train"):
    source = RecordSource(str(out / f"{split}-*.array_record"), rows)
    return [source[index].decode() for index in range(len(source))]


def index(out):
    return pq.read_table(out / "index.parquet").to_pylist()


def rejected(out):
    return [json.loads(line) for line in (out / plan.REJECTED).read_text().splitlines()]


def eurosat(number, *, order=tuple(EUROSAT)):
    """An image with the means of the whole set, a gradient across it, and a pixel without data."""
    image = np.array([EUROSAT[band] for band in order], np.float32) * np.ones((64, 64, 1), np.float32)
    image *= np.linspace(0.8, 1.2, 64, dtype=np.float32)[None, :, None]
    image = np.rint(image + number)
    image[3, 5] = 0
    return {"sentinel2": image, "label": ("Forest", "River")[number % 2], "filename": f"image_{number}.tif"}


@pytest.fixture(scope="module")
def eurosats(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("eurosat")
    prepare("eurosat/all", data_dir, train=[eurosat(number) for number in range(7)])
    return data_dir


def test_eurosat_is_top_of_atmosphere_and_keeps_its_bands_apart(eurosats, tmp_path, capsys):
    convert("eurosat/all", eurosats, tmp_path)
    (row,) = (from_json(row) for row in json.loads((tmp_path / "modalities.json").read_text()))
    assert row == tfds_sets.S2_L1C
    assert "top-of-atmosphere" in row.unit
    samples = sorted(read(tmp_path, row), key=lambda sample: sample.id)
    assert len(samples) == 7
    for number, sample in enumerate(samples):
        series = sample.series["s2_l1c"]
        assert sample.id == f"eurosat/all/train/image_{number}.tif"
        assert sample.extent_cells == 64
        assert series.images.shape == (1, 64, 64, 10)
        assert series.days.tolist() == [UNDATED]
        assert sample.longitude is sample.latitude is None
        assert not series.valid[0, 3, 5]
        assert series.valid.sum() == 64 * 64 - 1
        wanted = [EUROSAT[band] + number for band in MODALITIES["s2"].bands]
        np.testing.assert_allclose(series.images[series.valid].mean(0), wanted, rtol=1e-3)
    assert {row["id"]: row["scene_classes"] for row in index(tmp_path)} == {
        sample.id: [("Forest", "River")[number % 2]] for number, sample in enumerate(samples)
    }
    text = (tmp_path / "README.md").read_text()
    assert "- where they lie is not known" in text
    assert "| eurosat/all | TensorFlow Datasets |" in text
    told = capsys.readouterr().out
    new = ast.literal_eval(re.search(r'new_modalities="(.*)"', told)[1])
    assert select(["s2_l1c"], new) == (row,)


def test_eurosat_counts_as_surface_reflectance_if_one_says_so(eurosats, tmp_path, capsys):
    convert("eurosat/all", eurosats, tmp_path, "--l1c_as_s2")
    assert [list(sample.series) for sample in read(tmp_path, MODALITIES["s2"])] == [["s2"]] * 7
    assert "Level-1C" in read(tmp_path, MODALITIES["s2"])[0].provenance
    assert "new_modalities" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        convert("eurosat/all", eurosats, tmp_path)
    assert "begun with another l1c_as_s2" in capsys.readouterr().err


def test_eurosat_with_bands_in_another_order_is_refused(tmp_path):
    order = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B10", "B11", "B12")
    prepare("eurosat/all", tmp_path, train=[eurosat(0, order=order), eurosat(1)])
    convert("eurosat/all", tmp_path, tmp_path / "out")
    assert len(index(tmp_path / "out")) == 1
    (told,) = rejected(tmp_path / "out")
    assert "band names contradict the values" in told["reason"]


def test_shards_of_a_set_do_not_depend_on_who_makes_them(eurosats, tmp_path):
    def files(out):
        return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}

    convert("eurosat/all", eurosats, tmp_path / "one", "--samples_per_shard=3")
    assert len(list((tmp_path / "one").glob("train-*-of-00003.array_record"))) == 3
    convert("eurosat/all", eurosats, tmp_path / "two", "--samples_per_shard=3", "--workers=2")
    beam = ("--engine=beam", "--", "--direct_running_mode=in_memory")
    convert("eurosat/all", eurosats, tmp_path / "beam", "--samples_per_shard=3", *beam)
    assert files(tmp_path / "one") == files(tmp_path / "two") == files(tmp_path / "beam")


def test_record_of_a_set_that_is_damaged_costs_no_other(tmp_path):
    elements, rng = [eurosat(number) for number in range(3)], np.random.default_rng(0)
    for element in elements:
        element["sentinel2"] += rng.integers(0, 100, (64, 64, 13)).astype(np.float32)  # three records of one length
    prepare("eurosat/all", tmp_path, train=elements)
    path = next(tmp_path.glob("eurosat/all/*/*.array_record*"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    convert("eurosat/all", tmp_path, tmp_path / "out")
    assert len(index(tmp_path / "out")) == 2
    (told,) = rejected(tmp_path / "out")
    assert told["name"] == "eurosat/all train 1"
    assert "hash mismatch" in told["reason"]


def so2sat(number, rng):
    """Speckle that averages to the set's means, in the bands that count; numbers of other meaning in the others."""
    radar = rng.normal(size=(32, 32, 8)).astype(np.float32)
    radar[..., 4] = SO2SAT_VH * rng.gamma(40, 1 / 40, (32, 32))
    radar[..., 5] = SO2SAT_VV * rng.gamma(40, 1 / 40, (32, 32))
    radar[7, 9, 4] = 0
    optical = np.array(SO2SAT_S2, np.float32) * rng.uniform(0.5, 1.5, (32, 32, 1))
    return {"sentinel1": radar, "sentinel2": optical.astype(np.float32), "label": 16, "sample_id": number}


def test_so2sat_is_decibels_of_the_filtered_intensities_and_reflectance(tmp_path):
    rng = np.random.default_rng(0)
    prepare("so2sat/all", tmp_path, train=[so2sat(number, rng) for number in range(3)], validation=[so2sat(0, rng)])
    convert("so2sat/all", tmp_path, tmp_path / "out")
    rows = (tfds_sets.S2_L1C, MODALITIES["s1"])
    assert len(read(tmp_path / "out", *rows, split="validation")) == 1
    samples = read(tmp_path / "out", *rows)
    assert {sample.id for sample in samples} == {f"so2sat/all/train/{number}" for number in range(3)}
    for sample in samples:
        assert sample.extent_cells == 32
        radar, optical = sample.series["s1"], sample.series["s2_l1c"]
        assert not radar.valid[0, 7, 9]
        assert radar.valid.sum() == 32 * 32 - 1
        power = 10 ** (radar.images[radar.valid].astype(np.float64) / 10)
        np.testing.assert_allclose(power.mean(0), [SO2SAT_VV, SO2SAT_VH], rtol=0.02)
        np.testing.assert_allclose(optical.images[optical.valid].mean(0), np.array(SO2SAT_S2) * 10_000, rtol=0.05)
        assert radar.days.tolist() == optical.days.tolist() == [UNDATED]
    assert {tuple(row["scene_classes"]) for row in index(tmp_path / "out")} == {("Water",)}


def bigearthnet(*, west=earth.WEST + 20, north=earth.NORTH - 40, offset=0, tile=None, moved=0):
    """A patch of the made-up ground."""

    def band(position, size, pixels):
        x, y = earth.centres(from_origin(west, north, size, size), pixels, pixels, earth.ZONE)
        return np.rint(earth.reflectances(x, y, position) + offset).astype(np.float32)

    names = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
    sizes = {name: (10, 120) if name in ("B02", "B03", "B04", "B08") else (20, 60) for name in names}
    corners = dict(ulx=west + moved, uly=north, lrx=west + 1200 + moved, lry=north - 1200)
    return {
        **{name: band(position, *sizes[name]) for position, name in enumerate(names)},
        **{name: np.full((20, 20), 9999, np.float32) for name in ("B01", "B09")},
        "labels": ["Pastures", "Water bodies"],
        "filename": "S2A_MSIL2A_20170613T101031_0_45",
        "metadata": {
            "acquisition_date": "2017-06-13 10:10:31",
            "coordinates": corners,
            "projection": CRS.from_epsg(earth.ZONE).to_wkt(),
            "tile_source": tile or "S2A_MSIL1C_20170613T101031_N0205_R022_T34VER_20170613T101608.SAFE",
        },
    }


def test_bigearthnet_lies_where_and_when_it_was_and_20_m_bands_are_interpolated(tmp_path):
    later = "S2A_MSIL1C_20170613T101031_N0500_R022_T34VER_20170613T101608.SAFE"
    elements = [bigearthnet(), bigearthnet(offset=1000, tile=later), bigearthnet(tile="?"), bigearthnet(moved=3)]
    prepare("bigearthnet/all", tmp_path, train=elements)
    convert("bigearthnet/all", tmp_path, tmp_path / "out")
    samples = read(tmp_path / "out", MODALITIES["s2"])
    assert len(samples) == 2
    x, y = earth.centres(from_origin(earth.WEST + 20, earth.NORTH - 40, 10, 10), 120, 120, earth.ZONE)
    for sample in samples:
        series = sample.series["s2"]
        assert series.valid.all()
        day = datetime.date(1970, 1, 1) + datetime.timedelta(days=int(series.days[0]))
        assert day == datetime.date(2017, 6, 13)
        middle = [earth.WEST + 620], [earth.NORTH - 640]
        where = rasterio.warp.transform(CRS.from_epsg(earth.ZONE), CRS.from_epsg(4326), *middle)
        np.testing.assert_allclose([sample.longitude, sample.latitude], np.ravel(where), atol=1e-9)
        for position, band in enumerate(MODALITIES["s2"].bands):
            error = np.abs(series.images[0, ..., position] - earth.reflectances(x, y, position))
            if band in ("B2", "B3", "B4", "B8"):
                assert error.max() <= 0.51
            else:  # waves of 240 m in pixels of 20 m; the nearest pixel would miss by 39 to 55
                assert error[1:-1, 1:-1].max() < 20, band
                assert error.max() < 60, band
    assert all(row["scene_classes"] == ["Pastures", "Water bodies"] for row in index(tmp_path / "out"))
    told = sorted(entry["reason"] for entry in rejected(tmp_path / "out"))
    assert "wanted a day, and a product with a processing baseline" in told[0]
    assert "wanted a square of whole 10 m cells" in told[1]


def rgb(height, width, *, size, kind):
    """An image of the made-up ground whose middle is the ground's corner."""
    x = (np.arange(width) + 0.5 - width / 2) * size
    y = -(np.arange(height) + 0.5 - height / 2) * size
    pixels = np.rint(earth.waves(*np.meshgrid(x, y), length_m=12.0, mean=128.0, height=100.0)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **(dict(quality=98, subsampling=0) if kind == "JPEG" else {}))
    return file.getvalue()


def ground(cells, *, row_m=0.0, column_m=0.0):
    """What hr shows of a square around the ground's corner, its middle moved south and east by so much."""
    at = (np.arange(cells * 32) + 0.5) * 10 / 32 - cells * 5
    return earth.waves(*np.meshgrid(at + column_m, -(at + row_m)), length_m=12.0, mean=128.0, height=100.0)


def test_uc_merced_shrinks_its_feet_to_the_pixels_of_hr(tmp_path):
    foot = 0.3048
    images = [
        rgb(256, 256, size=foot, kind="PNG"),
        rgb(242, 257, size=foot, kind="PNG"),
        rgb(40, 30, size=foot, kind="PNG"),
    ]
    elements = [{"image": image, "label": "harbor", "filename": f"{i}.tif"} for i, image in enumerate(images)]
    prepare("uc_merced", tmp_path, train=elements)
    convert("uc_merced", tmp_path, tmp_path / "out")
    samples = {sample.id[-5:]: sample for sample in read(tmp_path / "out", MODALITIES["hr"])}
    assert sorted(samples) == ["0.tif", "1.tif"]
    left = 70 / foot
    for name, (height, width) in {"0.tif": (256, 256), "1.tif": (242, 257)}.items():
        sample = samples[name]
        assert sample.extent_cells == 7
        assert sample.series["hr"].native_gsd_m == pytest.approx(foot)
        assert sample.series["hr"].valid.all()
        # cut at whole pixels of the source, so the middle is off by less than one
        moved = [(int((size - left) / 2) - (size - left) / 2) * foot for size in (height, width)]
        wanted = ground(7, row_m=moved[0], column_m=moved[1])
        assert np.abs(sample.series["hr"].images[0] - wanted).mean() < 3
    (told,) = rejected(tmp_path / "out")
    assert "40 x 30 pixels of 0.3048 m hold no whole cell of 10 m" in told["reason"]


def test_resisc45_is_copied_where_its_pixels_count_as_those_of_hr(tmp_path):
    image = rgb(256, 256, size=0.3125, kind="JPEG")
    prepare("resisc45", tmp_path, train=[{"image": image, "label": "island", "filename": "island_001.jpg"}])
    convert("resisc45", tmp_path, tmp_path / "out", "--gsd_m=0.3125")
    (sample,) = read(tmp_path / "out", MODALITIES["hr"])
    assert sample.extent_cells == 8
    pixels = np.asarray(Image.open(io.BytesIO(image)))
    assert np.abs(sample.series["hr"].images[0].astype(int) - pixels).mean() < 2  # JPEG of JPEG; a pixel aside: 10
    assert index(tmp_path / "out")[0]["scene_classes"] == ["island"]
    convert("resisc45", tmp_path, tmp_path / "coarse", "--gsd_m=0.6")
    (sample,) = read(tmp_path / "coarse", MODALITIES["hr"])
    assert sample.extent_cells == 15
    assert sample.series["hr"].native_gsd_m == 0.6


@pytest.mark.parametrize(
    ("dataset", "flags", "told"),
    [
        ("eurosat/rgb", [], "are no reflectance for s2, and hr wants pixels of 0.625 m or less; wanted eurosat/all"),
        ("mnist", [], "--dataset: got mnist; wanted one of eurosat/all, bigearthnet/all"),
        ("resisc45", [], "--gsd_m: missing: pixels of resisc45 are 0.2 to 30 m"),
        ("resisc45", ["--gsd_m=30"], "--gsd_m: got 30; wanted above 0, at most 0.625"),
        ("uc_merced", ["--gsd_m=0.3"], "--gsd_m: got 0.3; wanted none"),
        ("uc_merced", ["--l1c_as_s2"], "--l1c_as_s2: uc_merced is no Level-1C"),
        (
            "uc_merced",
            [],
            "has no uc_merced/2.0.0; wanted what this writes: tfds build uc_merced --file_format=array_rec",
        ),
        ("uc_merced", ["--workers=0"], "--workers: got 0"),
    ],
)
def test_what_would_be_wrong_is_refused_with_words(tmp_path, capsys, dataset, flags, told):
    with pytest.raises(SystemExit):
        convert(dataset, tmp_path, tmp_path / "out", *flags)
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_set_in_other_files_or_of_other_features_is_refused(eurosats, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        other = {**tfds_sets.SETS, "eurosat/all": tfds_sets.SETS["so2sat/all"]}
        patch.setattr(from_tfds, "SETS", other)
        with pytest.raises(SystemExit):
            convert("eurosat/all", eurosats, tmp_path / "out")
    told = "eurosat/all/2.0.0: feature 'sentinel1' has shape None; wanted (32, 32, 8)"
    assert told in capsys.readouterr().err
    builder = prepare("eurosat/all", tmp_path, train=[eurosat(0)])
    path = tmp_path / builder.info.full_name / "dataset_info.json"
    path.write_text(path.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(SystemExit):
        convert("eurosat/all", tmp_path, tmp_path / "out")
    assert "holds tfrecord files; wanted array_record" in capsys.readouterr().err


@pytest.mark.parametrize("dataset", sorted(tfds_sets.SETS))
def test_features_that_are_read_are_those_of_the_installed_library(dataset, tmp_path):
    known, features = tfds_sets.SETS[dataset], tfds.builder(dataset, data_dir=tmp_path).info.features
    assert {name: tuple(features[name].shape) for name in known.shapes} == dict(known.shapes)
    assert known.name in features
    assert from_tfds.class_names(features[known.scenes])[0]
