"""large_moe: large with a mixture of 8 experts in the last blocks of the backbone. Not run."""

from ml_collections import ConfigDict

from configs import large


def get_config() -> ConfigDict:
    config = large.get_config()
    config.name = "large_moe"
    config.model.backbone.num_moe_blocks = 6
    return config
