"""base_moe: base with a mixture of 8 experts in the last blocks of the backbone. Source: our choice.

Command: python -m skysense_jax.train --config=configs/base_moe.py --workdir=RUN
Chips: as base; not run.
"""

from ml_collections import ConfigDict

from configs import base
from configs._hardware import on


def get_config(target: str = "") -> ConfigDict:
    config = base.get_config()
    config.name = "base_moe"
    config.model.backbone.num_moe_blocks = 6
    return on(config, target)
