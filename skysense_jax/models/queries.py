"""The semantic queries: one Transformer decoder layer that reads a view's fused features (SkySense V2 sec. 3.3).

Each learned query gathers the cells of one kind of thing, wherever in the view they are. Next: losses/qsacl.py.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from skysense_jax.models.attention import SelfAttention, attend
from skysense_jax.models.layers import VECTOR_INIT, Dense, LayerNorm, Mlp, partitioned
from skysense_jax.sharding import EMBED, HEADS, UNSHARDED, constrain_batch


class QueryDecoder(nn.Module):
    """Pre-norm self-attention among the queries, cross-attention to the cells, MLP.

    Attributes:
      width: of queries and of the fused features.
    """

    num_queries: int
    width: int
    head_width: int
    mlp_ratio: int | float = 4
    compute_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, cells: Float[Array, "B V N D"], usable: Bool[Array, "B V N"], *, return_attention: bool = False
    ) -> tuple[Float[Array, "B V R D"], Float[Array, "B V R N"] | None]:
        """What each query gathers from the usable cells of each view, and where from: its attention, mean over heads.

        The attention is None unless asked for. A view without a usable cell gives finite values that mean nothing.
        """
        assert self.width % self.head_width == 0, (self.width, self.head_width)
        dtype = self.compute_dtype
        norm = lambda name, x: LayerNorm(compute_dtype=dtype, name=name)(x)  # noqa: E731
        dense = lambda name, x, axes: Dense(self.width, axes=axes, compute_dtype=dtype, name=name)(x)  # noqa: E731

        queries = self.param("queries", partitioned(VECTOR_INIT, UNSHARDED, UNSHARDED), (self.num_queries, self.width))
        x = queries.astype(dtype)[None, None]  # until they read a view they are the same for all
        y = SelfAttention(self.head_width, compute_dtype=dtype, name="attention")(
            norm("attention_norm", x), valid=jnp.ones(x.shape[:3], bool)
        )
        x = constrain_batch(jnp.broadcast_to(x + y, (*cells.shape[:2], *x.shape[2:])))

        query = dense("cross_query", norm("cross_norm", x), (EMBED, HEADS))
        key, value = (dense(f"cross_{name}", cells, (EMBED, HEADS)) for name in ("key", "value"))
        mask = usable[:, :, None, :]
        y = attend(query, key, value, head_width=self.head_width, mask=mask)
        x = x + dense("cross_output", y, (HEADS, EMBED))
        x = x + Mlp(round(self.mlp_ratio * self.width), dtype, name="mlp")(norm("mlp_norm", x))
        return x, _attention(query, key, mask, self.head_width) if return_attention else None


def _attention(query, key, mask, head_width):
    """The weights that ``attend`` uses, mean over heads."""
    split = lambda x: x.reshape(*x.shape[:-1], -1, head_width).astype(jnp.float32)  # noqa: E731
    scores = jnp.einsum("bvrak,bvnak->bvarn", split(query), split(key)) / jnp.sqrt(head_width)
    return jax.nn.softmax(jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min), axis=-1).mean(2)
