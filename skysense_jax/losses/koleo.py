"""KoLeo: a regulariser that spreads the features of a view over the sphere (DINOv2, arXiv 2304.07193; 1806.03198)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from skysense_jax.losses.contrastive import Term, unit

_EPSILON = 1e-8  # added to the squared distance: equal features give a finite loss and no gradient


def koleo(features: Float[Array, "B V D"], valid: Bool[Array, "B V"]) -> Term:
    """Minus the log distance to the nearest other sample, summed over valid samples and views, and their number.

        for v, for valid i: sum -= log(min over valid j != i of |unit(features[i][v]) - unit(features[j][v])|)

    A view with fewer than two valid samples says nothing.
    """
    x = unit(jnp.swapaxes(features, 0, 1))  # V B D
    valid = valid.T
    others = valid[:, None, :] & valid[:, :, None] & ~jnp.eye(x.shape[1], dtype=bool)
    cosine = jnp.einsum("vid,vjd->vij", *(jax.lax.stop_gradient(x),) * 2, precision=jax.lax.Precision.HIGHEST)
    nearest = jnp.where(others, cosine, -jnp.inf).argmax(-1)
    distance2 = jnp.square(x - jnp.take_along_axis(x, nearest[..., None], axis=1)).sum(-1)
    weight = others.any(-1).astype(jnp.float32)
    return Term((-0.5 * jnp.log(distance2 + _EPSILON) * weight).sum(), weight.sum())
