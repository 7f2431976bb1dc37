"""k-nearest-neighbour classification of frozen features: no training, so it shows what the features are already like.

The rule of DINO (arXiv 2104.14294, appendix F): cosine similarity, ``k`` votes weighted by exp(similarity / 0.07).
Next: probes.py, the linear one.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int

from skysense_jax.eval.features import num_batch_shards, placed, replicated
from skysense_jax.sharding import BATCH, LOGICAL_AXIS_RULES

K = 20  # [DINO]
TEMPERATURE = 0.07  # [DINO]
_MOST_SIMILARITIES = 2**28  # a gigabyte of them at once


def _unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


@functools.partial(jax.jit, static_argnames=("num_classes", "k", "temperature"))
def _vote(known, labels, asked, *, num_classes, k, temperature):
    """Class ids of a block of rows, each device its share of them; whole on every device."""
    if num_batch_shards() > 1:
        asked = jax.lax.with_sharding_constraint(asked, PartitionSpec(dict(LOGICAL_AXIS_RULES)[BATCH]))
    similar = jnp.matmul(_unit(asked), _unit(known).T, precision=jax.lax.Precision.HIGHEST)
    similar, nearest = jax.lax.top_k(similar, k)
    # the nearest one's weight is 1: exp of the differences overflows at no temperature
    weights = jnp.exp((similar - similar[:, :1]) / temperature)
    votes = (jax.nn.one_hot(labels[nearest], num_classes) * weights[..., None]).sum(axis=1)
    return replicated(votes.argmax(axis=-1))


def classifier(
    train_features: Float[np.ndarray, "N D"],
    train_labels: Int[np.ndarray, " N"],
    *,
    num_classes: int,
    k: int = K,
    temperature: float = TEMPERATURE,
    block: int = 4096,
) -> Callable[[Float[np.ndarray, "L D"]], Int[np.ndarray, " L"]]:
    """A function from rows to the class of each by its ``k`` nearest training rows; of equal votes the lowest class.

    Labels are 0 to ``num_classes - 1``. With fewer than ``k`` training rows all of them vote. Runs under the mesh that
    is set, or without one; at most ``block`` rows are compared at a time, fewer with more than 65,536 training rows.

    Raises:
      ValueError: there is no training row, or a label is out of range.
    """
    if not len(train_features):
        raise ValueError("got no training row; wanted at least one neighbour")
    if train_labels.min() < 0 or train_labels.max() >= num_classes:
        raise ValueError(f"got labels {train_labels.min()} to {train_labels.max()}; wanted 0 to {num_classes - 1}")
    shards, most = num_batch_shards(), min(block, max(1, _MOST_SIMILARITIES // len(train_features)))
    how = dict(num_classes=num_classes, k=min(k, len(train_features)), temperature=temperature)
    known, labels = placed((train_features, train_labels))

    def classes_of(features: Float[np.ndarray, "L D"]) -> Int[np.ndarray, " L"]:
        size, found = -(-min(most, max(len(features), 1)) // shards) * shards, []
        for first in range(0, len(features), size):
            rows = features[first : first + size]
            filled = np.concatenate([rows, np.zeros((size - len(rows), rows.shape[1]), rows.dtype)])  # one compilation
            found.append(np.asarray(_vote(known, labels, filled, **how))[: len(rows)])
        return np.concatenate(found).astype(np.int64) if found else np.zeros(0, np.int64)

    return classes_of
