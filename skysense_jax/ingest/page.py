"""A dataset as one page of HTML that needs neither network nor script. Text in, text out.

Whatever comes from data is escaped. Tables have headers, pictures say in words what they show, headings follow one
another. Next: inspect.py, which gathers what is shown.
"""

import dataclasses
import html
import re
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import to_hex

from skysense_jax.data.sample import Sample
from skysense_jax.drawing import NOTHING, label_colours
from skysense_jax.ingest import charts
from skysense_jax.ingest.contact import Contact, Strip
from skysense_jax.ingest.dataset import Dataset
from skysense_jax.ingest.page_style import STYLE
from skysense_jax.ingest.survey import HIDDEN_BINS, OfRow, Survey
from skysense_jax.ingest.suspicions import KINDS, Hit, Suspicions, Where
from skysense_jax.modalities import METRES_PER_CELL
from skysense_jax.page.charts import bar_chart
from skysense_jax.page.markup import document, element, many, swatch, table

_TITLES = {kind.name: kind.title for kind in KINDS}
_MOST_REASONS = 40  # of what came to nothing
_MOST_LINKS = 5  # from a suspicion to samples


@dataclasses.dataclass(frozen=True)
class Card:
    """A sample that is shown: where it lies, what is odd about it, and it and its pictures unless it is damaged."""

    where: Where
    split: str
    hits: Sequence[Hit]
    sample: Sample | None = None
    contact: Contact | None = None

    @property
    def anchor(self) -> str:
        """Its address on the page."""
        return f"{re.sub(r'[^A-Za-z0-9.-]', '_', self.where[0])}.{self.where[1]}"


def page(
    dataset: Dataset,
    survey: Survey,
    found: Suspicions,
    *,
    suspicious: Sequence[Card],
    drawn: Sequence[Card],
    places: str,
    listed: bool = False,
) -> str:
    """The page. ``places``: the map of places; ``listed``: whether a file beside the page has all suspicions."""
    sections = [
        ("places", "Places", _places(survey, places)),
        ("suspicions", "Suspicions", _suspicions(dataset, found, [*suspicious, *drawn], listed)),
        ("samples", "Samples", _samples(dataset, suspicious, drawn)),
        ("bands", "Bands against the modality table", _bands(dataset, survey)),
        ("dates", "Dates and clouds", _dates(dataset, survey)),
        ("classes", "Classes", _classes(dataset, survey)),
        ("rejected", "What came to nothing", _rejected(survey)),
    ]
    name = dataset.folder.resolve().name
    return document(f"{name}: a look at the dataset", name, _summary(dataset, survey), sections, style=STYLE)


def _summary(dataset: Dataset, survey: Survey) -> str:
    splits = ", ".join(f"{number:,} {html.escape(str(split))}" for split, number in sorted(survey.splits.items()))
    days = " to ".join(str(np.datetime64(day, "D")) for day in survey.days) if survey.days else "no date is known"
    licences = "; ".join(sorted({part for text in survey.licences for part in text.split("; ")})) or "none stated"
    text = f"{many(dataset.num_samples, 'sample')} ({splits}), {days}. Licences: {html.escape(licences)}."
    if not dataset.indexed:
        text += f" The folder has no index: what follows is of {dataset.described}."
    rows = [
        [
            name,
            f"{METRES_PER_CELL / of.row.pixels_per_cell:g} m",
            f"{of.samples:,}",
            f"{len(survey.longitudes) - of.samples:,}",
            f"{of.dates:,}",
            f"{of.left_out:,}",
            f"{of.hidden:.1%}",
            "not counted" if of.missing is None else f"{of.missing:.1%}",
            html.escape(of.row.unit),
        ]
        for name, of in survey.rows.items()
    ]
    head = ["row", "pixel", "samples", "without it", "dates", "dates left out", "under cloud", "no data", "unit"]
    return element("p", text) + table("What samples have", head, rows, classes=["", *["number"] * 7, "words"])


def _places(survey: Survey, places: str) -> str:
    lost = len(survey.longitudes) - survey.placed
    told = f"{many(lost, 'sample')} without a position." if lost else ""
    if not places:
        return element("p", told or "No sample has a position.")
    keys = element("span", class_="key train") + "to train on" + element("span", class_="key held") + "held out"
    keys += (
        ". Outlined: shown below. Point at a place for its name."
        if survey.placed <= charts.MOST_DOTS
        else ". The darker, the more places; point at a square for their number."
    )
    return element("figure", places + element("figcaption", f"{keys} {told}"))


# ---- suspicions and samples


def _suspicions(dataset: Dataset, found: Suspicions, cards: Sequence[Card], listed: bool) -> str:
    measured = f"{dataset.num_measured:,} of {dataset.num_samples:,} samples"
    text = "No verdicts: snow, deserts and lakes look odd too. A sample counts once for each row it is odd in. "
    text += f"Pixels were measured of {'all samples' if dataset.num_measured == dataset.num_samples else measured}."
    rows = []
    for kind in KINDS:
        if not found.counts.get(kind.name):
            continue
        shown = [card for card in cards if any(hit.kind == kind.name for hit in card.hits)]
        links = ", ".join(
            element("a", html.escape(_name(card)), href=f"#{card.anchor}") for card in shown[:_MOST_LINKS]
        )
        more = found.counts[kind.name] - sum(hit.kind == kind.name for card in shown[:_MOST_LINKS] for hit in card.hits)
        further = f" and {more:,} more" if more > 0 else ""
        told = html.escape(kind.meaning) + (f" Such as {links}{further}." if links else "")
        rows.append([element("span", kind.title, id=kind.name), f"{found.counts[kind.name]:,}", told])
    if not rows:
        return element("p", text) + element("p", "Nothing is odd by the rules of docs/data.md.")
    if listed:
        text += " All are listed, with their figures, in the CSV file beside this page that has its name."
    head = ["suspicion", "number", "what it is"]
    return element("p", text) + table("The gravest first", head, rows, classes=["", "number", "words"])


def _name(card: Card) -> str:
    return card.sample.id if card.sample is not None else f"{card.where[0]}, record {card.where[1]}"


def _samples(dataset: Dataset, suspicious: Sequence[Card], drawn: Sequence[Card]) -> str:
    colours = _colours(dataset)
    box = '<input type="checkbox" id="overlays" checked> '
    toggle = element("p", element("label", f"{box}clouds as stripes, and the map over imagery", for_="overlays"))
    text = (
        "Grey: no data. Brightness compares between the dates of a sample, not between samples; clouds do not set it."
    )
    parts = [toggle, element("p", text, class_="faint")]
    for title, cards in (("Suspicious samples first", suspicious), ("Samples drawn by a hash of their name", drawn)):
        if cards:
            parts.append(element("h3", title) + "".join(_card(card, colours) for card in cards))
    return "".join(parts)


def _card(card: Card, colours: Mapping[str, str]) -> str:
    sample = card.sample
    reasons = "".join(
        element("li", f"{element('a', _TITLES[hit.kind], href=f'#{hit.kind}')}: {html.escape(hit.told)}")
        for hit in card.hits
    )
    head = element("h4", html.escape(_name(card)), class_="name")
    facts = [f"{card.split}, {card.where[0]}, record {card.where[1]}"]
    if sample is not None:
        if sample.longitude is not None and sample.latitude is not None:
            facts.append(f"{charts.latitude(sample.latitude)} {charts.longitude(sample.longitude)}")
        facts += [f"{sample.extent_cells * METRES_PER_CELL:g} m across", sample.provenance, sample.licence]
    head += element("p", html.escape("; ".join(fact for fact in facts if fact)), class_="faint")
    head += element("ul", reasons, class_="reasons") if reasons else ""
    strips = [] if card.contact is None else [*card.contact.strips[:1], card.contact.labels, *card.contact.strips[1:]]
    shown = [strip for strip in strips if strip is not None]
    content = "".join(_strip(strip) for strip in shown)
    body = head + element("div", content, class_="strips") + (_legend(card.contact, colours) if card.contact else "")
    return element("article", body, class_="sample", id=card.anchor)


def _legend(contact: Contact, colours: Mapping[str, str]) -> str:
    """Colours and shares of the classes of a sample's label map."""
    entries = [element("li", f"{swatch(name, colours[name])} {share:.0%}") for name, share in contact.classes]
    return element("ul", "".join(entries), class_="legend", aria_label="Classes of the map") if entries else ""


def _colours(dataset: Dataset) -> dict[str, str]:
    """Of each class of the label map by id, "nothing mapped" first."""
    names = dataset.labels.classes
    return {"nothing mapped": to_hex(NOTHING)} | dict(zip(names, map(to_hex, label_colours(names))))


def _strip(strip: Strip) -> str:
    figures = []
    for picture in strip.pictures:
        images = f'<img src="{picture.uri}" alt="{html.escape(picture.alt)}">'
        images += f'<img src="{picture.over}" alt="" class="over">' if picture.over else ""
        stack = element("div", images, class_="stack")
        figures.append(element("figure", stack + element("figcaption", html.escape(picture.label))))
    left = f" ({many(strip.left_out, 'further date')} not shown)" if strip.left_out else ""
    title = element("h5", html.escape(strip.title) + left)
    return element("div", title + element("div", "".join(figures), class_="strip large" if strip.large else "strip"))


# ---- numbers


def _bands(dataset: Dataset, survey: Survey) -> str:
    keys = element("span", class_="key range") + "the table's mean and deviation"
    keys += element("span", class_="key own") + "mean of the counts"
    parts = [
        element(
            "p",
            f"Bars count valid pixels, clouds included, of {dataset.counted}. The outermost hold all beyond.{keys}",
        )
    ]
    for name, of in survey.rows.items():
        row, counts = of.row, dataset.counts.get(name)
        parts.append(element("h3", f"{name}: {html.escape(row.unit)}"))
        parts.append(element("p", f"The table's figures: {html.escape(row.statistics_source)}.", class_="faint"))
        if counts is None:
            parts.append(element("p", "Not counted: numbers of 32 bits, or none to train on."))
            continue
        values = np.arange(counts.shape[1], dtype=f"u{np.dtype(row.dtype).itemsize}").view(row.dtype).astype(np.float64)
        order = np.argsort(values, kind="stable")
        order = order[np.isfinite(values[order])]
        drawn = [
            element("figure", charts.band_histogram(values[order], counts[band][order], row, band))
            for band in range(row.num_bands)
            if counts[band].any()
        ]
        parts.append(element("div", "".join(drawn), class_="charts"))
        parts.append(_statistics(dataset, of))
    return "".join(parts)


def _statistics(dataset: Dataset, of: OfRow) -> str:
    row, found = of.row, dataset.statistics.get(of.row.name)
    if found is None:
        return ""
    rows = []
    for number, band in enumerate(row.bands):
        own = [found[key][number] for key in ("mean", "std", "percentile_1", "percentile_50", "percentile_99")]
        apart = (own[0] - row.mean[number]) / row.std[number]
        cells = [*own[:2], row.mean[number], row.std[number]]
        rows.append([band, *map(_four, cells), f"{apart:+.2f}", *map(_four, own[2:])])
    head = [
        "band",
        "mean",
        "deviation",
        "table's mean",
        "table's deviation",
        "apart, in deviations",
        "1 %",
        "50 %",
        "99 %",
    ]
    caption = f"{row.name}, {found['pixels']:,} valid pixels of {dataset.described}"
    return table(caption, head, rows, classes=["", *["number"] * 8])


def _four(value: int | float) -> str:
    """Four digits, or all of them before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _dates(dataset: Dataset, survey: Survey) -> str:
    total = len(survey.longitudes)
    parts = [element("p", f"Dates by month are of {many(dataset.num_measured, 'sample')}.")]
    for name, of in survey.rows.items():
        missing = total - of.samples
        lacking = f"{many(missing, 'sample')} ({missing / total:.1%}) without it" if missing else "all samples have it"
        undated = f"; {many(of.undated, 'date')} without a day" if of.undated else ""
        parts.append(
            element("h3", name) + element("p", f"{lacking}; {of.dates / of.samples:.1f} dates a sample{undated}.")
        )
        drawn = [_num_dates(name, of), _hidden(name, of), *([_months(name, of)] if of.months else [])]
        parts.append(element("div", "".join(element("figure", chart) for chart in drawn), class_="charts"))
    return "".join(parts)


def _num_dates(name: str, of: OfRow) -> str:
    most = max(of.num_dates)
    width = -(-(most + 1) // 40)
    bars = [sum(of.num_dates.get(num, 0) for num in range(low, low + width)) for low in range(0, most + 1, width)]
    labels = {place: str(place * width) for place in sorted({0, len(bars) // 2, len(bars) - 1})}
    title = f"Samples by number of {name} dates, 0 to {most}; {of.num_dates.get(0, 0):,} have none"
    return bar_chart(
        bars, labels, title=title, of="samples", axis="dates of a sample" + (f", by {width}" if width > 1 else "")
    )


def _hidden(name: str, of: OfRow) -> str:
    labels = {0: "0 %", HIDDEN_BINS // 2: "50 %", HIDDEN_BINS - 1: "100 %"}
    told = ", ".join(f"{count:,}" for count in of.hidden_counts)
    title = f"Samples by share of {name} that clouds hide, in tenths: {told}"
    return bar_chart(of.hidden_counts.tolist(), labels, title=title, of="samples", axis="share that clouds hide")


def _months(name: str, of: OfRow) -> str:
    first, last = min(of.months), max(of.months)
    width = -(-(last - first + 1) // 60)
    bars = [sum(of.months.get(m, 0) for m in range(low, low + width)) for low in range(first, last + 1, width)]
    labels = {place: str(np.datetime64(first + place * width, "M")) for place in sorted({0, len(bars) - 1})}
    title = f"{name} dates by month, {np.datetime64(first, 'M')} to {np.datetime64(last, 'M')}"
    return bar_chart(
        bars, labels, title=title, of="dates", axis="dates by month" if width == 1 else f"dates by {width} months"
    )


def _classes(dataset: Dataset, survey: Survey) -> str:
    if not survey.mapped:
        return element("p", "No sample has a label map.")
    total, rows = survey.class_pixels.sum(), []
    for place, (name, colour) in enumerate(_colours(dataset).items()):
        share = survey.class_pixels[place] / total
        meter = element("span", class_="meter", style=f"width:{share:.1%}") if share else ""
        rows.append([swatch(name, colour), f"{share:.2%}", meter, f"{survey.class_samples[place]:,}"])
    without = len(survey.longitudes) - survey.mapped
    caption = f"{many(survey.mapped, 'label map')}" + (f"; {many(without, 'sample')} without one" if without else "")
    return table(
        caption, ["class", "share of the ground", "", "samples"], rows, classes=["", "number", "share", "number"]
    )


def _rejected(survey: Survey) -> str:
    if not survey.rejected:
        return element("p", "Nothing is listed.")
    listed = sorted(survey.rejected.items(), key=lambda entry: -entry[1][0])
    rows = [
        [html.escape(what), f"{number:,}", html.escape(reason), html.escape(example)]
        for (what, reason), (number, example) in listed[:_MOST_REASONS]
    ]
    left = f"; {len(listed) - _MOST_REASONS} further reasons are left out here" if len(listed) > _MOST_REASONS else ""
    return table(
        f"By reason, without numbers (#) and names (…); all with both in rejected.jsonl{left}",
        ["what", "number", "why", "such as"],
        rows,
        classes=["", "number", "words", "words"],
    )
