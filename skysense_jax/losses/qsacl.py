"""L_QSACL: query-based semantic aggregation contrastive learning (SkySense V2 sec. 3.3).

A query is compared with the same query of another view only, so that a pond is compared with a pond. The teacher sees
local views too. Targets (teacher) and term (student) are apart, so that microbatches share one Sinkhorn.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from skysense_jax.losses.contrastive import (
    Scalar,
    Term,
    cross_entropy,
    entropy,
    row_statistics,
    safe_divide,
    sinkhorn,
    standardise,
)

Project = Callable[[Any], Any]  # standardised features [*rows D] to prototype logits [*rows Z]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QueryTargets:
    """What the student's queries are compared with.

    Attributes:
      global_probs, local_probs: the teacher's distribution of each query; zero for views without a usable cell.
      global_valid, local_valid: views with a usable cell.
      statistics: what the rows of both sides are standardised by.
    """

    global_probs: Any  # B Vg R Z
    local_probs: Any  # B Vl R Z
    global_valid: Any  # B Vg
    local_valid: Any  # B Vl
    statistics: Any

    def rows(self) -> tuple[Float[Array, "B V R Z"], Bool[Array, "B V R"]]:
        """All teacher rows, global views first, and which of them are valid."""
        probs = jnp.concatenate((self.global_probs, self.local_probs), axis=1)
        valid = jnp.concatenate((self.global_valid, self.local_valid), axis=1)
        return probs, jnp.broadcast_to(valid[..., None], probs.shape[:3])


def query_targets(
    global_queries: Float[Array, "B Vg R D"],
    local_queries: Float[Array, "B Vl R D"],
    global_valid: Bool[Array, "B Vg"],
    local_valid: Bool[Array, "B Vl"],
    *,
    project: Project,
    temperature: Scalar,
    iterations: int,
) -> QueryTargets:
    """The teacher's distributions: one standardisation and one Sinkhorn over all queries, views and valid samples.

    Balance per query would forbid a query to specialise [our choice].
    """
    num_global = global_queries.shape[1]
    rows = jnp.concatenate((global_queries, local_queries), axis=1)
    valid = jnp.concatenate((global_valid, local_valid), axis=1)
    valid = jnp.broadcast_to(valid[..., None], rows.shape[:3])
    statistics = row_statistics(rows, valid)
    logits = project(standardise(rows, statistics))
    probs = sinkhorn(
        logits.reshape(-1, logits.shape[-1]), valid.reshape(-1), temperature=temperature, iterations=iterations
    ).reshape(logits.shape)
    return QueryTargets(probs[:, :num_global], probs[:, num_global:], global_valid, local_valid, statistics)


def query_term(
    global_queries: Float[Array, "B Vg R D"],
    local_queries: Float[Array, "B Vl R D"],
    targets: QueryTargets,
    *,
    project: Project,
    temperature: Scalar,
) -> Term:
    """The loss of the student's queries, and the number of (sample, global view, local view, query) it sums over.

    for b, for valid g, for valid l, for i:
        sum += (CE(student[g][i], teacher[l][i]) + CE(student[l][i], teacher[g][i])) / 2
    """
    one_way = (  # CE is linear in the target: each student row meets the mean of its teachers once
        (global_queries, targets.global_valid, targets.local_probs, targets.local_valid),
        (local_queries, targets.local_valid, targets.global_probs, targets.global_valid),
    )
    total = Term(jnp.float32(0), jnp.float32(0))
    for student, student_valid, teacher_probs, teacher_valid in one_way:
        logits = project(standardise(student, targets.statistics))
        num_teachers = teacher_valid.sum(1).astype(jnp.float32)  # B
        mean = safe_divide(teacher_probs.sum(1), num_teachers[:, None, None])  # B R Z; invalid views hold zeros
        weight = student_valid * num_teachers[:, None]  # B V
        total += cross_entropy(
            logits,
            jnp.broadcast_to(mean[:, None], logits.shape),
            jnp.broadcast_to(weight[..., None], logits.shape[:3]),
            temperature=temperature,
        )
    return Term(total.sum / 2, total.count / 2)


def query_usage(probs: Float[Array, "B V R Z"], valid: Bool[Array, "B V R"]) -> Float[Array, ""]:
    """Share of queries that can be told apart by what they stand for: 1/R if all are alike, 1 if none overlap.

    exp(I) / R, where I = H(mean over r of p_r) - mean over r of H(p_r) is the mutual information between a query and
    its prototype, p_r the mean target of query r over the valid rows. Our definition. 0 without a valid row.
    """
    weight = valid.astype(jnp.float32)
    of_query = safe_divide((probs * weight[..., None]).sum((0, 1)), weight.sum((0, 1))[:, None])  # R Z
    information = entropy(of_query.mean(0)) - entropy(of_query).mean()
    return jnp.where(weight.sum() > 0, jnp.exp(information) / probs.shape[2], 0.0)
