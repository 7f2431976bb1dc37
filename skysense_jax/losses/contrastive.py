"""L_CL: cross entropy between the student's and the teacher's distribution over prototypes, and what it stands on.

The teacher's distribution is balanced by Sinkhorn-Knopp over all rows of the global batch (DINOv2, arXiv 2304.07193);
teacher targets carry no gradient. Every loss here returns a ``Term``, so that shards and microbatches add.
Rows number in the thousands a sample and prototypes too, so logits are made for a part of the batch at a time
(``config.parts.logits``), again in each pass over them, and never stand in memory for all of it.
Next: mgcl.py and qsacl.py, which say what the rows are.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from skysense_jax.losses import parts as parts_lib

Scalar = Float[Array, ""] | float
_EPSILON = 1e-5  # added to variances


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Term:
    """A loss as sum and count over rows, fp32 scalars; (0, 0) when there is nothing to say. Terms add."""

    sum: Any
    count: Any

    def __add__(self, other: "Term") -> "Term":
        return Term(self.sum + other.sum, self.count + other.count)

    def mean(self) -> Float[Array, ""]:
        """Sum over count; 0 if the count is 0."""
        return self.sum / jnp.where(self.count > 0, self.count, 1.0)


def unit(x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
    """Rows of length 1, in fp32; a zero row stays zero, with a finite gradient."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)


def safe_divide(x: Float[Array, "..."], count: Float[Array, "..."]) -> Float[Array, "..."]:
    """``x / count``, and ``x`` where the count is 0 (where ``x``, a sum over nothing, is 0 too)."""
    return x / jnp.where(count > 0, count, 1.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowStatistics:
    """What rows of features are standardised by, fp32.

    Attributes:
      mean, deviation: of each feature.
    """

    mean: Any  # D
    deviation: Any  # D


def layer_norm(x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
    """Rows of mean 0 and variance 1, in fp32; a zero row stays zero, with a finite gradient."""
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + _EPSILON)


def row_statistics(rows: Float[Array, "*rows D"], valid: Bool[Array, "*rows"]) -> RowStatistics:
    """Of the valid rows after their layer norm, without gradient; (0, 1) where there is none."""
    valid, axes = valid[..., None], tuple(range(valid.ndim))
    x, count = layer_norm(jax.lax.stop_gradient(rows)), valid.sum(dtype=jnp.float32)
    mean = safe_divide(jnp.where(valid, x, 0.0).sum(axes), count)
    variance = safe_divide(jnp.square(jnp.where(valid, x - mean, 0.0)).sum(axes), count)
    return RowStatistics(mean, jnp.where(count > 0, jnp.sqrt(variance + _EPSILON), 1.0))


def standardise(rows: Float[Array, "*rows D"], statistics: RowStatistics) -> Float[Array, "*rows D"]:
    """What a projection head sees of ``rows``: their layer norm, minus what they share, each feature on one scale.

    Nine tenths of a young network's features are common to all of them: without this the head and then the network
    have to unlearn that first. Teacher and student are measured by the teacher's rows of the whole batch, so the
    result does not depend on how it is cut into microbatches. Our choice; batch norm in the heads (SwAV, MoCo v3)
    serves the same end.
    """
    return (layer_norm(rows) - statistics.mean) / statistics.deviation


def cosines(rows: Float[Array, "*rows D"], prototypes: Float[Array, "Z D"]) -> Float[Array, "*rows Z"]:
    """Of unit rows with unit prototypes, more exact than bf16: a temperature of 0.04 makes 25 times of an error.

    HIGH is three passes on a TPU (at width 256 an error of 4e-5 in a logit over 0.04), TF32 on a GPU (2.5e-3), fp32 on
    a CPU; full fp32 takes six passes on a TPU and no tensor cores on a GPU. The only product of a loss that is not full
    fp32 [our choice]: rows come from bf16 products anyway.
    """
    return jnp.einsum("...d,zd->...z", rows, prototypes, precision=jax.lax.Precision.HIGH)


def sinkhorn(
    logits: Float[Array, "N Z"], valid: Bool[Array, " N"], *, temperature: Scalar, iterations: int
) -> Float[Array, "N Z"]:
    """Each row's balanced distribution over prototypes, fp32, without gradient; zero for invalid rows.

        q[n][z] = exp(logits[n][z] / temperature) for valid n
        repeat: divide each column by its sum over n; divide each row by its sum over z

    Computed as potentials of rows and columns in the log domain: no overflow at any temperature. Constant factors of
    SwAV's form (arXiv 2006.09882), such as 1/N and 1/Z, cancel in the last row division and are left out.
    """
    scores = jnp.where(valid[:, None], jax.lax.stop_gradient(logits).astype(jnp.float32) / temperature, 0.0)
    rows, columns = jnp.zeros((len(scores), 1), jnp.float32), jnp.zeros(scores.shape[1], jnp.float32)
    for _ in range(iterations):
        mass = jax.nn.logsumexp(jnp.where(valid[:, None], scores + rows, -jnp.inf), axis=0)
        columns = jnp.where(jnp.isfinite(mass), -mass, 0.0)  # -inf: no valid row at all
        rows = -jax.nn.logsumexp(scores + columns, axis=1, keepdims=True)
    return jnp.where(valid[:, None], jax.nn.softmax(scores + columns, axis=1), 0.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Balance:
    """What makes a teacher row a balanced distribution over prototypes, whichever part of the batch it stands in.

    Attributes:
      prototypes: the teacher's, unit length.
      columns: the Sinkhorn's potential of each prototype, over all valid rows.
      temperature: the teacher's.
      statistics: what the rows of both sides are standardised by.
    """

    prototypes: Any  # Z D
    columns: Any  # Z
    temperature: Any
    statistics: RowStatistics

    def probs(self, rows: Float[Array, "*rows D"], valid: Bool[Array, "*rows"]) -> Float[Array, "*rows Z"]:
        """Each projected row's distribution, fp32, without gradient; zero for invalid rows."""
        scores = cosines(rows, self.prototypes) / self.temperature + self.columns
        return jax.lax.stop_gradient(jnp.where(valid[..., None], jax.nn.softmax(scores, axis=-1), 0.0))


def balance(
    features: Float[Array, "B *rows D"],
    valid: Bool[Array, "B *rows"],
    *,
    project: Callable[[Any], Any],
    temperature: Scalar,
    iterations: int,
    parts: int = 1,
) -> tuple[Float[Array, "B *rows _bottleneck"], Balance]:
    """The teacher's rows, standardised and projected, and what balances them: ``sinkhorn``, a part at a time.

    A pass over the rows takes their potentials from those of the columns and adds up the columns' masses under them;
    masses are kept for each sample of a part, so that devices exchange them once a pass.
    """
    statistics = row_statistics(features, valid)
    rows, prototypes = jax.lax.stop_gradient(project(standardise(features, statistics)))
    line = lambda x: x.reshape(len(x), -1, *x.shape[valid.ndim :])  # noqa: E731

    def one_pass(columns, is_first):
        def add(masses, part):
            scores = cosines(part[0], prototypes) / temperature  # b N Z
            potentials = -jax.nn.logsumexp(scores + columns, axis=-1, keepdims=True)
            scores = scores + jnp.where(is_first, 0.0, potentials)
            scores = jnp.where(part[1][..., None], scores, -jnp.inf)
            return jnp.logaddexp(masses, jax.nn.logsumexp(scores, axis=1))

        nothing = jnp.full((len(rows) // parts, len(prototypes)), -jnp.inf)
        masses = parts_lib.fold(add, nothing, (line(rows), line(valid)), parts=parts)
        mass = jax.nn.logsumexp(masses, axis=0)
        return jnp.where(jnp.isfinite(mass), -mass, 0.0), None  # -inf: no valid row at all

    columns, _ = jax.lax.scan(one_pass, jnp.zeros(len(prototypes)), jnp.arange(iterations) == 0)
    return rows, Balance(prototypes, columns, jnp.asarray(temperature, jnp.float32), statistics)


def cross_entropy(
    student_logits: Float[Array, "*rows Z"],
    teacher_probs: Float[Array, "*rows Z"],
    weight: Float[Array, "*rows"],
    *,
    temperature: Scalar,
) -> Term:
    """The weighted sum over rows, and the sum of weights.

        for n: sum -= weight[n] * sum_z teacher_probs[n][z] * log softmax(student_logits[n] / temperature)[z]

    Linear in ``teacher_probs``: a row with several teachers may as well have their mean with the summed weight.
    """
    log_probs = jax.nn.log_softmax(student_logits.astype(jnp.float32) / temperature, axis=-1)
    of_row = -(jax.lax.stop_gradient(teacher_probs) * log_probs).sum(-1)
    weight = weight.astype(jnp.float32)
    return Term((weight * of_row).sum(), weight.sum())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TargetEntropy:
    """Collapse signals in nats.

    Attributes:
      of_rows: mean entropy of a row; log Z: the teacher says nothing.
      of_mean: entropy of the mean row; 0: every row says the same prototype.
    """

    of_rows: Any
    of_mean: Any


def target_entropy(
    rows: Float[Array, "B *rows D"], valid: Bool[Array, "B *rows"], balance: Balance, *, parts: int = 1
) -> TargetEntropy:
    """How sharp the valid rows of teacher targets are and how evenly they use the prototypes; 0 without valid rows."""

    def of_part(part):  # sums of each sample: devices exchange them once
        probs, axes = balance.probs(*part), tuple(range(1, valid.ndim))
        return entropy(probs).sum(axes), probs.sum(axes)

    entropies, mass = parts_lib.total(of_part, (rows, valid), parts=parts)
    count = jnp.maximum(valid.sum(dtype=jnp.float32), 1.0)
    return TargetEntropy(entropies.sum() / count, entropy(mass.sum(0) / count))


def entropy(probs: Float[Array, "*rows Z"]) -> Float[Array, "*rows"]:
    """Of each row, in nats; 0 for a row of zeros."""
    return -jax.scipy.special.xlogy(probs, probs).sum(-1)
