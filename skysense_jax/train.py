"""Pre-trains SkySense V2: ``python -m skysense_jax.train --config=configs/tiny.py --workdir=RUN``.

The same command again goes on where the run stopped. Any field is overridden with ``--config.section.field=value``;
``--dry_run`` prints what would run and stops. Next: train_step.py (the step), configs/base.py (every field).
"""

import contextlib
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict

from skysense_jax import checkpoint, dry_run, measure, metrics, parameters, profiling, sharding, storage, watch
from skysense_jax import config as config_lib
from skysense_jax.assembly import Run, assemble, batch_flops, batch_shapes, make_pipeline
from skysense_jax.batch import Batch
from skysense_jax.data import pipeline as pipeline_lib
from skysense_jax.data import scenes
from skysense_jax.data.sample import SampleReader
from skysense_jax.eval import pictures, probes
from skysense_jax.feed import prefetch
from skysense_jax.launch import facts
from skysense_jax.launch.roll_call import StartError
from skysense_jax.launch.start import started
from skysense_jax.launch.stop import EXIT_AGAIN, Stop, Stopped
from skysense_jax.monitor import Limits, Monitor, WentWrong, continued
from skysense_jax.train_state import TrainState, abstract_state, boxed_state, create_state, jit_step

_CONFIG = config_lib.define_flag()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where checkpoints, metrics and pictures go: a directory, or gs://bucket/name."
)
_PROFILE_STEPS = flags.DEFINE_string(
    "profile_steps", None, "START:END: steps, both included, whose trace goes to WORKDIR/profile."
)
_ACCEPT = flags.DEFINE_multi_enum(
    "accept", [], ["data"], "Go on although this has changed since the checkpoint: data, the files of the sources."
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print config, sizes, cost and one checked sample, and stop.")

_PICTURED = 3  # samples in a picture


def _facts(config: ConfigDict) -> dict[str, Any]:
    """What is saved with every checkpoint of what made it: config, code, and the files of its sources."""
    sources = (name for name, _ in config.data.sources if name != pipeline_lib.SCENES)
    return dict(
        config=config_lib.flat_text(config),
        code=facts.code_digest(),
        data={name: facts.source_facts(name)["digest"] for name in sources},
    )


def _check_same_run(meta: dict[str, Any], now: dict[str, Any], config: ConfigDict, accepted: Sequence[str]) -> None:
    """Refuses to go on with another model or with other files under the same name; says what else changed."""
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
    for name, digest in now["data"].items():
        if meta.get("data", {}).get(name, digest) == digest:
            continue
        told = f"config.data.sources: the files of {name!r} are not those that the run in --workdir was trained on"
        if "data" not in accepted:
            raise ValueError(f"{told}: another order of samples. Bring them back, or say --accept=data to go on")
        logging.warning("%s; going on with --accept=data", told)


def _start(
    config: ConfigDict,
    checkpoints: checkpoint.Checkpoints,
    abstract: TrainState,
    source: pipeline_lib.PipelineIterator,
    new: Callable[[], TrainState],
    facts_now: dict[str, Any],
) -> tuple[int, TrainState]:
    """Step and state that the run starts from: of the newest checkpoint that verifies, with ``source`` at its place in
    the data, or ``new``."""
    accepted = _ACCEPT.value if flags.FLAGS.is_parsed() else ()
    same = functools.partial(_check_same_run, now=facts_now, config=config, accepted=accepted)
    restored = checkpoints.restore_latest(abstract, check_meta=same)
    num_steps = config.optim.num_steps
    if restored is None:
        start, state = 0, new()
    else:
        start, state = restored.step, restored.state
        source.set_state(restored.data_state)
    come_from = "a new state" if restored is None else "the newest checkpoint that verifies"
    logging.info("starting at step %d of %d, from %s", start, num_steps, come_from)
    if start < num_steps:
        logging.info("the first step compiles: minutes on a CPU, less from a cache (JAX_COMPILATION_CACHE_DIR)")
    else:
        logging.info("no step is left: pictures and probe only; raise config.optim.num_steps to go on")
    return start, state


class _Course:
    """Where a run is: its step, the state behind it, and the batches that follow.

    ``go_back`` takes it to the checkpoint before a jump of the loss, and past the data of the steps since.
    """

    def __init__(self, step: int, state: TrainState, source: pipeline_lib.PipelineIterator, follow: Callable[[], Any]):
        self.step, self.state, self._source, self._follow = step, state, source, follow
        self.data_state, self.batches = source.get_state(), follow()

    def go_back(self, wrong: WentWrong, checkpoints: checkpoint.Checkpoints, abstract: TrainState) -> None:
        """Raises RuntimeError if there is no checkpoint before the jump."""
        self.state = None  # before another takes its place
        restored = checkpoints.restore_before(wrong.spike.first_step, abstract)
        if restored is None:
            raise RuntimeError(f"{wrong}; there is no checkpoint before it to go back to") from wrong
        self._source.set_state(self.data_state)
        self.step, self.state, self.batches = restored.step, restored.state, self._follow()


def train(
    config: ConfigDict, workdir: storage.Directory, *, profile_steps: str | None = None, stop: Stop | None = None
) -> TrainState:
    """The state after the last step of the run in ``workdir``, begun or continued; ``profile_steps`` as in the flag.

    Raises:
      Stopped: ``stop`` said so; a checkpoint is written.
      ValueError: a field is wrong, or differs from the saved run's where it must not.
      RuntimeError: too many updates skipped in a row, or too large a share of records unreadable.
    """
    # ---- what runs, and on what
    config_lib.validate(config, num_devices=jax.device_count())
    profiled = profiling.parse_steps(profile_steps, num_steps=config.optim.num_steps)
    mesh = sharding.make_mesh(**config.mesh)
    places = sharding.batch_places(mesh, config.data.batch_size)
    run, pipeline = assemble(config), make_pipeline(config, places)
    shapes = batch_shapes(config, run.modalities)
    pipeline.check_sources()
    logging.info("%s: %d devices, mesh %s", config.name, jax.device_count(), dict(mesh.shape))

    with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
        # ---- start or resume
        boxed = boxed_state(run.network, run.optimizer, shapes)
        if whole := sharding.undivided(boxed.student, mesh):
            logging.warning("config.mesh does not divide %d parameters, whole on every device: %s", len(whole), whole)
        checkpoints = checkpoint.Checkpoints(
            workdir,
            every_steps=config.run.checkpoint_every_steps,
            keep_last=config.run.keep_last,
            keep_every_steps=config.run.keep_every_steps,
        )
        stack.callback(checkpoints.close)
        meta, abstract, source = _facts(config), abstract_state(boxed, mesh), iter(pipeline)
        stack.callback(source.close)
        new = functools.partial(create_state, run.network, run.optimizer, shapes, seed=config.optim.seed, mesh=mesh)
        start, state = _start(config, checkpoints, abstract, source, new, meta)

        # ---- outputs
        settings = dict(line.split(" = ", 1) for line in config_lib.flat_text(config).splitlines())
        first = jax.process_index() == 0
        files = storage.SmallFiles(workdir, fetch=(*continued(), *(metrics.CONTINUED if first else ())))
        stack.callback(files.close)
        open_writers = functools.partial(
            metrics.open_writers,
            files.path,
            tensorboard=config.run.tensorboard,
            wandb_project=config.run.wandb_project,
            settings=settings,
        )
        monitor = _monitor(config, run, pipeline, open_writers(resumed_step=start), files.path)
        stack.callback(monitor.close_writers)
        if first:
            (files.path / "config.txt").write_text(config_lib.flat_text(config))
        profiler = profiling.Profiler(
            profiled, files.path, after_step=start, begins=monitor.clock.restart, report=monitor.note
        )
        stack.callback(profiler.close)

        def keep_numbers() -> None:
            """No number up to this step is lost when the run goes on from its checkpoint, on another host."""
            if files.staged:
                monitor.catch_up(course.step)
                files.send()

        # ---- loop
        step_fn, last_step = jit_step(run.step, boxed, mesh), config.optim.num_steps
        follow = lambda: monitor.clock.watch(prefetch(source, mesh, config.run.prefetch_batches))  # noqa: E731
        course, element, rewinds = _Course(start, state, source, follow), None, config.run.watch.spike_rewinds
        del state  # the course has it
        while course.step < last_step:
            try:
                batch, element, course.data_state = next(course.batches)
                step = course.step = course.step + 1
                if step == start + 1:
                    dry_run.check_element(element, shapes, num_samples=len(places))
                course.state, step_metrics = profiler.run(step, step_fn, course.state, batch)
                monitor.after_step(step, step_metrics, element)
                saved = dict(data_state=course.data_state, meta=meta)
                checkpoints.maybe_save(step, course.state, **saved, before=keep_numbers)
                stopping = stop is not None and stop.reached(step)
                if stopping or step == last_step:
                    monitor.close()
                    files.send()
                    checkpoints.save(step, course.state, **saved)
                    checkpoints.wait()
            except WentWrong as wrong:
                if rewinds == 0:
                    raise RuntimeError(f"{wrong}, once more (config.run.watch.spike_rewinds)") from wrong
                rewinds -= 1
                course.go_back(wrong, checkpoints, abstract)
                monitor.go_back(course.step, wrong, open_writers)
                continue
            if stopping:
                raise Stopped(f"stopped behind step {step}, which is saved")
            every = config.run.pictures_every_steps
            if every and step % every == 0 and step < last_step:
                write_pictures(config, run, pipeline, course.state.teacher, element, files.path)

        write_pictures(config, run, pipeline, course.state.teacher, element or next(source), files.path)
        write_probe(config, run, course.state, mesh, files.path)
    return course.state


def _monitor(
    config: ConfigDict, run: Run, pipeline: pipeline_lib.Pipeline, writers: metrics.Writers, directory: pathlib.Path
) -> Monitor:
    looks_for, model = config.run.watch, config.model
    return Monitor(
        num_steps=config.optim.num_steps,
        limits=Limits(
            collapse_stops=looks_for.collapse_stops,
            **{key: config.run[key] for key in ("log_every_steps", "max_nonfinite_in_row", "max_bad_record_share")},
        ),
        clock=measure.StepClock(
            batch_size=config.data.batch_size,
            batch_flops=batch_flops(config, run.modalities),
            devices=jax.devices(),
        ),
        spikes=watch.LossSpikes(
            window=looks_for.spike_window, deviations=looks_for.spike_deviations, in_row=looks_for.spike_in_row
        ),
        collapses=watch.Collapses(
            num_prototypes=model.heads.num_prototypes,
            num_queries=model.queries.num_queries,
            in_row=looks_for.collapse_in_row,
            from_step=config.optim.warmup_steps,
        ),
        pipeline=pipeline,
        writers=writers,
        directory=directory,
    )


def write_pictures(
    config: ConfigDict,
    run: Run,
    pipeline: pipeline_lib.Pipeline,
    params: Any,
    element: dict[str, Any],
    workdir: pathlib.Path,
) -> None:
    """Writes WORKDIR/pictures anew. ``params``: the teacher's; ``element``: any host batch. Every process calls it.

    Features and queries are shown on records of the run's own sources, or on held-out scenes if it trains on scenes.
    """
    paths = pictures.write_all(
        workdir / "pictures",
        model=run.network,
        params=params,
        modalities=run.modalities,
        samples=_picture_samples(config, run, pipeline),
        batch=Batch.from_dict(element),
        metrics_path=workdir / metrics.FILE_NAME,
        **_encoding(config),
    )
    for path in paths:
        logging.info("picture: %s", path)


def _picture_samples(config: ConfigDict, run: Run, pipeline: pipeline_lib.Pipeline) -> list[SampleReader]:
    """Held-out scenes of a run on scenes; of other runs the records with most modalities among some of each source."""
    if any(name == pipeline_lib.SCENES for name, _ in config.data.sources):
        names = tuple(row.name for row in run.modalities if row.name in scenes.MODALITIES)
        indices = range(config.eval.first_index, config.eval.first_index + _PICTURED)
        return [scenes.render(i, complete=True, modalities=names, **_held_out(config)).sample for i in indices]
    found = pipeline.samples(3 * _PICTURED)
    return sorted(found, key=lambda sample: -sum(len(sample.days(row.name)) > 0 for row in run.modalities))[:_PICTURED]


def write_probe(config: ConfigDict, run: Run, state: TrainState, mesh: sharding.Mesh, directory: pathlib.Path) -> None:
    """Probes the teacher, and if asked the network as it was at the start; process 0 writes ``probe.json``."""
    networks = {"teacher": state.teacher}
    if config.eval.probe_untrained:
        shapes = batch_shapes(config, run.modalities)
        networks["untrained"] = create_state(
            run.network, run.optimizer, shapes, seed=config.optim.seed, mesh=mesh
        ).teacher
    scores = probe(config, run, networks)
    if jax.process_index() == 0 and scores:
        scores = {"step": config.optim.num_steps, **scores}
        (directory / "probe.json").write_text(json.dumps(scores, indent=2) + "\n")


def probe(config: ConfigDict, run: Run, networks: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Scores of a linear probe on held-out procedural scenes, for the parameters of each network; logged too.

    None where there is nothing to tell apart. Empty if the config asks for none, or if scenes have none of its
    modalities. Every process calls it.
    """
    which = {key: config.eval[key] for key in ("first_index", "num_train_scenes", "num_test_scenes")}
    if not which["num_test_scenes"]:
        return {}
    if not {row.name for row in run.modalities} & set(scenes.MODALITIES):
        logging.info("no linear probe: procedural scenes have %s, this run none of them", scenes.MODALITIES)
        return {}
    held_out = probes.held_out_scenes(run.modalities, **_held_out(config), **which)
    scores = {}
    for name, params in networks.items():
        found = probes.probe_scenes(run.network, params, run.modalities, held_out, **_encoding(config))
        scores[name] = {key: value if np.isfinite(value) else None for key, value in found.items()}
        points = "  ".join(f"{key} {100 * value:.1f}" for key, value in found.items())
        logging.info("linear probe on held-out scenes, %s: %s", name, points)
    return scores


def _held_out(config: ConfigDict) -> dict[str, int]:
    return dict(seed=config.data.scenes.seed, extent_cells=config.data.scenes.extent_cells)


def _encoding(config: ConfigDict) -> dict[str, Any]:
    return dict(
        cells=config.data.views.global_cells,
        num_dates=dict(config.data.num_dates),
        batch_size=config.eval.batch_size,
    )


def print_dry_run(config: ConfigDict) -> None:
    """Prints the resolved config, parameters per part, tokens, FLOPs, memory and one validated sample as a batch."""
    config_lib.validate(config, num_devices=jax.device_count())
    run = assemble(config)
    shapes = batch_shapes(config, run.modalities)
    boxed = boxed_state(run.network, run.optimizer, shapes)
    print(config_lib.flat_text(config))
    print(dry_run.parameter_text(parameters.parameters_per_part(sharding.unbox(boxed.student))))
    print(
        dry_run.size_text(
            run.modalities,
            data=config.data,
            model=config.model,
            teacher_local=config.objective.weights.qsacl > 0,
        )
    )
    print(f"a global batch on the devices: {dry_run.batch_bytes(shapes) / 2**30:.3g} GiB")
    # one sample, in this process: a whole batch, and one more per worker, may not fit a laptop
    few = config.copy_and_resolve_references()
    few.data.batch_size, few.run.input_workers, few.run.input_threads = 1, 0, 1
    pipeline = make_pipeline(few)
    pipeline.check_sources()
    with contextlib.closing(iter(pipeline)) as source:
        element = next(source)
    shapes = batch_shapes(few, run.modalities)
    dry_run.check_element(element, shapes, num_samples=1)
    print(dry_run.batch_text(element, run.modalities))


def _quiet_libraries() -> None:
    """Leaves the log to this project: Orbax says ten lines a checkpoint at the same level."""

    def ours(record) -> bool:
        return record.levelno >= logging.converter.absl_to_standard(logging.WARNING) or "orbax" not in record.pathname

    logging.get_absl_handler().addFilter(ours)


def main(argv: list[str]) -> None:
    """Trains, or prints the dry run."""
    _quiet_libraries()
    if len(argv) > 1:
        raise app.UsageError(f"got {argv[1:]}; wanted --config=FILE --workdir=DIR")
    try:
        if _DRY_RUN.value:
            print_dry_run(_CONFIG.value)
        elif _WORKDIR.value is None:
            raise ValueError("--workdir: got nothing; wanted the directory of the run")
        else:
            workdir = storage.run_directory(_WORKDIR.value)
            with started(_CONFIG.value, workdir) as stop:
                train(_CONFIG.value, workdir, profile_steps=_PROFILE_STEPS.value, stop=stop)
    except Stopped as stopped:
        logging.warning("%s; the same command goes on (exit status %d)", stopped, EXIT_AGAIN)
        sys.exit(EXIT_AGAIN)
    except StartError as error:
        sys.exit(f"error: {error}")
    except ValueError as error:
        if not str(error).startswith(("config.", "--")):  # these name what a person has to change
            logging.error("", exc_info=True)
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=config_lib.parse_flags)
