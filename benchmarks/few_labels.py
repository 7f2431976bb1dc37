"""How many labels does pre-training save? Land cover of held-out procedural scenes from 1, 10 and 100 % of the labels.

    python -m benchmarks.few_labels --out=runs/study            (shares the runs of benchmarks.study with that --out)

Rows: raw bands of the 3x3 neighbourhood, the network untrained and the run's teacher, each under a linear classifier
and k nearest neighbours; the same network trained on the labels alone, from scratch; and the teacher fine-tuned in the
same way. Runs, labels that are drawn and weights from scratch change with the seed; scenes to test on do not. Every
figure is stored under --out as soon as it is there. Results: benchmarks/results.md.
"""

import argparse
import dataclasses
import functools
import hashlib
import math
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from benchmarks import learning, study
from skysense_jax import assembly, modalities, sharding
from skysense_jax import config as config_lib
from skysense_jax.data import scenes
from skysense_jax.eval import probes
from skysense_jax.eval.features import read_whole
from skysense_jax.modalities import OSM, Modality
from skysense_jax.tasks import finetune, frozen, loading
from skysense_jax.tasks.examples import SEGMENTATION, Example, Examples, take_share
from skysense_jax.train_state import create_state

SHARES = (0.01, 0.1, 1.0)
NUM_TRAIN, NUM_TEST = 100, 48  # scenes, those of a study's probe among them
FROZEN, TUNED = "frozen", "tuned"
ROWS = {  # row: title, what is used (None: raw bands), and how
    "raw": ("raw bands 3x3", None, FROZEN),
    "untrained": ("untrained", "untrained", FROZEN),
    "teacher": ("pre-trained", "teacher", FROZEN),
    "scratch": ("supervised from scratch, all weights", "untrained", TUNED),
    "tuned": ("pre-trained, then all weights tuned", "teacher", TUNED),
}
# Of both tuned rows, the rate that suits a small network from scratch. Not searched.
TUNING = finetune.Options(
    features="fused",
    num_steps=400,
    batch_size=16,
    learning_rate=1e-3,
    warmup_steps=40,
    layer_decay=1.0,
    drop_path=0.0,
    decoder_width=128,
)


def labelled_scenes(config: ConfigDict, first: int, count: int) -> Examples:
    """Held-out complete scenes with their label maps, 0 of which is no label."""
    how = dict(seed=config.data.scenes.seed, extent_cells=config.data.scenes.extent_cells, complete=True)
    made = []
    for index in range(first, first + count):
        sample = scenes.render(index, modalities=tuple(config.data.modalities), **how).sample
        ids = sample.labels_window(0, 0, sample.extent_cells)
        target = np.where(ids == 0, frozen.IGNORED, ids - 1).astype(np.uint8)
        made.append(Example(str(index), sample, None, target))
    return Examples(made, OSM.classes, SEGMENTATION)


def raw_reader(rows: Sequence[Modality], num_dates: Mapping[str, int]) -> frozen.Reader:
    """Cells of raw bands, in place of features."""

    def read(examples: Examples) -> Iterator[tuple[Example, frozen.Cells]]:
        for example in examples:
            whole = read_whole(example.before, rows, num_dates=num_dates)
            yield example, frozen.Cells(*probes.raw_cells(whole, rows))

    return read


class Networks:
    """The untrained network and the teacher of a seed; runs are trained where they are missing."""

    def __init__(self, config: ConfigDict, runs: study.Runs):
        self._config, self._runs = config, runs

    @functools.lru_cache(maxsize=1)  # noqa: B019  # one object, a seed at a time
    def teacher(self, seed: int) -> loading.Model:
        fields = {"optim.seed": seed, "data.seed": seed}
        workdir, _ = self._runs.train(study.applied(self._config, fields), fields, seed)
        return loading.load(workdir)

    def untrained(self, seed: int) -> loading.Model:
        """What the run of the seed started from."""
        model, mesh = self.teacher(seed), sharding.make_mesh(**self._config.mesh)
        with jax.set_mesh(mesh):
            shapes = assembly.batch_shapes(self._config, model.rows)
            params = create_state(model.network, optax.identity(), shapes, seed=seed, mesh=mesh).teacher
        return dataclasses.replace(model, params=jax.device_get(params), name="untrained")


def score(
    row: str, config: ConfigDict, networks: Networks, train: Examples, test: Examples, seed: int
) -> dict[str, dict[str, float]]:
    """Per protocol the scores of a row; raw bands need no run."""
    _, weights, how = ROWS[row]
    options = frozen.Options(seed=seed)
    if weights is None:
        rows = modalities.select(config.data.modalities, config.data.new_modalities)
        read = raw_reader(rows, dict(config.data.num_dates))
        return frozen.evaluate_cells(read, train, test, options, protocols=frozen.PROTOCOLS)
    model = getattr(networks, weights)(seed)
    if how == TUNED:
        tuning = dataclasses.replace(TUNING, seed=seed)
        return {TUNED: finetune.finetune(model, train, test, task=SEGMENTATION, options=tuning)}
    return frozen.evaluate(model, train, test, options, protocols=frozen.PROTOCOLS)


def fingerprint(config: ConfigDict) -> str:
    """Of all that a figure depends on but its row, share and seed."""
    here = hashlib.sha256(repr((TUNING, NUM_TRAIN, NUM_TEST)).encode()).hexdigest()[:8]
    return f"{config_lib.fingerprint(config, study.SECTIONS)} {here}"


def measure(
    config: ConfigDict,
    rows: Sequence[str],
    *,
    seeds: int,
    store: study.Store,
    networks: Networks,
    until: float = math.inf,
) -> dict[str, dict[int, dict[str, Any]]]:
    """Per "row/share" and seed its figures, missing ones made first; none is begun after ``until`` (time.monotonic)."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    made_by = fingerprint(config)
    parts: tuple[Examples, ...] = ()
    for seed in range(seeds):
        for row in rows:
            for share in SHARES:
                cell = f"few_labels/{row}_{share:g}"
                figures = store.get(cell, seed, made_by=made_by)
                if figures is None and time.monotonic() < until:
                    first = config.eval.first_index
                    parts = parts or (
                        labelled_scenes(config, first, NUM_TRAIN),
                        labelled_scenes(config, first + NUM_TRAIN, NUM_TEST),
                    )
                    train, test = take_share(parts[0], share, seed=seed), parts[1]
                    scores = score(row, config, networks, train, test, seed)
                    figures = dict(config=made_by, num_train=len(train), scores=scores)
                    store.put(cell, seed, figures)
                    print(f"{cell} seed {seed}: {figures['scores']}", file=sys.stderr, flush=True)
                if figures is not None:
                    found.setdefault(f"{row}/{share:g}", {})[seed] = figures
    return found


def table(found: Mapping[str, Mapping[int, Any]]) -> str:
    """As markdown: mIoU by row and protocol, a column a share; what was not run says so."""
    heads = [f"{share:.0%} of {NUM_TRAIN} scenes" for share in SHARES]
    lines = [f"| mIoU | protocol | {' | '.join(heads)} | seeds |", "|---" * (len(SHARES) + 3) + "|"]
    for row, (title, _, how) in ROWS.items():
        for protocol in frozen.PROTOCOLS[::-1] if how == FROZEN else (TUNED,):
            cells = [found.get(f"{row}/{share:g}", {}) for share in SHARES]
            told = [
                str(study.interval([x["scores"][protocol]["miou"] for x in cell.values()])) if cell else "not run"
                for cell in cells
            ]
            lines.append(f"| {title} | {protocol} | {' | '.join(told)} | {max(map(len, cells))} |")
    lines.append("")
    lines.append(f"- points, mean and 95 % t-interval over seeds; pixels of {NUM_TEST} held-out scenes")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="where figures, records and runs are kept")
    parser.add_argument("--config", default="configs/tiny.py")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=study.NUM_STEPS, help=f"of every run ({study.NUM_STEPS})")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no figure is begun later than this")
    parser.add_argument("--only", action="append", choices=tuple(ROWS), help="rows (may be repeated)")
    args = parser.parse_args()
    until, out = time.monotonic() + 60 * args.minutes, args.out.resolve()
    config = study.study_config(args.config, steps=args.steps)
    try:
        networks = Networks(config, study.Runs(args.config, out, learning.write_records(config, out)))
        given = dict(seeds=args.seeds, store=study.Store(out), networks=networks, until=until)
        print(table(measure(config, args.only or tuple(ROWS), **given)))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
