"""What pictures share: how bands, labels and features become colours, figures without a screen, legends, files.

Next: eval/pictures.py and eval/curves.py (of a run), ingest/contact.py (of a dataset).
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Bool, Float, Num
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from skysense_jax.modalities import NATURAL_BANDS, Modality

NOTHING = (0.82, 0.82, 0.82)  # no data, no label, no usable feature
_COLOURS = {  # of label classes; another class takes its colour from a qualitative map
    "water": "#2f6fb5",
    "wetland": "#6fb3b8",
    "forest": "#1f6b36",
    "scrub": "#7a9a4a",
    "grassland": "#a9d27c",
    "farmland": "#ecd38b",
    "orchard": "#c08a3e",
    "vineyard": "#8e4b7f",
    "bare_ground": "#a08b78",
    "sand": "#f4ecc2",
    "residential": "#e8a9a1",
    "industrial": "#b08bc8",
    "building": "#b3362b",
    "road": "#4a4a4a",
    "railway": "#161616",
    "sports_pitch": "#3fc46e",
}


def label_colours(classes: Sequence[str]) -> Float[np.ndarray, "L 3"]:
    """RGB 0-1 of each class."""
    spare = matplotlib.colormaps["tab20"].colors
    return np.array([matplotlib.colors.to_rgb(_COLOURS.get(name, spare[i % 20])) for i, name in enumerate(classes)])


def shown_bands(modality: Modality) -> tuple[str, ...]:
    """Names of what ``to_rgb`` puts into red, green and blue."""
    for bands in NATURAL_BANDS:
        if set(bands) <= set(modality.bands):
            return bands
    if modality.num_bands == 2:
        return (*modality.bands, f"{modality.bands[0]}-{modality.bands[1]}")
    return modality.bands[:3] if modality.num_bands > 2 else modality.bands[:1]


def to_rgb(
    images: Num[np.ndarray, "*batch H W C"],
    modality: Modality,
    *,
    valid: Bool[np.ndarray, "*batch H W"] | None = None,
    clear: Bool[np.ndarray, "*batch H W"] | None = None,
) -> Float[np.ndarray, "*batch H W 3"]:
    """Displayable RGB 0-1: natural colours where the bands allow it, else the first bands; two bands and a difference.

    8-bit RGB is shown as it is; the rest is stretched between the 2nd and 98th percentile of the valid pixels of all
    ``images`` together, so that brightness compares between dates and views. Invalid pixels are grey.
    ``clear``: the pixels that set the stretch instead, if there are any, so that clouds do not darken the ground.
    """
    bands = [images[..., modality.bands.index(b)] for b in shown_bands(modality) if b in modality.bands]
    stack = np.stack(bands, -1).astype(np.float32)
    if modality.num_bands == 2:
        stack = np.concatenate((stack, stack[..., :1] - stack[..., 1:]), -1)
    stack = np.broadcast_to(stack, (*stack.shape[:-1], 3)) if stack.shape[-1] == 1 else stack
    valid = np.ones(stack.shape[:-1], bool) if valid is None else valid
    if modality.dtype == "uint8":
        shown = stack / 255.0
    elif valid.any():
        # One stretch for all three keeps natural colours natural; unlike bands take each their own.
        natural = shown_bands(modality) in NATURAL_BANDS
        counted = valid if clear is None or not (valid & clear).any() else valid & clear
        low, high = np.percentile(stack[counted], (2, 98), axis=None if natural else 0)
        shown = np.clip((stack - low) / np.maximum(high - low, 1e-6), 0, 1)
    else:
        shown = np.zeros_like(stack)
    return np.where(valid[..., None], shown, NOTHING)


def labels_to_rgb(shares: Float[np.ndarray, "P Q L"], classes: Sequence[str]) -> Float[np.ndarray, "P Q 3"]:
    """Colours of the commonest class of each cell; grey where nothing is mapped."""
    return np.where(shares.sum(-1, keepdims=True) > 0, label_colours(classes)[shares.argmax(-1)], NOTHING)


def fit_colours(features: Float[np.ndarray, "N D"]) -> tuple[Any, float]:
    """A function from features to RGB 0-1 by their first three principal components, and the variance these hold.

    Each component runs from its 2nd to its 98th percentile; its sign is fixed so that the largest weight is positive.
    """
    mean = features.mean(0)
    _, singular, axes = np.linalg.svd(features - mean, full_matrices=False)
    axes = axes[:3] * np.sign(axes[:3][np.arange(len(axes[:3])), np.abs(axes[:3]).argmax(1)])[:, None]
    low, high = np.percentile((features - mean) @ axes.T, (2, 98), axis=0)
    share = float((singular[:3] ** 2).sum() / max((singular**2).sum(), 1e-12))

    def colours(x: np.ndarray) -> np.ndarray:
        return np.clip(((x - mean) @ axes.T - low) / np.maximum(high - low, 1e-6), 0, 1)

    return colours, share


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: pathlib.Path) -> pathlib.Path:
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def show(axes: Axes, image: np.ndarray, **options: Any) -> None:
    axes.imshow(image, interpolation="nearest", **options)
    axes.set_xticks([])
    axes.set_yticks([])


def class_legend(figure: Any, classes: Sequence[str], used: Sequence[int], extra: Sequence[Patch] = ()) -> None:
    colours = label_colours(classes)
    handles = [Patch(facecolor=colours[i], label=classes[i].replace("_", " ")) for i in used]
    handles += [Patch(facecolor=NOTHING, label="nothing mapped or no data"), *extra]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 7), frameon=False, fontsize=8)
