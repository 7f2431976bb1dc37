"""Distillation: a student's features against those of a frozen, trained network of another size, on the same ground.

At up to three levels: tokens behind stage 3, behind stage 4 (both per modality) and fused cells. The student's rows go
through a linear layer to the frozen network's width, which nothing but this loss reads. As plain loops:

    for a set of features (a modality at a level, or the fused cells), sample b, student view v, date t, token s:
      y = mean over the frozen network's views u that see the ground of s: its features of date t read there
          (a view that both see, u = v: its token s itself, and no other view)
      sum += distance(project(student[s]), y);  count += 1
    per level the mean over sets that have a token, of levels the mean by their weights

The frozen features are standardised over the batch first, as rows before a prototype head (contrastive.standardise):
otherwise what all of them share would be nearly all of a cosine [our choice; AM-RADIO, arXiv 2312.06709, and its
successors scale each teacher's features alike]. A token counts if it is usable and all that is read for it is. In
shapes, Ns and Nt as in matching.py, U the frozen network's views.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from skysense_jax.losses.contrastive import Term, row_statistics, safe_divide, standardise, unit
from skysense_jax.losses.matching import Sampling, comparable
from skysense_jax.losses.mgcl import Tokens

LEVELS = ("stage3", "stage4", "fused")
DISTANCES = ("cosine", "smooth_l1")
Sets = Mapping[str, Mapping[str, Tokens]]  # {level: {set: Tokens}}

_einsum = lambda *args: jnp.einsum(*args, precision=jax.lax.Precision.HIGHEST)  # noqa: E731  # fp32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Targets:
    """What the student's features are compared with; the first axis of every array is the batch.

    Attributes:
      sets: the frozen network's tokens of the global views, standardised.
      sampling: per level and set, how to read them at the tokens of the student's local views.
    """

    sets: Sets
    sampling: Mapping[str, Mapping[str, Sampling]]


def standardised(sets: Sets) -> Sets:
    """The frozen network's tokens of the whole batch, each set by the statistics of its usable rows; no gradient."""

    def of_set(tokens: Tokens) -> Tokens:
        statistics = row_statistics(tokens.features, tokens.usable)
        return Tokens(jax.lax.stop_gradient(standardise(tokens.features, statistics)), tokens.usable)

    return {level: {name: of_set(tokens) for name, tokens in of_level.items()} for level, of_level in sets.items()}


def read_views(
    frozen: Tokens, sampling: Sampling, student_usable: Bool[Array, "B V T Ns"]
) -> tuple[Float[Array, "B V T Ns D"], Bool[Array, "B V T Ns"]]:
    """The frozen features at each student token, a mean over the views that see it, and whether one does."""
    seen = comparable(sampling, student_usable, frozen.usable).astype(jnp.float32)  # B V U T Ns
    count = seen.sum(2)
    total = _einsum("bvuts,bvusn,butnd->bvtsd", seen, sampling.weights, frozen.features)
    return safe_divide(total, count[..., None]), count > 0


def distances(
    rows: Float[Array, "*rows D"], targets: Float[Array, "*rows D"], *, distance: str
) -> Float[Array, "*rows"]:
    """Of each row from its target, fp32.

        cosine:    1 - rows[n] @ targets[n] / (|rows[n]| |targets[n]|)
        smooth_l1: mean_d of x^2 / 2 where |x| < 1, else |x| - 1/2;  x = rows[n][d] - targets[n][d]

    Raises:
      ValueError: an unknown distance.
    """
    rows, targets = rows.astype(jnp.float32), targets.astype(jnp.float32)
    if distance == "cosine":
        return 1 - (unit(rows) * unit(targets)).sum(-1)
    if distance == "smooth_l1":
        apart = jnp.abs(rows - targets)
        return jnp.where(apart < 1, 0.5 * jnp.square(apart), apart - 0.5).mean(-1)
    raise ValueError(f"config.objective.distil.distance: got {distance!r}; wanted one of {DISTANCES}")


def student_terms(
    views: Sequence[Sets],
    targets: Targets,
    *,
    project: Callable[[str, Any], Any],
    distance: str,
) -> dict[str, dict[str, Term]]:
    """Per level and set the sum over tokens, and their number, of the student's global and local ``views``.

    ``project``: of a level's name and features, these at the frozen network's width.
    """
    global_views, local_views = views
    terms: dict[str, dict[str, Term]] = {}
    for level, of_level in targets.sets.items():
        terms[level] = {}
        for name, frozen in of_level.items():
            near, far = global_views[level][name], local_views[level][name]
            read, seen = read_views(frozen, targets.sampling[level][name], far.usable)
            pairs = ((near, frozen.features, near.usable & frozen.usable), (far, read, seen))
            terms[level][name] = Term(jnp.float32(0), jnp.float32(0))
            for student, target, counts in pairs:
                apart = distances(project(level, student.features), target, distance=distance)
                terms[level][name] += Term(jnp.where(counts, apart, 0.0).sum(), counts.sum(dtype=jnp.float32))
    return terms


def combine(terms: Mapping[str, Mapping[str, Term]], *, weights: Mapping[str, float]) -> Term:
    """One number of all: the mean over sets that hold a token at each level, levels by their ``weights``.

    As (sum, 1), or (0, 0) if no set holds any. Linear in the sums of the terms, as ``mgcl.combine``.
    """
    total, weight = jnp.float32(0), jnp.float32(0)
    for level, of_level in terms.items():
        speaks = [(term.count > 0).astype(jnp.float32) for term in of_level.values()]
        value = safe_divide(sum(term.mean() for term in of_level.values()), sum(speaks))
        speaks_at_all = weights[level] * (sum(speaks) > 0)
        total, weight = total + speaks_at_all * value, weight + speaks_at_all
    return Term(safe_divide(total, weight), (weight > 0).astype(jnp.float32))
