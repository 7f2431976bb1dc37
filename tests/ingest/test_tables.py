"""A user's table of files tells day, place, offset and orbit of each; what is wrong in it is named with its row."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio

from skysense_jax.ingest import plan, sources, tables
from skysense_jax.ingest.acquisitions import Layer
from skysense_jax.ingest.grids import Ground
from skysense_jax.ingest.places import Place
from skysense_jax.ingest.rasters import Refused
from skysense_jax.ingest.series import read_series
from skysense_jax.modalities import MODALITIES
from tests.ingest import earth

ROWS = tuple(MODALITIES.values())
HR = MODALITIES["hr"]
DAY = int(np.datetime64("2021-07-03", "D").astype(int))


def _list(folder, **fields):
    entry = dict(name="a", kind="image", files="files.csv", licence="CC0-1.0", modality="hr") | fields
    text = "\n".join(f"{field} = {json.dumps(value)}" for field, value in entry.items() if value is not None)
    (folder / "list.toml").write_text(f"[[source]]\n{text}\n")
    return sources.read_list(folder / "list.toml").sources[0]


def _png(path, *, side=160):
    path.parent.mkdir(exist_ok=True)
    rows, columns = np.mgrid[:side, :side].astype(np.uint8)
    with rasterio.open(path, "w", driver="PNG", dtype="uint8", count=3, height=side, width=side) as file:
        file.write(np.stack([rows, columns, np.full_like(rows, 7)]))


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_image_without_a_place_lies_where_its_table_says(tmp_path, suffix):
    _png(tmp_path / "images" / "1.png")
    _png(tmp_path / "images" / "2.png")
    east, south = earth.WEST + 50, earth.NORTH - 50
    rows = [
        dict(path="images/1.png", day="2021-07-03", crs=f"{earth.ZONE}", west=earth.WEST, south=south, east=east),
        dict(path="images/2.png", day=None, crs=None, west=None, south=None, east=None),
    ]
    rows[0]["north"], rows[1]["north"] = earth.NORTH, None
    if suffix == "csv":
        lines = [",".join("" if value is None else str(value) for value in row.values()) for row in rows]
        (tmp_path / "files.csv").write_text("\n".join([",".join(rows[0]), *lines]) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "files.parquet")
    source = _list(tmp_path, files=f"files.{suffix}")
    found, rejected = sources.find(source, ROWS)
    assert [(entry.id, entry.day) for entry in found] == [("images/1.png", DAY)]
    assert [(entry.name, entry.reason) for entry in rejected] == [
        ("a/images/2.png", "no coordinate system: where it lies and the size of its pixels are unknown")
    ]
    square = Place(earth.ZONE, earth.WEST, earth.NORTH, 5).square
    series, _ = read_series(found, square, HR, min_clear_share=0.1)
    side = np.arange(160)
    assert (series.images[0, ..., 0] == side[:, None]).all()
    assert (series.images[0, ..., 1] == side).all()


def test_table_tells_offset_and_day_of_each_file(tmp_path):
    x, y = earth.centres(rasterio.transform.from_origin(earth.WEST, earth.NORTH, 10, 10), 8, 8, earth.ZONE)
    for name, add in (("old", 0), ("new", 1000)):
        pixels = np.stack([earth.reflectances(x, y, band) + add for band in range(10)], -1).astype(np.uint16)
        where = rasterio.transform.from_origin(earth.WEST, earth.NORTH, 10, 10)
        earth.write_tif(tmp_path / f"{name}.tif", pixels, where, earth.ZONE)
    (tmp_path / "files.csv").write_text("path,offset,day\nold.tif,0,2021-07-03\nnew.tif,1000,2022-07-03T10:00:00\n")
    found, rejected = sources.find(_list(tmp_path, kind="s2_geotiff", modality=None), ROWS)
    assert not rejected
    assert [(entry.id, entry.offset, entry.day) for entry in found] == [
        ("new.tif", 1000, DAY + 365),
        ("old.tif", 0, DAY),
    ]
    series, _ = read_series(
        found, Place(earth.ZONE, earth.WEST, earth.NORTH, 8).square, MODALITIES["s2"], min_clear_share=0.1
    )
    np.testing.assert_array_equal(series.images[0], series.images[1])
    (tmp_path / "files.csv").write_text("path,offset\nold.tif,0\nnew.tif,\n")
    with pytest.raises(ValueError, match="offset is missing: 0, or 1000"):
        _list(tmp_path, kind="s2_geotiff", modality=None)
    assert sources.find(_list(tmp_path, kind="s2_geotiff", modality=None, offset=1000), ROWS)[0][0].offset == 1000


def test_rows_of_files_that_are_one_acquisition_agree(tmp_path):
    where = dict(side_m=200, unit="dB")
    for name in ("a_VV.tif", "a_VH.tif"):
        earth.write_radar(tmp_path / name, **where, orbit="")
    (tmp_path / "files.csv").write_text("path,orbit\na_VV.tif,descending\na_VH.tif,descending\n")
    found, _ = sources.find(_list(tmp_path, kind="s1", modality=None), ROWS)
    assert [(entry.orbit, entry.unit) for entry in found] == [("descending", "dB")]
    (tmp_path / "files.csv").write_text("path,orbit\na_VV.tif,descending\na_VH.tif,ascending\n")
    found, rejected = sources.find(_list(tmp_path, kind="s1", modality=None), ROWS)
    assert (found, rejected[0].name) == ([], "a/a_VH.tif")
    assert rejected[0].reason == "the table tells different orbit of files that are one acquisition"


def test_place_is_all_or_nothing():
    row = dict(crs="EPSG:32632", west=1.0, south=2.0, east=3.0, north=4.0)
    assert tables.together([row, row])["ground"] == Ground("EPSG:32632", (1.0, 2.0, 3.0, 4.0))
    assert tables.together([{}, {}]) == {}
    with pytest.raises(Refused, match="tells a part of a place; wanted crs, west, south, east, north, or none"):
        tables.together([{edge: row[edge] for edge in ("west", "south", "east", "north")}])


@pytest.mark.parametrize(
    ("text", "fields", "told"),
    [
        ("file,day\n1.png,2021-07-03\n", {}, "file, day; wanted the column path, and none but day, crs, west"),
        ("path,date\n1.png,2021-07-03\n", {}, "path, date; wanted the column path"),
        ("path,offset\n1.png,0\n", {}, "path, offset; wanted the column path"),  # of an image
        ("path\n", {}, "no rows; wanted the column path"),
        ("path,west\n1.png,here\n", {}, "files.csv, row 2: could not convert string to float: 'here'"),
        ("path,day\n1.png,\n2.png,,x\n", {}, "row 3: ['x'] behind the last column; wanted a cell for each column"),
        ("path\n1.png\n1.png\n", {}, "row 3: path '1.png'; wanted each file once"),
        ('path\n""\n', {}, "row 2: path ''; wanted each file once"),
        ("path,orbit\n1.tif,up\n", dict(kind="s1", modality=None), "orbit 'up' of 1.tif; wanted one of"),
        ("path,day\n1.SAFE,2021-07-03\n", dict(kind="s2_safe", modality=None), "the column path, and nothing else"),
    ],
)
def test_bad_table_is_refused_with_its_row(tmp_path, text, fields, told):
    (tmp_path / "files.csv").write_text(text)
    with pytest.raises(ValueError, match=r"list\.toml, source 'a': .*files\.csv") as error:
        _list(tmp_path, **fields)
    assert told in str(error.value)


def test_file_of_a_table_that_is_not_there_is_named_and_the_others_go_on(tmp_path):
    _png(tmp_path / "1.png")
    place = f"EPSG:{earth.ZONE},{earth.WEST},{earth.NORTH - 50},{earth.WEST + 50},{earth.NORTH}"
    (tmp_path / "files.csv").write_text(f"path,crs,west,south,east,north\n1.png,{place}\ngone.png,{place}\n")
    _list(tmp_path)
    arguments = ["--sources", str(tmp_path / "list.toml"), "--out", str(tmp_path / "m"), "--cells", "5"]
    plan.main(arguments)
    rejected = [json.loads(line) for line in (tmp_path / "m" / plan.REJECTED).read_text().splitlines()]
    assert [entry["name"] for entry in rejected] == ["a/gone.png"]
    assert "No such file" in rejected[0]["reason"]
    found = plan.acquisitions_lib.read(tmp_path / "m" / plan.ACQUISITIONS)[0]
    transform = (0.3125, 0.0, float(earth.WEST), 0.0, -0.3125, float(earth.NORTH))
    assert found.layers["G"] == Layer(str(tmp_path / "1.png"), 2, crs=f"EPSG:{earth.ZONE}", transform=transform)
