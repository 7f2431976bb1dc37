"""AdamW with decay by parameter name, and the schedules of a run: learning rate, teacher's momentum and temperature.

A schedule is a plain function of the step, so it needs no state and a resumed run continues it. What a parameter's
name says about weight decay stands in one table; a name it does not know is an error. Next: train_step.py.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from skysense_jax.trees import path_string

Step = Int[Array, ""] | int
Schedule = Callable[[Any], Any]  # step to number

# (pattern of the path's end, whether weight decay applies); the first that matches counts. Decay pulls towards zero,
# which is a prior for matrices that mix channels, and for nothing else.
_DECAYS: tuple[tuple[str, bool], ...] = (
    (r"position_bias/.*", False),  # Swin V2's continuous position bias: an MLP of coordinates
    (r"(\w+_)?(bias|scale)", False),  # norms and LayerScale included
    (r"(\w+_)?(prompts|queries|class_token)", False),
    (r"(\w+_)?embedding", False),  # of days and modalities: rows that are seldom drawn would fade
    (r"log_temperature", False),
    (r"(\w+_)?kernel", True),
    (r"router", True),
    (r"prototypes", True),
)


def decays(path: str) -> bool:
    """Whether weight decay applies to the parameter at ``path``, e.g. "backbone/stage3/mlp/up/kernel".

    Raises:
      ValueError: the name is not in the table: whoever adds a parameter decides.
    """
    for pattern, decay in _DECAYS:
        if re.search(rf"(^|/){pattern}$", path):
            return decay
    raise ValueError(f"parameter {path!r}: no rule says whether it decays; add one to skysense_jax/optim.py: _DECAYS")


def _by_path(test: Callable[[str], bool], params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: test(path_string(path)), params)


# ---- schedules


def learning_rate_schedule(
    *, learning_rate: float, final_learning_rate: float, warmup_steps: int, num_steps: int
) -> Schedule:
    """The rate of update ``step``, counted from 0.

    Linear up to ``learning_rate`` at the last of ``warmup_steps`` updates (the first one moves already), then half a
    cosine down to ``final_learning_rate`` at the last of ``num_steps`` updates, and constant after it.
    """

    def schedule(step: Step) -> Float[Array, ""]:
        update = jnp.asarray(step, jnp.float32) + 1
        progress = jnp.clip((update - warmup_steps) / max(num_steps - warmup_steps, 1), 0, 1)
        cosine = final_learning_rate + (learning_rate - final_learning_rate) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return jnp.where(update < warmup_steps, learning_rate * update / max(warmup_steps, 1), cosine)

    return schedule


def ema_momentum_schedule(*, ema_momentum: float, num_steps: int) -> Schedule:
    """The share the teacher keeps of itself: half a cosine from ``ema_momentum`` at step 0 to 1 at ``num_steps``.

    As BYOL (arXiv 2006.07733).
    """

    def schedule(step: Step) -> Float[Array, ""]:
        progress = jnp.clip(jnp.asarray(step, jnp.float32) / num_steps, 0, 1)
        return 1 - (1 - ema_momentum) * 0.5 * (1 + jnp.cos(jnp.pi * progress))

    return schedule


def teacher_temperature_schedule(*, start: float, end: float, warmup_steps: int) -> Schedule:
    """The temperature of the teacher's targets: linear from ``start`` at step 0 to ``end`` at ``warmup_steps``."""

    def schedule(step: Step) -> Float[Array, ""]:
        progress = jnp.clip(jnp.asarray(step, jnp.float32) / warmup_steps, 0, 1) if warmup_steps else jnp.float32(1)
        return start + (end - start) * progress

    return schedule


# ---- optimizer


def _freeze_prototypes(num_steps: int) -> optax.GradientTransformation:
    """Zero updates of prototypes for the first ``num_steps`` updates (DINOv2).

    Comes last: gradients feed the moments all along. Moments that began at zero while Adam's bias correction is long
    over would make the first free updates up to 5 times too large.
    """

    def init(params):
        del params
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        del params
        frozen = state.count < num_steps
        is_prototype = lambda path: path.split("/")[-1] == "prototypes"  # noqa: E731
        updates = jax.tree.map(
            lambda freeze, x: jnp.where(frozen, jnp.zeros_like(x), x) if freeze else x,
            _by_path(is_prototype, updates),
            updates,
        )
        return updates, optax.ScaleByScheduleState(count=state.count + 1)

    return optax.GradientTransformation(init, update)


def make_optimizer(
    *,
    learning_rate: Schedule,
    weight_decay: float,
    beta1: float,
    beta2: float,
    clip_norm: float,
    prototype_freeze_steps: int,
) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101): gradients clipped by their global norm, decay where ``decays`` says so, scheduled rate.

    Works on plain and on boxed parameters; the moments are fp32 like these, and carry their logical axes.
    """
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.scale_by_adam(b1=beta1, b2=beta2, eps=1e-8),
        optax.add_decayed_weights(weight_decay, mask=lambda params: _by_path(decays, params)),
        optax.scale_by_learning_rate(learning_rate),
        _freeze_prototypes(prototype_freeze_steps),
    )
