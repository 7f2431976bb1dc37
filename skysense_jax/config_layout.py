"""How a run lies on devices, batch, parts, experts, attention: what ``config_checks.validate`` says of that."""

import math
from collections.abc import Iterator

from ml_collections import ConfigDict

from skysense_jax import sharding

_BATCH_AXES = dict(sharding.LOGICAL_AXIS_RULES)[sharding.BATCH]  # that samples lie on


def layout_problems(config: ConfigDict, num_devices: int | None) -> Iterator[str]:
    """What does not divide; without ``num_devices`` a -1 in the mesh is taken as 1."""
    sizes = dict(config.mesh)
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        yield f"config.mesh: got {sizes}; wanted at most one -1"
        return
    if free:  # without a number of devices only what is known can be checked; sharding.make_mesh refuses what is left
        known = math.prod(size for size in sizes.values() if size != -1)
        fits = num_devices is not None and num_devices % known == 0
        sizes[free[0]] = num_devices // known if fits else 1
    shards = math.prod(sizes[axis] for axis in _BATCH_AXES)
    batch_size, microbatches, logits = config.data.batch_size, config.parts.microbatches, config.parts.logits
    axes = "the product of the mesh axes " + ", ".join(f"{axis} {sizes[axis]}" for axis in _BATCH_AXES)
    if batch_size % shards:
        yield f"config.data.batch_size: got {batch_size}; wanted a multiple of {shards}, {axes}"
    elif batch_size % (shards * microbatches * logits):
        yield (
            f"config.parts: got microbatches {microbatches}, logits {logits}; wanted their product to divide "
            f"{batch_size // shards}, the samples of each device (config.data.batch_size {batch_size} over {shards}, "
            f"{axes})"
        )
    backbone = config.model.backbone
    if backbone.num_moe_blocks and backbone.num_experts % sizes["expert"]:
        yield (
            f"config.mesh.expert: got {sizes['expert']}; wanted a divisor of config.model.backbone.num_experts, "
            f"{backbone.num_experts}"
        )
    if microbatches > 1 and config.objective.weights.koleo:
        yield (
            f"config.parts.microbatches: got {microbatches} with config.objective.weights.koleo "
            f"{config.objective.weights.koleo}; wanted 1, because KoLeo compares all samples of the batch with each "
            "other, or koleo 0"
        )
    if config.efficiency.attention in ("cudnn", "cudnn+triton"):
        yield from cudnn_problems(config)


def cudnn_problems(config: ConfigDict) -> Iterator[str]:
    """What cuDNN's fused attention with a mask asks for and this config has not: bf16, heads of 8, 16, ... 128,
    sequences of even length."""
    if config.model.compute_dtype != "bfloat16":
        yield (
            f"config.efficiency.attention: got 'cudnn' with config.model.compute_dtype {config.model.compute_dtype!r}; "
            "wanted 'bfloat16', which is what cuDNN's attention takes, or attention 'xla'"
        )
    why = "with config.efficiency.attention 'cudnn', which trains on sequences of even length only"
    for name in ("backbone", "fusion"):
        if (width := config.model[name].head_width) % 8 or width > 128:
            yield f"config.model.{name}.head_width: got {width}; wanted 8, 16, ... 128 with attention 'cudnn'"
    for field in ("global_cells", "local_cells"):
        if config.data.views[field] % 2:
            yield f"config.data.views.{field}: got {config.data.views[field]}; wanted an even number {why}"
    if config.model.backbone.num_prompts % 2:
        yield f"config.model.backbone.num_prompts: got {config.model.backbone.num_prompts}; wanted an even number {why}"
    dates = sum(config.data.num_dates[name] for name in config.data.modalities if name in config.data.num_dates)
    if dates % 2 == 0:
        yield (
            f"config.data.num_dates: got {dates} over config.data.modalities; wanted an odd number, which fusion's "
            f"class token makes even, {why}"
        )
