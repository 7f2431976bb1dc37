"""AdamW whose learning rate falls with a layer's distance from the head (BEiT, arXiv 2106.08254).

A layer's rate is that of the schedule times ``decay ** (L - l)``: tokenizers and prompts are layer 0, the blocks of all
four stages 1, 2, ..., and of fused features the blocks of the fusion after them; L, the head, is one more than the last
block. A merging layer belongs to the block before it, as in SimMIM's (arXiv 2111.09886) rule for Swin. What a parameter
decays to zero by is said by its name (optim.py). Next: finetune.py.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from skysense_jax import optim
from skysense_jax.trees import named_leaves, path_string

HEAD = "head"


def _layers(path: str, length: int, depths: Sequence[int], fusion_depth: int) -> int | range:
    """The layer of a parameter, or of each slice along its first axis, ``length`` long."""
    ends = np.cumsum([0, *depths]).tolist()
    part, _, rest = path.partition("/")
    if part == HEAD:
        return ends[-1] + fusion_depth + 1
    if part == "fusion":
        if rest.startswith("blocks/"):
            return range(ends[-1] + 1, ends[-1] + 1 + length)
        return ends[-1] + fusion_depth if rest.startswith("norm/") else ends[-1]
    if part == "backbone":
        if re.match(r"tokenizer_\w+/|stage[34]_\w+_prompts$", rest):
            return 0
        if found := re.match(r"merging_([234])/", rest):
            return ends[int(found[1]) - 1]
        if found := re.match(r"stage([12])_(\d+)/", rest):
            return ends[int(found[1]) - 1] + int(found[2]) + 1
        if found := re.match(r"stage([34])/", rest):
            return range(ends[int(found[1]) - 1] + 1, ends[int(found[1]) - 1] + 1 + length)
        if found := re.match(r"stage([34])_experts/", rest):  # the last blocks of the stage: moe_from is "end"
            return range(ends[int(found[1])] - length + 1, ends[int(found[1])] + 1)
    raise ValueError(f"parameter {path!r}: no rule says which layer it belongs to; add one to tasks/layer_rates.py")


def layer_scales(
    params: Any, *, depths: Sequence[int], fusion_depth: int, decay: float
) -> dict[str, Float[np.ndarray, "..."]]:
    """By path, what the learning rate of each parameter of {"backbone", "fusion", "head"} is multiplied by.

    Blocks that a scan stacks have one number a block, along the first axis; everything else has a scalar.
    ``depths``: blocks of the four stages. ``fusion_depth``: 0 if the head does not read fused features.

    Raises:
      ValueError: a parameter that no rule knows.
    """
    last = sum(depths) + fusion_depth + 1
    scales = {}
    for path, leaf in named_leaves(params).items():
        layers = _layers(path, leaf.shape[0] if leaf.ndim else 0, depths, fusion_depth)
        scale = np.asarray(float(decay) ** (last - np.asarray(layers)), np.float32)
        scales[path] = scale.reshape(scale.shape + (1,) * (leaf.ndim - 1) if scale.ndim else ())
    return scales


def make_optimizer(
    params: Any,
    *,
    learning_rate: optim.Schedule,
    weight_decay: float,
    clip_norm: float,
    depths: Sequence[int],
    fusion_depth: int,
    layer_decay: float,
) -> optax.GradientTransformation:
    """AdamW (betas 0.9, 0.999) of these parameters as a run has it, and the rate by layer."""
    scales = layer_scales(params, depths=depths, fusion_depth=fusion_depth, decay=layer_decay)

    def by_layer(updates, _):
        return jax.tree_util.tree_map_with_path(lambda path, x: x * jnp.asarray(scales[path_string(path)]), updates)

    plain = optim.make_optimizer(
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        beta1=0.9,
        beta2=0.999,
        clip_norm=clip_norm,
        prototype_freeze_steps=0,
    )
    return optax.chain(plain, optax.stateless(by_layer))
