"""GeoTIFFs to a GeoTIFF of features: place, values, blending, nodata, refusals, memory, and what must be installed.

With SKYSENSE_REALDATA (a folder as in docs/data.md) some tests read real imagery; without, rasters made like it.
"""

import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import rasterio
import torch
from rasterio.crs import CRS
from rasterio.transform import Affine, from_origin
from rasterio.warp import transform as move
from rasterio.warp import transform_bounds
from rasterio.windows import Window

from skysense_jax.export import embed, ground, mosaic
from skysense_jax.export.modeling_skysensev2 import SkySenseV2

ROOT = pathlib.Path(__file__).resolve().parents[2]
S2 = ("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B11", "B12")
L2A = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
WEST, NORTH = 549892.697, 6344077.614  # no multiple of 10 m, as tiles cut elsewhere have it


def fields(rows: int, columns: int, bands: int, *, low: float, high: float, seed: int = 0) -> np.ndarray:
    """[C H W] float64 between low and high: stripes of fields, a little different in each band, and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:rows, :columns]
    phases = rng.uniform(0, 6, (bands, 1, 1))
    pattern = np.sin(y / 5 + phases) * np.cos(x / 3 - phases) + 0.1 * rng.normal(size=(bands, rows, columns))
    return low + (high - low) * (pattern.clip(-1.5, 1.5) + 1.5) / 3


def write_tif(path: pathlib.Path, pixels: np.ndarray, *, transform=None, crs="EPSG:32632", bands=(), **profile) -> str:
    transform = transform or from_origin(WEST, NORTH, 10, 10)
    profile = dict(count=len(pixels), height=pixels.shape[1], width=pixels.shape[2], dtype=pixels.dtype, **profile)
    with rasterio.open(path, "w", driver="GTiff", transform=transform, crs=crs, **profile) as file:
        file.write(pixels)
        if bands:
            file.descriptions = bands
    return str(path)


def s2_tif(path: pathlib.Path, rows: int = 11, columns: int = 13, *, bands=S2, seed: int = 0, **options) -> str:
    pixels = fields(rows, columns, len(S2), low=300, high=4000, seed=seed).astype("uint16")
    return write_tif(path, pixels[[S2.index(band) for band in bands]], bands=bands, **options)


def s1_tif(path: pathlib.Path, rows: int = 11, columns: int = 13, **options) -> str:
    pixels = fields(rows, columns, 2, low=-22, high=-8, seed=5).astype("float32")
    return write_tif(path, pixels, bands=("VV", "VH"), **options)


def aerial(folder: pathlib.Path) -> str:
    """A real NEON image, 0.1 m and not quite square pixels, or one made like it."""
    if real := os.environ.get("SKYSENSE_REALDATA"):
        return str(pathlib.Path(real) / "aerial_hr/2018_SJER_3_252000_4107000_image_477.tif")
    pixels = fields(400, 400, 3, low=20, high=230).astype("uint8")
    at = Affine(0.100235, 0, 252645.951, 0, -0.0997475, 4107315.949)
    return write_tif(folder / "aerial.tif", pixels, transform=at, crs="EPSG:32611", nodata=255)


def sentinel(folder: pathlib.Path) -> tuple[str, str]:
    """Real Sentinel-2 L2A (12 bands) and Sentinel-1 (dB) of one place, 224 x 224, or made like them."""
    if real := os.environ.get("SKYSENSE_REALDATA"):
        of = pathlib.Path(real) / "terramesh_examples"
        return str(of / "S2L2A/637U_59R_1_3.tif"), str(of / "S1RTC/637U_59R_1_3.tif")
    pixels = fields(224, 224, 12, low=300, high=4000).astype("int16")
    s2 = write_tif(folder / "l2a.tif", pixels)
    pixels = fields(224, 224, 2, low=-22, high=-8)
    return s2, write_tif(folder / "rtc.tif", pixels, bands=("bands", "bands"))


def run(model_dir: pathlib.Path, out: pathlib.Path, **flags) -> rasterio.DatasetReader:
    """The opened GeoTIFF; ``flags`` as on the command line, lists for several values."""
    assert embed.main(arguments(model_dir, out, **flags)) == 0
    return rasterio.open(out)


def arguments(model_dir: pathlib.Path, out: pathlib.Path, **flags) -> list[str]:
    made = [f"--model={model_dir}", f"--out={out}", "--device=cpu"]
    for name, values in flags.items():
        values = values if isinstance(values, list | tuple) else [values]
        made += [f"--{name}"] + [str(value) for value in values if value is not True]
    return made


def refusal(capfd, model_dir: pathlib.Path, out: pathlib.Path, **flags) -> str:
    """The one line of the error; nothing new stands beside ``out``."""
    before = sorted(out.parent.iterdir())
    assert embed.main(arguments(model_dir, out, **flags)) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert sorted(out.parent.iterdir()) == before
    return lines[0]


def direct(model_dir: pathlib.Path, images: dict[str, np.ndarray], **options) -> np.ndarray:
    """[D P Q]: fused features of arrays [C H W] or [T C H W], from the network itself."""
    model = SkySenseV2.from_pretrained(model_dir)
    with torch.inference_mode():
        out = model({name: torch.from_numpy(x.astype("float32"))[None] for name, x in images.items()}, **options)
    return out.fused[0].numpy()


# ---- place


def test_output_of_a_utm_tile_lines_up_with_it_in_gdal(model_dir, tmp_path):
    source = rasterio.open(s2_tif(tmp_path / "s2.tif"))
    with run(model_dir, tmp_path / "out.tif", s2=source.name) as out:
        assert (out.crs, out.bounds, out.shape) == (source.crs, source.bounds, source.shape)
        assert out.transform.almost_equals(source.transform, 1e-9)
        assert out.count == 128
        assert out.descriptions[:2] == ("fused_000", "fused_001")
        assert np.isnan(out.nodata)
        assert out.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert out.tags()["MODEL"] == "random"
        assert out.tags()["DATES_S2"] == "undated"
        assert out.tags()["WEIGHTS_SHA256"] in (model_dir / "SHA256SUMS").read_text()
    assert rasterio.open(tmp_path / "out.png").count == 4


def test_output_of_an_aerial_image_covers_it_on_the_10_m_grid(model_dir, tmp_path):
    source = rasterio.open(aerial(tmp_path))
    with run(model_dir, tmp_path / "out.tif", hr=source.name) as out:
        assert out.crs == source.crs
        assert out.transform == from_origin(252640, 4107320, 10, 10)
        assert out.shape == (5, 5)
        west, south, east, north = source.bounds
        assert out.bounds.left <= west < out.bounds.left + 10
        assert out.bounds.bottom <= south < out.bounds.bottom + 10
        assert out.bounds.right - 10 < east <= out.bounds.right
        assert out.bounds.top - 10 < north <= out.bounds.top
        there = np.isfinite(out.read(1))  # cells of which the image covers half
        assert there[1:4, 1:4].all()


def test_output_of_a_geographic_raster_is_in_its_utm_zone_and_nodata_stays_in_place(model_dir, tmp_path):
    at = from_origin(9.8, 57.2, 0.00016, 0.00009)  # 9.7 m x 10 m
    pixels = fields(40, 36, 10, low=300, high=4000).astype("uint16")
    pixels[:, 20:27, 8:14] = 0
    source = rasterio.open(write_tif(tmp_path / "s2.tif", pixels, transform=at, crs="EPSG:4326", bands=S2, nodata=0))
    with run(model_dir, tmp_path / "out.tif", s2=source.name) as out:
        assert out.crs == CRS.from_epsg(32632)
        assert out.transform.c % 10 == out.transform.f % 10 == 0
        inside, outer = transform_bounds(source.crs, out.crs, *source.bounds, densify_pts=99), out.bounds
        np.testing.assert_array_less(np.abs(np.subtract(inside, outer)), 10)
        empty = np.isnan(out.read(1))
        columns, rows = np.meshgrid(np.arange(out.width) + 0.5, np.arange(out.height) + 0.5)
        x, y = out.transform * (columns.ravel(), rows.ravel())
        column, row = ~source.transform * tuple(np.array(axis) for axis in move(out.crs, source.crs, x, y))
        in_hole = (column > 8.1) & (column < 13.9) & (row > 20.1) & (row < 26.9)
        far = (column > 2) & (column < 34) & (row > 2) & (row < 38)
        far &= (column < 6.5) | (column > 15.5) | (row < 18.5) | (row > 28.5)
        assert in_hole.sum() > 20
        assert empty.ravel()[in_hole].all()
        assert not empty.ravel()[far].any()


@pytest.mark.parametrize(
    "at",
    [
        from_origin(500000, 5e6, 10, 10) * Affine.translation(0, 24) * Affine.scale(1, -1),
        Affine.translation(500000, 5e6) * Affine.rotation(30) * Affine.scale(9, -9),
    ],
    ids=["rows from the south", "turned"],
)
def test_turned_and_mirrored_rasters_keep_their_place(tmp_path, at):
    pixels = np.zeros((2, 24, 30), "float32")
    pixels[:] = -20
    pixels[:, 5, 22] = -10
    path = write_tif(tmp_path / "s1.tif", pixels, transform=at, bands=("VV", "VH"))
    raster = ground.Raster(path, sensor("s1"), band_order=in_order)
    grid = ground.choose_grid(raster, cell_m=10.0, crs=None, bounds=None)
    raster.place(grid)
    got = raster.read(Window(0, 0, grid.columns, grid.rows))
    row, column = np.unravel_index(np.where(got.valid, got.values[0], -99).argmax(), got.valid.shape)
    x, y = grid.transform() * (column + 0.5, row + 0.5)
    np.testing.assert_allclose((x, y), at * (22.5, 5.5), atol=5.1)
    covered = got.valid.sum() * 100 / abs(at.determinant * 24 * 30)
    assert 0.75 < covered <= 1.001
    np.testing.assert_allclose(got.values[0][got.valid].min(), -20, atol=1e-4)


def test_bounds_cut_the_scene_and_crs_moves_it(model_dir, tmp_path):
    path = s2_tif(tmp_path / "s2.tif", 30, 31)
    bounds = (WEST + 41, NORTH - 111, WEST + 99, NORTH - 50)
    with run(model_dir, tmp_path / "a.tif", s2=path, bounds=bounds) as out:
        assert out.shape == (7, 6)
        np.testing.assert_allclose((out.transform.c, out.transform.f), (WEST + 40, NORTH - 50))
    with run(model_dir, tmp_path / "b.tif", s2=path, crs="EPSG:25832") as out:
        assert out.crs == CRS.from_epsg(25832)
        assert out.transform.c % 10 == 0


# ---- values


def sensor(name: str):
    from skysense_jax.export.modeling_skysensev2 import Modality
    from skysense_jax.modalities import MODALITIES

    m = MODALITIES[name]
    return Modality.from_row({key: getattr(m, key) for key in Modality.__dataclass_fields__})


def in_order(name: str, bands) -> list[int]:
    return list(range(len(bands)))


def test_one_tile_equals_the_network_run_on_the_arrays(model_dir, tmp_path):
    at = from_origin(WEST, NORTH, 0.3125, 0.3125)
    hr = fields(96, 128, 3, low=10, high=240).astype("uint8")
    images = {
        "hr": write_tif(tmp_path / "hr.tif", hr, transform=at, bands=("R", "G", "B")),
        "s2": s2_tif(tmp_path / "s2.tif", 3, 4),
        "s1": s1_tif(tmp_path / "s1.tif", 3, 4),
    }
    with run(model_dir, tmp_path / "out.tif", **images) as out:
        wanted = direct(model_dir, {name: rasterio.open(path).read() for name, path in images.items()})
        assert out.shape == (3, 4)
        np.testing.assert_allclose(out.read(), wanted, atol=2e-5)


@pytest.mark.parametrize("given", [("s2",), ("s1",), ("s2", "s1")], ids="+".join)
def test_any_subset_of_modalities_is_enough(model_dir, tmp_path, given):
    paths = {"s2": s2_tif(tmp_path / "s2.tif"), "s1": s1_tif(tmp_path / "s1.tif")}
    with run(model_dir, tmp_path / "out.tif", **{name: paths[name] for name in given}) as out:
        wanted = direct(model_dir, {name: rasterio.open(paths[name]).read() for name in given})
        np.testing.assert_allclose(out.read(), wanted, atol=2e-5)


def test_dates_reach_the_network(model_dir, tmp_path):
    files = [s2_tif(tmp_path / f"{seed}.tif", seed=seed) for seed in range(2)]
    with run(model_dir, tmp_path / "dated.tif", s2=files, s2_dates=["2021-07-23", "2020-12-31"]) as out:
        dated = out.read()
        assert out.tags()["DATES_S2"] == "2021-07-23 2020-12-31"
    with run(model_dir, tmp_path / "undated.tif", s2=files) as out:
        undated = out.read()
    series = {"s2": np.stack([rasterio.open(path).read() for path in files])}
    wanted = direct(model_dir, series, day_of_year={"s2": torch.tensor([[204, 366]])})
    np.testing.assert_allclose(dated, wanted, atol=2e-5)
    np.testing.assert_allclose(undated, direct(model_dir, series), atol=2e-5)
    assert np.abs(dated - undated).max() > 1e-3


def test_features_of_a_modality_are_the_mean_over_its_valid_dates(model_dir, tmp_path):
    files = [s2_tif(tmp_path / f"{seed}.tif", seed=seed) for seed in range(2)]
    with rasterio.open(files[1], "r+") as second:
        second.nodata = 0
        second.write(np.zeros((10, 11, 4), "uint16"), window=Window(0, 0, 4, 11))
    with run(model_dir, tmp_path / "out.tif", s2=files, features="s2") as out:
        got = out.read()
        assert out.descriptions[0] == "s2_000"
    model = SkySenseV2.from_pretrained(model_dir, check_inputs=False)
    x = torch.from_numpy(np.stack([rasterio.open(path).read() for path in files]).astype("float32"))[None]
    valid = (x > 0).all(2)
    with torch.inference_mode():
        maps = model({"s2": x}, valid={"s2": valid}, fuse=False).stages["s2"][-1][0].numpy()
    np.testing.assert_allclose(got[:, :, :4], maps[0][:, :, :4], atol=2e-5)
    np.testing.assert_allclose(got[:, :, 4:], maps.mean(0)[:, :, 4:], atol=2e-5)


def test_bands_described_in_another_order_are_reordered(model_dir, tmp_path):
    shuffled = ("B12", "B8A", "B2", "B11", "B3", "B8", "B4", "B7", "B5", "B6")
    paths = [s2_tif(tmp_path / "a.tif"), s2_tif(tmp_path / "b.tif", bands=shuffled)]
    with rasterio.open(paths[1], "r+") as file:  # and spelt otherwise
        file.descriptions = [band.lower().replace("b", "b0") if len(band) == 2 else band for band in shuffled]
    first, second = (run(model_dir, tmp_path / f"out{i}.tif", s2=path).read() for i, path in enumerate(paths))
    np.testing.assert_array_equal(first, second)
    named = run(model_dir, tmp_path / "named.tif", s2=paths[1], s2_bands=shuffled).read()
    np.testing.assert_array_equal(first, named)


def test_real_sentinel_scene_with_named_bands(model_dir, tmp_path, capfd):
    s2, s1 = sentinel(tmp_path)
    source = rasterio.open(s2)
    west, _, _, north = source.bounds
    bounds = (west, north - 300, west + 400, north)
    with run(model_dir, tmp_path / "out.tif", s2=s2, s1=s1, s2_bands=L2A, bounds=bounds, tile=32, overlap=8) as out:
        assert out.crs == source.crs
        assert out.transform.almost_equals(source.transform, 1e-6)
        assert out.shape == (30, 40)
        assert np.isfinite(out.read()).all()
    printed = capfd.readouterr()
    assert "bands not described, taken as VV VH" in printed.err
    assert "1200 cells, 0 without data" in printed.out


# ---- blending


def test_blended_features_lie_between_the_tiles_and_have_no_larger_seams(model_dir, tmp_path):
    path = s2_tif(tmp_path / "s2.tif", 12, 40)
    pixels = rasterio.open(path).read()
    hard = run(model_dir, tmp_path / "hard.tif", s2=path, tile=20, overlap=0).read()
    soft = run(model_dir, tmp_path / "soft.tif", s2=path, tile=24, overlap=8).read()
    first, second = (direct(model_dir, {"s2": pixels[:, :, part]}) for part in (slice(0, 24), slice(16, 40)))
    np.testing.assert_allclose(soft[:, :, :16], first[:, :, :16], atol=2e-5)
    np.testing.assert_allclose(soft[:, :, 24:], second[:, :, 8:], atol=2e-5)
    both = np.stack((first[:, :, 16:], second[:, :, :8]))
    assert (soft[:, :, 16:24] >= both.min(0) - 2e-5).all()
    assert (soft[:, :, 16:24] <= both.max(0) + 2e-5).all()
    whole = direct(model_dir, {"s2": pixels})  # what tiles get wrong changes from one cell to the next
    seam_of = lambda x: np.abs(np.diff(x - whole, axis=-1)).mean((0, 1)).max()  # noqa: E731
    assert seam_of(soft) < 0.7 * seam_of(hard)


# ---- nodata


def test_nodata_becomes_nan_and_does_not_leak(model_dir, tmp_path, capfd):
    values = fields(12, 14, 10, low=300, high=4000).astype("float32")
    hole = np.zeros((12, 14), bool)
    hole[3:6, 4:9] = True
    outs = []
    for index, (fill, nodata) in enumerate(((-9999, -9999), (np.nan, None), (25000, None))):
        values[:, hole] = fill
        path = write_tif(tmp_path / f"{index}.tif", values, bands=S2, nodata=nodata)
        outs.append(run(model_dir, tmp_path / f"out{index}.tif", s2=path).read())
        assert f"s2: {15 if fill == 25000 else 0} of 168 pixels" in capfd.readouterr().out
    for out in outs:
        np.testing.assert_array_equal(np.isnan(out), np.broadcast_to(hole, out.shape))
        np.testing.assert_array_equal(out, outs[0])
    colours = rasterio.open(tmp_path / "out0.png").read()
    np.testing.assert_array_equal(colours[3] == 0, hole)


def test_masks_count_and_alpha_does_not(tmp_path):
    pixels = fields(8, 8, 4, low=20, high=230).astype("uint8")
    pixels[3] = 0  # infrared, which GDAL takes for alpha
    at = from_origin(WEST, NORTH, 0.3125, 0.3125)
    paths = [write_tif(tmp_path / "rgba.tif", pixels, transform=at, photometric="RGB", alpha="YES")]
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        paths.append(write_tif(tmp_path / "masked.tif", pixels, transform=at))
        with rasterio.open(paths[1], "r+") as file:
            file.write_mask(np.arange(64).reshape(8, 8) >= 10)
    found = []
    for path in paths:
        raster = ground.Raster(
            path, sensor("hr"), band_order=lambda name, bands: [0, 1, 2], band_names=("R", "G", "B", "IR")
        )
        raster.place(ground.choose_grid(raster, cell_m=10.0, crs=None, bounds=None))
        found.append(int(raster.read(Window(0, 0, 1, 1)).valid.sum()))
    assert found == [64, 54]


def test_a_split_read_equals_a_whole_one(tmp_path, monkeypatch):
    pixels = fields(50, 60, 3, low=20, high=230).astype("uint8")
    path = write_tif(tmp_path / "hr.tif", pixels, transform=from_origin(WEST + 1, NORTH - 2, 0.2, 0.2))
    raster = ground.Raster(path, sensor("hr"), band_order=in_order)
    grid = ground.choose_grid(raster, cell_m=10.0, crs=None, bounds=None)
    raster.place(grid)
    whole = raster.read(Window(0, 0, grid.columns, grid.rows))
    monkeypatch.setattr(ground, "_VALUES_AT_ONCE", 2000)
    split = raster.read(Window(0, 0, grid.columns, grid.rows))
    np.testing.assert_array_equal(whole.valid, split.valid)
    np.testing.assert_allclose(whole.values, split.values, atol=1e-3)
    inside = whole.values[:, whole.valid]
    np.testing.assert_allclose(inside.mean(1), pixels.mean((1, 2)), rtol=0.03)


# ---- refusals


def test_wrong_input_is_refused_in_one_line_and_nothing_is_left(model_dir, tmp_path, capfd):
    out = tmp_path / "out.tif"
    good = s2_tif(tmp_path / "s2.tif")
    few = s2_tif(tmp_path / "few.tif", bands=S2[:4])
    power = write_tif(tmp_path / "power.tif", np.full((2, 9, 9), 0.05, "float32"), bands=("VV", "VH"))
    unit = write_tif(tmp_path / "unit.tif", np.full((10, 9, 9), 0.2, "float32"), bands=S2)
    wide = write_tif(
        tmp_path / "wide.tif", np.full((3, 99, 99), 2000, "uint16"), transform=from_origin(0, 6e6, 0.3, 0.3)
    )
    nowhere = s2_tif(tmp_path / "nowhere.tif", crs=None)
    coarse = s1_tif(tmp_path / "coarse.tif", transform=from_origin(WEST, NORTH, 21, 21))
    swapped = write_tif(tmp_path / "irgb.tif", np.full((3, 9, 9), 99, "uint8"), bands=("IR", "G", "B"))
    (tmp_path / "text.tif").write_text("no raster")
    cases = [
        (dict(s2=few), "wanted the 10 bands", "B2 B3 B4 B5", "--s2_bands"),
        (dict(s2=good, s2_bands=S2[:9]), "9 names", "has 10"),
        (dict(s1=power), "power.tif, band VV", "mean 0.05", "linear power", "-40 to -0.5"),
        (dict(s2=unit), "unit.tif, band B2", "mean 0.2", "reflectance 0-1"),
        (dict(hr=wide), "wide.tif, band R", "mean 2000", "16-bit"),
        (dict(s2=nowhere), "nowhere.tif", "no coordinate system"),
        (dict(s1=coarse), "coarse.tif", "pixels of 21 m", "at most 20 m", "2x"),
        (dict(hr=swapped), "IR G B", "wanted the 3 bands R G B"),
        (dict(s2=tmp_path / "text.tif"), "text.tif"),
        (dict(s2=tmp_path / "absent.tif"), "--s2", "absent.tif"),
        (dict(s2=good, s2_dates="2021-13-01"), "2021-13-01", "wanted a date"),
        (dict(s2=good, s2_dates=["2021-07-23", "2021-07-24"]), "2 dates, 1 files"),
        (dict(s2=good, s1_dates="2021-07-23"), "without --s1"),
        (dict(s2=good, features="s1"), "--features s1"),
        (dict(s2=good, tile=16), "--overlap 16"),
        (dict(s2=good, crs="EPSG:3857"), "EPSG:3857", "of ground here"),
        (dict(s2=good, crs="EPSG:4326"), "is not in metres"),
        (dict(s2=good, bounds=(0, 0, 10, 10)), "--bounds", "do not meet"),
        (dict(s2=good, device="abacus"), "--device abacus"),
        (dict(s2=good, sensor="x"), "unrecognized arguments"),
        ({}, "no file given", "--hr --s2 --s1"),
    ]
    for flags, *wanted in cases:
        line = refusal(capfd, model_dir, out, **flags)
        assert all(part in line for part in wanted), (flags, line)


def test_existing_output_is_refused_unless_overwritten(model_dir, tmp_path, capfd):
    path = s2_tif(tmp_path / "s2.tif")
    for name in ("out.tif", "out.png"):
        (tmp_path / name).write_text("precious")
        assert f"{name} exists" in refusal(capfd, model_dir, tmp_path / "out.tif", s2=path)
        assert (tmp_path / name).read_text() == "precious"
        (tmp_path / name).rename(tmp_path / "kept")
    (tmp_path / "out.tif").write_text("old")
    assert run(model_dir, tmp_path / "out.tif", s2=path, overwrite=True).count == 128
    line = refusal(capfd, model_dir, tmp_path / "s2.tif", s2=path, overwrite=True)
    assert "files that are not read" in line


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "SHA256SUMS"])
def test_a_model_with_a_missing_or_changed_file_is_refused(model_dir, tmp_path, capfd, name):
    copy = shutil.copytree(model_dir, tmp_path / "model")
    path = s2_tif(tmp_path / "s2.tif")
    with (copy / name).open("a") as file:
        file.write("\n")
    if name != "SHA256SUMS":
        assert "SHA-256" in refusal(capfd, copy, tmp_path / "out.tif", s2=path)
    (copy / name).unlink()
    assert f"no {name}" in refusal(capfd, copy, tmp_path / "out.tif", s2=path)


def test_a_full_disk_is_refused_before_anything_is_computed(model_dir, tmp_path, capfd, monkeypatch):
    path = s2_tif(tmp_path / "s2.tif")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 100))
    monkeypatch.setattr(embed, "_read", None)
    assert "11 x 13 cells of 128 features need" in refusal(capfd, model_dir, tmp_path / "out.tif", s2=path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ZeroDivisionError])
def test_an_interrupted_run_leaves_nothing(model_dir, tmp_path, monkeypatch, error):
    path = s2_tif(tmp_path / "s2.tif")

    def stop(*_, **__):
        raise error

    monkeypatch.setattr(mosaic.rasterio.shutil, "copy", stop)
    if error is KeyboardInterrupt:
        assert embed.main(arguments(model_dir, tmp_path / "out.tif", s2=path)) == 130
    else:
        with pytest.raises(error):
            embed.main(arguments(model_dir, tmp_path / "out.tif", s2=path))
    assert [path.name for path in tmp_path.iterdir()] == ["s2.tif"]


def test_a_scene_without_data_is_refused(model_dir, tmp_path, capfd):
    path = write_tif(tmp_path / "s2.tif", np.zeros((10, 9, 9), "uint16"), bands=S2, nodata=0)
    assert "none of 9 x 9 cells has data" in refusal(capfd, model_dir, tmp_path / "out.tif", s2=path)


# ---- memory, and what must be installed

BLOCKED = (
    "jax jaxlib flax ml_collections absl einops jaxtyping beartype grain orbax transformers tqdm PIL sklearn scipy"
)
ALONE = """
import sys
sys.modules.update(dict.fromkeys("{blocked}".split()))  # importing them is an ImportError
from skysense_jax.export import embed
{change}
status = embed.main(sys.argv[1:])
[peak] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]  # ru_maxrss is the parent's at first
print("peak", int(peak.split()[1]) // 1024)
sys.exit(status)
"""
# What a tile costs the network does not depend on the scene: here it costs nothing, so that the scene can be large.
CHEAP = """
embed.CACHE_MB = 8
from skysense_jax.export import mosaic
mosaic._BLOCK_BYTES = 2**20
def features(model, inputs, wanted):
    band = inputs.images["s2"][0, 0, 0].numpy()
    return band[None].repeat(128, 0), band > 0
embed._features = features
"""


def alone(command: list[str], change: str = "") -> str:
    """What a fresh interpreter without the blocked packages prints."""
    code = ALONE.format(blocked=BLOCKED, change=change)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *command], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torch_safetensors_numpy_and_rasterio_are_enough(model_dir, tmp_path):
    command = arguments(model_dir, tmp_path / "out.tif", s2=s2_tif(tmp_path / "s2.tif"), s1=s1_tif(tmp_path / "s1.tif"))
    assert "143 cells, 0 without data" in alone(command)


def test_memory_does_not_grow_with_the_scene(model_dir, tmp_path):
    peaks = []
    for side in (160, 288):  # features of 12 and 41 MiB
        path = s2_tif(tmp_path / f"s2_{side}.tif", side, side)
        peaks.append(int(alone(arguments(model_dir, tmp_path / f"out_{side}.tif", s2=path), CHEAP).split("peak")[1]))
    assert peaks[1] - peaks[0] < 22, f"{peaks} MiB"
