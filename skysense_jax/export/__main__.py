"""Writes the weights of a run for PyTorch: ``python -m skysense_jax.export --workdir=RUN --out=DIR``.

Of the run only the wanted parameters are read, on this host's CPU, whatever mesh saved them. What the directory holds:
write.py. The way back: from_torch.py.
"""

import argparse
import pathlib
import signal
import sys

import jax
import numpy as np
from absl import logging

from skysense_jax import __version__, assembly, checkpoint, modalities, sharding, storage
from skysense_jax import config as config_lib
from skysense_jax.config_checks import fields_of
from skysense_jax.export import card, names, write
from skysense_jax.models import skysense
from skysense_jax.trees import named_leaves

PARTS = {"backbone": ("backbone",), "fused": ("backbone", "fusion"), "all": None}  # None: every parameter

_PART_HELP = "fused: backbone and fusion; all: also the queries and heads of pre-training, for from_torch"


def export(
    workdir: storage.Directory,
    out: pathlib.Path,
    *,
    step: int | None,
    weights: str,
    part: str,
    licence: str,
    arguments: list[str],
) -> int:
    """Writes ``out``; the step that was exported.

    Raises:
      ValueError: ``out`` exists, there is no such checkpoint, or it is of another version of the network.
      RuntimeError: no checkpoint verifies.
    """
    write.check_out(out)
    if storage.in_bucket(workdir) and (told := storage.problem(str(workdir))):
        raise ValueError(f"--workdir: {workdir}: {told}")
    config = config_lib.unflatten(checkpoint.read_meta(workdir, step=step)["config"])
    rows = modalities.select(config.data.modalities, config.data.new_modalities)
    try:
        model = skysense.build(rows, **config.model)
    except TypeError as error:
        raise ValueError(
            f"--workdir: the run's config.model is not that of skysense_jax {__version__}: {error}"
        ) from error
    shapes = assembly.batch_shapes(config, rows)
    boxed = jax.eval_shape(lambda batch: model.init(jax.random.key(0), batch, train=False), shapes)["params"]
    restored = checkpoint.restore_params(workdir, sharding.unbox(boxed), weights=weights, parts=PARTS[part], step=step)
    step, params = restored.step, {path: np.asarray(leaf) for path, leaf in named_leaves(restored.state).items()}
    settings = fields_of(config_lib.unflatten(restored.meta["config"]))
    del restored  # the arrays are held by ``params`` alone, which gives each away when it is used
    num_parameters = sum(array.size for array in params.values())
    fusion = None if part == "backbone" else config.model.fusion
    state = names.join(list(names.weights(rows, backbone=config.model.backbone, fusion=fusion)), params)
    heads = params if part == "all" else None
    assert part == "all" or not params, sorted(params)
    text = card.write_card(
        rows,
        num_parameters=num_parameters,
        weights=weights,
        part=part,
        step=step,
        settings=settings,
        overrides=_overrides(settings),
        losses=card.last_losses(workdir, step),
        probe=card.probe_scores(workdir, step, labelled=[name for name, *_ in settings.get("eval.datasets", ())]),
        licence=licence,
        export_arguments=arguments,
        version=__version__,
    )
    training = dict(step=step, weights=weights, part=part, skysense_jax=__version__, config=settings)
    description = write.describe(rows, backbone=config.model.backbone, fusion=fusion, training=training)
    write.write_directory(out, state=state, config=description, card=text, heads=heads)
    return step


def _overrides(settings):
    """Fields of the run that differ from those of the config file of its name; all, if there is no such file."""
    path = config_lib.resolve_path(f"configs/{settings['name']}.py")
    base = dict(fields_of(config_lib.load(path))) if path.is_file() else {}
    return {field: value for field, value in sorted(settings.items()) if base.get(field) != value}


def main(arguments: list[str]) -> None:
    """Exports, and says where to; a wrong argument ends in one line."""
    parser = argparse.ArgumentParser(prog="python -m skysense_jax.export", description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", required=True, help="of the run; also gs://bucket/name")
    parser.add_argument("--step", help="of the checkpoint, or best (of probes); the newest that verifies by default")
    parser.add_argument("--weights", choices=("teacher", "student"), default="teacher")
    parser.add_argument("--part", choices=tuple(PARTS), default="fused", help=_PART_HELP)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="directory to make")
    parser.add_argument("--licence", default="", help="of the weights, as an SPDX id, for the model card")
    given = vars(parser.parse_args(arguments))
    jax.config.update("jax_platforms", "cpu")  # a checkpoint of any size fits a host, not always a device
    logging.set_verbosity(logging.ERROR)  # Orbax warns that a manager which only reads does not write
    try:
        workdir = storage.run_directory(given.pop("workdir"))
        given["step"] = checkpoint.asked_step(workdir, given["step"])
        step = export(workdir, **given, arguments=arguments)
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"step {step}, {given['weights']}: {given['out']}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a scheduler's kill tidies up as Ctrl-C does
    main(sys.argv[1:])
