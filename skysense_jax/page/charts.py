"""Charts as inline SVG: bars, curves, matrices. Text in, text out.

Colours are names of classes that the style sheet gives a colour by day and by night; what is told by colour is told by
dashes or by place too. Next: ingest/charts.py (maps, histograms).
"""

import dataclasses
import html
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Num

from skysense_jax.page.markup import element

_Number = int | float
NUM_COLOURS = 8  # of curves, in style.py; further ones begin again
MOST_POINTS = 160  # of a curve that are drawn
_WIDTH = 300  # of a chart that fills a column


def svg(width: _Number, height: _Number, title: str, parts: Sequence[str], kind: str) -> str:
    """A drawing of this size in CSS pixels; ``title`` is for who does not see it, ``kind`` a class of the style."""
    return element(
        "svg",
        "".join(parts),
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        role="img",
        aria_label=title,
        class_=kind,
    )


def ticks(low: _Number, high: _Number, *, most: int) -> list[float]:
    """Round numbers from ``low`` to ``high``, which is above: at most one more than ``most``."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    first = math.ceil(low / step - 1e-9)
    return [place * step for place in range(first, math.floor(high / step + 1e-9) + 1)]


def plain(value: _Number) -> str:
    """A number without needless digits."""
    return f"{value:.6g}"


# ---- bars


def bars(heights: Sequence[_Number], *, left: _Number, top: _Number, width: _Number, height: _Number) -> list[str]:
    """One path of bars from the floor, the tallest as high as there is room."""
    most, step, floor = max(max(heights), 1e-12), width / len(heights), top + height
    path = "".join(
        f"M{left + place * step:.2f} {floor:.1f}v{-height * bar / most:.1f}h{step * 0.94:.2f}V{floor:.1f}z"
        for place, bar in enumerate(heights)
        if bar > 0
    )
    return [element("path", d=path, class_="bar"), element("path", d=f"M{left} {top + height}h{width}", class_="axis")]


def bar_chart(heights: Sequence[_Number], labels: Mapping[int, str], *, title: str, of: str, axis: str) -> str:
    """Bars with labels under some of them. ``of``: what they count; ``axis``: along which; ``title``: for the blind."""
    width, height, left, top, bottom = _WIDTH, 130, 6, 18, 36
    inner, tall = width - 2 * left, height - top - bottom
    parts = [element("text", f"up to {max(heights):,} {of}", x=left, y=12)]
    parts += bars(heights, left=left, top=top, width=inner, height=tall)
    for place, text in labels.items():
        parts.append(label(text, left + inner * (place + 0.5) / len(heights), height - 22, left, width))
    parts.append(element("text", axis, x=left + inner / 2, y=height - 6, text_anchor="middle"))
    return svg(width, height, title, parts, "bars")


def label(text: str, x: _Number, y: _Number, left: _Number, width: _Number) -> str:
    """Text below ``x``, moved inwards where it would leave the picture."""
    half = 3.5 * len(text)
    if x < left + half:
        return element("text", text, x=left, y=y)
    if x > width - left - half:
        return element("text", text, x=width - left, y=y, text_anchor="end")
    return element("text", text, x=x, y=y, text_anchor="middle")


# ---- curves


@dataclasses.dataclass(frozen=True)
class Curve:
    """Numbers ``y`` at ascending ``x``; what is not finite is left out. ``marked``: a dot at each."""

    name: str
    x: Float[np.ndarray, " N"]
    y: Float[np.ndarray, " N"]
    marked: bool = False


def thinned(curve: Curve) -> Curve:
    """The finite points, or means of as many neighbours each as leaves ``MOST_POINTS`` of them at most."""
    there = np.isfinite(curve.y)
    x, y = curve.x[there], curve.y[there]
    together = -(-len(x) // MOST_POINTS)
    if together > 1:
        starts = np.arange(0, len(x), together)
        counts = np.diff([*starts, len(x)])
        x, y = (np.add.reduceat(axis, starts) / counts for axis in (x, y))
    return dataclasses.replace(curve, x=x, y=y)


def curve_chart(
    curves: Sequence[Curve],
    *,
    title: str,
    axis: str,
    unit: str = "",
    from_zero: bool = False,
    whole_x: Sequence[int] = (),
) -> str:
    """Curves with a legend above them; empty if none has a finite point.

    Args:
      title: above the legend; ``axis``: along which; ``unit``: behind the title.
      from_zero: whether the lower edge is 0.
      whole_x: the places along the axis that get a number, if not round ones.
    """
    thin = [line for line in map(thinned, curves) if len(line.x)]
    if not thin:
        return ""
    width, left, right, tall = _WIDTH, 44, 10, 120
    legend = _legend([line.name for line in thin], width) if len(curves) > 1 else []
    rows = legend[-1][2] + 1 if legend else 0
    top, inner = 26 + 16 * rows, width - left - right
    low, high = (float(of(of(line.y) for line in thin)) for of in (min, max))
    low = min(0.0, low) if from_zero else low
    room = 0.04 * (high - low) or 0.5 * abs(high) or 0.5
    low, high = (low if from_zero and low == 0 else low - room), high + room
    first, last = (float(of(of(line.x) for line in thin)) for of in (min, max))
    first, last = (first - 0.5, last + 0.5) if first == last else (first, last)
    across = lambda x: left + inner * (x - first) / (last - first)  # noqa: E731
    down = lambda y: top + tall * (high - y) / (high - low)  # noqa: E731
    parts = [element("text", html.escape(f"{title}{', ' if unit else ''}{unit}"), x=2, y=14, class_="name")]
    for y in ticks(low, high, most=4):
        parts.append(element("line", x1=left, x2=left + inner, y1=down(y), y2=down(y), class_="grid"))
        parts.append(element("text", plain(y), x=left - 4, y=down(y) + 4, text_anchor="end"))
    for x in whole_x or ticks(first, last, most=4):
        parts.append(label(plain(x), across(x), top + tall + 15, 0, width))
    parts.append(element("text", axis, x=left + inner / 2, y=top + tall + 31, text_anchor="middle"))
    for place, line in enumerate(thin):
        points = [(across(x), down(y)) for x, y in zip(line.x, line.y)]
        kind, told = f"curve c{place % NUM_COLOURS}", html.escape(f"{line.name}: {line.y[0]:.4g} to {line.y[-1]:.4g}")
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        parts.append(element("path", element("title", told), d=path, class_=kind))
        if line.marked or len(points) == 1:
            parts += [element("circle", cx=x, cy=y, r=2.5, class_=f"dot c{place % NUM_COLOURS}") for x, y in points]
    for place, (name, x, row) in enumerate(legend):
        y = 32 + 16 * row
        parts.append(element("path", d=f"M{x} {y - 4}h18", class_=f"curve c{place % NUM_COLOURS}"))
        parts.append(element("text", html.escape(name), x=x + 22, y=y))
    ends = "; ".join(f"{line.name} {line.y[0]:.4g} to {line.y[-1]:.4g}" for line in thin)
    return svg(width, top + tall + 36, f"{title}: {ends}; along {axis}", parts, "curves")


def _legend(names: Sequence[str], width: _Number) -> list[tuple[str, _Number, int]]:
    """Name, left edge and row of each entry, as many in a row as there is room for."""
    found, x, row = [], 2, 0
    for name in names:
        wide = 34 + 6.6 * len(name)
        if x > 2 and x + wide > width:
            x, row = 2, row + 1
        found.append((name, round(x), row))
        x += wide
    return found


# ---- matrices


def matrix(
    values: Num[np.ndarray, "R C"],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    least: _Number,
    most: _Number,
    told: str,
) -> str:
    """Squares as dark as their number, empty at ``least`` and below, full at ``most`` and above.

    ``told``: what a number is, with braces where it stands; shown when a square is pointed at.
    """
    size, left, top = 18, 8 + 6.8 * max(map(len, rows)), 8 + 5.2 * max(map(len, columns))
    width = round(left + size * len(columns) + 0.71 * 7 * len(columns[-1]) + 8)
    parts = []
    for place, name in enumerate(columns):
        x, y = left + size * (place + 0.6), top - 4
        parts.append(element("text", html.escape(name), transform=f"translate({x:.1f} {y:.1f}) rotate(-45)"))
    for row, (name, numbers) in enumerate(zip(rows, values)):
        y = top + size * row
        parts.append(element("text", html.escape(name), x=left - 5, y=y + 13, text_anchor="end"))
        for column, value in enumerate(numbers):
            text = html.escape(f"{name}, {columns[column]}: {told.format(f'{value:.3g}')}")
            square = dict(x=left + size * column, y=y, width=size - 1, height=size - 1)
            opacity = f"{min(max(float(value - least) / (most - least), 0.0), 1.0):.2f}" if np.isfinite(value) else "0"
            parts.append(element("rect", class_="empty", **square))
            parts.append(element("rect", element("title", text), class_="cell", fill_opacity=opacity, **square))
    drawing = svg(width, round(top + size * len(rows) + 4), title, parts, "matrix")
    return element("div", drawing, class_="scroll", tabindex="0", role="region", aria_label=title)
