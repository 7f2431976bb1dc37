"""Features as colours that compare between modalities: one basis of principal components for all of them.

Every modality has an offset of its own, which would fill the first components and hide the ground. It is taken off
before the basis is fitted, and its size is told. Next: report.py.
"""

import dataclasses
import html
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float

from skysense_jax.drawing import NOTHING, fit_colours
from skysense_jax.eval.features import SampleFeatures
from skysense_jax.explain.imagery import figure, imagery, label_map, panel, strip
from skysense_jax.explain.places import Place
from skysense_jax.modalities import Modality
from skysense_jax.page.images import png
from skysense_jax.page.markup import element, guide

_FEWEST = 4  # cells that a basis of three components is fitted on


@dataclasses.dataclass(frozen=True)
class Painted:
    """Features of several sources as colours in one basis.

    Attributes:
      maps: per source, of each place; RGB 0-1, grey where there is no feature.
      held: share of the variance, offsets left out, that three components hold.
      offsets: share of all variance that lies between the means of the sources.
    """

    maps: Mapping[str, Sequence[Float[np.ndarray, "_ _ 3"]]]
    held: float
    offsets: float


def paint(
    features: Mapping[str, Sequence[Float[np.ndarray, "_ _ D"]]],
    usable: Mapping[str, Sequence[Bool[np.ndarray, "_ _"]]],
) -> Painted | None:
    """The features of each source and place as colours; None if hardly a cell has one."""
    rows = {
        name: np.concatenate([x[there] for x, there in zip(features[name], usable[name])]).astype(np.float64)
        for name in features
    }
    rows = {name: x for name, x in rows.items() if len(x)}
    if sum(map(len, rows.values())) < _FEWEST:
        return None
    means = {name: x.mean(0) for name, x in rows.items()}
    everything = np.concatenate(list(rows.values()))
    between = sum(len(x) * np.square(means[name] - everything.mean(0)).sum() for name, x in rows.items())
    colours, held = fit_colours(np.concatenate([x - means[name] for name, x in rows.items()]))
    maps = {
        name: [
            np.where(there[..., None], colours(x.astype(np.float64) - means.get(name, 0.0)), NOTHING)
            for x, there in zip(features[name], usable[name])
        ]
        for name in features
    }
    return Painted(maps, held, float(between / max(np.square(everything - everything.mean(0)).sum(), 1e-12)))


def section(
    places: Sequence[Place],
    together: Sequence[SampleFeatures],
    alone: Mapping[str, Sequence[SampleFeatures]],
    rows: Sequence[Modality],
    *,
    classes: Sequence[str],
) -> str:
    """HTML: each place as imagery, as features of the backbone, and as fused features of one modality and of all.

    ``together``: with all modalities; ``alone``: with one. Of each ``places``.
    """
    backbone = paint(
        {row.name: [f.modality[row.name] for f in together] for row in rows},
        {row.name: [f.modality_usable[row.name] for f in together] for row in rows},
    )
    sources = {**{f"{name} alone": found for name, found in alone.items()}, "all together": together}
    fused = paint(
        {name: [f.fused for f in found] for name, found in sources.items()},
        {name: [f.fused_usable for f in found] for name, found in sources.items()},
    )
    told = guide(
        "Cells of one colour have nearly one feature: the colours are the first three principal components, fitted "
        "once for all modalities and places of a row, so that they compare across pictures.",
        good="fields, woods and roads stand out, and a place has the same colours in every modality.",
        bad="noise, one colour for everything, a grid or frames that the imagery does not have, or colours that change "
        "with the modality.",
    )
    shares = [
        f"of {name} features three components hold {painted.held:.0%}; {painted.offsets:.0%} lay between the means of "
        "modalities and was taken off first"
        for name, painted in (("the backbone's", backbone), ("fused", fused))
        if painted is not None
    ]
    if shares:
        text = f"Variance: {'; '.join(shares)}. The nearer that is to 100%, the more a feature says which sensor saw a "
        told += element("p", text + "place and the less what is there.")
    panels, columns = [], f"--columns:{min(len(rows) + 1, 6)}"
    for place, (shown, seen) in enumerate(zip(places, together)):
        pictures = [*imagery(seen, rows), *label_map(shown, classes)]
        body = strip("imagery, and the map", pictures)
        for title, painted in (("features of the backbone", backbone), ("fused features", fused)):
            if painted is not None:
                body += strip(title, [_map(name, maps[place]) for name, maps in painted.maps.items()])
        panels.append(panel(shown.sample.id, body))
    return told + element("div", "".join(panels), class_="panels", style=columns)


def _map(name: str, colours: np.ndarray) -> str:
    return figure(png(colours), html.escape(name), f"features of {name} as colours")
