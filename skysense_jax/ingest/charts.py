"""Charts of a dataset as inline SVG: where samples lie, histograms against the modality table. Text in, text out.

Colours are names of classes that the style sheet gives a colour by day and by night; what is told by colour is
told by shape too. Next: page.py.
"""

import html
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int64

from skysense_jax.modalities import Modality
from skysense_jax.page.charts import bars, label, plain, svg, ticks
from skysense_jax.page.markup import element

_Number = int | float
MOST_DOTS = 1500  # places that are drawn one by one
_MAP_WIDTH, _LEFT, _TOP, _RIGHT, _BOTTOM = 560, 76, 10, 26, 46
_CELLS = 72  # along the longer side of a map that counts places in cells
_BINS = 64  # of a histogram


def longitude(degrees: _Number) -> str:
    """Degrees with the letter of their hemisphere; ``latitude`` likewise."""
    return f"{plain(abs(degrees))}°{'E' if degrees > 0 else 'W' if degrees < 0 else ''}"


def latitude(degrees: _Number) -> str:
    return f"{plain(abs(degrees))}°{'N' if degrees > 0 else 'S' if degrees < 0 else ''}"


# ---- where samples lie


def places_map(
    longitudes: Float[np.ndarray, "N"],
    latitudes: Float[np.ndarray, "N"],
    held_out: Bool[np.ndarray, "N"],
    *,
    titles: Sequence[str],
    links: Mapping[int, str],
) -> str:
    """A map of places: a mark each, or of many places counts in cells; empty if none has a position.

    Args:
      titles: of each place, shown when pointed at; not asked for where places are counted.
      links: from a place to where the page shows it.
    """
    known = np.isfinite(longitudes)
    if not known.any():
        return ""
    west, east, south, north = _frame(longitudes[known], latitudes[known])
    stretch = math.cos(math.radians((south + north) / 2))
    inner = _MAP_WIDTH - _LEFT - _RIGHT
    tall = inner * (north - south) / ((east - west) * stretch)
    height = round(min(max(tall, 120), 520))
    right = lambda x: _LEFT + inner * (x - west) / (east - west)  # noqa: E731
    down = lambda y: _TOP + height * (north - y) / (north - south)  # noqa: E731
    parts = [element("rect", x=_LEFT, y=_TOP, width=inner, height=height, class_="ground")]
    for x in ticks(west, east, most=5):
        parts.append(element("line", x1=right(x), x2=right(x), y1=_TOP, y2=_TOP + height, class_="grid"))
        parts.append(element("text", longitude(x), x=right(x), y=_TOP + height + 18, text_anchor="middle"))
    for y in ticks(south, north, most=5):
        parts.append(element("line", x1=_LEFT, x2=_LEFT + inner, y1=down(y), y2=down(y), class_="grid"))
        parts.append(element("text", latitude(y), x=_LEFT - 5, y=down(y) + 5, text_anchor="end"))
    label = dict(x=_LEFT + inner / 2, y=_TOP + height + 40, text_anchor="middle")
    parts.append(element("text", "longitude; latitude at the left", **label))
    if known.sum() <= MOST_DOTS:
        order = [*np.flatnonzero(known & ~held_out), *np.flatnonzero(known & held_out)]
        for place in order:
            mark = _mark(right(longitudes[place]), down(latitudes[place]), bool(held_out[place]), titles[place])
            parts.append(element("a", mark, href=links[place]) if place in links else mark)
    else:
        parts += _cells(right(longitudes[known]), down(latitudes[known]), held_out[known], max(inner, height) / _CELLS)
    words = f"Map of {int(known.sum())} places, {west:.4g} to {east:.4g} degrees east, {south:.4g} to {north:.4g} north"
    return svg(_MAP_WIDTH, height + _TOP + _BOTTOM, words, parts, "map")


def _frame(longitudes: np.ndarray, latitudes: np.ndarray) -> tuple[float, float, float, float]:
    """West, east, south and north of a map with room around what it shows."""
    edges = []
    for values, least, limit in ((longitudes, 0.002, 180.0), (latitudes, 0.002, 90.0)):
        low, high = float(values.min()), float(values.max())
        room = max(0.06 * (high - low), least)
        edges += [max(low - room, -limit), min(high + room, limit)]
    west, east, south, north = edges
    return west, east, south, north


def _mark(x: _Number, y: _Number, held_out: bool, title: str) -> str:
    """A dot to train on, a diamond held out."""
    told = element("title", html.escape(title))
    if held_out:
        return element("path", told, d=_diamond(x, y, 6.0), class_="held")
    return element("circle", told, cx=x, cy=y, r=4, class_="train")


def _diamond(x: _Number, y: _Number, half: _Number) -> str:
    return f"M{x:.1f} {y - half:.1f}l{half:.1f} {half:.1f} {-half:.1f} {half:.1f} {-half:.1f} {-half:.1f}z"


def _cells(x: np.ndarray, y: np.ndarray, held_out: np.ndarray, size: float) -> list[str]:
    """Squares of ``size`` as dark as there are places to train on in them; a diamond where some are held out."""
    columns, rows = (np.floor(axis / size).astype(int) for axis in (x, y))
    shape = (rows.max() + 1, columns.max() + 1)
    counts = [
        np.bincount((rows * shape[1] + columns)[of], minlength=shape[0] * shape[1]) for of in (~held_out, held_out)
    ]
    train, held = (found.reshape(shape) for found in counts)
    darkest = math.log1p(float((train + held).max()))
    parts = []
    for row, column in np.argwhere(train + held):
        num, kept = int(train[row, column]), int(held[row, column])
        told = element("title", f"{num} places to train on, {kept} held out")
        left, top = column * size, row * size
        opacity = 0.15 + 0.85 * math.log1p(num) / darkest if num else 0.0
        square = dict(x=left, y=top, width=size, height=size, fill_opacity=f"{opacity:.2f}")
        parts.append(element("rect", told, **square, class_="train cell"))
        if kept:
            parts.append(element("path", told, d=_diamond(left + size / 2, top + size / 2, size / 3), class_="held"))
    return parts


# ---- histograms


def band_histogram(values: Float[np.ndarray, "N"], counts: Int64[np.ndarray, "N"], row: Modality, band: int) -> str:
    """Counts of a band's numbers as bars; above them the table's mean and deviation, and the mean of the counts.

    ``values`` ascend; ``counts`` of each. Numbers far from all others are added to the outermost bars.
    """
    width, height, left, top, bottom = 300, 150, 6, 22, 24
    total = np.cumsum(counts)
    low, high = (float(values[np.searchsorted(total, share * total[-1])]) for share in (0.002, 0.998))
    mean, std = float(row.mean[band]), float(row.std[band])
    low, high = min(low, max(mean - std, row.value_range[0])), max(high, min(mean + std, row.value_range[1]))
    step = (high - low) / _BINS
    if row.dtype.startswith(("u", "i")):  # whole numbers: as many of them beneath each bar
        low, step = low - 0.5, float(max(1, math.ceil(step)))
    edges = low + step * np.arange(max(1, math.ceil((high - low) / step)) + 1)
    heights = np.bincount(np.searchsorted(edges[1:-1], values, side="right"), weights=counts, minlength=len(edges) - 1)
    inner, tall = width - 2 * left, height - top - bottom
    right = lambda x: left + inner * (min(max(x, edges[0]), edges[-1]) - edges[0]) / (edges[-1] - edges[0])  # noqa: E731
    parts = [
        element(
            "rect",
            element("title", f"the table: {plain(mean)} ± {plain(std)}"),
            x=right(mean - std),
            y=top,
            width=right(mean + std) - right(mean - std),
            height=tall,
            class_="table-range",
        )
    ]
    parts += bars(heights.tolist(), left=left, top=top, width=inner, height=tall)
    own = float(values @ counts / total[-1])
    parts.append(element("line", x1=right(mean), x2=right(mean), y1=top - 8, y2=top + tall, class_="table-mean"))
    parts.append(element("line", x1=right(own), x2=right(own), y1=top - 8, y2=top + tall, class_="own-mean"))
    parts.append(element("text", row.bands[band], x=left, y=12, class_="name"))
    for x in ticks(float(edges[0]), float(edges[-1]), most=5):
        parts.append(label(plain(x), right(x), height - 7, left, width))
    told = (
        f"Histogram of {row.name} {row.bands[band]}: mean {own:.4g}; the table has {plain(mean)} ± {plain(std)}; "
        f"shown from {edges[0]:.4g} to {edges[-1]:.4g}"
    )
    return svg(width, height, told, parts, "histogram")
