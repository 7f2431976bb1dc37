"""Scores of tasks: scene classes, several classes an image, maps of classes, maps of change.

Scores of maps come from a confusion matrix that adds up over images, so that no map has to be kept: they are those of
all pixels together, not means over images. Everything is a share of 1. Next: neighbours.py, probes.py.
"""

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, Integer
from sklearn.metrics import accuracy_score, average_precision_score, top_k_accuracy_score

IGNORED = 255  # a pixel without a label
_CHANGED = 1  # its class among (unchanged, changed)


def scene_scores(
    targets: Integer[np.ndarray, " N"],
    predictions: Integer[np.ndarray, " N"],
    class_scores: Float[np.ndarray, "N K"] | None = None,
) -> dict[str, float]:
    """Overall accuracy; with scores of more than five classes also top 5."""
    found = {"accuracy": float(accuracy_score(targets, predictions))}
    if class_scores is not None and class_scores.shape[1] > 5:
        labels = np.arange(class_scores.shape[1])
        found["top_5"] = float(top_k_accuracy_score(targets, class_scores, k=5, labels=labels))
    return found


def multi_label_scores(targets: Bool[np.ndarray, "N K"], class_scores: Float[np.ndarray, "N K"]) -> dict[str, float]:
    """Mean average precision: over all decisions together (micro), and the mean over classes (macro).

    A class that no target has does not enter the macro mean. NaN if no target has any class.
    """
    there = targets.any(axis=0)
    if not there.any():
        return {"map_micro": float("nan"), "map_macro": float("nan")}
    return {
        "map_micro": float(average_precision_score(targets, class_scores, average="micro")),
        "map_macro": float(average_precision_score(targets[:, there], class_scores[:, there], average="macro")),
    }


@dataclasses.dataclass(frozen=True)
class MapScores:
    """Per class, and their means.

    Attributes:
      iou, f1: per class; NaN for a class that no target has.
      miou, mf1: means over the classes that targets have.
      accuracy: share of pixels right.
    """

    iou: Float[np.ndarray, " K"]
    f1: Float[np.ndarray, " K"]
    miou: float
    mf1: float
    accuracy: float


class Confusion:
    """Counts of (target, prediction) pairs over any number of maps.

    Attributes:
      counts: rows are targets, columns predictions.
    """

    counts: Int[np.ndarray, "K K"]

    def __init__(self, num_classes: int):
        self.counts = np.zeros((num_classes, num_classes), np.int64)

    def add(self, targets: Integer[np.ndarray, "*shape"], predictions: Integer[np.ndarray, "*shape"]) -> None:
        """Counts the pixels whose target is not ``IGNORED``.

        Raises:
          ValueError: an id that no class has.
        """
        known = targets != IGNORED
        pairs = np.stack((targets[known], predictions[known])).astype(np.int64)
        count = len(self.counts)
        if pairs.size and not 0 <= pairs.min() <= pairs.max() < count:
            raise ValueError(f"class ids {pairs.min()} to {pairs.max()}; wanted 0 to {count - 1}")
        self.counts += np.bincount(pairs[0] * count + pairs[1], minlength=count**2).reshape(count, count)

    def scores(self, *, left_out: Collection[int] = ()) -> MapScores:
        """Scores of what was counted; classes ``left_out`` do not enter the means. NaN where nothing was."""
        hits, wanted, said = np.diag(self.counts), self.counts.sum(1), self.counts.sum(0)
        with np.errstate(divide="ignore", invalid="ignore"):
            iou = np.where(wanted > 0, hits / (wanted + said - hits), np.nan)
            f1 = np.where(wanted > 0, 2 * hits / (wanted + said), np.nan)
            accuracy = float(np.divide(hits.sum(), wanted.sum()))
        entering = (wanted > 0) & ~np.isin(np.arange(len(hits)), list(left_out))
        mean = lambda x: float(x[entering].mean()) if entering.any() else float("nan")  # noqa: E731
        return MapScores(iou, f1, mean(iou), mean(f1), accuracy)


def segmentation_scores(
    confusion: Confusion, classes: Sequence[str], *, left_out: Collection[int] = ()
) -> dict[str, float]:
    """mIoU, mF1, the share of pixels right, and "iou/CLASS" of each class that targets have."""
    found = confusion.scores(left_out=left_out)
    each = {f"iou/{name}": float(iou) for name, iou in zip(classes, found.iou, strict=True) if np.isfinite(iou)}
    return {"miou": found.miou, "mf1": found.mf1, "accuracy": found.accuracy, **each}


def change_scores(confusion: Confusion) -> dict[str, float]:
    """F1, IoU, precision and recall of the changed class (id 1 of two), and the share of pixels right.

    Precision is 0 where no change was said; all but the share are NaN where there was none.
    """
    found, counts = confusion.scores(), confusion.counts
    hits, wanted, said = counts[_CHANGED, _CHANGED], counts[_CHANGED].sum(), counts[:, _CHANGED].sum()
    return {
        "f1": float(found.f1[_CHANGED]),
        "iou": float(found.iou[_CHANGED]),
        "precision": float(hits / said) if said else 0.0 if wanted else float("nan"),
        "recall": float(hits / wanted) if wanted else float("nan"),
        "accuracy": found.accuracy,
    }
