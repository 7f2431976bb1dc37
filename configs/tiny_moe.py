"""tiny_moe: tiny with a mixture of 8 experts in the last blocks of the backbone. Source: our choice.

Command: python -m skysense_jax.train --config=configs/tiny_moe.py --workdir=RUN
Chips: as tiny; not run.
"""

from ml_collections import ConfigDict

from configs import tiny
from configs._hardware import on


def get_config(target: str = "") -> ConfigDict:
    config = tiny.get_config()
    config.name = "tiny_moe"
    config.model.backbone.num_moe_blocks = 2
    return on(config, target)
