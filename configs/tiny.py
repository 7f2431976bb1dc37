"""tiny: laptop and tests. Source: our choice. Command: bash launch/local.sh

Chips: 2 CPU cores; expected step time and what was run: benchmarks/results.md.
"""

from ml_collections import ConfigDict

from configs import base
from configs._hardware import on


def get_config(target: str = "") -> ConfigDict:
    config = base.get_config()
    config.name = "tiny"
    config.run.update(
        log_every_steps=5, checkpoint_every_steps=100, input_threads=2, input_workers=0, pictures_every_steps=0
    )
    config.efficiency.update(remat="none")
    config.data.update(batch_size=4, photometric_strength=0.3, num_dates=dict(hr=1, s2=2, s1=1))
    # Views half as wide as the method's table has for tiny (4 cells, not 8): a step of 4.3 GFLOP a sample, so that
    # minutes on a laptop hold hundreds of steps. Not resized: a view of 2 cells has 2 Sentinel pixels along a side, and
    # resizing would leave little of them.
    config.data.views.update(
        anchor_cells=6,
        tile_cells=2,
        global_box_cells=(4, 4),
        global_cells=4,
        num_local=2,
        local_box_cells=(2, 2),
        local_cells=2,
    )
    config.data.scenes.update(num_scenes=512, extent_cells=16)
    config.model.update(compute_dtype="float32")  # bf16 is emulated on a CPU
    config.model.backbone.update(width=32, depths=(1, 1, 2, 1), drop_path=0.0, layer_scale_init=0.1)
    config.model.fusion.update(width=128, depth=2, head_width=32, drop_path=0.0)
    config.model.queries.update(num_queries=16)
    config.model.heads.update(hidden_dim=128, bottleneck_dim=64, num_prototypes=64)
    config.objective.mgcl.update(num_clusters=4)  # of 16 cells: with 16 clusters an object would be a pixel again
    # A run of minutes. Measured: at 0.03 and more the targets of so young a teacher are nearly uniform; at a momentum
    # of 0.99 a third of the teacher is still its first values after 200 steps.
    config.objective.weights.text_alignment = 3.0  # in a run of minutes it learns fastest
    config.objective.update(
        teacher_temperature_start=0.01,
        teacher_temperature=0.01,
        teacher_temperature_warmup_steps=0,
        prototype_freeze_steps=10,
    )
    config.optim.update(num_steps=300, learning_rate=4e-4, warmup_steps=30, ema_momentum=0.97)
    config.eval.probe_untrained = True
    return on(config, target)
