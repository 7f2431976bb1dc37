"""Multi-head attention over tokens whose heads stay merged in the last axis, and its rotary position embedding.

Heads are 32 wide [published]; split as the last axis they would be padded to 128 lanes on a TPU wherever they are
stored, so the split happens inside ``attend`` and kernels only. Scores and softmax are fp32.
Next: swin.py (window attention on top of ``attend``), vit.py, kernels/full.py.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from einops import rearrange
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float

from skysense_jax.kernels import full as full_kernel
from skysense_jax.models.layers import Dense, product
from skysense_jax.sharding import BATCH, EMBED, HEADS, LOGICAL_AXIS_RULES

SHORTEST_WAVELENGTH_CELLS, LONGEST_WAVELENGTH_CELLS = 1.0, 128.0


@struct.dataclass
class Rotation:
    """Rotary angles of each token: cosine and sine per pair of a head's channels; the same for all heads."""

    cos: Any  # N K/2, fp32
    sin: Any  # N K/2, fp32


def attend(
    query: Float[Array, "*rows N D"],
    key: Float[Array, "*rows M D"],
    value: Float[Array, "*rows M D"],
    *,
    head_width: int,
    mask: Bool[Array, "*#rows #N M"] | None = None,
    bias: Float[Array, "A N M"] | None = None,
    scale: float | None = None,
    implementation: str = "xla",
) -> Float[Array, "*rows N D"]:
    """For each query the mean of the values weighted by softmax(scale query . key + bias) in each head.

    ``mask`` is True where a query may look at a key; a query that may look at none gets a finite mean of all values,
    which its caller must not use. ``scale`` is 1 / sqrt(head width) by default. ``implementation`` is that of
    ``jax.nn.dot_product_attention``; "cudnn" takes 16-bit types on a GPU only, and no bias: it would lay out
    the sum of bias and mask for every row.
    """
    assert bias is None or implementation == "xla", implementation
    rows = query.shape[:-2]
    split = lambda x: x.reshape(-1, x.shape[-2], x.shape[-1] // head_width, head_width)  # noqa: E731
    if mask is not None:
        num_queries = query.shape[-2] if implementation == "cudnn" else mask.shape[-2]  # cuDNN broadcasts no queries
        mask = jnp.broadcast_to(mask, (*rows, num_queries, mask.shape[-1]))
        mask = mask.reshape(-1, 1, *mask.shape[-2:])
    out = jax.nn.dot_product_attention(
        split(query), split(key), split(value), bias=bias, mask=mask, scale=scale, implementation=implementation
    )
    return out.reshape(query.shape)


def token_offsets(grid: tuple[int, int], cells: tuple[int, int]) -> Float[np.ndarray, "N 2"]:
    """Offset of each token's centre from the centre of its view, (row, column) in cells of the view, row-major."""
    rows, columns = ((np.arange(n) + 0.5) / n * side - side / 2 for n, side in zip(grid, cells, strict=True))
    return np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)


def rotation(offsets: Float[np.ndarray, "N 2"], *, head_width: int) -> Rotation:
    """The rotary angles of tokens at these offsets (cells).

    The first half of a head's pairs turns with the row, the second with the column; in each, wavelengths grow
    geometrically from 1 to 128 cells. An offset of (0, 0), as prompts have, does not turn. Our choice.
    """
    wavelengths = np.geomspace(SHORTEST_WAVELENGTH_CELLS, LONGEST_WAVELENGTH_CELLS, head_width // 4)
    angles = 2 * np.pi * offsets[:, :, None] / wavelengths  # N 2 K/4
    angles = angles.reshape(len(offsets), -1)
    return Rotation(*(jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin)))


def rotate(x: Float[Array, "*rows N D"], turn: Rotation, *, head_width: int) -> Float[Array, "*rows N D"]:
    """``x`` with pair j of each head, its channels j and j + K/2, turned by the token's angle; in fp32."""
    heads = rearrange(x.astype(jnp.float32), "... N (A two K) -> ... N A two K", two=2, K=head_width // 2)
    cos, sin = turn.cos[:, None, :], turn.sin[:, None, :]
    first, second = heads[..., 0, :], heads[..., 1, :]
    turned = jnp.stack((first * cos - second * sin, second * cos + first * sin), axis=-2)
    return turned.reshape(x.shape).astype(x.dtype)


@functools.cache
def fall_back(what: str, implementation: str, why: str) -> None:
    """Says that a kernel was not taken, once for each reason."""
    logging.info("%s 'xla' and not %r: %s", what, implementation, why)


def tensor_devices() -> int:
    """Devices over which the mesh at hand divides heads."""
    return jax.sharding.get_abstract_mesh().shape.get("tensor", 1)


class SelfAttention(nn.Module):
    """Multi-head attention of the tokens of an image to each other, with biases on query, key, value and output.

    Attributes:
      implementation: a kernel of kernels/full.py, which falls back to "xla" on sizes that it does not take, or one of
        ``attend``'s.
    """

    head_width: int
    implementation: str = "xla"
    compute_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B I N D"], *, valid: Bool[Array, "B I N"], turn: Rotation | None = None
    ) -> Float[Array, "B I N D"]:
        """What each token gathers from the valid tokens of its image; ``turn`` is None without positions."""
        project = lambda name: Dense(  # noqa: E731
            x.shape[-1], axes=(EMBED, HEADS), compute_dtype=self.compute_dtype, name=name
        )(x)
        mixed = product(self._mixed(project("query"), project("key"), project("value"), valid, turn))
        return Dense(x.shape[-1], axes=(HEADS, EMBED), compute_dtype=self.compute_dtype, name="output")(mixed)

    def _mixed(self, query, key, value, valid, turn):
        implementation = self.implementation
        if implementation in full_kernel.NAMES:
            sizes = dict(num_tokens=query.shape[2], width=query.shape[3], itemsize=query.dtype.itemsize)
            sizes |= dict(head_width=self.head_width, tensor_devices=tensor_devices())
            if not (told := full_kernel.problem(**sizes)):
                rules = dict(LOGICAL_AXIS_RULES)
                return full_kernel.full_attention(
                    query,
                    key,
                    value,
                    valid,
                    turn and (turn.cos, turn.sin),
                    head_width=self.head_width,
                    implementation=implementation,
                    batch_axes=rules[BATCH],
                    head_axis=rules[HEADS],
                )
            fall_back("attention", implementation, told)
            implementation = "xla"
        if turn is not None:
            query, key = (rotate(x, turn, head_width=self.head_width) for x in (query, key))
        mask = valid[:, :, None, :]
        return attend(query, key, value, head_width=self.head_width, mask=mask, implementation=implementation)
