"""Where the semantic queries look, and at what: attention maps of whole places, and the classes beneath them.

Attention is told as a multiple of what a query that looks everywhere alike would give a cell, so that windows and
places of any size compare. Next: models/queries.py (the decoder), report.py.
"""

import dataclasses
import html
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Bool, Float, Int, Integer
from matplotlib import colormaps
from matplotlib.colors import to_hex

from skysense_jax.drawing import NOTHING, label_colours
from skysense_jax.eval.features import SampleFeatures, window_starts
from skysense_jax.eval.probes import MIN_LABELLED_SHARE, cell_targets
from skysense_jax.explain.imagery import figure, finest, strip
from skysense_jax.explain.places import Place
from skysense_jax.modalities import Modality
from skysense_jax.models.skysense import Features
from skysense_jax.page.charts import matrix
from skysense_jax.page.images import jpeg, reduced
from skysense_jax.page.markup import element, guide, swatch, table

LEAST_SHARE = 0.01  # of the labelled cells that a class must have to be called what a query selects
_MOST_SHOWN = 16  # queries whose maps are shown
_LEAST_STRONG = 1.25  # multiple of even attention that has the full colour, if no query has more
_SIDE = 96  # pixels of a map


@dataclasses.dataclass(frozen=True)
class Selected:
    """What each query selects; classes are those of the label map, in its order.

    Attributes:
      lift: mean attention on the cells of a class, as a multiple of that on all labelled cells; NaN where no cell is.
      share: of the labelled cells that a class has.
      entropy: of a query's lifts as a distribution over the classes that there are, in units of the largest possible:
        1 looks at all classes alike, 0 at one alone.
      top: the class with the highest lift among those with ``LEAST_SHARE`` of the cells; -1 if there is none.
      order: queries by what they select: classes by their highest lift, and the queries of one by theirs.
    """

    lift: Float[np.ndarray, "R K"]
    share: Float[np.ndarray, " K"]
    entropy: Float[np.ndarray, " R"]
    top: Int[np.ndarray, " R"]
    order: Int[np.ndarray, " R"]


def _attend(network: nn.Module, params: Any, fused: Any, usable: Any) -> Any:
    features = Features(modality={}, usable={}, fused=fused, fused_usable=usable, router=None)
    return network.apply({"params": params}, features, method="query_attention")[:, 0]


_jit_attend = jax.jit(_attend, static_argnums=0)


def attention_maps(
    network: nn.Module, params: Any, fused: Float[np.ndarray, "P Q D"], usable: Bool[np.ndarray, "P Q"], *, cells: int
) -> Float[np.ndarray, "R P Q"]:
    """Where each query of a SkySense looks in a place, as a multiple of even attention; 0 in cells without a feature.

    The place is read in windows of ``cells``, a view each; where the last overlaps the one before, it counts.
    """
    extent = len(fused)
    missing = max(cells - extent, 0)
    fused = np.pad(fused, ((0, missing), (0, missing), (0, 0)))
    usable = np.pad(usable, ((0, missing), (0, missing)))
    starts = [(row, column) for row in window_starts(extent, cells) for column in window_starts(extent, cells)]
    cut = lambda x: np.stack([x[row : row + cells, column : column + cells][None] for row, column in starts])  # noqa: E731
    found = np.asarray(_jit_attend(network, params, jnp.asarray(cut(fused)), jnp.asarray(cut(usable))))
    maps = np.zeros((found.shape[1], *usable.shape), np.float32)
    for (row, column), window in zip(starts, found):
        there = usable[row : row + cells, column : column + cells]
        maps[:, row : row + cells, column : column + cells] = np.where(there, window * there.sum(), 0.0)
    return maps[:, :extent, :extent]


def select(
    maps: Sequence[Float[np.ndarray, "R _ _"]], targets: Sequence[Integer[np.ndarray, "_ _"]], *, num_classes: int
) -> Selected:
    """What the queries select in several places; ``targets``: class ids of cells, 0 = leave out."""
    num_queries = len(maps[0])
    looks, ids = np.concatenate([x.reshape(num_queries, -1) for x in maps], 1), np.concatenate(targets, None)
    counts = np.bincount(ids, minlength=num_classes + 1)[1:]
    mass = np.stack([np.bincount(ids, weights=x, minlength=num_classes + 1)[1:] for x in looks])
    total = mass.sum(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = counts / counts.sum()
        lift = np.where(counts > 0, (mass / total) / share, np.nan)
        there = np.where(counts > 0, lift, 0.0)
        parts = there / there.sum(1, keepdims=True)
        entropy = -np.where(parts > 0, parts * np.log(np.where(parts > 0, parts, 1.0)), 0.0).sum(1)
        entropy /= np.log(max(int((counts > 0).sum()), 2))
    common = np.nan_to_num(share) >= LEAST_SHARE
    asked = np.where(common & np.isfinite(lift), lift, -np.inf)
    top = np.where(np.isfinite(asked).any(1), asked.argmax(1), -1)
    highest = asked.max(1, initial=-np.inf)
    of_class = {k: highest[top == k].max() for k in np.unique(top)}
    order = sorted(range(num_queries), key=lambda r: (-of_class[top[r]], top[r], -highest[r], r))
    return Selected(lift, share, entropy, top, np.array(order))


def targets_of(place: Place, usable: Bool[np.ndarray, "P Q"]) -> Int[np.ndarray, "P Q"]:
    """The commonest class of each usable cell; 0 elsewhere and where little is mapped."""
    ids = place.labels
    if ids is None:
        return np.zeros(usable.shape, int)
    return np.where(usable, cell_targets(ids, extent_cells=len(usable), min_share=MIN_LABELLED_SHARE), 0)


# ---- on the page


def selected(
    places: Sequence[Place],
    seen: Sequence[SampleFeatures],
    maps: Sequence[Float[np.ndarray, "R _ _"]],
    num_classes: int,
) -> Selected:
    """What the queries select in these places."""
    targets = [targets_of(place, f.fused_usable) for place, f in zip(places, seen)]
    return select(maps, targets, num_classes=num_classes)


def section(
    places: Sequence[Place],
    seen: Sequence[SampleFeatures],
    maps: Sequence[Float[np.ndarray, "R _ _"]],
    found: Selected,
    rows: Sequence[Modality],
    *,
    classes: Sequence[str],
) -> str:
    """HTML: the maps of ``places``, and the classes beneath the attention: ``found``, also in others."""
    labelled = np.isfinite(found.share).all()
    names = [name.replace("_", " ") for name in classes]
    strongest = _strongest(maps)
    text = (
        "Each query of the decoder gathers one kind of ground. Colours say how much it looks at a cell; the places are "
        "those above, in their order."
    )
    step = max(1, -(-len(found.order) // _MOST_SHOWN))
    shown = found.order[::step]
    grounds = [finest(f, rows) for f in seen]
    strips = []
    for query in shown.tolist():
        title = f"query {query}" + (_told(found, query, names) if labelled else "")
        of_query = [
            figure(jpeg(overlay(x[query], ground, strongest=strongest)), "", f"attention in {place.sample.id}")
            for x, ground, place in zip(maps, grounds, places)
        ]
        strips.append(strip(title, of_query))
    if step > 1:
        text += f" Of {len(found.order)} queries one in {step} is shown."
    body = guide(
        text,
        good="different queries select different things, the same in every place.",
        bad="all maps alike, or maps that do not follow the ground.",
    )
    key = (
        (f"{strongest:.2g} times even attention or more", _colour(1.0)),
        ("even attention: the imagery, in grey", to_hex(NOTHING)),
        (f"{1 / strongest:.2g} times or less", _colour(-1.0)),
    )
    listed = "".join(element("li", swatch(name, to_hex(colour))) for name, colour in key)
    body += element("h3", "Maps, by what a query selects") + element(
        "ul", listed, class_="legend", aria_label="Colours of the maps"
    )
    columns = f"--columns:{min(max(len(places), 3), 6)}"
    body += element("div", "".join(strips), class_="queries", style=columns)
    return body + (_profiles(found, classes) if labelled else element("p", "No place has a label map to compare with."))


def _told(found: Selected, query: int, names: Sequence[str]) -> str:
    top = found.top[query]
    return f": {names[top]}, {found.lift[query, top]:.2f} times" if top >= 0 else ""


def _profiles(found: Selected, classes: Sequence[str]) -> str:
    names, colours = [name.replace("_", " ") for name in classes], [to_hex(rgb) for rgb in label_colours(classes)]
    there = np.flatnonzero(found.share > 0)
    queries = [f"query {r}" for r in found.order]
    lift = np.nan_to_num(found.lift[found.order][:, there])
    most = max(_LEAST_STRONG, float(lift.max()))
    chart = matrix(
        lift,
        queries,
        [names[k] for k in there],
        title="Attention of the queries by class, as a multiple of even attention",
        least=1.0,
        most=most,
        told="{} times even attention",
    )
    rows = []
    for r in found.order:
        top = found.top[r]
        ranked = [k for k in np.argsort(-np.nan_to_num(found.lift[r], nan=-1.0), kind="stable") if k in there]
        listed = ", ".join(f"{names[k]} {found.lift[r, k]:.2f}" for k in ranked[:3])
        selects = swatch(names[top], colours[top]) if top >= 0 else ""
        rows.append([f"query {r}", selects, f"{found.entropy[r]:.3f}", html.escape(listed)])
    told = guide(
        "By class of the label map: how often a query looks at a class, divided by how much of the ground it has. "
        f"Empty: even attention or less; full colour: {most:.2g} times even. Entropy 1: all "
        "classes alike; 0: one class alone. What a query "
        f"selects is named among classes with {LEAST_SHARE:.0%} of the labelled cells or more.",
        good="each class has a query that looks at it far more than evenly.",
        bad="entropies of 1 and multiples near 1 throughout: the queries do not tell classes apart.",
    )
    caption = "Queries by what they select"
    head = ["query", "selects", "entropy", "most looked at, times even attention"]
    listed = table(caption, head, rows, classes=["", "", "number", "words"])
    return element("h3", "Classes beneath the attention") + told + element("div", chart + listed, class_="beside")


def _strongest(maps: Sequence[Float[np.ndarray, "R _ _"]]) -> float:
    """The multiple of even attention that has the full colour: one in a hundred is above it."""
    return max(_LEAST_STRONG, float(np.percentile(np.concatenate([x.ravel() for x in maps]), 99)))


def _colour(strength: Any) -> np.ndarray:
    """RGB of -1 (violet) to 1 (orange); the very ends of the colour map are nearly black."""
    return np.asarray(colormaps["PuOr_r"](0.5 + 0.45 * strength))[..., :3]


def overlay(
    lift: Float[np.ndarray, "P Q"], ground: Float[np.ndarray, "H W 3"], *, strongest: float
) -> Float[np.ndarray, "_ _ 3"]:
    """Multiples of even attention over grey imagery: orange above 1, violet below, clear at 1; RGB 0-1.

    ``strongest``: the multiple with the full orange; its inverse has the full violet.
    """
    per_cell = max(1, _SIDE // len(lift))
    side = per_cell * len(lift)
    grey = reduced(ground, side).mean(-1, keepdims=True) if len(ground) >= side else np.array([[[NOTHING[0]]]])
    if len(grey) not in (1, side):
        grey = np.full((1, 1, 1), NOTHING[0])
    strength = np.clip(np.log(np.maximum(lift, 1e-6)) / np.log(strongest), -1, 1)
    colours = _colour(strength)
    opacity = 0.85 * np.sqrt(np.abs(strength))[..., None]
    big = lambda x: np.kron(x, np.ones((per_cell, per_cell, 1)))  # noqa: E731
    return np.clip((1 - big(opacity)) * grey + big(opacity) * big(colours), 0, 1)
