"""Digests against loops over bits; on any mesh the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from states import make_state, put

from skysense_jax.digests import leaf_digest, tree_digests


def digest_by_loops(x: np.ndarray) -> int:
    """Element by element, with Python's integers."""

    def mix(v):
        v = (v ^ (v >> 16)) * 0x85EBCA6B % 2**32
        v = (v ^ (v >> 13)) * 0xC2B2AE35 % 2**32
        return v ^ (v >> 16)

    words = x.reshape(-1).view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize])
    return sum(mix(int(word) ^ mix(i + 1)) for i, word in enumerate(words)) % 2**32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_leaf_digest_equals_loops(dtype):
    x = (10 * np.random.default_rng(0).standard_normal((3, 5, 2))).astype(jnp.dtype(dtype))
    assert int(leaf_digest(jnp.asarray(x))) == digest_by_loops(x)


def test_leaf_digest_sees_one_bit_a_swap_and_a_sign_of_zero():
    x = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32)
    x[2, 1] = 0.0
    digest = jax.jit(leaf_digest)
    seen = {int(digest(x))}
    for position in range(3):
        for bit in (0, 13, 31):
            flipped = x.view(np.uint32).copy()
            flipped[position, position] ^= np.uint32(1 << bit)
            seen.add(int(digest(flipped.view(np.float32))))
    swapped, signed = x.copy(), x.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    signed[2, 1] = -0.0
    seen |= {int(digest(swapped)), int(digest(signed))}
    assert len(seen) == 1 + 9 + 2


def test_tree_digests_do_not_depend_on_the_mesh():
    state = make_state(3)
    digests = [tree_digests(put(state, shape)) for shape in ((1, 1), (2, 4), (4, 2))]
    assert digests[0] == digests[1] == digests[2]
    assert "optimizer/0/moment" in digests[0]


def test_leaf_digest_unknown_width_is_refused():
    with pytest.raises(ValueError, match="dtype complex64 has no digest"):
        leaf_digest(jnp.zeros(3, jnp.complex64))
