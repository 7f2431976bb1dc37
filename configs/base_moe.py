"""base_moe: base with a mixture of 8 experts in the last blocks of the backbone. Source: our choice.

Command: python -m skysense_jax.train --config=configs/base_moe.py --workdir=RUN
Chips: as base; not run.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.name = "base_moe"
    config.model.backbone.num_moe_blocks = 6
    return config
