"""Does a run fit a target, and how long does it take: ``python -m skysense_jax.plan --config=FILE --target=v5p:64``.

No accelerator is needed, only its compiler. Ends with 1 and the reason if the step does not fit. ``--sweep`` compiles
several meshes and ways of recomputing instead and recommends one. Plans are kept in docs/plans; how far it is goes to
stderr.
"""

import contextlib
import importlib.metadata
import shlex
import sys

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict

from skysense_jax import assembly, dry_run, modalities, targets
from skysense_jax import config as config_lib
from skysense_jax.chips import GIB
from skysense_jax.plan import forecast as forecast_lib
from skysense_jax.plan import parts
from skysense_jax.plan import sweep as sweep_lib

_FULL = 0.85  # of a chip's memory; what is left is for fragments, the input batches ahead and the collectives' buffers
_REMEDIES = (
    "config.parts.logits or microbatches larger; config.mesh.fsdp larger; config.efficiency.remat='blocks'; "
    "more chips; config.data.batch_size or views smaller"
)
# What the figures depend on: with another value a kept plan is another run's.
PLANNED = ("mesh", "efficiency", "parts", "data", "model", "objective")


def report(config: ConfigDict, target: targets.Target, f: forecast_lib.Forecast) -> str:
    """The table that the command prints."""
    chip, samples = target.chip, config.data.batch_size
    rows = modalities.select(config.data.modalities, config.data.new_modalities)
    batch_bytes = dry_run.batch_bytes(assembly.batch_shapes(config, rows))
    efficiency = assembly.efficiency(config, chip.platform)
    (work, exposed), hosts = f.played(target), max(target.num_chips // chip.chips_per_host, 1)
    row = lambda name, number, remark="": f"  {name:<34}{number:>10}  {remark}".rstrip()  # noqa: E731
    gib = lambda num_bytes: f"{num_bytes / GIB:.2f}"  # noqa: E731
    lines = [
        f"{config.name}, batch {samples}, on {target} ({chip.source})",
        f"mesh: {', '.join(f'{axis} {size}' for axis, size in f.mesh_shape.items())}",
        f"remat {config.efficiency.remat}, microbatches {config.parts.microbatches}, logits in {config.parts.logits} "
        f"parts, attention {efficiency['attention']}, in windows {efficiency['window_attention']}; "
        f"config {config_lib.fingerprint(config, PLANNED)}; {_compilers(chip)}",
        "",
        "of one device, GiB",
        row("state and batch", gib(f.state_bytes)),
        row("activations and gradients", gib(f.temporary_bytes)),
        row("peak", gib(f.peak_bytes), f"{f.peak_bytes / chip.memory_bytes:.0%} of {gib(chip.memory_bytes)}"),
        "",
        "of one device and step",
        row("FLOPs as traced, T", f"{f.flops / 1e12:.4f}", f"{f.flops / f.model_flops:.2f} x the model's by formula"),
        row("FLOPs of its instructions, T", f"{f.totals.flops / 1e12:.4f}"),
        row("memory traffic, GB", f"{f.totals.memory_bytes / 1e9:.2f}"),
    ]
    for c in f.totals.collectives:
        remark = f"in {c.count} exchanges of {c.group}"
        lines.append(row(f"{c.kind} over {'+'.join(c.axes)}, GB", f"{c.bytes_sent / 1e9:.4f}", remark))
    seconds = work + exposed
    used = f.model_flops / chip.flops / seconds
    lines += [
        "",
        "seconds a step, at the rates of the table",
        row("compute alone", f"{f.compute_seconds(chip):.4f}"),
        row("memory alone", f"{f.memory_seconds(chip):.4f}"),
        row("work, by instruction the longer", f"{work:.4f}"),
        row("network alone", f"{f.network_seconds(target):.4f}"),
        row("of it beside no work", f"{exposed:.4f}", f"{exposed / seconds:.0%} of the step"),
        row("predicted", f"{seconds:.4f}", f"{used:.0%} of the rated FLOPs do the model's work"),
        "",
        f"{config.optim.num_steps} steps: {config.optim.num_steps * seconds / 86400:.1f} days; "
        f"{samples / seconds:.1f} samples/s, of which each of {hosts} hosts prepares {samples / seconds / hosts:.2f} "
        f"({batch_bytes / seconds / hosts / 1e6:.1f} MB/s as arrays)",
    ]
    if more := _more_chips(target) if f.mesh_shape["data"] > 1 else []:
        shares = ", ".join(f"{wider.num_chips} chips {f.scaling(target, wider):.1%}" for wider in more)
        lines.append(f"samples a second and chip with more along data, samples of a chip kept: {shares}")
    lines += ["", *_table_of_parts(f, chip, work)]
    return "\n".join(lines)


def _table_of_parts(f: forecast_lib.Forecast, chip: targets.Chip, work: float) -> list[str]:
    """Where the seconds of work go: by part, then by pass."""
    lines = [f"{'where work goes':<24}{'TFLOP':>10}{'GB':>10}{'ms':>10}{'x compute':>11}{'share':>8}"]
    seconds = lambda w: forecast_lib.work_seconds(w, chip)  # noqa: E731
    for grouped in (parts.by_part, parts.by_phase):
        for part in grouped(f.schedule, seconds):
            compute = part.flops / chip.flops
            times = f"{part.seconds / compute:.2f}" if part.seconds < 100 * compute else "-"
            lines.append(
                f"  {part.name:<22}{part.flops / 1e12:>10.4f}{part.num_bytes / 1e9:>10.2f}{1e3 * part.seconds:>10.2f}"
                f"{times:>11}{part.seconds / work:>8.1%}"
            )
        lines.append("")
    return lines[:-1]


def _more_chips(target: targets.Target) -> list[targets.Target]:
    """2, 4 and 8 times as many, as far as so many exist."""
    found = []
    for times in (2, 4, 8):
        with contextlib.suppress(ValueError):
            found.append(targets.parse(f"{target.chip.name}:{target.num_chips * times}"))
    return found


def _compilers(chip: targets.Chip) -> str:
    """Whose figures these are."""
    packages = ("jax", "libtpu" if chip.platform == "tpu" else "jax-cuda13-plugin")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def sweep(config: ConfigDict, target: targets.Target, *, quick: bool = False) -> str:
    """The table of all candidates, and the one recommended; each row is said as it is there.

    Raises:
      ValueError: the config or the target is wrong, or no candidate fits.
    """
    backbone = config.model.backbone
    outcomes, lines = [], [f"{config.name}, batch {config.data.batch_size}, on {target}"]
    candidates = list(
        sweep_lib.candidates(
            target,
            num_experts=backbone.num_experts if backbone.num_moe_blocks else 0,
            batch_size=config.data.batch_size,
        )
    )
    while candidates:
        candidate = candidates.pop(0)
        tried = config.copy_and_resolve_references()
        for field, value in candidate.overrides.items():
            section, key = field.split(".")
            tried[section][key] = value
        try:
            config_lib.validate(tried, num_devices=target.num_chips)
            mesh = forecast_lib.make_mesh(target, dict(tried.mesh))
            outcomes.append(sweep_lib.Outcome(candidate, forecast_lib.compile_step(tried, mesh, say=_say, quick=quick)))
        except ValueError as error:
            outcomes.append(sweep_lib.Outcome(candidate, None, str(error)))
        lines.append(outcomes[-1].row(target))
        _say(lines[-1])
        if outcomes[-1].too_large(target, _FULL) and (smaller := candidate.in_more_parts()):
            candidates.insert(0, smaller)
    chosen = sweep_lib.best(outcomes, target, _FULL)
    if chosen is None:
        raise ValueError("\n".join([*lines, f"nothing fits in {_FULL:.0%} of a device's memory; try {_REMEDIES}"]))
    return "\n".join([*lines, f"recommended: {chosen.candidate}"])


def plan(config: ConfigDict, target: targets.Target, *, quick: bool = False) -> None:
    """Prints the plan; ``quick`` as in ``forecast.compile_step``.

    Raises:
      ValueError: the config or the target is wrong, or the step does not fit.
    """
    config_lib.validate(config, num_devices=target.num_chips)
    if target.remark:
        print(target.remark)
    mesh = forecast_lib.make_mesh(target, dict(config.mesh))
    forecast = forecast_lib.compile_step(config, mesh, say=_say, quick=quick)
    print(report(config, target, forecast))
    if quick:
        print("compiled quickly: memory is near and above, traffic, exchanges and seconds are higher than a run's")
    share = forecast.peak_bytes / target.chip.memory_bytes
    if share > _FULL:
        told = f"{share:.0%} of a device's memory, wanted {_FULL:.0%} or less; try {_REMEDIES}"
        raise ValueError(f"{forecast_lib.DOES_NOT_FIT}: {told}")


def main(argv: list[str]) -> None:
    """Plans; a wrong argument, or a step that does not fit, ends in one line."""
    if len(argv) > 1:
        raise app.UsageError(f"got {argv[1:]}; wanted --config=FILE --target=KIND:CHIPS")
    jax.config.update("jax_platforms", "cpu")  # what is not compiled for the target runs here
    logging.set_verbosity(logging.WARNING)
    try:
        target = targets.parse(flags.FLAGS.target)
        print("$ python -m skysense_jax.plan", shlex.join(sys.argv[1:]), flush=True)  # so a kept plan can be made again
        if flags.FLAGS.sweep:
            print(sweep(flags.FLAGS.config, target, quick=flags.FLAGS.quick))
        else:
            plan(flags.FLAGS.config, target, quick=flags.FLAGS.quick)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":  # flags are global: a test that imports this and train.py would define --config twice
    config_lib.define_flag()
    flags.DEFINE_string("target", None, "kind and number of chips, e.g. v5p:64, or a cloud's name: v5p-128")
    flags.DEFINE_bool("sweep", False, "compile several meshes, ways of recomputing and microbatches, and recommend one")
    flags.DEFINE_bool("quick", False, "only to see whether it fits: a quarter of the time, traffic and times too high")
    flags.mark_flags_as_required(("config", "target"))
    app.run(main, flags_parser=config_lib.parse_flags)
