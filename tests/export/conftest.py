"""A run to export from, and an exported directory of random weights: hr, s2 and s1, with fusion, as small as tiny."""

import pathlib

import pytest
import torch
from saved import save_run

from configs import tiny
from skysense_jax.export import write
from skysense_jax.export.modeling_skysensev2 import SkySenseV2
from skysense_jax.modalities import select


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> pathlib.Path:
    """A directory as ``python -m skysense_jax.export`` writes it; the weights are those of seed 0."""
    model = tiny.get_config().model.to_dict()
    training = dict(step=7, weights="teacher", config={"name": "random"})
    config = write.describe(
        select(("hr", "s2", "s1")), backbone=model["backbone"], fusion=model["fusion"], training=training
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        state = SkySenseV2(config).state_dict()
    out = tmp_path_factory.mktemp("model") / "export"
    write.write_directory(out, state={name: x.numpy().copy() for name, x in state.items()}, config=config, card="")
    return out


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory) -> pathlib.Path:
    """The run of export/saved.py."""
    workdir = tmp_path_factory.mktemp("run")
    save_run(workdir)
    return workdir
