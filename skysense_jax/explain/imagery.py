"""Pictures of places for a report: imagery, label map, squares of ground; and how they are laid out.

Next: colours.py, attention.py, routing.py, retrieval.py, which show what the network sees in them.
"""

import html
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.colors import to_hex

from skysense_jax.drawing import NOTHING, label_colours, to_rgb
from skysense_jax.eval.features import SampleFeatures, clearest_date
from skysense_jax.explain.places import Place
from skysense_jax.modalities import Modality
from skysense_jax.page.images import jpeg, png, reduced
from skysense_jax.page.markup import element, swatch

SIDE = 160  # pixels of a picture along a side at most
_SMALL = 100  # of a square of ground


def colours_of(seen: SampleFeatures, row: Modality, *, side: int = SIDE) -> Float[np.ndarray, "H W 3"] | None:
    """The clearest date as RGB 0-1, at most ``side`` pixels along a side; None if the place lacks the modality."""
    date = clearest_date(seen.whole, row.name)
    if date is None:
        return None
    extent = len(seen.fused) * row.pixels_per_cell  # what lies beyond was added to fill a window
    image = seen.whole.images[row.name][date, :extent, :extent]
    tokens = seen.whole.token_valid[row.name][date]
    valid = np.kron(tokens, np.ones((row.patch, row.patch), bool))[:extent, :extent]
    cells = seen.whole.cell_usable[row.name][date]
    clear = np.kron(cells, np.ones((row.pixels_per_cell, row.pixels_per_cell), bool))[:extent, :extent]
    shown = to_rgb(image, row, valid=valid, clear=clear)
    return reduced(shown, side) if len(shown) > side else shown


def imagery(seen: SampleFeatures, rows: Sequence[Modality]) -> list[str]:
    """A figure of each modality that the place has."""
    found = [(row, colours_of(seen, row)) for row in rows]
    return [
        figure(
            jpeg(np.clip(colours, 0, 1)) if row.pixels_per_cell > 4 else png(colours), row.name, f"{row.name} imagery"
        )
        for row, colours in found
        if colours is not None
    ]


def finest(seen: SampleFeatures, rows: Sequence[Modality]) -> Float[np.ndarray, "H W 3"]:
    """The place in the finest modality that it has."""
    for row in sorted(rows, key=lambda row: -row.pixels_per_cell):
        colours = colours_of(seen, row, side=10**6)
        if colours is not None:
            return colours
    return np.full((1, 1, 3), NOTHING)


def square(image: Float[np.ndarray, "H W 3"], extent: int, row: int, column: int, *, around: int) -> str:
    """Data URI of the cell (row, column) in a frame, amid ``around`` cells on each side, at an edge beside them."""
    per_cell = len(image) // extent
    if not per_cell:
        return png(image)
    wide = min(2 * around + 1, extent)  # cells
    first = [min(max(place - around, 0), extent - wide) for place in (row, column)]
    cut = image[first[0] * per_cell :, first[1] * per_cell :][: wide * per_cell, : wide * per_cell]
    factor = max(1, _SMALL // len(cut))
    cut = np.kron(cut, np.ones((factor, factor, 1))) if len(cut) < _SMALL else reduced(cut, _SMALL)
    edges = [
        (round(place * len(cut) / wide), round((place + 1) * len(cut) / wide) - 1)
        for place in (row - first[0], column - first[1])
    ]
    framed = np.pad(cut, ((1, 1), (1, 1), (0, 0)), mode="edge")  # room for the frame of a cell at the edge
    for edge, colour in ((0, (0.0, 0.0, 0.0)), (1, (1.0, 0.9, 0.0))):
        (top, bottom), (left, right) = ((low + edge, high + 2 - edge) for low, high in edges)
        framed[[top, bottom], left : right + 1] = colour
        framed[top : bottom + 1, [left, right]] = colour
    return jpeg(np.clip(framed, 0, 1))


def label_map(place: Place, classes: Sequence[str]) -> list[str]:
    """A figure of the label map, if there is one."""
    ids = place.labels
    if ids is None:
        return []
    palette = np.concatenate((np.array([NOTHING]), label_colours(classes)))
    return [figure(png(palette[ids]), "map", f"label map: {', '.join(_names(ids, classes)) or 'nothing mapped'}")]


def legend(ids: Sequence[np.ndarray], classes: Sequence[str]) -> str:
    """Colours of the classes that these maps show, and of nothing."""
    colours = dict(zip(classes, label_colours(classes)))
    used = [name for name in classes if any(name in _names(x, classes) for x in ids)]
    entries = [(name, colours[name]) for name in used] + [("nothing mapped, no data or no feature", np.array(NOTHING))]
    listed = "".join(element("li", swatch(name, to_hex(colour))) for name, colour in entries)
    return element("ul", listed, class_="legend", aria_label="Classes of the maps")


def _names(ids: np.ndarray, classes: Sequence[str]) -> list[str]:
    return [classes[i - 1] for i in np.unique(ids) if i > 0]


# ---- layout


def figure(uri: str, caption: str, alt: str) -> str:
    """A picture with a caption, both HTML; ``alt`` is text."""
    image = element("div", f'<img src="{uri}" alt="{html.escape(alt)}">', class_="stack")
    return element("figure", image + (element("figcaption", caption) if caption else ""))


def strip(title: str, figures: Sequence[str]) -> str:
    """Figures in a row that wraps, beneath a title."""
    return element("div", element("h4", html.escape(title)) + element("div", "".join(figures), class_="strip"))


def panel(title: str, body: str) -> str:
    """A box with a title."""
    return element("article", element("h3", html.escape(title)) + body, class_="panel")
