"""The conversion as a whole: every number is looked up again in the source files, with loops and by hand."""

import json
import math
import re
import shutil
import warnings

import h5py
import netCDF4
import numpy as np
import pytest
import rasterio
import shapely
import shapely.geometry
from rasterio.errors import NotGeoreferencedWarning

from configs import real_mix
from skysense_jax import config as run_config
from skysense_jax.data.pipeline import Mix, make_pipeline
from skysense_jax.data.sample import ORBITS, UNDATED
from skysense_jax.ingest import samples
from skysense_jax.modalities import MODALITIES, OSM, select

TREE = "treesatai_ts_sample/Abies_alba_1_1005_WEFL_NLF"
PATCH = "worldcereal_patches/00002806639B424A"
# The scene chip's and the radar scene's names are the same in both sources.
CHIP = "s2_scenes/geobench_m-eurosat_id_1905.hdf5"
RADAR = "s2_scenes/S1A__IW___A_20150309T173017_VV_grd_mli_geo_norm_db.tif"
TILE_DAYS = {  # (Sentinel-2, Sentinel-1)
    "637U_59R_1_3": ("2017-10-30", "2017-10-30"),
    "433D_629L_3_1": ("2020-04-08", "2020-04-11"),
    "282D_485L_3_3": ("2021-07-23", "2021-07-21"),
}


def day(text):
    return int(np.datetime64(text, "D").astype(int))


def only(found):
    (one,) = found
    return one


@pytest.fixture(scope="module")
def tree(converted):
    with h5py.File(converted.source / f"{TREE}.h5") as file:
        data = {name: file[name][:] for name in file}
    return {n: [p.decode() for p in v] if n.endswith("products") else v for n, v in data.items()}


def test_convert_every_kind_has_its_modalities_and_extent(converted):
    assert only(converted.samples["triple"]).extent_cells == 6
    assert set(only(converted.samples["triple"]).series) == {"hr", "s2", "s1"}
    assert [(s.extent_cells, set(s.series)) for s in converted.samples["sentinel_series"]] == [(64, {"s2", "s1"})]
    assert [(s.extent_cells, set(s.series)) for s in converted.samples["sentinel_single"]] == [(64, {"s2", "s1"})] * 27
    assert [(s.extent_cells, set(s.series)) for s in converted.samples["hr"]] == [(3, {"hr"})] * 2
    assert {(s.extent_cells, *s.series) for s in converted.samples["naip"]} == {(25, "naip")}
    assert [(s.extent_cells, set(s.series)) for s in converted.samples["pan_osm"]] == [(44, {"pan"})]
    for kind, found in converted.samples.items():
        assert converted.report.kinds[kind].samples == len(found)
        assert all((s.labels is not None) == (kind == "pan_osm") for s in found)
        assert all(s.licence and s.provenance for s in found)


def test_convert_rejects_with_a_reason_each(converted):
    reasons = {entry.name: entry.reason for entry in converted.report.rejected}
    written = [json.loads(line) for line in (converted.out / "rejected.jsonl").read_text().splitlines()]
    assert {entry["name"]: entry["reason"] for entry in written if entry["what"] == "file"} == reasons
    assert "bands B02 B03 B04 B08 are missing" in reasons.pop("worldcereal_patches/000028085BF08E7E")
    assert re.search(r"band names contradict.*B8A / B8 is 0\.\d+.*B12 / B11 is", reasons.pop(CHIP))
    assert reasons.pop(RADAR) == "polarisations in the file: VV; missing: VH"
    png = only(name for name in reasons if name.endswith(".png"))
    assert "no coordinate system" in reasons.pop(png)
    assert reasons
    for name, reason in reasons.items():
        assert name.startswith("osm_extracts/")
        assert "without imagery" in reason
    ids = {sample.id for found in converted.samples.values() for sample in found}
    assert not any("000028085BF08E7E" in name for name in ids)  # its Sentinel-1 did not slip through


def test_triple_s2_dates_offsets_and_clouds_are_those_of_the_products(converted, tree):
    s2 = only(converted.samples["triple"]).series["s2"]
    kept = [date for date in range(len(tree["sen-2-data"])) if (tree["sen-2-data"][date] > 0).any()]
    assert len(s2.days) == len(kept)
    for index, date in enumerate(kept):
        name = tree["sen-2-products"][date]
        assert s2.days[index] == day(f"{name[11:15]}-{name[15:17]}-{name[17:19]}")
        offset = 1000 if int(name[28:32]) >= 400 else 0
        for row, column, band in ((0, 0, 0), (5, 2, 3), (1, 4, 6), (3, 3, 9)):
            wanted = min(max(round(float(tree["sen-2-data"][date, band, row, column])) - offset, 1), 20000)
            assert s2.images[index, row, column, band] == wanted
            snow, cloud = tree["sen-2-masks"][date, :2, row, column]
            assert s2.cloud[index, row, column] == (snow >= 10 or cloud >= 10)
    assert s2.cloud.any()
    assert not s2.cloud.all()
    clear = np.median(s2.images[s2.valid & ~s2.cloud], axis=0)
    assert 100 < clear[0] < 700 < 1500 < clear[6] < 3500  # dark blue, bright near infrared


def test_triple_s1_is_decibels_of_both_orbits_without_repeats(converted, tree):
    s1 = only(converted.samples["triple"]).series["s1"]
    wanted = {}  # (day, orbit): power
    for orbit, key in (("ascending", "asc"), ("descending", "des")):
        for name, power in zip(tree[f"sen-1-{key}-products"], tree[f"sen-1-{key}-data"]):
            when = name.split("_")[4]
            first = wanted.setdefault((day(f"{when[:4]}-{when[4:6]}-{when[6:8]}"), orbit), power)
            assert np.array_equal(first, power)  # what is dropped repeats what is kept
    got = [(int(d), ORBITS[o]) for d, o in zip(s1.days, s1.orbits)]
    assert sorted(got) == sorted(wanted)
    assert list(s1.days) == sorted(s1.days)
    assert len(wanted) < len(tree["sen-1-asc-data"]) + len(tree["sen-1-des-data"])
    for index, key in enumerate(got):
        for row, column, band in ((0, 3, 1), (5, 2, 0), (2, 4, 1)):
            db = max(10 * math.log10(float(wanted[key][band, row, column])), -50.0)
            assert s1.images[index, row, column, band] == pytest.approx(db, abs=0.02)  # float16 below 32
    assert s1.images.min() == -50
    assert -13 < s1.images[..., 0].astype(float).mean() < -7
    assert -20 < s1.images[..., 1].astype(float).mean() < -13


def test_triple_hr_lies_on_the_sentinel_cells(converted):
    """Area means of the 0.2 m pixels under a 0.3125 m pixel of the square 565640..565700, 5770920..5770980."""
    hr = only(converted.samples["triple"]).series["hr"]
    with rasterio.open(converted.source / f"{TREE}.tif") as file:
        native, (west, north) = file.read(), (file.bounds.left, file.bounds.top)
    centre = (west + 30.4, north - 30.4)
    corner = (round((centre[0] - 30) / 10) * 10, round((centre[1] + 30) / 10) * 10)
    assert corner == (565640, 5770980)
    assert hr.images.shape == (1, 192, 192, 3)
    assert hr.native_gsd_m == pytest.approx(0.2, abs=1e-6)
    missing = math.ceil((west - corner[0]) / 0.3125)  # columns that the image does not wholly cover
    assert missing == 9
    assert not hr.valid[0, :, :missing].any()
    assert hr.valid[0, :, missing:].all()
    worst = 0.0
    for row, column in ((0, 9), (191, 191), (60, 133), (97, 20), (150, 75)):
        left, top = corner[0] + 0.3125 * column - west, north - (corner[1] - 0.3125 * row)
        total, area = np.zeros(3), 0.0
        for r in range(int(top / 0.2), int((top + 0.3125) / 0.2) + 1):
            for c in range(int(left / 0.2), int((left + 0.3125) / 0.2) + 1):
                height = min(top + 0.3125, 0.2 * (r + 1)) - max(top, 0.2 * r)
                width = min(left + 0.3125, 0.2 * (c + 1)) - max(left, 0.2 * c)
                if height > 0 and width > 0:
                    total += height * width * native[[3, 1, 2], r, c]  # R, G, B of IR, G, B, R
                    area += height * width
        worst = max(worst, float(np.abs(total / area - raw_hr(converted)[row, column]).max()))
    assert worst <= 0.51  # rounding to whole numbers


def raw_hr(converted):
    """The triple's hr before JPEG."""
    from skysense_jax.ingest import read_sentinel

    item = only(read_sentinel.find_triples(converted.source / "treesatai_ts_sample"))
    image = only(item.read()).series["hr"]
    stored = only(converted.samples["triple"]).series["hr"].images[0, :, 16:]
    assert np.abs(stored.astype(int) - image.images[0, :, 16:]).mean() < 4  # visually lossless
    return image.images[0]


def test_series_bands_are_those_of_the_files(converted):
    sample = only(converted.samples["sentinel_series"])
    s2, s1 = sample.series["s2"], sample.series["s1"]
    folder = converted.source / PATCH
    raw = {}
    for size in ("10m", "20m"):
        with netCDF4.Dataset(only(folder.glob(f"S2_L2A_{size}_*.nc"))) as file:
            file.set_auto_maskandscale(False)
            raw |= {name: file[name][:] for name in file.variables if file[name].ndim == 3}
            times, units = file["timestamp"][:], file["timestamp"].units
    first = np.datetime64(units.removeprefix("seconds since ").replace(" ", "T"))
    assert list(s2.days) == [day(str(first + np.timedelta64(int(t), "s"))[:10]) for t in times]
    names = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
    for date in range(len(times)):
        for row, column in ((0, 1), (33, 62), (17, 40), (5, 5)):
            pixel = [
                int(raw[n][date, row, column] if len(raw[n][date]) == 64 else raw[n][date, row // 2, column // 2])
                for n in names
            ]
            scl = raw["SCL"][date, row // 2, column // 2]
            assert s2.valid[date, row, column] == (min(pixel) > 0 and scl not in (0, 1))
            if s2.valid[date, row, column]:
                assert s2.images[date, row, column].tolist() == pixel
                assert s2.cloud[date, row, column] == (scl in (3, 8, 9, 10, 11))
    with netCDF4.Dataset(only(folder.glob("S1_GRD-ASCENDING_20m_*.nc"))) as file:
        file.set_auto_maskandscale(False)
        radar = np.stack([file["VV"][:], file["VH"][:]], -1)
    assert len(s1.days) == len(radar)
    assert set(s1.orbits.tolist()) == {ORBITS.index("ascending")}
    assert s1.native_gsd_m == 20
    for date in (0, 5, len(radar) - 1):
        for row, column in ((0, 0), (31, 15), (63, 62)):
            stored = radar[date, row // 2, column // 2]
            assert s1.valid[date, row, column] == bool((stored != 0).all())
            if s1.valid[date, row, column]:
                assert s1.images[date, row, column].astype(float) == pytest.approx(stored * 1e-4, abs=0.02)


def test_places_are_where_utm_says(converted):
    """Longitude and latitude against the first terms of the projection, without its library: within 0.02 degrees."""
    places = {
        "triple": (565670, 5770950, 9),
        "sentinel_series": (501680, 5629360, 3),
    }
    for kind, (east, north, meridian) in places.items():
        sample = only(converted.samples[kind])
        latitude = north / 0.9996 / 111_132.95 + 0.1443 * math.sin(math.radians(2 * north / 111_132.95))
        radius = 6_378_137 / math.sqrt(1 - 0.00669438 * math.sin(math.radians(latitude)) ** 2)
        longitude = meridian + math.degrees((east - 500_000) / 0.9996 / radius / math.cos(math.radians(latitude)))
        assert sample.latitude == pytest.approx(latitude, abs=0.02)
        assert sample.longitude == pytest.approx(longitude, abs=0.02)
    assert all(s.longitude is None and s.latitude is None for s in converted.samples["naip"])


def test_tiles_are_cut_dated_and_freed_of_their_offset(converted):
    removed = {}
    for sample in converted.samples["sentinel_single"]:
        _, tile, corner = sample.id.split("/")
        row, column = map(int, corner.split("_"))
        s2, s1 = sample.series["s2"], sample.series["s1"]
        assert (list(s2.days), list(s1.days)) == tuple([day(d)] for d in TILE_DAYS[tile])
        with rasterio.open(converted.source / "terramesh_examples" / "S2L2A" / f"{tile}.tif") as file:
            surface = file.read()[:, row : row + 64, column : column + 64]
            east = file.bounds.left + 10 * (column + 32)
            central = (sample.longitude, (file.crs.to_epsg() % 100) * 6 - 183)
        assert (east > 500_000) == (central[0] > central[1])
        with rasterio.open(converted.source / "terramesh_examples" / "S1RTC" / f"{tile}.tif") as file:
            radar = file.read()[:, row : row + 64, column : column + 64]
        offset = int(np.median(surface[7].astype(int) - s2.images[0, ..., 6]))
        removed.setdefault(tile, set()).add(offset)
        order = (1, 2, 3, 4, 5, 6, 7, 8, 10, 11)  # of B1 B2 .. B8 B8A B9 B11 B12
        for band, index in enumerate(order):
            wanted = np.clip(surface[index].astype(int) - offset, 1, 20000)
            assert np.array_equal(s2.images[0, ..., band], wanted)
        assert np.abs(s1.images[0].astype(float) - np.moveaxis(radar, 0, -1)).max() < 0.02
    assert removed == {"637U_59R_1_3": {0}, "433D_629L_3_1": {1000}, "282D_485L_3_3": {0}}


def test_naip_bands_keep_order_and_mean(converted):
    for sample in converted.samples["naip"]:
        series = sample.series["naip"]
        assert series.images.shape == (1, 200, 200, 4)
        assert series.valid.all()
        assert list(series.days) == [UNDATED]
        with h5py.File(
            converted.source / "chesapeake_naip_1m" / "geobench" / f"{sample.id.split('/')[1]}.hdf5"
        ) as file:
            for band, name in enumerate(("Red", "Green", "Blue", "NearInfrared")):
                wanted = 255 * file[name][:250, :250]
                assert series.images[..., band].mean() == pytest.approx(wanted.mean(), abs=0.1)
                block = wanted[100:105, 200:205].mean()  # 5 m: 4 pixels of 1.25 m
                assert series.images[0, 80:84, 160:164, band].mean() == pytest.approx(block, abs=0.5)


def test_outlines_become_buildings_where_pixel_centres_lie_in_them(converted):
    sample = only(converted.samples["pan_osm"])
    collection = json.loads((converted.source / "spacenet_samples" / "geotiff_labels.geojson").read_text())
    outlines = shapely.union_all([shapely.geometry.shape(f["geometry"]) for f in collection["features"]])
    assert sample.labels.shape == (176, 176)
    wanted = np.zeros((176, 176), bool)
    for row in range(176):
        for column in range(176):
            centre = shapely.Point(733610 + 2.5 * (column + 0.5), 3725130 - 2.5 * (row + 0.5))
            wanted[row, column] = outlines.contains(centre)
    assert wanted.any()
    assert np.array_equal(sample.labels > 0, wanted)
    assert set(np.unique(sample.labels)) == {0, OSM.classes.index("building") + 1}


def test_panchromatic_image_lies_on_the_cells(converted):
    series = only(converted.samples["pan_osm"]).series["pan"]
    with rasterio.open(converted.source / "spacenet_samples" / "sample_geotiff.tif") as file:
        native = file.read(1).astype(float)
    assert series.images.shape == (1, 704, 704, 1)
    # 10 m of ground from (733610 + 70, 3725130 - 150): 20 native pixels from (18 + 140, 18 + 300).
    cell = series.images[0, 15 * 16 : 16 * 16, 7 * 16 : 8 * 16, 0].mean()
    assert cell == pytest.approx(native[318:338, 158:178].mean(), rel=1e-3)


def test_statistics_are_those_of_the_records(converted):
    statistics = json.loads((converted.out / "statistics.json").read_text())
    assert set(statistics) == {kind for kind, found in converted.samples.items() if found}
    for kind, name in (("naip", "naip"), ("pan_osm", "pan"), ("sentinel_single", "s2")):
        series = [s.series[name] for s in converted.samples[kind]]
        pixels = np.concatenate([s.images[s.valid] for s in series]).astype(float)
        assert statistics[kind][name]["mean"] == pytest.approx(pixels.mean(0), abs=1e-3)
        assert statistics[kind][name]["std"] == pytest.approx(pixels.std(0), abs=1e-3)
        assert statistics[kind][name]["pixels"] == len(pixels)
        if converted.real and kind != "sentinel_single":  # what the config states was measured here
            row = only(row for row in converted.rows if row.name == name)
            assert (*row.mean, *row.std) == (*statistics[kind][name]["mean"], *statistics[kind][name]["std"])
            assert "not a corpus" in row.statistics_source


def test_real_mix_config_reads_the_records(converted):
    config = real_mix.get_config(str(converted.out)).lock()
    run_config.validate(config, num_devices=1)
    data = config.data.to_dict() | dict(batch_size=4)
    batch = next(iter(make_pipeline(**data, input_threads=1, input_workers=0)))
    assert (batch["bad_record"] == -1).all()
    assert sum(present.any(-1).sum() for present in batch["present"].values()) >= 4  # each sample has something
    mix = Mix(sources=config.data.sources, modalities=converted.rows, scenes={})
    seen = {kind: mix[mix.range_of(source).start] for source, kind in enumerate(real_mix.SHARES)}
    present = {kind: {row.name for row in converted.rows if len(seen[kind].days(row.name))} for kind in seen}
    assert present["triple"] == {"hr", "s2", "s1"}
    assert set().union(*present.values()) == {"hr", "s2", "s1", "naip", "pan"}


def test_convert_into_a_folder_that_holds_something_is_refused(made_up, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match=r"--out: .* is not empty"):
        samples.convert(made_up, tmp_path, modalities=tuple(MODALITIES.values()))


def test_convert_that_fails_leaves_nothing(made_up, tmp_path, monkeypatch):
    calls = []

    def fail(sample, modalities):
        calls.append(sample.id)
        if len(calls) == 3:
            raise RuntimeError("disk full")
        return b"x"

    monkeypatch.setattr(samples, "encode_sample", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        samples.convert(made_up, tmp_path / "out", modalities=tuple(MODALITIES.values()))
    assert list(tmp_path.iterdir()) == []


def test_convert_without_a_sample_is_refused_with_all_reasons(tmp_path):
    folder = tmp_path / "source" / "aerial_hr"
    folder.mkdir(parents=True)
    (folder / "a.tif").write_bytes(b"not an image")
    options = dict(driver="PNG", dtype="uint8", count=3, height=4, width=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(folder / "b.png", "w", **options) as file:
            file.write(np.ones((3, 4, 4), np.uint8))
    (folder / "c.xyz").write_text("")
    with pytest.raises(ValueError, match="holds no sample") as caught:
        samples.convert(tmp_path / "source", tmp_path / "out", modalities=tuple(MODALITIES.values()))
    message = str(caught.value)
    assert "aerial_hr/a.tif: " in message
    assert "aerial_hr/b.png: no coordinate system" in message
    assert "aerial_hr/c.xyz: no reader" in message
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_convert_a_file_that_cannot_be_read_costs_only_itself(made_up, tmp_path):
    source = tmp_path / "source"
    for folder in ("chesapeake_naip_1m", "spacenet_samples"):
        shutil.copytree(made_up / folder, source / folder)
    chips = source / "chesapeake_naip_1m" / "geobench"
    for name, chip in (("nothing", np.full((64, 64), np.nan)), ("small", np.full((8, 8), 0.5))):
        with h5py.File(chips / f"{name}.hdf5", "w") as file:
            file.update(dict.fromkeys(("Red", "Green", "Blue", "NearInfrared"), chip))
    (source / "spacenet_samples" / "geotiff_labels.geojson").write_text('{"features": [')
    data = real_mix.get_config().data
    report = samples.convert(source, tmp_path / "out", modalities=select(data.modalities, data.new_modalities))
    reasons = {entry.name.rsplit("/")[-1]: entry.reason for entry in report.rejected}
    assert reasons.pop("nothing.hdf5") == "no pixel is a number in all bands"
    assert reasons.pop("small.hdf5") == "8 x 8 pixels of 1 m hold no whole 10 m cell"
    assert reasons.pop("sample_geotiff.tif").startswith("JSONDecodeError: ")
    assert not reasons
    assert report.kinds["naip"].samples == 2


def test_convert_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has none of the folders treesatai_ts_sample"):
        samples.convert(tmp_path, tmp_path / "out", modalities=tuple(MODALITIES.values()))


def test_convert_a_folder_of_one_data_set_names_its_parent(made_up, tmp_path, capsys):
    told = rf"--source: .*spacenet_samples has none of the folders .*\(wanted its parent, {re.escape(str(made_up))}\)"
    with pytest.raises(ValueError, match=told):
        samples.convert(made_up / "spacenet_samples", tmp_path / "out", modalities=tuple(MODALITIES.values()))
    with pytest.raises(SystemExit):
        samples.main(["--help"])
    told = "".join(capsys.readouterr().out.split())
    assert all(folder in told for folder, _ in samples.KINDS.values())


def test_convert_without_rows_for_other_imagery_rejects_it(made_up, tmp_path):
    report = samples.convert(made_up, tmp_path / "out", modalities=tuple(MODALITIES.values()))
    reasons = {entry.name: entry.reason for entry in report.rejected}
    assert "no row 'naip'" in reasons["chesapeake_naip_1m/geobench/id_000051.hdf5"]
    assert "no row 'pan'" in reasons["spacenet_samples/sample_geotiff.tif"]


def test_command_line_ends_with_a_table(made_up, tmp_path, capsys):
    samples.main(["--source", str(made_up), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "rejected worldcereal_patches/000028085BF08E7E: " in printed
    assert re.search(r"^kind +samples +dates +rejected$", printed, re.MULTILINE)
    assert re.search(r"^triple +1 +\d+ +0$", printed, re.MULTILINE)
    assert re.search(r"^scenes +0 +0 +2$", printed, re.MULTILINE)
    with pytest.raises(SystemExit):
        samples.main(["--source", str(made_up), "--out", str(tmp_path / "out")])
    assert "is not empty" in capsys.readouterr().err
