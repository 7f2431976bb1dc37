"""huge: width 352. Source and chips below. Command: python -m skysense_jax.train --config=configs/huge.py"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.name = "huge"
    config.model.backbone.update(width=352, depths=(2, 2, 18, 2))
    config.model.fusion.update(width=1024, depth=24)
    return config
