"""From host elements to batches on the devices, some of them ahead of the step. Between pipeline.py and train.py."""

import collections
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from skysense_jax import sharding
from skysense_jax.batch import Batch
from skysense_jax.data.pipeline import PipelineIterator


def to_device(element: dict[str, Any], mesh: Mesh) -> Batch:
    """The batch, samples over the mesh's batch axes; ``element`` holds those of ``sharding.batch_places``, in order."""
    placed = sharding.batch_sharding(mesh)
    parts = math.prod(mesh.shape[axis] for axis in placed.spec[0])
    mine = sharding.batch_places(mesh, parts)

    def place(x):
        x = np.asarray(x)
        rows = len(x) // len(mine)  # of a part

        def of_part(index):
            first = mine.index((index[0].start or 0) // rows) * rows
            return x[first : first + rows]

        return jax.make_array_from_callback((rows * parts, *x.shape[1:]), placed, of_part)

    return jax.tree.map(place, Batch.from_dict(element))


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
