"""The page of a dataset, opened in a real browser: it shows what the dataset has, on a phone and by night too."""

import csv
import dataclasses
import html
import json
import re
import shutil
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from skysense_jax.data.records import RecordSource, ShardWriter, encode_sample
from skysense_jax.drawing import label_colours
from skysense_jax.ingest import build, figures, inspect, plan
from skysense_jax.ingest.dataset import drawn
from skysense_jax.modalities import MODALITIES, OSM
from tests.data.random_samples import ROWS, make_sample
from tests.ingest import earth

CELLS, PLACES = 16, 4  # places of 160 m, along a side of the archive
TRAIN, HELD = (90, 180, 240), (255, 154, 92)  # by night
STRIPES = (214, 0, 147)
DAYS = ("20220601", "20220611", "20220621")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Three Sentinel-2 dates, one cloudy in the north-west; an aerial image, radar, a map with a road and a field."""
    root = tmp_path_factory.mktemp("archive")
    where = dict(west=earth.WEST - 60, north=earth.NORTH + 60, side_m=760)
    cloudy = lambda x, y: (x < earth.WEST + 240) & (y > earth.NORTH - 100)  # noqa: E731
    empty = lambda x, y: (x > earth.WEST + 520) & (y < earth.NORTH - 300)  # noqa: E731
    for number, day in enumerate(DAYS):
        odd = dict(scl=cloudy if number == 1 else None, empty=empty if number == 0 else None)
        folder = earth.write_safe(root / "s2", day=day, baseline="0301", **odd, **where)
        for path in folder.rglob("*_B*_*0m.jp2") if number == 2 else ():  # as if an offset were left in one date
            with earth.rasterio.open(path, "r") as file:
                pixels, how = file.read() + np.uint16(1200), dict(crs=file.crs, transform=file.transform, count=1)
            how |= dict(driver="JP2OpenJPEG", dtype="uint16", QUALITY="100", REVERSIBLE="YES")
            with earth.rasterio.open(path, "w", height=pixels.shape[1], width=pixels.shape[2], **how) as file:
                file.write(pixels)
    earth.write_aerial(root / "a.tif", west=earth.WEST, north=earth.NORTH, width=1280, height=960, size=0.5)
    earth.write_radar(root / "s1.tif", **where)
    road = np.array([[earth.WEST + 400, earth.NORTH + 50], [earth.WEST + 400, earth.NORTH - 700]])
    corner = np.array([earth.WEST, earth.NORTH])
    field = np.array([[0, 0], [160, 0], [160, -640], [0, -640], [0, 0]]) + corner
    member = lambda kind, points, **tags: dict(  # noqa: E731
        type="Feature", geometry=dict(type=kind, coordinates=points), properties=tags
    )
    features = [
        member("LineString", road.tolist(), highway="service", width="40"),
        member("Polygon", [field.tolist()], landuse="farmland"),
        member("Polygon", [(field * 0 + corner + [1500, 0]).tolist()], building="yes"),
    ]
    crs = dict(type="name", properties=dict(name=f"EPSG:{earth.ZONE}"))
    (root / "map.geojson").write_text(json.dumps(dict(type="FeatureCollection", crs=crs, features=features)))
    of = dict(aerial=("image", "a.tif"), s2=("s2_safe", "s2/*.SAFE"), s1=("s1", "s1.tif"), map=("osm", "map.geojson"))
    (root / "list.toml").write_text(
        "".join(
            f'[[source]]\nname = "{name}"\nkind = "{kind}"\nfiles = "{files}"\nlicence = "CC0-1.0"\n'
            + ('modality = "hr"\n' if kind == "image" else "")
            for name, (kind, files) in of.items()
        )
    )
    manifest, out = root / "manifest", root / "fields & <roads>"
    chosen = [
        "--cells",
        str(CELLS),
        "--require",
        "hr,s2",
        "--validation_share",
        "0.3",
        "--block_km",
        "0.4",
        "--seed",
        "6",
    ]
    plan.main(["--sources", str(root / "list.toml"), "--out", str(manifest), *chosen])
    build.main(["--manifest", str(manifest), "--out", str(out), "--workers", "1", "--places_per_shard", "4"])
    return out


@pytest.fixture(scope="module")
def page(dataset, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    inspect.main([str(dataset), "--out", str(path)])
    return path


def _index(dataset):
    return pq.read_table(dataset / "index.parquet").to_pylist()


def _sample(dataset, row):
    return RecordSource([dataset / f"{row['shard']}.array_record"], ROWS)[row["record"]].decode()


def _near(pixels, colour, *, within=12):
    return (np.abs(pixels.astype(int) - colour) <= within).all(-1)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_page_has_no_fault_on_phone_and_desktop_by_day_and_night(browser, page, width, dark):
    with browser.open(page, width=width, dark=dark) as shown:
        assert shown.problems() == []
        paper = shown.screenshot("h1")[0, -1]
        assert (paper.max() < 40) if dark else (paper.min() > 240)
        assert shown.evaluate("[...document.images].length") > 40
        found = shown.evaluate("[...document.querySelectorAll('h2')].map(e => e.textContent)")
        assert found[:3] == ["Places", "Suspicions", "Samples"]


def test_page_is_one_file_without_script_and_escapes_names(page):
    text = page.read_text()
    assert page.stat().st_size < 2e6
    assert "<script" not in text
    assert not re.search(r"(src|href)=\"(?!#|data:)", text)
    assert "<h1>fields &amp; &lt;roads&gt;</h1>" in text


def test_places_lie_on_the_map_where_they_lie_on_earth(browser, dataset, page):
    rows = {row["id"]: row for row in _index(dataset)}
    assert {row["split"] for row in rows.values()} == {"train", "validation"}
    with browser.open(page, width=1280, dark=True) as shown:
        centres = (
            "(elements, of) => { const map = document.querySelector('svg.map').getBoundingClientRect();"
            " return [...document.querySelectorAll(elements)].map(e => { const box = of(e).getBoundingClientRect();"
            " return [e.textContent, box.x + box.width / 2 - map.x, box.y + box.height / 2 - map.y]; }); }"
        )
        marks = shown.evaluate(f"({centres})('svg.map title', e => e.parentElement)")
        lines = shown.evaluate(f"({centres})('svg.map text', e => e)")
        picture = shown.screenshot("svg.map")
    assert {name.split(",")[0] for name, _, _ in marks} == set(rows)
    for axis, position, letter in ((1, "longitude", "E"), (2, "latitude", "N")):
        degrees = np.array([rows[mark[0].split(",")[0]][position] for mark in marks])
        pixels = np.array([mark[axis] for mark in marks])
        slope, start = np.polyfit(degrees, pixels, 1)
        assert np.abs(slope * degrees + start - pixels).max() < 0.5
        assert slope > 0 if axis == 1 else slope < 0
        labels = [line for line in lines if re.fullmatch(rf"[\d.]+°{letter}", line[0])]
        assert len(labels) >= 2
        for label in labels:  # the graticule says the same degrees as the marks
            assert abs(slope * float(label[0][:-2]) + start - label[axis]) < 2.5
    for name, x, y in marks:
        colour = TRAIN if name.endswith("train") else HELD
        assert _near(picture[round(y), round(x)], colour), name
    assert _near(picture, TRAIN).sum() > 20


def test_thumbnails_are_the_pixels_of_the_sample_and_stripes_its_clouds(browser, dataset, page):
    row = next(row for row in _index(dataset) if row["id"].endswith(f"{earth.WEST + 160}_{earth.NORTH}"))
    series = _sample(dataset, row).series["s2"]
    bands = [MODALITIES["s2"].bands.index(name) for name in ("B4", "B3", "B2")]
    natural = series.images[..., bands].astype(float)
    low, high = np.percentile(natural[series.valid & ~series.cloud], (2, 98))
    wanted = np.clip((natural - low) / (high - low), 0, 1) * 255
    assert 0.1 < series.cloud[1].mean() < 0.5
    anchor = f"[id='{row['shard']}.{row['record']}']"
    strip = f"{anchor} .strips > div:nth-child(3) figure:nth-child"
    with browser.open(page, width=1280) as shown:
        for date in range(3):
            got = shown.screenshot(f"{strip}({date + 1}) .stack")
            assert got.shape == (96, 96, 3)
            blocks = got.reshape(CELLS, 6, CELLS, 6, 3)
            striped = _near(got, STRIPES, within=60).reshape(CELLS, 6, CELLS, 6).any((1, 3))
            np.testing.assert_array_equal(striped, series.cloud[date])
            clear = ~series.cloud[date]
            assert np.abs(blocks[:, 3, :, 3][clear] - wanted[date][clear]).mean() < 4  # JPEG
            assert np.abs(wanted[date][clear] - wanted[(date + 2) % 3][clear]).mean() > 10 or date != 2
        labels = shown.evaluate(f'[...document.querySelectorAll("{anchor} figcaption")].map(e => e.textContent)')
        assert labels[3:] == ["2022-06-01", "2022-06-11", "2022-06-21", "2022-06-14 ascending"]
        shown.evaluate("document.querySelector('#overlays').click()")
        bare = shown.screenshot(f"{strip}(2) .stack")
    assert not _near(bare, STRIPES, within=60).any()
    assert np.abs(bare.reshape(CELLS, 6, CELLS, 6, 3)[:, 3, :, 3] - wanted[1]).mean() < 4


def test_label_map_is_shown_in_its_colours_and_over_the_imagery(browser, dataset, page):
    row = next(row for row in _index(dataset) if row["id"].endswith(f"{earth.WEST + 320}_{earth.NORTH}"))
    sample = _sample(dataset, row)
    anchor = f"[id='{row['shard']}.{row['record']}'] .strips > div"
    with browser.open(page, width=1280) as shown:
        opaque, over = (shown.screenshot(f"{anchor}:nth-child(2) figure:nth-child({n}) .stack") for n in (1, 2))
        bare = shown.screenshot(f"{anchor}:nth-child(1) figure .stack")
        legend = shown.evaluate(
            f'[...document.querySelectorAll("{anchor.split()[0]} .legend li")].map(e => e.textContent)'
        )
        alt = shown.evaluate(f'document.querySelector("{anchor}:nth-child(2) img").alt')
    size = len(opaque)
    centres = (np.arange(64) + 0.5) / 64
    at = np.floor(centres * size).astype(int)
    ids = sample.labels[:: len(sample.labels) // 64, :: len(sample.labels) // 64]
    road = OSM.classes.index("road") + 1
    assert set(np.unique(ids)) == {0, road}
    inner = np.zeros_like(ids, bool)
    inner[:, 1:-1] = (ids[:, 1:-1] == ids[:, :-2]) & (ids[:, 1:-1] == ids[:, 2:])  # not where two colours are blended
    colours = np.concatenate(([(209, 209, 209)], np.rint(label_colours(OSM.classes) * 255))).astype(int)
    assert _near(opaque[np.ix_(at, at)], colours[ids], within=3)[inner].all()
    moved = np.abs(over.astype(int) - bare).mean(-1)[np.ix_(at, at)]
    assert moved[inner & (ids == road)].mean() > 15
    assert moved[inner & (ids == 0)].mean() < 2
    assert alt.startswith("label map, 160 m across: road 25%")
    assert legend == ["road 25%"]


def test_tables_say_what_the_dataset_has(browser, dataset, page):
    rows, statistics = _index(dataset), json.loads((dataset / "statistics.json").read_text())
    with browser.open(page, width=1280) as shown:
        tables = shown.evaluate(
            "Object.fromEntries([...document.querySelectorAll('table')].map(t => [t.caption.textContent,"
            " [...t.tBodies[0].rows].map(r => [...r.cells].map(c => c.textContent))]))"
        )
    having = {row[0]: row[1:] for row in tables["What samples have"]}
    assert having["s2"][:4] == ["10 m", str(len(rows)), "0", str(sum(row["dates_s2"] for row in rows))]
    assert having["hr"][0] == "0.3125 m"
    (caption,) = (name for name in tables if name.startswith("s2, "))
    assert caption == f"s2, {statistics['s2']['pixels']:,} valid pixels of all samples to train on"
    b8 = next(row for row in tables[caption] if row[0] == "B8")
    place = MODALITIES["s2"].bands.index("B8")
    assert b8[1] == f"{statistics['s2']['mean'][place]:,.0f}"
    assert float(b8[5]) == pytest.approx((statistics["s2"]["mean"][place] - 2517.761) / 1474.789, abs=0.005)
    classes = {row[0]: row for name, t in tables.items() if name.startswith(f"{len(rows)} label maps") for row in t}
    pixels = np.array([row["classes"] for row in rows])
    for name, number in (("road", OSM.classes.index("road") + 1), ("nothing mapped", 0)):
        assert classes[name][1] == f"{pixels[:, number].sum() / pixels.sum():.2%}"
        assert classes[name][3] == str((pixels[:, number] > 0).sum())
    told = {row[0]: row[1] for row in tables["The gravest first"]}
    assert told["offset in the numbers"] == str(len(rows))
    assert set(told) >= {"nothing on the map"}


def test_pixels_without_data_and_dates_that_were_left_out_are_summed_up(dataset, page):
    samples = [_sample(dataset, row) for row in _index(dataset)]
    rejected = [json.loads(line) for line in (dataset / "rejected.jsonl").read_text().splitlines()]
    card = (dataset / "README.md").read_text()
    for name in ("hr", "s2", "s1"):
        missing = np.mean([(~sample.series[name].valid).mean() for sample in samples])
        left_out = sum(entry["what"] == "date" and f" {name}: " in entry["name"] for entry in rejected)
        if name == "s2":
            assert (0.01 < missing < 0.1, left_out > 0) == (True, True)
        cells = re.search(rf'<th scope="row">{name}</th>(.*?)</tr>', page.read_text())[1]
        cells = [html.unescape(cell) for cell in re.findall(r"<td[^>]*>([^<]*)</td>", cells)]
        dates = sum(len(sample.series[name].days) for sample in samples)
        hidden = np.mean([sample.series[name].cloud.mean() for sample in samples])
        assert cells[1:-1] == [str(len(samples)), "0", str(dates), str(left_out), f"{hidden:.1%}", f"{missing:.1%}"]
        assert f"| {len(samples)} | {dates} | {left_out} | {hidden:.1%} | {missing:.1%} |\n" in card


def test_reason_has_an_example_with_its_numbers_and_suspicions_are_all_listed(dataset, page):
    text = html.unescape(page.read_text())
    rejected = [json.loads(line) for line in (dataset / "rejected.jsonl").read_text().splitlines()]
    assert len(rejected) > 5
    shown = re.findall(r'<td class="words">([^<]*)</td><td class="words">([^<]*)</td></tr>', text)
    examples = {f"{entry['name']}: {entry['reason']}" for entry in rejected}
    assert shown
    for reason, example in shown:
        assert example in examples
        assert re.search(r"\d", example)
        assert reason.count("#") > 0 or reason in example
    with page.with_suffix(".csv").open(newline="") as file:
        listed = list(csv.DictReader(file))
    counts = Counter(row["suspicion"] for row in listed)
    told = re.findall(r'<span id="\w+">([^<]*)</span></th><td class="number">([\d,]+)</td>(.*?)</tr>', text)
    assert {title: int(number) for title, number, _ in told} == counts
    places = {(row["shard"], row["record"]): row["id"] for row in _index(dataset)}
    assert all(places[row["file"], int(row["record"])] == row["sample"] for row in listed)
    more = {title: (words.count("<a "), re.search(r" and (\d+) more\.", words)) for title, _, words in told}
    for title, (links, further) in more.items():
        assert links <= 5
        assert bool(further) == (links > 0 and counts[title] > links)
        assert further is None or int(further[1]) == counts[title] - links
    assert any(links == 5 and further for links, further in more.values())
    assert "in the CSV file beside this page" in text


def test_index_of_an_older_build_says_that_missing_pixels_were_not_counted(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "old")
    table = pq.read_table(dataset / "index.parquet")
    names = [name for name in table.column_names if name.startswith("missing_")]
    assert len(names) == 3
    pq.write_table(table.drop_columns(names), tmp_path / "old" / "index.parquet")
    assert inspect.inspect(tmp_path / "old", num_samples=1).count(">not counted<") == 3


def test_figures_that_a_build_wrote_are_those_of_its_records(dataset):
    wanted = {(row["shard"], row["record"], name): row for row in _index(dataset) for name in ("s2", "s1")}
    table = pa.dataset.dataset(sorted((dataset / "parts").glob("*.parquet"))).to_table().to_pylist()
    assert len(table) == 3 * len(_index(dataset))
    for entry in table:
        where = (entry["shard"], entry["record"], entry["modality"])
        if where in wanted:  # the others lost something to JPEG
            again = figures.measure(_sample(dataset, wanted[where]), ROWS, shard=where[0], record=where[1])
            assert next(e["digest"] for e in again if e["modality"] == where[2]) == entry["digest"]


def test_histograms_count_the_pixels_of_the_dataset(dataset, page):
    pixels = [_sample(dataset, row).series["s2"] for row in _index(dataset) if row["split"] == "train"]
    numbers = np.concatenate([series.images[..., 2][series.valid] for series in pixels]).astype(float)
    text = page.read_text()
    (svg,) = re.findall(r'<svg[^>]*aria-label="Histogram of s2 B4:.*?</svg>', text)
    low, high = map(float, re.search(r"shown from (\S+) to (\S+)\"", html.unescape(svg)).groups())
    bars = re.findall(r"M([\d.]+) [\d.]+v-([\d.]+)h", re.search(r'd="(M[^"]*)" class="bar"', svg)[1])
    x, heights = (np.array([float(bar[i]) for bar in bars]) for i in (0, 1))
    step = np.diff(x).min()
    places = np.rint((x - 6) / step).astype(int)
    num = round(288 / step)
    counts = np.histogram(numbers, np.linspace(low, high, num + 1))[0]
    drawn = np.zeros(num)
    drawn[places] = heights
    assert np.abs(drawn / drawn.max() - counts / counts.max()).max() < 0.08  # edges are written with four digits
    mean = re.search(r"mean ([\d.]+);", svg)[1]
    assert float(mean) == pytest.approx(numbers.mean(), rel=1e-3)


def test_same_dataset_gives_the_same_bytes(dataset, page, tmp_path):
    inspect.main([str(dataset), "--out", str(tmp_path / "again.html")])
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()


def test_figures_that_an_older_build_lacks_are_measured_on_some(dataset, browser, tmp_path):
    shutil.copytree(dataset, tmp_path / "old")
    shutil.rmtree(tmp_path / "old" / "parts")
    inspect.main([str(tmp_path / "old"), "--examine", "3", "--num_samples", "2"])
    with browser.open(tmp_path / "old" / "inspect.html", width=390) as shown:
        assert shown.problems() == []
        text = shown.evaluate("document.body.innerText")
    num = len(_index(dataset))
    assert f"Pixels were measured of 3 of {num} samples." in text
    assert "of 3 samples that were read" in text


def test_many_places_are_counted_in_cells_and_none_is_lost(dataset, browser, tmp_path):
    """An index of thousands of rows that all name records which are there."""
    rng, rows = np.random.default_rng(0), _index(dataset)
    shutil.copytree(dataset, tmp_path / "many")
    many = []
    for number in range(3000):
        row = {**rows[number % len(rows)], "id": f"place-{number}"}
        many.append({**row, "longitude": rng.uniform(-179, 179), "latitude": rng.normal(20, 25)})
    pq.write_table(pa.Table.from_pylist(many), tmp_path / "many" / "index.parquet", row_group_size=700)
    inspect.main([str(tmp_path / "many"), "--num_samples", "1"])
    with browser.open(tmp_path / "many" / "inspect.html", width=1280) as shown:
        assert shown.problems() == []
        titles = shown.evaluate("[...document.querySelectorAll('svg.map rect.cell title')].map(t => t.textContent)")
        heading = shown.evaluate("document.querySelector('h1 + p').textContent")
    counts = np.array([[int(n) for n in re.findall(r"\d+", title)] for title in titles]).sum(0)
    held = sum(row["split"] == "validation" for row in many)
    assert counts.tolist() == [3000 - held, held]
    assert heading.startswith("3,000 samples")


# ---- a folder of records


def test_rows_that_the_table_lacks_are_shown(converted, browser, tmp_path):
    inspect.main([str(converted.out), "--out", str(tmp_path / "mix.html"), "--num_samples", "40"])
    with browser.open(tmp_path / "mix.html", width=390) as shown:
        assert shown.problems() == []
        titles = set(shown.evaluate("[...document.querySelectorAll('h5')].map(e => e.textContent)"))
        bands = shown.evaluate("[...document.querySelectorAll('svg.histogram .name')].map(e => e.textContent)")
    assert titles >= {"pan: PAN", "naip: R G B", "hr: R G B", "OpenStreetMap"}
    assert bands.count("NIR") == bands.count("PAN") == bands.count("B12") == bands.count("VH") == 1


@pytest.fixture
def records(tmp_path):
    """Two files without an index; the pixels of one record are damaged, and a licence would like to be a script."""
    payloads = []
    for seed in range(5):
        sample = make_sample(seed, extent_cells=4, name=f"<b>{seed}</b>", dates=dict(hr=1, s2=seed + 1))
        payloads.append(encode_sample(dataclasses.replace(sample, licence="<script>alert(1)</script>"), ROWS))
    broken = bytearray(payloads[3])
    broken[-20] ^= 1
    payloads[3] = bytes(broken)
    folder = tmp_path / "records"
    folder.mkdir()
    for name, part in (("train-00000-of-00001", payloads[:3]), ("test-00000-of-00001", payloads[3:])):
        with ShardWriter(folder / f"{name}.array_record") as writer:
            for payload in part:
                writer.write(payload)
    return folder


def test_folder_of_records_is_read_and_damage_comes_first(records, browser):
    inspect.main([str(records)])
    with browser.open(records / "inspect.html", width=390, dark=True) as shown:
        assert shown.problems() == []
        text = shown.evaluate("document.body.innerText")
        names = shown.evaluate("[...document.querySelectorAll('h4')].map(e => e.textContent)")
    assert names[0] == "test-00000-of-00001, record 0"
    assert sorted(names[1:]) == [f"<b>{seed}</b>" for seed in (0, 1, 2, 4)]
    assert "5 samples (1 test, 3 train)" in text
    assert "The folder has no index: what follows is of 4 of 5 samples" in text
    assert "cannot be read: " in text
    assert "the block is damaged (checksum)" in text
    assert "<script>alert(1)</script>" in text


def test_what_is_drawn_does_not_depend_on_what_else_is_there(records):
    few, more = ([f"place-{number}" for number in range(num)] for num in (40, 80))
    of_few = {few[place] for place in drawn(few, num=10, seed=3)}
    of_more = {more[place] for place in drawn(more, num=10, seed=3)}
    assert len(of_few) == len(of_more) == 10
    assert of_more & set(few) <= of_few
    assert of_few != {few[place] for place in drawn(few, num=10, seed=4)}
    first = inspect.inspect(records, num_samples=2, examine=2)
    assert first == inspect.inspect(records, num_samples=2, examine=2)
    assert re.search("of [12] of 5 samples", first)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere"], "nowhere is no folder; wanted one that ingest.build wrote"),
        (["."], "has neither index.parquet nor *.array_record files"),
        ([".", "--num_samples", "-1"], "--num_samples: wanted 0 or more"),
        ([".", "--out", "x.csv"], "--out: got x.csv; wanted another ending than .csv"),
    ],
)
def test_what_is_no_dataset_is_refused_with_words(arguments, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        inspect.main(arguments)
    assert told in capsys.readouterr().err
