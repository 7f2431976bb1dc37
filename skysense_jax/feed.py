"""From host elements to batches on the devices, some of them ahead of the step. Between pipeline.py and train.py."""

import collections
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from skysense_jax import sharding
from skysense_jax.batch import Batch
from skysense_jax.data.pipeline import PipelineIterator


def to_device(element: dict[str, Any], mesh: Mesh) -> Batch:
    """The batch, samples over the mesh's batch axes; ``element`` holds this process' share."""
    placed = sharding.batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(placed, np.asarray(x)), Batch.from_dict(element)
    )


def prefetch(
    source: PipelineIterator, mesh: Mesh, num_batches: int
) -> Iterator[tuple[Batch, dict[str, Any], dict[str, Any]]]:
    """Batches on the device, ``num_batches`` ahead, each with its host element and the input state after it."""
    ahead = collections.deque()
    while True:
        while len(ahead) <= num_batches:
            element = next(source)
            ahead.append((to_device(element, mesh), element, source.get_state()))
        yield ahead.popleft()
