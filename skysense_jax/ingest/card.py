"""What a dataset says of itself: its card (README.md) and the table that a build ends with. Next: build.py."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from skysense_jax.ingest.acquisitions import row_of_date
from skysense_jax.modalities import METRES_PER_CELL, LabelMap, Modality


@dataclasses.dataclass
class Counts:
    """What is counted of a dataset's samples, however many, as they pass by.

    Attributes:
      samples, labelled: by split; labelled ones have a label map.
      having, dates, hidden: by row of the table: samples that have it, their dates by split, and the sum of their
        hidden shares.
      missing: likewise, of ``measured`` samples the sum of the shares of pixels without data.
      left_out: by row of the table: dates that came to nothing.
      classes: pixels of label maps by class id.
      days: first and last day of a dated acquisition, None where there is none.
      extent: lowest and highest "longitude" and "latitude", where they are known.
      rejected: by what came to nothing.
    """

    samples: Counter[str] = dataclasses.field(default_factory=Counter)
    labelled: Counter[str] = dataclasses.field(default_factory=Counter)
    having: Counter[str] = dataclasses.field(default_factory=Counter)
    dates: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    hidden: Counter[str] = dataclasses.field(default_factory=Counter)
    missing: Counter[str] = dataclasses.field(default_factory=Counter)
    measured: Counter[str] = dataclasses.field(default_factory=Counter)
    left_out: Counter[str] = dataclasses.field(default_factory=Counter)
    classes: np.ndarray | int = 0
    days: tuple[int, int] | None = None
    extent: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    rejected: Counter[str] = dataclasses.field(default_factory=Counter)

    def add(self, row: Mapping[str, Any]) -> None:
        """Counts a sample, given as its index does."""
        split = row["split"]
        self.samples[split] += 1
        for name, num in row["dates"].items():
            self.having[name] += 1
            self.dates[split, name] += num
            self.hidden[name] += row["hidden"][name]
        for name, share in row.get("missing", {}).items():
            self.missing[name] += share
            self.measured[name] += 1
        if row["classes"]:
            self.labelled[split] += 1
            self.classes = self.classes + np.asarray(row["classes"])
        days = [row[key] for key in ("first_day", "last_day") if row[key] is not None]
        if days:
            days += self.days or ()
            self.days = min(days), max(days)
        for axis in ("longitude", "latitude"):
            if row[axis] is not None:
                low, high = self.extent.get(axis, (row[axis], row[axis]))
                self.extent[axis] = min(low, row[axis]), max(high, row[axis])

    def reject(self, entry: Mapping[str, str]) -> None:
        """Counts what came to nothing, given as ``Rejected`` has it."""
        self.rejected[entry["what"]] += 1
        if entry["what"] == "date":
            self.left_out[row_of_date(entry["name"])] += 1


def table(counts: Counts, modalities: Sequence[Modality]) -> str:
    """Samples and dates by split and row of the table, and how many files, dates and places came to nothing."""
    names = [row.name for row in modalities]
    lines = [f"{'split':12} {'samples':>8} " + " ".join(f"{name + ' dates':>10}" for name in names) + f" {'labels':>8}"]
    for split in sorted(counts.samples):
        dates = " ".join(f"{counts.dates[split, name]:10}" for name in names)
        lines.append(f"{split:12} {counts.samples[split]:8} {dates} {counts.labelled[split]:8}")
    whats = counts.rejected
    lines.append("rejected: " + (", ".join(f"{whats[what]} {what}s" for what in sorted(whats)) or "nothing"))
    if absent := [name for name in names if not counts.having[name]]:
        lines.append(f"no sample has {', '.join(absent)}; rejected.jsonl says what was left out, and why")
    return "\n".join(lines)


def text(
    counts: Counts,
    statistics: Mapping[str, Mapping[str, Any]],
    sources: Sequence[Mapping[str, str]],
    modalities: Sequence[Modality],
    labels: LabelMap,
) -> str:
    """The card, in Markdown: how many, where, when, under which licences, with which statistics."""
    named = {row.name: row for row in modalities}
    days = counts.days
    lines = [
        "# Samples for skysense-jax",
        "",
        f"- {counts.samples.total()} samples: "
        + ", ".join(f"{number} {split}" for split, number in sorted(counts.samples.items())),
        _where(counts),
        f"- acquired from {_day(days[0])} to {_day(days[1])}" if days else "- no acquisition has a day",
        f"- {counts.rejected.total()} files, dates and places came to nothing: `rejected.jsonl` says why",
        "",
        "| row | unit | pixel | samples | dates | dates left out | under cloud | no data |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in (name for name in named if counts.having[name]):
        dates = sum(counts.dates[split, name] for split in counts.samples)
        hidden, size = counts.hidden[name] / counts.having[name], METRES_PER_CELL / named[name].pixels_per_cell
        missing = f"{counts.missing[name] / counts.measured[name]:.1%}" if counts.measured[name] else "not counted"
        cells = (f"{size:g} m", counts.having[name], dates, counts.left_out[name], f"{hidden:.1%}", missing)
        lines.append(f"| {name} | {named[name].unit} | " + " | ".join(map(str, cells)) + " |")
    lines += ["", "Shares are of the pixels of dates that samples have, a mean over samples. Dates that were left out"]
    lines += ["are those of any place, also of one that is no sample."]
    lines += ["", "## Sources", "", "| source | kind | licence |", "|---|---|---|"]
    lines += [f"| {source['name']} | {source['kind']} | {source['licence']} |" for source in sources]
    lines += ["", "## Statistics", "", "Over valid pixels of the samples to train on, clouds included.", ""]
    lines += ["| row | band | mean | deviation | 1 % | 50 % | 99 % |", "|---|---|---|---|---|---|---|"]
    for name, found in statistics.items():
        columns = ("mean", "std", "percentile_1", "percentile_50", "percentile_99")
        for number, band in enumerate(named[name].bands):
            lines.append(f"| {name} | {band} | " + " | ".join(f"{found[key][number]:.4g}" for key in columns) + " |")
    if counts.labelled:
        lines += [
            "",
            f"## Labels ({counts.labelled.total()} samples have a map)",
            "",
            "| class | share of the map |",
            "|---|---|",
        ]
        shares = zip(("nothing mapped", *labels.classes), counts.classes / counts.classes.sum())
        lines += [f"| {name} | {share:.2%} |" for name, share in shares if share]
    return "\n".join(lines) + "\n"


def _where(counts: Counts) -> str:
    if len(counts.extent) < 2:
        return "- where they lie is not known"
    (west, east), (south, north) = counts.extent["longitude"], counts.extent["latitude"]
    return f"- between {west:.4f} and {east:.4f} degrees east, {south:.4f} and {north:.4f} north"


def _day(day: int) -> str:
    return str(np.datetime64(day, "D"))
