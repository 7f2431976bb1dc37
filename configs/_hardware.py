"""Where a run is laid out: ``--config=configs/huge.py:v5p:64`` is huge on 64 v5p chips (a target of skysense_jax.plan).

Only fields that move the loss by rounding are set; overrides behind it win. Which of these were planned: docs/plans.
"""

import math

from ml_collections import ConfigDict

from skysense_jax import targets

_ENOUGH = 8  # chips that parameters are divided over: 2 GiB of state are left of `huge`; of 64, shards of 11 rows


def on(config: ConfigDict, target: str) -> ConfigDict:
    """``config`` with mesh and parts for a target; as it is without one.

    Parameters are divided over 8 chips that links join, of a mixture over 8 for each expert, which have the innermost
    axis; what is left holds copies. Prototype logits are made a sample at a time.

    Raises:
      ValueError: no such target.
    """
    if not target:
        return config
    there, backbone = targets.parse(target), config.model.backbone
    linked = min(there.chips_per_slice, there.chip.largest_slice)
    expert = math.gcd(backbone.num_experts, linked) if backbone.num_moe_blocks else 1
    fsdp = min(linked // expert, _ENOUGH)
    config.mesh.update(data=there.num_chips // (fsdp * expert), fsdp=fsdp, tensor=1, expert=expert)
    config.parts.logits = max(config.data.batch_size // there.num_chips // config.parts.microbatches, 1)
    return config
