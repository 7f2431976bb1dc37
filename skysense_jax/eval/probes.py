"""Probes of frozen features of cells, split by scene: what a run has learned, in four numbers a task.

A linear probe asks whether a logistic regression can read a cell's class off its feature; k nearest neighbours ask the
features as they are. Tasks are the label map (the text objective sees it) and the attributes of procedural scenes that
no record carries and no loss ever sees.
``raw_bands`` is the baseline: the numbers of the cell's own 3x3 neighbourhood. Next: features.py, where features come
from; benchmarks/learning.py, the table of all of it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import linen as nn
from jaxtyping import Bool, Float, Int, Integer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from skysense_jax.data import scenes
from skysense_jax.data.sample import SampleReader
from skysense_jax.eval import neighbours
from skysense_jax.eval.features import WholeSample, read_whole, sample_features
from skysense_jax.modalities import OSM, Modality

LABELS = OSM.name
# Share of a cell's sub-pixels that must carry an id before the cell has a target [our choice]. An attribute is asked
# for wherever it applies, so less will do.
MIN_LABELLED_SHARE = 0.5
MIN_ATTRIBUTE_SHARE = 0.25
INVERSE_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)  # grid of LogisticRegression's C, chosen on scenes held out of training
MAX_CELLS = 10_000  # training cells of a probe


@dataclasses.dataclass(frozen=True)
class Scores:
    """Mean intersection over union of the classes present in the test cells, and the share of cells right."""

    miou: float
    accuracy: float


_NOTHING = Scores(float("nan"), float("nan"))


@dataclasses.dataclass(frozen=True)
class ProbeCells:
    """Cells of several scenes.

    Attributes:
      features: one row a cell.
      targets: per task, the class id of each cell; 0 = the task does not ask about this cell.
      scenes: which scene each cell lies in.
    """

    features: Float[np.ndarray, "N D"]
    targets: Mapping[str, Int[np.ndarray, " N"]]
    scenes: Int[np.ndarray, " N"]


def cell_targets(
    ids: Integer[np.ndarray, "H W"], *, extent_cells: int, min_share: float
) -> Int[np.ndarray, "{extent_cells} {extent_cells}"]:
    """The commonest id other than 0 among each cell's sub-pixels; 0 where less than ``min_share`` of them carry one.

    Of equally common ids the lowest wins.
    """
    per_cell = ids.shape[0] // extent_cells
    blocks = ids.reshape(extent_cells, per_cell, extent_cells, per_cell)
    counts = np.stack([(blocks == i).sum(axis=(1, 3)) for i in range(int(ids.max()) + 1)], axis=-1)
    counts[..., 0] = 0
    return np.where(counts.sum(-1) >= min_share * per_cell**2, counts.argmax(-1), 0)


def score(targets: Int[np.ndarray, " N"], predictions: Int[np.ndarray, " N"]) -> Scores:
    """Scores of class ids against targets; a class that no target has does not enter the mean."""
    present = np.unique(targets)
    table = confusion_matrix(targets, predictions, labels=np.union1d(targets, predictions))
    hits = np.diag(table)
    union = table.sum(0) + table.sum(1) - hits
    in_targets = np.isin(np.union1d(targets, predictions), present)
    return Scores(float((hits[in_targets] / union[in_targets]).mean()), float(hits.sum() / table.sum()))


def fit_logistic(
    features: Float[np.ndarray, "N D"],
    targets: Int[np.ndarray, " N"] | Bool[np.ndarray, " N"],
    inverse_penalty: float,
    *,
    tolerance: float,
) -> Any:
    """scikit-learn's logistic regression on standardised features, fitted."""
    classifier = LogisticRegression(C=inverse_penalty, max_iter=2000, tol=tolerance)
    # ten times as fast on a busy machine: threads of such small products wait for each other
    with threadpool_limits(1):
        return make_pipeline(StandardScaler(), classifier).fit(features.astype(np.float64), targets)


_fit = functools.partial(fit_logistic, tolerance=1e-3)


def fit_probe(train: ProbeCells, *, task: str, max_cells: int = MAX_CELLS) -> Any | None:
    """A regularised logistic regression of standardised features, with scikit-learn's ``predict``.

    The penalty is the one that does best on the last quarter of the training scenes when fitted on the others.
    At most ``max_cells`` training cells are used, drawn with a fixed seed. Same input, same probe.
    None where there is nothing to tell apart: fewer than two classes.
    """
    rows = _drawn(train, task, max_cells)
    features, targets, places = train.features[rows], train.targets[task][rows], train.scenes[rows]
    if np.unique(targets).size < 2:
        return None

    all_scenes = np.unique(places)
    held_out = np.isin(places, all_scenes[len(all_scenes) - len(all_scenes) // 4 :])
    penalty = INVERSE_PENALTIES[len(INVERSE_PENALTIES) // 2]
    if held_out.any() and np.unique(targets[~held_out]).size > 1:
        trials = {}
        for trial in INVERSE_PENALTIES:
            predictions = _fit(features[~held_out], targets[~held_out], trial).predict(features[held_out])
            trials[trial] = score(targets[held_out], predictions).miou
        penalty = max(trials, key=trials.get)
    return _fit(features, targets, penalty)


def score_probe(probe: Any | None, test: ProbeCells, *, task: str) -> Scores:
    """Scores of what ``fit_probe`` gave, on the cells of ``test`` that the task asks about; NaN where there is none."""
    asked = test.targets[task] > 0
    if probe is None or not asked.any():
        return _NOTHING
    return score(test.targets[task][asked], probe.predict(test.features[asked].astype(np.float64)))


def linear_probe(train: ProbeCells, test: ProbeCells, *, task: str, max_cells: int = MAX_CELLS) -> Scores:
    """Scores on ``test`` of ``fit_probe`` on ``train``.

    NaN where there is nothing to tell apart: fewer than two classes to fit on, or no test cell of the task.

    Raises:
      ValueError: a scene is in both parts.
    """
    _refuse_shared(train, test)
    if not (test.targets[task] > 0).any():
        return _NOTHING
    return score_probe(fit_probe(train, task=task, max_cells=max_cells), test, task=task)


def neighbour_probe(train: ProbeCells, test: ProbeCells, *, task: str, max_cells: int = MAX_CELLS) -> Scores:
    """The same of k nearest neighbours (neighbours.py): no training, so nothing is chosen."""
    _refuse_shared(train, test)
    rows, test_rows = _drawn(train, task, max_cells), np.flatnonzero(test.targets[task] > 0)
    classes, labels = np.unique(train.targets[task][rows], return_inverse=True)
    if classes.size < 2 or not test_rows.size:
        return _NOTHING
    found = neighbours.classifier(train.features[rows], labels, num_classes=len(classes))(test.features[test_rows])
    return score(test.targets[task][test_rows], classes[found])


def _refuse_shared(train: ProbeCells, test: ProbeCells) -> None:
    shared = np.intersect1d(train.scenes, test.scenes)
    if shared.size:
        raise ValueError(f"scenes {shared[:5].tolist()} are in training and test cells; a probe is split by scene")


def _drawn(train: ProbeCells, task: str, max_cells: int) -> Int[np.ndarray, " N"]:
    """Indices of the cells that the task asks about, at most ``max_cells`` of them."""
    rows = np.flatnonzero(train.targets[task] > 0)
    if rows.size > max_cells:
        rows = np.sort(np.random.default_rng(0).choice(rows, max_cells, replace=False))
    return rows


# ---- from scenes to cells


def raw_bands(whole: WholeSample, modalities: Sequence[Modality]) -> Float[np.ndarray, "P Q D"]:
    """The numbers of each cell's 3x3 neighbourhood: all drawn dates and bands, no learning.

    Standardised by the modality's mean and deviation, as the network reads them: neighbours would else see those of the
    largest unit alone. Of a modality with several pixels a cell: the mean and the deviation of each band in the cell.
    Edges are repeated.
    """
    parts = []
    for modality in modalities:
        images, per_cell = whole.images[modality.name].astype(np.float32), modality.pixels_per_cell
        images = (images - np.float32(modality.mean)) / np.float32(modality.std)
        cells = images.shape[1] // per_cell
        blocks = images.reshape(images.shape[0], cells, per_cell, cells, per_cell, -1)
        statistics = [blocks.mean(axis=(2, 4))] + ([blocks.std(axis=(2, 4))] if per_cell > 1 else [])
        parts += [np.moveaxis(s, 0, 2).reshape(cells, cells, -1) for s in statistics]
    flat = np.concatenate(parts, axis=-1)
    padded = np.pad(flat, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows, columns = flat.shape[:2]
    return np.concatenate([padded[r : r + rows, c : c + columns] for r in range(3) for c in range(3)], axis=-1)


def raw_cells(
    whole: WholeSample, modalities: Sequence[Modality]
) -> tuple[Float[np.ndarray, "P Q D"], Bool[np.ndarray, "P Q"]]:
    """``raw_bands``, and where at least one modality and date is usable."""
    usable = np.any([whole.cell_usable[m.name].any(axis=0) for m in modalities], axis=0)
    return raw_bands(whole, modalities), usable


def gather_cells(
    features: Sequence[Float[np.ndarray, "P Q D"]],
    usable: Sequence[Bool[np.ndarray, "P Q"]],
    labels: Sequence[Integer[np.ndarray, "H W"] | None],
    attributes: Sequence[Mapping[str, Integer[np.ndarray, "_ _"]]],
    *,
    first_scene: int,
) -> ProbeCells:
    """The usable cells of scenes ``first_scene``, ``first_scene + 1``, ..., with their targets per task.

    Label maps and attributes hold class ids, 0 = none. A scene without a label map asks for no label.
    """
    rows, places = [], []
    targets: dict[str, list[np.ndarray]] = {name: [] for name in (LABELS, *sorted(attributes[0]))}
    for scene, (x, mask, label_map, hidden) in enumerate(zip(features, usable, labels, attributes, strict=True)):
        rows.append(x[mask])
        places.append(np.full(int(mask.sum()), first_scene + scene))
        for name in targets:
            ids, share = (label_map, MIN_LABELLED_SHARE) if name == LABELS else (hidden[name], MIN_ATTRIBUTE_SHARE)
            ids = np.zeros((len(mask), len(mask)), np.uint8) if ids is None else ids
            targets[name].append(cell_targets(ids, extent_cells=len(mask), min_share=share)[mask])
    joined = {name: np.concatenate(parts) for name, parts in targets.items()}
    return ProbeCells(np.concatenate(rows), joined, np.concatenate(places))


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Rendered scenes to fit a probe on and, after them, to score it on; the first one's number."""

    first_index: int
    train: Sequence[scenes.Scene]
    test: Sequence[scenes.Scene]


def held_out_scenes(
    modalities: Sequence[Modality],
    *,
    seed: int,
    extent_cells: int,
    first_index: int,
    num_train_scenes: int,
    num_test_scenes: int,
) -> HeldOut:
    """Complete scenes of the generator ``seed`` from ``first_index`` on, with what they can show of ``modalities``."""
    names = [m.name for m in modalities if m.name in scenes.MODALITIES]
    render = functools.partial(scenes.render, seed=seed, extent_cells=extent_cells, modalities=names, complete=True)
    drawn = [render(first_index + i) for i in range(num_train_scenes + num_test_scenes)]
    return HeldOut(first_index, drawn[:num_train_scenes], drawn[num_train_scenes:])


_Read = Callable[[Iterable[SampleReader]], Iterable[tuple[np.ndarray, np.ndarray]]]


def _probe(held_out: HeldOut, read: _Read, read_test: _Read | None = None) -> dict[str, float]:
    parts, first = [], held_out.first_index
    for drawn, reads in ((held_out.train, read), (held_out.test, read_test or read)):
        features, usable = zip(*reads(scene.sample for scene in drawn))
        labels, attributes = [s.sample.labels for s in drawn], [s.attributes for s in drawn]
        parts.append(gather_cells(features, usable, labels, attributes, first_scene=first))
        first += len(drawn)
    scores = {}
    for task in parts[0].targets:
        for kind, probe in (("", linear_probe), ("knn_", neighbour_probe)):
            found = dataclasses.asdict(probe(*parts, task=task))
            scores |= {f"{task}/{kind}{name}": value for name, value in found.items()}
    return scores


def probe_scenes(
    model: nn.Module,
    params: Any,
    modalities: Sequence[Modality],
    held_out: HeldOut,
    *,
    cells: int,
    num_dates: Mapping[str, int],
    batch_size: int,
    shown: Sequence[Modality] = (),
) -> dict[str, float]:
    """Scores on frozen fused features of procedural scenes: of a linear probe and of k nearest neighbours.

    ``{task/miou, task/accuracy, task/knn_miou, task/knn_accuracy}``.
    ``cells``, ``num_dates`` and ``batch_size`` as in ``features.sample_features``. ``shown``: some of ``modalities``,
    all that test scenes show; scored are then the cells that each of ``modalities`` sees, the same whatever is shown.
    NaN where the scenes hold nothing to tell apart.
    """
    how = dict(cells=cells, num_dates=num_dates, batch_size=batch_size)

    def read(samples: Iterable[SampleReader]) -> Iterable[tuple[np.ndarray, np.ndarray]]:
        return ((f.fused, f.fused_usable) for f in sample_features(model, params, modalities, samples, **how))

    def read_shown(samples: Iterable[SampleReader]) -> Iterable[tuple[np.ndarray, np.ndarray]]:
        samples = list(samples)
        for sample, f in zip(samples, sample_features(model, params, shown, samples, **how), strict=True):
            usable = read_whole(sample, modalities, num_dates=num_dates).cell_usable
            seen = [usable[modality.name].any(axis=0) for modality in modalities]
            yield f.fused, np.logical_and.reduce(seen) & f.fused_usable

    return _probe(held_out, read, read_shown if shown else None)


def probe_raw_bands(
    modalities: Sequence[Modality], held_out: HeldOut, *, num_dates: Mapping[str, int]
) -> dict[str, float]:
    """The same scores as ``probe_scenes``, of ``raw_bands``: the baseline that needs no network."""

    def read(samples: Iterable[SampleReader]) -> Iterable[tuple[np.ndarray, np.ndarray]]:
        for sample in samples:
            yield raw_cells(read_whole(sample, modalities, num_dates=num_dates), modalities)

    return _probe(held_out, read)
