"""base_moe: base with a mixture of 8 experts in the last blocks of the backbone. Not run."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.name = "base_moe"
    config.model.backbone.num_moe_blocks = 6
    return config
