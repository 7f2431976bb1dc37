"""Which parts of the method matter? `tiny` with one thing changed at a time, probed on held-out procedural scenes.

    python -m benchmarks.study --out=runs/study --list              what there is to run, and what is there already
    python -m benchmarks.study --out=runs/study --only=losses       one question; --only=losses/mgcl_off: one row
    python -m benchmarks.study --out=runs/study --minutes=120       no run begins later; a second call goes on

Several processes may share an --out, each with --only of its own.

Every figure is stored under --out as soon as it is there, and the same run answers every question that it stands in.
Seeds are the outer loop: a study that ends early has its first seeds whole. Printed are parameters and mIoU of the
label classes and of attributes that no loss sees, of a linear probe and of nearest neighbours, with 95 % t-intervals
over seeds: of each question's first row, and what the others are above it, seed by seed. --json keeps all raw figures
in one file, from which a study whose --out is gone goes on; --picture draws them. What was run: results.md and
study.json. How to read it: docs/evaluation.md. Next: figures.py.
"""

import argparse
import dataclasses
import fcntl
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks import learning
from benchmarks.figures import Interval, Store, arguments, interval, read_arguments, versions, write_raw, write_whole
from skysense_jax import assembly, drawing, modalities
from skysense_jax import config as config_lib
from skysense_jax.data import scenes
from skysense_jax.eval import probes
from skysense_jax.launch import facts
from skysense_jax.models import skysense
from skysense_jax.sharding import unbox

PROBE_SCENES = dict(num_train_scenes=96, num_test_scenes=96)
NUM_STEPS = 1200  # 300, as in the config, told no part of the method from another (results.md)
SECTIONS = ("data", "model", "objective", "optim", "eval")  # of a config, what a figure depends on
MEASURES = {  # of a row, in points; an attribute is in no record, and no loss sees it
    "labels": probes.LABELS,
    "hidden": "hidden attributes",
    "labels_knn": f"{probes.LABELS}, neighbours",
    "hidden_knn": "hidden attributes, neighbours",
}
DRAWN = ("labels", "hidden")


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row of the study.

    Attributes:
      title: in tables.
      fields: of the config, those that differ (dotted name to value).
      reads: modalities that test scenes show, scored on cells that each modality sees; (): all, on all cells.
      trained: False: what the run starts from is scored, as a yardstick.
    """

    title: str
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reads: tuple[str, ...] = ()
    trained: bool = True


def _weights(**weights: float) -> dict[str, float]:
    return {f"objective.weights.{name}": weight for name, weight in weights.items()}


def _granularity(only: str) -> dict[str, float]:
    return {f"objective.mgcl.{name}_weight": float(name == only) for name in ("pixel", "object", "image")}


def _experts(where: str) -> dict[str, Any]:
    return {"model.backbone.num_moe_blocks": 2, "model.backbone.moe_from": where}


# Question to its rows; the first of a question is what the others are compared with.
QUESTIONS: Mapping[str, Mapping[str, Variant]] = {
    "losses": {
        "all": Variant("all losses"),
        "mgcl_off": Variant("L_MGCL left out", _weights(mgcl=0.0)),
        "qsacl_off": Variant("L_QSACL left out", _weights(qsacl=0.0)),
        "text_off": Variant("L_ITA left out", _weights(text_alignment=0.0)),
        "untrained": Variant("untrained", trained=False),
    },
    "granularity": {
        "all": Variant("L_MGCL of pixels, objects and images"),
        **{only: Variant(f"L_MGCL of {only}s alone", _granularity(only)) for only in ("pixel", "object", "image")},
    },
    "prompts": {
        "on": Variant("4 prompts a modality"),
        "off": Variant("no prompts", {"model.backbone.num_prompts": 0}),
    },
    "merging": {
        "averaged": Variant("averaged merging"),
        "separate": Variant("separate merging", {"model.backbone.merging": "separate"}),
    },
    "sharing": {
        "shared": Variant("one backbone for all modalities"),
        # half the width a third of the parameters each: of a block 12 D^2 become (4 + 2 * 6) (D / 2)^2
        "per_modality": Variant(
            "one backbone per modality, as many parameters in all",
            {
                "model.backbone.shared": False,
                "model.backbone.width": 16,
                "model.backbone.head_width": 16,
                "model.backbone.mlp_ratio": 6,
            },
        ),
    },
    "experts": {
        "dense": Variant("dense"),
        "last": Variant("experts in the last 2 blocks", _experts("end")),
        "first": Variant("experts in the first 2 global blocks", _experts("start")),
    },
    "queries": {str(m): Variant(f"{m} queries", {"model.queries.num_queries": m}) for m in (16, 4, 64, 256)},
    "dates": {
        str(n): Variant(f"{n} of s2 and of s1", {"data.num_dates.s2": n, "data.num_dates.s1": n}) for n in (1, 2, 4, 8)
    },
    "dropped": {
        "none": Variant("all modalities at test time", reads=("hr", "s2", "s1")),
        "hr": Variant("without hr", reads=("s2", "s1")),
        "s2": Variant("without s2", reads=("hr", "s1")),
        "s1": Variant("without s1", reads=("hr", "s2")),
        "hr_alone": Variant("hr alone", reads=("hr",)),
        "s2_alone": Variant("s2 alone", reads=("s2",)),
        "s1_alone": Variant("s1 alone", reads=("s1",)),
    },
}
ROWS = {f"{question}/{row}": variant for question, rows in QUESTIONS.items() for row, variant in rows.items()}


def applied(config: ConfigDict, fields: Mapping[str, Any]) -> ConfigDict:
    """A copy of ``config`` with these dotted fields."""
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(fields)
    return changed


def study_config(config_file: str, *, steps: int) -> ConfigDict:
    """The config of the first rows."""
    config = config_lib.load(config_file)
    config.eval.update(PROBE_SCENES)
    config.optim.num_steps = steps
    return config


def num_parameters(config: ConfigDict) -> int:
    """Parameters of backbone and fusion, which are what is left of a run."""
    rows = modalities.select(config.data.modalities, config.data.new_modalities)
    network, shapes = skysense.build(rows, **config.model), assembly.batch_shapes(config, rows)
    boxed = jax.eval_shape(lambda batch: network.init(jax.random.key(0), batch, train=False), shapes)["params"]
    return sum(leaf.size for part in ("backbone", "fusion") for leaf in jax.tree.leaves(unbox(boxed)[part]))


# ---- figures


Train = Callable[[ConfigDict, Mapping[str, Any], int], tuple[pathlib.Path, float]]
Score = Callable[[ConfigDict, pathlib.Path | None, Variant], dict[str, float | None]]


def measure(
    rows: Mapping[str, Variant],
    config: ConfigDict,
    *,
    seeds: int,
    store: Store,
    train: Train,
    score: Score,
    until: float = math.inf,
) -> dict[str, dict[int, dict[str, Any]]]:
    """Per row and seed its figures, missing ones made first; none is begun after ``until`` (time.monotonic).

    ``train``: of the row's config, its fields and the seed the run's directory and its minutes; ``score``: the probe's
    scores of a run, or of what it starts from.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {row: {} for row in rows}
    for seed in range(seeds):
        for row, variant in rows.items():
            fields = {**variant.fields, "optim.seed": seed, "data.seed": seed}
            changed = applied(config, fields)
            made_by = f"{config_lib.fingerprint(changed, SECTIONS)} {','.join(variant.reads)}".strip()
            made_by += "" if variant.trained else " untrained"
            figures = store.get(row, seed, made_by=made_by) or store.of_twin(seed, made_by=made_by)
            if figures is None:
                if time.monotonic() > until:
                    continue
                workdir, minutes = train(changed, fields, seed) if variant.trained else (None, 0.0)
                figures = {
                    "config": made_by,
                    "code": facts.code_digest(),
                    "steps": config.optim.num_steps if variant.trained else 0,
                    "minutes": minutes,
                    "parameters": num_parameters(changed),
                    "scores": score(changed, workdir, variant),
                }
                store.put(row, seed, figures)
                print(f"{row} seed {seed}: {figures['scores']}", file=sys.stderr, flush=True)
            found[row][seed] = figures
    return {row: of_row for row, of_row in found.items() if of_row}


class Runs:
    """Trains and scores, each run once however many rows ask for it."""

    def __init__(self, config_file: str, out: pathlib.Path, records: pathlib.Path):
        self.config_file, self._out, self._records = config_file, out, records

    def train(self, config: ConfigDict, fields: Mapping[str, Any], seed: int) -> tuple[pathlib.Path, float]:
        """The run's directory and its minutes of training; one that was killed goes on, one that another process is at
        is waited for."""
        sections = ("data", "model", "objective", "optim")
        workdir = self._out / "runs" / f"seed{seed}_{config_lib.fingerprint(config, sections)}"
        done = workdir / "study.json"
        workdir.parent.mkdir(parents=True, exist_ok=True)
        with workdir.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                found = learning.train(config, self.config_file, workdir, self._records, **fields)
                write_whole(done, json.dumps(found))
        return workdir, json.loads(done.read_text())["minutes"]

    def score(self, config: ConfigDict, workdir: pathlib.Path | None, variant: Variant) -> dict[str, float | None]:
        """Of the probe; None where there was nothing to tell apart."""
        probe = learning.Probe(config, reads=variant.reads)
        found = probe.trained(workdir) if workdir else probe.untrained(config.optim.seed)
        return {name: value if math.isfinite(value) else None for name, value in found.items()}


# ---- tables


def measures(scores: Mapping[str, float | None]) -> dict[str, float]:
    """Of one row and seed, mIoU of the linear probe and of nearest neighbours: of the label classes, and the mean over
    attributes; NaN where one had nothing to tell apart."""

    def of(task: str, kind: str) -> float:
        value = scores[f"{task}/{kind}"]
        return math.nan if value is None else value

    found = {}
    for kind, name in (("miou", ""), ("knn_miou", "_knn")):
        hidden = float(np.mean([of(task, kind) for task in scenes.ATTRIBUTES]))
        found |= {f"labels{name}": of(probes.LABELS, kind), f"hidden{name}": hidden}
    return found


@dataclasses.dataclass(frozen=True)
class Line:
    """A row that was run.

    Attributes:
      whole: its measures over its seeds.
      seeds: its measures, a seed each.
      apart: differences from the question's first row, paired by seed; None: it is the first, or they share no seed.
      num_pairs: how many seeds they share.
    """

    whole: Mapping[str, Interval]
    seeds: Sequence[Mapping[str, float]]
    apart: Mapping[str, Interval] | None
    num_pairs: int


def lines_of(question: str, rows: Iterable[str], found: Mapping[str, Mapping[int, Any]]) -> dict[str, Line]:
    """Per row that was run what is told of it."""
    names, lines, base = list(rows), {}, {}
    for row in names:
        own = {seed: measures(figures["scores"]) for seed, figures in found.get(f"{question}/{row}", {}).items()}
        base = own if row == names[0] else base
        if not own:
            continue
        shared = [seed for seed in own if seed in base and row != names[0]]
        whole = {key: interval(x[key] for x in own.values()) for key in MEASURES}
        apart = {key: interval(own[seed][key] - base[seed][key] for seed in shared) for key in MEASURES if shared}
        lines[row] = Line(whole, list(own.values()), apart or None, len(shared))
    return lines


def table(found: Mapping[str, Mapping[int, Any]], questions: Mapping[str, Mapping[str, Variant]] = QUESTIONS) -> str:
    """All questions that have a row, as markdown; what was not run says so."""
    text = []
    for question, rows in questions.items():
        lines = lines_of(question, rows, found)
        if not lines:
            continue
        text += [f"| {question} | parameters | seeds | {' | '.join(MEASURES.values())} |", "|---" * 7 + "|"]
        for row, variant in rows.items():
            if row not in lines:
                text.append(f"| {variant.title} | not run |" + " |" * 5)
                continue
            line, of_row = lines[row], found[f"{question}/{row}"]
            told = [f"{x:+}" for x in line.apart.values()] if line.apart else [f"{x}" for x in line.whole.values()]
            parameters = next(iter(of_row.values()))["parameters"]
            num_seeds = line.num_pairs or len(line.seeds)
            text.append(f"| {variant.title} | {parameters:,} | {num_seeds} | {' | '.join(told)} |")
        text.append("")
    cells = [figures for of_row in found.values() for figures in of_row.values()]
    steps = sorted({figures["steps"] for figures in cells})
    text += [f"- {len(cells)} figures, runs of {' or '.join(map(str, steps)) or 'no'} steps; mIoU in points, mean and"]
    text[-1] += " 95 % t-interval over seeds; with a sign: above the question's first row, seed by seed"
    text[-1] += versions(cells)
    return "\n".join(text)


def picture(path: pathlib.Path, found: Mapping[str, Mapping[int, Any]]) -> pathlib.Path | None:
    """Path of the picture: a panel a question and measure, a line a row, its seeds as dots and their interval.

    A question of which one row was run compares nothing and has no panel; None if there is no other.
    """
    told = {name: lines_of(name, rows, found) for name, rows in QUESTIONS.items()}
    told = {name: lines for name, lines in told.items() if len(lines) > 1}
    if not told:
        return None
    heights = [len(lines) + 1.5 for lines in told.values()]
    figure = drawing.new_figure(11.0, 0.32 * sum(heights))
    grid = figure.subplots(len(told), len(DRAWN), sharex="col", sharey="row", squeeze=False, height_ratios=heights)
    for of_question, (question, lines) in zip(grid, told.items()):
        for axes, key in zip(of_question, DRAWN):
            for place, line in enumerate(lines.values()):
                half = line.whole[key].half
                around = 100 * half if math.isfinite(half) else None
                axes.errorbar([100 * line.whole[key].mean], [place], xerr=around, fmt="D", color="black", capsize=3)
                axes.plot([100 * x[key] for x in line.seeds], [place] * len(line.seeds), ".", color="tab:blue")
            axes.grid(axis="x", linewidth=0.4)
        of_question[0].set_yticks(range(len(lines)), [QUESTIONS[question][row].title for row in lines], fontsize=8)
        of_question[0].set_ylim(len(lines) - 0.5, -0.5)
        of_question[0].set_title(question, fontsize=9, loc="left")
    for axes, key in zip(grid[-1], DRAWN):
        axes.set_xlabel(f"{MEASURES[key]}, mIoU in points", fontsize=9)
    grid[0, -1].set_title("dots: seeds, bar: 95 % interval", fontsize=8, loc="right")
    return drawing.save(figure, path)


# ---- the command


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__, num_steps=NUM_STEPS)
    parser.add_argument("--config", default="configs/tiny.py")
    parser.add_argument("--only", action="append", help="a question, or QUESTION/ROW (may be repeated)")
    parser.add_argument("--list", action="store_true", help="rows, and the seeds of which there are figures; no run")
    parser.add_argument("--picture", type=pathlib.Path, help="PNG to draw")
    args = read_arguments(parser, argv)
    unknown = [name for name in args.only or () if name not in QUESTIONS and name not in ROWS]
    if unknown:
        parser.error(f"--only: no {', '.join(unknown)}; wanted one of {', '.join(QUESTIONS)}, or QUESTION/ROW (--list)")
    asked = args.only or QUESTIONS
    args.rows = {row: variant for row, variant in ROWS.items() if row in asked or row.split("/")[0] in asked}
    return args


def run(args: argparse.Namespace) -> None:
    """Prints the list, or measures what is missing and prints the table.

    Raises:
      ValueError: a field is wrong, or --out holds figures of another config.
    """
    until = time.monotonic() + 60 * args.minutes
    config = study_config(args.config, steps=args.steps)
    for variant in args.rows.values():
        config_lib.validate(applied(config, variant.fields))
    store = Store(args.out, args.json)
    if args.list:
        given = dict(seeds=args.seeds, store=store, train=None, score=None, until=-math.inf)
        found = measure(args.rows, config, **given)
        for row, variant in args.rows.items():
            print(f"{row:<24} {variant.title:<56} seeds there: {sorted(found.get(row, {})) or 'none'}")
        return
    runs = Runs(args.config, args.out, learning.write_records(config, args.out))
    given = dict(seeds=args.seeds, store=store, train=runs.train, score=runs.score, until=until)
    found = measure(args.rows, config, **given)
    if args.json:
        write_raw(args.json, found)
    if args.picture:
        picture(args.picture, found)
    print(table(found))


def main() -> None:
    try:
        run(parse())
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
