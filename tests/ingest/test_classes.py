"""Label maps of a user's own classes: from a list of sources to what a run trains on, and what must agree."""

import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
import tensorflow_datasets as tfds

from configs import tiny
from skysense_jax import assembly, config_checks, dry_run
from skysense_jax.data.checks import RecordError
from skysense_jax.data.records import RecordSource
from skysense_jax.data.text import load_text_table, make_table
from skysense_jax.ingest import build, inspect, osm, plan
from skysense_jax.ingest import tfds as tfds_dataset
from skysense_jax.ingest.rasters import Square
from skysense_jax.modalities import MODALITIES, OSM, label_map
from tests.ingest import earth

NAMES = ("yard", "greenhouse", "lane")  # from the ground up
CLASSES = """
[[class]]
name = "yard"
text = "the yard of a farm"
[[class]]
name = "greenhouse"
text = "greenhouses, glass roofs side by side"
[[class]]
name = "lane"
width_m = 15.0
"""
TAGS = "tag,values,class\nlanduse,farmyard,yard\nbuilding,greenhouse,greenhouse\nhighway,,lane\n"
SIDE = 240  # metres of a place
SQUARE = Square(704_160.0, 5_503_920.0, SIDE // 10, plan.places.CRS.from_epsg(earth.ZONE))


def _geojson(path):
    """A yard over all of the square, a greenhouse over its western half, a lane along its middle row."""
    west, south, east, north = SQUARE.bounds
    shapes = [
        (shapely.box(west - 90, south - 90, east + 90, north + 90), dict(landuse="farmyard")),
        (shapely.box(west, south, west + SIDE / 2, north), dict(building="greenhouse")),
        (shapely.LineString([(west - 90, south + 122.5), (east + 90, south + 122.5)]), dict(highway="track")),
        (shapely.LineString([(west, south), (east, north)]), dict(landuse="farmyard")),  # lines of it have no width
    ]
    features = [dict(type="Feature", geometry=shapely.geometry.mapping(s), properties=tags) for s, tags in shapes]
    crs = dict(type="name", properties=dict(name=f"EPSG:{earth.ZONE}"))
    path.write_text(json.dumps(dict(type="FeatureCollection", crs=crs, features=features)))


def _list(folder, classes=CLASSES, tags='tags = "tags.csv"'):
    path = folder / "list.toml"
    path.write_text(
        '[[source]]\nname = "r"\nkind = "s1"\nfiles = "s1.tif"\nlicence = "x"\n'
        f'[[source]]\nname = "map"\nkind = "osm"\nfiles = "map.geojson"\nlicence = "ODbL-1.0"\n{tags}\n{classes}'
    )
    return path


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    west, _, _, north = SQUARE.bounds
    earth.write_radar(folder / "s1.tif", west=west - 30, north=north + 30, side_m=SIDE + 60)
    _geojson(folder / "map.geojson")
    (folder / "tags.csv").write_text(TAGS)
    arguments = ["--sources", str(_list(folder)), "--out", str(folder / "m"), "--cells", str(SIDE // 10)]
    plan.main([*arguments, "--validation_share", "0"])
    build.main(["--manifest", str(folder / "m"), "--out", str(folder / "d"), "--workers", "1"])
    table = folder / "table.npz"
    labels = make_table.classes_of(folder / "list.toml")
    np.savez(table, classes=labels.classes, prompts=labels.prompts, embeddings=np.eye(3, 5, dtype=np.float32))
    return folder


def _config(dataset, classes=NAMES):
    config = tiny.get_config()
    config.data.modalities = ("s1",)
    config.data.sources = ((str(dataset / "d" / "*.array_record"), 1.0),)
    config.data.batch_size = 2
    config.data.label_classes = classes
    config.objective.text_table, config.model.text_dim = str(dataset / "table.npz"), 5
    config.run.input_workers = 0
    return config


def test_users_own_classes_are_drawn_from_the_ground_up_and_named(dataset):
    source = RecordSource(str(dataset / "d" / "*.array_record"), (MODALITIES["s1"],), label_map(NAMES))
    samples = {source[i].id: source[i].decode() for i in range(len(source))}
    found = samples[f"{earth.ZONE}_{SQUARE.west:.0f}_{SQUARE.north:.0f}"].labels
    wanted = np.full((SIDE * 4 // 10,) * 2, 1)
    wanted[:, : wanted.shape[1] // 2] = 2
    wanted[44:50] = 3  # of 2.5 m: the lane's 15 m lie 110 to 125 m from the north
    np.testing.assert_array_equal(found, wanted)
    (row,) = (r for r in pq.read_table(dataset / "d" / "index.parquet").to_pylist() if r["id"] in samples)
    assert row["classes"] == np.bincount(wanted.ravel(), minlength=4).tolist()
    card = (dataset / "d" / "README.md").read_text()
    assert [line.split(" | ")[0].strip("| ") for line in card.splitlines()[-3:]] == list(NAMES)


def test_names_and_texts_are_those_of_the_text_table(dataset):
    labels = make_table.classes_of(dataset / "list.toml")
    assert labels.classes == NAMES
    assert labels.prompts == ("the yard of a farm", "greenhouses, glass roofs side by side", "lane")
    assert labels == osm.read_classes(json.loads((dataset / "m" / "sources.json").read_text())["classes"]).map
    load_text_table(dataset / "table.npz", labels.classes)
    with pytest.raises(ValueError, match=r"has 0 entries \[\[class\]\]"):
        make_table.classes_of(_list(dataset, classes=""))


def test_run_reads_them_where_config_data_and_text_table_agree(dataset):
    config = _config(dataset)
    config_checks.validate(config)
    pipeline = assembly.make_pipeline(config)
    pipeline.check_sources()
    element = next(iter(pipeline))
    dry_run.check_element(element, assembly.batch_shapes(config, (MODALITIES["s1"],)), num_samples=2)
    shares = element["global_views"]["labels"]
    assert shares.shape[-1] == 3
    np.testing.assert_allclose(shares.sum(-1), 1, atol=2e-3)  # all of the ground is mapped
    assert assembly.assemble(config).labels.classes == NAMES


@pytest.mark.parametrize(("classes", "names"), [((), list(OSM.classes)), (NAMES[::-1], list(NAMES[::-1]))])
def test_run_with_other_classes_than_its_records_is_refused(dataset, classes, names):
    config = _config(dataset, classes)
    with pytest.raises(ValueError, match=r"none of . records looked at can be used: .*label classes") as told:
        assembly.make_pipeline(config).check_sources()
    assert f"label classes {list(NAMES)}; wanted {names}, as config.data.label_classes says" in str(told.value)
    with pytest.raises(ValueError, match=r"text_table: .*is for the classes \('yard', .* as config.data.label_classes"):
        config_checks.validate(config)
    with pytest.raises(RecordError, match=r"as config.data.label_classes says"):
        RecordSource(config.data.sources[0][0], (MODALITIES["s1"],), label_map(classes))[0]


def test_scenes_have_their_own_classes(dataset):
    config = _config(dataset)
    config.data.sources = (*config.data.sources, ("scenes", 1.0))
    with pytest.raises(ValueError, match=r"config.data.label_classes: got .* with scenes among config.data.sources"):
        config_checks.validate(config)
    config = _config(dataset, ("a", "a", "b"))
    with pytest.raises(ValueError, match=r"config.data.label_classes: got classes .*; wanted names, each once"):
        config_checks.validate(config)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('name = "lane"', "", r"[[class]] 3: {'width_m': 15.0}; wanted a name"),
        ("width_m = 15.0", 'width_m = "15"', "[[class]] 'lane': width_m = '15'; wanted"),
        ("width_m = 15.0", "width_m = 0", "and width_m above 0 or left out"),
        ("width_m = 15.0", "width = 15", "[[class]] 'lane': width = 15; wanted name and text"),
        ('name = "lane"', 'name = "yard"', "wanted names, each once"),
        ('tags = "tags.csv"', "", "source 'map': tags is missing: the list has classes of its own"),
        ("[[class]]", "[[clas]]", "line 2: class 'yard'; wanted one of ('water'"),
    ],
)
def test_classes_that_cannot_be_are_refused(dataset, capsys, old, new, told):
    path = _list(dataset)
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(SystemExit):
        plan.main(["--sources", str(path), "--out", str(dataset / "never")])
    assert told in capsys.readouterr().err
    assert not (dataset / "never").exists()


def test_without_classes_of_its_own_a_list_has_ours():
    assert osm.read_classes(()) is osm.CLASSES
    assert label_map() is OSM


def test_page_and_tensorflow_datasets_read_them_by_the_dataset_s_own_words(dataset, tmp_path):
    page = inspect.inspect(dataset / "d", num_samples=4)
    shares = dict(re.findall(r'scope="row"><span[^>]*></span>([^<]*)</th><td[^>]*>([\d.]+%)', page))
    rows = pq.read_table(dataset / "d" / "index.parquet", columns=["classes"])["classes"].to_pylist()
    total = np.sum(rows, axis=0)
    wanted = {name: f"{num / total.sum():.2%}" for name, num in zip(("nothing mapped", *NAMES), total)}
    assert shares == wanted
    assert "cannot be read" not in page
    tfds_dataset.prepare(dataset / "d", tmp_path)
    source = tfds.data_source(tfds_dataset.SkysenseSamples.name, data_dir=tmp_path, split="train")
    records = RecordSource(str(dataset / "d" / "*.array_record"), (MODALITIES["s1"],), label_map(NAMES))
    for element, record in zip(source, (records[i] for i in range(len(records))), strict=True):
        np.testing.assert_array_equal(element["labels"], record.decode().labels)
    assert "greenhouse" in source.dataset_info.features["labels"].doc.desc
