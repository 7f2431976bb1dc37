"""huge_moe: huge with a mixture of 8 experts in the last blocks of the backbone.

Source: SkySense V2 (arXiv 2507.13812).
Command: python -m skysense_jax.train --config=configs/huge_moe.py:v5p:64 --workdir=RUN
Chips: as huge; not run.
"""

from ml_collections import ConfigDict

from configs import huge
from configs._hardware import on


def get_config(target: str = "") -> ConfigDict:
    config = huge.get_config()
    config.name = "huge_moe"
    config.model.backbone.num_moe_blocks = 6
    return on(config, target)
