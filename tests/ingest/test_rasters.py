"""Cells and resampling against loops over ground areas."""

import math

import numpy as np
import pytest
import rasterio
import rasterio.warp
from rasterio.crs import CRS
from rasterio.transform import from_origin

from skysense_jax.ingest import rasters, windows
from skysense_jax.ingest.rasters import Raster, Refused, Square

UTM = CRS.from_epsg(32633)


def raster_of(pixels, *, west, north, size, crs=UTM, valid=None):
    valid = np.ones(pixels.shape[:2], bool) if valid is None else valid
    return Raster(pixels=pixels, valid=valid, transform=from_origin(west, north, size, size), crs=crs)


def area_mean(raster, left, top, size):
    """(mean, covered share) of valid ground under one square whose corner is (left, top), by loops."""
    total, area = 0.0, 0.0
    step, (west, _, _, north) = raster.transform.a, raster.bounds
    for r in range(raster.valid.shape[0]):
        for c in range(raster.valid.shape[1]):
            width = min(left + size, west + step * (c + 1)) - max(left, west + step * c)
            height = min(top, north - step * r) - max(top - size, north - step * (r + 1))
            if width > 0 and height > 0 and raster.valid[r, c]:
                total, area = total + width * height * raster.pixels[r, c, 0], area + width * height
    return (total / area if area else math.nan), area / size**2


@pytest.mark.parametrize(("size", "shift"), [(0.7, (0.0, 0.0)), (0.55, (-2.3, 1.1)), (1.25, (3.4, 0.0))])
def test_resample_equals_area_means_of_valid_pixels(size, shift):
    rng = np.random.default_rng(0)
    num = int(26 / size)
    valid = rng.random((num, num + 3)) > 0.03
    pixels = rng.uniform(10, 200, (num, num + 3, 1)).astype(np.float32)
    raster = raster_of(pixels, west=500_000 + shift[0], north=5e6 + shift[1], size=size, valid=valid)
    square = Square(west=500_000.0, north=5e6, cells=2, crs=UTM)
    got = rasters.resample(raster, square, pixels_per_cell=8)
    assert got.pixels.shape == (16, 16, 1)
    valid_seen = set()
    for row in range(16):
        for column in range(16):
            mean, covered = area_mean(raster, 500_000 + 1.25 * column, 5e6 - 1.25 * row, 1.25)
            assert got.valid[row, column] == (covered > 0.999)
            valid_seen.add(bool(got.valid[row, column]))
            if got.valid[row, column]:
                assert got.pixels[row, column, 0] == pytest.approx(mean, rel=1e-4)
    assert valid_seen == {True, False}


def test_resample_to_finer_pixels_keeps_a_ramp_in_its_place():
    columns, rows = np.meshgrid(np.arange(40), np.arange(40))
    pixels = (7.0 * (columns + 0.5) + 3 * (rows + 0.5))[..., None].astype(np.float32)  # of metres east and south
    raster = raster_of(pixels, west=499_990, north=5_000_010, size=1.0)
    got = rasters.resample(raster, Square(west=500_000.0, north=5e6, cells=1, crs=UTM), pixels_per_cell=16)
    east, south = np.meshgrid(10 + 0.625 * (np.arange(16) + 0.5), 10 + 0.625 * (np.arange(16) + 0.5))
    assert got.valid.all()
    assert got.pixels[..., 0] == pytest.approx(7 * east + 3 * south, abs=1e-3)


def test_resample_rounds_to_the_type():
    raster = raster_of(np.full((20, 20, 3), 2, np.uint8), west=500_000, north=5e6, size=1.0)
    raster.pixels[::2] = 255
    square = Square(west=500_010.0, north=5e6 - 10, cells=2, crs=UTM)
    got = rasters.resample(raster, square, pixels_per_cell=1)
    assert got.pixels.dtype == np.uint8
    assert got.pixels[0, 0].tolist() == [128] * 3  # 128.5, to even
    assert got.valid.tolist() == [[True, False], [False, False]]
    assert rasters.resample(raster, square, pixels_per_cell=1, dtype="uint16").pixels.dtype == np.uint16


@pytest.mark.parametrize(
    ("numbers", "dtype", "valid"),
    [
        ([-7, 40_000, 3, 0], "uint16", [False, True, True, True]),
        ([-7, 40_000, 3, 0], "int16", [True, False, True, True]),
        ([-0.6, 255.6, 254.6, -0.4], "uint8", [False, False, True, True]),
    ],
)
def test_numbers_that_the_type_cannot_hold_are_invalid_and_not_clipped(numbers, dtype, valid):
    raster = raster_of(np.array(numbers)[None, :, None].repeat(4, 0), west=500_000, north=5e6, size=10.0)
    got = rasters.resample(raster, Square(500_000.0, 5e6, 4, UTM), pixels_per_cell=1, dtype=dtype)
    assert got.pixels.dtype == dtype
    assert got.valid.tolist() == [valid] * 4
    assert got.pixels[0, valid, 0].tolist() == np.rint(np.array(numbers)[valid]).tolist()


def test_resample_that_would_stretch_more_than_twice_is_refused():
    raster = raster_of(np.zeros((30, 30, 3), np.uint8), west=500_000, north=5e6, size=1.0)
    square = Square(west=500_000.0, north=5e6, cells=3, crs=UTM)
    with pytest.raises(Refused, match=r"pixels of 1 m; wanted at most 0\.625 m for a row of 0\.3125 m"):
        rasters.resample(raster, square, pixels_per_cell=32)


def test_resample_from_degrees_finds_the_zone_and_the_ground():
    """An image whose pixels hold their own longitude, in degrees, against the centres of the UTM pixels."""
    size, crs = 1e-5, CRS.from_epsg(4326)  # about a metre
    columns, _ = np.meshgrid(np.arange(90), np.arange(70))
    longitude = 13.1 + size * (columns + 0.5)
    raster = raster_of((1e6 * (longitude - 13.1))[..., None], west=13.1, north=-38.3, size=size, crs=crs)
    square = rasters.whole_cells(raster)
    assert square.crs == CRS.from_epsg(32733)
    assert square.cells >= 5
    assert square.west % 10 == square.north % 10 == 0
    got = rasters.resample(raster, square, pixels_per_cell=8)
    assert got.valid.mean() > 0.95
    steps = 10 / 8 * (np.arange(8 * square.cells) + 0.5)
    east, north = np.meshgrid(square.west + steps, square.north - steps)
    wanted, _ = rasterio.warp.transform(square.crs, crs, east.ravel(), north.ravel())
    wanted = 1e6 * (np.reshape(wanted, east.shape) - 13.1)
    assert np.abs(got.pixels[..., 0] - wanted)[got.valid].max() < 6  # a native pixel is 10


def test_whole_cells_lie_on_the_grid_inside_the_image():
    raster = raster_of(np.zeros((400, 460, 3), np.uint8), west=404_211.9, north=3_285_142.9, size=0.1)
    square = rasters.whole_cells(raster)
    assert (square.west, square.north, square.cells) == (404_220, 3_285_140, 3)
    with pytest.raises(Refused, match="hold no whole 10 m cell"):
        rasters.whole_cells(raster_of(np.zeros((15, 99, 1)), west=404_213, north=3_285_148, size=1.0))


def test_nearest_cells_are_nearest_to_the_centre():
    raster = raster_of(np.zeros((304, 304, 3), np.uint8), west=565_642.6, north=5_770_980.4, size=0.2)
    square = rasters.nearest_cells(raster, cells=6)
    assert square.bounds == (565_640, 5_770_920, 565_700, 5_770_980)
    distances = {
        (west, north): math.dist((west + 30, north - 30), (565_673, 5_770_950))
        for west in range(565_600, 565_700, 10)
        for north in range(5_770_940, 5_771_020, 10)
    }
    assert min(distances, key=distances.get) == (square.west, square.north)


def test_own_cells_counts_whole_ones():
    assert rasters.own_cells(256, 300, pixel_size_m=1.0) == 25
    assert rasters.own_cells(400, 400, pixel_size_m=0.1) == 4


def test_read_raster_takes_nodata_and_no_alpha(tmp_path):
    pixels = np.array([[[7, 0, 0], [0, 5, 200]]] * 4, np.uint8)
    pixels[3, 0] = 0  # as an alpha channel it would hide the first row
    options = dict(driver="GTiff", dtype="uint8", count=4, height=2, width=3, crs=UTM)
    with rasterio.open(
        tmp_path / "a.tif", "w", transform=from_origin(0, 50, 1, 1), photometric="RGB", alpha="yes", **options
    ) as file:
        file.write(pixels)
    raster = windows.read_raster(tmp_path / "a.tif", bands=(4, 2, 3))
    assert raster.valid.all()
    assert raster.pixels[1].tolist() == [[0, 0, 0], [5, 5, 5], [200, 200, 200]]
    assert raster.pixels[0].tolist() == [[0, 7, 7], [0, 0, 0], [0, 0, 0]]
    with rasterio.open(tmp_path / "a.tif", "r+") as file:
        file.nodata = 0
    raster = windows.read_raster(tmp_path / "a.tif", bands=(1, 4))
    assert raster.valid.tolist() == [[True, False, False], [False, True, True]]
    with pytest.raises(Refused, match="4 bands; wanted 5 or more"):
        windows.read_raster(tmp_path / "a.tif", bands=(1, 5))


def test_a_turned_image_is_refused():
    with pytest.raises(Refused, match="turned or mirrored"):
        Raster(np.zeros((2, 2, 1)), np.ones((2, 2), bool), rasterio.Affine(1, 0, 0, 0, 1, 0), UTM)
