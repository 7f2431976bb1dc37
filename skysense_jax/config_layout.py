"""How a batch, its parts and the experts lie on the devices of a mesh: what ``config_checks.validate`` says of that."""

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
