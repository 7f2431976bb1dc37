"""Figures that take hours: kept one by one under an --out, told with intervals over seeds.

Next: study.py, few_labels.py and distil.py, which make them.
"""

import argparse
import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats


def write_whole(path: pathlib.Path, text: str) -> None:
    """Writes a file, and its folder; a kill leaves no half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".incomplete")
    whole.write_text(text)
    whole.rename(path)


class Store:
    """What was measured, one file a row and seed; what another config made is refused.

    ``raw``: a file of ``write_raw``, which is asked for what has no file of its own.
    """

    def __init__(self, out: pathlib.Path, raw: pathlib.Path | None = None):
        self._out, self._raw_path = out, raw
        self._raw = read_raw(raw) if raw else {}

    def _path(self, row: str, seed: int) -> pathlib.Path:
        return self._out / "figures" / f"{row.replace('/', '__')}_seed{seed}.json"

    def get(self, row: str, seed: int, *, made_by: str) -> dict[str, Any] | None:
        """The figures of a row, None if they are not there yet.

        Raises:
          ValueError: they were made by another config.
        """
        path = self._path(row, seed)
        if path.exists():
            found = json.loads(path.read_text())
        elif seed in self._raw.get(row, {}):
            path, found = self._raw_path, self._raw[row][seed]
        else:
            return None
        if found["config"] != made_by:
            raise ValueError(
                f"{path}: {row} was made with another config or number of steps; take another --out or --json"
            )
        return found

    def of_twin(self, seed: int, *, made_by: str) -> dict[str, Any] | None:
        """The figures of any row of this config, None if there are none."""
        return next((figures for figures in self._all(seed) if figures["config"] == made_by), None)

    def _all(self, seed: int) -> Iterable[dict[str, Any]]:
        for path in sorted(self._path("", seed).parent.glob(f"*_seed{seed}.json")):
            yield json.loads(path.read_text())
        yield from (of_row[seed] for of_row in self._raw.values() if seed in of_row)

    def put(self, row: str, seed: int, figures: Mapping[str, Any]) -> None:
        write_whole(self._path(row, seed), json.dumps(figures, indent=1) + "\n")


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
        raise ValueError(f"--json: {path} holds something else than figures of a benchmark ({error})") from error


def write_raw(path: pathlib.Path, found: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> None:
    """Writes figures beside those that the file has of other rows and seeds."""
    before = read_raw(path)
    whole = {row: {**before.get(row, {}), **found.get(row, {})} for row in {**before, **found}}
    whole = {row: dict(sorted(of_row.items())) for row, of_row in whole.items()}
    write_whole(path, json.dumps(whole, indent=1) + "\n")


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean over seeds and the half width of its 95 % t-interval; NaN of one seed alone."""

    mean: float
    half: float

    def __format__(self, sign: str) -> str:
        """In points; with "+", as a difference; "-" of nothing."""
        if math.isnan(self.mean):
            return "-"
        around = f" ± {100 * self.half:.1f}" if math.isfinite(self.half) else ""
        return f"{100 * self.mean:{sign}.1f}{around}"

    def __str__(self) -> str:
        return f"{self}"


def interval(values: Iterable[float]) -> Interval:
    """Of scores, one a seed."""
    values = np.asarray([*values], float)
    if len(values) < 2:
        return Interval(float(values.mean()), math.nan)
    quantile = stats.t.ppf(0.975, len(values) - 1)
    return Interval(float(values.mean()), float(quantile * values.std(ddof=1) / math.sqrt(len(values))))


def versions(figures: Iterable[Mapping[str, Any]]) -> str:
    """What a table adds if its figures are of several versions of the code."""
    codes = {of.get("code") for of in figures}
    return f"; {len(codes)} versions of the code" if len(codes) > 1 else ""


def arguments(description: str | None, *, num_steps: int) -> argparse.ArgumentParser:
    """What every benchmark of this kind takes; ``num_steps`` of a run, if no other number is asked for."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="where figures, records and runs are kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=num_steps, help=f"of every run ({num_steps})")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no run and no figure is begun later than this")
    parser.add_argument(
        "--json", type=pathlib.Path, help="file of raw figures: what it has is not run again, the rest is added"
    )
    return parser


def read_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What was given to ``arguments``, or the end of the process."""
    args = parser.parse_args(argv)
    if args.seeds < 1 or args.steps < 1 or not args.minutes > 0:
        parser.error("--seeds and --steps want 1 or more, --minutes more than 0")
    args.out = args.out.resolve()
    return args
