"""Small pictures of a sample as data URIs: all its modalities and dates, clouds and the label map to lay over them.

Colours are those of drawing.py. Pictures that show the same ground have the same outline, whatever their pixels.
Next: page.py, which lays them out.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from skysense_jax.data.sample import ORBITS, UNDATED, Sample, Series
from skysense_jax.drawing import label_colours, shown_bands, to_rgb
from skysense_jax.modalities import METRES_PER_CELL, OSM, Modality
from skysense_jax.page.images import jpeg, palette, reduced

LARGE_SIDE, SIDE = 208, 96  # pixels along a side at most: as wide as page_style.py shows them
_MOST_LARGE = 3  # pictures of the sharpest modality that are large; more of them are as small as the others
_STRIPE = 4  # pixels of the mask's picture, across a stripe
_STRIPES = (214, 0, 147)  # over clouds, which are white, over ground and over grey: no other colour of a picture
_OPACITY = 150  # of the label map over imagery, of 255


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture of a sample's ground.

    Attributes:
      uri, over: data URIs of the picture and of what is laid over it, if anything.
      label: beneath it; ``alt``: for who does not see it.
    """

    uri: str
    label: str
    alt: str
    over: str | None = None


@dataclasses.dataclass(frozen=True)
class Strip:
    """Pictures of one modality, a date each.

    Attributes:
      title: the row's name and what is shown as red, green and blue.
      left_out: dates that are not shown.
      large: whether its pictures have room for details.
    """

    title: str
    pictures: Sequence[Picture]
    left_out: int = 0
    large: bool = False


@dataclasses.dataclass(frozen=True)
class Contact:
    """A sample in pictures.

    Attributes:
      strips: the sharpest modality first.
      labels: the label map, if there is one.
      classes: what is mapped and its share of the ground, the commonest first.
    """

    strips: Sequence[Strip]
    labels: Strip | None
    classes: Sequence[tuple[str, float]]


def contact(sample: Sample, rows: Sequence[Modality], *, num_dates: int, names: Sequence[str] = OSM.classes) -> Contact:
    """The pictures of a sample; of a modality at most ``num_dates`` dates, spread over all of them.

    ``names``: of the label map's classes.
    """
    having = sorted((row for row in rows if row.name in sample.series), key=lambda row: -row.pixels_per_cell)
    strips = [
        _strip(sample.series[row.name], row, sharpest=place == 0, num_dates=num_dates)
        for place, row in enumerate(having)
    ]
    if sample.labels is None:
        return Contact(strips, None, ())
    counts = np.bincount(sample.labels.ravel(), minlength=len(names) + 1)[1:]
    shares = counts / sample.labels.size
    classes = [(names[place], float(shares[place])) for place in np.argsort(-counts, kind="stable") if counts[place]]
    listed = ", ".join(f"{name.replace('_', ' ')} {share:.0%}" for name, share in classes) or "nothing mapped"
    size = f"{sample.extent_cells * METRES_PER_CELL:g} m"
    opaque, clear = (_labels(sample.labels, names, opacity) for opacity in (255, _OPACITY))
    sharpest = strips[0].pictures[_clearest(sample.series[having[0].name], num_dates)]
    pictures = (
        Picture(opaque, "map", f"label map, {size} across: {listed}"),
        Picture(sharpest.uri, f"map over {having[0].name}", f"label map over {having[0].name}: {listed}", clear),
    )
    return Contact(strips, Strip("OpenStreetMap", pictures, large=True), classes)


def _strip(series: Series, row: Modality, *, sharpest: bool, num_dates: int) -> Strip:
    shown = _shown(len(series.days), num_dates)
    large = sharpest and len(shown) <= _MOST_LARGE
    images = np.stack([reduced(series.images[date], LARGE_SIDE if large else SIDE) for date in shown])
    valid, cloud = (
        np.stack([_reduced_mask(mask[date], images.shape[1]) for date in shown])
        for mask in (series.valid, series.cloud)
    )
    colours = to_rgb(images, row, valid=valid, clear=~cloud)
    pictures = []
    for place, date in enumerate(shown):
        seen, hidden = series.valid[date].mean(), series.cloud[date].mean()
        orbit = ORBITS[series.orbits[date]]
        label = _day(int(series.days[date])) + (f" {orbit}" if series.orbits[date] else "")
        told = f"{row.name} of {label}, {hidden:.0%} hidden, {1 - seen:.0%} without data"
        over = _stripes(cloud[place]) if cloud[place].any() else None
        pictures.append(Picture(jpeg(colours[place]), label, told, over))
    return Strip(f"{row.name}: {' '.join(shown_bands(row))}", pictures, len(series.days) - len(shown), large)


def _shown(num: int, most: int) -> list[int]:
    """Which of ``num`` dates are shown."""
    return sorted({round(place) for place in np.linspace(0, num - 1, min(num, most))})


def _clearest(series: Series, num_dates: int) -> int:
    """The place, among the dates that are shown, of the one with most clear pixels."""
    shown = _shown(len(series.days), num_dates)
    return int(np.argmax([(series.valid[date] & ~series.cloud[date]).mean() for date in shown]))


def _day(day: int) -> str:
    return "undated" if day == UNDATED else str(np.datetime64(day, "D"))


def _reduced_mask(mask: Bool[np.ndarray, "H W"], side: int) -> Bool[np.ndarray, "P Q"]:
    return np.asarray(Image.fromarray(mask).resize((side, side), Image.Resampling.NEAREST))


def _stripes(mask: Bool[np.ndarray, "H W"]) -> str:
    """Stripes where ``mask`` is, transparent elsewhere."""
    fine = np.kron(mask, np.ones((max(1, 2 * SIDE // len(mask)),) * 2, bool))
    row, column = np.indices(fine.shape)
    striped = fine & ((row + column) // _STRIPE % 2 == 0)
    return palette(striped.astype(np.uint8), [(255, 255, 255), _STRIPES], [0, 255])


def _labels(labels: UInt8[np.ndarray, "H W"], names: Sequence[str], opacity: int) -> str:
    """The label map in its colours, transparent where nothing is mapped."""
    colours = np.rint(label_colours(names) * 255).astype(int).tolist()
    return palette(labels, [(255, 255, 255), *colours], [0, *[opacity] * len(colours)])
