"""Pixels of a made-up Earth come back where they lie, whatever the source's grid, and in the table's unit."""

import dataclasses

import h5py
import numpy as np
import pytest
import rasterio.warp
from rasterio.errors import RasterioIOError
from rasterio.transform import from_origin

from skysense_jax.ingest import acquisitions, cubes, geotiffs, remote, safe
from skysense_jax.ingest import series as lib
from skysense_jax.ingest.acquisitions import Acquisition
from skysense_jax.ingest.cubes import Layout
from skysense_jax.ingest.grids import Ground
from skysense_jax.ingest.places import Place, seen_by
from skysense_jax.ingest.rasters import Raster, mosaic
from skysense_jax.ingest.series import read_series
from skysense_jax.modalities import MODALITIES
from tests.ingest import earth

CELLS = 64
PLACE = Place(earth.ZONE, earth.WEST, earth.NORTH, CELLS)
HR, S2, S1 = (MODALITIES[name] for name in ("hr", "s2", "s1"))


def _ground(row):
    """Where the pixels of the place's square lie."""
    side = CELLS * row.pixels_per_cell
    return earth.centres(PLACE.square.transform(row.pixels_per_cell), side, side, earth.ZONE)


def _image(path, row=HR, **options):
    return geotiffs.read_image(path, row, name=path.name, source="aerial", **options)


def _read(found, row, *, min_clear_share=0.1):
    series, rejected = read_series(found, PLACE.square, row, min_clear_share=min_clear_share)
    assert not rejected, rejected
    return series


# Half a source pixel off, a wave of 12 m and a height of 100 changes by 100 * 2 pi / 12 * pixel / 2.
def _half_a_pixel(size_m):
    return 100 * 2 * np.pi / 12 * size_m / 2


@pytest.mark.parametrize(
    ("epsg", "size", "corner", "size_m"),
    [
        (earth.ZONE, 0.3125, None, 0.3125),  # the cells' own grid
        (earth.ZONE, 0.5, (-3.3, 2.9), 0.5),  # coarser, off the grid
        (earth.ZONE, 0.2, (-1.1, 0.7), 0.2),  # finer
        (32631, 0.4, None, 0.4),  # the zone beside, turned by four degrees
        (3857, 0.5, None, 0.33),  # Web Mercator: a metre there is 0.65 m here
        (4326, 4e-6, None, 0.45),  # degrees
    ],
)
def test_images_of_any_grid_lie_where_they_are(tmp_path, monkeypatch, epsg, size, corner, size_m):
    monkeypatch.setitem(globals(), "CELLS", 20)  # a tenth of the pixels
    monkeypatch.setitem(globals(), "PLACE", Place(earth.ZONE, earth.WEST, earth.NORTH, 20))
    west, south, east, north = _bounds(epsg, corner or (-20, 20))
    height, width = int((north - south) / size), int((east - west) / size)
    halves = [(0, width // 2 + 1), (width // 2 + 1, width)]  # cut in two: a seam through the middle
    found = []
    for number, (left, right) in enumerate(halves):
        path = tmp_path / f"{number}.tif"
        earth.write_aerial(
            path, west=west + left * size, north=north, width=right - left, height=height, size=size, epsg=epsg
        )
        found.append(_image(path))
    series = _read(found, HR)
    assert series.images.shape == (1, 640, 640, 3)
    assert series.valid.all()  # the seam too
    error = np.abs(series.images[0].astype(float) - earth.colours(*_ground(HR)))
    assert error.max() < _half_a_pixel(max(size_m, 0.3125)) + 1, error.max()
    assert error.mean() < 0.25 * _half_a_pixel(max(size_m, 0.3125))


def _bounds(epsg, corner):
    """In units of ``epsg``, around the place by some metres."""
    dx, dy = corner
    west, south, east, north = PLACE.square.bounds
    around = (west + dx, south - dy, east - dx, north + dy)
    if epsg == earth.ZONE:
        return around
    return rasterio.warp.transform_bounds(f"EPSG:{earth.ZONE}", f"EPSG:{epsg}", *around)


@pytest.mark.parametrize("kind", ["image", "cube"])
@pytest.mark.parametrize("west", [179.9985, -180.0015])
def test_longitudes_beyond_180_are_those_of_the_other_side(tmp_path, kind, west):
    """A file that counts on beyond 180 degrees shows both sides what two files do that end there."""
    size, north, height, width, seam = 2.5e-6, -16.9997, 320, 800, 600
    pixels = np.random.default_rng(0).integers(0, 255, (height // 8, width // 8, 3)).astype(np.uint8)
    pixels = pixels.repeat(8, 0).repeat(8, 1)
    found = []
    for name, left, columns in (
        ("both", west, slice(None)),
        ("a", 179.9985, slice(seam)),
        ("b", -180.0, slice(seam, None)),
    ):
        part = pixels[:, columns]
        ground = Ground("EPSG:4326", (left, north - height * size, left + part.shape[1] * size, north))
        if kind == "image":
            earth.write_tif(tmp_path / name, part, from_origin(left, north, size, size), 4326)
            found.append(_image(tmp_path / name))
        else:
            with h5py.File(tmp_path / name, "w") as file:
                file["rgb"] = np.moveaxis(part, -1, 0)
            found += cubes.read_cube([tmp_path / name], HR, Layout(array="rgb"), name=name, source="x", ground=ground)
    np.testing.assert_allclose(found[0].bounds, (179.9985, north - height * size, -179.9995, north))
    sides = [Place(32760, 819_340, 8_118_000, 2), Place(32701, 180_560, 8_118_000, 2)]
    assert [place.acquisitions for place in seen_by(sides, found)] == [(0, 1), (0, 2)]
    for place, alone in zip(sides, found[1:]):
        both, one = (read_series([look], place.square, HR, min_clear_share=0.1)[0] for look in (found[0], alone))
        assert both.valid.all()
        assert one.images.std() > 50
        assert np.abs(both.images.astype(int) - one.images).max() <= 1


def test_images_on_different_grids_fill_each_other_up(tmp_path):
    how = dict(north=earth.NORTH + 20, height=1600, size=0.5)
    earth.write_aerial(tmp_path / "a.tif", west=earth.WEST - 20.0, width=681, **how)
    earth.write_aerial(tmp_path / "b.tif", west=earth.WEST + 320.13, width=800, **how)  # from 0.37 m before a's edge on
    series = _read([_image(tmp_path / name) for name in ("a.tif", "b.tif")], HR)
    assert series.valid.all()
    error = np.abs(series.images[0].astype(float) - earth.colours(*_ground(HR)))
    assert error.max() < _half_a_pixel(0.5) + 1


def test_collar_that_a_mask_hides_is_invalid(tmp_path):
    transform = from_origin(earth.WEST, earth.NORTH, 0.3125, 0.3125)
    hidden = np.zeros((2048, 2048), bool)
    hidden[:, :700] = True
    pixels = np.where(hidden[..., None], 0, 120).astype(np.uint8).repeat(3, -1)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        earth.write_tif(tmp_path / "a.tif", pixels, transform, earth.ZONE)
        with rasterio.open(tmp_path / "a.tif", "r+") as file:
            file.write_mask(~hidden)
    series = _read([_image(tmp_path / "a.tif")], HR)
    np.testing.assert_array_equal(series.valid[0], ~hidden)


def test_first_of_three_counts_although_the_third_shares_a_grid_with_it():
    grids = ((earth.ZONE, 704_000, False, 1), (32631, None, True, 2), (earth.ZONE, 704_000, True, 3))
    rasters = []
    for epsg, west, valid, value in grids:
        edges = _bounds(epsg, (-200, 200))
        west, north = (west - 200, earth.NORTH + 200) if west else (edges[0], edges[3])
        size = (150, 150)
        pixels = np.full((*size, 1), value, np.uint8)
        crs = rasterio.crs.CRS.from_epsg(epsg)
        rasters.append(Raster(pixels, np.full(size, valid), from_origin(west, north, 10, 10), crs))
    found = mosaic(rasters, PLACE.square, pixels_per_cell=1)
    assert found.valid.all()
    assert (found.pixels == 2).all()


def test_north_is_up(tmp_path):
    x, y = earth.centres(from_origin(earth.WEST, earth.NORTH, 0.3125, 0.3125), 2048, 2048, earth.ZONE)
    south, east = earth.NORTH - y > 320, x - earth.WEST > 320
    pixels = np.stack([200 * south, 200 * east, 100 * (south & east)], -1).astype(np.uint8)
    earth.write_tif(tmp_path / "a.tif", pixels, from_origin(earth.WEST, earth.NORTH, 0.3125, 0.3125), earth.ZONE)
    image = _read([_image(tmp_path / "a.tif")], HR).images[0]
    assert image[1536, 512].tolist() == [200, 0, 0]  # the south-west
    assert image[512, 1536].tolist() == [0, 200, 0]  # the north-east


@pytest.mark.parametrize("epsg", [earth.ZONE, 32631])
@pytest.mark.parametrize(("baseline", "offset"), [("0301", 0), ("0400", 1000), ("0509", 1000)])
def test_bands_of_ten_and_twenty_metres_lie_on_each_other_without_their_offset(tmp_path, epsg, baseline, offset):
    west, _, _, north = _bounds(epsg, (-600, 600))
    corner = dict(west=20 * round(west / 20), north=20 * round(north / 20), side_m=2400) if epsg != earth.ZONE else {}
    folder = earth.write_safe(tmp_path, baseline=baseline, epsg=epsg, **corner)
    product = safe.read_product(folder, name="a", source="s2")
    assert (product.offset, product.rank) == (offset, int(baseline))
    series = _read([product], S2)
    assert series.valid.all()
    assert not series.cloud.any()
    wanted = np.stack([earth.reflectances(*_ground(S2), band) for band in range(10)], -1)
    error = np.abs(series.images[0].astype(float) - wanted)
    a_metre = 300 * 2 * np.pi / 240
    in_20m = [S2.bands.index(band) for band in ("B5", "B6", "B7", "B8A", "B11", "B12")]
    in_10m = [band for band in range(10) if band not in in_20m]
    assert error[..., in_10m].max() < (1 if epsg == earth.ZONE else 1.2 * a_metre)
    assert error[..., in_20m].max() < 2.5 * a_metre  # of 10, half a pixel; straight lines between waves' points
    assert series.days.tolist() == [int(np.datetime64("2022-06-15", "D").astype(int))]


def test_clouds_and_missing_ground_are_told_apart(tmp_path):
    cloudy = lambda x, y: (x - earth.WEST < 200) & (earth.NORTH - y < 640)  # noqa: E731
    missing = lambda x, y: x - earth.WEST > 500  # noqa: E731
    product = safe.read_product(earth.write_safe(tmp_path, scl=cloudy, empty=missing), name="a", source="s2")
    series = _read([product], S2)
    assert series.cloud[0, :, :20].all()
    assert not series.cloud[0, :, 20:].any()
    assert series.valid[0, :, :48].all()
    assert not series.valid[0, :, 50:].any()


def test_date_of_no_use_is_left_out_with_its_reason_and_the_others_stay(tmp_path):
    all_of_it = lambda x, y: x == x  # noqa: E731
    folders = [
        earth.write_safe(tmp_path, day="20220601", scl=all_of_it),
        earth.write_safe(tmp_path, day="20220606"),
        earth.write_safe(tmp_path, day="20220611"),
    ]
    jp2 = next(folders[2].rglob("*_B08_10m.jp2"))
    jp2.write_bytes(jp2.read_bytes()[:2000])
    found = [safe.read_product(folder, name=folder.name, source="s2") for folder in folders]
    series, rejected = read_series(found, PLACE.square, S2, min_clear_share=0.1)
    assert series.days.tolist() == [int(np.datetime64("2022-06-06", "D").astype(int))]
    assert [entry.name[11:19] for entry in rejected] == ["20220601", "20220611"]
    assert "0.0% of its pixels are clear; wanted 10.0% (100.0% have data)" in rejected[0].reason
    assert rejected[1].what == "date"


def test_date_that_is_not_what_its_row_promises_does_not_cost_the_others(tmp_path):
    row, side = dataclasses.replace(HR, typical_range=(60, 200)), CELLS * HR.pixels_per_cell
    for name, number in (("good", 90), ("black", 1)):
        pixels = np.full((side, side, 3), number, np.uint8)
        earth.write_tif(tmp_path / f"{name}.tif", pixels, PLACE.square.transform(32), earth.ZONE)
    of_day = lambda name, day: dataclasses.replace(_image(tmp_path / name, row), day=day)  # noqa: E731
    found = [of_day("good.tif", 18000), of_day("black.tif", 18005)]
    series, rejected = read_series(found, PLACE.square, row, min_clear_share=0.1)
    assert series.days.tolist() == [18000]
    assert [(entry.what, entry.name) for entry in rejected] == [("date", found[1].id)]
    assert "mean 1 over valid pixels; wanted 60 to 200" in rejected[0].reason
    alone, rejected = read_series(found[1:], PLACE.square, row, min_clear_share=0.1)
    assert alone is None
    assert [entry.name for entry in rejected] == [found[1].id]


def test_pixels_beyond_the_range_of_a_row_have_no_data(tmp_path):
    row = dataclasses.replace(
        HR,
        name="pan",
        photometric="none",
        bands=("pan",),
        dtype="uint16",
        value_range=(1, 60000),
        typical_range=(2, 60000),
        mean=HR.mean[:1],
        std=HR.std[:1],
        codec="zstd",
    )
    pixels = np.full((64 * 32, 64 * 32, 1), 700, np.uint16)
    pixels[:32, :64], pixels[40, 50] = 0, 65535
    earth.write_tif(tmp_path / "a.tif", pixels, PLACE.square.transform(32), earth.ZONE)
    series = _read([_image(tmp_path / "a.tif", row)], row)
    np.testing.assert_array_equal(series.valid[0], (pixels == 700)[..., 0])
    earth.write_tif(tmp_path / "b.tif", np.zeros_like(pixels), PLACE.square.transform(32), earth.ZONE)
    nothing, rejected = read_series([_image(tmp_path / "b.tif", row)], PLACE.square, row, min_clear_share=0.1)
    assert nothing is None
    assert "none of its pixels lies between 1 and 60000" in rejected[0].reason


@pytest.mark.parametrize(
    ("error", "away"),
    [
        (OSError(5, "Input/output error", "/data/a.tif"), True),
        (OSError(116, "Stale file handle"), True),
        (OSError(24, "Too many open files"), True),
        (RasterioIOError("/mnt/x.tif: No such file or directory"), True),
        (RasterioIOError("HTTP response code: 503"), True),
        (RasterioIOError("'/data/http_archive/a.tif' not recognized as being in a supported file format"), False),
        (RasterioIOError("/data/connection/a.tif: not recognized"), False),
        (RasterioIOError("http://x/a.tif: not recognized"), False),
    ],
)
def test_what_may_come_back_is_told_from_what_is_damaged(error, away):
    assert remote.reason(error).startswith(remote.UNREACHABLE) == away


def test_two_products_of_a_day_are_one_date_and_the_later_baseline_counts(tmp_path):
    half = lambda x, y: x - earth.WEST > 320  # noqa: E731
    east = earth.write_safe(tmp_path / "a", baseline="0509", empty=lambda x, y: ~half(x, y))
    old = earth.write_safe(tmp_path / "b", baseline="0301")
    found = [safe.read_product(folder, name=str(i), source="s2") for i, folder in enumerate((old, east))]
    series = _read(found, S2)
    assert len(series.days) == 1
    assert series.valid.all()
    wanted = np.stack([earth.reflectances(*_ground(S2), band) for band in range(10)], -1)
    assert np.abs(series.images[0].astype(float) - wanted).max() < 4 * 300 * 2 * np.pi / 240  # of 10, half a pixel


@pytest.mark.parametrize(("unit", "size"), [("linear", 10), ("dB", 10), ("linear", 20)])
def test_backscatter_is_the_decibels_of_mean_power(tmp_path, unit, size):
    earth.write_radar(tmp_path / "a.tif", unit=unit, size=size)
    found = geotiffs.read_radar(dict.fromkeys(("VV", "VH"), tmp_path / "a.tif"), name="a", source="s1")
    assert (found.unit, found.orbit) == (unit, "ascending")
    series = _read([found], S1)
    wanted = 10 * np.log10(np.stack([earth.power(*_ground(S1), band) for band in (0, 1)], -1))
    assert np.abs(series.images[0].astype(float) - wanted).max() < (0.01 if size == 10 else 0.15)  # half a pixel: 1
    assert series.native_gsd_m == pytest.approx(size)


def test_linear_power_in_a_list_that_says_decibels_names_the_field(tmp_path):
    earth.write_radar(tmp_path / "a.tif")
    found = geotiffs.read_radar(dict.fromkeys(("VV", "VH"), tmp_path / "a.tif"), name="a", source="radar", unit="dB")
    series, rejected = read_series([found], PLACE.square, S1, min_clear_share=0.1)
    assert series is None
    assert "band VV: mean 0.10" in rejected[0].reason
    assert """taken for dB (wanted unit = "linear" for source 'radar' in the list)""" in rejected[0].reason
    assert "10 log10)" not in rejected[0].reason


def test_band_that_no_file_has_is_never_filled_in(tmp_path):
    folder = earth.write_safe(tmp_path)
    product = safe.read_product(folder, name="a", source="s2")
    next(folder.rglob("*_B11_20m.jp2")).unlink()
    series, rejected = read_series([product], PLACE.square, S2, min_clear_share=0.1)
    assert series is None
    assert "B11_20m.jp2" in rejected[0].reason


def test_file_that_does_not_reach_the_place_says_so(tmp_path):
    earth.write_aerial(tmp_path / "a.tif", west=earth.WEST + 5000, north=earth.NORTH, width=64, height=64, size=0.3125)
    series, rejected = read_series([_image(tmp_path / "a.tif")], PLACE.square, HR, min_clear_share=0.1)
    assert series is None
    assert rejected[0].reason == "no file reaches this place"


def test_server_that_does_not_answer_is_asked_again(tmp_path, monkeypatch):
    earth.write_radar(tmp_path / "a.tif")
    found = geotiffs.read_radar(dict.fromkeys(("VV", "VH"), tmp_path / "a.tif"), name="a", source="s1")
    asked, waited, read = [], [], lib.read_window

    def failing(*args, **kwargs):
        asked.append(1)
        if len(asked) < 3:
            raise RasterioIOError("HTTP response code: 503")
        return read(*args, **kwargs)

    monkeypatch.setattr(lib, "read_window", failing)
    monkeypatch.setattr(lib.remote.time, "sleep", waited.append)
    assert _read([found], S1).valid.all()
    assert waited == [0.5, 2]
    monkeypatch.setattr(lib, "read_window", lambda *a, **k: (_ for _ in ()).throw(RasterioIOError("HTTP 503")))
    series, rejected = read_series([found], PLACE.square, S1, min_clear_share=0.1)
    assert series is None
    assert rejected == [lib.Rejected("date", "a", "unreachable: HTTP 503")]


def test_acquisition_survives_its_table(tmp_path):
    product = safe.read_product(earth.write_safe(tmp_path), name="a", source="s2")
    other = Acquisition("b", "x", "hr", (179.5, -1.0, -179.5, 1.0), {"R": acquisitions.Layer("r.tif", 2)})
    acquisitions.write([product, other], tmp_path / "t.parquet")
    assert acquisitions.read(tmp_path / "t.parquet") == [product, other]
