"""Does it learn? Linear probes on frozen fused features of held-out procedural scenes, before and after pre-training.

    python benchmarks/learning.py --out=runs/learning            (hours on 2 cores; a second call goes on)
    python benchmarks/learning.py --out=runs/learning --only=raw --only=untrained

Columns: raw bands of the 3x3 neighbourhood, the network untrained, pre-trained without the text objective (L_ITA off)
and with it. Every figure is stored under --out as soon as it is there; runs train on records written there once.
Scenes and network are those of the config, the probe's but for PROBE_SCENES; what a column changes: VARIANTS and
MOST_STEPS.
Results: benchmarks/results.md.
"""

import argparse
import functools
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from skysense_jax import assembly, checkpoint, metrics, modalities, sharding
from skysense_jax import config as config_lib
from skysense_jax.data import scenes
from skysense_jax.eval import probes
from skysense_jax.models import skysense
from skysense_jax.train_state import TrainState, abstract_state, boxed_state, create_state

ROOT = pathlib.Path(__file__).resolve().parents[1]
VARIANTS = {  # column: title, fields that differ from the config (None: nothing is trained)
    "raw": ("raw bands 3x3", None),
    "untrained": ("untrained", None),
    "ita_off": ("L_ITA off", {"objective.weights.text_alignment": 0.0}),
    "ita_on": ("L_ITA on", {}),
}
MOST_STEPS = {"ita_off": 600}  # measured on other scenes: 1200 to 1500 steps gave 0.9 to 1.4 points less than 600
WANTED = (  # trained column, tasks of which the best counts, points above untrained
    ("ita_off", (probes.LABELS,), 5.0),
    ("ita_off", tuple(scenes.ATTRIBUTES), 5.0),
    ("ita_on", (probes.LABELS,), 10.0),
)
# Of the probe. Scored on the first 48 alone, a seed's gain in an attribute is up to 6 points another.
PROBE_SCENES = dict(num_train_scenes=144, num_test_scenes=240)
CALIBRATION_STEPS = 40
_RESERVE = 0.9  # of the minutes: speed differs from run to run


def write_records(config: ConfigDict, out: pathlib.Path) -> pathlib.Path:
    """The file of all training scenes of the config, rendered once."""
    directory = out / "records" / config_lib.fingerprint(config, ("data.scenes", "data.modalities"))
    source = scenes.SceneSource(modalities=tuple(config.data.modalities), **config.data.scenes)
    paths = sorted(directory.glob("*.array_record")) or scenes.write_records(
        source, directory, scenes_per_shard=len(source), num_processes=os.cpu_count()
    )
    return paths[0]


def train(
    config: ConfigDict, config_file: str, workdir: pathlib.Path, records: pathlib.Path, **fields
) -> dict[str, float]:
    """Runs, or goes on with, one pre-training. Minutes of its steps, and of the whole process (of the last one, which
    compiles, and draws pictures and probes at its end)."""
    overrides = {"optim.num_steps": config.optim.num_steps, "data.sources": ((str(records), 1.0),), **fields}
    overrides["eval.num_test_scenes"] = 0  # probed here
    command = [sys.executable, "-m", "skysense_jax.train", f"--config={config_file}", f"--workdir={workdir}"]
    command += [f"--config.{field}={value}" for field, value in overrides.items()]
    print("+", " ".join(command), file=sys.stderr, flush=True)
    started = time.monotonic()
    if subprocess.run(command, check=False, cwd=ROOT).returncode:
        sys.exit(f"training failed (above); the same command goes on in {workdir}")
    lines = metrics.read_json_lines(workdir / metrics.FILE_NAME)
    steps = zip([0, *(line["step"] for line in lines)], lines)  # the first of a process compiles, and is not timed
    minutes = sum((line["step"] - last) * line.get("step_seconds", 0.0) for last, line in steps) / 60
    return {"minutes": minutes, "process_minutes": (time.monotonic() - started) / 60}


def steps_in(minutes: float, config: ConfigDict, config_file: str, out: pathlib.Path, records: pathlib.Path) -> int:
    """How many steps the minutes hold on this machine, compilation left out; measured once and kept."""
    path = out / "calibration.json"
    made_by = config_lib.fingerprint(config, ("data", "model", "objective"))
    kept = json.loads(path.read_text()) if path.exists() else {}
    if kept.get("config") != made_by:
        short = config.copy_and_resolve_references()
        short.optim.num_steps = CALIBRATION_STEPS
        workdir = out / "runs" / f"calibration_{made_by}"
        train(short, config_file, workdir, records)
        lines = metrics.read_json_lines(workdir / metrics.FILE_NAME)
        half = lines[len(lines) // 2 :]
        seconds = (half[-1]["time"] - half[0]["time"]) / (half[-1]["step"] - half[0]["step"])
        kept = {"config": made_by, "seconds_per_step": seconds}
        path.write_text(json.dumps(kept))
    return int(_RESERVE * 60 * minutes / kept["seconds_per_step"])


def initial_params(
    config: ConfigDict, rows: tuple[modalities.Modality, ...], network: skysense.SkySense, seed: int
) -> Any:
    """What a run of the config with this seed starts from: parameters of student and teacher."""
    mesh = sharding.make_mesh(**config.mesh)
    with jax.set_mesh(mesh):
        shapes = assembly.batch_shapes(config, rows)
        return create_state(network, optax.identity(), shapes, seed=seed, mesh=mesh).teacher


_held_out_scenes = functools.lru_cache(maxsize=1)(probes.held_out_scenes)  # a study asks for the same ones again


class Probe:
    """Scores of a variant, with the network compiled once for all of them.

    ``reads``: names of the modalities that test scenes show, if not all that the config has.
    """

    def __init__(self, config: ConfigDict, *, reads: Sequence[str] = ()):
        self._rows = modalities.select(config.data.modalities, config.data.new_modalities)
        self._model = skysense.build(self._rows, **config.model, **assembly.efficiency(config))
        self._config, self._shapes = config, assembly.batch_shapes(config, self._rows)
        self._mesh = sharding.make_mesh(**config.mesh)
        self._shown = tuple(row for row in self._rows if row.name in reads)
        self._num_dates, self._cells = dict(config.data.num_dates), config.data.views.global_cells
        self._batch_size = config.eval.batch_size
        place = {key: config.data.scenes[key] for key in ("seed", "extent_cells")}
        which = {key: config.eval[key] for key in ("first_index", "num_train_scenes", "num_test_scenes")}
        self._held_out = _held_out_scenes(self._rows, **place, **which)

    def raw(self) -> dict[str, float]:
        return probes.probe_raw_bands(self._rows, self._held_out, num_dates=self._num_dates)

    def untrained(self, seed: int) -> dict[str, float]:
        """The network that a run with this seed starts from."""
        params = initial_params(self._config, self._rows, self._model, seed)
        with jax.set_mesh(self._mesh):
            return self._scores(params)

    def trained(self, workdir: pathlib.Path) -> dict[str, float]:
        """The teacher of the run's newest checkpoint."""
        with jax.set_mesh(self._mesh):
            boxed: TrainState = boxed_state(self._model, optax.identity(), self._shapes)
            teacher = checkpoint.restore_params(workdir, abstract_state(boxed, self._mesh).teacher).state
            return self._scores(teacher)

    def _scores(self, params) -> dict[str, float]:
        return probes.probe_scenes(
            self._model,
            params,
            self._rows,
            self._held_out,
            cells=self._cells,
            num_dates=self._num_dates,
            batch_size=self._batch_size,
            shown=self._shown,
        )


def measure(args: argparse.Namespace) -> dict[str, dict[int, dict]]:
    """Per column and seed what was stored, missing cells filled in first."""
    config = config_lib.load(args.config)
    config.eval.update(PROBE_SCENES)
    config_lib.validate(config)
    args.out.mkdir(parents=True, exist_ok=True)
    trained = [name for name in args.only if VARIANTS[name][1] is not None]
    if trained:
        records = write_records(config, args.out)
        most_steps = args.steps or steps_in(args.minutes, config, args.config, args.out, records)
    sections = ("data", "model", "eval", *(("objective", "optim") if trained else ()))
    probe, cells = Probe(config), {}
    for name in args.only:
        if name in trained:
            config.optim.num_steps = min(most_steps, MOST_STEPS.get(name, most_steps))
        for seed in range(1 if name == "raw" else args.seeds):
            path = args.out / f"{name}_seed{seed}.json"
            made_by = config_lib.fingerprint(config, sections if name in trained else sections[:3])
            if path.exists():
                cell = json.loads(path.read_text())
                if cell["config"] != made_by:
                    raise ValueError(f"{path} was made with another config or number of steps; take another --out")
            else:
                cell = {"config": made_by}
                if name == "raw":
                    cell["scores"] = probe.raw()
                elif name == "untrained":
                    cell["scores"] = probe.untrained(seed)
                else:
                    workdir = args.out / "runs" / f"{name}_seed{seed}_{made_by}"
                    fields = {"optim.seed": seed, "data.seed": seed, **VARIANTS[name][1]}
                    cell |= train(config, args.config, workdir, records, **fields)
                    cell["steps"] = config.optim.num_steps
                    cell["scores"] = probe.trained(workdir)
                path.write_text(json.dumps(cell, indent=1))
                print(f"{name} seed {seed}: {cell['scores']}", file=sys.stderr, flush=True)
            cells.setdefault(name, {})[seed] = cell
    return cells


def _points(values: list[float]) -> str:
    """Mean and standard deviation in points."""
    values = 100 * np.asarray(values)
    spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{values.mean():.1f}{spread}"


def differences(cells: dict[str, dict[int, dict]], name: str, task: str, metric: str = "miou") -> list[float]:
    """Column minus untrained, seed by seed, of the seeds that both have."""
    untrained = cells.get("untrained", {})
    key = f"{task}/{metric}"
    return [cell["scores"][key] - untrained[s]["scores"][key] for s, cell in cells[name].items() if s in untrained]


def report(cells: dict[str, dict[int, dict]]) -> str:
    """The tables as markdown: scores, differences to the untrained network, and which of the wanted ones are met."""
    tasks = (probes.LABELS, *scenes.ATTRIBUTES)
    trained = [name for name in cells if VARIANTS[name][1] is not None and differences(cells, name, tasks[0])]
    lines = []
    for metric, title in (("miou", "mIoU, points"), ("accuracy", "accuracy, points")):
        heads = [VARIANTS[name][0] for name in cells] + [f"{VARIANTS[name][0]} - untrained" for name in trained]
        lines += [f"| {title} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
        for task in tasks:
            scores = [_points([c["scores"][f"{task}/{metric}"] for c in column.values()]) for column in cells.values()]
            gains = [_points(differences(cells, name, task, metric)) for name in trained]
            lines.append(f"| {task} | {' | '.join(scores + gains)} |")
        lines.append("")
    for name, group, wanted in WANTED:
        if name in trained:
            best = max(group, key=lambda task: float(np.nan_to_num(np.mean(differences(cells, name, task)), nan=-1.0)))
            gain = 100 * float(np.mean(differences(cells, name, best)))
            verdict = "met" if gain >= wanted else "NOT met"
            lines.append(f"- {VARIANTS[name][0]}, {best}: {gain:+.1f} points mIoU, wanted {wanted:+.0f}: {verdict}")
    runs = [cell for name in trained for cell in cells[name].values()]
    if runs:
        minutes = [cell["minutes"] for cell in runs]
        whole = max(cell["process_minutes"] for cell in runs)
        steps = sorted({cell["steps"] for cell in runs})
        lines.append(
            f"- {len(runs)} runs of {' or '.join(map(str, steps))} steps, {min(minutes):.1f} to {max(minutes):.1f} "
            f"minutes of training (at most {whole:.1f} with compilation, pictures and probe)"
        )
    seeds = max(len(column) for column in cells.values())
    lines.append(f"- mean ± standard deviation over {seeds} seeds; {os.cpu_count()} cores, {platform.machine()}, ")
    lines[-1] += f"jax {jax.__version__} on {jax.default_backend()}, Python {platform.python_version()}"
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="where figures, records and runs are kept")
    parser.add_argument("--config", default="configs/tiny.py")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=10.0, help="of training per run")
    parser.add_argument("--steps", type=int, default=0, help="steps per run; 0: as many as --minutes hold")
    parser.add_argument("--only", action="append", choices=tuple(VARIANTS), help="columns (may be repeated)")
    args = parser.parse_args(argv)
    if args.seeds < 1 or args.steps < 0 or not (args.minutes > 0 and math.isfinite(args.minutes)):
        parser.error("--seeds wants 1 or more, --steps 0 or more, --minutes more than 0")
    args.out = args.out.resolve()
    args.only = [name for name in VARIANTS if name in (args.only or VARIANTS)]
    return args


def main() -> None:
    try:
        print(report(measure(parse())))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
