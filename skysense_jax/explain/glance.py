"""The figures of a report that are read first: the loss, and others beside what they are by chance or untrained.

Next: report.py, whose sections say how each is measured.
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from skysense_jax.eval.probes import LABELS
from skysense_jax.explain import missing, retrieval
from skysense_jax.explain.attention import Selected
from skysense_jax.explain.course import Probes
from skysense_jax.page.markup import element


def tiles(
    lines: Sequence[Mapping[str, Any]],
    closing: Probes | None,
    selected: Selected,
    pairs: Mapping[tuple[str, str], retrieval.Cells],
    asked: Sequence[missing.Condition],
    found: missing.Found,
    *,
    classes: Sequence[str],
) -> str:
    """HTML: a list of figures; those that the run does not have are left out."""
    shown = [_loss(lines), _probe(closing), _queries(selected, classes), _neighbours(pairs), _missing(asked, found)]
    listed = "".join(element("li", element("b", number) + html.escape(words)) for number, words in filter(None, shown))
    return element("ul", listed, class_="tiles", aria_label="At a glance") if listed else ""


def _loss(lines: Sequence[Mapping[str, Any]]) -> tuple[str, str] | None:
    loss = np.array([line["loss"] for line in lines if isinstance(line.get("loss"), int | float)])
    loss = loss[np.isfinite(loss)]
    if not loss.size:
        return None
    few = max(1, len(loss) // 10)
    return f"{loss[:few].mean():.3g} → {loss[-few:].mean():.3g}", "loss, in the first and the last tenth of the log"


def _probe(closing: Probes | None) -> tuple[str, str] | None:
    """The label map's linear probe beside the untrained network's."""
    if closing is None:
        return None
    scores = {name: of.get(f"{LABELS}/miou") for name, of in closing.networks.items()}
    if scores.get("teacher") is None:
        return None
    untrained = scores.get("untrained")
    beside = "" if untrained is None else f"; untrained: {100 * untrained:.1f}"
    return f"{100 * scores['teacher']:.1f}", f"mean IoU of the closing linear probe on the label map, in points{beside}"


def _queries(selected: Selected, classes: Sequence[str]) -> tuple[str, str] | None:
    if (selected.top < 0).all():
        return None
    query = int(selected.order[0])
    name = classes[selected.top[query]].replace("_", " ")
    words = f"attention of the most selective query, {query}, on its class, {name}; 1 is even"
    return f"{selected.lift[query, selected.top[query]]:.2f} times", words


def _neighbours(pairs: Mapping[tuple[str, str], retrieval.Cells]) -> tuple[str, str] | None:
    if not pairs:
        return None
    shares = [retrieval.found_at(cells)[1] for cells in pairs.values()]
    chance = np.mean([1 / len(cells.a) for cells in pairs.values()])
    words = f"of cells are their own nearest in another modality, mean over pairs; chance: {chance:.1%}"
    return f"{np.mean(shares):.1%}", words


def _missing(asked: Sequence[missing.Condition], found: missing.Found) -> tuple[str, str] | None:
    """The label map's score with everything, and without the modality that is missed most."""
    kinds = {missing.WITHOUT, missing.ALONE} & {condition.kind for condition in asked}
    kind = missing.WITHOUT if missing.WITHOUT in kinds else missing.ALONE
    less = {condition.name: found.scores[condition.name][LABELS].miou for condition in asked if condition.kind == kind}
    everything = found.scores[missing.EVERYTHING][LABELS].miou
    if not less or not np.isfinite([everything, *less.values()]).all():
        return None
    worst = min(less, key=less.get)
    words = f"mean IoU on the label map with everything, and {worst}; the commonest class: "
    return f"{100 * everything:.1f} → {100 * less[worst]:.1f}", f"{words}{100 * found.constant[LABELS].miou:.1f}"
