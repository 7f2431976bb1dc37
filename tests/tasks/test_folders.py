"""Every layout read back against the files that were written; folders that are not what their card says."""

import dataclasses
import datetime

import made_folders
import numpy as np
import pytest
import rasterio
from PIL import Image

from skysense_jax.ingest.tfds_sets import S2_L1C
from skysense_jax.modalities import MODALITIES
from skysense_jax.tasks import cards, folders, images, windows
from skysense_jax.tasks.cards import CARDS
from skysense_jax.tasks.examples import IGNORED, IMAGES_AT_ONCE, check

HR, S2, S1 = ({name: MODALITIES[name]} for name in ("hr", "s2", "s1"))
L1C = {"s2_l1c": S2_L1C}


def _card(name, **changes):
    return dataclasses.replace(CARDS[name], **changes)


def _read(folder, card, rows, **changes):
    how = dict(rows=rows, tile_cells=16, train_share=0.5, seed=0) | changes
    found = folders.read(folder, card, **how)
    assert list(found) == ["train", "test"]
    for split, examples in found.items():
        check(examples, split=split)
    return found


def _whole(sample, name):
    return sample.window(name, 0, 0, 0, sample.extent_cells)


def test_class_folders_are_split_by_class_and_read_from_the_middle(tmp_path):
    made_folders.class_folders(tmp_path, classes=("beach", "farm", "port"), each=6, side=(64, 70))
    found = _read(tmp_path, _card("aid", num_classes=3), HR)
    train, test = found["train"], found["test"]
    assert train.classes == ("beach", "farm", "port")
    assert [int(e.target) for e in train] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    names = [e.id for part in (train, test) for e in part]
    assert sorted(names) == sorted(f"{c}/{c}_{i}" for c in train.classes for i in range(6))
    example = train[4]
    assert example.before.extent_cells == 2
    file = np.asarray(Image.open(tmp_path / f"{example.id}.jpg"))
    window = _whole(example.before, "hr")
    np.testing.assert_array_equal(window.pixels, file[:, 3:67])  # 70 pixels wide, of which the middle 64 are cells
    assert window.valid.all()
    other = _read(tmp_path, _card("aid", num_classes=3), HR, seed=1)
    assert {e.id for e in other["train"]} != {e.id for e in train}


def test_class_folders_in_splits_with_deeper_folders_as_fmow_has_them(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 2), ("val", 1)):
        for number, name in enumerate(("airport", "zoo")):
            for i in range(count):
                stack = made_folders.reflectance(rng, np.full((13, 11), number), 13)
                made_folders.geotiff(tmp_path / split / name / f"{name}_{i}" / f"{name}_{i}_0.tif", stack)
    found = _read(tmp_path, _card("fmow_s2", num_classes=2), L1C)
    assert [e.id for e in found["test"]] == ["airport/airport_0_0", "zoo/zoo_0_0"]
    assert len(found["train"]) == 4
    series = found["train"][2].before
    assert series.extent_cells == 11
    pixels = _whole(series, "s2_l1c").pixels
    order = [cards._S2_L1C.index(band) for band in S2_L1C.bands]
    with images._opened(tmp_path / "train/zoo/zoo_0/zoo_0_0.tif") as file:
        np.testing.assert_array_equal(pixels, np.moveaxis(file.read(), 0, -1)[1:12][..., order])


def test_epoch_of_windows_decodes_each_picture_and_label_once(tmp_path, monkeypatch):
    names = CARDS["potsdam"].members["train"][: 3 * IMAGES_AT_ONCE]
    made_folders.potsdam(tmp_path, (*names, "7_13"), side=(70, 96))
    train = _read(tmp_path, CARDS["potsdam"], HR, tile_cells=1)["train"]
    assert len(train) == 9 * len(names)
    for name, size in (("read_picture", 3 * 70 * 96), ("read_labels", 70 * 96)):  # caches that hold two groups
        monkeypatch.setattr(images, name, images.kept(2 * IMAGES_AT_ONCE * size)(getattr(images, name).__wrapped__))
    decoded, convert = [], Image.Image.convert
    monkeypatch.setattr(Image.Image, "convert", lambda self, mode: decoded.append(self.filename) or convert(self, mode))
    how = dict(num_dates={"hr": 1}, cells=1, per_cell=32)
    batches = windows.training_batches(train, (HR["hr"],), batch_size=9, num_steps=len(names), seed=0, **how)
    assert len([batch["target"].shape for batch in batches]) == len(names)
    assert len(decoded) == len(set(decoded)) == 2 * len(names)


def test_pictures_with_label_maps_are_cut_into_parts_that_cover_each_pixel_once(tmp_path):
    made_folders.potsdam(tmp_path, side=(70, 96))
    found = _read(tmp_path, CARDS["potsdam"], HR, tile_cells=1)
    assert {e.image for e in found["train"]} == {"2_10", "3_11"}
    assert {e.image for e in found["test"]} == {"7_13"}
    for name in ("2_10", "7_13"):
        parts = [e for part in found.values() for e in part if e.image == name]
        assert len(parts) == 9  # 70 rows need three windows of 32, the last from row 38 on
        seen = np.zeros((70, 96), int)
        labels = np.asarray(Image.open(tmp_path / f"5_Labels_all/top_potsdam_{name}_label.tif"))
        picture = np.asarray(Image.open(tmp_path / f"2_Ortho_RGB/top_potsdam_{name}_RGB.tif"))
        colours = {number: colour for colour, number in CARDS["potsdam"].colours.items()}
        for example in parts:
            row, column = map(int, example.id.partition("#")[2].split(","))
            inside = np.s_[row : row + 32, column : column + 32]
            known = example.target != IGNORED
            seen[inside] += known
            wanted = np.array([colours[int(i)] for i in example.target[known]])
            np.testing.assert_array_equal(labels[inside][known], wanted)
            np.testing.assert_array_equal(_whole(example.before, "hr").pixels, picture[inside])
        assert (seen == 1).all()


def test_parts_to_fine_tune_on_keep_their_labels_and_those_that_add_little_are_left_out(tmp_path):
    made_folders.potsdam(tmp_path, side=(70, 98))
    masked, whole = (_read(tmp_path, CARDS["potsdam"], HR, tile_cells=1, overlapping=x) for x in (False, True))
    ids = lambda examples: [e.id.partition("#")[2] for e in examples if e.image in ("2_10", "7_13")]  # noqa: E731
    rows, columns = (0, 32, 38), (0, 32, 64, 66)  # 26 of the last 32 rows and 30 of the last 32 columns are in others
    assert ids(masked["train"]) == ids(masked["test"]) == ids(whole["test"])
    assert ids(masked["test"]) == [f"{row},{column}" for row in rows for column in columns]
    assert ids(whole["train"]) == [f"{row},{column}" for row in rows for column in columns[:3]]
    assert all((example.target != IGNORED).all() for example in whole["train"])
    for a, b in zip(masked["test"], whole["test"]):
        np.testing.assert_array_equal(a.target, b.target)
    assert sum((e.target != IGNORED).sum() for e in masked["train"]) == 2 * 70 * 98
    drawn = _card("potsdam", members={}, image_pixels="")
    split = {x: _read(tmp_path, drawn, HR, tile_cells=1, overlapping=x) for x in (False, True)}
    for name in ("train", "test"):
        assert {e.image for e in split[True][name]} == {e.image for e in split[False][name]}
    assert all((example.target != IGNORED).all() for example in split[True]["train"])


def test_part_without_data_is_read_and_a_folder_without_is_refused(tmp_path):
    made_folders.potsdam(tmp_path, side=(96, 96))
    for name in ("2_10", "3_11", "7_13"):
        path = tmp_path / f"2_Ortho_RGB/top_potsdam_{name}_RGB.tif"
        picture = np.asarray(Image.open(path)).copy()
        picture[:64] = 0  # two rows of three parts each
        made_folders.picture(path, picture)
    found = _read(tmp_path, CARDS["potsdam"], HR, tile_cells=1)
    assert [_whole(e.before, "hr").pixels.max() > 0 for e in found["test"]] == [False] * 6 + [True] * 3
    black = tmp_path / "black"
    made_folders.potsdam(black, side=(96, 96))
    made_folders.picture(black / "2_Ortho_RGB/top_potsdam_7_13_RGB.tif", np.zeros((96, 96, 3), np.uint8))
    _refused(black, CARDS["potsdam"], HR, "mean 0 over valid pixels; wanted 2 to 254")
    made_folders.own_maps(tmp_path / "maps")
    card, file = cards.read(tmp_path / "maps/card.json"), tmp_path / "maps/optical/0.tif"
    with images._opened(file) as opened:
        empty = np.zeros((opened.height, opened.width, opened.count), np.uint16)
    made_folders.geotiff(file, empty)
    read = [e for part in _read(tmp_path / "maps", card, S2).values() for e in part if e.image == "0"]
    assert not any(_whole(e.before, "s2").valid.any() for e in read)


def test_unit_is_judged_by_most_of_the_parts_that_say_something_of_it(tmp_path):
    made_folders.own_maps(tmp_path / "mixed", side=16)
    made_folders.own_maps(tmp_path / "power", side=16)
    north, rows = np.arange(16)[:, None, None] < 4, {**S2, **S1}
    for i in range(3):
        with rasterio.open(tmp_path / f"mixed/radar/{i}.tif") as opened:
            decibels = np.moveaxis(opened.read(), 0, -1)
        power = 10 ** (decibels / 10)
        made_folders.geotiff(tmp_path / f"mixed/radar/{i}.tif", np.where(north, power, decibels))
        made_folders.geotiff(tmp_path / f"power/radar/{i}.tif", np.where(north, 0, power))  # no data in the north
    card = cards.read(tmp_path / "power/card.json")
    _refused(tmp_path / "power", card, rows, "looks like linear power", tile_cells=4)
    _read(tmp_path / "mixed", card, rows, tile_cells=4)


def test_most_dates_of_an_image_are_known(tmp_path):
    made_folders.potsdam(tmp_path / "potsdam")
    assert _read(tmp_path / "potsdam", CARDS["potsdam"], HR)["train"].num_dates == {"hr": 1}
    made_folders.pastis(tmp_path / "pastis")
    found = _read(tmp_path / "pastis", CARDS["pastis"], S2)
    wanted = max(len(e.before.days("s2")) for e in found["train"])
    assert wanted > 1
    assert found["train"].num_dates == {"s2": wanted}


def test_labels_of_pixels_that_do_not_divide_a_cell_are_the_nearest_ones(tmp_path):
    labels = np.arange(70 * 80, dtype=np.uint16).reshape(70, 80)
    window = images.Window(3, 5, 67, 2)  # 2 cells of 33.33 pixels of 0.3 m
    ids = (labels % 251).astype(np.uint8)
    found = images.label_window(images.inside(ids, window), window, pixel_m=0.3)
    assert found.shape == (64, 64)
    for i, j in ((0, 0), (31, 63), (63, 20)):
        places = [int(np.floor((k + 0.5) * (20 / 0.3) / 64)) for k in (i, j)]
        assert found[i, j] == labels[3 + places[0], 5 + places[1]] % 251
    whole = images.Window(3, 5, 40, 2)
    exact = images.label_window(images.inside(ids, whole), whole, pixel_m=0.5)
    np.testing.assert_array_equal(exact, labels[3:43, 5:45] % 251)


@pytest.mark.parametrize("gsd_m", [0.3125, 0.3, 0.5, 0.2])
def test_window_of_a_picture_is_that_of_the_whole_resampled(tmp_path, gsd_m):
    rng = np.random.default_rng(0)
    path, part = tmp_path / "a.png", images.Window(7, 11, 263, int(263 * gsd_m / 10))
    made_folders.picture(path, rng.integers(0, 256, (280, 290, 3), dtype=np.uint8))
    card = _card("resisc45", gsd_m=gsd_m)
    whole = images.read_sample({"hr": images.Pixels(HR["hr"], card.sources["hr"], (path,))}, part, card, name="a")
    picture = images.Picture("a", HR["hr"], path, part, gsd_m)
    assert picture.extent_cells == whole.extent_cells >= 5
    assert (picture.days("hr").tolist(), picture.days("s2").tolist()) == (whole.days("hr").tolist(), [])
    for row, column, side in ((0, 0, whole.extent_cells), (1, 2, 3), (whole.extent_cells - 1, 0, 1)):
        got, wanted = (x.window("hr", 0, row, column, side) for x in (picture, whole))
        np.testing.assert_array_equal(got.valid, wanted.valid)
        assert got.valid.all()
        assert got.pixels.shape == wanted.pixels.shape == (32 * side, 32 * side, 3)
        assert np.abs(got.pixels.astype(int) - wanted.pixels).max() <= 1


def test_pairs_of_dates_with_a_map_of_change(tmp_path):
    made_folders.levir(tmp_path)
    found = _read(tmp_path, CARDS["levir_cd"], HR)
    assert [e.image for e in found["test"]] == ["test_0", "test_1"]
    example = found["train"][1]
    assert example.before.extent_cells == example.after.extent_cells == 4
    file = np.asarray(Image.open(tmp_path / "train/label/train_1.png"))
    np.testing.assert_array_equal(example.target, file // 255)
    assert example.target.shape == (80, 80)
    # 0.5 m pixels on a grid of 0.3125 m: the means of a changed cell say which date is which
    changed = np.argwhere(file[::20, ::20] > 0)[0]
    cell = np.s_[32 * changed[0] : 32 * changed[0] + 32, 32 * changed[1] : 32 * changed[1] + 32]
    for sample, folder in ((example.before, "A"), (example.after, "B")):
        wanted = np.asarray(Image.open(tmp_path / f"train/{folder}/train_1.png"))
        block = wanted[20 * changed[0] : 20 * changed[0] + 20, 20 * changed[1] : 20 * changed[1] + 20]
        assert np.abs(_whole(sample, "hr").pixels[cell].mean((0, 1)) - block.mean((0, 1))).max() < 8


def test_pairs_of_dates_with_a_file_a_band(tmp_path):
    made_folders.oscd(tmp_path)
    found = _read(tmp_path, CARDS["oscd"], L1C, tile_cells=6)
    assert {e.image for e in found["train"]} == {"bercy", "pisa"}
    assert [e.image for e in found["test"]] == ["rio"] * 4
    example = found["test"][1]
    assert example.id == "rio#0,6"
    images_folder = tmp_path / "Onera Satellite Change Detection dataset - Images" / "rio"
    for sample, date in ((example.before, 1), (example.after, 2)):
        for position, band in enumerate(S2_L1C.bands):
            name = band if band == "B8A" else f"B{int(band[1:]):02d}"
            with images._opened(images_folder / f"imgs_{date}_rect" / f"{name}.tif") as file:
                np.testing.assert_array_equal(_whole(sample, "s2_l1c").pixels[..., position], file.read(1)[:6, 6:12])


def test_series_of_two_sensors_with_days_and_folds(tmp_path):
    made_folders.pastis(tmp_path)
    found = _read(tmp_path, CARDS["pastis"], S2 | S1)
    assert [e.image for e in found["train"]] == ["10000", "10001"]  # fold 4 is left out
    assert [e.image for e in found["test"]] == ["10003"]
    example = found["test"][0]
    first = datetime.date(1970, 1, 1)
    days = [(datetime.date(*d) - first).days for d in ((2018, 9, 17), (2019, 1, 5), (2019, 7, 4))]
    assert example.before.days("s2").tolist() == days
    assert example.before.days("s1").tolist() == [(datetime.date(2018, 9, 20) - first).days, days[1] + 5]
    optical, radar = (np.load(tmp_path / f"DATA_{n}/{n}_10003.npy") for n in ("S2", "S1A"))
    window = example.before.window("s2", 2, 1, 3, 4)
    np.testing.assert_array_equal(window.pixels, np.moveaxis(optical[2], 0, -1)[1:5, 3:7])
    np.testing.assert_array_equal(_whole(example.before, "s1").pixels, np.moveaxis(radar[0, :2], 0, -1).astype("f2"))
    target = np.load(tmp_path / "ANNOTATIONS/TARGET_10003.npy")[0]
    assert example.target[0, 0] == IGNORED
    np.testing.assert_array_equal(example.target.ravel()[1:], target.ravel()[1:])
    alone = _read(tmp_path, CARDS["pastis"], S1)
    assert len(alone["test"][0].before.days("s2")) == 0


def test_zeros_of_a_sensor_are_no_data_and_the_offset_is_taken_off(tmp_path):
    made_folders.own_maps(tmp_path)
    with images._opened(tmp_path / "optical/0.tif") as file:
        stack = np.moveaxis(file.read(), 0, -1)
    stack[2, 3] = 0
    stack[4, 5, 6] = 900
    made_folders.geotiff(tmp_path / "optical/0.tif", stack)
    card = cards.read(tmp_path / cards.FILE)
    card = dataclasses.replace(card, sources={"s2": dataclasses.replace(card.sources["s2"], offset=1000)})
    examples = [e for part in _read(tmp_path, card, S2).values() for e in part]
    window = _whole(next(e for e in examples if e.image == "0").before, "s2")
    assert not window.valid[2, 3]
    assert window.valid.sum() == 143
    assert window.pixels[4, 5, 6] == 1
    np.testing.assert_array_equal(window.pixels[0, 0], np.maximum(stack[0, 0].astype(int) - 1000, 1))


# ---- what is wrong is said before anything is encoded


def _refused(folder, card, rows, match, **changes):
    with pytest.raises(ValueError, match=match):
        _read(folder, card, rows, **changes)


def test_folders_that_do_not_match_their_card_are_refused(tmp_path):
    _refused(tmp_path / "absent", CARDS["aid"], HR, "there is no folder")
    _refused(tmp_path, CARDS["aid"], HR, r"no file '\{class\}/\{name\}\.jpg', which its card wants")
    made_folders.class_folders(tmp_path / "aid")
    _refused(tmp_path / "aid", CARDS["aid"], HR, r"has 2 classes \(beach, farm\); the card 'aid' has 30")
    made_folders.levir(tmp_path / "levir")
    (tmp_path / "levir/test/B/test_1.png").unlink()
    _refused(tmp_path / "levir", CARDS["levir_cd"], HR, r"no file '\{split\}/B/\{name\}\.png' for 1 images: test_1")
    made_folders.picture(tmp_path / "levir/test/B/test_1.png", np.zeros((40, 80, 3), np.uint8))
    _refused(tmp_path / "levir", CARDS["levir_cd"], HR, r"\(40, 80\) pixels beside \(80, 80\)")
    made_folders.potsdam(tmp_path / "potsdam", names=("2_10",))
    _refused(tmp_path / "potsdam", CARDS["potsdam"], HR, "has no image of the split 'test'")
    made_folders.potsdam(tmp_path / "potsdam", names=("2_10", "7_13"))
    made_folders.picture(tmp_path / "potsdam/5_Labels_all/top_potsdam_7_13_label.tif", np.zeros((9, 9, 3), np.uint8))
    _refused(tmp_path / "potsdam", CARDS["potsdam"], HR, r"\(9, 9\) pixels; its image has \(70, 96\)")
    made_folders.pastis(tmp_path / "pastis")
    (tmp_path / "pastis/metadata.geojson").write_text('{"features": [{}]}')
    _refused(tmp_path / "pastis", CARDS["pastis"], S2, "no index with ID_PATCH")


def test_images_smaller_than_a_cell_are_refused(tmp_path):
    made_folders.class_folders(tmp_path, side=(31, 90))
    _refused(tmp_path, _card("aid", num_classes=2), HR, "31 x 90 pixels of 0.3125 m are smaller than a cell of 10 m")


def test_labels_out_of_range_are_refused(tmp_path):
    made_folders.own_maps(tmp_path / "maps")
    made_folders.geotiff(tmp_path / "maps/labels/2.tif", np.full((12, 12, 1), 7, np.uint8))
    _refused(
        tmp_path / "maps", cards.read(tmp_path / "maps/card.json"), S2, "the number 7 has no class; the card knows 4"
    )
    made_folders.potsdam(tmp_path / "potsdam")
    odd = np.full((70, 96, 3), (1, 2, 3), np.uint8)
    made_folders.picture(tmp_path / "potsdam/5_Labels_all/top_potsdam_3_11_label.tif", odd)
    _refused(tmp_path / "potsdam", CARDS["potsdam"], HR, r"the colour \(1,2,3\) has no class")
    made_folders.own_maps(tmp_path / "none")
    for i in range(3):
        made_folders.geotiff(tmp_path / f"none/labels/{i}.tif", np.full((12, 12, 1), 255, np.uint8))
    _refused(tmp_path / "none", cards.read(tmp_path / "none/card.json"), S2, "train has no label")


def test_files_that_cannot_be_read_are_refused_by_name(tmp_path):
    made_folders.class_folders(tmp_path)
    (tmp_path / "beach/beach_3.jpg").write_bytes(b"no picture")
    _refused(tmp_path, _card("aid", num_classes=2), HR, r"beach_3\.jpg cannot be read as a picture")


def test_numbers_in_another_unit_are_refused(tmp_path):
    made_folders.own_maps(tmp_path)
    for i in range(3):
        made_folders.geotiff(tmp_path / f"radar/{i}.tif", np.full((12, 12, 2), 0.2, np.float32))
    _refused(tmp_path, cards.read(tmp_path / "card.json"), S1, "looks like linear power")


def test_cards_that_contradict_themselves_are_refused(tmp_path):
    source = cards.Source("{name}.tif")
    for fields, match in (
        (dict(kind="detection"), "kind 'detection'; wanted one of"),
        (dict(kind="segmentation", sources={"s2": source}, classes=("a", "b")), "wanted the pattern of label maps"),
        (dict(kind="change", sources={"s2": source}, label="x", classes=("a", "b")), "wanted 'after' in every source"),
        (dict(kind="segmentation", sources={"s2": source}, label="x"), "no classes"),
        (dict(kind="scene", sources={"s2": cards.Source("x", format="rgb")}), "wanted it of hr"),
        (dict(kind="scene", sources={"s2": source}, splits=dict(train="a", test="b")), "where, and only where"),
        (dict(kind="multi_label", sources={"s2": source}), "wanted records"),
        (
            dict(kind="scene", sources={"s2": source}, members=dict(train=("a",), val=("b",))),
            "belongs to 'train' and to 'test'",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            cards.Card("odd", **fields)
    for fields in ('"colour": 1', '"values": {"water": 1}', '"colours": {"#ff0000": 1}', '"splits": ["a", "b"]'):
        (tmp_path / "card.json").write_text(f'{{"name": "odd", "kind": "scene", {fields}}}')
        with pytest.raises(ValueError, match=r"card\.json is no card"):
            cards.read(tmp_path / "card.json")


def test_class_folders_that_the_card_does_not_know_are_refused(tmp_path):
    made_folders.class_folders(tmp_path)
    _refused(
        tmp_path, _card("aid", num_classes=2, classes=("Beach", "farm")), HR, r"class folders \['beach'\]; the card"
    )


def test_images_of_a_published_split_that_are_not_there_are_told(tmp_path, errors):
    made_folders.potsdam(tmp_path)
    _read(tmp_path, CARDS["potsdam"], HR)
    assert "lacks 22 of the 24 that 'potsdam' has of 'train', which are scored without: 2_11, 2_12, 3_10" in errors[0]
    assert "lacks 13 of the 14 that 'potsdam' has of 'test'" in errors[1]


def test_every_card_says_what_its_classes_are():
    for name, card in CARDS.items():
        assert card.name == name
        known = set(card.values.values()) | set(card.colours.values())
        if card.classes and known:
            assert known - {IGNORED} == set(range(len(card.classes))), name
        assert set(card.left_out) <= set(range(len(card.classes)))
    potsdam = CARDS["potsdam"].members
    assert (len(potsdam["train"]), len(potsdam["test"])) == (24, 14)
    assert not set(potsdam["train"]) & set(potsdam["test"])
