"""What is odd about samples, each oddity with its figure: rules over the tables of a dataset, never over its pixels.

A suspicion is no verdict: snow, deserts and lakes look odd too. Rules read figures.py's table and the index column by
column, so that millions of samples take little memory. Next: inspect.py, which shows the samples.
"""

import csv
import dataclasses
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import rasterio.warp
from jaxtyping import Bool, Float, Int64, UInt64

from skysense_jax.data.checks import LAST_DAY
from skysense_jax.ingest.sentinel import NOT_DARK
from skysense_jax.modalities import Modality

Where = tuple[str, int]  # a sample: its file without the suffix, and its number there
_WHERE = ("shard", "record")
_NAMED = ("id", *_WHERE)
_FAR = 3.0  # standard deviations of the table
_CLIPPED, _FULL_SCALE, _FILLED, _UNSEEN = 0.1, 0.2, 0.05, 0.8  # shares
_FAR_KM = 2.0  # a place's centre lies within 1.9 km of the corner in its name, however many cells it has
_FAR_DAYS = 366
_FIRST_DAYS = {  # of the satellites
    "s1": int(np.datetime64("2014-04-03", "D").astype(int)),
    "s2": int(np.datetime64("2015-06-23", "D").astype(int)),
}
# Names that ingest.plan gives: UTM zone, west, north.
_PLACE = re.compile(r"(32[67](?:0[1-9]|[1-5]\d|60))_(-?\d+)_(-?\d+)")


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of suspicion.

    Attributes:
      name: of its place on the page.
      title: what is odd, in a few words.
      meaning: what it may come from, and from which figure on it is told.
    """

    name: str
    title: str
    meaning: str


@dataclasses.dataclass(frozen=True)
class Hit:
    """A suspicious sample: which, how much, and in words."""

    kind: str
    figure: float
    shard: str
    record: int
    told: str

    @property
    def where(self) -> Where:
        return self.shard, self.record


KINDS: tuple[Kind, ...] = (  # the gravest first
    Kind("unreadable", "cannot be read", "The record is damaged; found only among those that this page reads."),
    Kind(
        "elsewhere",
        "position and name disagree",
        f"The centre lies {_FAR_KM:g} km or more from the corner of the square that its name gives.",
    ),
    Kind("namesakes", "a name twice", "Several samples of the dataset have this name."),
    Kind(
        "unit",
        "another unit",
        "The mean of a band on one date lies outside of the row's typical range, such as linear power among decibels.",
    ),
    Kind(
        "offset_left",
        "offset in the numbers",
        f"On a quarter of the dates or more the darkest hundredth of clear pixels is at {NOT_DARK} or above: the "
        "offset of 1000 of processing baseline 04.00 may not have been subtracted. Deserts and snow do it too.",
    ),
    Kind(
        "offset_twice",
        "offset subtracted twice",
        f"{_CLIPPED:.0%} or more of a date's clear pixels are at the lowest number in red, green and blue alike. Dark "
        "lakes do it too.",
    ),
    Kind(
        "polarisations",
        "cross-polarised is brighter",
        "VH or HV exceeds VV or HH on average, which ground hardly ever does: bands may be swapped.",
    ),
    Kind("too_early", "before the satellite", "A date lies before the launch of its satellite."),
    Kind("disorder", "dates out of order", "A date lies before the one ahead of it."),
    Kind("repeated", "a date twice", "Dates of one sample have the same pixels."),
    Kind("twins", "same pixels as another sample", "All pixels of a row equal those of another sample."),
    Kind("single_valued", "a band is one number", "A band of a date has the same number everywhere."),
    Kind(
        "filled",
        "no data taken for data",
        f"In {_FILLED:.0%} or more of a date's valid pixels all bands are at one end of the range.",
    ),
    Kind("full_scale", "saturated", f"{_FULL_SCALE:.0%} or more of a date's valid pixels are at a band's upper limit."),
    Kind(
        "far",
        "far from the table",
        f"The mean of a band's clear pixels lies {_FAR:g} or more of the table's deviations from the table's mean.",
    ),
    Kind(
        "far_day",
        "a day far from the others",
        "A date lies more than a year, and three times the middle half of all days, outside of that middle half.",
    ),
    Kind("unseen", "mostly hidden", f"Of a date that was kept {_UNSEEN:.0%} or more is cloud or no data."),
    Kind("empty_map", "nothing on the map", "There is a label map and nothing on it: the extract may end before it."),
)
_RANK = {kind.name: rank for rank, kind in enumerate(KINDS)}


class Suspicions:
    """How many samples are suspicious of each kind, and the worst of them.

    A sample counts once for each row of the modality table in which a kind is found.
    """

    def __init__(self, *, keep: int, always: Collection[Where] = (), listing: TextIO | None = None):
        """What begins empty.

        Args:
          keep: of each kind how many to remember.
          always: samples of which everything is remembered.
          listing: where all are written, as CSV, whether remembered or not.
        """
        self._keep, self._always = keep, frozenset(always)
        self._listing = None if listing is None else csv.writer(listing, lineterminator="\n")
        if self._listing is not None:
            self._listing.writerow(("suspicion", "sample", "file", "record", "figure", "told"))
        self.counts: dict[str, int] = {}
        self._worst: dict[str, list[Hit]] = {}
        self._others: list[Hit] = []

    def add(
        self,
        kind: str,
        batch: pa.RecordBatch | pa.Table,
        odd: Bool[np.ndarray, "N"],
        figures: Float[np.ndarray, "N"],
        told: Callable[[int], str],
    ) -> None:
        """Counts the rows of a batch that are ``odd``; the larger a figure, the worse. ``told`` is asked by row."""
        rows = np.flatnonzero(odd)
        if not len(rows):
            return
        self.counts[kind] = self.counts.get(kind, 0) + len(rows)
        self._list(kind, batch, rows, figures, told)
        hits = lambda rows: [  # noqa: E731
            Hit(kind, float(figures[row]), shard, record, told(int(row)))
            for row, shard, record in zip(rows, *(batch[name].take(pa.array(rows)).to_pylist() for name in _WHERE))
        ]
        worst = hits(rows[np.argsort(-figures[rows], kind="stable")][: self._keep])
        worst = sorted([*self._worst.get(kind, ()), *worst], key=lambda hit: (-hit.figure, *hit.where))
        self._worst[kind] = worst[: self._keep]
        self._others += hits(self._of_always(batch, rows))

    def _list(self, kind: str, batch: Any, rows: np.ndarray, figures: np.ndarray, told: Callable[[int], str]) -> None:
        if self._listing is None:
            return
        title, names = KINDS[_RANK[kind]].title, (batch[name].take(pa.array(rows)).to_pylist() for name in _NAMED)
        for row, name, shard, record in zip(rows, *names):
            self._listing.writerow((title, name, shard, record, f"{figures[row]:.6g}", told(int(row))))

    def add_unreadable(self, damaged: Mapping[Where, str]) -> None:
        """Counts records that cannot be read, with what was said of each."""
        self.counts["unreadable"] = len(damaged)
        if self._listing is not None:
            title = KINDS[_RANK["unreadable"]].title
            self._listing.writerows((title, "", *where, 1, told) for where, told in damaged.items())

    def _of_always(self, batch: pa.RecordBatch | pa.Table, rows: np.ndarray) -> np.ndarray:
        """Those of the rows that are of samples to be remembered whatever they are."""
        for name, known in zip(_WHERE, zip(*self._always)):
            rows = rows[pc.is_in(batch[name].take(pa.array(rows)), pa.array(known)).to_numpy(zero_copy_only=False)]
        where = zip(*(batch[name].take(pa.array(rows)).to_pylist() for name in _WHERE))
        return rows[np.array([each in self._always for each in where], bool)]

    def worst(self, *, num: int) -> list[Where]:
        """Up to ``num`` samples: the worst of each kind, the gravest kind first, then the next of each, and so on."""
        kinds = sorted(self._worst, key=_RANK.__getitem__)
        in_turn = [
            self._worst[kind][place] for place in range(self._keep) for kind in kinds if place < len(self._worst[kind])
        ]
        return list(dict.fromkeys(hit.where for hit in in_turn))[:num]

    def told_of(self, where: Where) -> list[Hit]:
        """What is remembered of one sample, the gravest first."""
        known = [hit for hits in (*self._worst.values(), self._others) for hit in hits if hit.where == where]
        return sorted(dict.fromkeys(known), key=lambda hit: _RANK[hit.kind])


# ---- rules over the index


def of_index(index: pa.dataset.Dataset, found: Suspicions) -> None:
    """Adds what is odd about the rows of an index."""
    ids = index.to_table(columns=["id", "shard", "record"])
    values = pc.value_counts(ids["id"])
    often = values.filter(pc.greater(values.field("counts"), 1))
    if len(often):
        times = dict(zip(often.field("values").to_pylist(), often.field("counts").to_pylist()))
        num = np.array([times.get(name, 1) for name in ids["id"].to_pylist()], float)
        found.add("namesakes", ids, num > 1, num, lambda row: f"samples with its name: {num[row]:.0f}")
    for batch in index.to_batches(columns=["id", "shard", "record", "longitude", "latitude", "classes"]):
        _elsewhere(batch, found)
        maps = batch["classes"].to_pylist()
        empty = np.array([classes is not None and not any(classes[1:]) for classes in maps], bool)
        found.add("empty_map", batch, empty, np.ones(len(empty)), lambda row: "its label map has nothing on it")


def _elsewhere(batch: pa.RecordBatch, found: Suspicions) -> None:
    """Samples whose position is not that of the square of the grid that their name gives."""
    names = [_PLACE.fullmatch(name) for name in batch["id"].to_pylist()]
    longitudes, latitudes = _numbers(batch["longitude"]), _numbers(batch["latitude"])
    placed = np.array([name is not None for name in names]) & np.isfinite(longitudes) & np.isfinite(latitudes)
    km = np.zeros(len(names))
    for zone in {names[row][1] for row in np.flatnonzero(placed)}:
        rows = [row for row in np.flatnonzero(placed) if names[row][1] == zone]
        x, y = rasterio.warp.transform("EPSG:4326", f"EPSG:{zone}", longitudes[rows].tolist(), latitudes[rows].tolist())
        west, north = (np.array([float(names[row][part]) for row in rows]) for part in (2, 3))
        km[rows] = np.hypot(x - west, y - north) / 1000
    told = lambda row: f"its centre lies {km[row]:.1f} km from the square in its name"  # noqa: E731
    found.add("elsewhere", batch, km >= _FAR_KM, km, told)


# ---- rules over the figures


@dataclasses.dataclass(frozen=True)
class Look:
    """What all figures of one row of the modality table say together.

    Attributes:
      days: how many dates are of each day since 1970-01-01; ``undated``: of none.
      twins: digests that several samples have, ascending; ``num_twins``: how many samples have each.
    """

    days: Int64[np.ndarray, "N"]
    undated: int
    twins: UInt64[np.ndarray, "M"]
    num_twins: Int64[np.ndarray, "M"]


def look(figures: pa.dataset.Dataset, rows: Sequence[Modality]) -> dict[str, Look]:
    """What the figures of all samples say together, by row of the modality table."""
    digests: dict[str, list[np.ndarray]] = {row.name: [] for row in rows}
    days = {row.name: np.zeros(LAST_DAY + 1, np.int64) for row in rows}
    undated = dict.fromkeys(days, 0)
    for batch in figures.to_batches(columns=["modality", "digest", "days"]):
        for name, part in _by_row(batch, rows):
            digests[name].append(part["digest"].to_numpy(zero_copy_only=False))
            seen = part["days"].flatten()
            undated[name] += seen.null_count
            days[name] += np.bincount(seen.drop_null().to_numpy(zero_copy_only=False), minlength=LAST_DAY + 1)
    found = {}
    for name, parts in digests.items():
        unique, counts = np.unique(np.concatenate([*parts, np.zeros(0, np.uint64)]), return_counts=True)
        found[name] = Look(days[name], undated[name], unique[counts > 1], counts[counts > 1])
    return found


def _by_row(batch: pa.RecordBatch, rows: Sequence[Modality]) -> Iterator[tuple[str, pa.RecordBatch]]:
    """The parts of a batch of figures that are of each row of the modality table, if there are any."""
    for row in rows:
        part = batch.filter(pc.equal(batch["modality"], row.name))
        if len(part):
            yield row.name, part


def of_figures(
    figures: pa.dataset.Dataset, rows: Sequence[Modality], together: Mapping[str, Look], found: Suspicions
) -> None:
    """Adds what is odd about the figures of samples. ``together``: what ``look`` says of them."""
    table, usual = {row.name: row for row in rows}, {name: _far_days(seen.days) for name, seen in together.items()}
    for batch in figures.to_batches():
        for name, part in _by_row(batch, rows):
            _of_batch(part, table[name], together[name], found)
            _of_days(part, table[name], found, usual[name])


def _of_batch(batch: pa.RecordBatch, row: Modality, together: Look, found: Suspicions) -> None:
    """Rules over the figures of samples in one row of the modality table."""
    columns = {name: _numbers(batch[name]) for name in _PLAIN}
    low, high = row.typical_range
    with np.errstate(invalid="ignore"):  # no figure: NaN, which no rule is true of
        for kind, (name, least, told) in _RULES.items():
            figure = columns[name]
            words = lambda i, figure=figure, told=told: f"{row.name}: {told.format(figure[i])}"  # noqa: E731
            found.add(kind, batch, figure >= least, figure, words)
        beyond = np.fmax(low - columns["least_mean"], columns["largest_mean"] - high)
        found.add("unit", batch, beyond > 0, beyond, lambda i: _unit(columns, row, i))
    _of_means(batch, row, found)
    if len(together.twins):
        digests = batch["digest"].to_numpy(zero_copy_only=False)
        place = np.searchsorted(together.twins, digests).clip(max=len(together.twins) - 1)
        others = (together.num_twins[place] - 1.0) * (together.twins[place] == digests)
        words = lambda i: f"{row.name}: other samples with the same pixels: {others[i]:.0f}"  # noqa: E731
        found.add("twins", batch, others > 0, others, words)


_RULES = {  # kind: the figure, from which value on, and how it is told
    "offset_left": ("darkest", NOT_DARK, "its darkest pixels are at {:.0f}, and wanted below " + str(NOT_DARK)),
    "offset_twice": ("clipped", _CLIPPED, "{:.0%} of a date are at the lowest number in red, green and blue"),
    "disorder": ("disordered", 1, "dates that lie before the one ahead: {:.0f}"),
    "repeated": ("repeated", 1, "dates with the pixels of another date: {:.0f}"),
    "single_valued": ("single_valued", 1, "bands that are one number on a date: {:.0f}"),
    "filled": ("filled", _FILLED, "{:.0%} of a date's valid pixels are at one end in all bands"),
    "full_scale": ("full_scale", _FULL_SCALE, "{:.0%} of a date's valid pixels are at a band's upper limit"),
    "unseen": ("unseen", _UNSEEN, "{:.0%} of a date are cloud or no data"),
}
_PLAIN = ("least_mean", "largest_mean", *(name for name, _, _ in _RULES.values()))


def _unit(columns: Mapping[str, np.ndarray], row: Modality, i: int) -> str:
    low, high = row.typical_range
    least, largest = columns["least_mean"][i], columns["largest_mean"][i]
    mean = least if least < low else largest
    return f"{row.name}: mean {mean:.4g} on a date; typical is {low:g} to {high:g}: it looks like {row.wrong_unit_hint}"


def _of_means(batch: pa.RecordBatch, row: Modality, found: Suspicions) -> None:
    """Means of bands against the modality table, and against each other."""
    some = batch.filter(pc.is_valid(batch["mean"]))
    if not len(some):
        return
    means = some["mean"].flatten().to_numpy(zero_copy_only=False).reshape(-1, row.num_bands).astype(float)
    deviations = np.abs(means - row.mean) / row.std
    worst = deviations.argmax(1)
    most = deviations[np.arange(len(worst)), worst]

    def told(i: int) -> str:
        band = worst[i]
        return (
            f"{row.name} {row.bands[band]}: mean {means[i, band]:.4g}, {most[i]:.1f} deviations from the table's "
            f"{row.mean[band]:.4g} ± {row.std[band]:.4g}"
        )

    found.add("far", some, most >= _FAR, most, told)
    for co, cross in (("VV", "VH"), ("HH", "HV")):
        if {co, cross} <= set(row.bands) and row.photometric == "backscatter":
            excess = means[:, row.bands.index(cross)] - means[:, row.bands.index(co)]
            words = lambda i, co=co, cross=cross, by=excess: f"{row.name}: {cross} exceeds {co} by {by[i]:.1f} dB"  # noqa: E731
            found.add("polarisations", some, excess > 0, excess, words)


def _of_days(batch: pa.RecordBatch, row: Modality, found: Suspicions, usual: tuple[float, float]) -> None:
    """Days before a satellite was there, and days far from those of the other samples."""
    sizes = np.diff(batch["days"].offsets.to_numpy())
    owner = np.repeat(np.arange(len(batch)), sizes)
    days = _numbers(batch["days"].flatten())
    dated = np.isfinite(days)
    first, last = np.full(len(batch), np.inf), np.full(len(batch), -np.inf)
    np.minimum.at(first, owner[dated], days[dated])
    np.maximum.at(last, owner[dated], days[dated])
    day_of = lambda day: str(np.datetime64(int(day), "D"))  # noqa: E731
    launch = _FIRST_DAYS.get(row.name, -np.inf)
    found.add(
        "too_early", batch, first < launch, launch - first, lambda i: f"{row.name}: a date is of {day_of(first[i])}"
    )
    beyond = np.fmax(usual[0] - first, last - usual[1])
    odd_day = np.where(usual[0] - first >= last - usual[1], first, last)
    found.add("far_day", batch, beyond > 0, beyond, lambda i: f"{row.name}: a date is of {day_of(odd_day[i])}")


def _far_days(counts: Int64[np.ndarray, "N"]) -> tuple[float, float]:
    """The earliest and the latest day that are not far from the others; of no days, any."""
    total = np.cumsum(counts)
    if not total[-1]:
        return -np.inf, np.inf
    lower, upper = (float(np.searchsorted(total, share * total[-1])) for share in (0.25, 0.75))
    margin = max(3 * (upper - lower), _FAR_DAYS)
    return lower - margin, upper + margin


def _numbers(column: pa.Array) -> Float[np.ndarray, "N"]:
    """A column as numbers, NaN where it has none."""
    return column.cast(pa.float64()).to_numpy(zero_copy_only=False)
