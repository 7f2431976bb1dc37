"""Labelled samples as this project writes them: their label maps, or the scene classes of their index.

The sets of TensorFlow Datasets come this way too, by ``skysense_jax.ingest.from_tfds``. Next: folders.py.
"""

import functools
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from skysense_jax.data.records import RecordSource
from skysense_jax.eval.scores import IGNORED
from skysense_jax.modalities import LabelMap, Modality, from_json, label_map
from skysense_jax.tasks.examples import (
    MULTI_LABEL,
    SCENE,
    SEGMENTATION,
    Deferred,
    Example,
    Examples,
    Lazy,
    image_of,
    split_shares,
)
from skysense_jax.tasks.folders import SPLITS, TEST, TRAIN

_SUFFIX = ".array_record"
_INDEX, _ROWS, _CLASSES = "index.parquet", "modalities.json", "classes.json"
_TESTS = ("test", "validation", "val")  # splits to test on, the first that is there


def modalities_of(folder: pathlib.Path) -> tuple[Modality, ...]:
    """The rows that samples of a folder may have, none if it does not say; raises ValueError."""
    path = _folder(folder) / _ROWS
    try:
        return tuple(map(from_json, json.loads(path.read_text()))) if path.exists() else ()
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"--dataset: {path} is no table of modalities: {error}") from error


def read(
    place: pathlib.Path, *, kind: str, rows: Sequence[Modality], num_classes: int, train_share: float, seed: int
) -> dict[str, Examples]:
    """Examples to train on and to test on, of a folder or of a glob of its files.

    By the names of files where they begin with train- and test- or validation-, else ``train_share`` of all.
    ``num_classes``: how many there must be; 0: as many as there are.

    Raises:
      ValueError: there are no records, no labels of this kind, or they are of other classes.
    """
    folder, parts = _folder(place), _parts(place)
    path = folder / _CLASSES
    labels = label_map(json.loads(path.read_text()) if path.exists() else ())
    if kind == SEGMENTATION:
        made = {split: _maps(part, rows, labels) for split, part in parts.items()}
    elif kind in (SCENE, MULTI_LABEL):
        made = _scenes(folder, parts, rows, labels, kind=kind)
    else:
        raise ValueError(f"--task: records hold no {kind!r}; wanted one of {SCENE, MULTI_LABEL, SEGMENTATION}")
    classes = next(iter(made.values())).classes
    if num_classes and len(classes) != num_classes:
        raise ValueError(f"--dataset: {place} has {len(classes)} classes; its card has {num_classes}")
    return made if TEST in made else dict(zip(SPLITS, split_shares(made["all"], train_share, seed=seed)))


def has_split(place: pathlib.Path) -> bool:
    """Whether names of files say what to train on and what to test on; raises ValueError if there are none."""
    return TEST in _parts(place)


def _parts(place: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """The files of both splits, or all."""
    folder = _folder(place)
    files = sorted(folder.glob(place.name if place != folder else f"*{_SUFFIX}"))
    if not files:
        raise ValueError(f"--dataset: {place} holds no *{_SUFFIX} file")
    splits = {TRAIN: _beginning(files, TRAIN)}
    splits[TEST] = next((found for name in _TESTS if (found := _beginning(files, name))), [])
    return splits if all(splits.values()) else {"all": files}


def _folder(place: pathlib.Path) -> pathlib.Path:
    folder = place if place.is_dir() else place.parent
    if not folder.is_dir():
        raise ValueError(f"--dataset: there is no folder {folder}")
    return folder


def _beginning(files: Sequence[pathlib.Path], split: str) -> list[pathlib.Path]:
    return [path for path in files if path.name.startswith(f"{split}-")]


def _maps(files: Sequence[pathlib.Path], rows: Sequence[Modality], labels: LabelMap) -> Examples:
    """The records that have a label map; those without are left out."""
    source = RecordSource(files, rows, labels)

    labelled, names, num_dates = [], [], {row.name: 1 for row in rows}
    for i in range(len(source)):
        record = source[i]
        if record.labels_window(0, 0, record.extent_cells) is None:
            continue
        labelled.append(i)
        names.append(image_of(record.id))
        num_dates = {name: max(most, len(record.days(name))) for name, most in num_dates.items()}
    if not labelled:
        raise ValueError(f"--dataset: none of the {len(source)} records of {files[0].parent} has a label map")

    def make(i: int) -> Example:
        record = source[labelled[i]]
        ids = record.labels_window(0, 0, record.extent_cells)
        return Example(record.id, record, None, np.where(ids == 0, IGNORED, ids - 1).astype(np.uint8))

    return Examples(Lazy(len(labelled), make, names.__getitem__), labels.classes, SEGMENTATION, num_dates)


def _scenes(
    folder: pathlib.Path,
    parts: Mapping[str, Sequence[pathlib.Path]],
    rows: Sequence[Modality],
    labels: LabelMap,
    *,
    kind: str,
) -> dict[str, Examples]:
    """The records that the index has scene classes of."""
    import pyarrow.parquet as pq  # of the extra "ingest"

    path = folder / _INDEX
    if not path.exists() or "scene_classes" not in pq.read_schema(path).names:
        raise ValueError(f"--dataset: {path} with scene_classes is missing; wanted what ingest.from_tfds writes")
    dates = {row.name: f"dates_{row.name}" for row in rows if f"dates_{row.name}" in pq.read_schema(path).names}
    columns = pq.read_table(path, columns=["id", "shard", "record", "scene_classes", *dates.values()]).to_pylist()
    found = [row for row in columns if row["scene_classes"]]
    num_dates = {name: max(1, *(row[column] or 0 for row in found)) for name, column in dates.items()} if found else {}
    if kind == SCENE and (several := [row["id"] for row in found if len(row["scene_classes"]) > 1]):
        raise ValueError(f"--task: {several[0]!r} has several classes; wanted --task={MULTI_LABEL}")
    classes = tuple(sorted({name for row in found for name in row["scene_classes"]}))
    sources = functools.cache(lambda file: RecordSource([file], rows, labels))
    made = {}
    for split, files in parts.items():
        names = {file.name.removesuffix(_SUFFIX): file for file in files}
        examples = []
        for row in found:
            if row["shard"] not in names:
                continue
            opened = functools.partial(_record, sources, names[row["shard"]], row["record"])
            has = np.isin(classes, row["scene_classes"])
            target = np.array(int(has.argmax())) if kind == SCENE else has
            examples.append(Example(row["id"], Deferred(row["id"], opened), None, target))
        if not examples:
            raise ValueError(f"--dataset: the index of {folder} has no scene class of the records of {split}")
        made[split] = Examples(examples, classes, kind, num_dates)
    return made


def _record(sources, file: pathlib.Path, number: int):
    return sources(file)[number]
