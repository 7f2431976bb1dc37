"""Labelled datasets in folders as users have them, read by a card: class folders, images with label maps, pairs of
dates with a map of change, series.

Headers and label maps are read at once, pixels when they are asked for. Next: recordsets.py, for samples of ours.
"""

import collections
import dataclasses
import datetime
import functools
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from skysense_jax.data.checks import RecordError, check_series
from skysense_jax.data.sample import SampleReader, Series
from skysense_jax.eval.scores import IGNORED
from skysense_jax.modalities import Modality
from skysense_jax.tasks import images
from skysense_jax.tasks.cards import RGB, Card
from skysense_jax.tasks.examples import (
    CHANGE,
    SCENE,
    Deferred,
    Example,
    Examples,
    Lazy,
    image_of,
    part_name,
    split_shares,
)
from skysense_jax.tasks.images import CardLabels, Pixels, Window

TRAIN, TEST = SPLITS = ("train", "test")
_MIDDLE_CELLS = 64  # of an image that has one label, at most: 2048 pixels of hr, the paper's extent
_NAMED = 5  # things that an error lists
_LEAST_NEW_SHARE = 0.1  # of the pixels of a part that is trained on with its overlap
_LOOKED_AT = 8  # parts of a split, whether their numbers are of the row's unit


@dataclasses.dataclass(frozen=True)
class Image:
    """The files of one image: per modality of its first date and, for change, its second; its label map; its class."""

    name: str
    before: Mapping[str, Pixels]
    after: Mapping[str, Pixels]
    label: pathlib.Path | None
    scene: str


def read(
    folder: pathlib.Path,
    card: Card,
    *,
    rows: Mapping[str, Modality],
    tile_cells: int,
    train_share: float,
    seed: int,
    overlapping: bool = False,
) -> dict[str, Examples]:
    """Examples to train on and to test on.

    Args:
      rows: of the modalities to be read, by their names in the card.
      tile_cells: side of the parts that images with label maps are cut into, at most.
      train_share: of the examples, where neither folders nor the card say what is to train on.
      seed: of which ones.
      overlapping: parts to train on keep their labels where they overlap, and those that add little are left out; else
        a pixel has its label in one part only, as in all that are to test on.

    Raises:
      ValueError: the folder is not what the card says.
    """
    if not folder.is_dir():
        raise ValueError(f"--dataset: there is no folder {folder}")
    index = _index(folder, card) if card.index else {}
    found = {split: _find(folder, card, rows, split, index) for split in (SPLITS if card.splits else ("all",))}
    everything = [image for of_split in found.values() for image in of_split]
    classes = card.classes or tuple(sorted({image.scene for image in everything}))
    unknown = sorted({image.scene for image in everything} - set(classes)) if card.kind == SCENE else []
    if unknown:
        raise ValueError(f"--dataset: {folder} has class folders {unknown}; the card {card.name!r} knows {classes}")
    if card.num_classes and len(classes) != card.num_classes:
        told = f"{', '.join(classes[:_NAMED])}{', ...' if len(classes) > _NAMED else ''}"
        raise ValueError(
            f"--dataset: {folder} has {len(classes)} classes ({told}); the card {card.name!r} has {card.num_classes}"
        )
    if card.members:
        found = _by_members(found["all"], card, index, folder)
    make = functools.partial(_examples, card=card, classes=classes, tile_cells=tile_cells)
    made = {split: make(part, overlapping=overlapping and split == TRAIN) for split, part in found.items()}
    if "all" in made:
        made = dict(zip(SPLITS, split_shares(made["all"], train_share, seed=seed)))
        if overlapping and card.label:
            names = set(made[TRAIN].image_names)
            made[TRAIN] = make([image for image in found["all"] if image.name in names], overlapping=True)
    return made


# ---- which files there are


def _find(
    folder: pathlib.Path, card: Card, rows: Mapping[str, Modality], split: str, index: Mapping[str, Mapping[str, Any]]
) -> list[Image]:
    """The images of a split, by name; raises ValueError where a file of one is missing."""
    place = functools.partial(_files, folder, split=card.splits.get(split, ""))
    patterns = {("label", ""): card.label} if card.label else {}
    for name in rows:
        source = card.sources[name]
        patterns |= {(name, "before"): source.files} | ({(name, "after"): source.after} if source.after else {})
    bands = lambda layer: card.sources[layer].bands if layer in card.sources else ()  # noqa: E731
    layers = {key: place(pattern, bands=bands(key[0])) for key, pattern in patterns.items()}
    # what does not lie by split holds the images of all of them
    telling = [key for key, pattern in patterns.items() if "{split}" in pattern or not card.splits]
    names = sorted(set.union(*(set(layers[key]) for key in telling)))
    for key, files in layers.items():
        missing = [name for name in names if name not in files]
        if missing:
            told = f"{', '.join(missing[:_NAMED])}{', ...' if len(missing) > _NAMED else ''}"
            raise ValueError(f"--dataset: {folder}: no file {patterns[key]!r} for {len(missing)} images: {told}")
    made = []
    for name in names:
        days = {m: _days(index, name, card.sources[m].days) for m in rows}
        dates = [
            {m: Pixels(rows[m], card.sources[m], layers[m, date][name], days[m]) for m in rows if (m, date) in layers}
            for date in ("before", "after")
        ]
        label = layers["label", ""][name][0] if card.label else None
        made.append(Image(name, *dates, label, name.partition("/")[0] if card.kind == SCENE else ""))
    return made


def _files(
    folder: pathlib.Path, pattern: str, *, split: str, bands: Sequence[str]
) -> dict[str, tuple[pathlib.Path, ...]]:
    """The files of each image that a pattern finds, of several bands in their order; CLASS/NAME where it has a class.

    Raises:
      ValueError: it finds none, or one name twice.
    """
    pattern = pattern.replace("{split}", split)
    if "{band}" in pattern:
        of_bands = [_files(folder, pattern.replace("{band}", band), split=split, bands=()) for band in bands]
        whole = set.intersection(*map(set, of_bands))
        return {name: tuple(found[name][0] for found in of_bands) for name in whole}
    parts = re.split(r"(\{class\}|\{name\}|\*\*/|\*)", pattern)
    as_regex = {"{class}": "(?P<scene>[^/]+)", "{name}": "(?P<name>[^/]+)", "**/": "(?:.*/)?", "*": "[^/]*"}
    expression = re.compile("".join(as_regex.get(part, re.escape(part)) for part in parts))
    found: dict[str, tuple[pathlib.Path, ...]] = {}
    for path in sorted(folder.glob(re.sub(r"\{class\}|\{name\}", "*", pattern))):
        match = expression.fullmatch(path.relative_to(folder).as_posix())
        if match is None or not path.is_file():
            continue
        named = match.groupdict()
        name = f"{named['scene']}/{named['name']}" if "scene" in named else named["name"]
        if name in found:
            raise ValueError(f"--dataset: {found[name][0]} and {path} are both {pattern!r} of {name!r}; wanted one")
        found[name] = (path,)
    if not found:
        raise ValueError(f"--dataset: {folder} has no file {pattern!r}, which its card wants")
    return found


def _index(folder: pathlib.Path, card: Card) -> dict[str, Mapping[str, Any]]:
    """What the index says of each image, by name."""
    path = folder / card.index
    try:
        features = json.loads(path.read_text())["features"]
        return {str(feature["properties"]["ID_PATCH"]): feature["properties"] for feature in features}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--dataset: {path}: no index with ID_PATCH of each image: {error!r}") from error


def _days(index: Mapping[str, Mapping[str, Any]], name: str, field: str) -> tuple[int, ...]:
    """Days since 1970-01-01 of an image's dates."""
    if not field:
        return ()
    dates = index.get(name, {}).get(field)
    dates = json.loads(dates) if isinstance(dates, str) else dates
    if not isinstance(dates, dict):
        raise ValueError(f"--dataset: the index says no {field} of {name!r}; wanted its days as YYYYMMDD")
    ordered = [str(dates[key]) for key in sorted(dates, key=int)]
    first = datetime.date(1970, 1, 1)
    return tuple((datetime.datetime.strptime(day, "%Y%m%d").date() - first).days for day in ordered)


def _by_members(
    found: Sequence[Image], card: Card, index: Mapping[str, Mapping[str, Any]], folder: pathlib.Path
) -> dict[str, list[Image]]:
    """The images of each split by the card's list of names or of folds; others are left out."""
    of_image = {image.name: index[image.name]["Fold"] if image.name in index else image.name for image in found}
    parts = {
        split: [image for image in found if of_image[image.name] in members] for split, members in card.members.items()
    }
    for split, part in parts.items():
        absent = [str(member) for member in card.members[split] if member not in set(of_image.values())]
        if absent and part:
            logging.error(
                "--dataset: %s lacks %d of the %d that %r has of %r, which are scored without: %s",
                *(folder, len(absent), len(card.members[split]), card.name, split, ", ".join(absent)),
            )
        if not part:
            raise ValueError(
                f"--dataset: {folder} has no image of the split {split!r}; the card {card.name!r} wants "
                f"{', '.join(map(str, card.members[split][:_NAMED]))}, ..."
            )
    return parts


# ---- examples of them


def _examples(
    found: Sequence[Image], *, card: Card, classes: tuple[str, ...], tile_cells: int, overlapping: bool
) -> Examples:
    places: list[tuple[Image, Window]] = []
    num_dates: dict[str, int] = {}
    for image in found:
        first = next(iter(image.before.values()))
        shape, pixel_m = first.shape(), images.metres_per_pixel(first, card)
        _check_sizes(image, shape, card)
        parts = images.windows(
            shape,
            pixel_m=pixel_m,
            max_cells=_MIDDLE_CELLS if card.kind == SCENE else tile_cells,
            all_of_it=card.kind != SCENE,
            where=image.name,
            step=images.step_of(first),
        )
        places += [(image, window) for window in parts if not overlapping or window.new_share >= _LEAST_NEW_SHARE]
        for pixels in (*image.before.values(), *image.after.values()):
            num_dates[pixels.row.name] = max(num_dates.get(pixels.row.name, 1), images.num_dates(pixels))
    _check_units(places, card)
    if card.kind == SCENE:
        made = [_scene(image, window, card, classes) for image, window in places]
    else:
        map_of = functools.partial(_map, card=card, overlapping=overlapping)
        made = Lazy(len(places), lambda i: map_of(*places[i]), lambda i: image_of(places[i][0].name))
    return Examples(made, classes, card.kind, num_dates)


def _check_units(places: Sequence[tuple[Image, Window]], card: Card) -> None:
    """Raises RecordError if in most of a few parts a modality's numbers are not of its unit.

    A part of one number alone, such as a black one, counts if there is no other.
    """
    plain, telling = collections.defaultdict(list), collections.defaultdict(list)
    for i in np.random.default_rng(0).permutation(len(places))[:_LOOKED_AT]:
        image, window = places[i]
        for date in filter(None, (image.before, image.after)):
            sample = images.read_sample(date, window, card, name=image.name)
            for pixels in date.values():
                series, name = sample.series[pixels.row.name], pixels.row.name
                known = series.images[series.valid]
                if known.size:
                    found = telling if known.min() < known.max() else plain
                    found[name].append(_wrong(series, pixels.row, window, f"sample {image.name!r}, modality {name!r}"))
    for name in {**plain, **telling}:
        told = telling[name] or plain[name]
        wrong = [error for error in told if error]
        if 2 * len(wrong) > len(told):
            raise wrong[0]


def _wrong(series: Series, row: Modality, window: Window, where: str) -> RecordError | None:
    try:
        check_series(series, row, window.cells, where)
    except RecordError as error:
        return error
    return None


def _check_sizes(image: Image, shape: tuple[int, int], card: Card) -> None:
    """All files of an image show the same ground; only that is asked which headers tell."""
    for pixels in (*image.before.values(), *image.after.values()):
        scale = images.metres_per_pixel(pixels, card) / images.metres_per_pixel(next(iter(image.before.values())), card)
        if tuple(round(side * scale) for side in pixels.shape()) != shape:
            raise ValueError(
                f"--dataset: {pixels.paths[0]}: {pixels.shape()} pixels beside {shape} of the image's first file"
            )
    if image.label is not None and (got := images.shape_of(image.label)) != shape:
        raise ValueError(f"--dataset: {image.label}: {got} pixels; its image has {shape}")


def _scene(image: Image, window: Window, card: Card, classes: tuple[str, ...]) -> Example:
    sample = _sample(image.name, image.before, window, card)
    return Example(image.name, sample, None, np.array(classes.index(image.scene)))


def _map(image: Image, window: Window, *, card: Card, overlapping: bool) -> Example:
    pixel_m = images.metres_per_pixel(next(iter(image.before.values())), card)
    labels = images.inside(images.read_labels(image.label, CardLabels.of(card)), window).copy()
    if not overlapping:  # a pixel counts in one part only
        labels[: window.seen_rows], labels[:, : window.seen_columns] = IGNORED, IGNORED
    name = part_name(image.name, window.row, window.column)
    return Example(
        id=name,
        before=_sample(name, image.before, window, card),
        after=_sample(name, image.after, window, card) if card.kind == CHANGE else None,
        target=images.label_window(labels, window, pixel_m=pixel_m),
    )


def _sample(name: str, parts: Mapping[str, Pixels], window: Window, card: Card) -> SampleReader:
    first, *_ = parts.values()
    if first.source.format == RGB:
        return images.Picture(name, first.row, first.paths[0], window, card.gsd_m)
    made = Deferred(name, lambda: images.read_sample(parts, window, card, name=name))
    made.extent_cells = window.cells  # known without opening it
    return made
