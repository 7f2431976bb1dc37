"""Adaptive patch merging: how a modality goes from one stage's width to the next, merging its grid or keeping it.

SkySense V2 sec. 3.1. A modality that merges does as Swin V2; one that keeps its grid uses the same weights averaged
over the four neighbours. [Our choice] option "separate": a kernel of its own for each keeping modality; the norm is
shared either way. Which modality merges where stands in the modality table.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from skysense_jax.models.layers import KERNEL_INIT, LayerNorm, partitioned
from skysense_jax.sharding import EMBED, UNSHARDED, constrain_batch, gathered


def neighbours(x: Float[Array, "B I P Q D"]) -> Float[Array, "B I P2 Q2 F"]:
    """The 2x2 neighbours of each token of the coarser grid, channels concatenated column by column as in Swin V2.

    An odd grid is padded with zeros on the right and below.
    """
    x = jnp.pad(x, ((0, 0), (0, 0), (0, x.shape[2] % 2), (0, x.shape[3] % 2), (0, 0)))
    order = ((0, 0), (1, 0), (0, 1), (1, 1))  # (row, column)
    return jnp.concatenate([x[:, :, row::2, column::2] for row, column in order], axis=-1)


def merged_validity(valid: Bool[Array, "B I P Q"]) -> Bool[Array, "B I P2 Q2"]:
    """True where any of the four neighbours is."""
    return neighbours(valid[..., None].astype(jnp.float32)).any(-1)


class PatchMerging(nn.Module):
    """One transition between stages, shared by all modalities.

    Attributes:
      width: D of the tokens that come in; 2 D go out.
      separate: names of the keeping modalities that have a kernel of their own; empty for averaged merging.
    """

    width: int
    separate: tuple[str, ...] = ()
    compute_dtype: Any = jnp.float32

    def setup(self):
        init = partitioned(KERNEL_INIT, UNSHARDED, EMBED)
        self.kernel = self.param("kernel", init, (4 * self.width, 2 * self.width))
        self.keep_kernels = {
            name: self.param(f"keep_{name}_kernel", init, (self.width, 2 * self.width)) for name in self.separate
        }
        self.norm = LayerNorm(compute_dtype=self.compute_dtype)

    def __call__(self, x: Float[Array, "B I P Q D"]) -> Float[Array, "B I P2 Q2 F"]:
        """The merged grid: half as many rows and columns."""
        return self.norm(self.reduce(neighbours(x), self.kernel))

    def keep(self, x: Float[Array, "B I P Q D"], name: str) -> Float[Array, "B I P Q F"]:
        """The same grid for modality ``name``, twice as wide."""
        return self.norm(self.reduce(x, self.keep_kernel(name)))

    def keep_kernel(self, name: str) -> Float[Array, "D F"]:
        """What a kept token is multiplied with, before the norm."""
        if name in self.separate:
            return self.keep_kernels[name]
        return self.kernel.reshape(4, self.width, 2 * self.width).mean(0)

    def reduce(self, x: Float[Array, "B I P Q D"], kernel: Float[Array, "D F"]) -> Float[Array, "B I P Q F"]:
        """The linear layer without its norm."""
        kernel = gathered(kernel.astype(self.compute_dtype), UNSHARDED, EMBED)
        return constrain_batch(x).astype(self.compute_dtype) @ kernel
