"""The linear protocol: scikit-learn's logistic regression on standardised features, its penalty chosen on a part.

Next: frozen.py, which gives the features.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from sklearn.metrics import accuracy_score, average_precision_score, jaccard_score

from skysense_jax.eval.probes import fit_logistic

INVERSE_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # grid of LogisticRegression's C
DEFAULT = 0.1  # where nothing can be held out
_HELD_OUT_SHARE = 0.25
_MOST_CHOSEN_ON = 50_000  # rows, our choice: five fits of hundreds of thousands would take hours (an estimate)
_NEVER = -1e9  # the score of a class that nothing was trained on; finite, since maps interpolate scores

Scorer = Callable[[np.ndarray], np.ndarray]


_fit = functools.partial(fit_logistic, tolerance=1e-4)


class NothingToFitError(ValueError):
    """What is usable and labelled has one class or none: found behind reading, by every process that read the same."""


def _chosen_on(groups: Int[np.ndarray, " N"], seed: int) -> tuple[Int[np.ndarray, " M"], Bool[np.ndarray, " M"]]:
    """Rows to choose a penalty on, all or as many drawn as are enough; and which of them are held out to judge it: a
    quarter of the groups (images), drawn; none of a single one."""
    rng, rows = np.random.default_rng(seed), np.arange(len(groups))
    known = np.unique(groups)
    drawn = rng.permutation(known)[: int(_HELD_OUT_SHARE * len(known))]
    if len(rows) > _MOST_CHOSEN_ON:
        rows = np.sort(rng.choice(rows, _MOST_CHOSEN_ON, replace=False))
    return rows, np.isin(groups[rows], drawn)


def fit(
    x: Float[np.ndarray, "N D"],
    y: Int[np.ndarray, " N"],
    groups: Int[np.ndarray, " N"],
    *,
    num_classes: int,
    seed: int,
    by_class: bool = False,
) -> Scorer:
    """A function from features to the scores of all classes, fitted on ``x`` and ``y``.

    The penalty is the one that does best on a quarter of ``groups`` when fitted on the others: by accuracy, or by the
    mean IoU of classes; then all is fitted on.

    Raises:
      NothingToFitError: one class only.
    """
    if len(np.unique(y)) < 2:
        raise NothingToFitError(f"--dataset: all that is trained on has class {int(y[0])}; wanted two classes or more")
    rows, held = _chosen_on(groups, seed)
    (fit_x, fit_y), (held_x, held_y) = ((x[rows[part]], y[rows[part]]) for part in (~held, held))
    choice = DEFAULT
    if held.any() and len(np.unique(fit_y)) > 1:
        judge = (lambda a, b: jaccard_score(a, b, average="macro", labels=np.unique(a))) if by_class else accuracy_score
        tried = {c: judge(held_y, _fit(fit_x, fit_y, c).predict(held_x)) for c in INVERSE_PENALTIES}
        choice = max(tried, key=tried.get)
    return _scorer(_fit(x, y, choice), num_classes)


def _scorer(fitted: Any, num_classes: int) -> Scorer:
    """Scores of all classes, of a classifier that knows some: differences of two are log odds."""

    def scores(rows: np.ndarray) -> np.ndarray:
        some = fitted.decision_function(rows.astype(np.float64))
        some = np.stack((np.zeros_like(some), some), axis=-1) if some.ndim == 1 else some
        out = np.full((len(rows), num_classes), _NEVER)
        out[:, fitted.classes_] = some
        return out

    return scores


def fit_multi_label(x: Float[np.ndarray, "N D"], y: Bool[np.ndarray, "N K"], *, seed: int) -> Scorer:
    """The same for several classes an image: one classifier a class, one penalty for all, by micro mAP."""
    rows, held = _chosen_on(np.arange(len(y)), seed)
    (fit_x, fit_y), (held_x, held_y) = ((x[rows[part]], y[rows[part]]) for part in (~held, held))
    choice = DEFAULT
    if held.any() and held_y.any():
        tried = {}
        for penalty in INVERSE_PENALTIES:
            found = _each(fit_x, fit_y, penalty)(held_x)
            tried[penalty] = average_precision_score(held_y, found, average="micro")
        choice = max(tried, key=tried.get)
    return _each(x, y, choice)


def _each(x: np.ndarray, y: np.ndarray, penalty: float) -> Scorer:
    """Of a class that all have, or none, the score is the same for every image."""
    fitted = [_fit(x, column, penalty) if 0 < column.sum() < len(column) else None for column in y.T]
    same = [-_NEVER if column.any() else _NEVER for column in y.T]

    def scores(rows: np.ndarray) -> np.ndarray:
        rows = rows.astype(np.float64)
        columns = [np.full(len(rows), s) if f is None else f.decision_function(rows) for f, s in zip(fitted, same)]
        return np.stack(columns, axis=1)

    return scores
