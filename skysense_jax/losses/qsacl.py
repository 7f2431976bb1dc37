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
    Balance,
    Scalar,
    Term,
    balance,
    cosines,
    cross_entropy,
    entropy,
    safe_divide,
    standardise,
)
from skysense_jax.losses.parts import Shared, total

Project = Callable[[Any], tuple[Any, Any]]  # standardised features [*rows D] to unit rows and unit prototypes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuerySays:
    """What the teacher's targets tell of a query, of log Z nats that Z prototypes can tell.

    Up to log R of them go into which query it is, a constant; Z must be well above R (benchmarks/results.md).

    Attributes:
      usage: share of queries that can be told apart by what they stand for: 1/R if all are alike, 1 if none overlap.
      content: nats that a target tells beyond its query, of the sample and the view; 0: a constant per query satisfies
        the loss.
    """

    usage: Any
    content: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QueryTargets:
    """What the student's queries are compared with.

    Attributes:
      rows: the teacher's projected queries, of unit length; global views first.
      global_valid, local_valid: views with a usable cell.
      balance: what makes distributions of the rows.
      says: what those distributions tell.
    """

    rows: Any  # B Vg+Vl R bottleneck
    global_valid: Any  # B Vg
    local_valid: Any  # B Vl
    balance: Shared  # Balance
    says: Shared  # QuerySays


def query_targets(
    global_queries: Float[Array, "B Vg R D"],
    local_queries: Float[Array, "B Vl R D"],
    global_valid: Bool[Array, "B Vg"],
    local_valid: Bool[Array, "B Vl"],
    *,
    project: Project,
    temperature: Scalar,
    iterations: int,
    parts: int = 1,
) -> QueryTargets:
    """The teacher's distributions: one standardisation and one Sinkhorn over all queries, views and valid samples.

    Balance per query would forbid a query to specialise [our choice]. ``parts``: of the batch, whose prototype logits
    stand in memory one after the other.
    """
    queries = jnp.concatenate((global_queries, local_queries), axis=1)
    valid = _of_rows(jnp.concatenate((global_valid, local_valid), axis=1), queries.shape[2])
    rows, of_teacher = balance(
        queries, valid, project=project, temperature=temperature, iterations=iterations, parts=parts
    )
    says = query_says(rows, valid, of_teacher, parts=parts)
    return QueryTargets(rows, global_valid, local_valid, Shared(of_teacher), Shared(says))


def query_term(
    global_queries: Float[Array, "B Vg R D"],
    local_queries: Float[Array, "B Vl R D"],
    targets: QueryTargets,
    *,
    project: Project,
    temperature: Scalar,
    parts: int = 1,
) -> Term:
    """The loss of the student's queries, and the number of (sample, global view, local view, query) it sums over.

    for b, for valid g, for valid l, for i:
        sum += (CE(student[g][i], teacher[l][i]) + CE(student[l][i], teacher[g][i])) / 2
    """
    num_global, of_teacher = global_queries.shape[1], targets.balance.value
    queries = jnp.concatenate((global_queries, local_queries), axis=1)
    rows, prototypes = project(standardise(queries, of_teacher.statistics))

    def of_part(part):
        student, teacher, global_valid, local_valid = part
        halves = lambda x: (x[:, :num_global], x[:, num_global:])  # noqa: E731
        valid = jnp.concatenate((global_valid, local_valid), axis=1)
        probs = halves(of_teacher.probs(teacher, _of_rows(valid, teacher.shape[2])))
        logits = halves(cosines(student, prototypes))
        one_way = (  # CE is linear in the target: each student row meets the mean of its teachers once
            (logits[0], global_valid, probs[1], local_valid),
            (logits[1], local_valid, probs[0], global_valid),
        )
        both = Term(jnp.float32(0), jnp.float32(0))
        for student_logits, student_valid, teacher_probs, teacher_valid in one_way:
            num_teachers = teacher_valid.sum(1).astype(jnp.float32)  # b
            mean = safe_divide(teacher_probs.sum(1), num_teachers[:, None, None])  # b R Z; invalid views hold zeros
            both += cross_entropy(
                student_logits,
                jnp.broadcast_to(mean[:, None], student_logits.shape),
                _of_rows(student_valid * num_teachers[:, None], student_logits.shape[2]),
                temperature=temperature,
            )
        return both

    both = total(of_part, (rows, targets.rows, targets.global_valid, targets.local_valid), parts=parts)
    return Term(both.sum / 2, both.count / 2)


def query_says(
    rows: Float[Array, "B V R D"], valid: Bool[Array, "B V R"], balance: Balance, *, parts: int = 1
) -> QuerySays:
    """What the distributions of the valid rows tell of the query, and of what it sees; 0 without a valid row.

    With p_r the mean target of query r, usage is exp(H(mean over r of p_r) - mean over r of H(p_r)) / R, content is
    mean over r of H(p_r) - mean over rows of H(row). Our definitions.
    """

    def of_part(part):
        probs = balance.probs(*part)
        return probs.sum(1), entropy(probs).sum(1)  # of each sample: devices exchange them once

    mass, entropies = (x.sum(0) for x in total(of_part, (rows, valid), parts=parts))  # R Z, R
    count = valid.sum((0, 1), dtype=jnp.float32)
    of_query = safe_divide(mass, count[:, None])
    of_queries = entropy(of_query)
    usage = jnp.exp(entropy(of_query.mean(0)) - of_queries.mean()) / rows.shape[2]
    content = (of_queries - safe_divide(entropies, count)).mean()
    return QuerySays(jnp.where(count.sum() > 0, usage, 0.0), content)


def _of_rows(of_views, num_queries):
    """A view's value for each of its queries."""
    return jnp.broadcast_to(of_views[..., None], (*of_views.shape, num_queries))
