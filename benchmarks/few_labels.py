"""How many labels does pre-training save? Land cover of held-out procedural scenes from 1, 10 and 100 % of the labels.

    python -m benchmarks.few_labels --out=runs/study            (shares the runs of benchmarks.study with that --out)

Rows: raw bands of the 3x3 neighbourhood, the network untrained and the teachers of runs, each under a linear classifier
and k nearest neighbours; the same network trained on the labels alone, from scratch; and the teachers fine-tuned in the
same way. L_ITA reads the classes of the scenes that a run trains on, which are those asked for here: so there is a
teacher that it was left out of, which saw no label at all. Runs, labels that are drawn and weights from scratch change
with the seed; scenes to test on do not. Every figure is stored under --out as soon as it is there.
Results: benchmarks/results.md and few_labels.json. Next: figures.py.
"""

import dataclasses
import hashlib
import itertools
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks import figures, learning, study
from skysense_jax import assembly, modalities
from skysense_jax import config as config_lib
from skysense_jax.data import scenes
from skysense_jax.eval import probes
from skysense_jax.eval.features import read_whole
from skysense_jax.launch import facts
from skysense_jax.modalities import OSM, Modality
from skysense_jax.models import skysense
from skysense_jax.tasks import finetune, frozen, linear, loading
from skysense_jax.tasks.examples import SEGMENTATION, Example, Examples, take_share

SHARES = (0.01, 0.1, 1.0)
NUM_TRAIN, NUM_TEST = 100, 48  # scenes, the first of those that the study's probe has
FROZEN, TUNED = "frozen", "tuned"
NO_TEXT = study.QUESTIONS["losses"]["text_off"].fields


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
      title: in it.
      protocol: FROZEN or TUNED.
      fields: of the config of the run that gives the weights; None: they are initial ones.
      raw: bands in place of a network.
    """

    title: str
    protocol: str
    fields: Mapping[str, Any] | None = None
    raw: bool = False


ROWS = {
    "raw": Row("raw bands 3x3", FROZEN, raw=True),
    "untrained": Row("untrained", FROZEN),
    "no_text": Row("pre-trained without L_ITA", FROZEN, NO_TEXT),
    "teacher": Row("pre-trained", FROZEN, {}),
    "scratch": Row("supervised from scratch, all weights", TUNED),
    "no_text_tuned": Row("pre-trained without L_ITA, then all weights tuned", TUNED, NO_TEXT),
    "tuned": Row("pre-trained, then all weights tuned", TUNED, {}),
}
COMPARED = (  # differences that are told, seed by seed
    *((row, less) for row in ("no_text", "teacher") for less in ("untrained", "raw")),
    *((row, "scratch") for row in ("no_text_tuned", "tuned")),
)
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
    """The untrained network and the teachers of a seed; runs are trained where they are missing."""

    def __init__(self, config: ConfigDict, runs: study.Runs):
        self._config, self._runs = config, runs

    def of(self, fields: Mapping[str, Any] | None, seed: int) -> loading.Model:
        """The teacher of the run with these fields, or what it started from."""
        if fields is None:
            return self.untrained(seed)
        fields = {**fields, "optim.seed": seed, "data.seed": seed}
        workdir, _ = self._runs.train(study.applied(self._config, fields), fields, seed)
        return loading.load(workdir)

    def untrained(self, seed: int) -> loading.Model:
        """What every run of the seed starts from."""
        rows = modalities.select(self._config.data.modalities, self._config.data.new_modalities)
        network = skysense.build(rows, **self._config.model, **assembly.efficiency(self._config))
        params = jax.device_get(learning.initial_params(self._config, rows, network, seed))
        return loading.model_of(network, params, rows, self._config, "untrained")


def score(
    row: Row, config: ConfigDict, networks: Networks, train: Examples, test: Examples, seed: int
) -> dict[str, dict[str, float]]:
    """Per protocol the scores of a row; raw bands need no run."""
    options = frozen.Options(seed=seed)
    if row.raw:
        rows = modalities.select(config.data.modalities, config.data.new_modalities)
        read = raw_reader(rows, dict(config.data.num_dates))
        return frozen.evaluate_cells(read, train, test, options, protocols=frozen.PROTOCOLS)
    model = networks.of(row.fields, seed)
    if row.protocol == TUNED:
        tuning = dataclasses.replace(TUNING, seed=seed)
        return {TUNED: finetune.finetune(model, train, test, task=SEGMENTATION, options=tuning)}
    return frozen.evaluate(model, train, test, options, protocols=frozen.PROTOCOLS)


def fingerprint(config: ConfigDict, protocol: str) -> str:
    """Of all that a figure depends on but its row, share and seed."""
    how = (TUNING,) if protocol == TUNED else (frozen.Options(), linear.INVERSE_PENALTIES)
    here = hashlib.sha256(repr((*how, NUM_TRAIN, NUM_TEST)).encode()).hexdigest()[:8]
    return f"{config_lib.fingerprint(config, study.SECTIONS)} {here}"


def cell_of(row: str, share: float) -> str:
    """A figure's name."""
    return f"few_labels/{row}_{share:g}"


def measure(
    config: ConfigDict,
    rows: Sequence[str],
    *,
    seeds: int,
    store: figures.Store,
    networks: Networks,
    until: float = math.inf,
) -> dict[str, dict[int, dict[str, Any]]]:
    """Per name (``cell_of``) and seed the figures, missing ones made first; none begins after ``until`` (monotonic)."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    parts: tuple[Examples, ...] = ()
    for seed, row, share in itertools.product(range(seeds), rows, SHARES):
        cell, made_by = cell_of(row, share), fingerprint(config, ROWS[row].protocol)
        kept = store.get(cell, seed, made_by=made_by)
        if kept is None and time.monotonic() < until:
            first = config.eval.first_index
            parts = parts or (
                labelled_scenes(config, first, NUM_TRAIN),
                labelled_scenes(config, first + NUM_TRAIN, NUM_TEST),
            )
            train, test = take_share(parts[0], share, seed=seed), parts[1]
            scores = score(ROWS[row], config, networks, train, test, seed)
            kept = dict(config=made_by, code=facts.code_digest(), num_train=len(train), scores=scores)
            store.put(cell, seed, kept)
            print(f"{cell} seed {seed}: {scores}", file=sys.stderr, flush=True)
        if kept is not None:
            found.setdefault(cell, {})[seed] = kept
    return found


def table(found: Mapping[str, Mapping[int, Any]]) -> str:
    """As markdown: mIoU by row and protocol, a column a share; then differences; what was not run says so."""

    def cells(row: str, protocol: str) -> list[dict[int, float]]:
        of_row = [found.get(cell_of(row, share), {}) for share in SHARES]
        return [{seed: x["scores"][protocol]["miou"] for seed, x in cell.items()} for cell in of_row]

    def line(title: str, protocol: str, columns: Sequence[Mapping[int, float]], sign: str = "") -> str:
        told = [f"{figures.interval(column.values()):{sign}}" if column else "not run" for column in columns]
        counts = sorted({len(column) for column in columns})
        return f"| {title} | {protocol} | {' | '.join(told)} | {' or '.join(map(str, counts))} |"

    heads = [f"{share:.0%} of {NUM_TRAIN} scenes" for share in SHARES]
    lines = [f"| mIoU | protocol | {' | '.join(heads)} | seeds |", "|---" * (len(SHARES) + 3) + "|"]
    protocols = {name: frozen.PROTOCOLS[::-1] if row.protocol == FROZEN else (TUNED,) for name, row in ROWS.items()}
    lines += [
        line(row.title, protocol, cells(name, protocol)) for name, row in ROWS.items() for protocol in protocols[name]
    ]
    for name, less in COMPARED:
        for protocol in protocols[name]:
            pairs = zip(cells(name, protocol), cells(less, protocol))
            apart = [{seed: own[seed] - other[seed] for seed in own.keys() & other.keys()} for own, other in pairs]
            lines.append(line(f"{ROWS[name].title} - {ROWS[less].title}", protocol, apart, "+"))
    lines.append("")
    lines.append(f"- points, mean and 95 % t-interval over seeds; pixels of {NUM_TEST} held-out scenes")
    lines[-1] += figures.versions(kept for of_cell in found.values() for kept in of_cell.values())
    return "\n".join(lines)


def main() -> None:
    parser = figures.arguments(__doc__, num_steps=study.NUM_STEPS)
    parser.add_argument("--config", default="configs/tiny.py")
    parser.add_argument("--only", action="append", choices=tuple(ROWS), help="rows (may be repeated)")
    args = figures.read_arguments(parser)
    until = time.monotonic() + 60 * args.minutes
    config = study.study_config(args.config, steps=args.steps)
    try:
        store = figures.Store(args.out, args.json)
        networks = Networks(config, study.Runs(args.config, args.out, learning.write_records(config, args.out)))
        given = dict(seeds=args.seeds, store=store, networks=networks, until=until)
        found = measure(config, args.only or tuple(ROWS), **given)
        if args.json:
            figures.write_raw(args.json, found)
        print(table(found))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
