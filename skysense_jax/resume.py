"""Where a run starts, what it may go on from, and how it goes back.

In this order: the newest checkpoint in the working directory that verifies; the weights of another run, if asked for; a
new state. Next: checkpoint.py (what verifies), monitor.py (when a run goes back).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from ml_collections import ConfigDict

from skysense_jax import checkpoint, storage
from skysense_jax import config as config_lib
from skysense_jax.data import pipeline as pipeline_lib
from skysense_jax.distil import FrozenWeights
from skysense_jax.launch import facts
from skysense_jax.monitor import WentWrong
from skysense_jax.train_state import TrainState


def run_facts(config: ConfigDict, frozen: FrozenWeights | None = None) -> dict[str, Any]:
    """What is saved with every checkpoint of what made it: config, code, files of its sources, what it distils."""
    sources = (name for name, _ in config.data.sources if name != pipeline_lib.SCENES)
    return dict(
        config=config_lib.flat_text(config),
        code=facts.code_digest(),
        data={name: facts.source_facts(name)["digest"] for name in sources},
        distilled=None if frozen is None else dict(frozen.facts),
    )


def check_same_run(meta: dict[str, Any], *, now: dict[str, Any], config: ConfigDict, accepted: Sequence[str]) -> None:
    """Says what has changed since the checkpoint with ``meta``; ``now``: ``run_facts``.

    Raises:
      ValueError: the model is another, or the weights that are distilled, or, unless "data" is ``accepted``, files
        under the same name are.
    """
    changes = config_lib.compare(meta["config"], config)
    if changes.refused:
        raise ValueError(
            "--workdir holds a run whose saved weights do not fit this config: "
            + "; ".join(changes.refused)
            + ". Take another --workdir, or the old values"
        )
    for change in changes.allowed:
        logging.warning("going on with another value than before: %s", change)
    code = meta.get("code", now["code"])  # a checkpoint of export.from_torch has a config only
    if code != now["code"]:
        logging.warning("going on with other code than before: %s -> %s", code, now["code"])
    distilled = meta["distilled"] if "distilled" in meta else _distilled_before(meta, now)
    if distilled != now["distilled"]:
        raise ValueError(
            f"config.objective.distil: the run in --workdir learns from {_of_step(distilled)}, this config from "
            f"{_of_step(now['distilled'])}: another objective. Say config.objective.distil.step and the same teacher, "
            "or take another --workdir, with --init_from for the weights"
        )
    for name, digest in now["data"].items():
        if meta.get("data", {}).get(name, digest) == digest:
            continue
        told = f"config.data.sources: the files of {name!r} are not those that the run in --workdir was trained on"
        if "data" not in accepted:
            raise ValueError(f"{told}: another order of samples. Bring them back, or say --accept=data to go on")
        logging.warning("%s; going on with --accept=data", told)


def _distilled_before(meta: dict[str, Any], now: dict[str, Any]) -> dict[str, Any] | None:
    """What a checkpoint distils that does not say so: export.from_torch leaves it to the first start; without a weight
    for it in the config the run is one of before there was distillation, and learns from no other."""
    weights = config_lib.unflatten(meta["config"]).get("objective", {}).get("weights", {})
    return now["distilled"] if weights.get("distil") else None


def _of_step(distilled: dict[str, Any] | None) -> str:
    return "no other run" if distilled is None else f"step {distilled['step']} of a run ({distilled['digest']})"


def first_state(
    checkpoints: checkpoint.Checkpoints,
    abstract: TrainState,
    source: pipeline_lib.PipelineIterator,
    *,
    new: Callable[[], TrainState],
    config: ConfigDict,
    facts_now: dict[str, Any],
    accepted: Sequence[str] = (),
    init_from: storage.Directory | None = None,
) -> tuple[int, TrainState, str]:
    """Step and state that the run starts from, with ``source`` at its place in the data, and where they come from.

    ``init_from``: a run whose teacher's weights a new state takes, for both networks.

    Raises:
      ValueError: see ``check_same_run``; or there are no such weights in ``init_from``, or none that verify.
    """
    same = functools.partial(check_same_run, now=facts_now, config=config, accepted=accepted)
    restored = checkpoints.restore_latest(abstract, check_meta=same)
    if restored is not None:
        if init_from is not None:
            logging.info("--init_from is not looked at: the run has begun, and goes on from its own checkpoint")
        source.set_state(restored.data_state)
        return _told(restored.step, restored.state, "the newest checkpoint that verifies", config)
    if init_from is None:
        return _told(0, new(), "a new state", config)

    def check_same_network(meta: dict[str, Any]) -> None:
        if refused := config_lib.compare(meta["config"], config).refused:
            raise ValueError(
                f"{init_from} has weights that do not fit this config, or would mean something else: "
                f"{'; '.join(refused)}. Export that run and begin this one with skysense_jax.export.from_torch, which "
                "takes what fits"
            )

    try:
        network = {part: leaves for part, leaves in abstract.teacher.items() if part != checkpoint.DISTIL}
        taken = checkpoint.restore_params(init_from, network, check_meta=check_same_network)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"--init_from: {str(error).removeprefix('--workdir: ')}") from error
    state = new()
    copy = jax.tree.map(jnp.copy, taken.state)
    state = state.replace(student={**state.student, **taken.state}, teacher={**state.teacher, **copy})
    return _told(0, state, f"the teacher of step {taken.step} in {init_from}", config)


def _told(step: int, state: TrainState, origin: str, config: ConfigDict) -> tuple[int, TrainState, str]:
    logging.info("starting at step %d of %d, from %s", step, config.optim.num_steps, origin)
    if step < config.optim.num_steps:
        logging.info("the first step compiles: minutes on a CPU, less from a cache (JAX_COMPILATION_CACHE_DIR)")
    else:
        logging.info("no step is left: pictures and probe only; raise config.optim.num_steps to go on")
    return step, state, origin


class Course:
    """Where a run is: its step, the state behind it, and the batches that follow.

    Attributes:
      data_state: place in the data behind the last batch that was taken.
    """

    def __init__(
        self,
        step: int,
        state: TrainState,
        source: pipeline_lib.PipelineIterator,
        follow: Callable[[], Any],
        *,
        rewinds: int,
    ):
        self.step, self.state, self._source, self._follow = step, state, source, follow
        self.data_state, self.batches = source.get_state(), follow()
        self._rewinds = rewinds

    def take(self) -> tuple[Any, dict[str, Any]]:
        """The next batch, on the devices and as the host has it; the course is at its step."""
        batch, element, self.data_state = next(self.batches)
        self.step += 1
        return batch, element

    def go_back(self, wrong: WentWrong, checkpoints: checkpoint.Checkpoints, abstract: TrainState) -> None:
        """Back to the checkpoint before a jump of the loss, and past the data of the steps since.

        Raises:
          RuntimeError: there is no checkpoint before the jump, or the run went back too often.
        """
        if self._rewinds == 0:
            raise RuntimeError(f"{wrong}, once more (config.run.watch.spike_rewinds)") from wrong
        self._rewinds -= 1
        jax.block_until_ready(self.state)  # on CPUs what processes exchange must not overtake a step
        self.state = None  # before another takes its place
        restored = checkpoints.restore_before(wrong.spike.first_step, abstract)
        if restored is None:
            raise RuntimeError(f"{wrong}; there is no checkpoint before it to go back to") from wrong
        self._source.set_state(self.data_state)
        self.step, self.state, self.batches = restored.step, restored.state, self._follow()
