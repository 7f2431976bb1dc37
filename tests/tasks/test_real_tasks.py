"""Real label maps under real imagery by the command of a user: land cover, crops, aerial land cover.

Without SKYSENSE_REALDATA procedural scenes take their place, in the same files. The network has random weights: what is
tested is the way, and that features still know more than the commonest class.
"""

import json
import os
import pathlib
from collections.abc import Iterator

import h5py
import made_folders
import netCDF4
import numpy as np
import pytest

from skysense_jax.data import scenes
from skysense_jax.data.sample import Sample
from skysense_jax.ingest import read_sentinel
from skysense_jax.tasks import evaluate
from skysense_jax.tasks.evaluate import Request

REAL = os.environ.get("SKYSENSE_REALDATA")
SOURCES = ["made_up", "real"] if REAL else ["made_up"]
_CROPS = {1200: "maize", 2130: "code 2130", 5100: "code 5100", 7900: "code 7900", 9120: "grass"}
_LAND = (
    "water",
    "trees",
    "flooded",
    "crops",
    "built",
    "bare",
    "snow",
    "clouds",
    "rangeland",
)  # as TerraMesh orders them
_MADE_UP = ("dark", "middling", "bright")
_AERIAL = ("water", "tree canopy", "low vegetation", "barren", "impervious", "road")


def _scene(modalities: tuple[str, ...], *, block: int) -> tuple[Sample, np.ndarray]:
    """A procedural place, and for each cell whether it is dark, middling or bright: random weights do not hide that."""
    cells = 3 * block
    sample = scenes.render(1, seed=7, extent_cells=cells, modalities=modalities, complete=True).sample
    series = sample.series[modalities[0]]
    seen = (series.valid & ~series.cloud)[..., None]
    mean = (series.images * seen).sum(axis=(0, 3)) / np.maximum(seen.sum(axis=(0, 3)), 1)
    level = mean.reshape(cells, len(mean) // cells, cells, -1).mean(axis=(1, 3))
    return sample, np.digitize(level, np.quantile(level, (1 / 3, 2 / 3))).astype(np.uint8)


def _blocks(sample: Sample, ids: np.ndarray, side: int) -> list[tuple[str, Sample, np.ndarray, tuple[slice, slice]]]:
    """The parts of a place, each an image of its own."""
    starts = range(0, len(ids), side)
    return [(f"{r}_{c}", sample, ids, np.s_[r : r + side, c : c + side]) for r in starts for c in starts]


def tiles(cells: int) -> Iterator[tuple[str, Sample, np.ndarray, tuple[slice, slice]]]:
    """A corner of each of the 64-cell crops of the TerraMesh tiles, and its land cover."""
    folder = pathlib.Path(REAL) / "terramesh_examples"
    for item in read_sentinel.find_tiles(folder):
        with made_folders.rasterio.open(folder / "LULC" / item.path.name) as file:
            cover = file.read(1)
        for sample in item.read():
            row, column = map(int, sample.id.rpartition("/")[2].split("_"))
            ids = cover[row : row + 64, column : column + 64]
            name, corner = f"{item.path.stem}_{row}_{column}", np.s_[:cells, :cells]
            yield name, sample, np.where(ids == 0, 255, ids - 1).astype(np.uint8), corner


def _fields() -> tuple[Sample, np.ndarray]:
    """The complete WorldCereal patch and its crops."""
    folder = pathlib.Path(REAL) / "worldcereal_patches"
    (item,) = (i for i in read_sentinel.find_patches(folder) if i.path.name == "00002806639B424A")
    (sample,) = item.read()
    with netCDF4.Dataset(next(item.path.glob("OUTPUT*.nc"))) as file:
        file.set_auto_maskandscale(False)
        codes = np.asarray(file["CT"][:])
    ids = np.full(codes.shape, 255, np.uint8)
    for number, code in enumerate(_CROPS):
        ids[codes == code] = number
    return sample, ids


def _card(root: pathlib.Path, **fields) -> None:
    (root / "card.json").write_text(json.dumps(dict(name=root.name, kind="segmentation", **fields)))


def land_cover(root: pathlib.Path, real: bool, *, cells: int = 16) -> None:
    """One date of two sensors as GeoTIFFs."""
    places = tiles(cells) if real else _blocks(*_scene(("s2", "s1"), block=8), 8)
    for name, sample, ids, inside in places:
        for modality in ("s2", "s1"):
            series = sample.series[modality]
            pixels = np.where((series.valid & ~series.cloud)[0][..., None], series.images[0], 0)[inside]
            made_folders.geotiff(
                root / modality / f"{name}.tif", pixels.astype(np.float32 if modality == "s1" else pixels.dtype)
            )
        made_folders.geotiff(root / "labels" / f"{name}.tif", ids[inside][..., None])
    sources = {m: dict(files=m + "/{name}.tif") for m in ("s2", "s1")}
    classes = _LAND if real else _MADE_UP
    _card(root, sources=sources, label="labels/{name}.tif", classes=classes, train_shares=[0.67])


def crops(root: pathlib.Path, real: bool) -> None:
    """Series of two sensors as arrays, with their days; the real patch in blocks of 16 cells."""
    places = _blocks(*_fields(), 16) if real else _blocks(*_scene(("s2", "s1"), block=8), 8)
    features = []
    for name, sample, ids, inside in places:
        dates = {}
        for modality, series in sample.series.items():
            (root / modality).mkdir(parents=True, exist_ok=True)
            pixels = np.where((series.valid & ~series.cloud)[..., None], series.images, 0)[:, *inside]
            np.save(root / modality / f"{name}.npy", np.moveaxis(pixels, -1, 1))
            days = [str(np.datetime64(int(day), "D")).replace("-", "") for day in series.days]
            dates[f"days-{modality}"] = {str(i): int(day) for i, day in enumerate(days)}
        (root / "labels").mkdir(exist_ok=True)
        np.save(root / "labels" / f"{name}.npy", ids[inside])
        features.append(dict(properties={"ID_PATCH": name, "Fold": 0, **dates}))
    (root / "index.json").write_text(json.dumps(dict(features=features)))
    sources = {m: dict(files=m + "/{name}.npy", days=f"days-{m}") for m in ("s2", "s1")}
    classes = tuple(_CROPS.values()) if real else _MADE_UP
    _card(root, sources=sources, label="labels/{name}.npy", classes=classes, index="index.json", train_shares=[0.6])


def aerial(root: pathlib.Path, real: bool) -> None:
    """Pictures of 128 pixels, four of each real chip of 1 m, taken as they are."""
    if real:
        for path in sorted((pathlib.Path(REAL) / "chesapeake_naip_1m/geobench").glob("*.hdf5")):
            with h5py.File(path) as file:
                pixels = np.stack([file[band][...] for band in ("Red", "Green", "Blue")], -1) * 255
                labels = file["label"][...]
            ids = np.where((labels >= 1) & (labels <= 6), labels - 1, 255).astype(np.uint8)
            for r in (0, 128):
                for c in (0, 128):
                    inside = np.s_[r : r + 128, c : c + 128]
                    made_folders.picture(root / "images" / f"{path.stem}_{r}_{c}.png", pixels[inside].astype(np.uint8))
                    made_folders.picture(root / "labels" / f"{path.stem}_{r}_{c}.png", ids[inside])
    else:
        for name, sample, ids, inside in _blocks(*_scene(("hr",), block=4), 4):
            fine = tuple(slice(32 * part.start, 32 * part.stop) for part in inside)
            made_folders.picture(root / "images" / f"{name}.png", sample.series["hr"].images[0][fine])
            made_folders.picture(root / "labels" / f"{name}.png", np.kron(ids[inside], np.ones((32, 32), np.uint8)))
    sources = dict(hr=dict(files="images/{name}.png", format="rgb"))
    classes = _AERIAL if real else _MADE_UP
    _card(root, sources=sources, label="labels/{name}.png", classes=classes, train_shares=[0.67])


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.usefixtures("loaded_once")
def test_linear_probe_of_real_label_maps_knows_more_than_the_commonest_class(model_dir, tmp_path, source):
    for write in (land_cover, crops, aerial):
        root = tmp_path / write.__name__
        root.mkdir()
        write(root, source == "real")
        request = Request(model=str(model_dir), dataset=str(root), protocol="linear", batch_size=8, max_cells=4000)
        found = evaluate.evaluate(request)
        scores = found["scores"]
        num_classes = sum(name.startswith("iou/") for name in scores)
        assert num_classes > 1
        assert scores["mf1"] > 1 / num_classes, write.__name__  # more than one class everywhere can give
