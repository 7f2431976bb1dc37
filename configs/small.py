"""small: width 96, Swin V2-T widths and, in stages 1 and 2, depths. Source: our choice.

Command: python -m skysense_jax.train --config=configs/small.py --workdir=RUN
Chips: meant for one GPU; not run, step time not known.
"""

from ml_collections import ConfigDict

from configs import base
from configs._hardware import on


def get_config(target: str = "") -> ConfigDict:
    config = base.get_config()
    config.name = "small"
    config.model.backbone.update(width=96, depths=(2, 2, 6, 2))
    config.model.fusion.update(width=384, depth=6)
    return on(config, target)
