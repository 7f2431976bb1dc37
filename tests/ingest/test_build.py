"""From a list of sources to samples by the commands of a user: choice, restart, rejects, statistics, card."""

import contextlib
import io
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
from etils import epath

from skysense_jax.data.records import RecordSource
from skysense_jax.ingest import build, engines, folder, places, plan, sources
from skysense_jax.modalities import MODALITIES, OSM
from tests.ingest import earth

ROWS = tuple(MODALITIES[name] for name in ("hr", "s2", "s1"))
ROOT = pathlib.Path(__file__).parents[2]
CELLS = 8  # of 10 m: places of 80 m


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Files of all kinds around the corner of a square, and their list."""
    root = tmp_path_factory.mktemp("archive")
    for number in range(4):
        west, north = earth.WEST + 160 * (number % 2), earth.NORTH - 160 * (number // 2)
        how = dict(width=512, height=512, size=0.3125, day="2021:07:03 10:00:00")
        earth.write_aerial(root / "aerial" / f"{number}.tif", west=west, north=north, **how)
    earth.write_tif(
        root / "aerial" / "nowhere.tif", np.zeros((9, 9, 3), np.uint8), plan.rasterio.Affine.identity(), None
    )
    earth.write_safe(root / "s2", day="20220601", side_m=960, west=earth.WEST - 300, north=earth.NORTH + 300)
    earth.write_safe(
        root / "s2", day="20220611", baseline="0301", side_m=960, west=earth.WEST - 300, north=earth.NORTH + 300
    )
    earth.write_radar(root / "s1" / "a.tif", side_m=960, west=earth.WEST - 300, north=earth.NORTH + 300)
    square = places.Square(earth.WEST + 80.0, earth.NORTH - 80.0, 16, places.CRS.from_epsg(earth.ZONE))
    west, south, east, north = plan.rasterio.warp.transform_bounds(square.crs, "EPSG:4326", *square.bounds)
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    around = [[west - 0.02, south - 0.02], [east + 0.02, north + 0.02]]
    features = [
        dict(type="Feature", geometry=dict(type="Polygon", coordinates=[ring]), properties={"building": "yes"}),
        dict(type="Feature", geometry=dict(type="LineString", coordinates=around), properties={"highway": "service"}),
    ]
    (root / "map.geojson").write_text(json.dumps(dict(type="FeatureCollection", features=features)))
    (root / "list.toml").write_text(
        """
        [[source]]
        name = "aerial"
        kind = "image"
        files = "aerial/*.tif"
        licence = "CC0-1.0"
        modality = "hr"
        [[source]]
        name = "sentinel-2"
        kind = "s2_safe"
        files = "s2/*.SAFE"
        licence = "Copernicus"
        [[source]]
        name = "sentinel-1"
        kind = "s1"
        files = "s1/*.tif"
        licence = "Copernicus"
        [[source]]
        name = "map"
        kind = "osm"
        files = "map.geojson"
        licence = "ODbL-1.0"
        """
    )
    return root


@pytest.fixture(scope="module")
def manifest(archive):
    out = archive / "manifest"
    plan.main(["--sources", str(archive / "list.toml"), "--out", str(out), "--cells", str(CELLS), "--require", "hr,s2"])
    return out


@pytest.fixture(scope="module")
def dataset(archive, manifest):
    out = archive / "dataset"
    with contextlib.redirect_stderr(io.StringIO()) as told:
        _build(manifest, out, workers=2)
    (archive / "told").write_text(told.getvalue())
    return out


@pytest.fixture(scope="module")
def few(archive):
    """A manifest of nine whole places and three at the rim, for what is made again and again."""
    ground = shapely.box(earth.WEST - 80, earth.NORTH - 240, earth.WEST + 240, earth.NORTH)
    area = plan.rasterio.warp.transform_geom(f"EPSG:{earth.ZONE}", "EPSG:4326", shapely.geometry.mapping(ground))
    (archive / "few.geojson").write_text(json.dumps(area))
    command = ["--sources", str(archive / "list.toml"), "--out", str(archive / "few"), "--cells", str(CELLS)]
    plan.main([*command, "--require", "hr,s2", "--area", str(archive / "few.geojson")])
    return archive / "few"


@pytest.fixture(scope="module")
def built(archive, few):
    _build(few, archive / "built", workers=2)
    assert len(_index(archive / "built")) == 9
    return archive / "built"


def _build(manifest, out, *, workers=1):
    build.main(["--manifest", str(manifest), "--out", str(out), "--workers", str(workers), "--places_per_shard", "2"])


def _files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def _index(dataset):
    return pq.read_table(dataset / "index.parquet").to_pylist()


def test_samples_are_the_whole_squares_that_the_required_sources_show(dataset):
    rows = _index(dataset)
    # 320 m of imagery hold 16 places of 80 m, whole; its edges touch further ones, of which nothing is clear enough.
    assert sorted(row["id"] for row in rows) == sorted(
        f"{earth.ZONE}_{earth.WEST + 80 * column}_{earth.NORTH - 80 * row}" for row in range(4) for column in range(4)
    )
    source = RecordSource(str(dataset / "*.array_record"), ROWS)
    assert len(source) == 16
    for index in range(16):
        sample = source[index].decode()
        assert {name: len(series.days) for name, series in sample.series.items()} == {"hr": 1, "s2": 2, "s1": 1}
        assert all(series.valid.all() for series in sample.series.values())
        assert sample.licence == "CC0-1.0; Copernicus; ODbL-1.0"


def test_pixels_and_labels_of_a_sample_are_those_of_its_ground(dataset):
    source = RecordSource(str(dataset / "*.array_record"), ROWS)
    wanted = f"{earth.ZONE}_{earth.WEST + 80}_{earth.NORTH - 80}"
    sample = next(source[i].decode() for i in range(16) if source[i].id == wanted)
    square = places.Square(earth.WEST + 80.0, earth.NORTH - 80.0, CELLS, places.CRS.from_epsg(earth.ZONE))
    x, y = earth.centres(square.transform(32), 256, 256, earth.ZONE)
    assert np.abs(sample.series["hr"].images[0] - earth.colours(x, y)).mean() < 4  # JPEG
    x, y = earth.centres(square.transform(1), CELLS, CELLS, earth.ZONE)
    for date in (0, 1):  # with and without an offset in the numbers
        assert np.abs(sample.series["s2"].images[date, ..., 0] - earth.reflectances(x, y, 0)).max() < 1
    building, road = (OSM.classes.index(name) + 1 for name in ("building", "road"))
    assert (sample.labels[1:-1, 1:-1] == building).all()  # it lies on the road
    beside = next(
        source[i].decode() for i in range(16) if source[i].id == f"{earth.ZONE}_{earth.WEST}_{earth.NORTH - 240}"
    )
    assert (beside.labels == road).any()
    assert not (beside.labels == building).any()


def test_files_that_came_to_nothing_are_named_with_the_reason(dataset):
    rejected = [json.loads(line) for line in (dataset / "rejected.jsonl").read_text().splitlines()]
    files = {entry["name"]: entry["reason"] for entry in rejected if entry["what"] == "file"}
    assert files == {
        "aerial/aerial/nowhere.tif": "no coordinate system: where it lies and the size of its pixels are unknown"
    }


def test_statistics_are_those_of_all_pixels_together(dataset):
    found = json.loads((dataset / "statistics.json").read_text())
    source = RecordSource(str(dataset / "train-*.array_record"), ROWS)
    for name in ("s2", "s1"):
        samples = [source[i].decode().series[name] for i in range(len(source))]
        pixels = np.concatenate([series.images[series.valid] for series in samples]).astype(np.float64)
        assert found[name]["pixels"] == len(pixels)
        np.testing.assert_allclose(found[name]["mean"], pixels.mean(0), rtol=1e-9)
        np.testing.assert_allclose(found[name]["std"], pixels.std(0), rtol=1e-6)
        nearest = np.percentile(pixels, 50, axis=0, method="inverted_cdf")
        np.testing.assert_array_equal(found[name]["percentile_50"], nearest)


def test_card_says_what_is_in_it(dataset):
    text = (dataset / "README.md").read_text()
    for wanted in (
        "16 samples",
        "2021-07-03 to 2022-06-14",
        "| aerial | image | CC0-1.0 |",
        "| building |",
        "| s2 | B8A |",
    ):
        assert wanted in text, text


def test_what_a_library_raises_costs_its_place_alone(few, built, tmp_path, monkeypatch):
    first = _index(built)[0]["id"]
    draw = build.LabelMaps.draw

    def damaged(maps, square):
        if f"{square.crs.to_epsg()}_{square.west:.0f}_{square.north:.0f}" == first:
            raise KeyError("a column that is not there")
        return draw(maps, square)

    monkeypatch.setattr(build.LabelMaps, "draw", damaged)
    _build(few, tmp_path / "out")
    assert [row["id"] for row in _index(tmp_path / "out")] == [row["id"] for row in _index(built)[1:]]
    told = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert dict(what="place", name=first, reason="KeyError: 'a column that is not there'") in told


def test_one_process_and_two_write_the_same_bytes(few, built, tmp_path):
    _build(few, tmp_path / "again")
    assert _files(tmp_path / "again") == _files(built)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "again").rglob("*.array_record")}
    _build(few, tmp_path / "again")
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_build_tells_what_is_planned_and_what_is_left(archive, manifest, dataset):
    parts = {path.stem: json.loads(path.read_text()) for path in (dataset / "parts").glob("*.json")}
    num = pq.read_table(manifest / "places.parquet").num_rows
    first, *shards, last = (archive / "told").read_text().splitlines()
    assert first == f"{num} places in {len(parts)} shards are planned"
    told = [re.fullmatch(r"(\S+): (\d+) samples, (\d+) rejected, [\d.]+ (?:s|min)(.*)", line) for line in shards]
    wanted = {name: (len(part["samples"]), len(part["rejected"])) for name, part in parts.items()}
    assert {line[1]: (int(line[2]), int(line[3])) for line in told} == wanted
    assert sum(rejects for _, rejects in wanted.values())
    left = [
        re.fullmatch(rf"; left: (\d+) of {len(parts)} shards, some [\d.]+ (?:s|min)", line[4]) for line in told[:-1]
    ]
    assert [int(line[1]) for line in left] == list(range(len(parts) - 1, 0, -1))
    assert not told[-1][4]
    assert re.fullmatch(rf"made {len(parts)} of {len(parts)} shards in [\d.]+ (?:s|min)", last)


def test_build_that_goes_on_tells_what_is_there(few, built, tmp_path, capsys):
    out = shutil.copytree(built, tmp_path / "out")
    gone = min(out.glob("*.array_record"))
    gone.unlink()
    _build(few, out)
    first, shard, last = capsys.readouterr().err.splitlines()
    num = len(list((out / "parts").glob("*.json")))
    assert first.endswith(f" places in {num} shards are planned; goes on: {num - 1} of {num} shards are there")
    assert re.fullmatch(rf"{gone.stem}: 1 samples, \d+ rejected, [\d.]+ (?:s|min)", shard)
    assert last.startswith(f"made 1 of {num} shards in ")
    _build(few, out)
    (only,) = capsys.readouterr().err.splitlines()
    assert only.endswith(f"; goes on: {num} of {num} shards are there")
    assert _files(out) == _files(built)


def test_build_that_is_killed_goes_on_to_the_same_bytes(few, built, tmp_path):
    rng, out, kills = random.Random(0), tmp_path / "killed", 0
    command = [sys.executable, "-m", "skysense_jax.ingest.build", "--manifest", str(few), "--out", str(out)]
    command += ["--workers", "1", "--places_per_shard", "2"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(20):
        before = len(list((out / "parts").glob("*.json"))) if out.exists() else 0
        run = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.DEVNULL)
        while run.poll() is None and not (out / "parts").exists():
            time.sleep(0.01)
        while run.poll() is None and len(list((out / "parts").glob("*.json"))) == before:
            time.sleep(0.002)  # to the end of a shard, and then some way into the next
        time.sleep(rng.uniform(0, 0.12))
        if run.poll() is not None:
            break
        run.send_signal(signal.SIGKILL)
        run.wait()
        kills += 1
    assert kills >= 3
    assert subprocess.run(command, cwd=ROOT, env=environ, stdout=subprocess.DEVNULL).returncode == 0
    assert _files(out) == _files(built)


def test_folder_of_another_build_is_refused_and_kept(manifest, dataset, capsys):
    had = _files(dataset)
    with pytest.raises(SystemExit):
        build.main(["--manifest", str(manifest), "--out", str(dataset), "--places_per_shard", "5"])
    assert "begun with another places_per_shard" in capsys.readouterr().err
    assert _files(dataset) == had


def test_full_disk_ends_the_build_with_words_and_the_same_command_goes_on(few, built, tmp_path, monkeypatch, capsys):
    written = []

    class Full(folder.ShardWriter):
        def write(self, payload):
            written.append(payload)
            if len(written) == 5:
                raise OSError(28, "No space left on device")
            super().write(payload)

    with monkeypatch.context() as patch:
        patch.setattr(folder, "ShardWriter", Full)
        with pytest.raises(SystemExit):
            _build(few, tmp_path / "out")
    assert "No space left on device. What is whole stays; the same command goes on" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*incomplete*"))
    _build(few, tmp_path / "out")
    assert _files(tmp_path / "out") == _files(built)


def test_file_that_could_not_be_had_is_asked_for_by_the_next_build(archive, few, built, tmp_path):
    product = next((archive / "s2").glob("*20220601*"))
    product.rename(archive / "away")
    _build(few, tmp_path / "out")
    rejected = (tmp_path / "out" / "rejected.jsonl").read_text()
    assert rejected.count("unreachable: ") == 12
    (archive / "away").rename(product)
    _build(few, tmp_path / "out")
    assert _files(tmp_path / "out") == _files(built)


def test_second_build_in_a_folder_is_refused_while_the_first_works(few, tmp_path, capsys):
    with folder.claimed(epath.Path(tmp_path / "out"), {"manifest": "x"}), pytest.raises(SystemExit):
        _build(few, tmp_path / "out")
    assert "another build is at work" in capsys.readouterr().err


def test_build_that_was_killed_before_it_had_said_what_it_is_goes_on(few, built, tmp_path):
    out = tmp_path / "out"
    with folder.claimed(epath.Path(out), {"manifest": "x"}):
        pass
    (out / folder.FACTS).rename(out / f"{folder.FACTS}.incomplete-1")
    _build(few, out)
    assert _files(out) == _files(built)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and no build of ours"):
        build.build(few, tmp_path / "mine", engine=engines.Engine())


def test_one_bad_product_is_named_and_the_others_go_on(archive, tmp_path):
    folder = earth.write_safe(tmp_path / "s2", side_m=200)
    path = folder / "MTD_MSIL2A.xml"
    path.write_text(path.read_text().replace("<PROCESSING_BASELINE>04.00", "<PROCESSING_BASELINE>04.00a"))
    earth.write_safe(tmp_path / "s2", day="20220701", side_m=200)
    (tmp_path / "list.toml").write_text(
        '[[source]]\nname = "a"\nkind = "s2_safe"\nfiles = "s2/*.SAFE"\nlicence = "x"\n'
    )
    found, rejected = sources.find(sources.read_list(tmp_path / "list.toml").sources[0], ROWS)
    assert len(found) == 1
    assert folder.name in rejected[0].name
    assert "04.00a" in rejected[0].reason


def test_manifest_appears_whole_or_not_at_all(archive, manifest, capsys):
    with pytest.raises(SystemExit):
        plan.main(["--sources", str(archive / "list.toml"), "--out", str(manifest)])
    assert "exists; wanted a new folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        plan.main(["--sources", str(archive / "list.toml"), "--out", str(archive / "other"), "--area", "20,20,21,21"])
    assert "no place is left of 7 acquisitions" in capsys.readouterr().err
    assert not list(archive.glob("other*"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (('kind = "image"', 'kind = "picture"'), "kind = 'picture'; wanted one of"),
        (('modality = "hr"', ""), "modality is missing"),
        (('modality = "hr"', 'modality = "pan"'), "modality = 'pan'; wanted one of"),
        (('modality = "hr"', 'modality = "hr"\nbans = [1]'), "bans is no field of 'image'"),
        (('modality = "hr"', 'modality = "hr"\nbands = "1"'), "bands = '1'; wanted a list"),
        (('files = "aerial/*.tif"', 'files = "arial/*.tif"'), "files = 'arial/*.tif' finds nothing"),
        (('licence = "CC0-1.0"', ""), "licence = None; wanted a text"),
        (('name = "sentinel-1"', 'name = "aerial"'), "name = ['aerial'] more than once"),
        (('kind = "s2_safe"', 'kind = "s2_geotiff"'), "offset is missing: 0, or 1000 where the numbers"),
        (('kind = "s2_safe"', 'kind = "s2_geotiff"\noffset = 100'), "offset = 100; wanted one of (0, 1000)"),
        (('modality = "hr"', 'modality = "s2"'), "modality = 's2'; wanted kind = 's2_safe', 's2_geotiff' or 'stac'"),
        (('modality = "hr"', 'modality = "hr"\nbands = [0, 1, 2]'), "bands = [0, 1, 2]; wanted numbers from 1"),
        (('name = "aerial"', 'name = "a/b"'), "wanted a name without /"),
        (('kind = "s1"', 'kind = "s1"\nunit = "db"'), "unit = 'db'; wanted one of ('linear', 'dB')"),
        (("[[source]]", "[source"), "bad.toml: Expected"),
    ],
)
def test_bad_list_is_refused_with_source_and_field(archive, capsys, change, told):
    path = archive / "bad.toml"
    path.write_text((archive / "list.toml").read_text().replace(*change))
    with pytest.raises(SystemExit):
        plan.main(["--sources", str(path), "--out", str(archive / "never"), "--cells", "8"])
    assert told in capsys.readouterr().err
    assert not (archive / "never").exists()


def test_plan_tells_what_it_found_and_used_maps_too(archive, tmp_path, capsys):
    command = ["--sources", str(archive / "list.toml"), "--out", str(tmp_path / "m"), "--cells", str(CELLS)]
    plan.main([*command, "--require", "s2"])
    found = [line.split() for line in capsys.readouterr().out.splitlines()[1:5]]
    assert found == [
        ["aerial", "image", "4", "4"],
        ["sentinel-2", "s2_safe", "2", "2"],
        ["sentinel-1", "s1", "1", "1"],
        ["map", "osm", "1", "1"],
    ]


def test_row_that_must_be_there_and_that_no_source_has_is_named(archive, tmp_path, capsys):
    first, *_, last = (archive / "list.toml").read_text().split("[[source]]")
    (archive / "short.toml").write_text("[[source]]".join([first, *_[:1], last]))
    command = ["--sources", str(archive / "short.toml"), "--out", str(tmp_path / "m"), "--cells", str(CELLS)]
    with pytest.raises(SystemExit):
        plan.main([*command, "--require", "hr,s2"])
    assert "--require: no source gives s2; they give hr" in capsys.readouterr().err
    plan.main(command)
    _build(tmp_path / "m", tmp_path / "out")
    assert "no sample has s2, s1; rejected.jsonl says what was left out" in capsys.readouterr().out


def test_area_is_a_box_or_a_file_and_in_degrees(tmp_path):
    assert plan.read_area("9,48,10,49").bounds == (9, 48, 10, 49)
    (tmp_path / "a.geojson").write_text(json.dumps(shapely.geometry.mapping(shapely.box(1, 2, 3, 4))))
    assert plan.read_area(str(tmp_path / "a.geojson")).bounds == (1, 2, 3, 4)
    for text in ("9,48,10", "500000,5400000,501000,5401000", "10,48,9,49", "here"):
        with pytest.raises(ValueError, match="--area: got"):
            plan.read_area(text)


def test_sources_read_lists_relative_to_their_own_folder(archive):
    found = sources.read_list(archive / "list.toml").sources
    assert [source.name for source in found] == ["aerial", "sentinel-2", "sentinel-1", "map"]
    assert len(found[0].files) == 5


def test_row_that_the_list_brings_is_built(archive, tmp_path):
    height = np.linspace(100, 900, 400 * 400).reshape(400, 400, 1).astype(np.float32)
    where = plan.rasterio.transform.from_origin(earth.WEST, earth.NORTH, 1.0, 1.0)
    earth.write_tif(tmp_path / "height.tif", height, where, earth.ZONE)
    (tmp_path / "list.toml").write_text(
        """
        [[source]]
        name = "heights"
        kind = "image"
        files = "height.tif"
        licence = "CC0-1.0"
        modality = "dsm"
        [[modality]]
        name = "dsm"
        bands = ["height"]
        dtype = "float32"
        unit = "metres"
        value_range = [-500, 9000]
        typical_range = [-500, 9000]
        wrong_unit_hint = "feet"
        pixels_per_cell = 8
        patch = 4
        mean = [500.0]
        std = [300.0]
        statistics_source = "made up"
        """
    )
    plan.main(["--sources", str(tmp_path / "list.toml"), "--out", str(tmp_path / "m"), "--cells", "16"])
    _build(tmp_path / "m", tmp_path / "d")
    row = sources.rows_with(json.loads((tmp_path / "m" / "sources.json").read_text())["modalities"])[-1]
    assert row.name == "dsm"
    source = RecordSource(str(tmp_path / "d" / "*.array_record"), (row,))
    image = source[0].decode().series["dsm"].images
    assert image.shape == (1, 128, 128, 1)
    assert 100 <= image.min() < image.max() <= 900


def test_land_and_its_classes_choose_places(archive, tmp_path):
    square = places.Square(float(earth.WEST), float(earth.NORTH), 16, places.CRS.from_epsg(earth.ZONE))
    box = shapely.box(*plan.rasterio.warp.transform_bounds(square.crs, "EPSG:4326", *square.bounds))
    (tmp_path / "land.geojson").write_text(json.dumps(shapely.geometry.mapping(box)))
    cover = np.zeros((4, 4, 1), np.uint8)
    cover[:, :2] = 7
    transform = plan.rasterio.transform.from_origin(earth.WEST, earth.NORTH, 80, 80)
    earth.write_tif(tmp_path / "cover.tif", cover, transform, earth.ZONE)
    common = ["--sources", str(archive / "list.toml"), "--cells", str(CELLS), "--require", "hr,s2", "--block_km", "0.1"]
    on_land, balanced = (
        [*common, "--land", str(tmp_path / "land.geojson")],
        ["--land_cover", str(tmp_path / "cover.tif")],
    )
    plan.main([*on_land, "--out", str(tmp_path / "a"), "--validation_share", "0"])
    found = places.read(tmp_path / "a" / plan.PLACES)
    assert sorted((place.west - earth.WEST, earth.NORTH - place.north) for place in found) == [
        (0, 0),
        (0, 80),
        (80, 0),
        (80, 80),
    ]
    common += ["--validation_share", "0", *balanced, "--per_class", "3", "--out", str(tmp_path / "b")]
    plan.main(common)
    found = places.read(tmp_path / "b" / plan.PLACES)
    inside = [place for place in found if 0 <= place.west - earth.WEST < 320 and 0 <= earth.NORTH - place.north < 320]
    assert sum(place.west - earth.WEST < 160 for place in inside) == 3
    assert sum(place.west - earth.WEST >= 160 for place in inside) == 3
