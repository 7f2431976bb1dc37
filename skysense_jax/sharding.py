"""Names of logical axes, what mesh axes they lie on, and the mesh itself.

Models annotate parameters and activations with the constants below; a name that is not among them is an error
(flax would replicate it without a word). Call ``jax.set_mesh(mesh)`` around everything that is traced: under
``with mesh:`` flax's logical constraints do nothing.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import spmd
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor", "expert")

# Activations
BATCH = "batch"  # samples, and whatever is flattened from samples outermost
ACTIVATION = "activation"  # every other axis of an activation
GROUPS = "groups"  # routing groups (samples) while their tokens lie with the experts
# Parameters
EMBED = "embed"  # width of the residual stream
HEADS = "heads"  # heads x head width, merged
MLP = "mlp"  # hidden width of an MLP
EXPERT = "expert"  # experts
PROTOTYPES = "prototypes"  # rows of a prototype matrix
LAYERS = "layers"  # axis that a scan over blocks adds
UNSHARDED = "unsharded"  # small or odd axes: bands, prompts, queries, positions

LOGICAL_AXIS_RULES: tuple[tuple[str, Any], ...] = (
    (BATCH, ("data", "fsdp", "expert")),
    (ACTIVATION, None),
    (GROUPS, ("data", "fsdp")),
    (EMBED, "fsdp"),
    (HEADS, "tensor"),
    (MLP, "tensor"),
    (EXPERT, "expert"),
    (PROTOTYPES, "fsdp"),
    (LAYERS, None),
    (UNSHARDED, None),
)


def make_mesh(data: int, fsdp: int, tensor: int, expert: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of ``MESH_AXES`` over the devices (all by default), in that order; one size may be -1: what is left.

    Neighbours along the last axes are near each other: on one host, or on a TPU linked. Several TPU slices, which only
    the network joins, divide ``data``.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or slices do not divide ``data``.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dict(zip(MESH_AXES, (data, fsdp, tensor, expert), strict=True))
    free = [axis for axis, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"config.mesh: got {sizes}; wanted sizes of 1 or more, at most one of them -1")
    if free and len(devices) % known == 0:
        sizes[free[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"config.mesh: {sizes} asks for {known} devices{' or a multiple' if free else ''}; there are {len(devices)}"
        )
    shape = tuple(sizes.values())
    if devices[0].platform != "tpu":
        return Mesh(np.asarray(devices).reshape(shape), MESH_AXES)
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes["data"] % num_slices:
        raise ValueError(f"config.mesh.data: got {sizes['data']}; wanted a multiple of the {num_slices} slices")
    if num_slices == 1:
        return Mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), MESH_AXES)
    within, between = (shape[0] // num_slices, *shape[1:]), (num_slices, 1, 1, 1)
    linked = mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
    return Mesh(linked, MESH_AXES)


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """``x``, placed by the logical names of its axes; an unknown name is an error, outside a mesh nothing happens."""
    names = tuple(None if axis == ACTIVATION else axis for axis in axes)  # flax refuses a name that stands twice
    return nn.with_logical_constraint(x, names, rules=LOGICAL_AXIS_RULES, fallback=spmd.RulesFallback.RAISE_ERROR)


def constrain_batch(x: jax.Array) -> jax.Array:
    """``x`` with its first axis over the batch axes of the mesh and the others whole."""
    return constrain(x, BATCH, *(ACTIVATION,) * (x.ndim - 1))


def gathered(weight: jax.Array | np.ndarray, *axes: str) -> jax.Array:
    """``weight``, of these logical axes, whole along ``EMBED``: what a matrix product of sharded samples needs.

    Called on what was cast to the compute dtype: left to itself the compiler gathers the fp32 master, twice the bytes.
    Its gradient is divided as the weight was: left to itself a TPU's compiler adds up whole gradients on every device,
    twice the bytes again, and nothing computes meanwhile.
    """
    whole = tuple(ACTIVATION if axis in (EMBED, UNSHARDED) else axis for axis in axes)
    mesh, weight = jax.sharding.get_abstract_mesh(), jnp.asarray(weight)
    placed = _placed_axes(nn.Partitioned(weight, axes), mesh) if mesh.shape else [(None, True)] * len(axes)
    divided = tuple(axis if place else ACTIVATION for axis, (place, _) in zip(axes, placed, strict=True))

    @jax.custom_vjp
    def gather(weight):
        return constrain(weight, *whole)

    gather.defvjp(lambda weight: (gather(weight), None), lambda _, gradient: (constrain(gradient, *divided),))
    return gather(weight)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where an array with samples outermost lives."""
    return NamedSharding(mesh, PartitionSpec(dict(LOGICAL_AXIS_RULES)[BATCH]))


def batch_places(mesh: Mesh, batch_size: int) -> tuple[int, ...]:
    """Which samples of a batch this process' devices hold, ascending: those that it must read.

    Processes that differ along ``tensor`` alone hold the same ones; a TPU's mesh need not deal them in the order of
    processes.
    """
    held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return tuple(sorted({place for (rows,) in held.values() for place in range(*rows.indices(batch_size))}))


def unbox(tree: Any) -> Any:
    """The tree without flax's partitioning boxes; works on shapes, and outside a mesh."""
    return jax.tree.map(
        lambda leaf: leaf.unbox(apply_constraint=False) if _is_box(leaf) else leaf, tree, is_leaf=_is_box
    )


def tree_shardings(boxed: Any, mesh: Mesh | AbstractMesh) -> Any:
    """For a tree of boxed shapes: where each leaf lives. An axis that its mesh axes do not divide is kept whole.

    Raises:
      ValueError: a logical name without a rule.
    """
    place = lambda leaf: NamedSharding(mesh, PartitionSpec(*(axes for axes, _ in _placed_axes(leaf, mesh))))  # noqa: E731
    return jax.tree.map(place, boxed, is_leaf=_is_box)


def abstract(boxed: Any, mesh: Mesh | AbstractMesh) -> Any:
    """A tree of boxed shapes as shapes with their places on the mesh: what a checkpoint is restored into."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        unbox(boxed),
        tree_shardings(boxed, mesh),
    )


def undivided(boxed: Any, mesh: Mesh | AbstractMesh) -> list[str]:
    """Paths of the leaves of which an axis is whole on every device, because its mesh axes do not divide it."""
    leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=_is_box)
    return [
        jax.tree_util.keystr(path) for path, leaf in leaves if not all(fits for _, fits in _placed_axes(leaf, mesh))
    ]


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.meta.AxisMetadata)


def _placed_axes(leaf: Any, mesh: Mesh | AbstractMesh) -> list[tuple[Any, bool]]:
    """For each axis: the mesh axes it lies over (None: whole), and whether those of its rule divide it."""
    rules = {**dict(LOGICAL_AXIS_RULES), None: None}
    names = leaf.names if isinstance(leaf, nn.Partitioned) else ()
    shape = leaf.value.shape if isinstance(leaf, nn.Partitioned) else leaf.shape
    placed = []
    for size, name in zip(shape, names, strict=False):
        if name not in rules:
            raise ValueError(f"logical axis {name!r} has no rule; known: {sorted(dict(LOGICAL_AXIS_RULES))}")
        mesh_axes = rules[name]
        fits = size % math.prod(mesh.shape[a] for a in np.atleast_1d(mesh_axes)) == 0 if mesh_axes else True
        placed.append((mesh_axes if fits else None, fits))
    return placed
