"""One training step: the only place where loss terms are weighted and summed.

Order: photometric changes; the teacher's features and targets, and those of a frozen network that is distilled; the
student's loss and gradient; the update, skipped when a number is not finite; the teacher's moving average. Microbatches
(gradient accumulation) change nothing: the teacher sees all of them, then comes one Sinkhorn, then the student sees
them, each term divided by its count over the whole batch. Next: sides.py (what both networks are asked), losses/ (each
term).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jaxtyping import Array, Bool, Float, UInt32

from skysense_jax.batch import Batch
from skysense_jax.losses import distil, koleo, matching, mgcl, parts, qsacl, text_alignment
from skysense_jax.losses.contrastive import Term, unit
from skysense_jax.modalities import Modality
from skysense_jax.models.skysense import SkySense, usable_cells
from skysense_jax.photometric import named_key
from skysense_jax.sides import FUSED, Inputs, Side, distilled_sets, feature_sets, prepare_inputs
from skysense_jax.train_state import TrainState

Metrics = Mapping[str, Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class Schedules:
    """Functions of the step: the learning rate, the share of itself that the teacher keeps, its temperature."""

    learning_rate: Callable[[Any], Any]
    ema_momentum: Callable[[Any], Any]
    teacher_temperature: Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Objective:
    """The fields of ``config.objective`` that the step reads, and the text table [L X] (None with its term off).

    Attributes:
      logit_parts: parts of a microbatch whose prototype logits stand in memory one after the other.
      distil: the fields of its section that say how features of a frozen network are compared with.
    """

    weights: Mapping[str, float]
    mgcl: Mapping[str, Any]
    student_temperature: float
    sinkhorn_iterations: int
    text_table: Any = None
    logit_parts: int = 1
    distil: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def granularities(self) -> Mapping[str, float]:
        """Weights of the granularities that are on."""
        weights = {name: self.mgcl[f"{name}_weight"] for name in mgcl.GRANULARITIES}
        return {name: weight for name, weight in weights.items() if weight > 0}

    @property
    def levels(self) -> Mapping[str, float]:
        """Weights of the levels that are distilled; none with the term off."""
        weights = {name: self.distil[f"{name}_weight"] for name in distil.LEVELS if self.weights["distil"] > 0}
        return {name: weight for name, weight in weights.items() if weight > 0}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Seen:
    """What the teacher sees, the batch first, before the Sinkhorn that all samples share.

    Attributes:
      rows: per set of features, what MGCL compares with; empty with the term off.
      queries: of the global and of the local views, and which views have a usable cell; None with the term off.
      images: per set the mean token of each image, and whether it has one.
    """

    rows: Mapping[str, mgcl.TeacherRows]
    queries: Any  # (B Vg R D, B Vl R D, B Vg, B Vl)
    images: Mapping[str, tuple[Any, Any]]  # {set: (B V T D, B V T)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Targets:
    """What the student is compared with: per set of features, for the queries, and of a frozen network (the last two
    None with their terms off)."""

    mgcl: Mapping[str, mgcl.Targets]
    queries: qsacl.QueryTargets | None
    frozen: distil.Targets | None = None


def teacher_sees(teacher: Side, inputs: Inputs, *, objective: Objective) -> Seen:
    """The teacher's features of some samples, as far as the losses compare with them."""
    features = teacher.encode(inputs, "global")
    sets, batch = feature_sets(features), inputs.batch
    local_usable = usable_cells(batch.local_views, batch.present)
    local_usable[FUSED] = jnp.stack([u.any(2) for u in local_usable.values()]).any(0)[:, :, None]
    rows = {}
    for name, tokens in sets.items() if objective.weights["mgcl"] > 0 else ():
        rows[name] = mgcl.teacher_rows(
            tokens,
            [tokens.usable, rearrange(local_usable[name], "B V T P Q -> B V T (P Q)")],
            inputs.matches,
            num_clusters=objective.mgcl["num_clusters"],
            cluster_iterations=objective.mgcl["cluster_iterations"],
            granularities=tuple(objective.granularities),
        )
    queries = None
    if objective.weights["qsacl"] > 0:
        local = teacher.encode(inputs, "local")
        queries = (
            teacher.queries(features),
            teacher.queries(local),
            features.fused_usable.any((2, 3)),
            local.fused_usable.any((2, 3)),
        )
    images = {name: (mgcl.mean_token(t.features, t.usable), t.usable.any(3)) for name, t in sets.items()}
    return Seen(rows, queries, images)


def teacher_targets(teacher: Side, seen: Seen, objective: Objective, *, temperature: Float[Array, ""]) -> Targets:
    """What the teacher says of all samples, balanced over them; a constant for the student."""
    common = dict(temperature=temperature, iterations=objective.sinkhorn_iterations, parts=objective.logit_parts)
    of_sets = {name: mgcl.balance(rows, project=teacher.project(name), **common) for name, rows in seen.rows.items()}
    queries = None
    if seen.queries is not None:
        queries = qsacl.query_targets(*seen.queries, project=teacher.project_queries, **common)
    return jax.lax.stop_gradient(Targets(of_sets, queries))


def frozen_sees(frozen: Side, inputs: Inputs, *, objective: Objective) -> distil.Sets:
    """The features of a frozen network of some samples' global views, of the levels that are distilled."""
    sets = distilled_sets(frozen.encode(inputs, "global", return_stage3="stage3" in objective.levels))
    return {level: sets[level] for level in objective.levels}


def distil_targets(sets: distil.Sets, batch: Batch) -> distil.Targets:
    """What the frozen network says of all samples, and where the student's local views read it."""
    sampling: dict[str, dict[str, Any]] = {}
    near, far = batch.global_views, batch.local_views
    cells = {"teacher_grid": near.labels.shape[2:4], "student_grid": far.labels.shape[2:4]}
    found = {}  # by tokens along the side of a cell
    for level, of_level in sets.items():
        sampling[level] = {}
        for name, tokens in of_level.items():
            per_cell = math.isqrt(tokens.usable.shape[3] // math.prod(cells["teacher_grid"]))
            if per_cell not in found:
                grids = {key: (rows * per_cell, columns * per_cell) for key, (rows, columns) in cells.items()}
                found[per_cell] = matching.sample_views(far.affine, near.affine, **grids, tokens_per_cell=per_cell)
            sampling[level][name] = found[per_cell]
    return jax.lax.stop_gradient(distil.Targets(distil.standardised(sets), sampling))


def student_sums(student: Side, inputs: Inputs, targets: Targets, objective: Objective) -> dict[str, Any]:
    """The loss table of some samples, before anything is divided: each term as (sum, count) under its weight's name.

    L_MGCL as one such pair per set and granularity; also what else is logged, and the load of experts. Counts depend
    on masks and the teacher, never on the student's features.
    """
    behind_stage3 = "stage3" in objective.levels
    features = {name: student.encode(inputs, name, return_stage3=behind_stage3) for name in ("global", "local")}
    sets = {name: feature_sets(x) for name, x in features.items()}
    weights, sums = objective.weights, {}
    common = dict(temperature=objective.student_temperature, parts=objective.logit_parts)

    if weights["mgcl"] > 0:
        sums["mgcl"] = {
            name: mgcl.student_terms(
                [sets["global"][name], sets["local"][name]],
                inputs.matches,
                targets.mgcl[name],
                project=student.project(name),
                **common,
            )
            for name in targets.mgcl
        }

    if weights["qsacl"] > 0:
        sums["qsacl"] = qsacl.query_term(
            student.queries(features["global"]),
            student.queries(features["local"]),
            targets.queries,
            project=student.project_queries,
            **common,
        )

    if weights["text_alignment"] > 0:
        sums["text_alignment"] = Term(jnp.float32(0), jnp.float32(0))
        for name, views in (("global", inputs.batch.global_views), ("local", inputs.batch.local_views)):
            cells, scale = student.describe(features[name].fused)
            sums["text_alignment"] += text_alignment.text_alignment(
                cells, views.labels, features[name].fused_usable, table=jnp.asarray(objective.text_table), scale=scale
            )
        sums["text_scale"] = Term(scale, jnp.float32(1))

    if weights["distil"] > 0:
        sums["distil"] = distil.student_terms(
            [distilled_sets(features[name]) for name in ("global", "local")],
            targets.frozen,
            project=student.distilled,
            distance=objective.distil["distance"],
        )

    if weights["koleo"] > 0:
        fused = sets["global"][FUSED]
        images = mgcl.mean_token(fused.features, fused.usable)[:, :, 0]
        sums["koleo"] = koleo.koleo(images, fused.usable.any((2, 3)))

    if features["global"].router is not None:
        router = features["global"].router + features["local"].router
        sums["balance"], sums["router_z"] = Term(*router.balance), Term(*router.z)
        sums["experts/dropped"], sums["experts/load"] = Term(*router.dropped), router.load
    return sums


def loss_table(sums: Mapping[str, Any], objective: Objective) -> dict[str, Float[Array, ""]]:
    """Each term's value, under the name of its weight. Linear in the sums, the counts being those of the batch."""
    table = {name: sums[name].mean() for name in objective.weights if isinstance(sums.get(name), Term)}
    if "mgcl" in sums:
        table["mgcl"] = mgcl.combine(sums["mgcl"], weights=objective.granularities).mean()
    if "distil" in sums:
        table["distil"] = distil.combine(sums["distil"], weights=objective.levels).mean()
    return table


def student_gradient(
    student: Callable[[Any], Side],
    params: Any,
    inputs: Inputs,
    targets: Targets,
    objective: Objective,
    *,
    microbatches: int,
) -> tuple[Float[Array, ""], dict[str, Any], Any]:
    """The loss, the batch's ``student_sums`` and the gradient of the loss, worked out in microbatches."""

    def loss_of(params, inputs, targets, counts):
        sums = student_sums(student(params), inputs, targets, objective)
        table = loss_table(sums if counts is None else _with_counts(sums, counts), objective)
        return sum(objective.weights[name] * value for name, value in table.items()), sums

    grad = jax.value_and_grad(loss_of, has_aux=True)
    if microbatches == 1:
        (loss, sums), gradient = grad(params, inputs, targets, None)
        return loss, sums, gradient
    # only counts are used of this, and no feature is in them: the compiler leaves the network out
    counts = student_sums(student(params), inputs, targets, objective)

    def add(so_far, part):
        (loss, sums), gradient = grad(params, *part, counts)
        return jax.tree.map(jnp.add, so_far, (loss, sums, gradient))

    start = jax.tree.map(jnp.zeros_like, (jnp.float32(0), counts, params))
    return parts.fold(add, start, (inputs, targets), parts=microbatches)


def _with_counts(sums, counts):
    """``sums``, each term with the count of the whole batch."""
    is_term = lambda leaf: isinstance(leaf, Term)  # noqa: E731
    swap = lambda own, whole: Term(own.sum, whole.count) if is_term(own) else own  # noqa: E731
    return jax.tree.map(swap, sums, counts, is_leaf=is_term)


@dataclasses.dataclass(frozen=True)
class Sides:
    """Both networks and what they are asked of a batch.

    Attributes:
      frozen: a trained network of another size that the student learns from as well; None: there is none.
      microbatches: parts of a batch that go through the networks one after the other.
    """

    network: SkySense
    modalities: tuple[Modality, ...]
    objective: Objective
    schedules: Schedules
    photometric_strength: float
    microbatches: int = 1
    frozen: SkySense | None = None

    def student(self, params: Any) -> Side:
        return Side(self.network, params, drops=True)

    def look(
        self, state: TrainState, batch: Batch, seed: UInt32[Array, ""], frozen: Any = None
    ) -> tuple[Inputs, Seen, Targets]:
        """What both networks see of a batch, and what the teacher says of it, and the network of ``frozen`` parameters
        if there is one.

        ``seed`` and the step's number give photometric changes, drop path and positions.
        """
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        with jax.named_scope("inputs"):  # scopes name the parts of a plan (plan/parts.py)
            inputs = prepare_inputs(
                batch,
                self.modalities,
                self.network,
                key=named_key(key, "inputs"),
                strength=self.photometric_strength,
                num_positions=self.objective.mgcl["num_positions"],
            )
        # fp32; each layer casts what it multiplies. An average stored in bf16 would stand still.
        teacher = Side(self.network, state.teacher, drops=False)
        temperature = self.schedules.teacher_temperature(state.step)
        with jax.named_scope("teacher"):
            sees = functools.partial(teacher_sees, teacher, objective=self.objective)
            seen = parts.each(sees, inputs, parts=self.microbatches)
            targets = teacher_targets(teacher, seen, self.objective, temperature=temperature)
        if self.objective.levels:
            with jax.named_scope("frozen_teacher"):
                side = Side(self.frozen, frozen, drops=False, train=False)
                sees = functools.partial(frozen_sees, side, objective=self.objective)
                sets = parts.each(sees, inputs, parts=self.microbatches)
                targets = dataclasses.replace(targets, frozen=distil_targets(sets, batch))
        return inputs, seen, targets


def make_train_step(
    sides: Sides, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Batch, UInt32[Array, ""], Any], tuple[TrainState, Metrics]]:
    """The function (state, batch, seed of the run, frozen parameters or None) -> (state, metrics), to be jitted under
    ``jax.set_mesh`` with the state donated. The seed is an argument, so that runs which differ in it share a program.

    Metrics are fp32 scalars; ``loss`` is the weighted sum of the ``loss/...`` terms. A step whose loss or gradient is
    not finite leaves parameters, teacher and optimizer as they were and counts itself.
    """
    objective, schedules = sides.objective, sides.schedules

    def train_step(
        state: TrainState, batch: Batch, seed: UInt32[Array, ""], frozen: Any = None
    ) -> tuple[TrainState, Metrics]:
        inputs, seen, targets = sides.look(state, batch, seed, frozen)
        with jax.named_scope("student"):
            loss, sums, gradient = student_gradient(
                sides.student, state.student, inputs, targets, objective, microbatches=sides.microbatches
            )
        gradient_norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)

        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.student)
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)  # noqa: E731
        student = keep(optax.apply_updates(state.student, updates), state.student)
        momentum = schedules.ema_momentum(state.step)
        average = jax.tree.map(lambda t, s: momentum * t + (1 - momentum) * s, state.teacher, student)
        new_state = TrainState(
            step=state.step + 1,
            student=student,
            teacher=keep(average, state.teacher),
            optimizer=keep(optimizer_state, state.optimizer),
            nonfinite_in_row=jnp.where(finite, 0, state.nonfinite_in_row + 1),
            nonfinite_total=state.nonfinite_total + ~finite,
        )
        logged = {
            "loss": loss,
            "gradient_norm": gradient_norm,
            "learning_rate": schedules.learning_rate(
                state.step - state.nonfinite_total
            ),  # the optimizer counts updates
            "teacher_temperature": schedules.teacher_temperature(state.step),
            "ema_momentum": momentum,
            "nonfinite_in_row": new_state.nonfinite_in_row,
            "nonfinite_total": new_state.nonfinite_total,
            **{f"loss/{name}": value for name, value in loss_table(sums, objective).items()},
            **_signals(sums),
            **_collapse_signals(seen, targets),
        }
        return new_state, {name: jnp.asarray(value, jnp.float32) for name, value in sorted(logged.items())}

    return train_step


def _signals(sums: Mapping[str, Any]) -> dict[str, Any]:
    """What is logged beside the terms: parts of L_MGCL, the temperature of text, what routers did."""
    signals = {
        f"mgcl/{name}_{granularity}": term.mean()
        for name, of_set in sums.get("mgcl", {}).items()
        for granularity, term in of_set.items()
    }
    signals |= {
        f"distil/{level}_{name}": term.mean()
        for level, of_level in sums.get("distil", {}).items()
        for name, term in of_level.items()
    }
    signals |= {name: sums[name].mean() for name in ("text_scale", "experts/dropped") if name in sums}
    if "experts/load" in sums:
        load = sums["experts/load"]
        share = load / jnp.maximum(load.sum(1, keepdims=True), 1.0)
        for block, row in enumerate(share):
            signals |= {f"experts/load_block{block}_expert{e}": value for e, value in enumerate(row)}
            signals[f"experts/skew_block{block}"] = row.max() * len(row)  # largest load over the mean: 1 is even
    return signals


def _spread(images: Float[Array, "B V T D"], seen: Bool[Array, "B V T"]) -> Float[Array, ""]:
    """Standard deviation of unit image features over the batch, times sqrt(D): 0 collapsed, 1 isotropic."""
    x, weight = unit(images), seen[..., None].astype(jnp.float32)
    count = jnp.maximum(weight.sum(), 1.0)
    mean = (x * weight).sum((0, 1, 2)) / count
    return jnp.sqrt(((jnp.square(x - mean) * weight).sum((0, 1, 2)) / count).sum())


def _collapse_signals(seen: Seen, targets: Targets) -> dict[str, Any]:
    """Entropy of the teacher's targets, spread of its features, use of the queries."""
    signals = {f"feature_std/{name}": _spread(*images) for name, images in seen.images.items()}
    for name, of_set in targets.mgcl.items():
        for granularity, entropy in of_set.entropy.value.items():
            signals[f"target_entropy/{name}_{granularity}"] = entropy.of_rows
            signals[f"target_entropy_of_mean/{name}_{granularity}"] = entropy.of_mean
    if targets.queries is not None:
        signals["query_usage"] = targets.queries.says.value.usage
        signals["query_content"] = targets.queries.says.value.content
    return signals
