"""What probes and the checkpoints that are kept for them owe each other, in a config.

A part of the room ``config.py``; config_checks.py asks it.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from skysense_jax.data import scenes
from skysense_jax.modalities import OSM

_SHORTEST_HOURS = 0.01  # between checkpoints that are kept for their time, which is known in seconds


def eval_problems(config: ConfigDict) -> Iterator[str]:
    """What is wrong, a line each."""
    probed = config.eval.probe_every_steps
    if config.run.keep_best and not probed:
        yield "config.run.keep_best: got True with config.eval.probe_every_steps 0; wanted probes, which tell the best"
    saved = config.run.checkpoint_every_steps
    first = -(-probed // saved) * saved  # step of the first probe, at a checkpoint
    if config.run.keep_best and probed and first > config.optim.num_steps:
        yield (
            f"config.eval.probe_every_steps: got {probed}, so that the first probe comes behind step {first} of "
            f"{config.optim.num_steps}; wanted fewer with config.run.keep_best"
        )
    names = [name for name, *_ in config.eval.datasets]
    taken = [OSM.name, *scenes.ATTRIBUTES, *names]
    if again := [name for name in names if taken.count(name) > 1]:
        yield f"config.eval.datasets: got {config.eval.datasets!r}: the name {again[0]!r} is taken; wanted another"
    seen = config.eval.num_test_scenes and set(config.data.modalities) & set(scenes.MODALITIES)
    if config.run.keep_best and not (names or seen):
        yield (
            f"config.run.keep_best: got True; wanted something to probe on: config.eval.datasets, or num_test_scenes "
            f"above 0 and one of {scenes.MODALITIES} in config.data.modalities"
        )
    if 0 < config.run.keep_every_hours < _SHORTEST_HOURS:
        yield (
            f"config.run.keep_every_hours: got {config.run.keep_every_hours}; wanted 0, or at least {_SHORTEST_HOURS}"
        )
    if config.eval.num_test_scenes and not config.eval.num_train_scenes:
        yield (
            f"config.eval.num_train_scenes: got 0; wanted at least 1 with num_test_scenes "
            f"{config.eval.num_test_scenes}, or both 0 for no probe"
        )
