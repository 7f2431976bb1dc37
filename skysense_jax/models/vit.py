"""The global block: a pre-norm Transformer block with LayerScale, of stages 3 and 4 and of the fusion encoder.

Its MLP may be a mixture of experts. It does not know grids or prompts: tokens come as a row with a mask, and turned by
a rotation if they have a place. Next: moe.py, backbone.py (scans it).
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from skysense_jax.models.attention import Rotation, SelfAttention
from skysense_jax.models.layers import DropPath, LayerNorm, Mlp, constant, partitioned
from skysense_jax.models.moe import ExpertMlp, RouterStats
from skysense_jax.sharding import UNSHARDED, constrain_batch


class GlobalBlock(nn.Module):
    """Attention over all tokens of an image, then an MLP or a mixture of experts.

    Attributes:
      layer_scale_init: None for no LayerScale.
      num_experts: 0 for a dense MLP; the next two are read only by a mixture.
      experts_per_token, capacity_factor: see ``moe.ExpertMlp``.
    """

    head_width: int
    mlp_ratio: int | float = 4
    layer_scale_init: int | float | None = 1e-5
    num_experts: int = 0
    experts_per_token: int = 1
    capacity_factor: int | float = 1.25
    attention: str = "xla"
    compute_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B I N D"],
        *,
        valid: Bool[Array, "B I N"],
        turn: Rotation | None = None,
        drop: DropPath | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "B I N D"], RouterStats | None]:
        """The tokens after the block, and the router's statistics of a mixture.

        Invalid tokens are not attended and take no place with an expert; what comes out in their place is arbitrary.
        ``train`` decides how a mixture routes.
        """
        width, dtype = x.shape[-1], self.compute_dtype

        def residual(branch, name, y):
            if self.layer_scale_init is not None:
                init = constant(self.layer_scale_init)
                y = y * self.param(f"{name}_layer_scale", partitioned(init, UNSHARDED), (width,)).astype(dtype)
            return y if drop is None else drop(branch, y)

        x = constrain_batch(x)
        y = LayerNorm(compute_dtype=dtype, name="attention_norm")(x)
        y = SelfAttention(self.head_width, self.attention, dtype, name="attention")(y, valid=valid, turn=turn)
        x = x + residual(0, "attention", y)
        y = LayerNorm(compute_dtype=dtype, name="mlp_norm")(x)
        hidden_dim, stats = round(self.mlp_ratio * width), None
        if self.num_experts:
            experts = ExpertMlp(
                hidden_dim, self.num_experts, self.experts_per_token, self.capacity_factor, dtype, name="experts"
            )
            y, stats = experts(y, valid=valid, train=train)
        else:
            y = Mlp(hidden_dim, dtype, name="mlp")(y)
        return x + residual(1, "mlp", y), stats
