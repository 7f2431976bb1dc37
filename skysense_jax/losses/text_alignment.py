"""L_ITA: each labelled cell's fused feature against the text embeddings of all class names (SkySense V2 sec. 3.3).

Student only. The paper aligns dense features with text from OpenStreetMap; the soft histogram as target and the learned
temperature are our choice.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from skysense_jax.losses.contrastive import Scalar, Term, safe_divide


def text_alignment(
    cells: Float[Array, "*rows X"],
    labels: Float[Array, "*rows L"],
    usable: Bool[Array, "*rows"],
    *,
    table: Float[Array, "L X"],
    scale: Scalar,
) -> Term:
    """Cross entropy over classes, summed over usable cells with a label, and their number.

        for n: p = labels[n] / sum(labels[n]);  s = scale * table @ cells[n]
               sum -= sum_l p[l] * log softmax(s)[l]

    Args:
      cells: projected features, unit length.
      labels: share of the cell's sub-pixels per class; all zero where nothing is mapped.
      table: unit text embeddings of the classes.
      scale: one over the temperature.
    """
    similarity = jnp.einsum("...x,lx->...l", cells.astype(jnp.float32), table, precision=jax.lax.Precision.HIGHEST)
    labelled = labels.astype(jnp.float32).sum(-1)
    target = safe_divide(labels.astype(jnp.float32), labelled[..., None])
    weight = (usable & (labelled > 0)).astype(jnp.float32)
    of_cell = -(target * jax.nn.log_softmax(scale * similarity, axis=-1)).sum(-1)
    return Term((weight * of_cell).sum(), weight.sum())
