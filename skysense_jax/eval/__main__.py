"""Scores of a trained network on a labelled dataset: ``python -m skysense_jax.eval --model=RUN --dataset=NAME:DIR``.

What it does: tasks/evaluate.py. Datasets and protocols: docs/evaluation.md.
"""

import argparse
import dataclasses
import pathlib
import sys

from absl import logging

try:
    from skysense_jax.tasks import evaluate
    from skysense_jax.tasks.examples import KINDS
except ModuleNotFoundError as error:  # a user's environment, so one line
    sys.exit(f"error: {error}")

_TILES_HELP = (
    f"side of the parts that images with maps are cut into: {evaluate.TILE_CELLS}, or {evaluate.TUNED_TILE_CELLS} to "
    "fine-tune on"
)


def main(arguments: list[str]) -> None:
    """Prints the scores; a wrong argument or dataset ends in one line."""
    parser = argparse.ArgumentParser(prog="python -m skysense_jax.eval", description=__doc__.split("\n")[0])
    default = {field.name: field.default for field in dataclasses.fields(evaluate.Request)}
    parser.add_argument("--model", required=True, help="workdir of a run, or an exported directory")
    parser.add_argument("--step", help="of the run's checkpoint, or best (of probes); the newest by default")
    parser.add_argument("--dataset", required=True, help="NAME:DIR of a known one, or DIR with card.json or records")
    parser.add_argument("--task", choices=KINDS, help="by default that of the dataset's card")
    parser.add_argument("--protocol", choices=evaluate.PROTOCOLS, default=default["protocol"])
    parser.add_argument("--label_share", type=float, default=1.0, help="of the training labels, for few-label regimes")
    parser.add_argument("--train_share", type=float, help="of all examples, of a dataset without a split of its own")
    parser.add_argument("--modalities", default="", help="some of the model's, such as hr,s2; all by default")
    parser.add_argument("--gsd_m", type=float, help="metres that a pixel of a picture without a place is taken to have")
    parser.add_argument("--l1c_as_s2", action="store_true", help="Level-1C for a model that knows s2 only")
    parser.add_argument("--tile_cells", type=int, help=_TILES_HELP)
    parser.add_argument("--max_cells", type=int, default=default["max_cells"], help="of maps, to fit linear and knn on")
    parser.add_argument("--batch_size", type=int, default=default["batch_size"], help="windows encoded at a time")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn: splits, shares, held-out parts")
    parser.add_argument("--tune", action="append", default=[], metavar="FIELD=VALUE", help="of fine-tuning, repeated")
    parser.add_argument("--out", type=pathlib.Path, help="folder for a JSON file of the result")
    given = vars(parser.parse_args(arguments))
    given["tune"] = tuple(given["tune"])
    given["modalities"] = tuple(name for name in given["modalities"].split(",") if name)
    logging.set_verbosity(logging.ERROR)  # Orbax warns that a manager which only reads does not write
    try:
        result = evaluate.evaluate(evaluate.Request(**given))
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
    print(evaluate.table(result))


if __name__ == "__main__":
    main(sys.argv[1:])
