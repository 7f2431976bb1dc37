"""STAC APIs and files on servers, which most users have: searches, pages, failures, signatures; all on 127.0.0.1."""

import datetime
import json
import pathlib
import subprocess
import sys
import urllib.request

import numpy as np
import pystac
import pytest
import rasterio
import requests
import shapely
import shapely.geometry
from rasterio.crs import CRS
from rasterio.errors import RasterioIOError
from rasterio.transform import from_origin

from skysense_jax.data.records import RecordSource
from skysense_jax.ingest import acquisitions, build, dates, plan, remote, stac
from skysense_jax.ingest.rasters import Refused
from skysense_jax.ingest.windows import opened
from skysense_jax.modalities import MODALITIES
from tests.ingest import earth

SIDE = 640
WEST, NORTH = earth.WEST, earth.NORTH
BOUNDS = rasterio.warp.transform_bounds(earth.ZONE, 4326, WEST, NORTH - SIDE, WEST + SIDE, NORTH)
FOOTPRINT = shapely.geometry.mapping(shapely.box(*BOUNDS))
TIMES = {  # of items beside the two with files
    "late": dict(datetime="2022-06-30T23:59:59.500000Z"),
    "next": dict(datetime="2022-07-01T00:00:00Z"),
    "new-year": dict(datetime="2021-12-31T23:30:00-02:00"),  # 2022 in UTC
    "span": dict(datetime=None, start_datetime="2022-03-30T00:00:00Z", end_datetime="2022-04-02T00:00:00Z"),
}


class Server:
    def __init__(self, folder, port="0"):
        command = [sys.executable, str(pathlib.Path(__file__).with_name("stac_server.py")), str(folder), port]
        self._run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.root = f"http://127.0.0.1:{int(self._run.stdout.readline())}"

    def control(self, what):
        with urllib.request.urlopen(f"{self.root}/control/{what}", timeout=20) as answer:
            return json.loads(answer.read())

    def requests_of(self, path):
        return [entry for entry in self.control("log") if entry["path"].startswith(path)]

    def end(self):
        self._run.kill()
        self._run.wait()


def _cog(path, numbers):
    path.parent.mkdir(parents=True, exist_ok=True)
    how = dict(driver="COG", count=1, height=numbers.shape[0], width=numbers.shape[1], dtype=numbers.dtype)
    transform = from_origin(WEST, NORTH, SIDE / numbers.shape[0], SIDE / numbers.shape[0])
    with rasterio.open(path, "w", crs=CRS.from_epsg(earth.ZONE), transform=transform, **how) as file:
        file.write(numbers, 1)


def _item(folder, name, assets, collection, **properties):
    time = properties.pop("datetime", "2022-06-15T10:10:21Z")
    item = pystac.Item(name, FOOTPRINT, list(BOUNDS), datetime.datetime(2000, 1, 1), properties, collection=collection)
    for key, href in assets.items():
        item.add_asset(key, pystac.Asset(href, media_type=pystac.MediaType.COG))
    found = item.to_dict(include_self_link=False)
    found["properties"]["datetime"] = time
    path = folder / "items" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found))
    return path


def _grid(pixels):
    return earth.centres(from_origin(WEST, NORTH, SIDE / pixels, SIDE / pixels), pixels, pixels, earth.ZONE)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A folder with files and items of both Sentinels and a server over it."""
    folder = tmp_path_factory.mktemp("served")
    server = Server(folder)
    bands = {"B02": 0, "B03": 1, "B04": 2, "B05": 3, "B06": 4, "B07": 5, "B08": 6, "B8A": 7, "B11": 8, "B12": 9}
    for key, band in bands.items():
        x, y = _grid(64 if band in (0, 1, 2, 6) else 32)
        _cog(folder / f"s2/{key}.tif", np.rint(earth.reflectances(x, y, band) + 1000).astype(np.uint16))
    _cog(folder / "s2/SCL.tif", np.full((32, 32), 4, np.uint8))
    for number, key in enumerate(("vv", "vh")):
        _cog(folder / f"s1/{key}.tif", earth.power(*_grid(64), number).astype(np.float32))
    optical = {key: f"{server.root}/files/s2/{key}.tif" for key in (*bands, "SCL")}
    _item(folder, "optical", optical, "sentinel-2-l2a", **{"s2:processing_baseline": "05.09"})
    radar = {key: f"http://store.blob.core.windows.net/s1/{key}.tif" for key in ("vv", "vh")}
    _item(folder, "radar", radar, "sentinel-1-rtc", **{"sat:orbit_state": "ascending"})
    for name, times in TIMES.items():
        _item(folder, name, {}, "others", **times)
    yield folder, server
    server.end()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No test waits as long as a user would."""
    monkeypatch.setattr(remote, "RETRY_AFTER_S", (0.05, 0.05, 0.05))
    monkeypatch.setitem(remote._OPTIONS, "GDAL_HTTP_RETRY_DELAY", "0.05")
    monkeypatch.setattr(stac, "_BACKOFF", 0.02)


def _source(name, files, modality, **more):
    fields = dict(name=name, kind="stac", files=files, licence="Copernicus", modality=modality, **more)
    return "[[source]]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in fields.items()) + "\n"


def _planned(tmp_path, text):
    (tmp_path / "list.toml").write_text(text)
    arguments = ["--sources", str(tmp_path / "list.toml"), "--out", str(tmp_path / "m"), "--cells", "32"]
    plan.main([*arguments, "--validation_share", "0"])
    return tmp_path / "m"


def _built(tmp_path, name="d"):
    build.main(["--manifest", str(tmp_path / "m"), "--out", str(tmp_path / name), "--workers", "1"])
    source = RecordSource(str(tmp_path / name / "*.array_record"), (MODALITIES["s2"], MODALITIES["s1"]))
    return [source[index].decode() for index in range(len(source))]


def _rejected(folder):
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]


def test_items_of_an_api_become_samples_through_pages_and_failures(served, tmp_path):
    _, server = served
    server.control("fail?path=/api/search&times=1")
    where = [*BOUNDS[:2], BOUNDS[0] + 1e-4, BOUNDS[3]]
    asked = dict(collections=["sentinel-2-l2a", "others"], bbox=where, dates="2022-06")
    _planned(tmp_path, _source("archive", f"{server.root}/api", "s2", **asked))
    searches = server.requests_of("/api/search")
    assert len(searches) == 3  # one failed; two pages, of one item each
    assert json.loads(searches[-1]["body"])["datetime"] == "2022-06-01T00:00:00Z/2022-06-30T23:59:59Z"
    assert json.loads(searches[-1]["body"])["token"] == "1"
    assert [entry["name"] for entry in _rejected(tmp_path / "m")] == ["archive/late"]
    server.control("fail?path=/files/s2/B02&times=2")
    samples = _built(tmp_path)
    assert len(samples) == 4
    for sample in samples:
        _, west, north = (int(part) for part in sample.id.split("_"))
        x, y = earth.centres(from_origin(west, north, 10, 10), 32, 32, earth.ZONE)
        series = sample.series["s2"]
        assert series.valid[0, 1:-1, 1:-1].all()
        assert np.abs(series.images[0, ..., 0] - earth.reflectances(x, y, 0))[series.valid[0]].max() < 1
    assert not any(entry["what"] == "date" for entry in _rejected(tmp_path / "d"))


def test_file_behind_a_dead_server_is_tried_listed_and_asked_for_again(served, tmp_path):
    folder, server = served
    path = folder / "items" / "optical.json"
    other = path.with_name("dead.json")  # of addresses that GDAL has not read and kept
    other.write_text(path.read_text().replace("sentinel-2-l2a", "dead").replace("/files/", "/store/"))
    _planned(tmp_path, _source("archive", f"{server.root}/api", "s2", collections=["dead"]))
    other.unlink()
    server.control("fail?path=/store/s2/B03&times=1000")
    with pytest.raises(SystemExit):
        _built(tmp_path)
    assert len(server.requests_of("/store/s2/B03")) >= 4 * 4 * 3  # places, tries, and GDAL's own
    reasons = {entry["reason"] for entry in _rejected(tmp_path / "d") if entry["what"] == "date"}
    assert reasons == {"unreachable: HTTP response code: 503"}
    server.control("fail?path=/store/s2/B03&times=0")
    assert len(_built(tmp_path)) == 4


def test_api_that_stays_dead_is_listed_and_the_other_sources_go_on(served, tmp_path):
    _, server = served
    server.control("fail?path=/api/search&times=1000")
    text = _source("dead", f"{server.root}/api", "s2") + _source("gone", "http://127.0.0.1:9/api", "s2")
    earth.write_radar(tmp_path / "a.tif")
    text += '[[source]]\nname = "radar"\nkind = "s1"\nfiles = "a.tif"\nlicence = "x"\n'
    before = len(server.requests_of("/api/search"))
    manifest = _planned(tmp_path, text)
    assert len(server.requests_of("/api/search")) - before == 1 + stac._TRIES
    server.control("fail?path=/api/search&times=0")
    files = [entry for entry in _rejected(manifest) if entry["what"] == "file"]
    assert [entry["name"] for entry in files] == [f"dead/{server.root}/api", "gone/http://127.0.0.1:9/api"]
    assert all(entry["reason"].startswith("unreachable: no answer of a STAC catalogue") for entry in files)


@pytest.fixture
def begin():
    """Makes servers that end with the test."""
    begun = []

    def server(folder, **options):
        begun.append(Server(folder, **options))
        return begun[-1]

    yield server
    for one in begun:
        one.end()


def test_file_whose_server_breaks_off_or_is_away_for_a_while_is_asked_for_again(tmp_path, begin):
    numbers = np.random.default_rng(0).integers(0, 9999, (1024, 1024)).astype(np.uint16)
    _cog(tmp_path / "a.tif", numbers)
    server, tries = begin(tmp_path), []
    address = f"{server.root}/files/a.tif"

    def read():
        tries.append(address)
        with opened(address) as file:
            if len(tries) == 1:  # behind the header
                server.control("fail?path=/files/a.tif&times=1000")
            if len(tries) == 2:
                server.control("fail?path=/files/a.tif&times=0")
            return file.read(1)

    with pytest.raises(RasterioIOError, match="the server broke off: Read failed") as told:
        read()
    assert remote.reason(told.value).startswith("unreachable: the server broke off")
    np.testing.assert_array_equal(remote.again(read), numbers)
    tries.clear()
    server.end()
    other = f"{server.root}/files/b.tif"
    for _ in range(2):  # the second time GDAL says of what it remembers that there is no such file
        with pytest.raises(RasterioIOError) as told, opened(other):
            pass
        assert remote.reason(told.value).startswith("unreachable: ")
    (tmp_path / "a.tif").rename(tmp_path / "b.tif")
    begin(tmp_path, port=server.root.rpartition(":")[2])
    with remote.again(lambda: opened(other).__enter__()) as file:
        assert file.shape == (1024, 1024)


# ---- signatures


def test_addresses_are_signed_as_they_are_read_and_no_signature_is_kept(served, tmp_path, monkeypatch):
    """The Planetary Computer's own package, whose service and store the server stands in for."""
    import planetary_computer

    _, server = served
    monkeypatch.setenv("PC_SDK_SAS_URL", f"{server.root}/sas")
    monkeypatch.setenv("GDAL_HTTP_PROXY", server.root.removeprefix("http://"))
    planetary_computer.settings.Settings.get.cache_clear()
    text = _source("radar", f"{server.root}/api", "s1", collections=["sentinel-1-rtc"], sign="planetary_computer")
    manifest = _planned(tmp_path, text)
    assert len(server.requests_of("/sas/")) == 1  # to tell the unit
    planetary_computer.sas.TOKEN_CACHE.clear()  # hours later, when the first token has expired
    samples = _built(tmp_path)
    assert len(samples) == 4
    for sample in samples:
        _, west, north = (int(part) for part in sample.id.split("_"))
        x, y = earth.centres(from_origin(west, north, 10, 10), 32, 32, earth.ZONE)
        wanted = 10 * np.log10(earth.power(x, y, 1))
        assert np.abs(sample.series["s1"].images[0, ..., 1].astype(float) - wanted).max() < 0.01
    assert len(server.requests_of("/sas/")) == 2
    planetary_computer.sas.TOKEN_CACHE.clear()  # and GDAL has nothing of these addresses
    server.control("fail?path=/s1/vh&times=1000")
    with pytest.raises(SystemExit):
        _built(tmp_path, name="failed")
    server.control("fail?path=/s1/vh&times=0")
    assert {entry["reason"] for entry in _rejected(tmp_path / "failed") if entry["what"] == "date"} == {
        "unreachable: HTTP response code: 503"
    }
    (found,) = acquisitions.read(manifest / plan.ACQUISITIONS)
    assert found.layers["VV"].path == "http://store.blob.core.windows.net/s1/vv.tif"
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(kept) > 10
    assert not [path for path in kept if b"secret" in path.read_bytes()]


def test_signer_that_does_not_answer_is_a_server_that_does_not(served, tmp_path, monkeypatch):
    _, server = served
    monkeypatch.setattr(remote, "signer", lambda name: lambda address: requests.get("http://127.0.0.1:9/token").text)
    text = _source("radar", f"{server.root}/api", "s1", collections=["sentinel-1-rtc"], unit="linear")
    found, rejected = stac.find(
        f"{server.root}/api", source="radar", modality="s1", collections=["sentinel-1-rtc"], sign="planetary_computer"
    )
    assert not found
    assert rejected[0].reason.startswith("unreachable: ")
    _planned(tmp_path, text.replace("unit =", 'sign = "planetary_computer"\nunit ='))
    with pytest.raises(SystemExit):
        _built(tmp_path)
    reasons = {entry["reason"][:13] for entry in _rejected(tmp_path / "d") if entry["what"] == "date"}
    assert reasons == {"unreachable: "}


def test_item_whose_addresses_are_signed_is_refused_without_telling_the_signature(served, tmp_path):
    folder, server = served
    assets = {key: f"{server.root}/files/s1/{key}.tif?se=x&sig=hidden" for key in ("vv", "vh")}
    path = _item(folder, "signed", assets, "signed")
    found, rejected = stac.find(f"{server.root}/api", source="a", modality="s1", collections=["signed"])
    path.unlink()
    assert not found
    assert "a signed address, which expires before it is read" in rejected[0].reason
    assert "hidden" not in rejected[0].reason


def test_list_with_an_unknown_signer_or_date_is_refused(served, tmp_path, capsys):
    _, server = served
    for more, told in (
        (dict(sign="os:system"), "sign = 'os:system'; wanted one of ('planetary_computer',)"),
        (dict(dates="June"), "source 'a': 'June' is no year, month, day or time"),
        (dict(dates="2022-06-30/2022-06-01"), "'2022-06-30/2022-06-01' is no time, or one that ends before it begins"),
    ):
        with pytest.raises(SystemExit):
            _planned(tmp_path, _source("a", f"{server.root}/api", "s2", **more))
        assert told in capsys.readouterr().err


def test_variables_of_gdal_reach_the_store_of_a_bucket(served, monkeypatch):
    """Requester pays, as GDAL's own variable says."""
    _, server = served
    for key, value in dict(
        AWS_S3_ENDPOINT=server.root.removeprefix("http://"),
        **dict(AWS_HTTPS="NO", AWS_VIRTUAL_HOSTING="FALSE", AWS_REQUEST_PAYER="requester"),
        **dict(AWS_ACCESS_KEY_ID="name", AWS_SECRET_ACCESS_KEY="secret", AWS_REGION="eu-central-1"),
    ).items():
        monkeypatch.setenv(key, value)
    with opened("s3://bucket/s1/vv.tif") as file:
        assert file.shape == (64, 64)
    assert {entry["payer"] for entry in server.requests_of("/bucket/s1/vv.tif")} == {"requester"}


# ---- dates


@pytest.mark.parametrize(
    ("dates", "names"),
    [
        ("2022-06", "late optical radar"),
        ("2022-06-30", "late"),
        ("2022-06-15T10:10:21Z", "optical radar"),
        ("2022-06-15T12:10:21+02:00", "optical radar"),
        ("2022-06-15T10:10:22Z/2022-06-30T23:59:59Z", "late"),
        ("2022", "late new-year next optical radar span"),
        ("2021", ""),
        ("../2022-04-01", "new-year span"),
        ("/2022-03", "new-year span"),
        ("2022-04/..", "late next optical radar span"),
        ("2022-07-01/", "next"),
        ("2022-04-03/2022-06-14", ""),
        ("2022-05/2022-06-29", "optical radar"),
    ],
)
def test_dates_mean_the_same_to_a_static_catalogue_and_an_api(served, tmp_path, dates, names):
    folder, server = served
    of_api = sorted(item.id for item in stac.items(f"{server.root}/api", dates=dates))
    catalogue = dict(type="Catalog", id="c", description="d", stac_version="1.0.0")
    links = [dict(rel="item", href=str(path)) for path in sorted((folder / "items").glob("*.json"))]
    (tmp_path / "catalog.json").write_text(json.dumps({**catalogue, "links": links}))
    static = sorted(item.id for item in stac.items(str(tmp_path / "catalog.json"), dates=dates))
    assert of_api == static == names.split()


@pytest.mark.parametrize(
    "text", ["", "..", "../..", "/", "2022-13", "2022-6-1", "a/b", "2022/2021", "2022-06-15T25:00Z"]
)
def test_date_that_says_nothing_is_refused(text):
    with pytest.raises(ValueError, match=r"year|time|month|hour"):
        dates.interval(text)


# ---- static catalogues on servers


def test_item_of_a_static_catalogue_that_is_gone_is_named_and_the_others_go_on(served, tmp_path):
    folder, server = served
    links = [dict(rel="item", href=f"./items/{name}.json") for name in ("optical", "missing", "optical")]
    links.append(dict(rel="child", href="./catalog.json"))  # itself
    catalogue = dict(type="Catalog", id="c", description="d", stac_version="1.0.0", links=links)
    (folder / "catalog.json").write_text(json.dumps(catalogue))
    found, rejected = stac.find(f"{server.root}/files/catalog.json", source="a", modality="s2")
    assert [acquisition.id for acquisition in found] == ["optical"]
    assert [entry.name for entry in rejected] == [f"a/{server.root}/files/items/missing.json"]


# ---- units of Sentinel-1

CONVENTION = "card4l:measurement_convention"


@pytest.mark.parametrize(
    ("properties", "bands", "given", "told"),
    [
        ({}, {}, "", "linear"),  # by the range of the numbers
        ({CONVENTION: "linear power"}, {}, "", "linear"),
        ({}, {"raster:bands": [{"unit": "dB"}]}, "", "dB"),
        ({}, {"bands": [{"unit": "decibel"}]}, "dB", "dB"),
        ({}, {"raster:bands": [{"unit": "1"}]}, "dB", "dB"),
        (
            {CONVENTION: "linear amplitude"},
            {},
            "linear",
            "backscatter as linear amplitude; wanted",
        ),
        (
            {CONVENTION: "linear power"},
            {},
            "dB",
            "unit = 'dB' in the list, and the item says 'lin",
        ),
        (
            {CONVENTION: "power"},
            {"bands": [{"unit": "dB"}]},
            "",
            "backscatter as db, power: which",
        ),
    ],
)
def test_unit_is_what_an_item_says_else_what_its_numbers_do(served, properties, bands, given, told):
    _, server = served
    item = pystac.Item("a", None, list(BOUNDS), datetime.datetime(2022, 6, 1), properties)
    for key in ("vv", "vh"):
        item.add_asset(key, pystac.Asset(f"{server.root}/files/s1/{key}.tif", extra_fields=bands))
    if told in ("linear", "dB"):
        assert stac.read_item(item, modality="s1", source="x", unit=given).unit == told
        return
    with pytest.raises(Refused, match=told):
        stac.read_item(item, modality="s1", source="x", unit=given)
