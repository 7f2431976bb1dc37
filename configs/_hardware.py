"""Where a run is laid out: ``--config=configs/huge.py:v5p:64`` is huge on 64 v5p chips (a target of skysense_jax.plan).

Only fields that move the loss by rounding are set; overrides behind it win. Which of these were planned: docs/plans.
"""

import math

from ml_collections import ConfigDict

from skysense_jax import targets

_ENOUGH = 64  # chips that a state of 20 GB and more is divided over; more only lengthens the exchanges


def on(config: ConfigDict, target: str) -> ConfigDict:
    """``config`` with mesh and parts for a target; as it is without one.

    Parameters are divided over chips that links join: a host of GPUs, a TPU slice up to 64; a mixture's experts too,
    which have the innermost axis; what is left holds copies. Prototype logits are made a sample at a time.

    Raises:
      ValueError: no such target.
    """
    if not target:
        return config
    there, backbone = targets.parse(target), config.model.backbone
    linked = min(there.chips_per_slice, there.chip.largest_slice, _ENOUGH)
    expert = math.gcd(backbone.num_experts, linked) if backbone.num_moe_blocks else 1
    config.mesh.update(data=there.num_chips // linked, fsdp=linked // expert, tensor=1, expert=expert)
    config.parts.logits = max(config.data.batch_size // there.num_chips // config.parts.microbatches, 1)
    return config
