"""large_moe: large with a mixture of 8 experts in the last blocks of the backbone. Source: our choice.

Command: python -m skysense_jax.train --config=configs/large_moe.py --workdir=RUN
Chips: as large; not run.
"""

from ml_collections import ConfigDict

from configs import large
from configs._hardware import on


def get_config(target: str = "") -> ConfigDict:
    config = large.get_config()
    config.name = "large_moe"
    config.model.backbone.num_moe_blocks = 6
    return on(config, target)
