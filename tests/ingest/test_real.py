"""Real samples by the commands of a user, looked at through the field's own libraries, and trained on.

Without SKYSENSE_REALDATA made-up files of the same formats take their place. One image is made up in any case: no
imagery lies where the OpenStreetMap extract does.
"""

import glob
import json
import os
import pathlib
import re
import subprocess
import sys
from itertools import chain

import fabricate
import h5py
import netCDF4
import numpy as np
import osmium
import pyproj
import pytest
import rasterio
import rasterio.vrt
import shapely
import shapely.ops
from rasterio.transform import from_origin

from configs.real_mix import PAN
from skysense_jax.data.records import RecordSource
from skysense_jax.modalities import OSM, select

ROOT = pathlib.Path(__file__).parents[2]
REAL = os.environ.get("SKYSENSE_REALDATA")
CELLS, SIDE = 4, 40  # of a place, in cells and metres
DATES = ("2017-09-01", "2017-12-31")  # of the series of fields
ROWS = select(["hr", "s2", "s1", "pan"], [PAN])
BUILDING = OSM.classes.index("building") + 1

LIST = """
[[source]]
name = "trees-aerial"
kind = "image"
files = "{root}/treesatai_ts_sample/*.tif"
licence = "CC-BY-4.0"
modality = "hr"
bands = [4, 2, 3]                  # the file has infrared, green, blue, red

[[source]]
name = "trees-s2"
kind = "cube"
files = "trees.csv"                # the files do not say where they lie
licence = "CC-BY-4.0"
modality = "s2"
array = "sen-2-data"
products = "sen-2-products"
clouds = "sen-2-masks"
cloud_bands = [1, 2]               # snow, cloud

[[source]]
name = "trees-ascending"
kind = "cube"
files = "trees.csv"
licence = "CC-BY-4.0"
modality = "s1"
array = "sen-1-asc-data"
products = "sen-1-asc-products"
orbit = "ascending"

[[source]]
name = "trees-descending"
kind = "cube"
files = "trees.csv"
licence = "CC-BY-4.0"
modality = "s1"
array = "sen-1-des-data"
products = "sen-1-des-products"
orbit = "descending"

[[source]]
name = "fields-s2"
kind = "cube"
files = "{root}/worldcereal_patches/*/S2_L2A_*.nc"
licence = "Copernicus Sentinel data terms"
modality = "s2"
offset = 0                         # processed in 2017 and 2018
dates = "{dates[0]}/{dates[1]}"

[[source]]
name = "fields-s1"
kind = "cube"
files = "{root}/worldcereal_patches/*/S1_GRD-*.nc"
licence = "Copernicus Sentinel data terms"
modality = "s1"
dates = "{dates[0]}/{dates[1]}"

[[source]]
name = "tiles-s2"
kind = "s2_geotiff"
files = "tiles.csv"                # offsets and days of each
licence = "CC-BY-SA-4.0"
bands = [2, 3, 4, 5, 6, 7, 8, 9, 11, 12]

[[source]]
name = "tiles-s1"
kind = "s1"
files = "{root}/terramesh_examples/S1RTC/*.tif"
licence = "CC-BY-SA-4.0"

[[source]]
name = "aerial"
kind = "image"
files = "{root}/aerial_hr/*.[tp][in][fg]"
licence = "CC0-1.0"
modality = "hr"

[[source]]
name = "panchromatic"
kind = "image"
files = "{root}/spacenet_samples/*.tif"
licence = "CC-BY-SA-4.0"
modality = "pan"

[[source]]
name = "outlines"
kind = "osm"
files = "{root}/spacenet_samples/*.geojson"
licence = "CC-BY-SA-4.0"

[[source]]
name = "made-up"
kind = "image"
files = "helsinki.tif"
licence = "CC0-1.0"
modality = "hr"

[[source]]
name = "extracts"
kind = "osm"
files = "{root}/osm_extracts/*.pbf"
licence = "ODbL-1.0"
"""
TILES = {  # day of Sentinel-2 and what is in its numbers, as the tiles' Level-1C twins and previews tell
    "282D_485L_3_3.tif": ("2021-07-23", 0),
    "433D_629L_3_1.tif": ("2020-04-08", 1000),
    "637U_59R_1_3.tif": ("2017-10-30", 0),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    if REAL:
        return pathlib.Path(REAL)
    folder = tmp_path_factory.mktemp("fabricated")
    fabricate.write_all(folder)
    return folder


def _one(pattern):
    (path,) = glob.glob(str(pattern))
    return path


def _place(epsg, x, y):
    """Zone and corner of the square of the grid around a point of the zone."""
    return epsg, int(x // SIDE * SIDE), int(-(-y // SIDE) * SIDE)


def _box(place):
    _, west, north = place
    return shapely.box(west, north - SIDE, west + SIDE, north)


def _outlines(root):
    """The polygons of the panchromatic image, in its zone."""
    collection = json.loads(pathlib.Path(_one(root / "spacenet_samples/*.geojson")).read_text())
    return [shapely.geometry.shape(feature["geometry"]) for feature in collection["features"]]


def _houses(root):
    """The buildings of the OpenStreetMap extract, in degrees."""
    factory, houses = osmium.geom.WKBFactory(), []
    for entry in osmium.FileProcessor(_one(root / "osm_extracts/Helsinki.osm.pbf")).with_areas():
        if entry.is_area() and entry.tags.get("building", "no") != "no":
            houses.append(shapely.from_wkb(factory.create_multipolygon(entry)))
    return houses


def _wanted(root):
    """Places that the sources show, by source."""
    found = {"trees": [(32632, 565640, 5770960)], "fields": [(32631, 501600 + 40 * i, 5629400) for i in (0, 1, 2)]}
    for name, pattern, num in (
        ("tiles", "terramesh_examples/S2L2A/*.tif", 2),
        ("aerial", "aerial_hr/*.tif", 1),
    ):
        found[name] = []
        for path in sorted(glob.glob(str(root / pattern))):
            with rasterio.open(path) as file:
                west, south, east, north = file.bounds
                middle = _place(file.crs.to_epsg(), (west + east) / 2, (south + north) / 2)
                found[name] += [(middle[0], middle[1] + SIDE * step, middle[2]) for step in range(num)]
    outlines = sorted(_outlines(root), key=lambda outline: -outline.area)
    covered = shapely.box(*shapely.total_bounds(outlines))
    places = dict.fromkeys(_place(32616, *outline.centroid.coords[0]) for outline in outlines)  # each once
    found["pan"] = [place for place in places if covered.covers(_box(place).buffer(1))][:3]
    biggest = max(_houses(root), key=lambda house: house.area)
    to_zone = pyproj.Transformer.from_crs(4326, 32635, always_xy=True)
    found["city"] = [_place(32635, *to_zone.transform(*biggest.centroid.coords[0]))]
    return found


def _run(*arguments, cwd=ROOT, **environ):
    run = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), **environ},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout


@pytest.fixture(scope="module")
def built(root, tmp_path_factory):
    """The folder that the two commands work in, and the places that were asked for."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "list.toml").write_text(
        LIST.format(root=root, dates=DATES)
        + "\n[[modality]]\n"
        + "\n".join(f"{k} = {_toml(v)}" for k, v in PAN.items())
    )
    h5 = _one(root / "treesatai_ts_sample/*.h5")
    (folder / "trees.csv").write_text(
        f"path,crs,west,south,east,north\n{h5},EPSG:32632,565640,5770920,565700,5770980\n"  # cells nearest to the .tif
    )
    tiles = [f"{root}/terramesh_examples/S2L2A/{name},{day},{offset}\n" for name, (day, offset) in TILES.items()]
    (folder / "tiles.csv").write_text("path,day,offset\n" + "".join(tiles))
    wanted = _wanted(root)
    epsg, west, north = wanted["city"][0]
    how = dict(driver="GTiff", dtype="uint8", count=3, height=128, width=128, crs=f"EPSG:{epsg}")
    with rasterio.open(folder / "helsinki.tif", "w", transform=from_origin(west, north, 0.3125, 0.3125), **how) as file:
        file.write(np.random.default_rng(0).integers(40, 200, (3, 128, 128), np.uint8))
    points = []
    for epsg, west, north in chain.from_iterable(wanted.values()):
        degrees = pyproj.Transformer.from_crs(epsg, 4326, always_xy=True)
        points.append(shapely.Point(degrees.transform(west + SIDE / 2, north - SIDE / 2)).buffer(1e-5))
    (folder / "area.geojson").write_text(json.dumps(shapely.geometry.mapping(shapely.union_all(points))))
    _run(
        *("skysense_jax.ingest.plan", "--sources=list.toml", "--out=manifest", "--area=area.geojson"),
        *(f"--cells={CELLS}", "--validation_share=0"),
        cwd=folder,
    )
    _run("skysense_jax.ingest.build", "--manifest=manifest", "--out=samples", cwd=folder)
    return folder, wanted


def _toml(value):
    return json.dumps(list(value) if isinstance(value, tuple) else value)


@pytest.fixture(scope="module")
def samples(built):
    source = RecordSource(str(built[0] / "samples" / "*.array_record"), ROWS)
    found = [source[index].decode() for index in range(len(source))]
    return {sample.id: sample for sample in found}


def _named(samples, places):
    return [samples["_".join(map(str, place))] for place in places]


def test_every_place_that_was_asked_for_is_a_sample_with_what_its_sources_have(built, samples):
    folder, wanted = built
    assert sorted(samples) == sorted("_".join(map(str, place)) for place in chain.from_iterable(wanted.values()))
    rows = {
        "trees": {"hr", "s2", "s1"},
        "fields": {"s2", "s1"},
        "tiles": {"s2", "s1"},
        "aerial": {"hr"},
        "pan": {"pan"},
        "city": {"hr"},
    }
    for name, places in wanted.items():
        for sample in _named(samples, places):
            assert set(sample.series) == rows[name], sample.id
            assert (sample.labels is not None) == (name in ("pan", "city"))
            for row in rows[name]:
                series, (low, high) = sample.series[row], next(r.value_range for r in ROWS if r.name == row)
                seen = series.images[series.valid]
                assert low <= seen.min() <= seen.max() <= high
                assert np.isfinite(seen).all()
    card = (folder / "samples" / "README.md").read_text()
    assert f"- {len(samples)} samples: {len(samples)} train" in card
    assert "| trees-descending | cube | CC-BY-4.0 |" in card


def test_what_is_no_sample_is_named_with_its_reason(built):
    lines = (built[0] / "samples" / "rejected.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    told = {pathlib.Path(entry["name"]).name: entry["reason"] for entry in entries if entry["what"] == "file"}
    (png,) = (name for name in told if name.endswith(".png"))
    assert told.pop(png) == "no coordinate system: where it lies and the size of its pixels are unknown"
    (patch,) = (name for name in told if name.endswith(".nc"))
    assert "000028085BF08E7E" in patch
    assert told.pop(patch).startswith("no variable for B2 B3 B4 B8; wanted B2 or B02 or blue, ")
    assert told.pop("test.osm.pbf").endswith("it covers none of the places that were chosen")
    assert all(re.fullmatch(r"\d+ objects without the places of their nodes", reason) for reason in told.values())
    assert {entry["what"] for entry in entries} <= {"file", "date"}
    dates = [entry["reason"] for entry in entries if entry["what"] == "date"]
    assert all(re.search("of its pixels are clear; wanted 10.0%|no file reaches this place", told) for told in dates)


def test_fields_are_the_numbers_of_the_netcdf_files(built, root, samples):
    patch = root / "worldcereal_patches" / "00002806639B424A"
    first, last = (int(np.datetime64(day, "D").astype(int)) for day in DATES)
    ten, twenty, radar = (netCDF4.Dataset(_one(patch / f"{n}*.nc")) for n in ("S2_L2A_10m", "S2_L2A_20m", "S1_GRD"))
    for file in (ten, twenty, radar):
        file.set_auto_maskandscale(False)
    days = _days(ten)
    for sample, (_, west, north) in zip(_named(samples, built[1]["fields"]), built[1]["fields"]):
        row, column = (5629680 - north) // 10, (west - 501360) // 10
        here = np.s_[:, row : row + CELLS, column : column + CELLS]
        halves = np.s_[:, row // 2 : row // 2 + 2, column // 2 : column // 2 + 2]
        assert row % 2 == column % 2 == 0
        scl = twenty["SCL"][halves].repeat(2, 1).repeat(2, 2)
        dn = np.stack([ten[name][here] for name in ("B02", "B03", "B04", "B08")], -1)
        hidden, empty = np.isin(scl, (3, 8, 9, 10, 11)), np.isin(scl, (0, 1)) | (dn == 0).any(-1)
        coarse = np.stack([twenty[name][halves] for name in ("B05", "B11")], -1)
        clear = (~hidden & ~empty).mean((1, 2))
        kept = [i for i in np.argsort(days, kind="stable") if first <= days[i] <= last and clear[i] >= 0.1]
        s2 = sample.series["s2"]
        assert s2.days.tolist() == [days[i] for i in kept]
        assert len(kept) >= 3
        for date, i in enumerate(kept):
            valid = s2.valid[date]
            np.testing.assert_array_equal(valid, ~empty[i])
            np.testing.assert_array_equal(s2.cloud[date], hidden[i] & valid)
            np.testing.assert_array_equal(s2.images[date][..., [0, 1, 2, 6]][valid], dn[i][valid])
            if valid.all():  # straight lines between pixels of 20 m: near the mean of the four
                for band, level in zip((3, 8), coarse[i].mean((0, 1))):
                    assert abs(s2.images[date, ..., band].mean() - level) < 0.15 * level + 50
        s1, power = sample.series["s1"], {}
        assert set(s1.orbits.tolist()) == {1}
        for i, day in enumerate(_days(radar)):
            numbers = np.stack([radar[name][halves][i] for name in ("VV", "VH")], -1)
            if first <= day <= last and (numbers != 0).all():
                power.setdefault(day, (10 ** (numbers * 1e-5)).mean((0, 1)))
        assert set(power) <= set(s1.days.tolist())
        for date, day in enumerate(s1.days.tolist()):
            if day in power and s1.valid[date].all():
                got = 10 * np.log10((10 ** (s1.images[date].astype(float) / 10)).mean((0, 1)))
                assert np.abs(got - 10 * np.log10(power[day])).max() < 2.5  # decibels; neighbours count


def _days(file):
    units, values = file["timestamp"].units, file["timestamp"][:]
    return [time.toordinal() - 719163 for time in netCDF4.num2date(values, units, only_use_cftime_datetimes=False)]


def test_trees_are_the_numbers_of_the_hdf5_file_in_the_tables_units(built, root, samples):
    (sample,) = _named(samples, built[1]["trees"])
    here = np.s_[..., 2:6, 0:4]  # of six: the square begins 20 m south of the file's corner
    with h5py.File(_one(root / "treesatai_ts_sample/*.h5")) as file:
        for orbit, name in ((1, "asc"), (2, "des")):
            products = [product.decode() for product in file[f"sen-1-{name}-products"][:]]
            power, s1 = file[f"sen-1-{name}-data"][:][here], sample.series["s1"]
            by_day = {}
            for i in sorted(range(len(products)), key=lambda i: products[i]):
                by_day.setdefault(products[i][17:25], np.moveaxis(power[i], 0, -1))
            dates = [date for date in range(len(s1.days)) if s1.orbits[date] == orbit]
            assert [str(np.datetime64(int(s1.days[d]), "D")).replace("-", "") for d in dates] == sorted(by_day)
            for date, day in zip(dates, sorted(by_day)):
                wanted = np.maximum(10 * np.log10(by_day[day]), -50)
                assert np.abs(s1.images[date] - wanted).max() < 0.02  # fp16
        dn, masks = file["sen-2-data"][:][here], file["sen-2-masks"][:][here]
        products = [product.decode() for product in file["sen-2-products"][:]]
    s2 = sample.series["s2"]
    hidden = masks[:, :2].max(1) >= 10
    numbers = {}
    for i in sorted(range(len(products)), key=lambda i: (-int(products[i][28:32]), products[i])):
        numbers.setdefault(products[i][11:19], i)
    for date, day in enumerate(str(np.datetime64(int(day), "D")).replace("-", "") for day in s2.days):
        i = numbers[day]
        offset = 1000 if int(products[i][28:32]) >= 400 else 0
        np.testing.assert_array_equal(s2.images[date], np.clip(np.rint(np.moveaxis(dn[i], 0, -1)) - offset, 1, 20000))
        np.testing.assert_array_equal(s2.cloud[date], hidden[i])
    clear = [day for day, i in numbers.items() if (dn[i] > 0).all() and (~hidden[i]).mean() >= 0.1]
    assert len(s2.days) == len(clear) > 5


def _through_gdal(path, place, bands, per_cell):
    """What GDAL itself makes of a raster on a place's pixels."""
    epsg, west, north = place
    side = CELLS * per_cell
    how = dict(crs=f"EPSG:{epsg}", transform=from_origin(west, north, 10 / per_cell, 10 / per_cell))
    coarser = rasterio.open(path).res[0] > 10 / per_cell
    resampling = rasterio.enums.Resampling.bilinear if coarser or per_cell == 1 else rasterio.enums.Resampling.average
    with (
        rasterio.open(path) as file,
        rasterio.vrt.WarpedVRT(file, width=side, height=side, resampling=resampling, **how) as warped,
    ):
        return np.moveaxis(warped.read(bands), 0, -1)


def test_rasters_are_what_gdal_makes_of_them(built, root, samples):
    names = sorted(TILES)
    for place, sample in zip(built[1]["tiles"], _named(samples, built[1]["tiles"])):
        name = names[built[1]["tiles"].index(place) // 2]
        day, offset = TILES[name]
        s2 = sample.series["s2"]
        assert s2.days.tolist() == [int(np.datetime64(day, "D").astype(int))]
        bands = [2, 3, 4, 5, 6, 7, 8, 9, 11, 12]
        wanted = _through_gdal(root / "terramesh_examples/S2L2A" / name, place, bands, 1).astype(int) - offset
        assert np.abs(s2.images[0].astype(int) - wanted.clip(1)).max() <= 2
        s1 = sample.series["s1"]
        decibels = _through_gdal(root / "terramesh_examples/S1RTC" / name, place, [1, 2], 1)
        assert np.abs(np.median(s1.images[0].astype(float) - decibels, (0, 1))).max() < 1  # power is averaged
    for key, pattern, bands, row in (
        ("aerial", "aerial_hr/*.tif", [1, 2, 3], "hr"),
        ("trees", "treesatai_ts_sample/*.tif", [4, 2, 3], "hr"),
        ("pan", "spacenet_samples/*.tif", [1], "pan"),
    ):
        paths = sorted(glob.glob(str(root / pattern)))
        per_place = len(built[1][key]) // len(paths)
        for number, (place, sample) in enumerate(zip(built[1][key], _named(samples, built[1][key]))):
            series = sample.series[row]
            per_cell = next(r.pixels_per_cell for r in ROWS if r.name == row)
            wanted = _through_gdal(paths[number // per_place], place, bands, per_cell)
            valid = series.valid[0]
            assert valid.mean() > 0.1
            off = np.abs(series.images[0].astype(float) - wanted)[valid]
            assert off.mean() < (6 if row == "hr" else 0.03 * wanted[valid].mean()), (key, off.mean())  # JPEG


def test_labels_are_the_areas_of_the_objects(built, root, samples):
    outlines = shapely.union_all(_outlines(root))
    assert len(built[1]["pan"]) == 3
    for place, sample in zip(built[1]["pan"], _named(samples, built[1]["pan"])):
        area = outlines.intersection(_box(place)).area
        assert area > 50
        assert abs((sample.labels == BUILDING).sum() * (SIDE / sample.labels.shape[0]) ** 2 - area) < 30, area
    (place,), (sample,) = built[1]["city"], _named(samples, built[1]["city"])
    to_zone = pyproj.Transformer.from_crs(4326, place[0], always_xy=True).transform
    houses = shapely.union_all([shapely.ops.transform(to_zone, house) for house in _houses(root)])
    area = houses.intersection(_box(place)).area
    assert area > 0
    got = (sample.labels == BUILDING).sum() * (SIDE / sample.labels.shape[0]) ** 2
    assert abs(got - area) < 40


def test_hundred_steps_of_pretraining_learn_from_it(built):
    pattern = f"{built[0]}/samples/train-*.array_record"
    _run(
        *("skysense_jax.train", "--config=tests/ingest/real_config.py", f"--workdir={built[0]}/run"),
        f"--config.data.sources=(('{pattern}', 1.0),)",
        XLA_FLAGS=os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"),  # those of conftest.py
        JAX_COMPILATION_CACHE_DIR=str(ROOT / ".cache" / "jax"),
    )
    lines = [json.loads(line) for line in (built[0] / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert np.isfinite(list(losses.values())).all()
    assert list(losses)[-1] == 100
    first, last = np.array(list(losses.values()))[:2].mean(), np.array(list(losses.values()))[-2:].mean()
    assert last < 0.9 * first, losses
