"""Where a kernel runs: on each device's own samples."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec


def by_samples(
    fn: Callable[..., jax.Array],
    of_samples: tuple[jax.Array, ...],
    whole: tuple[Any, ...],
    *,
    batch_axes: tuple[str, ...],
) -> jax.Array:
    """``fn(*of_samples, *whole)``, which has samples outermost as ``of_samples`` have.

    On a mesh (``jax.set_mesh``) samples lie over its ``batch_axes``, each device works on its own, and gradients of
    what is ``whole`` are added up. Where the number of samples is no multiple of theirs, every device works on all.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.shape.values()) == 1:
        return fn(*of_samples, *whole)
    divided = of_samples[0].shape[0] % math.prod(mesh.shape[axis] for axis in batch_axes) == 0
    samples = PartitionSpec(batch_axes if divided else None)
    specs = (*(samples for _ in of_samples), *(PartitionSpec() for _ in whole))
    return jax.shard_map(fn, in_specs=specs, out_specs=samples, check_vma=False)(*of_samples, *whole)
