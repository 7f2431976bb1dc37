"""A run to export from: the micro network's state, never trained, saved over two devices."""

import json
import pathlib

import jax
import numpy as np
from micro import micro_config

from skysense_jax import assembly, sharding
from skysense_jax import config as config_lib
from skysense_jax.checkpoint import Checkpoints
from skysense_jax.data.pipeline import FIRST_STATE
from skysense_jax.train_state import abstract_state, boxed_state

STEPS = (3, 10)


def export_config():
    """The micro network with all modalities: a Swin block, a dense and a mixture block, fusion."""
    config = micro_config()
    config.data.update(modalities=("hr", "s2", "s1"), num_dates=dict(hr=1, s2=2, s1=2))
    return config


def draw(shapes, seed: int):
    """A tree of random arrays where these shapes, with shardings, want them."""
    rng = np.random.default_rng(seed)

    def one(leaf):
        array = rng.integers(0, 9, leaf.shape) if leaf.dtype == "int32" else 0.1 * rng.standard_normal(leaf.shape)
        return jax.device_put(array.astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(one, shapes)


def save_run(workdir: pathlib.Path, config=None) -> None:
    """Checkpoints of two steps whose students and teachers are four different draws, metrics and a probe."""
    config = config or export_config()
    run = assembly.assemble(config)
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=1, expert=1, devices=jax.devices()[:2])
    shapes = abstract_state(
        boxed_state(run.network, run.optimizer, assembly.batch_shapes(config, run.modalities)), mesh
    )
    with jax.set_mesh(mesh):
        checkpoints = Checkpoints(workdir, every_steps=1, keep_last=3, keep_every_steps=100)
        for step in STEPS:
            meta = {"config": config_lib.flat_text(config)}
            checkpoints.save(step, draw(shapes, seed=step), data_state=FIRST_STATE, meta=meta)
        checkpoints.close()
    lines = [{"step": step, "loss": 10.0 - step, "loss/mgcl": 2.5, "learning_rate": 0.1} for step in (1, 3, 9)]
    lines[-1] |= {"loss/koleo": None, "nonfinite": {"loss/koleo": "nan"}}
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (workdir / "metrics.jsonl").write_text(text + '{"step": 9, "lo')  # cut off while being written
    scores = {"step": STEPS[-1], "teacher": {"osm/miou": 0.25, "forest_type/miou": None}}
    (workdir / "probe.json").write_text(json.dumps(scores))
