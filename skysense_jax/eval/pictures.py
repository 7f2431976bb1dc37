"""Pictures a person can judge a run by: views with labels, features beside imagery, attention of the queries.

Each function draws one picture from arrays and writes a PNG; ``write_all`` makes what they need from a model and draws
them all. They change nothing and feed nothing back. Next: curves.py (losses, expert load), features.py.
"""

import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import matplotlib
import numpy as np
from flax import linen as nn
from jaxtyping import Bool, Float, Int, Num
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PatchCollection
from matplotlib.colors import TwoSlopeNorm
from matplotlib.patches import Patch, Polygon, Rectangle
from matplotlib.transforms import Affine2D

from skysense_jax.batch import Batch, Views
from skysense_jax.data.sample import SampleReader
from skysense_jax.drawing import (
    NOTHING,
    class_legend,
    fit_colours,
    label_colours,
    labels_to_rgb,
    new_figure,
    save,
    show,
    shown_bands,
    to_rgb,
)
from skysense_jax.eval import curves
from skysense_jax.eval.features import SampleFeatures, clearest_date, num_batch_shards, replicated, sample_features
from skysense_jax.modalities import OSM, Modality
from skysense_jax.models.skysense import Features

_MAX_DATES = 3  # of a modality in the picture of views
_ROW_TITLE_WIDTH = 24  # characters: longer names of samples would run into those of the next row


def _pixels(mask: Bool[np.ndarray, "P Q"], side: int) -> Bool[np.ndarray, "H W"]:
    return np.kron(mask, np.ones((side // mask.shape[0],) * 2, bool))


# ---- views of one sample


def _ground_transform(affine: Float[np.ndarray, "2 3"]) -> Affine2D:
    """From (column, row) offsets of a view to (column, row) ground cells."""
    (rr, rc, row), (cr, cc, column) = np.asarray(affine, float)
    return Affine2D(np.array([[cc, cr, column], [rc, rr, row], [0.0, 0.0, 1.0]]))


def _draw_ground(axes: Axes, shots: Sequence[tuple[str, Views, int]], images: Sequence[np.ndarray]) -> None:
    """Global views laid on the ground where they were cut, with the outlines of all views."""
    outlines, low, high = [], np.full(2, np.inf), np.full(2, -np.inf)
    for (name, views, v), image in zip(shots, images):
        rows, columns = views.labels.shape[2:4]
        box = np.array([(-columns, -rows), (columns, -rows), (columns, rows), (-columns, rows)]) / 2
        to_ground = _ground_transform(views.affine[0, v])
        corners = to_ground.transform(box)
        low, high = np.minimum(low, corners.min(0)), np.maximum(high, corners.max(0))
        is_global = name.startswith("global")
        if is_global:
            extent = (-columns / 2, columns / 2, rows / 2, -rows / 2)
            axes.imshow(image, extent=extent, transform=to_ground + axes.transData, interpolation="nearest")
        outlines.append((name, corners, "white" if is_global else "yellow", 2.0 if is_global else 1.0))
    for name, corners, colour, width in outlines:
        axes.add_patch(Polygon(corners, fill=False, edgecolor="black", linewidth=width + 1.5))
        axes.add_patch(Polygon(corners, fill=False, edgecolor=colour, linewidth=width))
        # The dot is the view's own north-west corner: it shows flips and turns.
        axes.plot(*corners[0], "o", color=colour, markeredgecolor="black", markersize=5)
        axes.text(
            *(0.88 * corners[0] + 0.12 * corners[2]),
            name.replace("global ", "G").replace("local ", "L"),
            color=colour,
            fontsize=8,
            ha="center",
            va="center",
            bbox=dict(facecolor="black", alpha=0.5, pad=1, linewidth=0),
        )
    axes.set(
        xlim=(low[0] - 0.5, high[0] + 0.5),
        ylim=(high[1] + 0.5, low[1] - 0.5),
        aspect="equal",
        xlabel="column, cells of 10 m",
        ylabel="row, cells of 10 m",
    )
    axes.set_title("crops on the ground\nwhite global, yellow local; dot: the view's first corner", fontsize=9)
    axes.set_facecolor(NOTHING)


def views_picture(
    path: pathlib.Path, batch: Batch, modalities: Sequence[Modality], *, classes: Sequence[str] = OSM.classes
) -> pathlib.Path:
    """Path of the picture of all views of a batch's first sample: a column a view, a row a date, labels below.

    ``batch`` is on the host. Of a modality at most three of the dates present are shown. Hatched: cells that losses
    and fusion leave out; where there is a cloud, the backbone sees them.
    """
    one = jax.tree.map(lambda leaf: np.asarray(leaf)[:1], batch)
    groups = (("global", one.global_views), ("local", one.local_views))
    shots = [(f"{kind} {v + 1}", views, v) for kind, views in groups for v in range(views.affine.shape[1])]
    rows = []
    for modality in modalities:
        present = np.flatnonzero(one.present[modality.name][0])
        rows += [(modality, int(date)) for date in present[:_MAX_DATES]] or [(modality, None)]

    figure = new_figure(5.0 + 1.25 * len(shots), 1.25 * (len(rows) + 1) + 1.2)
    ground, table = figure.subfigures(1, 2, width_ratios=(4.6, 1.25 * len(shots)))
    grid = table.subplots(len(rows) + 1, len(shots), squeeze=False)
    backdrop = None
    for (modality, date), panels in zip(rows, grid):
        shown = _row_images(shots, modality, date)
        backdrop = shown if backdrop is None and date is not None else backdrop
        for (_, views, v), image, axes in zip(shots, shown, panels):
            show(axes, image)
            if date is not None:
                _hatch(axes, ~views.cell_usable[modality.name][0, v, date], image.shape[0])
        day = one.day_of_year[modality.name][0, date] if date is not None else None
        when = "not in this sample" if day is None else f"day {day}" if day else "undated"
        panels[0].set_ylabel(f"{modality.name}\n{' '.join(shown_bands(modality))}\n{when}", fontsize=8)
    for (name, views, v), axes, top in zip(shots, grid[-1], grid[0]):
        show(axes, labels_to_rgb(views.labels[0, v], classes))
        top.set_title(name, fontsize=9)
    grid[-1, 0].set_ylabel("labels", fontsize=8)
    _draw_ground(ground.subplots(), shots, backdrop or [np.full((1, 1, 3), NOTHING)] * len(shots))
    shares = np.concatenate([views.labels[0, v].reshape(-1, len(classes)) for _, views, v in shots])
    used = np.flatnonzero(np.bincount(shares.argmax(1)[shares.sum(1) > 0], minlength=len(classes)))
    hatched = Patch(
        facecolor="none", edgecolor="red", hatch="////", label="cloud or no data: losses and fusion skip it"
    )
    class_legend(figure, classes, used.tolist(), (hatched,))
    figure.suptitle(f"Views of record {int(one.record[0])}, before photometric changes", fontsize=11)
    return save(figure, path)


def _row_images(
    shots: Sequence[tuple[str, Views, int]], modality: Modality, date: int | None
) -> list[Float[np.ndarray, "H W 3"]]:
    """One modality and date in every view, stretched alike."""
    if date is None:
        return [np.full((1, 1, 3), NOTHING)] * len(shots)
    pixels, masks = [], []
    for _, views, v in shots:
        pixels.append(views.images[modality.name][0, v, date])
        masks.append(_pixels(views.token_valid[modality.name][0, v, date], pixels[-1].shape[0]))
    flat = to_rgb(
        np.concatenate([p.reshape(1, -1, p.shape[-1]) for p in pixels], axis=1),
        modality,
        valid=np.concatenate([m.reshape(1, -1) for m in masks], axis=1),
    )[0]
    ends = np.cumsum([p.shape[0] * p.shape[1] for p in pixels])[:-1]
    return [part.reshape(*p.shape[:2], 3) for part, p in zip(np.split(flat, ends), pixels)]


def _hatch(axes: Axes, mask: Bool[np.ndarray, "P Q"], side: int) -> None:
    """Red stripes over the cells of ``mask``, on an image of ``side`` pixels."""
    step = side / mask.shape[0]
    squares = [Rectangle((q * step - 0.5, p * step - 0.5), step, step) for p, q in np.argwhere(mask)]
    stripes = PatchCollection(squares, facecolor="none", edgecolor="red", linewidth=0, hatch="////")
    axes.add_collection(stripes)


# ---- features beside imagery


def features_picture(
    path: pathlib.Path,
    features: Sequence[SampleFeatures],
    modalities: Sequence[Modality],
    *,
    labels: Sequence[Int[np.ndarray, "H W"] | Num[np.ndarray, "H W"] | None],
    names: Sequence[str],
    classes: Sequence[str] = OSM.classes,
) -> pathlib.Path:
    """Path of the picture of features beside imagery: a row a sample; imagery, labels, features as colours.

    Equal colours in a column mean equal features, also between samples; between columns colours mean nothing.
    ``labels`` holds class ids (0 = nothing mapped) or None where a sample has none.
    """
    sources = [("fused", [f.fused for f in features], [f.fused_usable for f in features])]
    for m in modalities:
        sources.append((m.name, [f.modality[m.name] for f in features], [f.modality_usable[m.name] for f in features]))
    titles, columns = [], []
    for modality in modalities:
        columns.append([_clearest(f, modality) for f in features])
        titles.append(f"{modality.name}, clearest date\n{' '.join(shown_bands(modality))}")
    palette = np.concatenate((np.array([NOTHING]), label_colours(classes)))
    columns.append([palette[ids] if ids is not None else None for ids in labels])
    titles.append("labels")
    for name, values, usable in sources:
        rows = np.concatenate([v[u] for v, u in zip(values, usable)])
        if len(rows) < 4:
            columns.append([None] * len(features))
            titles.append(f"features: {name}\nabsent")
            continue
        colours, share = fit_colours(rows.astype(np.float64))
        columns.append([np.where(u[..., None], colours(v), NOTHING) for v, u in zip(values, usable)])
        titles.append(f"features: {name}\n{share:.0%} of variance")

    figure = new_figure(1.75 * len(columns), 1.75 * len(features) + 1.0)
    grid = figure.subplots(len(features), len(columns), squeeze=False)
    for column, title, panels in zip(columns, titles, grid.T):
        panels[0].set_title(title, fontsize=9)
        for image, axes in zip(column, panels):
            show(axes, np.full((1, 1, 3), NOTHING) if image is None else image)
            if image is None:
                axes.text(0, 0, "none", ha="center", va="center", fontsize=9)
    for name, axes in zip(names, grid[:, 0]):
        axes.set_ylabel("\n".join(textwrap.wrap(name, _ROW_TITLE_WIDTH)), fontsize=8)
    used = sorted({int(i) - 1 for ids in labels if ids is not None for i in np.unique(ids) if i > 0})
    class_legend(figure, classes, used)
    figure.suptitle("Frozen features of samples; colours: first three principal components", fontsize=11)
    return save(figure, path)


def _clearest(features: SampleFeatures, modality: Modality) -> np.ndarray | None:
    """The date with most usable cells as RGB, None if the sample lacks the modality."""
    whole = features.whole
    date = clearest_date(whole, modality.name)
    if date is None:
        return None
    image = whole.images[modality.name][date]
    return to_rgb(image, modality, valid=_pixels(whole.token_valid[modality.name][date], image.shape[0]))


# ---- attention of the queries


def attention_picture(
    path: pathlib.Path,
    attention: Float[np.ndarray, "R P Q"],
    usable: Bool[np.ndarray, "P Q"],
    image: Float[np.ndarray, "H W 3"],
    *,
    title: str = "",
    num_shown: int = 8,
) -> pathlib.Path:
    """Path of the picture of where queries look in one view: whose cell is whose, and the most used queries.

    A cell belongs to the query that looks at it most; a query is used as much as it owns cells. Attention is shown
    as a multiple of the uniform one. ``image`` shows the same ground.
    """
    num_queries, rows, columns = attention.shape
    owner = attention.argmax(0)
    owned = np.bincount(owner[usable], minlength=num_queries)
    top = np.argsort(-owned, kind="stable")[: min(num_shown, num_queries)]
    extent = (0, columns, rows, 0)
    grey = np.repeat(image.mean(-1, keepdims=True), 3, -1)

    width = -(-(len(top) + 2) // 2)
    figure = new_figure(1.9 * width + 0.8, 4.5)
    grid = figure.subplots(2, width, squeeze=False)
    panels = grid.ravel()
    show(panels[0], image, extent=extent)
    panels[0].set_title("view", fontsize=9)
    palette = np.array(matplotlib.colormaps["tab20"].colors)
    rank = np.full(num_queries, -1)
    rank[top] = np.arange(len(top))
    owners = np.where((usable & (rank[owner] >= 0))[..., None], palette[rank[owner] % 20], NOTHING)
    show(panels[1], grey, extent=extent)
    show(panels[1], owners, extent=extent, alpha=0.6)
    panels[1].set_title("cells by owner", fontsize=9)
    heat = attention * max(int(usable.sum()), 1)
    norm = TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=max(2.0, float(np.percentile(heat[top], 99.5))))
    colours = ScalarMappable(norm, matplotlib.colormaps["PuOr_r"])
    for place, (query, axes) in enumerate(zip(top, panels[2:])):
        show(axes, grey, extent=extent)
        # Uniform attention leaves the view as it is; what is looked at more turns orange, what less purple.
        strength = np.abs(np.asarray(norm(heat[query])) - 0.5) * 2
        shown = np.concatenate((colours.to_rgba(heat[query])[..., :3], 0.85 * strength.clip(0, 1)[..., None]), -1)
        axes.imshow(shown, extent=extent, interpolation="nearest")
        axes.set_title(f"query {query}: {owned[query]} cells", fontsize=9)
        for spine in axes.spines.values():
            spine.set(color=palette[place % 20], linewidth=2.5)
    for axes in panels[2 + len(top) :]:
        axes.axis("off")
    figure.colorbar(colours, ax=grid, shrink=0.7, label="attention, multiple of uniform")
    used = int((owned > 0).sum())
    figure.suptitle(f"{title or 'Attention of the queries'}: {used} of {num_queries} queries own a cell", fontsize=11)
    return save(figure, path)


# ---- all of them


def query_attention(
    model: nn.Module, params: Any, fused: Float[np.ndarray, "P Q D"], usable: Bool[np.ndarray, "P Q"]
) -> Float[np.ndarray, "R P Q"]:
    """Where each query of a SkySense looks in one view, given its fused features; on the host."""
    whole = lambda x: np.broadcast_to(x, (num_batch_shards(), 1, *x.shape))  # noqa: E731
    features = Features(modality={}, usable={}, fused=whole(fused), fused_usable=whole(usable), router=None)
    attend = lambda p, f: replicated(model.apply({"params": p}, f, method="query_attention"))  # noqa: E731
    return jax.device_get(jax.jit(attend)(params, features))[0, 0]


def write_all(
    out_dir: pathlib.Path,
    *,
    model: nn.Module,
    params: Any,
    modalities: Sequence[Modality],
    samples: Sequence[SampleReader],
    batch: Batch,
    metrics_path: pathlib.Path,
    cells: int,
    num_dates: Mapping[str, int],
    batch_size: int,
    classes: Sequence[str] = OSM.classes,
) -> list[pathlib.Path]:
    """Paths of all pictures of a run, written into ``out_dir``; empty on every process but the first.

    Every process calls it, under the run's mesh. ``samples``: a few, the same on every process.
    ``batch``: one on the host, for the picture of views. ``cells``, ``num_dates``, ``batch_size`` as in
    ``features.sample_features``. ``classes``: of the label map.
    """
    out_dir = pathlib.Path(out_dir)
    options = dict(cells=cells, num_dates=num_dates, batch_size=batch_size)
    found = list(sample_features(model, params, modalities, samples, **options))
    view = tuple(slice(0, min(cells, side)) for side in found[0].fused.shape[:2])
    usable = found[0].fused_usable[view]
    attention = query_attention(model, params, found[0].fused[view], usable)
    if jax.process_index() != 0:
        return []

    labels = [sample.labels_window(0, 0, sample.extent_cells) for sample in samples]
    paths = [
        views_picture(out_dir / "views.png", batch, modalities, classes=classes),
        features_picture(
            out_dir / "features.png",
            found,
            modalities,
            labels=labels,
            names=[sample.id for sample in samples],
            classes=classes,
        ),
        attention_picture(
            out_dir / "queries.png",
            attention,
            usable,
            _backdrop(found[0], modalities, len(usable)),
            title=f"Attention of the queries on {samples[0].id}",
        ),
        curves.curves_picture(out_dir / "curves.png", metrics_path),
        curves.expert_picture(out_dir / "experts.png", metrics_path),
    ]
    return [path for path in paths if path is not None]


def _backdrop(features: SampleFeatures, modalities: Sequence[Modality], cells: int) -> Float[np.ndarray, "H W 3"]:
    """The north-west ``cells`` of the sample in the finest modality that it has."""
    for modality in sorted(modalities, key=lambda m: -m.pixels_per_cell):
        image = _clearest(features, modality)
        if image is not None:
            side = cells * modality.pixels_per_cell
            return image[:side, :side]
    return np.full((1, 1, 3), NOTHING)
