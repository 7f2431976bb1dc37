"""What the grid of a Pallas kernel moves, by walking it."""

import jax
import numpy as np


def moved(mapping) -> int:
    """Bytes of the blocks of a traced call's ``grid_mapping``, each moved when it is not where it was before.

    The last axis is padded to 128 lanes, others to what a register holds; what overhangs an array is not moved.
    """
    total = 0
    for block in mapping.block_mappings:
        aval = block.array_aval
        shape = [int(getattr(size, "block_size", size)) for size in block.block_shape]
        shape = [min(size, whole) for size, whole in zip(shape, aval.shape, strict=True)]
        shape[-1] = -(-shape[-1] // 128) * 128
        if shape[-2] > 1:
            shape[-2] = -(-shape[-2] // 8) * 8
        before, visits = None, 0
        for place in np.ndindex(*mapping.grid):
            index = jax.core.eval_jaxpr(block.index_map_jaxpr.jaxpr, block.index_map_jaxpr.consts, *place)
            visits += (at := tuple(map(int, index))) != before
            before = at
        total += visits * int(np.prod(shape)) * aval.dtype.itemsize
    return total
