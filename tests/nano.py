"""The micro config cut to what several processes on one small machine compile in seconds: one sensor, three steps."""

from micro import micro_config
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """For ``--config`` and for tests; batch 8, so that 1, 2, 4 and 8 devices a process share it."""
    config = micro_config()
    config.name = "nano"
    config.run.update(checkpoint_every_steps=100, input_workers=0)
    config.data.update(modalities=("s1",), num_dates=dict(s1=1))
    config.data.scenes.update(num_scenes=24)
    config.model.backbone.update(drop_path=0.0, num_moe_blocks=0)
    config.model.fusion.update(depth=1, drop_path=0.0)
    config.objective.weights.update(qsacl=0.0, text_alignment=0.0, koleo=0.0)
    config.objective.mgcl.update(object_weight=0.0)
    config.objective.sinkhorn_iterations = 1
    config.optim.update(num_steps=4, warmup_steps=1)
    config.eval.probe_untrained = False
    return config
