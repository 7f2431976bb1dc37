"""What sources hold, and every way in which a file of theirs comes to nothing, with its reason."""

import re

import numpy as np
import pytest
import shapely
from rasterio.transform import from_origin

from skysense_jax.ingest import geotiffs, ground, names, plan, safe, sources
from skysense_jax.ingest.rasters import Refused
from skysense_jax.modalities import MODALITIES
from tests.ingest import earth

HR = MODALITIES["hr"]
GREY = np.full((40, 40, 3), 99, np.uint8)


def _image(path, row=HR, **options):
    return geotiffs.read_image(path, row, name="a", source="x", **options)


@pytest.mark.parametrize(
    ("pixels", "transform", "epsg", "told"),
    [
        (GREY, from_origin(0, 40, 1, 1), None, "no coordinate system"),
        (GREY[..., :2], from_origin(700_000, 5_500_000, 0.3, 0.3), earth.ZONE, "2 bands; wanted 3 or more, for R G B"),
        (GREY.astype(np.uint16), from_origin(700_000, 5_500_000, 0.3, 0.3), earth.ZONE, "type uint16; wanted uint8"),
        (GREY.astype(np.int8), from_origin(700_000, 5_500_000, 0.3, 0.3), earth.ZONE, "type int8; wanted uint8"),
        (GREY, from_origin(700_000, 5_500_000, 0.8, 0.8), earth.ZONE, "pixels of 0.8 m; wanted at most 0.625 m for hr"),
        (GREY, from_origin(48.1, 111.5, 3e-6, 3e-6), 4326, r"latitudes 111.5 to 111.5; wanted .* \(swapped, or metres"),
        (GREY, from_origin(700_000, 5_500_000, 0.3, 0.3), 4326, "longitudes 700000 to 700012"),
        (GREY, from_origin(11.5, 48.1, 0.3, 0.3), 4326, "pixels of"),
        (GREY, from_origin(5_300_000, 900_000, 0.3, 0.3), earth.ZONE, "no place of a UTM zone"),
    ],
)
def test_image_that_is_no_row_of_the_table_is_refused(tmp_path, pixels, transform, epsg, told):
    earth.write_tif(tmp_path / "a.tif", pixels, transform, epsg)
    with pytest.raises(Refused, match=told):
        _image(tmp_path / "a.tif")


def test_day_is_that_of_tag_or_name(tmp_path):
    path = tmp_path / "flight_20210703_a.tif"
    where = dict(west=700_000, north=5_500_000, width=9, height=9, size=0.3)
    earth.write_aerial(path, **where)
    day = int(np.datetime64("2021-07-03", "D").astype(int))
    assert _image(path).day < 0
    assert _image(path, day_pattern=r"_(\d{4})(\d\d)(\d\d)_").day == day
    with pytest.raises(Refused, match="finds no year, month and day"):
        _image(path, day_pattern=r"-(\d{4})(\d\d)(\d\d)")
    earth.write_aerial(path, **where, day="2021:07:03 11:00:00")
    assert _image(path).day == day
    earth.write_aerial(path, **where, day="2021:17:03 11:00:00")
    with pytest.raises(Refused, match="date '2021-17-03'"):
        _image(path)


@pytest.mark.parametrize(
    ("field", "told"),
    [
        ("day_pattern = '_(\\d{4}'", r"day_pattern = '_\(\\\\d\{4\}': missing \)"),
        ("day_pattern = '_(\\d{4})_'", r"has 1 groups \( \); wanted three: year, month, day"),
    ],
)
def test_day_pattern_that_cannot_find_a_day_is_refused_by_the_list(tmp_path, field, told):
    (tmp_path / "a.tif").touch()
    entry = 'name = "a"\nkind = "image"\nmodality = "hr"\nfiles = "a.tif"\nlicence = "x"'
    (tmp_path / "list.toml").write_text(f"[[source]]\n{entry}\n{field}\n")
    with pytest.raises(ValueError, match=rf"--sources: .*list.toml, source 'a': .*{told}"):
        sources.read_list(tmp_path / "list.toml")


def test_bands_are_those_that_the_list_names(tmp_path):
    earth.write_tif(tmp_path / "a.tif", np.dstack([GREY, GREY]), from_origin(700_000, 5_500_000, 0.3, 0.3), earth.ZONE)
    found = _image(tmp_path / "a.tif", bands=[4, 2, 1])
    assert [layer.band for layer in found.layers.values()] == [4, 2, 1]
    with pytest.raises(Refused, match=r"bands = \[1, 2\] of source 'x'; wanted 3"):
        _image(tmp_path / "a.tif", bands=[1, 2])


@pytest.mark.parametrize("tag", ["20220615", "2022", "1066:10:14 10:00:00"])
def test_date_that_is_none_is_refused(tmp_path, tag):
    where = dict(west=700_000, north=5_500_000, width=9, height=9, size=0.3)
    earth.write_aerial(tmp_path / "a.tif", **where, day=tag)
    with pytest.raises(Refused, match="wanted year-month-day, from 1970"):
        _image(tmp_path / "a.tif")


# ---- Sentinel-1


def _radar(paths, **options):
    return geotiffs.read_radar(paths, name="a", source="x", **options)


def test_files_of_one_acquisition_belong_together(tmp_path):
    files = ("s1a_VV_1.tif", "s1a_VH_1.tif", "s1b-vv.tif", "s1b-vh.tif", "both.tif", "s1c_VV.tif")
    found = names.radar_files([tmp_path / name for name in files])
    assert sorted(sorted(path.name for path in group.values()) for group in found) == [
        ["both.tif", "both.tif"],
        ["s1a_VH_1.tif", "s1a_VV_1.tif"],
        ["s1b-vh.tif", "s1b-vv.tif"],
        ["s1c_VV.tif"],
    ]
    with pytest.raises(Refused, match="polarisations VV; missing: VH"):
        _radar(next(group for group in found if len(group) == 1))


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        (np.linspace(0.001, 0.9, 800), "linear"),
        (np.linspace(-30, 3, 800), "dB"),
        (np.linspace(20, 900, 800), None),  # digital numbers of amplitudes
        (np.linspace(0, 1, 800) - 0.5, None),
        (np.linspace(-400, 20, 800), None),
    ],
)
def test_unit_of_backscatter_is_told_by_range_or_refused(tmp_path, numbers, told):
    pixels = numbers.reshape(20, 20, 2).astype(np.float32)
    earth.write_tif(tmp_path / "a.tif", pixels, from_origin(700_000, 5_500_000, 10, 10), earth.ZONE)
    both = dict.fromkeys(("VV", "VH"), tmp_path / "a.tif")
    if told is None:
        with pytest.raises(Refused, match="the unit cannot be told: half of the pixels lie below"):
            _radar(both)
        assert _radar(both, unit="linear").unit == "linear"  # who says it knows it
    else:
        assert _radar(both).unit == told


def test_orbit_is_that_of_list_tag_or_name(tmp_path):
    for name, tag, given, wanted in (
        ("a.tif", "descending", "unknown", "descending"),
        ("S1_ASCENDING.tif", "", "unknown", "ascending"),
        ("a.tif", "", "unknown", "unknown"),
        ("a.tif", "descending", "ascending", "ascending"),
    ):
        earth.write_radar(tmp_path / name, orbit=tag)
        assert _radar(dict.fromkeys(("VV", "VH"), tmp_path / name), orbit=given).orbit == wanted


# ---- Sentinel-2


@pytest.mark.parametrize(
    ("how", "told"),
    [
        (dict(drop=("B07",)), r"B07_20m\.jp2 is missing: band B07 at 20m"),
        (dict(drop=("SCL",)), r"SCL_20m\.jp2 is missing"),
        (dict(baseline="0400", offsets=[]), "processing baseline 04.00 without BOA_ADD_OFFSET"),
        (dict(baseline="0400", offsets=[0] * 13), r"baseline 04.00 with offsets \[.*0.0\]; wanted -1000 in every band"),
        (
            dict(baseline="0301", offsets=[-1000] * 13),
            r"baseline 03.01 with offsets \[-1000.0\]; wanted 0 in every",
        ),
        (dict(baseline="0510", offsets=[-1000] * 9), "with offsets"),  # of some bands only
    ],
)
def test_product_that_contradicts_itself_or_lacks_a_band_is_refused(tmp_path, how, told):
    with pytest.raises(Refused, match=told):
        safe.read_product(earth.write_safe(tmp_path, side_m=200, **how), name="a", source="x")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("Level-2A</PROCESSING_LEVEL>", "Level-1C</PROCESSING_LEVEL>", "Level-1C; wanted Level-2A"),
        ("<PROCESSING_BASELINE>04.00", "<PROCESSING_BASELINE>", "has no PROCESSING_BASELINE"),
        (">10000<", ">65535<", "BOA_QUANTIFICATION_VALUE 65535; wanted 10000"),
        ("IMG_DATA/R10m/T32UQV", "../../../R10m/T32UQV", "is missing"),
        ("</n1:Level-2A_User_Product>", "", "MTD_MSIL2A.xml: no element found"),
    ],
)
def test_product_with_other_metadata_is_refused(tmp_path, old, new, told):
    folder = earth.write_safe(tmp_path, side_m=200)
    path = folder / safe.METADATA
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(Refused, match=told):
        safe.read_product(folder, name="a", source="x")


def test_footprint_of_a_product_is_that_of_its_metadata(tmp_path, monkeypatch):
    monkeypatch.setattr(ground, "_LOOSE", 3e-4)
    folder = earth.write_safe(tmp_path, side_m=200)
    path = folder / safe.METADATA
    whole = safe.read_product(folder, name="a", source="x")
    assert whole.footprint is None
    west, south, east, north = whole.bounds
    ring = [(south, west), (south, west + 0.001), (north, west + 0.002), (north, west), (south, west)]  # latitude first
    end = "</n1:Level-2A_User_Product>"
    for points in (ring, [point[::-1] for point in ring], [("x", "y")]):
        text = " ".join(f"{a} {b}" for a, b in points)
        told = f"<Global_Footprint><EXT_POS_LIST>{text}</EXT_POS_LIST></Global_Footprint>"
        path.write_text(re.sub(f"(<Global_F.*)?{end}", told + end, path.read_text()))
        found = safe.read_product(folder, name="a", source="x").footprint
        if points is ring:
            wanted = shapely.Polygon([point[::-1] for point in ring])
            assert found.covers(wanted)
            assert found.difference(wanted.buffer(3.1e-4)).is_empty
            assert shapely.box(*whole.bounds).covers(found)
            assert east - found.bounds[2] > 3e-4
        else:
            assert found is None


def test_help_says_how_a_list_is_written(tmp_path, capsys):
    with pytest.raises(SystemExit):
        plan.main(["--help"])
    told = capsys.readouterr().out
    example = re.search(r"  \[\[source\]\]\n((  \w+ = .*\n)+)", told)[0]
    (tmp_path / "aerial").mkdir()
    (tmp_path / "aerial" / "a.tif").touch()
    (tmp_path / "list.toml").write_text(example)
    (source,) = sources.read_list(tmp_path / "list.toml").sources
    assert (source.kind, source.licence, source.options) == ("image", "CC0-1.0", {"modality": "hr"})
    words = set(re.findall(r"\w+", told))
    for kind, fields in sources.KINDS.items():
        assert {kind, *fields} <= words
    assert {"linear", "dB", "ascending", "descending", "empty"} <= words


def test_folder_without_metadata_is_refused(tmp_path):
    with pytest.raises(Refused, match=r"no MTD_MSIL2A\.xml"):
        safe.read_product(tmp_path, name="a", source="x")
