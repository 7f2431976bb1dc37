"""Tokenizers: the only part of the backbone, with the prompts, that belongs to a modality.

Pixels are normalised floats when they get here. Next: backbone.py.
"""

from typing import Any

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float

from skysense_jax.models.layers import Dense, LayerNorm, named
from skysense_jax.sharding import EMBED, UNSHARDED


class Tokenizer(nn.Module):
    """Non-overlapping patches, a linear layer, a layer norm; initial values are our choice.

    A patch is flattened row-major with the bands last, so the kernel's rows are (row, column, band).
    """

    patch: int
    width: int
    compute_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "B I H W C"]) -> Float[Array, "B I P Q D"]:
        """One token a patch."""
        patches = rearrange(images, "B I (P h) (Q w) C -> B I P Q (h w C)", h=self.patch, w=self.patch)
        dense = Dense(
            self.width,
            axes=(UNSHARDED, EMBED),
            kernel_init=named(
                "lecun_normal", nn.initializers.lecun_normal()
            ),  # normalised pixels and bias weigh the same
            bias_init=named("normal_1", nn.initializers.normal(1.0)),  # without it the norm hides how bright a patch is
            compute_dtype=self.compute_dtype,
            name="projection",
        )
        return LayerNorm(compute_dtype=self.compute_dtype, name="norm")(dense(patches))
