"""Texts that a person reads as a diff: the flat config of every named config, and parameter tables.

``pytest tests/test_golden.py --refresh-golden`` rewrites them; the diff is then part of the change.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.sharding import AbstractMesh, PartitionSpec

from skysense_jax import assembly, dry_run, modalities, optim, train_state
from skysense_jax import config as config_lib
from skysense_jax.models import skysense
from skysense_jax.models.layers import constant, partitioned
from skysense_jax.parameters import parameter_table, parameters_per_part, placement_table
from skysense_jax.sharding import EMBED, LAYERS, MESH_AXES, MLP, UNSHARDED, make_mesh, tree_shardings, unbox
from skysense_jax.trees import named_leaves

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("[!_]*.py"))


@pytest.mark.parametrize("name", CONFIGS)
def test_flat_config_is_as_last_read(name, matches_golden):
    matches_golden(f"config_{name}", config_lib.flat_text(config_lib.load(ROOT / "configs" / f"{name}.py")))


def test_golden_configs_have_a_config():
    assert sorted(path.stem for path in GOLDEN.glob("config_*.txt")) == [f"config_{name}" for name in CONFIGS]


@pytest.mark.parametrize("name", ["tiny", "huge_moe"])
def test_parameter_table_is_as_last_read_and_every_array_has_a_place(name, matches_golden):
    config = config_lib.load(ROOT / "configs" / f"{name}.py")
    rows = modalities.select(config.data.modalities)
    model = skysense.build(rows, **config.model, **assembly.efficiency(config))
    batch = dry_run.batch_shapes(rows, batch_size=1, num_dates=config.data.num_dates, views=config.data.views)
    optimizer = optim.make_optimizer(
        learning_rate=lambda step: 1.0,
        weight_decay=config.optim.weight_decay,
        beta1=config.optim.beta1,
        beta2=config.optim.beta2,
        clip_norm=config.optim.clip_norm,
        prototype_freeze_steps=config.objective.prototype_freeze_steps,
    )
    boxed = train_state.boxed_state(model, optimizer, batch)
    table = parameter_table(boxed.student)
    matches_golden(f"parameters_{name}", table)
    assert "?" not in table, "a parameter without logical axes would be on every device"
    # Every array of the state, moments included, can be spread over a mesh of all four axes.
    placed = train_state.abstract_state(boxed, make_mesh(data=1, fsdp=2, tensor=2, expert=2))
    kernel = placed.teacher["backbone"]["stage4" if name == "tiny" else "stage4_experts"]["attention"]["query"][
        "kernel"
    ]
    assert kernel.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    adam = next(part for part in placed.optimizer if hasattr(part, "mu"))
    for beside in (placed.teacher, adam.mu, adam.nu):
        assert jax.tree.map(lambda leaf: leaf.sharding, beside) == jax.tree.map(
            lambda leaf: leaf.sharding, placed.student
        )


@functools.cache
def _boxed_student(name):
    """Boxed shapes of a named config's student."""
    config = config_lib.load(ROOT / "configs" / f"{name}.py")
    run = assembly.assemble(config)
    return train_state.boxed_state(run.network, run.optimizer, assembly.batch_shapes(config, run.modalities)).student


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("base", (1, 8, 1, 1)),
        ("huge", (8, 8, 1, 1)),  # on 64 v5p
        ("huge", (1, 64, 4, 1)),
        ("huge_moe", (1, 2, 2, 2)),
        ("huge_moe", (1, 8, 1, 8)),  # on 64 v5p
        ("huge_moe", (4, 16, 1, 4)),
        ("huge_moe", (8, 1, 1, 8)),  # on 64 H200: experts are divided, and what all share is whole on each
    ],
)
def test_placement_of_parameters_is_as_last_read_and_no_large_one_is_whole(name, sizes, matches_golden):
    mesh, boxed = AbstractMesh(sizes, MESH_AXES), _boxed_student(name)
    matches_golden(f"placement_{name}_{'x'.join(map(str, sizes))}", placement_table(boxed, mesh))
    placed = named_leaves(tree_shardings(boxed, mesh))
    for path, leaf in named_leaves(unbox(boxed)).items():
        whole = placed[path].shard_shape(leaf.shape) == leaf.shape
        if mesh.shape["fsdp"] == 1:
            whole &= "/experts/" in path and "router" not in path
        assert not (whole and leaf.size * leaf.dtype.itemsize > 2**20), f"{path} is whole on every device"


# ---- the parameter table, on a module whose every line is known


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        kernel = self.param("kernel", partitioned(constant(0.5), EMBED, MLP), (3, 1024), jnp.float32)
        self.param("bias", partitioned(nn.initializers.zeros, UNSHARDED), (1024,), jnp.bfloat16)
        return x + (x @ kernel).sum(-1, keepdims=True), None


class Small(nn.Module):
    @nn.compact
    def __call__(self, x):
        blocks = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
            metadata_params={nn.PARTITION_NAME: LAYERS},
        )
        x, _ = blocks(name="blocks")(x, None)
        self.param("class_token", nn.initializers.zeros, (3,))
        return x


def small_shapes():
    return jax.eval_shape(lambda: Small().init(jax.random.key(0), jnp.ones((2, 3)))["params"])


def test_parameter_table_shows_path_shape_dtype_axes_and_decay():
    assert parameter_table(small_shapes()).splitlines() == [
        "blocks/bias    (2, 1024)     bfloat16  zeros         layers unsharded  -",
        "blocks/kernel  (2, 3, 1024)  float32   constant_0.5  layers embed mlp  decay",
        "class_token    (3)           float32   ?             ?                 -",
        "8,195 parameters in 3 arrays",
    ]


def test_parameters_per_part_sum_to_the_whole():
    assert parameters_per_part(unbox(small_shapes())) == {"blocks": 2 * 1024 + 2 * 3 * 1024, "class_token": 3}


def test_parameter_table_unknown_name_is_an_error():
    with pytest.raises(ValueError, match="'surprise'"):
        parameter_table({"surprise": jax.ShapeDtypeStruct((2,), jnp.float32)})
