"""large: width 192, Swin V2-L widths and, in stages 1 and 2, depths. Source: our choice.

Command: python -m skysense_jax.train --config=configs/large.py --workdir=RUN
Chips: meant for a node of 8; not run, step time not known.
"""

from ml_collections import ConfigDict

from configs import base
from configs._hardware import on


def get_config(target: str = "") -> ConfigDict:
    config = base.get_config()
    config.name = "large"
    config.model.backbone.update(width=192, depths=(2, 2, 18, 2))
    config.model.fusion.update(width=768, depth=18)
    return on(config, target)
