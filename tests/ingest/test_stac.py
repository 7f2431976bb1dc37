"""A local static STAC catalogue of real COGs is read as any other source, and what an item says of itself is held."""

import datetime
import json
import pathlib
import shutil

import numpy as np
import pystac
import pytest
import rasterio
from rasterio.crs import CRS
from rasterio.transform import from_origin
from shapely.geometry import box, mapping

from skysense_jax.data.records import RecordSource
from skysense_jax.ingest import build, places, plan, sources, stac
from skysense_jax.ingest.places import Place, boxes_of, seen_by
from skysense_jax.ingest.rasters import Refused, Square
from skysense_jax.modalities import MODALITIES
from tests.ingest import earth

SIDE = 960
WEST, NORTH = earth.WEST - 300, earth.NORTH + 300
SENTINEL = dict(zip(("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12"), range(10)))
COMMON = dict(
    zip(("blue", "green", "red", "rededge1", "rededge2", "rededge3", "nir", "nir08", "swir16", "swir22"), range(10))
)


def _cog(path, numbers, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    how = dict(driver="COG", count=1, height=numbers.shape[0], width=numbers.shape[1], dtype=numbers.dtype)
    with rasterio.open(
        path, "w", crs=CRS.from_epsg(earth.ZONE), transform=from_origin(WEST, NORTH, size, size), **how
    ) as f:
        f.write(numbers, 1)


def _item(folder, name, day, assets, **properties):
    square = Square(float(WEST), float(NORTH), SIDE // 10, CRS.from_epsg(earth.ZONE))
    bounds = rasterio.warp.transform_bounds(square.crs, "EPSG:4326", *square.bounds)
    outline, time = mapping(box(*bounds)), datetime.datetime.fromisoformat(f"{day}T10:10:21+00:00")
    item = pystac.Item(name, outline, list(bounds), time, properties)  # without an outline its box would not be kept
    for key, path in assets.items():
        item.add_asset(key, pystac.Asset(str(path), media_type=pystac.MediaType.COG, roles=["data"]))
    return item


def _s2(folder, name, day, *, names=SENTINEL, add=0, scl="SCL", drop=(), **properties):
    assets = {}
    for key, band in names.items():
        size = 10 if band in (0, 1, 2, 6) else 20
        x, y = earth.centres(from_origin(WEST, NORTH, size, size), SIDE // size, SIDE // size, earth.ZONE)
        if key not in drop:
            assets[key] = folder / name / f"{key}.tif"
            _cog(assets[key], np.rint(earth.reflectances(x, y, band) + add).astype(np.uint16), size)
    assets[scl] = folder / name / "scl.tif"
    _cog(assets[scl], np.full((SIDE // 20, SIDE // 20), 4, np.uint8), 20)
    return _item(folder, name, day, assets, **properties)


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory):
    """Two products of Sentinel-2 as two archives describe them, one without a baseline, and one of Sentinel-1."""
    root = tmp_path_factory.mktemp("stac")
    x, y = earth.centres(from_origin(WEST, NORTH, 10, 10), SIDE // 10, SIDE // 10, earth.ZONE)
    for number, key in enumerate(("vv", "vh")):
        _cog(root / "s1" / f"{key}.tif", earth.power(x, y, number).astype(np.float32), 10)
    radar = {key: root / "s1" / f"{key}.tif" for key in ("vv", "vh")}
    found = pystac.Catalog("made-up", "for tests")
    found.add_items(
        [
            _s2(root, "planetary", "2022-06-01", add=1000, **{"s2:processing_baseline": "04.00"}),
            _s2(
                root, "earth-search", "2022-06-06", names=COMMON, scl="scl", **{"earthsearch:boa_offset_applied": True}
            ),
            _s2(root, "nothing-said", "2022-06-11"),
            _item(root, "radar", "2022-06-14", radar, **{"sat:orbit_state": "descending"}),
        ]
    )
    found.normalize_and_save(str(root / "catalog"), pystac.CatalogType.SELF_CONTAINED)
    return root


def _list(root, modality, **more):
    lines = [
        "[[source]]",
        'name = "archive"',
        'kind = "stac"',
        'files = "catalog/catalog.json"',
        'licence = "Copernicus"',
    ]
    lines += [f'modality = "{modality}"', *(f"{key} = {json.dumps(value)}" for key, value in more.items())]
    return "\n".join(lines)


def test_catalogue_becomes_samples(catalogue, tmp_path):
    text = _list(catalogue, "s2") + "\n" + _list(catalogue, "s1").replace('"archive"', '"radar"')
    (catalogue / "list.toml").write_text(text)
    plan.main(["--sources", str(catalogue / "list.toml"), "--out", str(tmp_path / "m"), "--cells", "32"])
    build.main(["--manifest", str(tmp_path / "m"), "--out", str(tmp_path / "d"), "--workers", "1"])
    source = RecordSource(str(tmp_path / "d" / "*.array_record"), (MODALITIES["s2"], MODALITIES["s1"]))
    samples = [source[index].decode() for index in range(len(source))]
    whole = next(s for s in samples if s.series["s2"].valid.all() and s.series["s1"].valid.all())
    _, west, north = (int(part) for part in whole.id.split("_"))
    x, y = earth.centres(from_origin(west, north, 10, 10), 32, 32, earth.ZONE)
    assert whole.series["s2"].days.tolist() == [_day("2022-06-01"), _day("2022-06-06")]  # both without their offset
    for date in (0, 1):
        assert np.abs(whole.series["s2"].images[date, ..., 0] - earth.reflectances(x, y, 0)).max() < 1
    decibels = 10 * np.log10(earth.power(x, y, 0))
    assert np.abs(whole.series["s1"].images[0, ..., 0].astype(float) - decibels).max() < 0.01
    assert whole.series["s1"].orbits.tolist() == [2]
    rejected = [json.loads(line) for line in (tmp_path / "d" / "rejected.jsonl").read_text().splitlines()]
    reasons = {(entry["what"], entry["name"]): entry["reason"] for entry in rejected}
    assert "the offset is not known" in reasons["file", "archive/nothing-said"]
    assert "no asset VV for band VV" in reasons["file", "radar/planetary"]


def _day(text):
    return int(np.datetime64(text, "D").astype(int))


def test_items_are_those_of_the_box_and_the_dates(catalogue):
    href = str(catalogue / "catalog" / "catalog.json")
    names = lambda **how: sorted(item.id for item in stac.items(href, **how))  # noqa: E731
    assert names() == ["earth-search", "nothing-said", "planetary", "radar"]
    assert names(dates="2022-06-02/2022-06-12") == ["earth-search", "nothing-said"]
    assert names(dates="2022-06-14") == ["radar"]
    assert names(bbox=[20.0, 20.0, 21.0, 21.0]) == []
    assert len(names(bbox=[11.0, 49.0, 0.0, 12.0, 50.0, 9.0])) == 4
    assert names(collections=["others"]) == []


@pytest.mark.parametrize(
    ("bbox", "wanted"),
    [
        ([179.5, -17.0, 180.5, -16.0], (179.5, -17.0, -179.5, -16.0)),
        ([-180.5, -17.0, -179.5, -16.0], (179.5, -17.0, -179.5, -16.0)),
        ([179.5, -17.0, 0.0, 180.5, -16.0, 9.0], (179.5, -17.0, -179.5, -16.0)),
        ([179.5, -17.0, -179.5, -16.0], (179.5, -17.0, -179.5, -16.0)),  # as GeoJSON wants it
        ([190.0, -17.0, 200.0, -16.0], (-170.0, -17.0, -160.0, -16.0)),
        ([0.0, -90.0, 360.0, 90.0], (-180.0, -90.0, 180.0, 90.0)),
        ([170.0, -17.0, 180.0, -16.0], (170.0, -17.0, 180.0, -16.0)),
    ],
)
def test_box_beyond_180_degrees_is_that_of_the_other_side(catalogue, bbox, wanted):
    item = next(item for item in stac.items(str(catalogue / "catalog" / "catalog.json")) if item.id == "planetary")
    item.bbox, item.geometry = bbox, None
    found = stac.read_item(item, modality="s2", source="x")
    assert (found.bounds, found.footprint) == (wanted, None)
    sides = [Place(32760, 819_340, 8_118_000, 2), Place(32701, 180_560, 8_118_000, 2)]  # at 180 degrees, 17 south
    seen = [round(place.square.centre()[0]) for place in seen_by(sides, [found])]
    assert seen == ([180] if bbox[0] == 170 else [] if bbox[0] == 190 else [180, -180])
    near = {180: [179.9, -17.0, 180.0, -16.9], -180: [180.0, -17.0, 180.1, -16.9]}  # asked for beyond 180, too
    asked = lambda box: stac._wanted(item, (), boxes_of(stac.edges_of(box)), stac.Interval())  # noqa: E731
    assert [asked(box) for box in near.values()] == ([True, False] if bbox[0] == 170 else [bbox[0] != 190] * 2)


def test_place_outside_of_an_items_outline_is_not_planned(catalogue, tmp_path):
    """Its box reaches 0.2 degrees further to the east than what it shows."""
    shutil.copytree(catalogue / "catalog", tmp_path / "catalog")
    (path,) = (tmp_path / "catalog").rglob("planetary.json")
    item = json.loads(path.read_text())
    west, south, east, north = item["bbox"]
    (tmp_path / "list.toml").write_text(_list(catalogue, "s2", bbox=[west, south, east + 0.2, north]))
    manifests = {}
    for name, geometry in (("outline", item["geometry"]), ("none", mapping(box(west, south, east + 0.2, north)))):
        path.write_text(json.dumps({**item, "bbox": [west, south, east + 0.2, north], "geometry": geometry}))
        command = ["--sources", str(tmp_path / "list.toml"), "--out", str(tmp_path / name), "--cells", "32"]
        plan.main([*command, "--require", "s2"])
        found = places.read(tmp_path / name / plan.PLACES)
        manifests[name] = [place.square.centre()[0] for place in found]
    assert max(manifests["none"]) > east + 0.19
    assert east < max(manifests["outline"]) < east + 0.04
    assert set(manifests["outline"]) == {x for x in manifests["none"] if x <= max(manifests["outline"])}


@pytest.mark.parametrize("bbox", [[11.0, 49.0, 12.0], [None] * 4, 5, "11,49,12,50"])
def test_item_with_a_malformed_box_is_named_and_the_others_go_on(catalogue, tmp_path, bbox):
    shutil.copytree(catalogue / "catalog", tmp_path / "catalog")
    (path,) = (tmp_path / "catalog").rglob("nothing-said.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "bbox": bbox}))
    href = str(tmp_path / "catalog" / "catalog.json")
    lost = []
    assert len(list(stac.items(href, lost=lost))) == 4  # nobody asked where it lies
    found = [item.id for item in stac.items(href, bbox=[11.0, 49.0, 12.0, 50.0], lost=lost)]
    assert sorted(found) == ["earth-search", "planetary", "radar"]
    assert [(entry.what, entry.name, entry.reason) for entry in lost] == [
        ("file", "nothing-said", f"bbox = {bbox!r}; wanted west, south, east, north in degrees")
    ]


def test_item_whose_malformed_box_would_be_its_bounds_is_refused(catalogue):
    item = next(item for item in stac.items(str(catalogue / "catalog" / "catalog.json")) if item.id == "planetary")
    item.bbox = item.bbox[:3]
    with pytest.raises(Refused, match="wanted west, south, east, north"):
        stac.read_item(item, modality="s2", source="x")
    (catalogue / "list.toml").write_text(_list(catalogue, "s2", bbox=[1, 2, 3]))
    with pytest.raises(ValueError, match=r"source 'archive': bbox = \[1, 2, 3\]; wanted west"):
        sources.read_list(catalogue / "list.toml")


def test_catalogue_that_does_not_answer_is_refused(tmp_path):
    with pytest.raises(Refused, match="no answer of a STAC catalogue"):
        list(stac.items(str(tmp_path / "catalog.json")))
    (tmp_path / "catalog.json").write_text("{}")
    with pytest.raises(Refused, match="no answer of a STAC catalogue"):
        list(stac.items(str(tmp_path / "catalog.json")))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (dict(properties={"s2:processing_baseline": "new"}), "processing baseline 'new'; wanted a number"),
        (
            dict(properties={"s2:processing_baseline": "03.01"}, offset=-0.1),
            r"03\.01, and raster:bands with an offset of \[1000\]",
        ),
        (
            dict(properties={"s2:processing_baseline": "05.00"}, offset=0.0),
            r"05\.00, and raster:bands with an offset of \[0\]",
        ),
        (dict(properties={"s2:processing_baseline": "05.00"}, without="B11"), "no asset B11 or swir16 for band B11"),
        (
            dict(properties={"s2:processing_baseline": "05.00"}, without="SCL"),
            "no asset SCL, which tells clouds",
        ),
    ],
)
def test_item_that_contradicts_itself_or_lacks_a_band_is_refused(catalogue, change, told):
    item = next(item for item in stac.items(str(catalogue / "catalog" / "catalog.json")) if item.id == "planetary")
    item.properties |= change["properties"]
    if "offset" in change:
        item.assets["B02"].extra_fields["raster:bands"] = [{"scale": 0.0001, "offset": change["offset"]}]
    item.assets.pop(change.get("without"), None)
    with pytest.raises(Refused, match=told):
        stac.read_item(item, modality="s2", source="x")


def test_item_of_the_network_names_no_file_of_this_machine_and_days_are_those_of_utc(catalogue):
    item = next(item for item in stac.items(str(catalogue / "catalog" / "catalog.json")) if item.id == "planetary")
    item.datetime = datetime.datetime(2022, 6, 1, 23, 50)
    assert stac.read_item(item, modality="s2", source="x").day == _day("2022-06-01")
    item.assets["B02"].href = "file:///etc/B02.tif"
    item.set_self_href("https://example.org/planetary.json")
    with pytest.raises(Refused, match="names files of this machine: file:///etc/B02"):
        stac.read_item(item, modality="s2", source="x")


def test_rank_is_the_baseline_and_files_are_paths(catalogue):
    items = {item.id: item for item in stac.items(str(catalogue / "catalog" / "catalog.json"))}
    found = stac.read_item(items["planetary"], modality="s2", source="x")
    assert (found.rank, found.offset) == (400, 1000)
    assert all(pathlib.Path(layer.path).exists() for layer in (*found.layers.values(), found.classes))
    assert stac.read_item(items["radar"], modality="s1", source="x").unit == "linear"
