"""Everything that is wrong with an archive at once, by the commands of a user: each is named, and the others go on."""

import json
import os
import pathlib
import resource
import subprocess
import sys

import numpy as np
import pytest
import rasterio.shutil
import rasterio.warp
import shapely
from rasterio.transform import from_origin

from skysense_jax.data.records import RecordSource
from skysense_jax.ingest import build, plan
from skysense_jax.modalities import MODALITIES
from tests.ingest import earth

ROOT = pathlib.Path(__file__).parents[2]
ROWS = tuple(MODALITIES[name] for name in ("hr", "s2", "s1"))
CELLS = 8
GOOD = f"{earth.ZONE}_{earth.WEST}_{earth.NORTH}"
TORN = f"{earth.ZONE}_{earth.WEST + 80}_{earth.NORTH}"
LIST = "".join(
    f'[[source]]\nname = "{name}"\nkind = "{kind}"\nfiles = "{files}"\nlicence = "x"\n{more}\n'
    for name, kind, files, more in (
        ("aerial", "image", "aerial/*.tif", 'modality = "hr"'),
        ("far", "image", "far/*.tif", 'modality = "hr"'),
        ("s2", "s2_safe", "s2/*.SAFE", ""),
        ("s1", "s1", "s1/*.tif", ""),
        ("cubes", "cube", "cubes/*.nc", 'modality = "s1"'),
        ("map", "osm", "maps/*", ""),
    )
)


def _write_good(root):
    how = dict(north=earth.NORTH, width=256, height=256, size=0.3125)
    earth.write_aerial(root / "aerial" / "good.tif", west=earth.WEST, **how)
    earth.write_safe(root / "s2", side_m=960, west=earth.WEST - 300, north=earth.NORTH + 300)
    earth.write_radar(root / "s1" / "good.tif", side_m=960, west=earth.WEST - 300, north=earth.NORTH + 300)
    square = shapely.box(earth.WEST - 50, earth.NORTH - 200, earth.WEST + 250, earth.NORTH + 50)
    corners = rasterio.warp.transform_geom(f"EPSG:{earth.ZONE}", "EPSG:4326", shapely.geometry.mapping(square))
    _write_map(root / "maps" / "good.geojson", corners)
    radar = {
        name: (lambda x, y, date, band=band: earth.power(x, y, band), "f4", {})
        for band, name in enumerate(("VV", "VH"))
    }
    earth.write_cube(root / "cubes" / "good.nc", radar, [0])
    return radar


def _write_map(path, geometry):
    path.parent.mkdir(exist_ok=True)
    feature = dict(type="Feature", geometry=geometry, properties={"natural": "wood"})
    path.write_text(json.dumps(dict(type="FeatureCollection", features=[feature])))


def _write_bad(root, radar):
    grey = np.full((256, 256, 3), 99, np.uint8)
    here = from_origin(earth.WEST, earth.NORTH, 0.3125, 0.3125)
    earth.write_tif(root / "aerial" / "no_crs.tif", grey, here, None)
    earth.write_tif(root / "aerial" / "wrong_crs.tif", grey, here, 4326)
    swapped = from_origin(49.6, 111.8, 3e-6, 3e-6)
    earth.write_tif(root / "aerial" / "swapped.tif", grey, swapped, 4326)
    earth.write_tif(root / "aerial" / "two_bands.tif", grey[..., :2], here, earth.ZONE)
    (root / "aerial" / "cut_off.tif").write_bytes((root / "aerial" / "good.tif").read_bytes()[:100])
    beside = dict(west=earth.WEST + 80, north=earth.NORTH, width=256, height=256, size=0.3125)
    earth.write_aerial(root / "torn.tif", **beside)
    rasterio.shutil.copy(root / "torn.tif", root / "aerial" / "torn.tif", driver="COG")  # its header comes first
    whole = (root / "aerial" / "torn.tif").read_bytes()
    (root / "aerial" / "torn.tif").write_bytes(whole[: len(whole) // 2])
    earth.write_aerial(root / "far" / "a.tif", west=earth.WEST + 90_000, north=earth.NORTH, width=9, height=9, size=0.3)
    earth.write_safe(root / "s2", day="20220701", side_m=200, drop=("B11",))
    earth.write_tif(
        root / "s1" / "no_unit.tif",
        np.linspace(20, 900, 800, dtype=np.float32).reshape(20, 20, 2),
        from_origin(earth.WEST, earth.NORTH, 10, 10),
        earth.ZONE,
    )
    earth.write_cube(root / "cubes" / "no_crs.nc", radar, [0], how="")
    earth.write_cube(root / "cubes" / "one_band.nc", {"VV": radar["VV"]}, [0])
    (root / "cubes" / "torn.nc").write_bytes((root / "cubes" / "good.nc").read_bytes()[:3000])
    _write_map(root / "maps" / "elsewhere.geojson", shapely.geometry.mapping(shapely.box(20, 30, 20.1, 30.1)))
    _write_map(root / "maps" / "swapped.geojson", shapely.geometry.mapping(shapely.box(49.6, 111.8, 49.7, 111.9)))
    (root / "maps" / "no_map.osm.pbf").write_bytes(b"no map")


def _plan(root):
    (root / "list.toml").write_text(LIST)
    edges = (earth.WEST, earth.NORTH - 80, earth.WEST + 160, earth.NORTH)
    bounds = rasterio.warp.transform_bounds(f"EPSG:{earth.ZONE}", "EPSG:4326", *edges)
    arguments = ["--sources", str(root / "list.toml"), "--out", str(root / "m"), "--cells", str(CELLS)]
    area = ",".join(f"{edge:.7f}" for edge in bounds)
    plan.main([*arguments, "--area", area, "--validation_share", "0"])


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """The archive without and with what is wrong, planned and built."""
    found = {name: tmp_path_factory.mktemp(name) for name in ("good", "bad")}
    for name, root in found.items():
        radar = _write_good(root)
        if name == "bad":
            _write_bad(root, radar)
        else:
            earth.write_aerial(root / "far" / "a.tif", west=earth.WEST, north=earth.NORTH, width=9, height=9, size=0.3)
        _plan(root)
        build.main(["--manifest", str(root / "m"), "--out", str(root / "d"), "--workers", "1"])
    return found


def _samples(root):
    source = RecordSource(str(root / "d" / "*.array_record"), ROWS)
    return {sample.id: sample for sample in (source[index].decode() for index in range(len(source)))}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("aerial/aerial/no_crs.tif", "no coordinate system"),
        ("aerial/aerial/wrong_crs.tif", "EPSG:4326 with longitudes 704000 to 704080 and latitudes"),
        (
            "aerial/aerial/swapped.tif",
            "latitudes 111.799 to 111.8; wanted -180 to 180 and -90 to 90 (swapped, or metres?)",
        ),
        ("aerial/aerial/two_bands.tif", "2 bands; wanted 3 or more, for R G B"),
        ("aerial/aerial/cut_off.tif", "cut_off.tif"),
        ("s2/s2/S2A_MSIL2A_20220701T101021_N0400_R022_T32UQV_20220701T130000.SAFE", "B11_20m.jp2 is missing: band B11"),
        ("s1/s1/no_unit.tif", "the unit cannot be told: half of the pixels lie below 459"),
        ("cubes/cubes/no_crs.nc", "no_crs.nc: no coordinate system"),
        ("cubes/cubes/one_band.nc", "no variable for VH; wanted VH"),
        ("cubes/cubes/torn.nc", "torn.nc: no NetCDF or HDF5 file that can be read"),
        ("map/maps/elsewhere.geojson", "it covers none of the places that were chosen"),
        ("map/maps/swapped.geojson", "(swapped, or metres?)"),
        ("map/maps/no_map.osm.pbf", "no OpenStreetMap file or GeoJSON"),
        ("far", "none of its files meets a place that was chosen"),
        (f"{TORN} hr: aerial/torn.tif", "torn.tif, band 1: IReadBlock failed"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_place(roots, name, told):
    lines = (roots["bad"] / "d" / "rejected.jsonl").read_text().splitlines()
    reasons = {entry["name"]: entry["reason"] for entry in map(json.loads, lines)}
    assert told in reasons[name]


def test_the_others_go_on(roots):
    good, bad = (_samples(roots[name]) for name in ("good", "bad"))
    assert set(good) == set(bad) == {GOOD, TORN}
    assert set(bad[GOOD].series) == {"hr", "s2", "s1"}
    assert set(bad[TORN].series) == {"s2", "s1"}
    for place, sample in good.items():
        np.testing.assert_array_equal(sample.labels, bad[place].labels)
        for row in ("s2", "s1"):
            np.testing.assert_array_equal(sample.series[row].images, bad[place].series[row].images)
            assert sample.series[row].valid.all()
    np.testing.assert_array_equal(good[GOOD].series["hr"].images, bad[GOOD].series["hr"].images)


def test_disk_that_takes_no_more_ends_the_build_with_words_and_it_goes_on(roots, tmp_path):
    """The system's own refusal, of files above 20 KB, in the writer of records and not in a stand-in."""
    root = roots["good"]
    command = ["-m", "skysense_jax.ingest.build", "--manifest", str(root / "m"), "--out", str(tmp_path / "d")]
    command = [sys.executable, *command, "--workers", "1", "--places_per_shard", "64"]
    how = dict(cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # noqa: E731
    run = subprocess.run(command, preexec_fn=limit, **how)
    assert run.returncode == 1, run.stderr
    assert "What is whole stays; the same command goes on" in run.stderr
    assert "Traceback" not in run.stderr
    assert not list((tmp_path / "d").glob("*.array_record"))
    assert subprocess.run(command, **how).returncode == 0
    assert (tmp_path / "d" / "statistics.json").read_bytes() == (root / "d" / "statistics.json").read_bytes()
    for path in (root / "d").glob("*.array_record"):
        assert (tmp_path / "d" / path.name).read_bytes() == path.read_bytes()
