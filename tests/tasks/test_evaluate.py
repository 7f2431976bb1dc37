"""The command from a model and a folder to a table and a file; everything wrong is said before an image is encoded."""

import dataclasses
import json
import re
import subprocess
import sys

import made_folders
import pytest

from skysense_jax.eval.__main__ import main
from skysense_jax.tasks import evaluate, finetune, frozen
from skysense_jax.tasks.cards import CARDS
from skysense_jax.tasks.evaluate import Request

_FEW_CLASSES = {name: dataclasses.replace(CARDS[name], num_classes=0) for name in ("aid", "resisc45", "fmow_s2")}


@pytest.fixture
def _few_classes(monkeypatch):
    """Cards that do not count the classes."""
    monkeypatch.setattr(evaluate, "CARDS", {**CARDS, **_FEW_CLASSES})


def test_command_on_maps_of_two_sensors_prints_and_writes_what_it_found(model_dir, tmp_path, capsys):
    folder = made_folders.own_maps(tmp_path / "mine")
    for protocol in ("linear", "knn"):
        main([f"--model={model_dir}", f"--dataset={folder}", f"--protocol={protocol}", f"--out={tmp_path / 'out'}"])
    text = capsys.readouterr().out
    results = [json.loads(path.read_text()) for path in sorted((tmp_path / "out").iterdir())]
    assert [path.name.rpartition("-")[0] for path in sorted((tmp_path / "out").iterdir())] == [
        "mine-segmentation-knn-s2_s1-train0.67-label1-seed0",
        "mine-segmentation-linear-s2_s1-train0.67-label1-seed0",
    ]
    for result in results:
        assert result["model"]["name"] == "task at step 4, exported"
        assert (result["modalities"], result["unseen"]) == (["s2", "s1"], [])
        assert (result["num_train"], result["num_test"]) == (2, 1)
        assert result["published"][0]["note"] == "published by others, fine-tuned on the whole protocol; not run here"
        scores = result["scores"]
        assert 0 <= scores["miou"] <= scores["accuracy"] <= 1
        assert f"miou                         {100 * scores['miou']:7.2f} %" in text
    assert results[1]["scores"]["miou"] > 0.3  # random weights keep what differs as plainly as this
    assert "model     task at step 4, exported (s2, s1)\n" in text
    assert "dataset   mine, segmentation, 3 classes; 2 to train on, 1 to test on" in text
    assert "published by others, fine-tuned on the whole protocol; not run here:\n  Someone" in text


@pytest.mark.usefixtures("without_weights")
def test_rows_that_the_model_never_saw_are_told(tmp_path, monkeypatch):
    """So that nobody takes the score of one sensor for that of two."""
    folder = made_folders.own_maps(tmp_path)
    card = json.loads((folder / "card.json").read_text())
    card["sources"]["naip"] = dict(files="x/{name}.tif")
    (folder / "card.json").write_text(json.dumps(card))
    monkeypatch.setattr(frozen, "evaluate", lambda *_, protocols: {protocol: {"miou": 0.5} for protocol in protocols})
    with pytest.raises(ValueError, match="--l1c_as_s2: mine has s2, s1, naip, the model reads hr, s2, s1"):
        evaluate.evaluate(Request(model="", dataset=str(folder), l1c_as_s2=True))
    for modalities in ((), ("s2",)):
        found = evaluate.evaluate(Request(model="", dataset=str(folder), modalities=modalities))
        assert found["modalities"] == list(modalities or ("s2", "s1"))
        assert (found["unseen"], found["bare"]) == (["naip"], {})  # s1 was not asked for
        line = evaluate.table(found).splitlines()[0]
        assert line.endswith(f"({', '.join(found['modalities'])}); not read, as it has never seen them: naip")


@pytest.mark.usefixtures("without_weights")
def test_level_1c_is_read_as_s2_or_told(tmp_path, monkeypatch):
    folder = made_folders.own_maps(tmp_path)
    card = json.loads((folder / "card.json").read_text())
    card["sources"]["s2_l1c"] = card["sources"].pop("s2")
    (folder / "card.json").write_text(json.dumps(card))
    monkeypatch.setattr(frozen, "evaluate", lambda *_, protocols: {protocol: {"miou": 0.5} for protocol in protocols})
    request = Request(model="", dataset=str(folder))
    found = evaluate.evaluate(request)
    assert (found["modalities"], found["unseen"]) == (["s1"], ["s2_l1c"])
    found = evaluate.evaluate(dataclasses.replace(request, l1c_as_s2=True))
    assert (found["modalities"], found["unseen"]) == (["s2", "s1"], [])
    with pytest.raises(ValueError, match="--l1c_as_s2: mine has s1, s2_l1c, the model reads s1; wanted"):
        evaluate.evaluate(dataclasses.replace(request, l1c_as_s2=True, modalities=("s1",)))


@pytest.mark.usefixtures("without_weights")
def test_examples_without_a_sensor_are_told_and_only_all_of_them_are_refused(tmp_path, monkeypatch):
    folder = made_folders.labelled_records(tmp_path / "records", without_s1=("train/0", "train/2", "test/3"))
    monkeypatch.setattr(frozen, "evaluate", lambda *_, protocols: {protocol: {"miou": 0.5} for protocol in protocols})
    request = Request(model="", dataset=str(folder), task="segmentation", modalities=("s1",))
    found = evaluate.evaluate(request)
    assert found["bare"] == {"train": 0.5, "test": 0.25}
    told = "50% of the train and 25% of the test examples looked at (16 at most) have none of s1"
    assert told in evaluate.table(found)
    both = evaluate.evaluate(dataclasses.replace(request, modalities=()))
    assert both["bare"] == {"train": 0.0, "test": 0.0}
    assert "looked at" not in evaluate.table(both)
    nothing = made_folders.labelled_records(tmp_path / "none", without_s1=[f"train/{i}" for i in range(4)])
    with pytest.raises(ValueError, match="--dataset: 'train/0' and all others looked at in train have none of s1"):
        evaluate.evaluate(dataclasses.replace(request, dataset=str(nothing)))


@pytest.mark.usefixtures("loaded_once")
def test_command_fine_tunes_with_what_it_is_told(model_dir, tmp_path, capsys):
    folder = made_folders.own_maps(tmp_path / "mine")
    said = ["num_steps=2", "warmup_steps=1", "batch_size=2", "decoder_width=8", "freeze=True"]
    tune = [f"--tune={entry}" for entry in said]
    main([f"--model={model_dir}", f"--dataset={folder}", "--protocol=finetune", f"--out={tmp_path / 'out'}", *tune])
    assert "protocol  finetune, seed 0" in capsys.readouterr().out
    (result,) = (json.loads(path.read_text()) for path in (tmp_path / "out").iterdir())
    assert result["protocol"] == "finetune"
    assert result["asked"]["tune"] == said
    assert 0 <= result["scores"]["miou"] <= result["scores"]["accuracy"] <= 1


def test_values_of_tune_are_of_the_kind_of_their_field(tmp_path):
    made_folders.own_maps(tmp_path)
    said = ("freeze=false", "learning_rate=1", "overlap=2.5e-1", "features=fused", "num_steps=107")
    request = Request(model="", dataset=str(tmp_path), protocol="finetune", tune=said)
    found = evaluate._tuning(request, evaluate.asked_dataset(request)[0])
    assert found == finetune.Options(freeze=False, learning_rate=1.0, overlap=0.25, features="fused", num_steps=107)


@pytest.mark.usefixtures("without_weights")
def test_images_are_cut_into_larger_parts_to_fine_tune_on(tmp_path, monkeypatch):
    """So that windows have places to be drawn from, and overlap."""
    made_folders.potsdam(tmp_path, side=(32 * 40, 32 * 44))
    seen = []
    monkeypatch.setattr(finetune, "finetune", lambda model, train, test, **how: seen.append(train) or {"miou": 0.5})
    request = Request(model="", dataset=f"potsdam:{tmp_path}", protocol="finetune")
    for asked in (request, dataclasses.replace(request, tile_cells=20)):
        evaluate.evaluate(asked)
    assert [[example.before.extent_cells for example in train] for train in seen] == [[40] * 2, [20] * 12]
    assert all((example.target != 255).all() for train in seen for example in train)
    request = dataclasses.replace(request, protocol="knn", tile_cells=20)
    _, splits = evaluate.labelled(request, evaluate.load("", None, None), *evaluate.asked_dataset(request))
    assert [(example.target != 255).mean() for example in splits["train"]] == [1, 1, 0.2] * 4


@pytest.mark.usefixtures("without_weights")
def test_no_more_dates_are_encoded_than_the_dataset_has(tmp_path):
    made_folders.own_maps(tmp_path / "mine")
    records = made_folders.labelled_records(tmp_path / "records")
    for dataset, task, wanted in (
        (tmp_path / "mine", None, dict(hr=1, s2=1, s1=1)),
        (records, "segmentation", dict(hr=1, s2=2, s1=1)),
        (records, "multi_label", dict(hr=1, s2=2, s1=1)),
    ):
        request = Request(model="", dataset=str(dataset), task=task, protocol="linear")
        model = evaluate.load("", None, None)
        assert dict(model.num_dates) == dict(hr=1, s2=2, s1=2)
        found, splits = evaluate.labelled(request, model, *evaluate.asked_dataset(request))
        has = {name: max(len(e.before.days(name)) for part in splits.values() for e in part) for name in ("s2", "s1")}
        assert found.num_dates == wanted
        assert {name: min(2, most) for name, most in has.items()} == {name: wanted[name] for name in has}


@pytest.mark.usefixtures("loaded_once")
def test_records_with_label_maps_or_scene_classes(model_dir, tmp_path):
    folder = made_folders.labelled_records(tmp_path / "records")
    common = dict(model=str(model_dir), protocol="linear")
    maps = evaluate.evaluate(Request(dataset=str(folder), task="segmentation", **common))
    assert maps["dataset"]["classes"][:2] == ["water", "wetland"]
    assert (maps["num_train"], maps["num_test"], maps["train_share"]) == (4, 4, None)
    assert 0 < maps["scores"]["accuracy"] <= 1
    of_glob = evaluate.evaluate(Request(dataset=f"{folder}/t*.array_record", task="segmentation", **common))
    assert of_glob["scores"] == maps["scores"]
    several = evaluate.evaluate(
        Request(dataset=f"bigearthnet:{folder}", label_share=0.75, modalities=("s2", "s1"), **common)
    )
    assert several["dataset"]["classes"] == ["dark", "dry", "wet"]
    assert several["task"] == "multi_label"
    assert several["num_train"] == 3
    assert set(several["scores"]) == {"map_micro", "map_macro"}
    assert several["published"][-1]["value"] == 93.78
    with pytest.raises(ValueError, match="'train/0' has several classes; wanted --task=multi_label"):
        evaluate.evaluate(Request(dataset=str(folder), task="scene", **common))


@pytest.mark.usefixtures("_few_classes", "loaded_once")
def test_scenes_and_change_of_pictures(model_dir, tmp_path):
    made_folders.class_folders(tmp_path / "aid", each=5)
    request = Request(model=str(model_dir), dataset=f"aid:{tmp_path / 'aid'}", train_share=0.6, label_share=0.34)
    found = evaluate.evaluate(request)
    assert (found["num_train"], found["num_test"], found["task"]) == (2, 4, "scene")
    assert found["scores"] == {"accuracy": 1.0}  # two flat colours
    assert found == evaluate.evaluate(request)
    made_folders.levir(tmp_path / "levir", side=60)
    found = evaluate.evaluate(
        Request(model=str(model_dir), dataset=f"levir_cd:{tmp_path / 'levir'}", protocol="linear")
    )
    assert set(found["scores"]) == {"f1", "iou", "precision", "recall", "accuracy"}


@pytest.fixture
def _nothing_is_encoded(monkeypatch):
    def encode(*args, **kwargs):
        raise AssertionError("encoded")

    monkeypatch.setattr(frozen, "encode", encode)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One of each, read by every wrong request."""
    root = tmp_path_factory.mktemp("folders")
    made_folders.own_maps(root / "mine")
    made_folders.class_folders(root / "aid")
    made_folders.oscd(root / "oscd")
    made_folders.labelled_records(root / "records", splits=("one",), each=2)
    (root / "empty").mkdir()
    made_folders.own_maps(root / "single")
    for path in (root / "single").rglob("[12].tif"):
        path.unlink()
    (root / "naip").mkdir()
    card = json.loads((root / "mine/card.json").read_text())
    card["sources"] = dict(naip=dict(files="x/{name}.tif"))
    (root / "naip/card.json").write_text(json.dumps(card))
    bare = made_folders.labelled_records(root / "bare", splits=("one",), each=1)
    (bare / "index.parquet").unlink()
    return root


@pytest.mark.usefixtures("_nothing_is_encoded", "without_weights")
@pytest.mark.parametrize(
    ("dataset", "changes", "match"),
    [
        ("mine", dict(tune=("num_steps=3",)), "--tune: got 'num_steps=3' with --protocol=knn; wanted finetune"),
        (
            "mine",
            dict(protocol="finetune", tune=("steps=3",)),
            "--tune: got 'steps=3'; wanted FIELD=VALUE",
        ),
        (
            "mine",
            dict(protocol="finetune", tune=("num_steps=0",)),
            "--tune: options.num_steps: got 0; wanted 1",
        ),
        (
            "mine",
            dict(protocol="finetune", tune=("freeze=no",)),
            "--tune: freeze: got 'no'; wanted True or False",
        ),
        ("mine", dict(protocol="finetune", tune=("num_steps=2e3",)), "num_steps: got '2e3'; wanted a whole number"),
        ("mine", dict(protocol="finetune", batch_size=4), "--batch_size: got 4 .*, or --tune=FIELD=VALUE"),
        ("mine", dict(protocol="finetune", max_cells=9), "--max_cells: got 9 with --protocol=finetune"),
        ("mine", dict(protocol="finetune", tile_cells=3), "--tile_cells: got 3; wanted the 4 cells of a window"),
        ("single", dict(protocol="finetune"), "--dataset: no example in test"),
        ("mine", dict(protocol="svm"), "--protocol: got 'svm'; wanted one of knn, linear, finetune"),
        ("mine", dict(task="scene"), "--task: got scene; the card 'mine' is of segmentation"),
        ("mine", dict(task="detection"), "--task: got 'detection'; wanted one of"),
        ("mine", dict(label_share=0.0), "--label_share: got 0; wanted above 0, at most 1"),
        ("mine", dict(train_share=1.0), "--train_share: got 1; wanted above 0, below 1"),
        ("mine", dict(batch_size=0), "--batch_size: got 0"),
        ("mine", dict(gsd_m=0.3), "--gsd_m: got 0.3; the size of mine's pixels is known"),
        ("aid:aid", dict(gsd_m=2.0), "--gsd_m: got 2; wanted above 0, at most 0.625"),
        (
            "mine",
            dict(l1c_as_s2=True),
            "--l1c_as_s2: mine has s2, s1, the model reads hr, s2, s1; wanted",
        ),
        ("records", dict(l1c_as_s2=True, task="scene"), "--l1c_as_s2: .* say it to from_tfds"),
        ("aid:aid", dict(tile_cells=8), "--tile_cells: got 8; only images with maps in folders"),
        ("records", dict(tile_cells=8, task="segmentation"), "--tile_cells: got 8; only images with maps"),
        ("aid:aid", dict(max_cells=8), "--max_cells: got 8; scene is fitted on one feature an image"),
        ("mine", dict(modalities=("hr",)), "--modalities: mine has no hr; it has s2, s1"),
        ("mine", dict(modalities=("naip",)), "the model has never seen .'naip'."),
        ("naip", {}, "mine has naip, which the model has never seen: it has hr, s2, s1"),
        ("oscd:oscd", {}, "--l1c_as_s2 takes Level-1C for s2"),
        ("oscd:oscd", dict(train_share=0.5), "oscd has a split; wanted --label_share"),
        ("aid:aid", {}, "has 2 classes .beach, farm.; the card 'aid' has 30"),
        ("aid:empty", {}, "which its card wants"),
        ("empty", {}, r"empty has neither card\.json nor records; wanted NAME:DIR with a NAME of aid"),
        ("absent", {}, "absent is no folder"),
        ("spacenet:aid", {}, "no card 'spacenet'"),
        ("records", {}, "--task: missing; records do not say theirs"),
        ("records", dict(task="change"), "records hold no 'change'"),
        ("bare", dict(task="scene"), "scene_classes is missing; wanted what ingest.from_tfds writes"),
        ("so2sat:bare", {}, "scene_classes is missing"),
        ("bigearthnet:records", {}, "knn gives one class an image"),
        ("so2sat:records", {}, "several classes"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_encoded(folders, dataset, changes, match):
    name, colon, folder = dataset.rpartition(":")
    with pytest.raises(ValueError, match=match):
        evaluate.evaluate(Request(**dict(model="", dataset=f"{name}{colon}{folders / folder}") | changes))


@pytest.mark.usefixtures("_nothing_is_encoded")
def test_command_ends_in_one_line(folders, tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"error: --model: .* wanted the workdir of a run"):
        main([f"--model={tmp_path}", f"--dataset={folders / 'mine'}"])
    assert capsys.readouterr().out == ""


def test_file_names_of_different_results_differ():
    base = dict(
        dataset=dict(card="a b"),
        task="scene",
        protocol="knn",
        modalities=["hr"],
        train_share=0.2,
        label_share=1.0,
        seed=0,
        model=dict(place="runs/a", name="a at step 4"),
        asked=dict(tune=["num_steps=2"]),
    )
    assert re.fullmatch(r"a_b-scene-knn-hr-train0\.2-label1-seed0-[0-9a-f]{8}\.json", evaluate.file_name(base))
    others = [
        dict(train_share=0.5),
        dict(label_share=0.1),
        dict(seed=1),
        dict(modalities=["s2"]),
        dict(protocol="linear"),
        dict(model=dict(place="runs/b", name="a at step 4")),
        dict(model=dict(place="runs/a", name="a at step 5")),
        dict(asked=dict(tune=["num_steps=3"])),
    ]
    assert len({evaluate.file_name(base | other) for other in others} | {evaluate.file_name(base)}) == 9


def test_command_without_its_extra_ends_in_one_line():
    without = (
        "import importlib.util as u, runpy; real = u.find_spec; "
        "u.find_spec = lambda name, *rest: None if name == 'rasterio' else real(name, *rest); "
        "runpy.run_module('skysense_jax.eval', run_name='__main__')"
    )
    ended = subprocess.run([sys.executable, "-c", without], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert re.fullmatch(r"error: skysense_jax.ingest needs rasterio, .*pip install .*\[ingest\].*\n", ended.stderr)
