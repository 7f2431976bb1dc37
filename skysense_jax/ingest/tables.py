"""A user's table of files, CSV or Parquet: which files, and what of each its list would say of all.

Columns: path, from the table's own folder; day (year-month-day); crs with west, south, east, north, in its units, which
say where a file lies instead of the file; offset, unit and orbit, where the source's kind has them. An empty cell says
nothing. Next: sources.py.
"""

import csv
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow.parquet as pq

from skysense_jax.ingest.grids import Ground
from skysense_jax.ingest.rasters import Refused

SUFFIXES = (".csv", ".parquet")
_EDGES = ("west", "south", "east", "north")
COLUMNS: Mapping[str, type] = dict(
    day=str, crs=str, **dict.fromkeys(_EDGES, float), offset=int, unit=str, orbit=str
)  # beside path


def read_table(path: pathlib.Path, columns: Sequence[str]) -> dict[pathlib.Path, dict[str, Any]]:
    """What each file is told of, by its path; ``columns``: of ``COLUMNS``, those that may be told.

    Raises:
      ValueError: no column path, a column that is no field, a cell that is none, or a path twice.
      OSError: it cannot be read.
    """
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            rows: list[dict[str, Any]] = list(csv.DictReader(file))
    else:
        rows = pq.read_table(path).to_pylist()
    if not rows or "path" not in rows[0] or set(rows[0]) - {"path", *columns}:
        got = ", ".join(map(str, rows[0])) if rows else "no rows"
        beside = f"none but {', '.join(columns)} beside it" if columns else "nothing else"
        raise ValueError(f"{path}: {got}; wanted the column path, and {beside}")
    found: dict[pathlib.Path, dict[str, Any]] = {}
    for number, row in enumerate(rows, 2):
        if None in row:
            raise ValueError(f"{path}, row {number}: {row[None]} behind the last column; wanted a cell for each column")
        try:
            told = {name: _value(row[name], COLUMNS[name]) for name in row if name != "path" and _is_told(row[name])}
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, row {number}: {error}") from error
        at = path.resolve().parent / str(row["path"])
        if at in found or not row["path"]:
            raise ValueError(f"{path}, row {number}: path {row['path']!r}; wanted each file once")
        found[at] = told
    return found


def _is_told(cell: Any) -> bool:
    return cell is not None and cell == cell and str(cell).strip() != ""


def _value(cell: Any, kind: type) -> Any:
    """A cell as a text, or as a number: Parquet has whole numbers with gaps as others."""
    text = str(cell).strip()
    return text if kind is str else kind(float(text))


def together(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is told of files that are one acquisition, the place as ``ground``.

    Raises:
      Refused: rows differ, or say a part of a place.
    """
    told: dict[str, Any] = {}
    for row in rows:
        differing = sorted(name for name in row if told.get(name, row[name]) != row[name])
        if differing:
            raise Refused(f"the table tells different {', '.join(differing)} of files that are one acquisition")
        told |= row
    if "day" in told:
        told["day"] = told["day"][:10]  # of a day and a time
    place = [told.pop(name, None) for name in ("crs", *_EDGES)]
    if all(part is not None for part in place):
        crs = f"EPSG:{place[0]}" if place[0].isdigit() else place[0]
        told["ground"] = Ground(crs, tuple(place[1:]))
    elif any(part is not None for part in place):
        raise Refused(f"the table tells a part of a place; wanted crs, {', '.join(_EDGES)}, or none of them")
    return told
