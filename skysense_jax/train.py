"""Pre-trains SkySense V2: ``python -m skysense_jax.train --config=configs/tiny.py --workdir=RUN``.

The same command again goes on where the run stopped. Any field is overridden with ``--config.section.field=value``;
``--dry_run`` prints what would run and stops. Next: train_step.py (the step), configs/base.py (every field).
"""

import contextlib
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Sequence

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict

from skysense_jax import (
    checkpoint,
    compiler,
    dry_run,
    measure,
    metrics,
    outputs,
    parameters,
    profiling,
    resume,
    sharding,
    storage,
    watch,
)
from skysense_jax import config as config_lib
from skysense_jax.assembly import Run, assemble, batch_flops, batch_shapes, make_pipeline
from skysense_jax.data import pipeline as pipeline_lib
from skysense_jax.feed import prefetch
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
_INIT_FROM = flags.DEFINE_string(
    "init_from", None, "Another run of the same network, whose teacher's weights a new run begins with."
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print config, sizes, cost and one checked sample, and stop.")


def train(
    config: ConfigDict,
    workdir: storage.Directory,
    *,
    profile_steps: str | None = None,
    accept: Sequence[str] = (),
    init_from: storage.Directory | None = None,
    stop: Stop | None = None,
) -> TrainState:
    """The state after the last step of the run in ``workdir``, begun or continued; the rest as in the flags.

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
    labelled = outputs.read_labelled(config, run)
    logging.info("%s: %d devices, mesh %s", config.name, jax.device_count(), dict(mesh.shape))

    with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
        # ---- start or resume
        boxed = boxed_state(run.network, run.optimizer, shapes)
        if whole := sharding.undivided(boxed.student, mesh):
            logging.warning("config.mesh does not divide %d parameters, whole on every device: %s", len(whole), whole)
        frozen = None if run.frozen is None else run.frozen.restore(mesh)
        meta, abstract, source = resume.run_facts(config, frozen), abstract_state(boxed, mesh), iter(pipeline)
        stack.callback(source.close)
        kept = {key: config.run[key] for key in ("keep_last", "keep_every_steps", "keep_every_hours", "keep_best")}
        checkpoints = checkpoint.Checkpoints(workdir, every_steps=config.run.checkpoint_every_steps, **kept)
        stack.callback(checkpoints.close)
        start, state, origin = resume.first_state(
            checkpoints,
            abstract,
            source,
            new=functools.partial(create_state, run.network, run.optimizer, shapes, seed=config.optim.seed, mesh=mesh),
            config=config,
            facts_now=meta,
            accepted=accept,
            init_from=init_from,
        )

        # ---- outputs
        first = jax.process_index() == 0
        files = storage.SmallFiles(workdir, fetch=(*continued(), *(metrics.CONTINUED if first else ())))
        stack.callback(files.close)
        monitor = _monitor(config, run, pipeline, _open_writers(config, files.path), start=start, directory=files.path)
        stack.callback(monitor.close_writers)
        monitor.event(start, "started", origin=origin)
        if first:
            (files.path / "config.txt").write_text(config_lib.flat_text(config))
        profiler = profiling.Profiler(
            profiled, files.path, after_step=start, begins=monitor.clock.restart, report=monitor.note
        )
        stack.callback(profiler.close)
        shown, began = outputs.Outputs(config, run, pipeline, files.path, labelled), time.monotonic()

        def keep_numbers() -> None:
            """No number up to this step is lost when the run goes on from its checkpoint, on another host."""
            if files.staged:
                monitor.catch_up(course.step)
                files.send()

        # ---- loop
        # arguments, not constants that the compiler folds into the program
        given = dict(seed=run.seed, frozen=None if frozen is None else frozen.params)
        last_step, step_fn = config.optim.num_steps, functools.partial(jit_step(run.step, boxed, mesh), **given)
        norms_fn = jax.jit(
            functools.partial(run.norms, boxed.student), compiler_options=compiler.options(mesh.local_devices[0])
        )
        course = resume.Course(
            start,
            state,
            source,
            lambda: monitor.clock.watch(prefetch(source, mesh, config.run.prefetch_batches)),
            rewinds=config.run.watch.spike_rewinds,
        )
        del state  # the course has it
        element = None
        while course.step < last_step:
            try:
                batch, element = course.take()
                step = course.step
                if step == start + 1:
                    dry_run.check_element(element, shapes, num_samples=len(places))
                if _due(step, config.run.norms_every_steps):
                    with monitor.clock.left_out():
                        looked = norms_fn(course.state, batch, **given)
                        monitor.keep_norms(step, jax.device_get(looked))
                course.state, step_metrics = profiler.run(step, step_fn, course.state, batch)
                monitor.after_step(step, step_metrics, element)
                stopping = stop is not None and stop.reached(step)
                due = (_probe_due(step, config) or step == last_step) and not stopping  # a stop has little time
                score = _probe(shown, course, monitor, began=began) if due else None
                saved = dict(data_state=course.data_state, meta=meta, score=score)
                checkpoints.maybe_save(step, course.state, **saved, before=keep_numbers)
                if stopping or step == last_step:
                    monitor.close()
                    files.send()
                    checkpoints.save(step, course.state, **saved)
                    checkpoints.wait()
            except WentWrong as wrong:
                course.go_back(wrong, checkpoints, abstract)
                monitor.go_back(course.step, wrong)
                continue
            if stopping:
                raise Stopped(f"stopped behind step {step}, which is saved")
            if _due(step, config.run.pictures_every_steps) and step < last_step:
                shown.write_pictures(course.state.teacher, element)

        shown.write_pictures(course.state.teacher, element or next(source))
        shown.write_probe(course.step, course.state, mesh)
    return course.state


def _due(step: int, every_steps: int) -> bool:
    return every_steps > 0 and step % every_steps == 0


def _probe_due(step: int, config: ConfigDict) -> bool:
    """At the first checkpoint behind every so many steps, so that what is probed is saved."""
    every, saved = config.eval.probe_every_steps, config.run.checkpoint_every_steps
    return _due(step, saved) and every > 0 and step // every > (step - saved) // every


def _probe(shown: outputs.Outputs, course: resume.Course, monitor: Monitor, *, began: float) -> float | None:
    """Probes the teacher on the way; its numbers go with the step's, one of them tells the best checkpoint."""
    with monitor.clock.left_out():
        scores = shown.probe(course.step, course.state.teacher)
    if not scores:
        return None
    found = {name: value for name, value in scores.items() if value is not None}
    found["share_of_time"] = shown.probe_seconds / (time.monotonic() - began)
    monitor.note(course.step, {f"probe/{name}": value for name, value in found.items()})
    return shown.rank(scores)


def _open_writers(config: ConfigDict, directory: pathlib.Path) -> Callable[..., metrics.Writers]:
    return functools.partial(
        metrics.open_writers,
        directory,
        tensorboard=config.run.tensorboard,
        wandb_project=config.run.wandb_project,
        settings=dict(line.split(" = ", 1) for line in config_lib.flat_text(config).splitlines()),
    )


def _monitor(
    config: ConfigDict,
    run: Run,
    pipeline: pipeline_lib.Pipeline,
    open_writers: Callable[..., metrics.Writers],
    *,
    start: int,
    directory: pathlib.Path,
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
            batch_flops=batch_flops(config, run.modalities, run.frozen),
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
        open_writers=open_writers,
        start=start,
        directory=directory,
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
    if run.frozen is not None:
        leaves = jax.tree.leaves(sharding.unbox(run.frozen.boxed()))
        count, directory = sum(leaf.size for leaf in leaves), run.frozen.directory
        flops = batch_flops(config, run.modalities, run.frozen) - batch_flops(config, run.modalities)
        print(
            f"distilled: {run.frozen.config.name} in {directory}, {count:,} parameters, {4 * count / 2**30:.3g} GiB in "
            f"fp32 over all devices, {flops / 1e12:.4g} TFLOP a step"
        )
    print(f"a global batch on the devices: {dry_run.batch_bytes(shapes) / 2**30:.3g} GiB")
    # one sample, in this process: a whole batch, and one more per worker, may not fit a laptop
    few = config.copy_and_resolve_references()
    few.data.batch_size, few.run.input_workers, few.run.input_threads = 1, 0, 1
    pipeline = make_pipeline(few)
    pipeline.check_sources()
    for each in outputs.read_labelled(config, run):
        print(f"probed too: {each}")
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
            init_from = _INIT_FROM.value and storage.run_directory(_INIT_FROM.value, flag="--init_from")
            same = {"--init_from": _INIT_FROM.value or "", "--accept": ",".join(_ACCEPT.value)}
            with started(_CONFIG.value, workdir, same_flags=same) as stop:
                train(
                    _CONFIG.value,
                    workdir,
                    profile_steps=_PROFILE_STEPS.value,
                    accept=_ACCEPT.value,
                    init_from=init_from,
                    stop=stop,
                )
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
