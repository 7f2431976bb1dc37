"""What a step costs by formula: FLOPs per sample, tokens, and memory of the state. Nothing is traced or allocated.

A multiply-add counts as two; only matrix products and attention are counted. A training step costs the student three
times its forward pass (forward, and twice that backward) and the teacher once.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from skysense_jax.modalities import Modality

# Fields of the backbone that change its cost.
COSTLY = ("width", "depths", "window", "mlp_ratio", "num_prompts", "experts_per_token", "num_moe_blocks", "moe_from")


@dataclasses.dataclass(frozen=True)
class ViewCost:
    """One view of one sample, forward.

    Attributes:
      image_flops: backbone, per modality, of one date.
      fusion_flops: of all cells of the view.
      query_flops: of the query decoder layer.
      tokens: stage-1 tokens of one date, per modality.
    """

    image_flops: Mapping[str, float]
    fusion_flops: float
    query_flops: float
    tokens: Mapping[str, int]


def block_flops(num_tokens: int, num_keys: int, width: int, mlp_ratio: int | float) -> int | float:
    """FLOPs of one Transformer block: projections 8 D^2, attention 4 D per key, MLP 4 ratio D^2, per token."""
    return num_tokens * (8 * width**2 + 4 * num_keys * width + 4 * mlp_ratio * width**2)


def backbone_flops(
    modality: Modality,
    cells: int,
    *,
    width: int,
    depths: Sequence[int],
    window: int,
    mlp_ratio: int | float,
    num_prompts: int,
    experts_per_token: int = 1,
    num_moe_blocks: int = 0,
    moe_from: str = "end",
) -> float:
    """FLOPs of one image of ``cells`` x ``cells``, forward; MoE blocks at their active experts, without capacity."""
    side = cells * modality.tokens_per_cell
    flops = 2.0 * side**2 * modality.patch**2 * modality.num_bands * width
    for stage, (depth, moe_depth) in enumerate(zip(depths, moe_depths(depths, num_moe_blocks, moe_from))):
        dim = width * 2**stage
        if stage:
            merged = modality.merges_at[stage - 1]
            side = side // 2 if merged else side
            flops += 2.0 * side**2 * (4 if merged else 1) * (dim // 2) * dim
        if stage < 2:
            flops += depth * block_flops(side**2, min(window, side) ** 2, dim, mlp_ratio)
        else:
            tokens = side**2 + num_prompts
            flops += depth * block_flops(tokens, tokens, dim, mlp_ratio)
            flops += moe_depth * (experts_per_token - 1) * tokens * 4 * mlp_ratio * dim**2
    return flops


def moe_depths(depths: Sequence[int], num_moe_blocks: int, moe_from: str = "end") -> tuple[int, ...]:
    """How many blocks of each stage are mixtures of experts: the last ``num_moe_blocks`` of all, or, from the "start",
    the first of stages 3 and 4."""
    order = (3, 2, 1, 0) if moe_from == "end" else (2, 3)
    counts = [0] * len(depths)
    for stage in order:
        counts[stage] = min(depths[stage], num_moe_blocks)
        num_moe_blocks -= counts[stage]
    return tuple(counts)


def view_cost(
    modalities: Sequence[Modality],
    cells: int,
    *,
    num_dates: Mapping[str, int],
    backbone: Mapping[str, Any],
    fusion: Mapping[str, Any],
    queries: Mapping[str, Any],
) -> ViewCost:
    """The forward cost of one view of ``cells`` x ``cells``."""
    width = fusion["width"]
    sequence = 1 + sum(num_dates[m.name] for m in modalities)
    fused = cells**2 * fusion["depth"] * block_flops(sequence, sequence, width, fusion["mlp_ratio"])
    fused += cells**2 * (sequence - 1) * 2 * backbone["width"] * 8 * width
    num_queries = queries["num_queries"]
    query = block_flops(num_queries, num_queries, width, queries["mlp_ratio"])
    query += num_queries * 4 * width**2 + cells**2 * 4 * width**2 + 4 * num_queries * cells**2 * width
    return ViewCost(
        image_flops={m.name: backbone_flops(m, cells, **{k: backbone[k] for k in COSTLY}) for m in modalities},
        fusion_flops=float(fused),
        query_flops=float(query),
        tokens={m.name: (cells * m.tokens_per_cell) ** 2 for m in modalities},
    )


def view_costs(
    modalities: Sequence[Modality], *, data: Mapping[str, Any], model: Mapping[str, Any]
) -> dict[str, ViewCost]:
    """The costs of a "global" and of a "local" view of a config's ``data`` and ``model`` sections."""
    parts = {name: model[name] for name in ("backbone", "fusion", "queries")}
    return {
        kind: view_cost(modalities, data["views"][f"{kind}_cells"], num_dates=data["num_dates"], **parts)
        for kind in ("global", "local")
    }


def step_flops(
    global_view: ViewCost,
    local_view: ViewCost,
    *,
    views: Mapping[str, Any],
    num_dates: Mapping[str, int],
    teacher_local: bool,
) -> float:
    """FLOPs of one sample in one training step: student 3x forward, teacher 1x.

    ``teacher_local``: L_QSACL is on; with it off nobody asks for queries, and the teacher sees no local view.
    Heads are not counted: about 1 % of ``huge``, 7 % of ``tiny``.
    """

    def forward(view: ViewCost) -> float:
        images = sum(num_dates[name] * flops for name, flops in view.image_flops.items())
        return images + view.fusion_flops + (view.query_flops if teacher_local else 0.0)

    globals_, locals_ = views["num_global"] * forward(global_view), views["num_local"] * forward(local_view)
    return 3 * (globals_ + locals_) + globals_ + (locals_ if teacher_local else 0.0)


def batch_flops(
    modalities: Sequence[Modality], *, data: Mapping[str, Any], model: Mapping[str, Any], teacher_local: bool
) -> float:
    """FLOPs of the model in one training step over the whole batch, of a config's ``data`` and ``model`` sections.

    Recomputation in the backward pass is not among them: utilisation counts what the model needs. ``teacher_local`` as
    in ``step_flops``.
    """
    costs = view_costs(modalities, data=data, model=model)
    of_sample = step_flops(
        costs["global"], costs["local"], views=data["views"], num_dates=data["num_dates"], teacher_local=teacher_local
    )
    return of_sample * data["batch_size"]


def frozen_flops(
    modalities: Sequence[Modality], *, data: Mapping[str, Any], model: Mapping[str, Any], fused: bool
) -> float:
    """FLOPs of a frozen network in a step: forward, the batch's global views; ``model`` is its config's section,
    ``fused`` whether its fused features are asked for."""
    view = view_costs(modalities, data=data, model=model)["global"]
    images = sum(data["num_dates"][name] * flops for name, flops in view.image_flops.items())
    return data["batch_size"] * data["views"]["num_global"] * (images + (view.fusion_flops if fused else 0.0))


def state_bytes(num_parameters: int) -> int:
    """Bytes of the training state: student, teacher and two moments in fp32."""
    return num_parameters * 4 * 4


def gradient_bytes(num_parameters: int) -> int:
    """Bytes of the gradients in a step, fp32."""
    return num_parameters * 4
