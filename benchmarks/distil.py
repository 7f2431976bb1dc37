"""Does distillation help? `tiny` alone against `tiny` distilled from a wider one, at equal steps.

    python -m benchmarks.distil --out=runs/distil            (hours on 2 cores; a second call goes on)

Rows: `tiny` trained alone; its teacher, `tiny` at twice the width trained as the first row is; `tiny` with the
objective of configs/distil.py. Scenes, probe, store and table are those of study.py. What was run: results.md.
"""

import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from benchmarks import figures, learning, study
from configs import distil
from skysense_jax import config as config_lib

_TEACHER = {"model.backbone.width": 64, "model.fusion.width": 256}
_WEIGHTS = {f"objective.weights.{name}": weight for name, weight in distil.get_config().objective.weights.items()}
QUESTIONS = {
    "distillation": {
        "alone": study.Variant("tiny alone"),
        "teacher": study.Variant("its teacher, twice as wide", _TEACHER),
        "distilled": study.Variant("tiny distilled", {**_WEIGHTS, "objective.distil.teacher": "the row above"}),
    }
}
ROWS = {f"distillation/{row}": variant for row, variant in QUESTIONS["distillation"].items()}


class Runs(study.Runs):
    """A distilled run is preceded by its teacher's, of the same seed."""

    def train(self, config: ConfigDict, fields: Mapping[str, Any], seed: int) -> tuple[pathlib.Path, float]:
        if config.objective.weights.distil:
            of_teacher = {"optim.seed": seed, "data.seed": seed, **_TEACHER}
            base = config_lib.load(self.config_file)
            base.optim.num_steps = config.optim.num_steps
            teacher, _ = super().train(study.applied(base, of_teacher), of_teacher, seed)
            fields = {**fields, "objective.distil.teacher": str(teacher)}
            config = study.applied(config, fields)
        return super().train(config, fields, seed)


def main() -> None:
    args = figures.read_arguments(figures.arguments(__doc__, num_steps=study.NUM_STEPS))
    until = time.monotonic() + 60 * args.minutes
    config = study.study_config("configs/tiny.py", steps=args.steps)
    try:
        store = figures.Store(args.out, args.json)
        runs = Runs("configs/tiny.py", args.out, learning.write_records(config, args.out))
        given = dict(seeds=args.seeds, store=store, train=runs.train, score=runs.score, until=until)
        found = study.measure(ROWS, config, **given)
        if args.json:
            figures.write_raw(args.json, found)
        print(study.table(found, QUESTIONS))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
