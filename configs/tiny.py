"""tiny: laptop and tests. Source: our choice. Command: bash launch/local.sh

Chips: 2 CPU cores; expected step time and what was run: benchmarks/results.md.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.name = "tiny"
    config.run.update(
        log_every_steps=5, checkpoint_every_steps=50, input_threads=2, input_workers=0, pictures_every_steps=0
    )
    config.efficiency.update(remat="none")
    config.data.update(batch_size=4, photometric_strength=0.3, num_dates=dict(hr=1, s2=2, s1=1))
    config.data.views.update(
        anchor_cells=16, global_box_cells=(10, 15), global_cells=8, local_box_cells=(3, 7), local_cells=4
    )
    config.data.scenes.update(num_scenes=512, extent_cells=16)
    config.model.update(compute_dtype="float32")  # bf16 is emulated on a CPU
    config.model.backbone.update(width=32, depths=(1, 1, 2, 1), drop_path=0.0, layer_scale_init=0.1)
    config.model.fusion.update(width=128, depth=2, head_width=32, drop_path=0.0)
    config.model.queries.update(num_queries=16)
    config.model.heads.update(hidden_dim=128, bottleneck_dim=64, num_prototypes=256)
    # A run of minutes on small batches. Measured: with temperatures of 0.04 to 0.07 the targets drift to uniform, with
    # a learning rate of 2e-3 three components hold all variance of the features.
    config.objective.update(
        teacher_temperature_start=0.03,
        teacher_temperature=0.03,
        teacher_temperature_warmup_steps=0,
        prototype_freeze_steps=10,
    )
    config.optim.update(num_steps=200, learning_rate=3e-4, warmup_steps=30, ema_momentum=0.99)
    return config
