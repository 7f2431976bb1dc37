"""Tasks on frozen features: k nearest neighbours and a linear classifier, of images, of cells, of pairs of dates.

Features are those of ``eval.features``: an image's is the mean of its usable cells' fused features, a pair's of dates
|difference|, before and after, side by side. Maps are predicted cell by cell and scored pixel by pixel: the scores of
classes are enlarged bilinearly. Next: linear.py (the classifier), evaluate.py (the command).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from skysense_jax.data.sample import SampleReader
from skysense_jax.eval import neighbours, probes, scores
from skysense_jax.eval.features import sample_features
from skysense_jax.eval.scores import IGNORED
from skysense_jax.tasks import linear
from skysense_jax.tasks.examples import CHANGE, MULTI_LABEL, SCENE, Example, Examples
from skysense_jax.tasks.loading import Model

KNN, LINEAR = PROTOCOLS = ("knn", "linear")
_CELLS_A_PART = 4  # of training cells of maps, at least: of datasets of more parts some are not read
_NO_CELL = f"no cell to train on: none is usable and labelled on {probes.MIN_LABELLED_SHARE:.0%} of its pixels"


@dataclasses.dataclass(frozen=True)
class Cells:
    """The cells of one example: their features, and where at least one modality and date was usable."""

    features: Float[np.ndarray, "P Q D"]
    usable: Bool[np.ndarray, "P Q"]


Reader = Callable[[Examples], Iterator[tuple[Example, Cells]]]  # of each example its cells, in order


@dataclasses.dataclass(frozen=True)
class Options:
    """How features are used.

    Attributes:
      batch_size: windows encoded at a time.
      max_cells: training cells of maps, at most; drawn evenly over examples, of as many images as may be.
      seed: of what is drawn and held out.
      left_out: classes that do not enter means over classes.
    """

    batch_size: int = 8
    max_cells: int = 20_000
    seed: int = 0
    left_out: tuple[int, ...] = ()


def check_classes(train: Examples, *, by_pixel: bool = False) -> None:
    """Nothing, if a classifier has something to tell apart in ``train``; looks at targets until it has seen it.

    Raises:
      ValueError: of maps no cell (``by_pixel``: pixel) has a class, or all have the same.
    """
    seen: set[int] = set()
    if train.kind == MULTI_LABEL:
        return
    for example in train:
        target = np.asarray(example.target)
        ids = target if train.kind == SCENE or by_pixel else cell_targets(target, example.before.extent_cells)
        seen |= set(np.unique(ids).tolist()) - ({IGNORED} if train.kind != SCENE else set())
        if len(seen) > 1:
            return
    told = f"all that is trained on has class {train.classes[min(seen)]!r}" if seen else _NO_CELL
    raise ValueError(f"--dataset: {told}; wanted two classes or more")


def encode(model: Model, examples: Examples, *, batch_size: int) -> Iterator[tuple[Example, Cells]]:
    """Each example with its cells, in order."""
    how = dict(cells=model.cells, num_dates=model.num_dates, batch_size=batch_size, fused_only=True)
    waiting: list[Example] = []

    def samples() -> Iterator[SampleReader]:
        for example in examples:
            waiting.append(example)
            yield example.before
            if example.after is not None:
                yield example.after

    found = sample_features(model.network, model.params, model.rows, samples(), **how)
    for cells in found:
        example = waiting.pop(0)
        if example.after is None:
            yield example, Cells(cells.fused, cells.fused_usable)
            continue
        after = next(found)
        joined = np.concatenate((np.abs(cells.fused - after.fused), cells.fused, after.fused), axis=-1)
        yield example, Cells(joined, cells.fused_usable & after.fused_usable)


def evaluate(
    model: Model, train: Examples, test: Examples, options: Options, *, protocols: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Per protocol (some of ``PROTOCOLS``) the scores on ``test`` of what is fitted on ``train``, both encoded.

    Every image is encoded once, however many protocols there are. Raises as ``evaluate_cells``.
    """
    read = functools.partial(encode, model, batch_size=options.batch_size)
    return evaluate_cells(read, train, test, options, protocols=protocols)


def evaluate_cells(
    read: Reader, train: Examples, test: Examples, options: Options, *, protocols: Sequence[str]
) -> dict[str, dict[str, float]]:
    """``evaluate`` of what ``read`` makes of examples.

    Raises:
      ValueError: k nearest neighbours of several classes an image.
      linear.NothingToFitError: nothing usable to train on, or of one class only.
    """
    if train.kind == MULTI_LABEL and KNN in protocols:
        raise ValueError(f"--protocol: {KNN} gives one class an image; wanted {LINEAR} for {MULTI_LABEL}")
    if train.kind in (SCENE, MULTI_LABEL):
        return _images(read, train, test, options, protocols)
    found = _maps(read, train, test, options, protocols)
    if train.kind == CHANGE:
        return {protocol: scores.change_scores(confusion) for protocol, confusion in found.items()}
    how = dict(classes=train.classes, left_out=options.left_out)
    return {protocol: scores.segmentation_scores(confusion, **how) for protocol, confusion in found.items()}


# ---- one target an image


def image_feature(cells: Cells) -> Float[np.ndarray, " D"]:
    """The mean over usable cells, over all where none is."""
    usable = cells.usable if cells.usable.any() else np.ones_like(cells.usable)
    return cells.features[usable].mean(axis=0)


def _images(
    read: Reader, train: Examples, test: Examples, options: Options, protocols: Sequence[str]
) -> dict[str, dict[str, float]]:
    parts = []
    for examples in (train, test):
        pairs = [(image_feature(cells), example.target) for example, cells in read(examples)]
        features, targets = zip(*pairs)
        parts += [np.stack(features), np.stack(targets)]
    x, y, test_x, test_y = parts
    if train.kind == MULTI_LABEL:
        return {LINEAR: scores.multi_label_scores(test_y, linear.fit_multi_label(x, y, seed=options.seed)(test_x))}
    count, found = len(train.classes), {}
    if KNN in protocols:
        found[KNN] = scores.scene_scores(test_y, neighbours.classifier(x, y, num_classes=count)(test_x))
    if LINEAR in protocols:
        given = linear.fit(x, y, np.arange(len(y)), num_classes=count, seed=options.seed)(test_x)
        found[LINEAR] = scores.scene_scores(test_y, given.argmax(1), given)
    return found


# ---- maps


def cell_targets(target: UInt8[np.ndarray, "H W"], cells: int) -> UInt8[np.ndarray, "P P"]:
    """The commonest class among each cell's labelled pixels, IGNORED where less than half of them carry one.

    Of equally common ones the lowest. A target coarser than cells gives each cell its pixel.
    """
    times = max(1, cells // len(target))
    ids = np.where(target == IGNORED, 0, target.astype(np.int64) + 1)  # as the probes have them: 0 for none
    ids = ids.repeat(times, 0).repeat(times, 1)
    found = probes.cell_targets(ids, extent_cells=cells, min_share=probes.MIN_LABELLED_SHARE)
    return np.where(found == 0, IGNORED, found - 1).astype(np.uint8)


def enlarge(grid: Float[np.ndarray, "P P K"], side: int) -> Float[np.ndarray, "{side} {side} K"]:
    """``grid`` bilinearly on ``side`` pixels, edges held; where there are fewer than cells, the mean of theirs."""
    weights = _weights(len(grid), side)
    return np.einsum("ip,jq,pqk->ijk", weights, weights, grid, optimize=True)


def _weights(num: int, side: int) -> Float[np.ndarray, "{side} {num}"]:
    if side < num:
        return np.kron(np.eye(side), np.full((1, num // side), side / num))
    place = np.clip((np.arange(side) + 0.5) * num / side - 0.5, 0, num - 1)
    low = np.minimum(place.astype(int), max(num - 2, 0))
    weights = np.zeros((side, num))
    weights[np.arange(side), low] = 1 - (place - low)
    weights[np.arange(side), np.minimum(low + 1, num - 1)] += place - low
    return weights


def _maps(
    read: Reader, train: Examples, test: Examples, options: Options, protocols: Sequence[str]
) -> dict[str, scores.Confusion]:
    count, predict = len(train.classes), {}
    x, y, groups = _training_cells(read, train, options)
    if KNN in protocols:
        one_hot = np.eye(count)
        classes_of = neighbours.classifier(x, y, num_classes=count)
        predict[KNN] = lambda rows: one_hot[classes_of(rows)]
    if LINEAR in protocols:
        predict[LINEAR] = linear.fit(x, y, groups, num_classes=count, seed=options.seed, by_class=True)
    found = {protocol: scores.Confusion(count) for protocol in predict}
    for example, cells in read(test):
        rows = cells.features.reshape(-1, cells.features.shape[-1])
        for protocol, confusion in found.items():
            grid = predict[protocol](rows).reshape(*cells.usable.shape, count)
            confusion.add(example.target, enlarge(grid, len(example.target)).argmax(-1))
    return found


def _training_cells(
    read: Reader, train: Examples, options: Options
) -> tuple[Float[np.ndarray, "N D"], Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
    """Usable cells with a class, at most ``options.max_cells``: features, classes, and which image each lies in."""
    train = _drawn_parts(train, -(-options.max_cells // _CELLS_A_PART), seed=options.seed)
    each, rng = -(-options.max_cells // len(train)), np.random.default_rng(options.seed)
    features, targets, groups, images = [], [], [], {}
    for example, cells in read(train):
        wanted = cell_targets(example.target, len(cells.usable))
        rows = np.flatnonzero((wanted != IGNORED) & cells.usable)
        rows = np.sort(rng.choice(rows, each, replace=False)) if len(rows) > each else rows
        features.append(cells.features.reshape(-1, cells.features.shape[-1])[rows])
        targets.append(wanted.ravel()[rows].astype(np.int64))
        groups.append(np.full(len(rows), images.setdefault(example.image, len(images))))
    found = np.concatenate(targets)
    if not len(found):
        raise linear.NothingToFitError(f"--dataset: {_NO_CELL}")
    count, most = len(found), options.max_cells
    kept = np.sort(rng.choice(count, most, replace=False)) if count > most else np.arange(count)
    return np.concatenate(features)[kept], found[kept], np.concatenate(groups)[kept]


def _drawn_parts(examples: Examples, count: int, *, seed: int) -> Examples:
    """At most ``count`` of the examples, drawn evenly over images: of each one part before of any a second."""
    if len(examples) <= count:
        return examples
    rng = np.random.default_rng((seed, 1))
    images = [examples.images[i] for i in rng.permutation(len(examples.images))]
    turns = [enumerate(rng.permutation(parts)) for parts in images]
    ranked = sorted((turn, place, int(part)) for place, of in enumerate(turns) for turn, part in of)
    return examples.pick(sorted(part for *_, part in ranked[:count]))
