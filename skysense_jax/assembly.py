"""From a config to the parts of a run: networks, optimizer, step, input, shapes. What entry points share.

Nothing is allocated here. Next: train.py, export/from_torch.py.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from skysense_jax import config as config_lib
from skysense_jax import config_layout, cost, distil, dry_run, modalities, norms, optim, train_state, train_step
from skysense_jax.batch import Batch
from skysense_jax.data import pipeline as pipeline_lib
from skysense_jax.data.text import load_text_table
from skysense_jax.models import skysense

_RATE_FIELDS = ("learning_rate", "final_learning_rate", "warmup_steps", "num_steps")


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything a config stands for, nothing allocated yet.

    Attributes:
      modalities: rows in the config's order.
      labels: the label map that records have.
      network: of student and teacher alike.
      optimizer: optax transformation of the student's parameters.
      schedules: functions of the step.
      step: (state, batch, seed, frozen parameters or None) -> (state, metrics), not yet jitted.
      seed: of the config, as the step takes it.
      norms: (boxed parameters, state, batch, seed, frozen parameters or None) -> norms by layer (norms.py), not yet
        jitted.
      frozen: the trained run that this one learns from, if it distils one.
    """

    modalities: tuple[modalities.Modality, ...]
    labels: modalities.LabelMap
    network: skysense.SkySense
    optimizer: Any
    schedules: train_step.Schedules
    step: Any
    seed: np.uint32
    norms: Any
    frozen: distil.FrozenTeacher | None = None


def efficiency(config: ConfigDict, platform: str | None = None) -> dict[str, Any]:
    """``config.efficiency`` as the networks take it: its attention is that outside and that inside windows.

    "auto" is "mosaic" on TPUs, "cudnn" on NVIDIA GPUs if it takes the config, and else "xla"; where a kernel of ours
    does not take a block's sizes, the block says so and is "xla".
    ``platform`` is that of the devices that the step is for ("cpu", "tpu", "gpu"), by default of those here.

    Raises:
      ValueError: an implementation that the platform has not.
    """
    platform, asked = platform or jax.default_backend(), config.efficiency.attention
    has_cudnn = platform == "gpu" and _takes_cudnn(jax.devices()[0])
    has = ("auto", "xla", *("mosaic",) * (platform == "tpu"), *("cudnn", "cudnn+triton") * has_cudnn)
    if asked not in has:
        wanted = " or ".join(repr(name) for name in has)
        raise ValueError(f"config.efficiency.attention: got {asked!r} on {platform}; wanted {wanted} there")
    if asked == "auto":
        problems = list(config_layout.cudnn_problems(config)) if has_cudnn else []
        asked = "mosaic" if platform == "tpu" else "cudnn" if has_cudnn and not problems else "xla"
        if problems:
            logging.info("attention 'xla' and not cuDNN's: %s", "; ".join(problems))
    outside, inside = {"cudnn": ("cudnn", "xla"), "cudnn+triton": ("cudnn", "triton")}.get(asked, (asked, asked))
    return {**config.efficiency, "attention": outside, "window_attention": inside}


def _takes_cudnn(device: Any) -> bool:
    """Whether cuDNN's attention runs on this machine's GPU: NVIDIA's from capability 8.0 on. Where there is none, the
    step is compiled for one that is elsewhere, and all kinds of targets.py are new enough."""
    capability = str(getattr(device, "compute_capability", "0"))  # "9.0"; AMD's is a name
    return device.platform != "gpu" or (re.fullmatch(r"\d+\.\d+", capability) is not None and float(capability) >= 8)


def _efficiency_of_teacher(config: ConfigDict, model: ConfigDict, platform: str | None) -> dict[str, Any]:
    """``efficiency`` for a teacher of these ``config.model`` in the run of ``config``.

    Raises:
      ValueError: cuDNN, which the run asks for by its name, does not take the teacher.
    """
    taught = config.copy_and_resolve_references()
    with taught.unlocked():
        taught.model = model
    problems = list(config_layout.cudnn_problems(taught)) if "cudnn" in config.efficiency.attention else []
    if problems:
        raise ValueError(
            f"config.objective.distil.teacher: {'; '.join(problems)}: so it is in the teacher's run. Wanted "
            "config.efficiency.attention 'auto' or 'xla', or another teacher"
        )
    return efficiency(taught, platform)


def assemble(
    config: ConfigDict,
    platform: str | None = None,
    *,
    attention: str | None = None,
    window_attention: str | None = None,
) -> Run:
    """The parts of a run, from its config; ``platform`` as in ``efficiency``.

    ``attention``, ``window_attention``: of the network, instead of what ``efficiency`` says; for comparisons.

    Raises:
      ValueError: what the config distils cannot teach it.
    """
    rows = modalities.select(config.data.modalities, config.data.new_modalities)
    labels = modalities.label_map(config.data.label_classes)
    given = {"attention": attention, "window_attention": window_attention}
    given = {name: kernel for name, kernel in given.items() if kernel}
    kernels = efficiency(config, platform) | given
    of_teacher = lambda model: _efficiency_of_teacher(config, model, platform) | given  # noqa: E731
    frozen = distil.frozen_teacher(config, rows, of_teacher)
    widths = None if frozen is None else frozen.widths
    network = skysense.build(rows, **config.model, **kernels, distil_widths=widths)
    objective = config.objective
    schedules = train_step.Schedules(
        learning_rate=optim.learning_rate_schedule(**{k: config.optim[k] for k in _RATE_FIELDS}),
        ema_momentum=optim.ema_momentum_schedule(
            ema_momentum=config.optim.ema_momentum, num_steps=config.optim.num_steps
        ),
        teacher_temperature=optim.teacher_temperature_schedule(
            start=objective.teacher_temperature_start,
            end=objective.teacher_temperature,
            warmup_steps=objective.teacher_temperature_warmup_steps,
        ),
    )
    optimizer = optim.make_optimizer(
        learning_rate=schedules.learning_rate,
        **{k: config.optim[k] for k in ("weight_decay", "beta1", "beta2", "clip_norm")},
        prototype_freeze_steps=objective.prototype_freeze_steps,
    )
    text_table = None
    if objective.weights.text_alignment > 0:
        text_table = load_text_table(config_lib.resolve_path(objective.text_table), labels.classes)
    sides = train_step.Sides(
        network,
        rows,
        objective=train_step.Objective(
            weights=dict(objective.weights),
            mgcl=dict(objective.mgcl),
            student_temperature=objective.student_temperature,
            sinkhorn_iterations=objective.sinkhorn_iterations,
            text_table=text_table,
            logit_parts=config.parts.logits,
            distil=dict(objective.distil),
        ),
        schedules=schedules,
        photometric_strength=config.data.photometric_strength,
        microbatches=config.parts.microbatches,
        frozen=None if frozen is None else frozen.network,
    )
    step = train_step.make_train_step(sides, optimizer)
    looked = functools.partial(norms.gradient_norms, sides)
    seed = train_state.as_argument(config.optim.seed)
    return Run(rows, labels, network, optimizer, schedules, step, seed, looked, frozen)


def make_pipeline(config: ConfigDict, places: Sequence[int] | None = None) -> pipeline_lib.Pipeline:
    """The input of a process that reads these places of each batch; None: all."""
    return pipeline_lib.make_pipeline(
        **config.data,
        input_threads=config.run.input_threads,
        input_workers=config.run.input_workers,
        places=places,
    )


def batch_flops(
    config: ConfigDict, rows: tuple[modalities.Modality, ...], frozen: distil.FrozenTeacher | None = None
) -> float:
    """FLOPs of the model, and of a ``frozen`` one that it distils, in a step over the whole batch, by formula and
    without recomputation."""
    teacher_local = config.objective.weights.qsacl > 0
    flops = cost.batch_flops(rows, data=config.data, model=config.model, teacher_local=teacher_local)
    if frozen is None:
        return flops
    fused = config.objective.distil.fused_weight > 0
    return flops + cost.frozen_flops(rows, data=config.data, model=frozen.config.model, fused=fused)


def batch_shapes(config: ConfigDict, rows: tuple[modalities.Modality, ...]) -> Batch:
    """A global batch of the run as shapes and dtypes; ``rows`` are its modalities."""
    fields = ("batch_size", "num_dates", "views", "label_classes")
    return dry_run.batch_shapes(rows, **{key: config.data[key] for key in fields})
