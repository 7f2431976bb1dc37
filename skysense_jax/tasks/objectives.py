"""What fine-tuning minimises: means over what carries a label.

Next: finetune.py.
"""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Integer

from skysense_jax.eval.scores import IGNORED


def cross_entropy(
    logits: Float[Array, "*rows L"], targets: Integer[Array, "*rows"], *, ignored: int = IGNORED
) -> Float[Array, ""]:
    """Mean over rows whose target is not ``ignored``; 0 where all are."""
    known = targets != ignored
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), jnp.where(known, targets, 0).astype(jnp.int32)
    )
    return jnp.where(known, losses, 0.0).sum() / jnp.maximum(known.sum(), 1)


def binary_cross_entropy(
    logits: Float[Array, "*rows"], targets: Bool[Array, "*rows"] | Integer[Array, "*rows"]
) -> Float[Array, ""]:
    """Mean over all decisions; an integer target is 0, 1 or ``IGNORED``, which does not count."""
    known = jnp.ones(targets.shape, bool) if targets.dtype == bool else targets != IGNORED
    losses = optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), jnp.where(known, targets, 0))
    return jnp.where(known, losses, 0.0).sum() / jnp.maximum(known.sum(), 1)
