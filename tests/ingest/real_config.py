"""The nano config on what test_real.py builds; the records of the panchromatic image alone are skipped by it."""

from ml_collections import ConfigDict
from nano import get_config as nano_config


def get_config() -> ConfigDict:
    """For ``--config``, with ``--config.data.sources``."""
    config = nano_config()
    config.name = "real"
    config.run.update(log_every_steps=10)
    config.data.update(
        modalities=("hr", "s2", "s1"),
        num_dates=dict(hr=1, s2=1, s1=1),
        batch_size=4,
    )
    config.data.views.update(
        anchor_cells=4, global_box_cells=(2, 3), global_cells=2, local_box_cells=(1, 1), local_cells=1
    )
    config.optim.update(num_steps=100, learning_rate=1e-3, warmup_steps=5)
    return config
