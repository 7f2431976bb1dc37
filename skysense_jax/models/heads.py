"""What objectives read: features beside prototypes, and a cell's feature in the space of the text encoder.

Stage outputs carry no norm: prototype heads take rows that the losses have standardised (losses/contrastive.py), the
text head begins with a layer norm [our choice]. Next: skysense.py, which says which heads exist.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from skysense_jax.models.layers import VECTOR_INIT, Dense, LayerNorm, constant, gelu, partitioned
from skysense_jax.sharding import ACTIVATION, EMBED, MLP, PROTOTYPES, UNSHARDED, constrain

_INITIAL_TEMPERATURE, _MAX_SCALE = 0.07, 100.0  # as CLIP (arXiv 2103.00020)


def unit(x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
    """Rows of length 1, in fp32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)


class ProjectionHead(nn.Module):
    """A 3-layer MLP to a unit bottleneck, and the prototypes that are compared with it (DINOv2, arXiv 2304.07193).

    The cosines themselves, Z a row, are taken in the losses, a part of the batch at a time.

    Attributes:
      num_prototypes: rows of the parameter ``prototypes``, whose length does not matter.
    """

    hidden_dim: int
    bottleneck_dim: int
    num_prototypes: int
    compute_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "*rows D"]
    ) -> tuple[Float[Array, "*rows _bottleneck"], Float[Array, "Z _bottleneck"]]:
        """A unit row for each standardised row, and the unit prototypes; fp32."""
        dtype = self.compute_dtype
        x = Dense(self.hidden_dim, axes=(EMBED, MLP), compute_dtype=dtype, name="hidden1")(x)
        x = gelu(x)
        x = Dense(self.hidden_dim, axes=(MLP, EMBED), compute_dtype=dtype, name="hidden2")(x)
        x = gelu(x)
        x = Dense(self.bottleneck_dim, axes=(EMBED, UNSHARDED), compute_dtype=dtype, name="bottleneck")(x)
        init = partitioned(VECTOR_INIT, PROTOTYPES, UNSHARDED)
        prototypes = self.param("prototypes", init, (self.num_prototypes, self.bottleneck_dim))
        return unit(x), constrain(unit(prototypes), ACTIVATION, ACTIVATION)  # gathered once, before any loop


class TextHead(nn.Module):
    """A linear layer into the text encoder's space, and the learned temperature of similarities there."""

    text_dim: int
    compute_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*rows D"]) -> tuple[Float[Array, "*rows X"], Float[Array, ""]]:
        """Unit rows in the text space, fp32, and one over the temperature, at most 100."""
        x = LayerNorm(compute_dtype=self.compute_dtype, name="norm")(x)
        x = Dense(self.text_dim, compute_dtype=self.compute_dtype, name="project")(x)
        log_scale = -self.param("log_temperature", partitioned(constant(math.log(_INITIAL_TEMPERATURE))), ())
        clamped = jnp.minimum(log_scale, math.log(_MAX_SCALE))
        # the gradient passes the clamp, or a temperature once too low could never rise again
        return unit(x), jnp.exp(log_scale + jax.lax.stop_gradient(clamped - log_scale))


class DistilHead(nn.Module):
    """Linear layers to the widths of a network that is distilled, one a level of features (losses/distil.py).

    Attributes:
      widths: name of the level and the other network's width there.
    """

    widths: tuple[tuple[str, int], ...]
    compute_dtype: Any = jnp.float32

    def setup(self):
        for level, width in self.widths:
            setattr(self, level, Dense(width, compute_dtype=self.compute_dtype))

    def __call__(self, level: str, x: Float[Array, "*rows D"]) -> Float[Array, "*rows F"]:
        """``x``, features of ``level``, at the other network's width."""
        return getattr(self, level)(x)
