"""L_QSACL: query-based semantic aggregation contrastive learning (SkySense V2 sec. 3.3).

A query is compared with the same query of another view only, so that a pond is compared with a pond. The teacher sees
local views too. Targets (teacher) and term (student) are apart, so that microbatches share one Sinkhorn.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from skysense_jax.losses.contrastive import Scalar, Term, cross_entropy, entropy, safe_divide, sinkhorn


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QueryTargets:
    """What the student's queries are compared with.

    Attributes:
      global_probs, local_probs: the teacher's distribution of each query; zero for views without a usable cell.
      global_valid, local_valid: views with a usable cell.
    """

    global_probs: Any  # B Vg R Z
    local_probs: Any  # B Vl R Z
    global_valid: Any  # B Vg
    local_valid: Any  # B Vl

    def rows(self) -> tuple[Float[Array, "B V R Z"], Bool[Array, "B V R"]]:
        """All teacher rows, global views first, and which of them are valid."""
        probs = jnp.concatenate((self.global_probs, self.local_probs), axis=1)
        valid = jnp.concatenate((self.global_valid, self.local_valid), axis=1)
        return probs, jnp.broadcast_to(valid[..., None], probs.shape[:3])


def query_targets(
    global_logits: Float[Array, "B Vg R Z"],
    local_logits: Float[Array, "B Vl R Z"],
    global_valid: Bool[Array, "B Vg"],
    local_valid: Bool[Array, "B Vl"],
    *,
    temperature: Scalar,
    iterations: int,
) -> QueryTargets:
    """The teacher's distributions: one Sinkhorn over all queries, views and valid samples.

    Balance per query would forbid a query to specialise [our choice].
    """
    num_global = global_logits.shape[1]
    logits = jnp.concatenate((global_logits, local_logits), axis=1)
    valid = jnp.concatenate((global_valid, local_valid), axis=1)
    probs = sinkhorn(
        logits.reshape(-1, logits.shape[-1]),
        jnp.broadcast_to(valid[..., None], logits.shape[:3]).reshape(-1),
        temperature=temperature,
        iterations=iterations,
    ).reshape(logits.shape)
    return QueryTargets(probs[:, :num_global], probs[:, num_global:], global_valid, local_valid)


def query_term(
    global_logits: Float[Array, "B Vg R Z"],
    local_logits: Float[Array, "B Vl R Z"],
    targets: QueryTargets,
    *,
    temperature: Scalar,
) -> Term:
    """The loss of student logits, and the number of (sample, global view, local view, query) it sums over.

    for b, for valid g, for valid l, for i:
        sum += (CE(student[g][i], teacher[l][i]) + CE(student[l][i], teacher[g][i])) / 2
    """
    one_way = (  # CE is linear in the target: each student row meets the mean of its teachers once
        (global_logits, targets.global_valid, targets.local_probs, targets.local_valid),
        (local_logits, targets.local_valid, targets.global_probs, targets.global_valid),
    )
    total = Term(jnp.float32(0), jnp.float32(0))
    for student, student_valid, teacher_probs, teacher_valid in one_way:
        num_teachers = teacher_valid.sum(1).astype(jnp.float32)  # B
        mean = safe_divide(teacher_probs.sum(1), num_teachers[:, None, None])  # B R Z; invalid views hold zeros
        weight = student_valid * num_teachers[:, None]  # B V
        total += cross_entropy(
            student,
            jnp.broadcast_to(mean[:, None], student.shape),
            jnp.broadcast_to(weight[..., None], student.shape[:3]),
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
