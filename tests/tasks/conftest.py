"""A run of the micro network, never trained, and the same as an exported directory."""

import dataclasses
import functools
import pathlib

import jax
import numpy as np
import pytest
from micro import task_config

from skysense_jax import assembly, sharding
from skysense_jax import config as config_lib
from skysense_jax.checkpoint import Checkpoints
from skysense_jax.data.pipeline import FIRST_STATE
from skysense_jax.export.__main__ import export
from skysense_jax.modalities import OSM, select
from skysense_jax.models import skysense
from skysense_jax.tasks import evaluate, loading
from skysense_jax.train_state import abstract_state, boxed_state


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory) -> pathlib.Path:
    """The checkpoint of step 4: random weights."""
    workdir, config = tmp_path_factory.mktemp("run") / "task", task_config()
    run = assembly.assemble(config)
    mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, expert=1, devices=jax.devices()[:1])
    shapes = boxed_state(run.network, run.optimizer, assembly.batch_shapes(config, run.modalities))
    rng = np.random.default_rng(0)

    def draw(leaf):
        array = np.ones(leaf.shape) if leaf.dtype == "int32" else 0.1 * rng.standard_normal(leaf.shape)
        return jax.device_put(array.astype(leaf.dtype), leaf.sharding)

    with jax.set_mesh(mesh):
        state = jax.tree.map(draw, abstract_state(shapes, mesh))
        checkpoints = Checkpoints(workdir, every_steps=1, keep_last=3, keep_every_steps=100)
        meta = {"config": config_lib.flat_text(config)}
        checkpoints.save(4, state, data_state=FIRST_STATE, meta=meta)
        checkpoints.close()
    return workdir


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, run_dir) -> pathlib.Path:
    """``run_dir`` as ``python -m skysense_jax.export`` writes it."""
    out = tmp_path_factory.mktemp("model") / "export"
    export(run_dir, out, step=None, weights="teacher", part="all", licence="", arguments=[])
    return out


@pytest.fixture(scope="session")
def _loaded_once():
    return functools.cache(loading.load)


@pytest.fixture
def loaded_once(monkeypatch, _loaded_once):
    """A model is loaded once for all tests that ask for this."""
    monkeypatch.setattr(evaluate, "load", _loaded_once)


@pytest.fixture
def without_weights(monkeypatch):
    """In place of a loaded model one without weights."""
    config = task_config()
    rows = select(config.data.modalities)
    model = loading.Model(skysense.build(rows, **config.model), {}, rows, OSM, 4, config.data.num_dates, config, "none")
    asked = lambda model_dir, modalities, step: dataclasses.replace(model, rows=loading._asked(rows, modalities))  # noqa: E731
    monkeypatch.setattr(evaluate, "load", asked)
