"""Which expert takes each token: maps of the mixture blocks, shares of the experts, the classes beneath them.

In evaluation nothing is dropped, so a token's expert is the one whose gate is largest. Next: models/moe.py, report.py.
"""

import dataclasses
import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jaxtyping import Float, Int, Integer
from matplotlib import colormaps
from matplotlib.colors import to_hex

from skysense_jax import photometric
from skysense_jax.drawing import NOTHING
from skysense_jax.eval.features import SampleFeatures, WholeSample, clearest_date, cut_window, window_starts
from skysense_jax.eval.probes import MIN_LABELLED_SHARE, cell_targets
from skysense_jax.explain.imagery import figure, imagery, panel, strip
from skysense_jax.explain.places import Place
from skysense_jax.modalities import Modality
from skysense_jax.models.moe import CHOSEN
from skysense_jax.page.charts import matrix
from skysense_jax.page.images import png
from skysense_jax.page.markup import element, guide, swatch, table

_STRONGEST = 4.0  # multiple of a class's share that has the full colour
_MOST_BLOCKS = 6  # whose maps are shown, the last


@dataclasses.dataclass(frozen=True)
class Load:
    """What a block's experts take.

    Attributes:
      share: per modality, of its usable tokens; NaN where it has none.
      lift: share of a class among an expert's tokens, as a multiple of its share among all labelled ones; NaN where
        the expert or the class has no token.
    """

    share: Mapping[str, Float[np.ndarray, " E"]]
    lift: Float[np.ndarray, "E K"]


def _chosen(network: nn.Module, row: Modality, params: Any, window: Any) -> tuple[Any, ...]:
    """Of each mixture block, in order, the first choice [B N] of every token and prompt of windows of one modality."""
    _, kept = network.apply(
        {"params": params},
        photometric.prepare(window["views"], (row,), key=None),
        window["views"],
        present=window["present"],
        day_of_year=window["day_of_year"],
        train=False,
        method="encode",
        mutable=["intermediates"],
    )
    of_backbone = kept["intermediates"]["backbone"]
    stages = [of_backbone.get(f"stage{stage}_experts") for stage in (3, 4)]
    return tuple(stage["experts"][CHOSEN][0][..., 0] for stage in stages if stage is not None)  # each L B N


_jit_chosen = jax.jit(_chosen, static_argnums=(0, 1))


def routes(
    network: nn.Module, params: Any, row: Modality, whole: WholeSample, *, extent: int, cells: int, batch_size: int
) -> list[Int[np.ndarray, "_ _ _"]]:
    """The expert of each token of a place and modality, for each mixture block; -1 where no clear ground is seen.

    ``extent``: side of the place in cells. A block of stage 3 may have several tokens along the side of a cell.
    """
    starts = [(r, c) for r in window_starts(extent, cells) for c in window_starts(extent, cells)]
    num_dates, num_prompts = len(whole.present[row.name]), network.backbone.num_prompts
    one = WholeSample(*({row.name: getattr(whole, f.name)[row.name]} for f in dataclasses.fields(WholeSample)))
    found: list[np.ndarray] = []
    for first in range(0, len(starts), batch_size):
        part = starts[first : first + batch_size]
        filled = part + part[-1:] * (batch_size - len(part))  # one shape, one compilation
        windows = [cut_window(one, (row,), r, c, cells) for r, c in filled]
        window = jax.tree.map(lambda *leaves: np.stack(leaves), *windows)
        blocks = [
            block
            for stage in jax.device_get(_jit_chosen(network, row, params, window))
            for block in stage.reshape(*stage.shape[:2], num_dates, -1)  # B T N
        ]
        for number, block in enumerate(blocks):
            side = math.isqrt(block.shape[-1] - num_prompts)
            grids = block[..., : side * side].reshape(len(block), num_dates, side, side)
            per_cell = side // cells
            if len(found) == number:
                full = max(extent, cells) * per_cell
                found.append(np.full((num_dates, full, full), -1))
            for (r, c), grid in zip(part, grids):
                found[number][:, r * per_cell :, c * per_cell :][:, :side, :side] = grid
    clear = whole.cell_usable[row.name] & whole.present[row.name][:, None, None]
    out = []
    for block in found:
        per_cell = block.shape[1] // clear.shape[1]
        seen = np.where(np.kron(clear, np.ones((1, per_cell, per_cell), bool)), block, -1)
        out.append(seen[:, : extent * per_cell, : extent * per_cell])
    return out


def load(
    chosen: Mapping[str, Sequence[Int[np.ndarray, "_ _ _"]]],
    labels: Sequence[Integer[np.ndarray, "_ _"] | None],
    *,
    num_experts: int,
    num_classes: int,
) -> Load:
    """What the experts of one block take: ``chosen`` per modality of each place, ``labels`` of each place."""
    share, joint = {}, np.zeros((num_experts, num_classes))
    for name, of_places in chosen.items():
        counts = np.zeros(num_experts)
        for experts, ids in zip(of_places, labels):
            counts += np.bincount(experts[experts >= 0], minlength=num_experts)
            if ids is None or not experts.size:
                continue
            targets = cell_targets(ids, extent_cells=experts.shape[1], min_share=MIN_LABELLED_SHARE)
            targets = np.broadcast_to(targets, experts.shape)
            counted = (experts >= 0) & (targets > 0)
            np.add.at(joint, (experts[counted], targets[counted] - 1), 1)
        share[name] = counts / counts.sum() if counts.sum() else np.full(num_experts, np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        lift = joint / joint.sum(1, keepdims=True) / (joint.sum(0) / joint.sum())
    return Load(share, lift)


# ---- on the page


def mixture_blocks(depths: Sequence[int], num_moe_blocks: int, moe_from: str) -> str:
    """Which blocks have experts, in words; the arguments are fields of ``Backbone``."""
    some = "" if num_moe_blocks == 1 else f" {num_moe_blocks}"
    return f"the {'last' if moe_from == 'end' else 'first'}{some} of the {sum(depths[2:])} blocks of stages 3 and 4"


def section(
    places: Sequence[Place],
    seen: Sequence[SampleFeatures],
    chosen: Mapping[str, Sequence[Sequence[Int[np.ndarray, "_ _ _"]]]],
    rows: Sequence[Modality],
    *,
    num_experts: int,
    where: str,
    classes: Sequence[str],
    num_shown: int,
) -> str:
    """HTML: ``chosen`` per modality, of each place, of each block; maps of the first ``num_shown`` places.

    ``where``: the blocks, of ``mixture_blocks``.
    """
    num_blocks = len(next(iter(chosen.values()))[0])
    colours = [tuple(colormaps["tab20" if num_experts > 10 else "tab10"].colors[e % 20]) for e in range(num_experts)]
    told = guide(
        f"In {where} every token goes to one of several MLPs, its expert. Maps show the first choice on the clearest "
        "date.",
        good="every expert has work, and an expert has a kind of ground or a modality.",
        bad="one takes nearly all, or the map is noise.",
    )
    key = "".join(element("li", swatch(f"expert {e}", to_hex(rgb))) for e, rgb in enumerate(colours))
    body = told + element("ul", key, class_="legend", aria_label="Experts")
    palette = np.array([*colours, NOTHING])  # -1 is the last
    panels, first = [], max(0, num_blocks - _MOST_BLOCKS)
    for place, (shown, features) in enumerate(zip(places[:num_shown], seen)):
        inside = strip("imagery", imagery(features, rows))
        for block in range(first, num_blocks):
            maps = []
            for row in rows:
                date = clearest_date(features.whole, row.name)
                if date is not None:
                    grid = chosen[row.name][place][block][date]
                    maps.append(figure(png(palette[grid]), html.escape(row.name), f"experts of {row.name} tokens"))
            inside += strip(f"experts of mixture block {block}", maps)
        panels.append(panel(shown.sample.id, inside))
    columns = f"--columns:{min(len(rows) + 1, 6)}"
    body += element("div", "".join(panels), class_="panels", style=columns)
    labels = [place.labels for place in places]
    for block in range(first, num_blocks):
        of_block = {name: [of_place[block] for of_place in of] for name, of in chosen.items()}
        found = load(of_block, labels, num_experts=num_experts, num_classes=len(classes))
        body += _block(block, found, classes)
    return body


def _block(block: int, found: Load, classes: Sequence[str]) -> str:
    names = [f"expert {e}" for e in range(len(found.lift))]
    rows = [[name, *("" if np.isnan(x) else f"{x:.0%}" for x in share)] for name, share in found.share.items()]
    caption = f"Share of tokens that each expert of mixture block {block} takes; even: {1 / len(names):.0%}"
    body = table(caption, ["modality", *names], rows, classes=["", *["number"] * len(names)])
    there = np.flatnonzero(np.isfinite(found.lift).any(0))
    if there.size:
        chart = matrix(
            np.nan_to_num(found.lift[:, there]),
            names,
            [classes[k].replace("_", " ") for k in there],
            title=f"Classes beneath the experts of mixture block {block}",
            least=0.0,
            most=_STRONGEST,
            told="{} times the class's share",
        )
        text = f"Classes of its tokens as multiples of the class's share; full colour: {_STRONGEST:g}."
        body += element("div", element("p", text, class_="faint") + chart)
    body = element("div", body, class_="beside")
    return element("h3", f"Mixture block {block}") + body
