"""The smallest configs that have every part, their step on a mesh, and a stop: for tests that run the whole step."""

import functools

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from configs import tiny
from skysense_jax import assembly, feed, sharding, train_state
from skysense_jax.launch.stop import Stop


def micro_config() -> ConfigDict:
    """Four blocks of width 32 and up, the last a mixture of two experts, drop path and KoLeo; 4-cell global and 2-cell
    local views, two of the modalities, batch 8."""
    config = tiny.get_config()
    config.name = "micro"
    config.run.update(
        log_every_steps=1, checkpoint_every_steps=5, input_threads=1, tensorboard=False, max_bad_record_share=1.0
    )
    config.data.update(modalities=("hr", "s1"), batch_size=8, num_dates=dict(hr=1, s1=2))
    config.data.views.update(
        anchor_cells=8,
        global_box_cells=(5, 7),
        global_cells=4,
        num_local=1,
        local_box_cells=(2, 3),
        local_cells=2,
    )
    config.data.scenes.update(num_scenes=40, extent_cells=8)
    config.model.backbone.update(depths=(1, 1, 1, 1), num_prompts=2, drop_path=0.2, num_moe_blocks=1, num_experts=2)
    config.model.fusion.update(width=32, depth=2, drop_path=0.2)
    config.model.queries.update(num_queries=3)
    config.model.heads.update(hidden_dim=16, bottleneck_dim=8, num_prototypes=24)
    config.objective.weights.koleo = 0.1
    config.objective.mgcl.update(num_positions=5, num_clusters=3, cluster_iterations=2)
    config.objective.prototype_freeze_steps = 2
    config.optim.update(num_steps=10, warmup_steps=2)
    config.eval.update(num_train_scenes=0, num_test_scenes=0)
    return config


def mono_config() -> ConfigDict:
    """``micro`` with one modality: its step compiles in a third of the time."""
    config = micro_config()
    config.name = "mono"
    config.data.update(modalities=("s1",), num_dates=dict(s1=2))
    return config


def distil_config(teacher) -> ConfigDict:
    """``mono``, dense and without drop path, that learns from the run in ``teacher`` and from nothing else."""
    config = mono_config()
    config.name = "mono_distil"
    config.model.backbone.update(num_moe_blocks=0, drop_path=0.0)
    config.model.fusion.update(depth=1, drop_path=0.0)
    config.objective.weights.update(mgcl=0.0, qsacl=0.0, text_alignment=0.0, koleo=0.0, distil=1.0)
    config.objective.distil.teacher = str(teacher)
    return config


def task_config() -> ConfigDict:
    """``micro``, dense and of three modalities."""
    config = micro_config()
    config.name = "task"
    config.model.fusion.depth = 1
    config.model.backbone.num_moe_blocks = 0
    config.data.update(modalities=("hr", "s2", "s1"), num_dates=dict(hr=1, s2=2, s1=2))
    return config


def mesh_config() -> ConfigDict:
    """``mono`` with four experts, at temperatures at which a loss does not make twenty times of rounding."""
    config = mono_config()
    config.name = "mesh"
    config.model.backbone.num_experts = 4
    config.model.fusion.depth = 1
    config.objective.weights.koleo = 0.0
    config.objective.update(student_temperature=0.5, teacher_temperature=0.5, teacher_temperature_start=0.5)
    return config


_ASSEMBLED = {}


def assembled_once(config, platform=None):
    """``assembly.assemble``, the same parts for the same config: JAX then traces and compiles a step once a process."""
    same = config.copy_and_resolve_references()
    for section in ("run", "eval"):
        del same[section]
    key = str(same), platform
    if key not in _ASSEMBLED:
        _ASSEMBLED[key] = assembly.assemble(config, platform)
    return _ASSEMBLED[key]


_CREATED = {}


def created_once(network, optimizer, batch, *, seed, mesh):
    """``train_state.create_state``, traced and compiled once for the parts that ``assembled_once`` gives."""
    key = id(network), id(optimizer), seed, tuple(mesh.shape.items())
    if key not in _CREATED:
        _CREATED[key] = train_state.create_state(network, optimizer, batch, seed=seed, mesh=mesh)
    return jax.tree.map(jnp.copy, _CREATED[key])


class Compiled:
    """The step of a config on a mesh, jitted without donation so that a state may be used twice."""

    def __init__(self, config, devices, **kernels):
        self.config, self.run = config, assembly.assemble(config, **kernels)
        self.mesh = sharding.make_mesh(**config.mesh, devices=devices)
        self.shapes = assembly.batch_shapes(config, self.run.modalities)
        with jax.set_mesh(self.mesh):
            boxed = train_state.boxed_state(self.run.network, self.run.optimizer, self.shapes)
            self.step = jax.jit(self.run.step, out_shardings=(train_state.state_shardings(boxed, self.mesh), None))
            self.frozen = None if self.run.frozen is None else self.run.frozen.restore(self.mesh).params

    @functools.cached_property
    def fresh(self):
        """The state of step 0; tracing it takes longer than a step."""
        seed = self.config.optim.seed
        with jax.set_mesh(self.mesh):
            return train_state.create_state(
                self.run.network, self.run.optimizer, self.shapes, seed=seed, mesh=self.mesh
            )

    def __call__(self, state, element):
        with jax.set_mesh(self.mesh):
            return jax.device_get(self.step(state, feed.to_device(element, self.mesh), self.run.seed, self.frozen))

    def lowered_text(self, element):
        with jax.set_mesh(self.mesh):
            return self.step.lower(self.fresh, feed.to_device(element, self.mesh), self.run.seed).as_text()


class StopBehind(Stop):
    """Tells a run to stop behind a step."""

    def __init__(self, step: int):
        super().__init__()
        self._step = step

    def reached(self, step):
        return step >= self._step
