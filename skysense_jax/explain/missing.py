"""What a network still tells when modalities or dates are missing: a probe fitted on everything, scored on less.

Next: places.Shown (how they are hidden), eval/probes.py (the probe), report.py.
"""

import dataclasses
import html
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float

from skysense_jax.eval.probes import ProbeCells, Scores, fit_probe, gather_cells, score, score_probe
from skysense_jax.explain.places import Place
from skysense_jax.page.charts import Curve, curve_chart
from skysense_jax.page.markup import element, guide, table

EVERYTHING, WITHOUT, ALONE, DATES = "everything", "without", "alone", "dates"


@dataclasses.dataclass(frozen=True)
class Condition:
    """What is seen at test time.

    Attributes:
      name: for people.
      kind: one of the four above; ``size``: how many modalities, or of ``DATES`` how many dates, are seen.
      num_dates: of each modality at most; 0: none.
      modality: the one that is alone or left out.
    """

    name: str
    kind: str
    size: int
    num_dates: Mapping[str, int]
    modality: str = ""


def conditions(num_dates: Mapping[str, int]) -> list[Condition]:
    """Everything; then without each modality, each alone, and with fewer dates of all; none twice."""
    names = list(num_dates)
    found = [Condition(EVERYTHING, EVERYTHING, len(names), dict(num_dates))]
    if len(names) > 2:
        found += [Condition(f"without {name}", WITHOUT, len(names) - 1, {**num_dates, name: 0}, name) for name in names]
    if len(names) > 1:
        found += [
            Condition(f"{name} alone", ALONE, 1, {n: count if n == name else 0 for n, count in num_dates.items()}, name)
            for name in names
        ]
    for most in _fewer(max(num_dates.values())):
        few = {name: min(count, most) for name, count in num_dates.items()}
        found.append(Condition(f"at most {most} date{'' if most == 1 else 's'}", DATES, most, few))
    return found


def _fewer(most: int) -> list[int]:
    """Halves of ``most`` down to 1, the largest first."""
    found = []
    while most > 1:
        most //= 2
        found.append(most)
    return found


@dataclasses.dataclass(frozen=True)
class Found:
    """Scores of the probes.

    Attributes:
      scores: per condition's name and task; NaN where there is nothing to tell apart.
      constant: per task, of a probe that always says the commonest class of the training cells.
      num_cells: that all conditions see, on which all are scored.
    """

    scores: Mapping[str, Mapping[str, Scores]]
    constant: Mapping[str, Scores]
    num_cells: int


def compare(
    train: ProbeCells,
    places: Sequence[Place],
    fused: Mapping[str, Sequence[Float[np.ndarray, "_ _ D"]]],
    usable: Mapping[str, Sequence[Bool[np.ndarray, "_ _"]]],
) -> Found:
    """Scores of probes fitted on ``train``; ``fused`` and ``usable`` per condition's name, of each of ``places``.

    All are scored on the same cells: those that every condition sees.
    """
    both = [np.logical_and.reduce(masks) for masks in zip(*usable.values())]
    labels, attributes = [place.labels for place in places], [place.attributes for place in places]
    last = int(train.scenes.max()) + 1 if len(train.scenes) else 0
    tests = {name: gather_cells(x, both, labels, attributes, first_scene=last) for name, x in fused.items()}
    probes = {task: fit_probe(train, task=task) for task in train.targets}
    scores = {
        name: {task: score_probe(probe, test, task=task) for task, probe in probes.items()}
        for name, test in tests.items()
    }
    constant = {}
    for task in probes:
        known, test = train.targets[task], next(iter(tests.values()))
        targets = test.targets[task][test.targets[task] > 0]
        commonest = np.bincount(known[known > 0], minlength=1).argmax()
        constant[task] = score(targets, np.full_like(targets, commonest)) if len(targets) else Scores(np.nan, np.nan)
    return Found(scores, constant, int(sum(mask.sum() for mask in both)))


# ---- on the page


def section(asked: Sequence[Condition], found: Found) -> str:
    """HTML: a table of all conditions and curves over the number of modalities and of dates."""
    tasks = [task for task, scores in found.scores[EVERYTHING].items() if np.isfinite(scores.miou)]
    if not tasks:
        return element(
            "p",
            "No probe could be scored: the places have no label map, or no cell is seen under all conditions that are "
            "compared.",
        )
    told = guide(
        "A linear probe is fitted on fused features of other places, with everything there is, and scored on places of "
        f"which less is seen; always on the same {found.num_cells:,} cells, those that all conditions see. Numbers are "
        "the mean IoU in points; few places leave some of them to chance.",
        good="a gentle fall as less is seen, and no modality whose loss takes all.",
        bad="the score of the commonest class, which needs no network; or a score that rises when a modality is left "
        "out.",
    )
    titles = [task.replace("_", " ") for task in tasks]
    rows = [
        [html.escape(condition.name), *(_points(found.scores[condition.name][task].miou) for task in tasks)]
        for condition in asked
    ]
    rows.append(["the commonest class", *(_points(found.constant[task].miou) for task in tasks)])
    charts = [_curves(asked, found, tasks, dates) for dates in (False, True)]
    drawn = element("div", "".join(element("figure", chart) for chart in charts if chart), class_="charts")
    head = ["seen at test time", *map(html.escape, titles)]
    listed = table("Mean IoU by task, in points", head, rows, classes=["", *["number"] * len(tasks)])
    return told + element("div", listed + drawn, class_="beside")


def _points(value: float) -> str:
    return f"{100 * value:.1f}" if np.isfinite(value) else ""


def _curves(asked: Sequence[Condition], found: Found, tasks: Sequence[str], dates: bool) -> str:
    kinds = (DATES,) if dates else (WITHOUT, ALONE)
    some = [condition for condition in asked if condition.kind in kinds]
    if not some:
        return ""
    everything = next(condition for condition in asked if condition.kind == EVERYTHING)
    size = max(everything.num_dates.values()) if dates else everything.size
    by_size: dict[int, list[str]] = {size: [EVERYTHING]}
    for condition in some:
        by_size.setdefault(condition.size, []).append(condition.name)
    sizes = sorted(by_size)
    curves = [
        Curve(
            task.replace("_", " "),
            np.array(sizes, float),
            np.array([100 * np.mean([found.scores[name][task].miou for name in by_size[size]]) for size in sizes]),
            marked=True,
        )
        for task in tasks
    ]
    title = "Mean IoU by number of dates" if dates else "Mean IoU by number of modalities"
    axis = "dates of a modality at most" if dates else "modalities seen; mean over which"
    return curve_chart(curves, title=title, axis=axis, unit="points", from_zero=True, whole_x=sizes)
