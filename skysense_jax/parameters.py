"""A table of what a network's parameters are, for golden files and people who read a diff; sums for the dry run."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh

from skysense_jax.optim import decays
from skysense_jax.sharding import UNSHARDED, tree_shardings, unbox
from skysense_jax.trees import named_leaves


def parameter_table(boxed_shapes: Any) -> str:
    """A line per parameter, sorted by path: path, shape, dtype, initialiser, logical axes, "decay" or "-"; then
    the total.

    ``boxed_shapes`` are parameters as ``jax.eval_shape`` of an init gives them. What a parameter
    does not carry shows as "?".

    Raises:
      ValueError: a parameter whose name does not say whether it decays.
    """
    rows, total = [], 0
    for path, leaf in sorted(named_leaves(boxed_shapes).items()):
        value = leaf.value if isinstance(leaf, nn.Partitioned) else leaf
        axes = " ".join(name or UNSHARDED for name in leaf.names) if isinstance(leaf, nn.Partitioned) else "?"
        shape = f"({', '.join(map(str, value.shape))})"
        rows.append((path, shape, str(value.dtype), getattr(leaf, "init", "?"), axes, _decay_word(path)))
        total += math.prod(value.shape)
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ["  ".join((*(cell.ljust(width) for cell, width in zip(row, widths)), row[5])) for row in rows]
    return "\n".join([*lines, f"{total:,} parameters in {len(rows)} arrays"]) + "\n"


def placement_table(boxed_shapes: Any, mesh: Mesh | AbstractMesh) -> str:
    """A line per array, sorted by path: path, shape, mesh axes per axis, bytes on each device; then the total of those.

    ``mesh`` may be abstract: no device is needed.
    """
    placed = named_leaves(tree_shardings(boxed_shapes, mesh))
    rows, total = [], 0
    for path, leaf in sorted(named_leaves(unbox(boxed_shapes)).items()):
        share = math.prod(placed[path].shard_shape(leaf.shape)) * leaf.dtype.itemsize
        shape = f"({', '.join(map(str, leaf.shape))})"
        axes = " ".join("+".join(np.atleast_1d(axis)) if axis else "-" for axis in placed[path].spec)
        rows.append((path, shape, axes or "-", f"{share:,}"))
        total += share
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join((*(cell.ljust(width) for cell, width in zip(row, widths)), row[3])) for row in rows]
    return "\n".join([*lines, f"{total:,} bytes on each of {mesh.size} devices"]) + "\n"


def _decay_word(path: str) -> str:
    return "decay" if decays(path) else "-"


def parameters_per_part(shapes: Mapping[str, Any]) -> dict[str, int]:
    """Number of parameters under each key of the tree's first level."""
    return {name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(part)) for name, part in shapes.items()}
