"""A dataset in numbers: how many samples, where, when, how cloudy, with which classes. Counted from its tables alone.

Columns are read one after the other, so that millions of samples fit. Next: page.py, which shows them.
"""

import dataclasses
import json
import pathlib
import re
from collections import Counter
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
from jaxtyping import Bool, Float, Int64

from skysense_jax.ingest.acquisitions import row_of_date
from skysense_jax.ingest.dataset import Dataset
from skysense_jax.ingest.suspicions import Look
from skysense_jax.modalities import Modality

_HELD_OUT = ("validation", "test")
HIDDEN_BINS = 10  # of the hidden share, 0 to 1
_NUMBERS = re.compile(r"(?<![\w.])-?\d[\d.]*(e[+-]?\d+)?(?!\w)")
_NAMES = re.compile(r"'[^']*'|\S+/\S+")


@dataclasses.dataclass(frozen=True)
class OfRow:
    """What a dataset has of one row of the modality table.

    Attributes:
      samples: that have it; ``dates``: of all of them together; ``undated`` of those measured.
      hidden: mean share that clouds hide; ``missing``: without data, None where the index does not say it.
      left_out: dates that came to nothing.
      num_dates: how many samples have how many dates (0: samples that lack the row).
      hidden_counts: how many samples in each tenth of the hidden share.
      months: how many dates of those measured, by month since 1970-01.
    """

    row: Modality
    samples: int
    dates: int
    undated: int
    hidden: float
    missing: float | None
    left_out: int
    num_dates: Mapping[int, int]
    hidden_counts: Int64[np.ndarray, "N"]
    months: Mapping[int, int]


@dataclasses.dataclass(frozen=True)
class Survey:
    """A dataset in numbers.

    Attributes:
      splits, licences: samples of each.
      longitudes, latitudes: of the samples' centres, degrees, NaN where not known; ``held_out``: to validate or test.
      rows: by name, those that some sample has.
      days: the first and the last, None without any.
      mapped: samples that have a label map; ``class_pixels`` and ``class_samples``: by class id, 0 = nothing mapped.
      rejected: what came to nothing, and why with numbers and names left out: how often, and one of them as it is.
    """

    splits: Mapping[str, int]
    licences: Mapping[str, int]
    longitudes: Float[np.ndarray, "N"]
    latitudes: Float[np.ndarray, "N"]
    held_out: Bool[np.ndarray, "N"]
    rows: Mapping[str, OfRow]
    days: tuple[int, int] | None
    mapped: int
    class_pixels: Int64[np.ndarray, "L"]
    class_samples: Int64[np.ndarray, "L"]
    rejected: Mapping[tuple[str, str], tuple[int, str]]

    @property
    def placed(self) -> int:
        """How many samples have a position."""
        return int(np.isfinite(self.longitudes).sum())


def survey(dataset: Dataset, together: Mapping[str, Look]) -> Survey:
    """The numbers of a dataset. ``together``: what ``suspicions.look`` says of its figures."""
    column = lambda name: dataset.index.to_table(columns=[name])[name]  # noqa: E731
    splits = column("split")
    first, last = pc.min(column("first_day")).as_py(), pc.max(column("last_day")).as_py()
    mapped, pixels, samples = _classes(dataset.index, dataset.labels.num_classes)
    rejected, left_out = _rejected(dataset.folder / "rejected.jsonl")
    rows = {
        row.name: _of_row(dataset, row, together[row.name], left_out[row.name])
        for row in dataset.rows
        if f"dates_{row.name}" in dataset.index.schema.names
    }
    return Survey(
        splits=_counted(splits),
        licences=_counted(column("licence")),
        longitudes=_numbers(column("longitude")),
        latitudes=_numbers(column("latitude")),
        held_out=pc.is_in(splits, value_set=pa.array(_HELD_OUT)).to_numpy(zero_copy_only=False),
        rows={name: of for name, of in rows.items() if of.samples},
        days=None if first is None else (first, last),
        mapped=mapped,
        class_pixels=pixels,
        class_samples=samples,
        rejected=rejected,
    )


def _of_row(dataset: Dataset, row: Modality, seen: Look, left_out: int) -> OfRow:
    names = [f"dates_{row.name}", f"hidden_{row.name}"]
    table = dataset.index.to_table(columns=names)
    dates, hidden = (_numbers(table[name]) for name in names)
    having, column = np.isfinite(dates), f"missing_{row.name}"
    known = column in dataset.index.schema.names  # not in an index of an older build
    missing = pc.mean(dataset.index.to_table(columns=[column])[column].cast(pa.float64())).as_py() if known else None
    counts = Counter(np.where(having, dates, 0).astype(int).tolist())
    months: Counter[int] = Counter()
    for day in np.flatnonzero(seen.days):
        months[int(day.astype("datetime64[D]").astype("datetime64[M]").astype(int))] += int(seen.days[day])
    return OfRow(
        row=row,
        samples=int(having.sum()),
        dates=int(dates[having].sum()),
        undated=seen.undated,
        hidden=float(hidden[having].mean()) if having.any() else 0.0,
        missing=missing,
        left_out=left_out,
        num_dates=counts,
        hidden_counts=np.histogram(hidden[having], HIDDEN_BINS, (0, 1))[0],
        months=months,
    )


def _classes(index: pa.dataset.Dataset, num_classes: int) -> tuple[int, np.ndarray, np.ndarray]:
    """Samples with a map, and of each class id its pixels and the samples that have some."""
    num, pixels, samples = 0, np.zeros(num_classes + 1, np.int64), np.zeros(num_classes + 1, np.int64)
    if pa.types.is_null(index.schema.field("classes").type):
        return num, pixels, samples
    for batch in index.to_batches(columns=["classes"]):
        found = batch["classes"].drop_null().flatten().to_numpy(zero_copy_only=False).reshape(-1, len(pixels))
        num += len(found)
        pixels += found.sum(0)
        samples += (found > 0).sum(0)
    return num, pixels, samples


def _rejected(path: pathlib.Path) -> tuple[Mapping[tuple[str, str], tuple[int, str]], Counter[str]]:
    """What ``Survey.rejected`` has, and by row of the modality table the dates that came to nothing."""
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], str] = {}
    left_out: Counter[str] = Counter()
    if path.exists():
        with path.open() as lines:
            for entry in map(json.loads, lines):
                what = entry.get("what", "file")
                kind = what, _NUMBERS.sub("#", _NAMES.sub("…", entry["reason"]))
                counts[kind] += 1
                examples.setdefault(kind, f"{entry['name']}: {entry['reason']}")
                left_out[row_of_date(entry["name"])] += what == "date"
    return {kind: (number, examples[kind]) for kind, number in counts.items()}, left_out


def _counted(column: pa.ChunkedArray) -> dict[str, int]:
    return {entry["values"]: entry["counts"] for entry in pc.value_counts(column).to_pylist()}


def _numbers(column: pa.ChunkedArray) -> Float[np.ndarray, "N"]:
    return column.cast(pa.float64()).to_numpy()
