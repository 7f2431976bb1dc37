"""Small folders in the layouts of known datasets; what is in a picture follows from its class or label map."""

import dataclasses
import json
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import rasterio
from PIL import Image

from skysense_jax.data import scenes
from skysense_jax.data.records import ShardWriter, encode_sample
from skysense_jax.data.sample import Series
from skysense_jax.modalities import MODALITIES

S2 = MODALITIES["s2"].bands


def picture(path: pathlib.Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def geotiff(path: pathlib.Path, array: np.ndarray) -> None:
    """[H W C] without a place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = dict(driver="GTiff", height=array.shape[0], width=array.shape[1], count=array.shape[2], dtype=array.dtype)
    with rasterio.open(path, "w", **profile) as file:
        file.write(np.moveaxis(array, -1, 0))


def rgb(rng, ids: np.ndarray) -> np.ndarray:
    """A noisy picture whose colour is the class's."""
    colours = np.array([(60, 90, 60), (150, 130, 110), (90, 110, 170), (200, 60, 60)])
    return np.clip(colours[ids % 4] + rng.normal(0, 12, (*ids.shape, 3)), 0, 255).astype(np.uint8)


def reflectance(rng, ids: np.ndarray, bands: int) -> np.ndarray:
    """[H W bands] uint16 whose level is the class's."""
    level = np.array([500, 1500, 2500, 3500])[ids % 4][..., None]
    return np.clip(level + rng.normal(0, 100, (*ids.shape, bands)), 1, 9000).astype(np.uint16)


def class_folders(root: pathlib.Path, *, classes=("beach", "farm"), each=6, side=(64, 70), seed=0) -> pathlib.Path:
    """CLASS/CLASS_NUMBER.jpg"""
    rng = np.random.default_rng(seed)
    for number, name in enumerate(classes):
        for i in range(each):
            picture(root / name / f"{name}_{i}.jpg", rgb(rng, np.full(side, number)))
    return root


def blocks(rng, shape, *, block, classes) -> np.ndarray:
    """A map of square blocks of one class each."""
    grid = rng.integers(0, classes, tuple(-(-side // block) for side in shape))
    return np.kron(grid, np.ones((block, block), int))[: shape[0], : shape[1]]


def potsdam(root: pathlib.Path, names=("2_10", "3_11", "7_13"), *, side=(70, 96)) -> pathlib.Path:
    rng = np.random.default_rng(1)
    colours = np.array([(255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0)])
    for name in names:
        ids = blocks(rng, side, block=32, classes=3)
        picture(root / "2_Ortho_RGB" / f"top_potsdam_{name}_RGB.tif", rgb(rng, ids))
        picture(root / "5_Labels_all" / f"top_potsdam_{name}_label.tif", colours[ids].astype(np.uint8))
    return root


def levir(root: pathlib.Path, *, each=2, side=80) -> pathlib.Path:
    """Pictures of 0.5 m, so 20 pixels a cell; changed blocks turn red."""
    rng = np.random.default_rng(2)
    for split in ("train", "test"):
        for i in range(each):
            ids, changed = (
                blocks(rng, (side, side), block=20, classes=3),
                blocks(rng, (side, side), block=20, classes=2),
            )
            picture(root / split / "A" / f"{split}_{i}.png", rgb(rng, ids))
            picture(root / split / "B" / f"{split}_{i}.png", rgb(rng, np.where(changed, 3, ids)))
            picture(root / split / "label" / f"{split}_{i}.png", (255 * changed).astype(np.uint8))
    return root


def oscd(root: pathlib.Path, *, side=(9, 12)) -> pathlib.Path:
    rng = np.random.default_rng(3)
    base = "Onera Satellite Change Detection dataset - "
    names = [f"B{i:02d}" for i in range(1, 13)] + ["B8A"]
    for city, split in (("bercy", "Train"), ("pisa", "Train"), ("rio", "Test")):
        changed = blocks(rng, side, block=3, classes=2)
        for date, ids in ((1, np.zeros(side, int)), (2, 2 * changed)):
            stack = reflectance(rng, ids, len(names))
            for name, band in zip(names, np.moveaxis(stack, -1, 0)):
                geotiff(root / f"{base}Images" / city / f"imgs_{date}_rect" / f"{name}.tif", band[..., None])
        picture(root / f"{base}{split} Labels" / city / "cm" / "cm.png", (255 * changed).astype(np.uint8))
    return root


def pastis(root: pathlib.Path, *, side=8) -> pathlib.Path:
    """Patches of folds 1, 2, 4 and 5 with 3 Sentinel-2 and 2 Sentinel-1 dates; one pixel of void in each."""
    rng = np.random.default_rng(4)
    features = []
    for folder in ("DATA_S2", "DATA_S1A", "ANNOTATIONS"):
        (root / folder).mkdir(parents=True)
    for number, fold in ((10000, 1), (10001, 2), (10002, 4), (10003, 5)):
        ids = blocks(rng, (side, side), block=2, classes=4)
        series = np.stack([reflectance(rng, ids, 10) for _ in range(3)]).astype(np.int16)
        np.save(root / f"DATA_S2/S2_{number}.npy", np.moveaxis(series, -1, 1))
        radar = rng.normal(-12, 2, (2, 3, side, side)).astype(np.float32) + ids
        np.save(root / f"DATA_S1A/S1A_{number}.npy", radar)
        target = np.stack([ids, ids, ids]).astype(np.uint8)
        target[0, 0, 0] = 19
        np.save(root / f"ANNOTATIONS/TARGET_{number}.npy", target)
        dates = {"0": 20180917, "1": 20190105, "2": 20190704}
        radar_dates = {"0": 20180920, "1": 20190110}
        features.append(
            dict(properties={"ID_PATCH": number, "Fold": fold, "dates-S2": dates, "dates-S1A": json.dumps(radar_dates)})
        )
    (root / "metadata.geojson").write_text(json.dumps(dict(features=features)))
    return root


def own_maps(root: pathlib.Path, *, side=12, each=3) -> pathlib.Path:
    """A card of one's own: images of Sentinel-2 and Sentinel-1 with label maps, 255 for none."""
    rng = np.random.default_rng(5)
    for i in range(each):
        ids = blocks(rng, (side, side), block=2, classes=3)
        geotiff(root / "optical" / f"{i}.tif", reflectance(rng, ids, 10))
        radar = rng.normal(-12, 1, (side, side, 2)) + 3 * ids[..., None]
        geotiff(root / "radar" / f"{i}.tif", radar.astype(np.float32))
        labels = np.where(rng.random((side, side)) < 0.1, 255, ids).astype(np.uint8)
        geotiff(root / "labels" / f"{i}.tif", labels[..., None])
    card = dict(
        name="mine",
        kind="segmentation",
        sources=dict(s2=dict(files="optical/{name}.tif"), s1=dict(files="radar/{name}.tif")),
        label="labels/{name}.tif",
        classes=["water", "field", "town"],
        train_shares=[0.67],
        published=[dict(method="Someone", setting="all", metric="mIoU", value=50.0)],
    )
    (root / "card.json").write_text(json.dumps(card))
    return root


def labelled_records(folder: pathlib.Path, *, splits=("train", "test"), each=4, without_s1=()) -> pathlib.Path:
    """Scenes with label maps and one date of s1, but for some ids; the index says that odd ones are wet and every third
    is dark too."""
    folder.mkdir()
    rows, index = [MODALITIES[name] for name in ("s2", "s1")], []
    for part, split in enumerate(splits):
        with ShardWriter(folder / f"{split}-00000-of-00001.array_record") as writer:
            for i in range(each):
                drawn = scenes.render(100 * part + i, seed=2, extent_cells=6, modalities=("s2", "s1"), complete=True)
                fields = dataclasses.asdict(drawn.sample.series["s1"]).items()
                s1 = {name: x[:1] if isinstance(x, np.ndarray) else x for name, x in fields}
                series = {**drawn.sample.series, "s1": Series(**s1)}
                if f"{split}/{i}" in without_s1:
                    del series["s1"]
                sample = dataclasses.replace(drawn.sample, id=f"{split}/{i}", series=series)
                writer.write(encode_sample(sample, rows))
                names = ["wet" if i % 2 else "dry"] + ["dark"] * (i % 3 == 0)
                shard = f"{split}-00000-of-00001"
                dates = {f"dates_{name}": len(of.days) for name, of in series.items()}
                index.append(dict(id=sample.id, shard=shard, record=i, scene_classes=names, **dates))
    pq.write_table(pa.Table.from_pylist(index), folder / "index.parquet")
    (folder / "modalities.json").write_text(json.dumps([dataclasses.asdict(row) for row in rows]))
    return folder
