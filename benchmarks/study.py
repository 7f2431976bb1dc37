"""Which parts of the method matter? `tiny` with one thing changed at a time, probed on held-out procedural scenes.

    python -m benchmarks.study --out=runs/study --list              what there is to run, and what is there already
    python -m benchmarks.study --out=runs/study --only=losses       one question; --only=losses/mgcl_off: one row
    python -m benchmarks.study --out=runs/study --minutes=120       no run begins later; a second call goes on

Several processes may share an --out, each with --only of its own.

Every figure is stored under --out as soon as it is there, and the same run answers every question that it stands in.
Seeds are the outer loop: a study that ends early has its first seeds whole. Printed are, per row, parameters, mIoU of
the label classes and the mean over all tasks, of nearest neighbours too, with 95 % t-intervals over seeds, and the
differences from the question's first row, seed by seed. --json keeps all raw figures in one file, from which a study
whose --out is gone goes on; --picture draws them. What was run: results.md and study.json. How to read it:
docs/evaluation.md.
"""

import argparse
import dataclasses
import fcntl
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from scipy import stats

from benchmarks import learning
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
MEASURES = {"labels": f"{probes.LABELS} mIoU", "mean": "mean mIoU", "neighbours": "neighbours' mean mIoU"}


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


def write_whole(path: pathlib.Path, text: str) -> None:
    """Writes a file, and its folder; a kill leaves no half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".incomplete")
    whole.write_text(text)
    whole.rename(path)


class Store:
    """What was measured, one file a row and seed; a file with another config is refused."""

    def __init__(self, out: pathlib.Path):
        self._out = out

    def _path(self, row: str, seed: int) -> pathlib.Path:
        return self._out / "figures" / f"{row.replace('/', '__')}_seed{seed}.json"

    def get(self, row: str, seed: int, *, made_by: str) -> dict[str, Any] | None:
        """The figures of a row, None if they are not there yet.

        Raises:
          ValueError: they were made by another config.
        """
        path = self._path(row, seed)
        if not path.exists():
            return None
        found = json.loads(path.read_text())
        if found["config"] != made_by:
            raise ValueError(f"{path} was made with another config or number of steps; take another --out (and --json)")
        return found

    def of_twin(self, seed: int, *, made_by: str) -> dict[str, Any] | None:
        """The figures of any row of this config, None if there are none."""
        stored = (
            json.loads(path.read_text()) for path in sorted(self._path("", seed).parent.glob(f"*_seed{seed}.json"))
        )
        return next((figures for figures in stored if figures["config"] == made_by), None)

    def put(self, row: str, seed: int, figures: Mapping[str, Any]) -> None:
        write_whole(self._path(row, seed), json.dumps(figures, indent=1) + "\n")

    def take(self, path: pathlib.Path) -> None:
        """Puts in the figures of a file of ``write_raw`` that are not here yet."""
        for row, of_row in read_raw(path).items():
            for seed, figures in of_row.items():
                if not self._path(row, seed).exists():
                    self.put(row, seed, figures)


def read_raw(path: pathlib.Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Per row and seed the figures of a file; of one that is not there, none.

    Raises:
      ValueError: it is no such file.
    """
    if not path.exists():
        return {}
    try:
        rows = json.loads(path.read_text())
        return {row: {int(seed): dict(figures) for seed, figures in of_row.items()} for row, of_row in rows.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"--json: {path} holds something else than the figures of a study ({error})") from error


def write_raw(path: pathlib.Path, found: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> None:
    """Writes figures beside those that the file has of other rows and seeds."""
    before = read_raw(path)
    whole = {row: {**before.get(row, {}), **found.get(row, {})} for row in {**before, **found}}
    whole = {row: dict(sorted(of_row.items())) for row, of_row in whole.items()}
    write_whole(path, json.dumps(whole, indent=1) + "\n")


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


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean over seeds and the half width of its 95 % t-interval; NaN of one seed alone."""

    mean: float
    half: float

    def __str__(self) -> str:
        """In points."""
        around = f" ± {100 * self.half:.1f}" if math.isfinite(self.half) else ""
        return f"{100 * self.mean:.1f}{around}"


def interval(values: Sequence[float]) -> Interval:
    """Of scores, one a seed."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return Interval(float(values.mean()), math.nan)
    quantile = stats.t.ppf(0.975, len(values) - 1)
    return Interval(float(values.mean()), float(quantile * values.std(ddof=1) / math.sqrt(len(values))))


def measures(figures: Mapping[str, Any]) -> dict[str, float]:
    """Of one row and seed: mIoU of the label classes, and the mean over the tasks that had something to tell apart, of
    the linear probe and of nearest neighbours."""
    scores, tasks = figures["scores"], (probes.LABELS, *scenes.ATTRIBUTES)
    mean = lambda kind: float(np.mean([x for task in tasks if (x := scores[f"{task}/{kind}"]) is not None]))  # noqa: E731
    labels = scores[f"{probes.LABELS}/miou"]
    return {"labels": math.nan if labels is None else labels, "mean": mean("miou"), "neighbours": mean("knn_miou")}


def lines_of(
    question: str, rows: Mapping[str, Variant], found: Mapping[str, Mapping[int, Any]]
) -> Iterator[tuple[str, dict[str, Interval], dict[str, Interval] | None]]:
    """Per row that was run: its name, its measures, and its differences from the first row's, paired by seed."""
    first = found.get(f"{question}/{next(iter(rows))}", {})
    for row in rows:
        of_row = found.get(f"{question}/{row}", {})
        if not of_row:
            continue
        own = {seed: measures(figures) for seed, figures in of_row.items()}
        whole = {key: interval([x[key] for x in own.values()]) for key in MEASURES}
        shared = [seed for seed in own if seed in first]
        apart = None
        if shared and row != next(iter(rows)):
            base = {seed: measures(first[seed]) for seed in shared}
            apart = {key: interval([own[seed][key] - base[seed][key] for seed in shared]) for key in MEASURES}
        yield row, whole, apart


def table(found: Mapping[str, Mapping[int, Any]], questions: Mapping[str, Mapping[str, Variant]] = QUESTIONS) -> str:
    """All questions that have a row, as markdown; what was not run says so."""
    lines = []
    for question, rows in questions.items():
        told = {row: rest for row, *rest in lines_of(question, rows, found)}
        if not told:
            continue
        heads = ["parameters", *MEASURES.values(), *(f"{title} - first row" for title in MEASURES.values()), "seeds"]
        lines += [f"| {question} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
        for row, variant in rows.items():
            if row not in told:
                lines.append(f"| {variant.title} | not run |" + " |" * (len(heads) - 1))
                continue
            (whole, apart), of_row = told[row], found[f"{question}/{row}"]
            columns = [f"{next(iter(of_row.values()))['parameters']:,}", *map(str, whole.values())]
            columns += [f"{x}" for x in apart.values()] if apart else [""] * len(MEASURES)
            lines.append(f"| {variant.title} | {' | '.join(columns)} | {len(of_row)} |")
        lines.append("")
    cells = [figures for of_row in found.values() for figures in of_row.values()]
    steps = sorted({figures["steps"] for figures in cells})
    lines.append(f"- {len(cells)} figures, runs of {' or '.join(map(str, steps)) or 'no'} steps; points, mean and")
    lines[-1] += f" 95 % t-interval over seeds; jax {jax.__version__} on {jax.default_backend()}"
    if (codes := len({figures.get("code") for figures in cells})) > 1:
        lines[-1] += f"; {codes} versions of the code"
    return "\n".join(lines)


def picture(path: pathlib.Path, found: Mapping[str, Mapping[int, Any]]) -> pathlib.Path | None:
    """Path of the picture: a panel a question, a line a row, its seeds as dots and their interval.

    A question of which one row was run compares nothing and has no panel; None if there is no other.
    """
    told = {name: list(lines_of(name, rows, found)) for name, rows in QUESTIONS.items()}
    told = {name: lines for name, lines in told.items() if len(lines) > 1}
    if not told:
        return None
    heights = [len(lines) + 1.5 for lines in told.values()]
    figure = drawing.new_figure(8.0, 0.32 * sum(heights))
    grid = figure.subplots(len(told), 1, sharex=True, squeeze=False, height_ratios=heights).ravel()
    for (question, lines), axes in zip(told.items(), grid):
        for place, (row, whole, _) in enumerate(lines):
            seeds = [100 * measures(figures)["mean"] for figures in found[f"{question}/{row}"].values()]
            half = 100 * whole["mean"].half
            around = half if math.isfinite(half) else None
            axes.errorbar([100 * whole["mean"].mean], [place], xerr=around, fmt="D", color="black", capsize=3)
            axes.plot(seeds, [place] * len(seeds), ".", color="tab:blue")
        axes.set_yticks(range(len(lines)), [QUESTIONS[question][row].title for row, *_ in lines], fontsize=8)
        axes.set_ylim(len(lines) - 0.5, -0.5)
        axes.set_title(question, fontsize=9, loc="left")
        axes.grid(axis="x", linewidth=0.4)
    grid[-1].set_xlabel("mIoU in points, mean over tasks; dots: seeds, bar: 95 % interval")
    return drawing.save(figure, path)


# ---- the command


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="where figures, records and runs are kept")
    parser.add_argument("--config", default="configs/tiny.py")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help=f"of every run ({NUM_STEPS})")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no run begins later than this")
    parser.add_argument("--only", action="append", help="a question, or QUESTION/ROW (may be repeated)")
    parser.add_argument("--list", action="store_true", help="rows, and the seeds of which there are figures; no run")
    parser.add_argument(
        "--json", type=pathlib.Path, help="file of raw figures: what it has is not run again, the rest is added"
    )
    parser.add_argument("--picture", type=pathlib.Path, help="PNG to draw")
    args = parser.parse_args(argv)
    if args.seeds < 1 or args.steps < 1 or not args.minutes > 0:
        parser.error("--seeds and --steps want 1 or more, --minutes more than 0")
    unknown = [name for name in args.only or () if name not in QUESTIONS and name not in ROWS]
    if unknown:
        parser.error(f"--only: no {', '.join(unknown)}; wanted one of {', '.join(QUESTIONS)}, or QUESTION/ROW (--list)")
    asked = args.only or QUESTIONS
    args.rows = {row: variant for row, variant in ROWS.items() if row in asked or row.split("/")[0] in asked}
    args.out = args.out.resolve()
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
    store = Store(args.out)
    if args.json:
        store.take(args.json)
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
