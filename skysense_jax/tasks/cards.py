"""Protocol cards: what each known dataset looks like on disk, in which units, how it is split and scored.

A card of one's own is a ``card.json`` with the same fields in the folder of the dataset. The published figures are
those of the methods' authors (SkySense V2, arXiv 2507.13812, and SkySense, arXiv 2312.10115), fine-tuned, and were not
run here: they stand beside a result so that it is not read alone. Next: folders.py, which reads by a card.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from skysense_jax.eval.scores import IGNORED
from skysense_jax.tasks.examples import CHANGE, KINDS, MULTI_LABEL, SCENE, SEGMENTATION

FILE = "card.json"
RGB, GRID = FORMATS = ("rgb", "grid")
RECORDS = "records"  # instead of sources: samples as this project writes them
_S2_L1C = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B10", "B11", "B12")
_S2_L2A = ("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B11", "B12")
_EUROSAT = (*_S2_L1C[:8], "B9", "B10", "B11", "B12", "B8A")  # as tfds_sets.py has them


@dataclasses.dataclass(frozen=True)
class Source:
    """The files of one modality.

    Attributes:
      files: pattern below the dataset's folder; {name} is the image's name, {class} its class, {split} the folder of a
        split, {band} each of ``bands`` in a file of its own; * and ** as in globs.
      after: the same for the second date of change detection.
      format: "rgb": an 8-bit picture without a place, brought to ``hr``'s grid by ``Card.gsd_m``; "grid": numbers of
        the row's unit on the row's own grid; of .npy files with the axes dates, bands, rows, columns.
      bands: names of a file's bands in order; empty: those of the row.
      offset: taken from the numbers (1000 of Sentinel-2 products of processing baseline 04.00 and later).
      days: field of ``Card.index`` with the days of an image's dates, as YYYYMMDD; empty: not known.
    """

    files: str
    after: str = ""
    format: str = GRID
    bands: tuple[str, ...] = ()
    offset: int = 0
    days: str = ""

    def __post_init__(self):
        object.__setattr__(self, "bands", tuple(self.bands))
        if self.format not in FORMATS:
            raise ValueError(f"{FILE}: format {self.format!r}; wanted one of {FORMATS}")


@dataclasses.dataclass(frozen=True)
class Published:
    """A figure that others published: of ``method`` under ``setting``, in per cent. Not run here."""

    method: str
    setting: str
    metric: str
    value: float


@dataclasses.dataclass(frozen=True)
class Card:
    """How a dataset is read, split and scored.

    Attributes:
      name: of the dataset.
      kind: of its examples.
      sources: per modality; empty for samples as this project writes them.
      label: pattern of the label maps, for segmentation and change.
      classes: names by id; empty for class folders, whose names they are.
      num_classes: how many there must be; 0: as many as there are.
      values: number in a label file to class id; empty: as they are. IGNORED = 255 for none.
      colours: colour in a label file to class id, where labels are pictures.
      splits: folder of each split, where patterns have {split}.
      members: names of the images of each split, or folds of ``index``, where folders do not say.
      index: a GeoJSON file with ID_PATCH, Fold and days of each image.
      train_shares: of all examples, where nothing says what is to train on: those of published protocols.
      image_pixels: side of an image as published; for readers of the card.
      gsd_m: size that a pixel of "rgb" is taken to have, metres. Between 0.2 and 0.625, since nothing is stretched by
        more than two; 0.3125 keeps pixels as they are.
      native_gsd: what it is, and what else to know.
      left_out: classes that do not enter means over classes.
      metric: the one of the published protocol.
      published: figures of others.
    """

    name: str
    kind: str
    sources: Mapping[str, Source] = dataclasses.field(default_factory=dict)
    label: str = ""
    classes: tuple[str, ...] = ()
    num_classes: int = 0
    values: Mapping[int, int] = dataclasses.field(default_factory=dict)
    colours: Mapping[tuple[int, int, int], int] = dataclasses.field(default_factory=dict)
    splits: Mapping[str, str] = dataclasses.field(default_factory=dict)
    members: Mapping[str, tuple[str | int, ...]] = dataclasses.field(default_factory=dict)
    index: str = ""
    train_shares: tuple[float, ...] = (0.5,)
    image_pixels: str = ""
    gsd_m: float = 0.3125
    native_gsd: str = ""
    left_out: tuple[int, ...] = ()
    metric: str = ""
    published: tuple[Published, ...] = ()

    def __post_init__(self):
        where = f"{FILE} of {self.name!r}"
        if self.kind not in KINDS:
            raise ValueError(f"{where}: kind {self.kind!r}; wanted one of {KINDS}")
        rgb = [name for name, source in self.sources.items() if source.format == RGB]
        if rgb and (len(self.sources) > 1 or rgb != ["hr"]):
            raise ValueError(f"{where}: format {RGB!r} of {rgb}; wanted it of hr, and no other modality beside it")
        maps = self.kind in (SEGMENTATION, CHANGE)
        if self.sources and maps != bool(self.label):
            raise ValueError(f"{where}: label {self.label!r}; wanted the pattern of label maps for maps, else none")
        if self.sources and self.kind == MULTI_LABEL:
            raise ValueError(f"{where}: no layout of folders holds several classes an image; wanted records")
        if any(bool(source.after) != (self.kind == CHANGE) for source in self.sources.values()):
            raise ValueError(f"{where}: wanted 'after' in every source for change, else in none")
        patterns = [self.label, *(p for source in self.sources.values() for p in (source.files, source.after))]
        if self.sources and bool(self.splits) != any("{split}" in pattern for pattern in patterns):
            raise ValueError(
                f"{where}: splits {dict(self.splits)}; wanted them where, and only where, patterns name one"
            )
        for field in ("splits", "members"):
            got = getattr(self, field)
            if not isinstance(got, Mapping) or (got and got.keys() != {"train", "test"}):
                raise ValueError(f"{where}: {field} {got}; wanted what belongs to 'train' and to 'test'")
        if maps and self.sources and not self.classes:
            raise ValueError(f"{where}: no classes; wanted their names in the order of their ids")


def read(path: pathlib.Path) -> Card:
    """The card in a JSON file; ``values`` has texts as keys, ``colours`` "R,G,B".

    Raises:
      ValueError: it is no card.
    """
    try:
        fields: dict[str, Any] = json.loads(path.read_text())
        fields["sources"] = {name: Source(**source) for name, source in fields.get("sources", {}).items()}
        fields["values"] = {int(key): value for key, value in fields.get("values", {}).items()}
        colour = lambda text: tuple(map(int, text.split(",")))  # noqa: E731
        fields["colours"] = {colour(key): value for key, value in fields.get("colours", {}).items()}
        fields["members"] = {split: tuple(names) for split, names in fields.get("members", {}).items()}
        fields["published"] = tuple(Published(**figure) for figure in fields.get("published", ()))
        for name in ("classes", "train_shares", "left_out"):
            if name in fields:
                fields[name] = tuple(fields[name])
        return Card(**fields)
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        raise ValueError(f"--dataset: {path} is no card: {error}") from error


def _published(metric: str, settings: tuple[str, ...], **methods: tuple[float | None, ...]) -> tuple[Published, ...]:
    names = {"satmae": "SatMAE", "scale_mae": "Scale-MAE", "skysense": "SkySense", "skysense_v2": "SkySense V2"}
    return tuple(
        Published(names[method], setting, metric, value)
        for method, values in methods.items()
        for setting, value in zip(settings, values, strict=True)
        if value is not None
    )


def _rgb(files: str, after: str = "") -> dict[str, Source]:
    return {"hr": Source(files, after, format=RGB)}


_POTSDAM_TRAIN = tuple(f"{row}_{c}" for row in (2, 3, 4, 5) for c in (10, 11, 12))
_POTSDAM_TRAIN += tuple(f"{row}_{c}" for row in (6, 7) for c in (7, 8, 9, 10, 11, 12))
_POTSDAM_TEST = (*("2_13", "2_14", "3_13", "3_14", "4_13", "4_14", "4_15", "5_13", "5_14"), "5_15")
_POTSDAM_TEST += ("6_13", "6_14", "6_15", "7_13")
_ISAID = """background ship store_tank baseball_diamond tennis_court basketball_court ground_track_field bridge
large_vehicle small_vehicle helicopter swimming_pool roundabout soccer_ball_field plane harbor"""
_ISAID_COLOURS = ((0, 0, 0), (0, 0, 63), (0, 63, 63), (0, 63, 0), (0, 63, 127), (0, 63, 191), (0, 63, 255))
_ISAID_COLOURS += ((0, 127, 63), (0, 127, 127), (0, 0, 127), (0, 0, 191), (0, 0, 255), (0, 191, 127), (0, 127, 191))
_ISAID_COLOURS += ((0, 127, 255), (0, 100, 155))
_PASTIS = """background meadow soft_winter_wheat corn winter_barley winter_rapeseed spring_barley sunflower grapevine
beet winter_triticale winter_durum_wheat fruits_vegetables_flowers potatoes leguminous_fodder soybeans orchard
mixed_cereal sorghum"""
_OSCD_BANDS = tuple(band if band == "B8A" else f"B{int(band[1:]):02d}" for band in _S2_L1C)
_OSCD = "Onera Satellite Change Detection dataset - "
_OSCD_IMAGES = _OSCD + "Images/{{name}}/imgs_{date}_rect/{{band}}.tif"

CARDS: Mapping[str, Card] = {
    card.name: card
    for card in (
        Card(
            "aid",
            SCENE,
            _rgb("{class}/{name}.jpg"),
            num_classes=30,
            train_shares=(0.2, 0.5),
            image_pixels="600",
            native_gsd="0.5 to 8 m; all taken as of one size",
            metric="accuracy",
            published=_published(
                "accuracy",
                ("20 % to train", "50 % to train"),
                satmae=(95.02, 96.94),
                scale_mae=(96.44, 97.58),
                skysense=(97.68, 98.60),
                skysense_v2=(98.34, 99.05),
            ),
        ),
        Card(
            "resisc45",
            SCENE,
            _rgb("{class}/{name}.jpg"),
            num_classes=45,
            train_shares=(0.1, 0.2),
            image_pixels="256",
            native_gsd="0.2 to 30 m; all taken as of one size",
            metric="accuracy",
            published=_published(
                "accuracy",
                ("10 % to train", "20 % to train"),
                satmae=(91.72, 94.10),
                scale_mae=(92.63, 95.04),
                skysense=(94.85, 96.32),
                skysense_v2=(96.42, 97.24),
            ),
        ),
        Card(
            "uc_merced",
            SCENE,
            _rgb("{class}/{name}.tif"),
            num_classes=21,
            train_shares=(0.8,),
            image_pixels="256",
            gsd_m=0.3048,
            native_gsd="one foot",
            metric="accuracy",
        ),
        Card(
            "eurosat",
            SCENE,
            {"s2_l1c": Source("{class}/{name}.tif", bands=_EUROSAT)},
            num_classes=10,
            train_shares=(0.8,),
            image_pixels="64",
            native_gsd="10 m, Level-1C",
            metric="accuracy",
        ),
        Card(
            "bigearthnet",
            MULTI_LABEL,
            image_pixels="120",
            native_gsd="10 m, Level-2A; as skysense_jax.ingest.from_tfds writes it",
            metric="map_micro",
            published=_published(
                "mAP",
                ("10 % to train", "100 % to train"),
                satmae=(86.18, 89.50),
                skysense=(88.67, 92.09),
                skysense_v2=(89.13, 93.78),
            ),
        ),
        Card(
            "so2sat",
            SCENE,
            num_classes=17,
            image_pixels="32",
            native_gsd="10 m, Level-1C and s1; as skysense_jax.ingest.from_tfds writes it",
            metric="accuracy",
        ),
        Card(
            "fmow_rgb",
            SCENE,
            _rgb("{split}/{class}/*/{name}_rgb.jpg"),
            num_classes=62,
            splits=dict(train="train", test="val"),
            native_gsd="0.3 to 3.7 m; all taken as of one size, and the middle 2048 pixels of larger images",
            metric="accuracy",
        ),
        Card(
            "fmow_s2",
            SCENE,
            {"s2_l1c": Source("{split}/{class}/*/{name}.tif", bands=_S2_L1C)},
            num_classes=62,
            splits=dict(train="train", test="val"),
            image_pixels="about 50",
            native_gsd="10 m, Level-1C",
            metric="accuracy",
            published=_published("top 1", ("all",), satmae=(63.84,), skysense=(64.38,), skysense_v2=(66.65,))
            + _published("top 5", ("all",), skysense=(87.27,), skysense_v2=(89.32,)),
        ),
        Card(
            "potsdam",
            SEGMENTATION,
            _rgb("**/top_potsdam_{name}_RGB.tif"),
            label="**/top_potsdam_{name}_label.tif",
            classes=("impervious_surface", "building", "low_vegetation", "tree", "car", "clutter"),
            colours={
                (255, 255, 255): 0,
                (0, 0, 255): 1,
                (0, 255, 255): 2,
                (0, 255, 0): 3,
                (255, 255, 0): 4,
                (255, 0, 0): 5,
                (0, 0, 0): IGNORED,  # rims, in the labels without them
            },
            members=dict(train=_POTSDAM_TRAIN, test=_POTSDAM_TEST),
            image_pixels="6000",
            native_gsd="0.05 m; pixels taken as they are, or a car would be lost in a cell",
            left_out=(5,),
            metric="mf1",
            published=_published("mF1", ("all",), skysense=(93.99,), skysense_v2=(95.86,)),
        ),
        Card(
            "isaid",
            SEGMENTATION,
            _rgb("{split}/images/{name}.png"),
            label="{split}/**/{name}_instance_color_RGB.png",
            classes=tuple(_ISAID.split()),
            colours={colour: number for number, colour in enumerate(_ISAID_COLOURS)},
            splits=dict(train="train", test="val"),
            image_pixels="800 to 13000",
            native_gsd="several; all taken as of one size",
            metric="miou",
            published=_published("mIoU", ("all",), skysense=(70.91,), skysense_v2=(71.87,)),
        ),
        Card(
            "levir_cd",
            CHANGE,
            _rgb("{split}/A/{name}.png", "{split}/B/{name}.png"),
            label="{split}/label/{name}.png",
            classes=("unchanged", "changed"),
            values={0: 0, 255: 1},
            splits=dict(train="train", test="test"),
            image_pixels="1024",
            gsd_m=0.5,
            native_gsd="0.5 m",
            metric="f1",
        ),
        Card(
            "oscd",
            CHANGE,
            {"s2_l1c": Source(_OSCD_IMAGES.format(date=1), _OSCD_IMAGES.format(date=2), bands=_OSCD_BANDS)},
            label=_OSCD + "{split} Labels/{name}/cm/cm.png",
            classes=("unchanged", "changed"),
            values={0: 0, 255: 1},
            splits=dict(train="Train", test="Test"),
            image_pixels="about 600",
            native_gsd="10 m, Level-1C",
            metric="f1",
        ),
        Card(
            "pastis",
            SEGMENTATION,
            {
                "s2": Source("DATA_S2/S2_{name}.npy", bands=_S2_L2A, days="dates-S2"),
                "s1": Source("DATA_S1A/S1A_{name}.npy", bands=("VV", "VH", "VV/VH"), days="dates-S1A"),
            },
            label="ANNOTATIONS/TARGET_{name}.npy",
            classes=tuple(_PASTIS.split()),
            values={**{number: number for number in range(19)}, 19: IGNORED},
            index="metadata.geojson",
            members=dict(train=(1, 2, 3), test=(5,)),
            image_pixels="128",
            native_gsd="10 m, Level-2A and s1 in dB; folds 1 to 3 to train, 5 to test",
            metric="miou",
        ),
        Card(
            "dynamic_earthnet_planet",
            SEGMENTATION,
            {"planet": Source("{split}/images/{name}.tif", bands=("B", "G", "R", "NIR"))},
            label="{split}/labels/{name}.tif",
            classes=("impervious", "agriculture", "forest", "wetland", "soil", "water", "snow"),
            splits=dict(train="train", test="test"),
            image_pixels="1024",
            native_gsd="3 m, on the grid of a row 'planet' of 4 pixels a cell; labels as ids in one band",
            metric="miou",
            published=_published("mIoU", ("5 %", "10 %"), skysense=(39.7, 46.5), skysense_v2=(41.2, 47.6)),
        ),
        Card(
            "dynamic_earthnet_s2",
            SEGMENTATION,
            {"s2": Source("{split}/images/{name}.tif", bands=_S2_L2A)},
            label="{split}/labels/{name}.tif",
            classes=("impervious", "agriculture", "forest", "wetland", "soil", "water", "snow"),
            splits=dict(train="train", test="test"),
            native_gsd="10 m; labels as ids in one band",
            metric="miou",
        ),
        Card(RECORDS, SCENE, native_gsd="samples as skysense_jax.ingest writes them"),
    )
}
