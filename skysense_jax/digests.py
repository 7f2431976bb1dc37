"""Digests of arrays, worked out on the devices that hold them: equal on any mesh, another after any changed element.

Why: Orbax restores a flipped byte without a word (30 of 30 trials). Next: checkpoint.py, which keeps them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped, UInt32

from skysense_jax.trees import named_leaves

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A one-to-one scramble in which every input bit moves about half of the output bits (MurmurHash3's last step)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def leaf_digest(x: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    """A number that any single changed element changes, whatever mesh the array is spread over.

    A sum over elements of a scramble of (bits, position): a sum does not care in which order devices add it.
    """
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    if x.dtype.itemsize not in _UNSIGNED:
        raise ValueError(f"an array of dtype {x.dtype} has no digest; wanted elements of 1, 2 or 4 bytes")
    bits = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
    position, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        position += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * np.uint32(stride % 2**32)
        stride *= x.shape[axis]
    return jnp.sum(_mix(bits ^ _mix(position + np.uint32(1))), dtype=jnp.uint32)


@functools.lru_cache
def _digest_on(mesh: Mesh | None) -> Callable[[jax.Array], jax.Array]:
    # The answer must be on every device: a process can read only what its own devices hold.
    where = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return jax.jit(leaf_digest, out_shardings=where)


def tree_digests(tree: Any) -> dict[str, int]:
    """Path to digest, for every leaf. Compiled once per shape, and shared by student, teacher and moments."""
    digests = {}
    for path, leaf in named_leaves(tree).items():
        leaf = jnp.asarray(leaf)
        digest = _digest_on(leaf.sharding.mesh if isinstance(leaf.sharding, NamedSharding) else None)(leaf)
        if jax.default_backend() == "cpu":
            jax.block_until_ready(digest)  # its devices share threads: hundreds of exchanges at once wait for ever
        digests[path] = digest
    return {path: int(digest) for path, digest in jax.device_get(digests).items()}
