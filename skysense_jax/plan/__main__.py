"""Does a run fit a target, and how long does it take: ``python -m skysense_jax.plan --config=FILE --target=v5p:64``.

No accelerator is needed, only its compiler. Ends with 1 and the reason if the step does not fit.
"""

import sys

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict

from skysense_jax import assembly, cost, dry_run
from skysense_jax import config as config_lib
from skysense_jax.chips import GIB
from skysense_jax.plan import forecast as forecast_lib
from skysense_jax.plan import targets

_FULL = 0.85  # of a chip's memory; what is left is for fragments, the input batches ahead and the collectives' buffers
_REMEDIES = (
    "more chips; config.mesh.fsdp larger; config.efficiency.remat='blocks'; config.data.batch_size or views smaller"
)


def formula_flops(config: ConfigDict) -> float:
    """FLOPs of the model in a step by cost.py, without recomputation, over all devices."""
    rows = assembly.assemble(config).modalities
    teacher_local = config.objective.weights.qsacl > 0
    return cost.batch_flops(rows, data=config.data, model=config.model, teacher_local=teacher_local)


def report(config: ConfigDict, target: targets.Target, f: forecast_lib.Forecast) -> str:
    """The table that the command prints."""
    chip, samples = target.chip, config.data.batch_size
    model_flops = formula_flops(config) / target.num_chips
    batch_bytes = dry_run.batch_bytes(assembly.batch_shapes(config, assembly.assemble(config).modalities))
    seconds, hosts = f.step_seconds(target), max(target.num_chips // chip.chips_per_host, 1)
    row = lambda name, number, remark="": f"  {name:<34}{number:>10}  {remark}".rstrip()  # noqa: E731
    gib = lambda num_bytes: f"{num_bytes / GIB:.2f}"  # noqa: E731
    lines = [
        f"{config.name}, batch {samples}, on {target} ({chip.source})",
        f"mesh: {', '.join(f'{axis} {size}' for axis, size in f.mesh_shape.items())}",
        "",
        "of one device, GiB",
        row("state and batch", gib(f.state_bytes)),
        row("activations and gradients", gib(f.temporary_bytes)),
        row("peak", gib(f.peak_bytes), f"{f.peak_bytes / chip.memory_bytes:.0%} of {gib(chip.memory_bytes)}"),
        "",
        "of one device and step",
        row("FLOPs as traced, T", f"{f.flops / 1e12:.4f}", f"{f.flops / model_flops:.2f} x the model's by formula"),
        row("memory traffic, GB", f"{f.traffic.memory_bytes / 1e9:.2f}"),
    ]
    for c in f.traffic.collectives:
        remark = f"in {c.count} exchanges of {c.group}"
        lines.append(row(f"{c.kind} over {'+'.join(c.axes)}, GB", f"{c.bytes_sent / 1e9:.4f}", remark))
    used = model_flops / chip.flops / seconds
    lines += [
        "",
        "seconds a step, at the rates of the table",
        row("compute", f"{f.compute_seconds(chip):.4f}"),
        row("memory", f"{f.memory_seconds(chip):.4f}"),
        row("network, if nothing hides it", f"{f.network_seconds(target):.4f}"),
        row("predicted", f"{seconds:.4f}", f"{used:.0%} of the rated FLOPs do the model's work"),
        "",
        f"{config.optim.num_steps} steps: {config.optim.num_steps * seconds / 86400:.1f} days; "
        f"{samples / seconds:.1f} samples/s, of which each of {hosts} hosts prepares {samples / seconds / hosts:.2f} "
        f"({batch_bytes / seconds / hosts / 1e6:.1f} MB/s as arrays)",
    ]
    return "\n".join(lines)


def plan(config: ConfigDict, target: targets.Target) -> None:
    """Prints the plan.

    Raises:
      ValueError: the config or the target is wrong, or the step does not fit.
    """
    config_lib.validate(config, num_devices=target.num_chips)
    if target.remark:
        print(target.remark)
    mesh = forecast_lib.make_mesh(target, dict(config.mesh))
    forecast = forecast_lib.compile_step(config, mesh)
    print(report(config, target, forecast))
    share = forecast.peak_bytes / target.chip.memory_bytes
    if share > _FULL:
        raise ValueError(f"does not fit: {share:.0%} of a device's memory, wanted {_FULL:.0%} or less; try {_REMEDIES}")


def main(argv: list[str]) -> None:
    """Plans; a wrong argument, or a step that does not fit, ends in one line."""
    if len(argv) > 1:
        raise app.UsageError(f"got {argv[1:]}; wanted --config=FILE --target=KIND:CHIPS")
    jax.config.update("jax_platforms", "cpu")  # what is not compiled for the target runs here
    logging.set_verbosity(logging.WARNING)
    try:
        plan(flags.FLAGS.config, targets.parse(flags.FLAGS.target))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":  # flags are global: a test that imports this and train.py would define --config twice
    config_lib.define_flag()
    flags.DEFINE_string("target", None, "kind and number of chips, e.g. v5p:64, or a cloud's name: v5p-128")
    flags.mark_flags_as_required(("config", "target"))
    app.run(main, flags_parser=config_lib.parse_flags)
