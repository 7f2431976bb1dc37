"""huge: width 352. Source: SkySense V2 (arXiv 2507.13812), 665 M parameters in the backbone.

Command: python -m skysense_jax.train --config=configs/huge.py:v5p:64 --workdir=RUN
Chips: the paper has 128 H20 at batch 1024; not run, step time not known (91 TFLOP a sample and step by formula).
"""

from ml_collections import ConfigDict

from configs import base
from configs._hardware import on


def get_config(target: str = "") -> ConfigDict:
    config = base.get_config()
    config.name = "huge"
    config.model.backbone.update(width=352, depths=(2, 2, 18, 2))
    config.model.fusion.update(width=1024, depth=24)
    return on(config, target)
