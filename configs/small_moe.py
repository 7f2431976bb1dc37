"""small_moe: small with a mixture of 8 experts in the last blocks of the backbone. Source: our choice.

Command: python -m skysense_jax.train --config=configs/small_moe.py --workdir=RUN
Chips: as small; not run.
"""

from ml_collections import ConfigDict

from configs import small
from configs._hardware import on


def get_config(target: str = "") -> ConfigDict:
    config = small.get_config()
    config.name = "small_moe"
    config.model.backbone.num_moe_blocks = 6
    return on(config, target)
