"""Writes a page that shows a dataset: ``python -m skysense_jax.ingest.inspect DIR``.

One file of HTML with its pictures inside: places, suspicious samples first, bands against the modality table, dates,
clouds, classes; and a CSV file of its name with all suspicions. DIR is what ``ingest.build`` wrote, or any folder of
records. What is shown depends on the files and the options alone. Next: dataset.py (what is read), suspicions.py,
page.py.
"""

import argparse
import os
import pathlib
import tempfile
from collections.abc import Iterable, Sequence
from typing import TextIO

import pyarrow as pa

from skysense_jax.data.records import RecordError
from skysense_jax.ingest import charts, suspicions
from skysense_jax.ingest.contact import contact
from skysense_jax.ingest.dataset import Dataset, drawn, open_dataset
from skysense_jax.ingest.page import Card, page
from skysense_jax.ingest.survey import Survey, survey
from skysense_jax.ingest.suspicions import Hit, Suspicions, Where

_FEWEST_OF_A_KIND = 4  # samples that are shown for one suspicion at most, or a sixth of all that are shown


def inspect(
    folder: pathlib.Path,
    *,
    num_samples: int = 24,
    num_dates: int = 12,
    examine: int = 500,
    seed: int = 0,
    listing: TextIO | None = None,
) -> str:
    """The page.

    Args:
      num_samples: shown, at most half of them for being suspicious.
      num_dates: of a modality of a sample.
      examine: samples whose pixels are read where the folder has no figures of them.
      seed: of which ones.
      listing: where all suspicions are written, as CSV; the page then says that they are beside it.

    Raises:
      ValueError: no dataset, or none that can be read.
    """
    dataset = open_dataset(folder, examine=examine, seed=seed)
    places = dataset.index.to_table(columns=["id", "shard", "record", "split"])
    some = places.take(pa.array(drawn(places["id"].to_pylist(), num=num_samples, seed=seed), pa.int64()))
    by_hash = list(zip(some["shard"].to_pylist(), some["record"].to_pylist()))
    found = Suspicions(keep=max(_FEWEST_OF_A_KIND, num_samples // 6), always=by_hash, listing=listing)
    suspicions.of_index(dataset.index, found)
    together = suspicions.look(dataset.figures, dataset.rows)
    suspicions.of_figures(dataset.figures, dataset.rows, together, found)
    odd = list(dict.fromkeys([*dataset.unreadable, *found.worst(num=num_samples)]))[: num_samples // 2]
    others = [where for where in by_hash if where not in odd]
    shown = [_card(dataset, where, found, num_dates) for where in [*odd, *others[: num_samples - len(odd)]]]
    damaged = {**dataset.unreadable, **{card.where: card.hits[-1].told for card in shown if card.sample is None}}
    found.add_unreadable(damaged)
    cards = [card for card in shown if card.sample is None] + [card for card in shown if card.sample is not None]
    numbers = survey(dataset, together)
    return page(
        dataset,
        numbers,
        found,
        suspicious=[card for card in cards if card.hits],
        drawn=[card for card in cards if not card.hits],
        places=_map(numbers, places, cards),
        listed=listing is not None,
    )


def _card(dataset: Dataset, where: Where, found: Suspicions, num_dates: int) -> Card:
    split, hits = where[0].split("-")[0], found.told_of(where)
    try:
        sample = dataset.read(where)
    except RecordError as error:
        return Card(where, split, [*hits, Hit("unreadable", 1.0, *where, str(error))])
    return Card(
        where, split, hits, sample, contact(sample, dataset.rows, num_dates=num_dates, names=dataset.labels.classes)
    )


def _map(numbers: Survey, places: pa.Table, cards: Sequence[Card]) -> str:
    """The map of places, with names and links where each has a mark of its own."""
    titles, links = [], {}
    if numbers.placed <= charts.MOST_DOTS:
        anchors = {card.where: f"#{card.anchor}" for card in cards}
        for place, row in enumerate(places.to_pylist()):
            titles.append(f"{row['id']}, {row['split']}")
            if (row["shard"], row["record"]) in anchors:
                links[place] = anchors[row["shard"], row["record"]]
    return charts.places_map(numbers.longitudes, numbers.latitudes, numbers.held_out, titles=titles, links=links)


def _write(path: pathlib.Path, lines: Iterable[str]) -> None:
    """Writes a file, which appears as ``path`` when it is whole."""
    unfinished = path.with_name(f"{path.name}.incomplete-{os.getpid()}")
    with unfinished.open("w", encoding="utf-8", newline="") as file:
        file.writelines(lines)
    os.replace(unfinished, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Nothing; the command line."""
    parser = argparse.ArgumentParser(description="A page that shows a dataset, in one file.")
    parser.add_argument(
        "folder", metavar="DIR", type=pathlib.Path, help="what ingest.build wrote, or a folder of records"
    )
    parser.add_argument(
        "--out", type=pathlib.Path, help="the page; DIR/inspect.html if left out; all suspicions in a .csv of its name"
    )
    parser.add_argument("--num_samples", type=int, default=24, help="shown; about 0.3 MB each")
    parser.add_argument("--num_dates", type=int, default=12, help="shown, of a modality of a sample")
    parser.add_argument(
        "--examine", type=int, default=500, help="samples to read where the folder has no figures of pixels"
    )
    parser.add_argument("--seed", type=int, default=0, help="of which samples are drawn")
    given = parser.parse_args(arguments)
    if given.num_samples < 0 or given.num_dates < 1 or given.examine < 1:
        parser.error("--num_samples: wanted 0 or more; --num_dates, --examine: wanted 1 or more")
    if given.out and given.out.suffix.lower() == ".csv":
        parser.error(f"--out: got {given.out}; wanted another ending than .csv, which all suspicions are written under")
    options = dict(num_samples=given.num_samples, num_dates=given.num_dates, examine=given.examine, seed=given.seed)
    out = given.out or given.folder / "inspect.html"
    try:
        with tempfile.TemporaryFile("w+", encoding="utf-8", newline="") as listing:
            text = inspect(given.folder, **options, listing=listing)
            listing.seek(0)
            _write(out.with_suffix(".csv"), listing)
        _write(out, [text])
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    print(f"{out}: {len(text.encode()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
