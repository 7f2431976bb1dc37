"""One training step: the only place where loss terms are weighted and summed.

Order: photometric changes; the teacher's features and targets; the student's loss and gradient; the update, skipped
when a number is not finite; the teacher's moving average. Targets and terms are apart, so that gradient accumulation
can put one Sinkhorn between them. Next: losses/ (each term), models/skysense.py (the network).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jaxtyping import Array, Float

from skysense_jax import photometric
from skysense_jax.batch import Batch
from skysense_jax.losses import koleo, matching, mgcl, qsacl, text_alignment
from skysense_jax.losses.contrastive import Term, unit
from skysense_jax.modalities import Modality
from skysense_jax.models.skysense import Features, SkySense, usable_cells
from skysense_jax.photometric import named_key
from skysense_jax.train_state import TrainState

FUSED = "fused"  # the set of fused features, beside one set per modality
Metrics = Mapping[str, Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class Schedules:
    """Functions of the step: the learning rate, the share of itself that the teacher keeps, its temperature."""

    learning_rate: Callable[[Any], Any]
    ema_momentum: Callable[[Any], Any]
    teacher_temperature: Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Objective:
    """The fields of ``config.objective`` that the step reads, and the text table [L X] (None with its term off)."""

    weights: Mapping[str, float]
    mgcl: Mapping[str, Any]
    student_temperature: float
    sinkhorn_iterations: int
    text_table: Any = None

    @property
    def granularities(self) -> Mapping[str, float]:
        """Weights of the granularities that are on."""
        weights = {name: self.mgcl[f"{name}_weight"] for name in mgcl.GRANULARITIES}
        return {name: weight for name, weight in weights.items() if weight > 0}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """A batch ready for the network: normalised images of both view shapes, and how views lie on each other."""

    batch: Batch
    global_images: Any  # {m: B V T H W C}
    local_images: Any
    matches: tuple[matching.Match, matching.Match]  # of global and of local student views on the teacher's


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Targets:
    """What the student is compared with: per set of features, and for the queries (None with the term off)."""

    mgcl: Mapping[str, mgcl.Targets]
    queries: qsacl.QueryTargets | None
    feature_std: Mapping[str, Any]


def prepare_inputs(
    batch: Batch, modalities: tuple[Modality, ...], *, key: jax.Array, strength: float, num_positions: int
) -> Inputs:
    """The batch with photometric changes drawn from ``key``, normalised, and its views matched on the ground."""
    images, matches = [], []
    teacher_grid = batch.global_views.labels.shape[2:4]
    for name, views in (("global", batch.global_views), ("local", batch.local_views)):
        view_key = named_key(key, name)
        images.append(photometric.prepare(views, modalities, key=named_key(view_key, "photometric"), strength=strength))
        matches.append(
            matching.match_views(
                views.affine,
                batch.global_views.affine,
                student_grid=views.labels.shape[2:4],
                teacher_grid=teacher_grid,
                same=name == "global",
                key=named_key(view_key, "positions"),
                num_positions=num_positions,
            )
        )
    return Inputs(batch, *images, tuple(matches))


def feature_sets(features: Features) -> dict[str, mgcl.Tokens]:
    """Tokens of each modality, and of the fused features as one date."""
    sets = {
        name: mgcl.Tokens(
            rearrange(x, "B V T P Q D -> B V T (P Q) D"), rearrange(features.usable[name], "B V T P Q -> B V T (P Q)")
        )
        for name, x in features.modality.items()
    }
    sets[FUSED] = mgcl.Tokens(
        rearrange(features.fused, "B V P Q D -> B V 1 (P Q) D"),
        rearrange(features.fused_usable, "B V P Q -> B V 1 (P Q)"),
    )
    return sets


class Side:
    """The student's or the teacher's network with its parameters, as the losses call it."""

    def __init__(self, model: SkySense, params: Any, *, drop_key: jax.Array | None = None):
        self._model, self._params, self._drop_key = model, params, drop_key

    def encode(self, inputs: Inputs, name: str) -> Features:
        """Features of the global or local views, with the routing of training."""
        images = inputs.global_images if name == "global" else inputs.local_images
        views = inputs.batch.global_views if name == "global" else inputs.batch.local_views
        rngs = {} if self._drop_key is None else {"drop_path": named_key(self._drop_key, name)}
        return self._model.apply(
            {"params": self._params},
            images,
            views,
            present=inputs.batch.present,
            day_of_year=inputs.batch.day_of_year,
            train=True,
            rngs=rngs,
            method="encode",
        )

    def project(self, set_name: str) -> mgcl.Project:
        """The projection of a set of features, by granularity."""
        source = FUSED if set_name == FUSED else "modality"
        return lambda granularity, x: self._call("project", f"{source}_{granularity}", x)

    def queries(self, features: Features) -> Float[Array, "B V R D"]:
        """The semantic queries of each view."""
        return self._call("aggregate", features)

    def project_queries(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows Z"]:
        """The projection of standardised queries."""
        return self._call("project", "query", x)

    def describe(self, fused: Float[Array, "*rows D"]) -> tuple[Float[Array, "*rows X"], Float[Array, ""]]:
        """Cell features in the text encoder's space, and the scale of their similarities."""
        return self._call("describe", fused)

    def _call(self, method: str, *args):
        return self._model.apply({"params": self._params}, *args, method=method)


def teacher_targets(teacher: Side, inputs: Inputs, objective: Objective, *, temperature: Float[Array, ""]) -> Targets:
    """What the teacher says of its views; a constant for the student."""
    features = teacher.encode(inputs, "global")
    sets, batch = feature_sets(features), inputs.batch
    local_usable = usable_cells(batch.local_views, batch.present)
    local_usable[FUSED] = jnp.stack([u.any(2) for u in local_usable.values()]).any(0)[:, :, None]
    of_sets = {}
    for name, tokens in sets.items() if objective.weights["mgcl"] > 0 else ():
        rows = mgcl.teacher_rows(
            tokens,
            [tokens.usable, rearrange(local_usable[name], "B V T P Q -> B V T (P Q)")],
            inputs.matches,
            num_clusters=objective.mgcl["num_clusters"],
            cluster_iterations=objective.mgcl["cluster_iterations"],
            granularities=tuple(objective.granularities),
        )
        of_sets[name] = mgcl.balance(
            rows, project=teacher.project(name), temperature=temperature, iterations=objective.sinkhorn_iterations
        )
    queries = None
    if objective.weights["qsacl"] > 0:
        local = teacher.encode(inputs, "local")
        queries = qsacl.query_targets(
            teacher.queries(features),
            teacher.queries(local),
            features.fused_usable.any((2, 3)),
            local.fused_usable.any((2, 3)),
            project=teacher.project_queries,
            temperature=temperature,
            iterations=objective.sinkhorn_iterations,
        )
    return jax.lax.stop_gradient(Targets(of_sets, queries, {name: _spread(t) for name, t in sets.items()}))


def student_terms(
    student: Side, inputs: Inputs, targets: Targets, objective: Objective
) -> tuple[dict[str, Term], dict[str, Any]]:
    """The loss table: each term as (sum, count) under the name of its weight, and what else is logged."""
    features = {name: student.encode(inputs, name) for name in ("global", "local")}
    sets = {name: feature_sets(x) for name, x in features.items()}
    weights, terms, logged = objective.weights, {}, {}

    if weights["mgcl"] > 0:
        of_sets = {
            name: mgcl.student_terms(
                [sets["global"][name], sets["local"][name]],
                inputs.matches,
                targets.mgcl[name],
                project=student.project(name),
                temperature=objective.student_temperature,
            )
            for name in targets.mgcl
        }
        terms["mgcl"] = mgcl.combine(of_sets, weights=objective.granularities)
        logged |= {f"mgcl/{s}_{g}": term.mean() for s, of_set in of_sets.items() for g, term in of_set.items()}

    if weights["qsacl"] > 0:
        terms["qsacl"] = qsacl.query_term(
            student.queries(features["global"]),
            student.queries(features["local"]),
            targets.queries,
            project=student.project_queries,
            temperature=objective.student_temperature,
        )

    if weights["text_alignment"] > 0:
        terms["text_alignment"] = Term(jnp.float32(0), jnp.float32(0))
        for name, views in (("global", inputs.batch.global_views), ("local", inputs.batch.local_views)):
            cells, scale = student.describe(features[name].fused)
            terms["text_alignment"] += text_alignment.text_alignment(
                cells, views.labels, features[name].fused_usable, table=jnp.asarray(objective.text_table), scale=scale
            )
        logged["text_scale"] = scale

    if weights["koleo"] > 0:
        fused = sets["global"][FUSED]
        images = mgcl.mean_token(fused.features, fused.usable)[:, :, 0]
        terms["koleo"] = koleo.koleo(images, fused.usable.any((2, 3)))

    if features["global"].router is not None:
        router = features["global"].router + features["local"].router
        terms["balance"], terms["router_z"] = Term(*router.balance), Term(*router.z)
        logged["experts/dropped"] = Term(*router.dropped).mean()
        share = router.load / jnp.maximum(router.load.sum(1, keepdims=True), 1.0)
        for block, row in enumerate(share):
            logged |= {f"experts/load_block{block}_expert{e}": value for e, value in enumerate(row)}
            logged[f"experts/skew_block{block}"] = row.max() * len(row)  # largest load / mean load: 1 is even
    return terms, logged


def make_train_step(
    student_model: SkySense,
    teacher_model: SkySense,
    optimizer: optax.GradientTransformation,
    *,
    modalities: tuple[Modality, ...],
    objective: Objective,
    schedules: Schedules,
    seed: int,
    photometric_strength: float,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The function (state, batch) -> (state, metrics), to be jitted under ``jax.set_mesh`` with the state donated.

    Metrics are fp32 scalars; ``loss`` is the weighted sum of the ``loss/...`` terms. A step whose loss or gradient is
    not finite leaves parameters, teacher and optimizer as they were and counts itself.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        inputs = prepare_inputs(
            batch,
            modalities,
            key=named_key(key, "inputs"),
            strength=photometric_strength,
            num_positions=objective.mgcl["num_positions"],
        )
        temperature = schedules.teacher_temperature(state.step)
        # fp32; each layer casts what it multiplies. An average stored in bf16 would stand still.
        targets = teacher_targets(Side(teacher_model, state.teacher), inputs, objective, temperature=temperature)

        def loss_of(params):
            student = Side(student_model, params, drop_key=named_key(key, "drop_path"))
            terms, logged = student_terms(student, inputs, targets, objective)
            logged |= {f"loss/{name}": term.mean() for name, term in terms.items()}
            return sum(objective.weights[name] * term.mean() for name, term in terms.items()), logged

        (loss, logged), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.student)
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
        logged |= {
            "loss": loss,
            "gradient_norm": gradient_norm,
            "learning_rate": schedules.learning_rate(
                state.step - state.nonfinite_total
            ),  # the optimizer counts updates
            "teacher_temperature": temperature,
            "ema_momentum": momentum,
            "nonfinite_in_row": new_state.nonfinite_in_row,
            "nonfinite_total": new_state.nonfinite_total,
            **_collapse_signals(targets),
        }
        return new_state, {name: jnp.asarray(value, jnp.float32) for name, value in sorted(logged.items())}

    return train_step


def _spread(tokens: mgcl.Tokens) -> Float[Array, ""]:
    """Standard deviation of unit image features over the batch, times sqrt(D): 0 collapsed, 1 isotropic."""
    x = unit(mgcl.mean_token(tokens.features, tokens.usable))
    weight = tokens.usable.any(3)[..., None].astype(jnp.float32)
    count = jnp.maximum(weight.sum(), 1.0)
    mean = (x * weight).sum((0, 1, 2)) / count
    return jnp.sqrt(((jnp.square(x - mean) * weight).sum((0, 1, 2)) / count).sum())


def _collapse_signals(targets: Targets) -> dict[str, Any]:
    """Entropy of the teacher's targets, spread of its features, use of the queries."""
    signals = {f"feature_std/{name}": value for name, value in targets.feature_std.items()}
    for name, of_set in targets.mgcl.items():
        for granularity, entropy in of_set.entropy.items():
            signals[f"target_entropy/{name}_{granularity}"] = entropy.of_rows
            signals[f"target_entropy_of_mean/{name}_{granularity}"] = entropy.of_mean
    if targets.queries is not None:
        signals["query_usage"] = qsacl.query_usage(*targets.queries.rows())
    return signals
