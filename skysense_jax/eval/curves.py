"""Pictures of a run's course, from the JSON lines it writes: loss terms, collapse signals, load of experts.

A key that a run does not log, and a value that is null or not finite, leaves a gap and no more.
Next: pictures.py, which draws what the network sees.
"""

import math
import pathlib
import re

import numpy as np
from jaxtyping import Float

from skysense_jax.drawing import new_figure, save
from skysense_jax.metrics import read_json_lines

# Panels of the curves: title, axis label, what keys belong to it (the group is the label), axis: logarithmic, from 0.
_PANELS = (
    ("Loss", "weighted sum", r"(loss)$", ""),
    ("Loss terms", "unweighted, mean per prediction", r"loss/(.+)", ""),
    ("Multi-granularity contrastive loss, by features", "mean per prediction", r"mgcl/(.+)", ""),
    ("Entropy of the teacher's targets", "nats", r"target_entropy/(.+)", "from 0"),
    ("Entropy of the mean target: 0 is collapse", "nats", r"target_entropy_of_mean/(.+)", "from 0"),
    ("Spread of features", "0 collapsed, 1 isotropic", r"feature_std/(.+)", "from 0"),
    ("Gradient norm before clipping", "", r"(gradient_norm)", "log"),
    ("Use of the queries", "1/R all alike, 1 all differ", r"(query_usage)", "from 0"),
    ("Targets of the queries: of what they see", "nats, 0 nothing", r"(query_content)", "from 0"),
    ("Time a step", "seconds", r"(step|input_wait)_seconds", "from 0"),
)
_EXPERTS = re.compile(r"experts/load_block(\d+)_expert(\d+)")
_DASHES = {"pixel": "-", "object": "--", "image": ":"}


def read_metrics(path: pathlib.Path) -> dict[str, Float[np.ndarray, " S"]]:
    """Per key of a metrics file its numbers, NaN where a line has none; "step" is always among the keys."""
    lines = read_json_lines(pathlib.Path(path))
    keys = sorted({key for line in lines for key, value in line.items() if isinstance(value, int | float)} | {"step"})
    numbers = lambda key: [math.nan if line.get(key) is None else line[key] for line in lines]  # noqa: E731
    return {key: np.array(numbers(key), float) for key in keys}


def curves_picture(path: pathlib.Path, metrics_path: pathlib.Path) -> pathlib.Path | None:
    """Path of the picture of all curves over steps, one panel a kind; None if nothing was logged.

    Of keys FEATURES_GRANULARITY the features give the colour and the granularity the dashes. Steps whose batch had none
    of them are left out.
    """
    series = read_metrics(metrics_path)
    panels = []
    for title, label, pattern, scale in _PANELS:
        keys = {k: match[1] for k in series if (match := re.fullmatch(pattern, k)) and np.isfinite(series[k]).any()}
        if keys:
            panels.append((title, label, keys, scale))
    if not panels:
        return None
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure = new_figure(6.4 * columns, 3.0 * rows + 0.2)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for (title, label, keys, scale), axes in zip(panels, grid):
        colours: dict[str, str] = {}
        for key, name in keys.items():
            source, _, granularity = name.rpartition("_")
            source, dash = (source, _DASHES[granularity]) if granularity in _DASHES else (name, "-")
            colour = colours.setdefault(source, f"C{len(colours)}")
            there = np.isfinite(series[key]) & _in_batch(series, name)
            marker = "." if there.sum() < 5 else None
            x, y = series["step"][there], series[key][there]
            axes.plot(x, y, dash, color=colour, label=name, linewidth=1.2, marker=marker)
        axes.set(xlabel="step", ylabel=label)
        axes.set_title(title, fontsize=10)
        if scale == "from 0":
            axes.set_ylim(0, 1.08 * max(float(np.nanmax(series[key])) for key in keys) or 1.0)
        if scale == "log" and all(np.nanmin(series[key]) > 0 for key in keys):
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        if len(keys) > 1:
            columns = 1 + len(keys) // 13  # beside the curves, which five sensors would hide
            axes.legend(fontsize=7, ncols=columns, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.03))
    for axes in grid[len(panels) :]:
        axes.axis("off")
    return save(figure, path)


def _in_batch(series: dict[str, np.ndarray], features: str) -> np.ndarray:
    """Steps whose batch held these features: a cross entropy of exactly 0 is one over no row."""
    there = np.ones(len(series["step"]), bool)
    for name in (features, f"{features}_pixel"):
        there &= series.get(f"mgcl/{name}", there) != 0
    return there


def expert_picture(path: pathlib.Path, metrics_path: pathlib.Path) -> pathlib.Path | None:
    """Path of the picture of each MoE block's expert load over steps; None for a run without experts."""
    series = read_metrics(metrics_path)
    keys = {tuple(map(int, match.groups())): key for key in series if (match := _EXPERTS.fullmatch(key))}
    if not keys:
        return None
    num_blocks, num_experts = (max(indices) + 1 for indices in zip(*keys))
    loads = np.full((num_blocks, num_experts, len(series["step"])), np.nan)
    for place, key in keys.items():
        loads[place] = series[key]
    figure = new_figure(8.0, 1.3 * num_blocks + 0.9)
    grid = figure.subplots(num_blocks, 1, squeeze=False, sharex=True).ravel()
    peak = max(2 / num_experts, float(np.nanmax(loads)) if np.isfinite(loads).any() else 0.0)
    for block, (load, axes) in enumerate(zip(loads, grid)):
        drawn = axes.pcolormesh(series["step"], np.arange(num_experts), load, shading="nearest", vmin=0, vmax=peak)
        axes.set_ylabel(f"block {block}\nexpert", fontsize=8)
        axes.set_yticks(range(num_experts))
        axes.tick_params(axis="y", labelsize=7)
    grid[-1].set_xlabel("step")
    figure.colorbar(drawn, ax=list(grid), label=f"share of the block's tokens (even: {1 / num_experts:.3f})")
    figure.suptitle("Load of experts, mixture-of-experts blocks from the first to the last", fontsize=11)
    return save(figure, path)
