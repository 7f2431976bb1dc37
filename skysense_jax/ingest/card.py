"""What a dataset says of itself: its card (README.md) and the table that a build ends with. Next: build.py."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from skysense_jax.ingest.acquisitions import Rejected
from skysense_jax.modalities import METRES_PER_CELL, OSM, Modality


def table(rows: Sequence[Mapping[str, Any]], rejected: Sequence[Rejected], modalities: Sequence[Modality]) -> str:
    """Samples and dates by split and row of the table, and how many files, dates and places came to nothing."""
    names = [row.name for row in modalities]
    lines = [f"{'split':12} {'samples':>8} " + " ".join(f"{name + ' dates':>10}" for name in names) + f" {'labels':>8}"]
    for split in sorted({row["split"] for row in rows}):
        of_split = [row for row in rows if row["split"] == split]
        dates = " ".join(f"{sum(row['dates'].get(name, 0) for row in of_split):10}" for name in names)
        lines.append(f"{split:12} {len(of_split):8} {dates} {sum(bool(row['classes']) for row in of_split):8}")
    whats = Counter(entry.what for entry in rejected)
    lines.append("rejected: " + (", ".join(f"{whats[what]} {what}s" for what in sorted(whats)) or "nothing"))
    return "\n".join(lines)


def text(
    rows: Sequence[Mapping[str, Any]],
    statistics: Mapping[str, Mapping[str, Any]],
    sources: Sequence[Mapping[str, str]],
    modalities: Sequence[Modality],
    *,
    num_rejected: int,
) -> str:
    """The card, in Markdown: how many, where, when, under which licences, with which statistics."""
    days = [row[key] for row in rows for key in ("first_day", "last_day") if row[key] is not None]
    longitudes, latitudes = ([row[key] for row in rows if row[key] is not None] for key in ("longitude", "latitude"))
    splits = Counter(row["split"] for row in rows)
    named = {row.name: row for row in modalities}
    seen = [name for name in named if any(name in row["dates"] for row in rows)]
    lines = [
        "# Samples for skysense-jax",
        "",
        f"- {len(rows)} samples: " + ", ".join(f"{number} {split}" for split, number in sorted(splits.items())),
        f"- between {min(longitudes):.4f} and {max(longitudes):.4f} degrees east, {min(latitudes):.4f} and "
        f"{max(latitudes):.4f} north"
        if longitudes
        else "- where they lie is unknown",
        f"- acquired from {_day(min(days))} to {_day(max(days))}" if days else "- no acquisition has a day",
        f"- {num_rejected} files, dates and places came to nothing: `rejected.jsonl` says why",
        "",
        "| row | unit | samples | dates | hidden | pixel |",
        "|---|---|---|---|---|---|",
    ]
    for name in seen:
        having = [row for row in rows if name in row["dates"]]
        dates = sum(row["dates"][name] for row in having)
        hidden = np.mean([row["hidden"][name] for row in having])
        size = METRES_PER_CELL / named[name].pixels_per_cell
        lines.append(f"| {name} | {named[name].unit} | {len(having)} | {dates} | {hidden:.1%} | {size:g} m |")
    lines += ["", "## Sources", "", "| source | kind | licence |", "|---|---|---|"]
    lines += [f"| {source['name']} | {source['kind']} | {source['licence']} |" for source in sources]
    lines += ["", "## Statistics", "", "Over valid pixels of the samples to train on, clouds included.", ""]
    lines += ["| row | band | mean | deviation | 1 % | 50 % | 99 % |", "|---|---|---|---|---|---|---|"]
    for name, found in statistics.items():
        columns = ("mean", "std", "percentile_1", "percentile_50", "percentile_99")
        for number, band in enumerate(named[name].bands):
            lines.append(f"| {name} | {band} | " + " | ".join(f"{found[key][number]:.4g}" for key in columns) + " |")
    labelled = [row["classes"] for row in rows if row["classes"]]
    if labelled:
        total = np.sum(labelled, axis=0)
        lines += [
            "",
            f"## Labels ({len(labelled)} samples have a map)",
            "",
            "| class | share of the map |",
            "|---|---|",
        ]
        shares = zip(("nothing mapped", *OSM.classes), total / total.sum())
        lines += [f"| {name} | {share:.2%} |" for name, share in shares if share]
    return "\n".join(lines) + "\n"


def _day(day: int) -> str:
    return str(np.datetime64(day, "D"))
