"""L_MGCL: multi-granularity contrastive learning on one set of features (a modality's, or the fused ones).

Student and teacher features of the same ground are compared at pixel, object and image level (SkySense, arXiv
2312.10115 sec. 3.3). Three steps, so that microbatches can share one Sinkhorn: ``teacher_rows`` (per microbatch),
``balance`` (once), ``student_terms`` (per microbatch); ``combine`` makes one loss of all sets. As plain loops:

    for sample b, student view v, teacher view u (not the same view), date t:
      pixel:  for drawn token s of v: student[s] against the teacher's features read at the ground of s
      object: the teacher clusters its tokens of u; a[s][c] = its soft assignment read at the ground of s;
              for cluster c: sum_s a[s][c] student[s] / sum_s a[s][c] against the same mean of the teacher's at s
      image:  mean of student tokens against mean of teacher tokens
      every row: CE(head(s(student row)), Sinkhorn over all rows of the granularity(head(s(teacher row)))), where
              s standardises by the teacher's rows of the granularity
    per granularity the mean over valid rows of all dates (a date with more clear ground weighs more [our choice])

A token s counts if it is usable and all teacher tokens it reads are; the object granularity's clustering and the
numbers of positions and clusters are our choice. In shapes, Ns, Nt, Nd as in matching.py, Nc clusters, n rows.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from skysense_jax.losses.contrastive import (
    Balance,
    Scalar,
    TargetEntropy,
    Term,
    cosines,
    cross_entropy,
    safe_divide,
    sinkhorn,
    standardise,
    target_entropy,
    unit,
)
from skysense_jax.losses.contrastive import balance as balance_rows
from skysense_jax.losses.matching import Match, comparable
from skysense_jax.losses.parts import Shared
from skysense_jax.losses.parts import total as sum_over_parts

GRANULARITIES = ("pixel", "object", "image")
# (granularity, standardised features [*rows D]) to unit rows and unit prototypes
Project = Callable[[str, Any], tuple[Any, Any]]

_CLUSTER_TEMPERATURE = 0.1  # of cosine similarities in the clustering [our choice]
_CLUSTER_SINKHORN_ITERATIONS = 3

_einsum = lambda *args: jnp.einsum(*args, precision=jax.lax.Precision.HIGHEST)  # noqa: E731  # fp32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """Features of the views of one shape on the cell grid, and where they may be compared."""

    features: Any  # B V T N D
    usable: Any  # B V T N, bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TeacherRows:
    """What the teacher says before the Sinkhorn. The first axis of every array is the batch.

    Attributes:
      features: per granularity, all teacher rows.
      valid: which of them count in the Sinkhorn.
      pairs: per granularity and group of student views, which (student row, teacher view) are compared.
      assignment: per group, the clusters moved to the student's tokens; empty without the object granularity.
    """

    features: Mapping[str, Any]  # {granularity: B n D}
    valid: Mapping[str, Any]  # {granularity: B n} bool
    pairs: Mapping[str, tuple[Any, ...]]  # pixel: B V U T Nd, object: B V U T Nc, image: B V U T; bool
    assignment: tuple[Any, ...]  # B V U T Ns Nc


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Targets:
    """What student rows are compared with.

    Attributes:
      rows: per granularity, all projected teacher rows, of unit length.
      valid, pairs, assignment: as in ``TeacherRows``.
      balance: per granularity, what makes distributions of the rows.
      entropy: per granularity, of those distributions.
    """

    rows: Mapping[str, Any]  # {granularity: B n bottleneck}
    valid: Mapping[str, Any]
    pairs: Mapping[str, tuple[Any, ...]]
    assignment: tuple[Any, ...]
    balance: Shared  # {granularity: Balance}
    entropy: Shared  # {granularity: TargetEntropy}


def teacher_rows(
    teacher: Tokens,
    student_usable: Sequence[Bool[Array, "B _V T _Ns"]],
    matches: Sequence[Match],
    *,
    num_clusters: int,
    cluster_iterations: int,
    granularities: Sequence[str] = GRANULARITIES,
) -> TeacherRows:
    """What the teacher's global views say to each group of student views, before the Sinkhorn."""
    features = jnp.where(teacher.usable[..., None], teacher.features.astype(jnp.float32), 0.0)
    compared = [comparable(match, usable, teacher.usable) for match, usable in zip(matches, student_usable)]
    rows, valid, pairs, assignment = {}, {}, {}, ()
    if "pixel" in granularities:
        weights = [_at_drawn(match.weights, match.drawn.value, axis=3) for match in matches]
        pairs["pixel"] = tuple(_at_drawn(c, m.drawn.value, axis=4) for c, m in zip(compared, matches))
        rows["pixel"] = [_einsum("bvusn,butnd->bvutsd", w, features) for w in weights]
        valid["pixel"] = pairs["pixel"]
    if "object" in granularities:
        clusters = cluster(features, teacher.usable, num_clusters=num_clusters, iterations=cluster_iterations)
        assignment = tuple(
            _einsum("bvusn,butnc->bvutsc", m.weights, clusters) * c[..., None] for m, c in zip(matches, compared)
        )
        mass = [a.sum(4) for a in assignment]  # B V U T Nc
        pulled = [_einsum("bvutsc,bvusn->bvutcn", a, m.weights) for a, m in zip(assignment, matches)]
        sums = [_einsum("bvutcn,butnd->bvutcd", p, features) for p in pulled]
        rows["object"] = [safe_divide(x, m[..., None]) for x, m in zip(sums, mass)]
        pairs["object"] = tuple(m >= 1 for m in mass)  # less than a token is no ground to compare
        valid["object"] = pairs["object"]
    if "image" in granularities:
        seen = teacher.usable.any(3)  # B U T
        rows["image"], valid["image"] = [mean_token(features, teacher.usable)], [seen]
        pairs["image"] = tuple(
            m.paired.value[:, :, None] & usable.any(3)[:, :, None] & seen[:, None]
            for m, usable in zip(matches, student_usable)
        )
    features = {name: _in_line(x) for name, x in rows.items()}
    return jax.lax.stop_gradient(
        TeacherRows(features, {name: _in_line(v, row_axes=0) for name, v in valid.items()}, pairs, assignment)
    )


def balance(rows: TeacherRows, *, project: Project, temperature: Scalar, iterations: int, parts: int = 1) -> Targets:
    """The teacher's balanced distributions: a standardisation and a Sinkhorn per granularity, over all valid rows.

    ``parts``: of the batch, whose prototype logits stand in memory one after the other.
    """
    projected: dict[str, Any] = {}
    balances: dict[str, Balance] = {}
    entropy: dict[str, TargetEntropy] = {}
    for name, features in rows.features.items():
        projected[name], balances[name] = balance_rows(
            features,
            rows.valid[name],
            project=lambda x, name=name: project(name, x),
            temperature=temperature,
            iterations=iterations,
            parts=parts,
        )
        entropy[name] = target_entropy(projected[name], rows.valid[name], balances[name], parts=parts)
    return Targets(projected, rows.valid, rows.pairs, rows.assignment, Shared(balances), Shared(entropy))


def student_terms(
    students: Sequence[Tokens],
    matches: Sequence[Match],
    targets: Targets,
    *,
    project: Project,
    temperature: Scalar,
    parts: int = 1,
) -> dict[str, Term]:
    """Per granularity, the cross entropy summed over all comparisons, and their number; ``parts`` as in ``balance``."""
    groups = [jnp.where(s.usable[..., None], s.features.astype(jnp.float32), 0.0) for s in students]
    terms = {}
    for name, teacher_rows in targets.rows.items():
        if name == "pixel":  # each drawn token is projected once, whatever the number of teacher views
            rows = [_at_drawn(x, match.drawn.value, axis=3) for x, match in zip(groups, matches)]
        elif name == "object":
            rows = [
                safe_divide(_einsum("bvutsc,bvtsd->bvutcd", a, x), a.sum(4)[..., None])
                for a, x in zip(targets.assignment, groups)
            ]
        else:
            rows = [mean_token(x, s.usable) for x, s in zip(groups, students)]
        of_teacher = targets.balance.value[name]
        projected, prototypes = project(name, standardise(_in_line(rows), of_teacher.statistics))

        def of_part(part, name=name, of_teacher=of_teacher, prototypes=prototypes):
            student, teacher, valid, pairs = part
            probs, weight = _means(name, of_teacher.probs(teacher, valid), pairs)
            return cross_entropy(cosines(student, prototypes), probs, weight, temperature=temperature)

        whole = (projected, teacher_rows, targets.valid[name], targets.pairs[name])
        terms[name] = sum_over_parts(of_part, whole, parts=parts)
    return terms


def _means(name, probs, pairs):
    """Of each student row, the mean distribution of the teacher rows it is compared with, and their number."""
    if name == "pixel":  # invalid rows are zero
        groups = [p.sum(2) for p in _out_of_line(probs, pairs)]
    elif name == "object":  # the student's row depends on the teacher's clusters: no mean over teacher views
        groups = _out_of_line(probs, pairs)
    else:
        images = probs.reshape(len(probs), *pairs[0].shape[2:], -1)  # b U T Z
        groups = [_einsum("bvut,butz->bvtz", p.astype(jnp.float32), images) for p in pairs]
    counts = [p.astype(jnp.float32) if name == "object" else p.sum(2).astype(jnp.float32) for p in pairs]
    weight = _in_line(counts, row_axes=0)
    return safe_divide(_in_line(groups), weight[..., None]), weight


def combine(terms: Mapping[str, Mapping[str, Term]], *, weights: Mapping[str, Any]) -> Term:
    """Sum over the sets of features that have something to say, and their number; ``weights`` by granularity.

        for each set: sum += sum_g weights[g] mean_g / sum_g weights[g], over the granularities g that have rows

    Linear in the sums of the terms, so that a microbatch may hold its own sums and the whole batch's counts.
    """
    total, zero = Term(jnp.float32(0), jnp.float32(0)), jnp.float32(0)
    for of_set in terms.values():
        speaks = {name: jnp.where(term.count > 0, weights[name], zero) for name, term in of_set.items()}
        weight = sum(speaks.values(), zero)
        value = sum((speaks[name] * term.mean() for name, term in of_set.items()), zero)
        total += Term(safe_divide(value, weight), (weight > 0).astype(jnp.float32))
    return total


def cluster(
    features: Float[Array, "B U T N D"], usable: Bool[Array, "B U T N"], *, num_clusters: int, iterations: int
) -> Float[Array, "B U T N Nc"]:
    """Soft, balanced assignment of each image's usable tokens to clusters; zero for other tokens. Our choice.

        x = tokens minus their mean, unit length; centroids = num_clusters of them, evenly spaced over the usable ones
        repeat: a = Sinkhorn(cosine(x, centroids)); centroids = unit(sum_n a[n] x[n])

    Without the centring the cosines of one image's tokens are all near 1 and the clusters all alike.
    """
    shape = usable.shape
    features, usable = rearrange(features, "B U T N D -> (B U T) N D"), rearrange(usable, "B U T N -> (B U T) N")
    mean = mean_token(features, usable)
    x = unit(jnp.where(usable[..., None], features - mean[:, None], 0.0))
    rank = jnp.cumsum(usable, axis=1) - 1
    seeds = ((jnp.arange(num_clusters) + 0.5) / num_clusters * usable.sum(1, keepdims=True)).astype(jnp.int32)
    is_seed = (rank[:, None, :] == seeds[:, :, None]) & usable[:, None, :]
    centroids = _einsum("icn,ind->icd", is_seed.astype(jnp.float32), x)
    balanced = jax.vmap(
        lambda scores, valid: sinkhorn(
            scores, valid, temperature=_CLUSTER_TEMPERATURE, iterations=_CLUSTER_SINKHORN_ITERATIONS
        )
    )
    assignment = balanced(_einsum("ind,icd->inc", x, centroids), usable)
    for _ in range(iterations - 1):
        centroids = unit(_einsum("inc,ind->icd", assignment, x))
        assignment = balanced(_einsum("ind,icd->inc", x, centroids), usable)
    return assignment.reshape(*shape, num_clusters)


def _at_drawn(x, drawn, *, axis):
    """``x`` [B V ...] with each view's drawn tokens taken from ``axis``."""
    return jax.vmap(lambda x, drawn: jnp.take(x, drawn, axis=axis - 1), in_axes=(1, 0), out_axes=1)(x, drawn)


def mean_token(features: Float[Array, "*images N D"], usable: Bool[Array, "*images N"]) -> Float[Array, "*images D"]:
    """Mean over the usable tokens, fp32; zero where there is none."""
    total = jnp.where(usable[..., None], features.astype(jnp.float32), 0.0).sum(-2)
    return safe_divide(total, usable.sum(-1).astype(jnp.float32)[..., None])


def _in_line(groups, *, row_axes=1):
    """All groups' [B ...] rows behind each other: [B n] and the last ``row_axes`` axes."""
    lines = [x.reshape(len(x), -1, *x.shape[x.ndim - row_axes :]) for x in groups]
    return jnp.concatenate(lines, axis=1)


def _out_of_line(line, like):
    """[B n Z], taken apart into groups with the shapes of ``like`` and Z."""
    groups, start = [], 0
    for x in like:
        end = start + math.prod(x.shape[1:])
        groups.append(line[:, start:end].reshape(*x.shape, line.shape[-1]))
        start = end
    return groups
