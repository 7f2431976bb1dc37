"""Cubes in NetCDF and HDF5: pixels where GDAL and the made-up Earth say, dates by their names, else a reason."""

import dataclasses
import pickle

import h5py
import numpy as np
import pytest
import rasterio
import rasterio.warp

from skysense_jax.ingest import cubes, planes, sources
from skysense_jax.ingest.acquisitions import Acquisition, Rejected, read, write
from skysense_jax.ingest.cubes import Layout
from skysense_jax.ingest.grids import Ground
from skysense_jax.ingest.names import cube_files
from skysense_jax.ingest.places import Place
from skysense_jax.ingest.rasters import Refused
from skysense_jax.ingest.series import read_series
from skysense_jax.modalities import MODALITIES, Modality
from tests.ingest import earth

CELLS = 24
SQUARE = Place(earth.ZONE, earth.WEST, earth.NORTH, CELLS).square
HR, S2, S1 = (MODALITIES[name] for name in ("hr", "s2", "s1"))
NAMES = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
DAY = 86_400
FIRST = int(np.datetime64("2018-03-01", "D").astype(int))


def _bands(names=NAMES, *, add=0, dtype="u2", scale=1.0, **attributes):
    """Reflectances of the made-up Earth, date by date 10 brighter; ``add`` in the numbers, then times ``scale``."""

    def numbers(band):
        return lambda x, y, date: (earth.reflectances(x, y, band) + 10 * date + add) * scale

    return {name: (numbers(NAMES.index(name)), dtype, {"_FillValue": 0, **attributes}) for name in names}


def _scl(x, y, date):
    return np.where((date == 1) & (x - earth.WEST < 120), 9, 4)  # a cloud in the west


def _cube(paths, row=S2, ground=None, **layout):
    paths = [paths] if not isinstance(paths, list) else paths
    found = cubes.read_cube(paths, row, Layout(**layout), name="a", source="x", ground=ground)
    return [entry for entry in found if isinstance(entry, Acquisition)], [e for e in found if isinstance(e, Rejected)]


def _series(found, row=S2):
    series, rejected = read_series(found, SQUARE, row, min_clear_share=0.1)
    assert not rejected, rejected
    return series


def _wanted(row=S2):
    return earth.centres(SQUARE.transform(row.pixels_per_cell), CELLS, CELLS, earth.ZONE)


@pytest.mark.parametrize(
    "how",
    [
        {},
        dict(southward=False),
        dict(how="attribute", rows="northing", columns="easting"),
        dict(file_format="NETCDF3_CLASSIC"),
        dict(epsg=32631),
        dict(epsg=4326, how="", rows="latitude", columns="longitude"),
    ],
)
def test_variables_of_a_cube_lie_where_gdal_says(tmp_path, how):
    path, classic = tmp_path / "a.nc", how.get("file_format") == "NETCDF3_CLASSIC"
    where = dict(how)
    epsg = where.get("epsg", earth.ZONE)
    if epsg != earth.ZONE:
        around = (earth.WEST - 60, earth.NORTH - 300, earth.WEST + 300, earth.NORTH + 60)
        west, south, east, north = rasterio.warp.transform_bounds(f"EPSG:{earth.ZONE}", f"EPSG:{epsg}", *around)
        size = 1e-4 if epsg == 4326 else 10.0
        where |= dict(west=west, north=north, size=size, side_m=max(east - west, north - south))
    earth.write_cube(path, _bands(dtype="i2" if classic else "u2"), [0, 5 * DAY], **where)
    found, rejected = _cube(path, offset=0)
    assert not rejected
    assert [entry.id for entry in found] == ["a 2018-03-01T10:00:00", "a 2018-03-06T10:00:00"]
    window = planes.read_window([found[1].layers["B3"]], SQUARE, masked=True)
    assert max(window.valid.shape) <= 1.5 * CELLS + 8  # no more is read
    if how.get("how") != "attribute":  # which GDAL does not know
        with rasterio.open(f"netcdf:{path}:B03") as file:
            degrees = rasterio.warp.transform_bounds(file.crs or "EPSG:4326", "EPSG:4326", *file.bounds)
            np.testing.assert_allclose(found[0].bounds, degrees, atol=1e-7)
            for row, column in ((5, 7), (11, 3)):
                place = window.transform @ (column + 0.5, row + 0.5)
                assert next(file.sample([place], indexes=2))[0] == window.pixels[row, column, 0]
    series = _series(found)
    assert series.valid.all()
    assert series.days.tolist() == [FIRST, FIRST + 5]
    wanted = np.stack([earth.reflectances(*_wanted(), band) for band in range(10)], -1)
    slope = 300 * 2 * np.pi / 240  # of a metre
    for date in (0, 1):
        error = np.abs(series.images[date].astype(float) - wanted - 10 * date)
        assert error.max() < (1 if epsg == earth.ZONE else 1.5 * slope), error.max()


def test_sizes_in_their_own_files_are_one_date_and_clouds_are_those_of_the_classification(tmp_path):
    times = [0, 5 * DAY, 10 * DAY]
    ten = [name for name in NAMES if name in ("B02", "B03", "B04", "B08")]
    twenty = [name for name in NAMES if name not in ten]
    paths = [tmp_path / f"p_S2_{size}m_1.nc" for size in (10, 20)]
    earth.write_cube(paths[0], _bands(ten), times[:2])
    coarse = {**_bands(twenty), "SCL": (_scl, "u1", {"_FillValue": 0})}
    earth.write_cube(paths[1], coarse, times[1:], size=20.0)
    assert cube_files([*paths, tmp_path / "q_S2_10m_1.nc"]) == [tuple(paths), (tmp_path / "q_S2_10m_1.nc",)]
    found, rejected = _cube(paths, offset=0)
    assert [entry.id for entry in found] == ["a 2018-03-06T10:00:00"]
    assert {(entry.name, entry.reason) for entry in rejected} == {
        ("a 2018-03-01T10:00:00", "no such date in p_S2_20m_1.nc"),
        ("a 2018-03-11T10:00:00", "no such date in p_S2_10m_1.nc"),
    }
    earth.write_cube(paths[0], _bands(ten), times)
    earth.write_cube(paths[1], coarse, times, size=20.0)
    for dates in ("../2018-03-06", "2018-03-06T12:00:00Z", "2018-03-02/2018-03-10"):
        found, rejected = _cube(paths, offset=0, dates=dates)
        first = [FIRST] if dates.startswith("..") else []
        assert ([entry.day for entry in found], rejected) == ([*first, FIRST + 5], [])
    series = _series(found)
    assert series.cloud[0, :, :12].all()
    assert not series.cloud[0, :, 12:].any()
    wanted = np.stack([earth.reflectances(*_wanted(), band) for band in range(10)], -1) + 10
    error = np.abs(series.images[0].astype(float) - wanted)
    in_20m = [NAMES.index(name) for name in twenty]
    assert np.delete(error, in_20m, axis=-1).max() < 1
    assert error[..., in_20m].max() < 2.5 * 300 * 2 * np.pi / 240  # of 10, half a pixel
    write(found, tmp_path / "t.parquet")
    assert read(tmp_path / "t.parquet") == found


@pytest.mark.parametrize(
    ("bands", "layout", "offset"),
    [
        (_bands(add=1000), dict(offset=1000), 1000),
        (_bands(add=1000, scale_factor=1e-4, add_offset=-0.1), {}, 1000),
        (_bands(add=1000, scale_factor=np.float32(1e-4), add_offset=-0.1), dict(offset=1000), 1000),
        (_bands(scale_factor=1e-4, add_offset=0.0), {}, 0),
        (_bands(dtype="f4", scale=1e-4), dict(offset=0, scale=1e4), 0),
        (_bands(add=1000, dtype="f4", scale=1e-4), dict(offset=1000, scale=1e4), 1000),
    ],
)
def test_offset_and_scale_are_those_that_file_or_list_tell(tmp_path, bands, layout, offset):
    earth.write_cube(tmp_path / "a.nc", bands, [0])
    found, _ = _cube(tmp_path / "a.nc", **layout)
    assert found[0].offset == offset
    wanted = np.stack([earth.reflectances(*_wanted(), band) for band in range(10)], -1)
    assert np.abs(_series(found).images[0] - wanted).max() < 1


def _radar(path, *, dtype="f4", numbers=lambda power: power, **attributes):
    bands = {
        name: (lambda x, y, date, band=band: numbers(earth.power(x, y, band)), dtype, attributes)
        for band, name in enumerate(("VV", "VH"))
    }
    earth.write_cube(path, bands, [0, DAY // 2, DAY], size=20.0)


@pytest.mark.parametrize(
    ("how", "unit"),
    [
        ({}, "linear"),
        (dict(numbers=lambda power: 10 * np.log10(power)), "dB"),
        (
            dict(dtype="i4", numbers=lambda power: 1e5 * np.log10(power), scale_factor=1e-4, _FillValue=0),
            "dB",
        ),
        (
            dict(dtype="i2", numbers=lambda power: 1000 * np.log10(power) + 2000, scale_factor=0.01, add_offset=-20.0),
            "dB",
        ),
    ],
)
def test_backscatter_of_a_cube_is_decibels_whatever_it_is_packed_in(tmp_path, how, unit):
    path = tmp_path / "S1_DESCENDING.nc"
    _radar(path, **how)
    found, _ = _cube(path, S1)
    assert {(entry.unit, entry.orbit) for entry in found} == {(unit, "descending")}
    assert [entry.day - FIRST for entry in found] == [0, 0, 1]
    series = _series(found, S1)
    assert series.days.tolist() == [FIRST, FIRST + 1]  # two passes of a day are one date
    wanted = 10 * np.log10(np.stack([earth.power(*_wanted(S1), band) for band in (0, 1)], -1))
    assert np.abs(series.images[0].astype(float) - wanted).max() < 0.2  # half a pixel of 20 m: 1


def test_unit_of_a_cube_that_cannot_be_told_is_refused_with_its_numbers(tmp_path):
    _radar(tmp_path / "a.nc", numbers=lambda power: 2000 * power)
    with pytest.raises(Refused, match="the unit cannot be told: half of the pixels lie below"):
        _cube(tmp_path / "a.nc", S1)
    assert _cube(tmp_path / "a.nc", S1, unit="linear")[0][0].unit == "linear"


PRODUCTS = [
    "S2A_MSIL2A_20200102T102421_N0213_R065_T32UNC_20200102T115419",
    "S2B_MSIL2A_20200107T102319_N0400_R065_T32UNC_20230607T130248",
]


class _Bomb:
    """What a careless reader of pickles would run."""

    def __reduce__(self):
        return print, ("a pickle was run",)


def _stack(path, *, products=PRODUCTS, group="", bands=10, bytes_=True):
    """HDF5 as TreeSatAI has it: [date, band, row, column], probabilities, names of products, and no place."""
    x, y = _wanted()
    dn = np.stack([np.stack([earth.reflectances(x, y, band) for band in range(10)])] * 2)
    dn[1] += 1000
    masks = np.zeros((2, 3, CELLS, CELLS), np.float32)
    masks[0, 2, :5] = 60
    masks[1, 1, :, :7] = 30
    masks[1, 0] = 99  # not one of those that are asked for
    with h5py.File(path, "w") as file:
        file.attrs["pickle"] = repr(pickle.dumps(_Bomb()))
        where = file.require_group(group) if group else file
        where["data"], where["masks"] = dn[:, :bands].astype(np.float32), masks
        where["products"] = [name.encode() if bytes_ else name for name in products]
    return path


GROUND = Ground(f"EPSG:{earth.ZONE}", SQUARE.bounds)
STACK = dict(array="data", products="products", clouds="masks", cloud_bands=[2, 3])


@pytest.mark.parametrize("how", [{}, dict(group="deep/down"), dict(bytes_=False)])
def test_stack_is_dated_and_freed_of_its_offset_by_its_products(tmp_path, how, capsys):
    path = _stack(tmp_path / "a.h5", **how)
    found, _ = _cube(path, ground=GROUND, group=how.get("group", ""), **STACK)
    assert [entry.id for entry in found] == [f"a {name}" for name in PRODUCTS]
    assert [(entry.offset, entry.rank) for entry in found] == [(0, 213), (1000, 400)]
    series = _series(found)
    assert series.days.tolist() == [int(np.datetime64(day, "D").astype(int)) for day in ("2020-01-02", "2020-01-07")]
    wanted = np.stack([earth.reflectances(*_wanted(), band) for band in range(10)], -1)
    assert np.abs(series.images - wanted).max() < 1
    cloud = np.zeros((2, CELLS, CELLS), bool)
    cloud[0, :5], cloud[1, :, :7] = True, True
    np.testing.assert_array_equal(series.cloud, cloud)
    assert "a pickle was run" not in capsys.readouterr().out


def test_stack_without_dates_has_bands_of_any_order_and_the_day_that_is_said(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["rgb"] = np.stack([np.full((160, 160), value, np.uint8) for value in (30, 10, 20)])
    place = Place(earth.ZONE, earth.WEST, earth.NORTH, 5).square
    ground = Ground(f"EPSG:{earth.ZONE}", place.bounds)
    found, _ = _cube(tmp_path / "a.h5", HR, ground, array="rgb", bands=[2, 3, 1], day="2021-07-03")
    series, _ = read_series(found, place, HR, min_clear_share=0.1)
    assert series.images.shape == (1, 160, 160, 3)
    assert np.unique(series.images.reshape(-1, 3), axis=0).tolist() == [[10, 20, 30]]
    assert series.days.tolist() == [int(np.datetime64("2021-07-03", "D").astype(int))]
    with pytest.raises(Refused, match="numbers of type uint8; wanted uint16"):
        _cube(tmp_path / "a.h5", dataclasses.replace(HR, dtype="uint16", photometric="none"), ground, array="rgb")


def _marked(path, stored, attributes, *, dtype):
    """Validity and numbers of a cube of one band that has 7 in the west and, in the east, the number ``stored``."""
    numbers = lambda x, y, date: np.where(x - earth.WEST < 120, 7, stored)  # noqa: E731
    earth.write_cube(path, {"B": (numbers, dtype, attributes)}, [0], file_format="NETCDF3_CLASSIC")
    kind = "u1" if dtype == "i1" else "f4"
    row = Modality(
        **dict(name="one", bands=("B",), dtype=str(np.dtype(kind)), unit="number", codec="zstd"),
        **dict(value_range=(0, 255), typical_range=(0, 255), wrong_unit_hint="", pixels_per_cell=1, patch=1),
        **dict(mean=(1.0,), std=(1.0,), statistics_source="none"),
    )
    series = _series(_cube(path, row)[0], row)
    return series.valid[0], series.images[0, ..., 0]


@pytest.mark.parametrize(
    ("attributes", "east"),
    [({}, None), ({"_FillValue": np.int8(-56)}, False), ({"missing_value": np.int16(200)}, False), (None, "refused")],
)
def test_bytes_without_a_sign_are_bright_in_a_format_that_has_none(tmp_path, attributes, east):
    """NetCDF-3 stores 200 as -56 and says _Unsigned; where it does not say so half of the numbers would be lost."""
    if attributes is None:
        with pytest.raises(Refused, match="numbers of type int8; wanted uint8"):
            _marked(tmp_path / "a.nc", -56, {}, dtype="i1")
        return
    valid, numbers = _marked(tmp_path / "a.nc", -56, {"_Unsigned": "true", **attributes}, dtype="i1")
    assert valid[:, :12].all()
    assert (numbers[:, :12] == 7).all()
    assert valid[:, 12:].all() == (east is None)
    assert (numbers[valid] == 200).any() == (east is None)


@pytest.mark.parametrize(
    ("stored", "dtype", "attributes"),
    [
        (1e20, "f4", {"missing_value": 1e20}),
        (-9999.9, "f4", {"missing_value": -9999.9}),
        (-9999.9, "f4", {"_FillValue": np.float32(-1), "missing_value": "-9999.9"}),
        (-9999.9, "f4", {"_FillValue": np.float32(-9999.9), "missing_value": "nan"}),
        (200, "i2", {"missing_value": np.array([3.0, 200.0])}),
    ],
)
def test_fill_value_of_another_type_is_found(tmp_path, stored, dtype, attributes):
    valid, _ = _marked(tmp_path / "a.nc", stored, attributes, dtype=dtype)
    assert valid[:, :12].all()
    assert not valid[:, 12:].any()


@pytest.mark.parametrize("fill", ["none", -0.9999, 70_000])
def test_fill_value_that_is_no_number_of_the_type_is_refused(tmp_path, fill):
    earth.write_cube(tmp_path / "a.nc", _bands(dtype="i2", missing_value=fill), [0])
    with pytest.raises(Refused, match=rf"a\.nc: B02: missing_value = {fill}; wanted a number of type int16"):
        _cube(tmp_path / "a.nc", offset=0)


@pytest.mark.parametrize(
    ("how", "layout", "told"),
    [
        (dict(how=""), dict(offset=0), "a.nc: no coordinate system"),
        (dict(rows="x", columns="y"), dict(offset=0), r"has the axes \('t', 'x', 'y'\); wanted y and x last"),
        (dict(west=5_300_000, north=900_000), dict(offset=0), "no place of a UTM zone"),
        (dict(size=50.0), dict(offset=0), "pixels of 50 m; wanted at most 20 m for s2"),
        ({}, {}, "offset is not known; wanted offset = 0, or 1000"),
        ({}, dict(offset=0, classes="QA"), "classes = 'QA': no file has this variable"),
        ({}, dict(offset=0, variables=["B02"]), r"variables = \['B02'\]; wanted 10, for B2 B3"),
        ({}, dict(offset=0, array="cube"), "no variable 'cube'; there are .*B02, B03"),
        ({}, dict(offset=0, array="B02"), "B02 has 1 bands; wanted 2 or more"),
        ({}, dict(offset=0, products="B02"), "products = 'B02'; wanted a variable with the name of a product"),
        ({}, dict(offset=0, day="2020-01-01"), "day = '2020-01-01' for files that have an axis of time"),
    ],
)
def test_cube_that_does_not_say_what_must_be_known_is_refused(tmp_path, how, layout, told):
    earth.write_cube(tmp_path / "a.nc", _bands(), [0], **how)
    with pytest.raises(Refused, match=told):
        _cube(tmp_path / "a.nc", **layout)


def test_cube_with_longitude_for_latitude_is_refused(tmp_path):
    where = dict(west=11.82, north=49.66, size=1e-4, side_m=0.003, epsg=4326, rows="latitude", columns="longitude")
    earth.write_cube(tmp_path / "a.nc", _bands(), [0], **where)
    with earth.netCDF4.Dataset(tmp_path / "a.nc", "a") as file:
        file["latitude"][:] += 60
    with pytest.raises(Refused, match=r"latitudes 109\.657 to 109\.66; wanted .* \(swapped, or metres"):
        _cube(tmp_path / "a.nc", offset=0)


def test_cube_that_contradicts_itself_is_refused(tmp_path):
    path, other = tmp_path / "a.nc", tmp_path / "b.nc"
    earth.write_cube(path, _bands(NAMES[:9]), [0])
    with pytest.raises(Refused, match=r"no variable for B12; wanted B12 or swir22 \(say: variables = \.\.\.\)"):
        _cube(path, offset=0)
    earth.write_cube(other, _bands(NAMES[8:]), [0])
    with pytest.raises(Refused, match=r"b\.nc has B11, and so has a file before it"):
        _cube([path, other], offset=0)
    earth.write_cube(path, _bands(scale_factor=1e-4, add_offset=-0.1), [0])
    with pytest.raises(Refused, match="offsets 0 and 1000 at once"):
        _cube(path, offset=0)
    earth.write_cube(path, _bands(scale_factor=1e-4, add_offset=-0.2), [0])
    with pytest.raises(Refused, match=r"add_offset of \[-0\.2\]; wanted 0 or -0\.1 in every band"):
        _cube(path)
    with earth.netCDF4.Dataset(path, "a") as file:
        file["x"][3] += 4
    with pytest.raises(Refused, match="coordinate x is not evenly spaced: off by 4 of steps of 10"):
        _cube(path, offset=0)
    earth.write_cube(path, _bands(), [0])
    with earth.netCDF4.Dataset(path, "a") as file:
        file["t"].units = "years of light"
    with pytest.raises(Refused, match="axis t has no dates; wanted a coordinate of times, or products"):
        _cube(path, offset=0)


def test_stack_without_a_place_or_with_other_products_is_refused(tmp_path):
    with pytest.raises(Refused, match=r"a\.h5: no coordinate system: .* \(no coordinates of data\)"):
        _cube(_stack(tmp_path / "a.h5"), **STACK)
    with pytest.raises(Refused, match="data has 9 bands; wanted 10 or more"):
        _cube(_stack(tmp_path / "a.h5", bands=9), ground=GROUND, **STACK)
    with pytest.raises(Refused, match="products = 'products'; wanted a variable with the name of a product for each"):
        _cube(_stack(tmp_path / "a.h5", products=PRODUCTS[:1]), ground=GROUND, **STACK)
    with pytest.raises(Refused, match="product name 'monday' holds no acquisition time"):
        _cube(_stack(tmp_path / "a.h5", products=["monday", PRODUCTS[0]]), ground=GROUND, **STACK)
    with pytest.raises(Refused, match="clouds = 'mask': no file has this variable"):
        _cube(_stack(tmp_path / "a.h5"), ground=GROUND, **{**STACK, "clouds": "mask"})
    with pytest.raises(Refused, match="wanted west below east and south below north"):
        _cube(_stack(tmp_path / "a.h5"), ground=Ground(GROUND.crs, GROUND.bounds[::-1]), **STACK)
    with pytest.raises(Refused, match=r"coordinate system 'EPSG:1': .*wanted one such as EPSG:32632"):
        _cube(_stack(tmp_path / "a.h5"), ground=Ground("EPSG:1", GROUND.bounds), **STACK)


def test_file_that_is_damaged_is_named(tmp_path):
    path = tmp_path / "a.nc"
    path.write_bytes(b"CDF" + bytes(500))
    with pytest.raises(Refused, match=r"a\.nc: no NetCDF or HDF5 file that can be read"):
        _cube(path, offset=0)
    dn = np.random.default_rng(0).integers(500, 3000, (2, 10, CELLS, CELLS)).astype(np.float32)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        options = dict(chunks=(1, 1, CELLS, CELLS), compression="gzip", fletcher32=True)
        data = file.create_dataset("data", data=dn, **options)
        place = data.id.get_chunk_info_by_coord((1, 4, 0, 0)).byte_offset
        file["products"] = [name.encode() for name in PRODUCTS]
    found, _ = _cube(tmp_path / "a.h5", ground=GROUND, array="data", products="products")
    with (tmp_path / "a.h5").open("r+b") as file:
        file.seek(place + 50)
        file.write(bytes(60))
    series, rejected = read_series(found, SQUARE, S2, min_clear_share=0.1)
    assert len(rejected) == 1
    assert PRODUCTS[1] in rejected[0].name
    assert f"{tmp_path / 'a.h5'}: data[1, 4]: " in rejected[0].reason
    assert series is None or len(series.days) == 1
    (tmp_path / "a.h5").unlink()
    _, rejected = read_series(found, SQUARE, S2, min_clear_share=0.1)
    assert [entry.reason.startswith("unreachable: ") for entry in rejected] == [True, True]


@pytest.mark.parametrize(
    ("field", "told"),
    [
        ('dates = "yesterday"', "'yesterday' is no year, month, day or time"),
        ('dates = "2022/2021"', "ends before it begins"),
        ('variables = ["a"]\narray = "b"', "variables and array; wanted one of them"),
        ("cloud_bands = [0]", r"cloud_bands = \[0\]; wanted numbers from 1"),
        ('unit = "dB"', "unit with modality = 's2'; it is a field of 's1'"),
    ],
)
def test_field_of_a_cube_that_cannot_be_is_refused_by_the_list(tmp_path, field, told):
    (tmp_path / "a.nc").touch()
    path = tmp_path / "list.toml"
    entry = 'name = "c"\nkind = "cube"\nmodality = "s2"\nfiles = "a.nc"\nlicence = "x"'
    path.write_text(f"[[source]]\n{entry}\n{field}\n")
    with pytest.raises(ValueError, match=rf"--sources: .*list.toml, source 'c': .*{told}"):
        sources.read_list(path)
