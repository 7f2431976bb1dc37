"""The report of a run as one page: what it is, how it went, and what its network sees in some places.

Nothing is drawn by chance: the same run, the same page. Next: loading.py, then the modules of the sections.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from skysense_jax.eval.features import SampleFeatures, sample_features
from skysense_jax.eval.probes import ProbeCells, gather_cells
from skysense_jax.explain import attention, colours, course, glance, imagery, missing, retrieval, routing
from skysense_jax.explain.loading import Run
from skysense_jax.explain.places import Place, Places, Shown
from skysense_jax.metrics import FILE_NAME
from skysense_jax.page.markup import document, element

_EVENTS = "events.jsonl"
_STYLE = """
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); gap: .8rem; }
.panels { margin: .8rem 0; } .panel h3 { margin: 0 0 .3rem; }
.panel h4, .queries h4 { margin: .5rem 0 .2rem; font-size: .85rem; font-weight: 600; }
.panel .strip, .queries .strip { display: grid; grid-template-columns: repeat(var(--columns), 1fr); }
.panel .strip figure, .queries .strip figure { width: auto; }
.queries { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(23rem, 100%), 1fr)); gap: .3rem 1.5rem; }
section > .scroll { margin: .8rem 0; } .rows { display: grid; gap: .2rem 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(34rem, 100%), 1fr)); }
.neighbours { display: grid; grid-template-columns: repeat(6, 1fr); margin: .2rem 0; }
.neighbours figure { width: auto; } .neighbours .stack img { image-rendering: auto; }
.neighbours figure:first-child .stack { outline: 2px solid var(--train); outline-offset: -2px; }
@media (max-width: 40rem) { .neighbours { grid-template-columns: repeat(3, 1fr); } }
.beside > .charts { flex: 1 1 17rem; }
"""


@dataclasses.dataclass(frozen=True)
class _Encoded:
    """Features of the places to score on, under each condition.

    Attributes:
      together: with everything there is.
      alone: of each modality, with it alone, of the places that are shown.
      fused, usable: per condition's name.
    """

    together: Sequence[SampleFeatures]
    alone: Mapping[str, Sequence[SampleFeatures]]
    fused: Mapping[str, Sequence]
    usable: Mapping[str, Sequence]


def report(run: Run, places: Places, *, num_shown: int) -> str:
    """The page. ``num_shown``: places that are shown in pictures, the first of ``places.test``.

    Raises:
      ValueError: a file of the run is damaged.
    """
    lines = course.read_lines(run.directory / FILE_NAME)
    events = course.read_lines(run.directory / _EVENTS)
    closing = course.read_probes(run.directory / "probe.json")
    test = _most_complete_first(places.test, run)
    num_dates = {
        row.name: run.model.num_dates[row.name]
        for row in run.model.rows
        if any(len(place.sample.days(row.name)) for place in test)
    }
    rows = [row for row in run.model.rows if row.name in num_dates]
    asked = missing.conditions(num_dates)
    encoded = _encode(run, test, asked, num_shown)
    classes = run.model.labels.classes
    maps = [
        attention.attention_maps(run.model.network, run.model.params, f.fused, f.fused_usable, cells=run.model.cells)
        for f in encoded.together
    ]
    shown, together = test[:num_shown], encoded.together[:num_shown]
    selected = attention.selected(test, encoded.together, maps, len(classes))
    pairs = retrieval.ordered_pairs(test, encoded.together, rows)
    found = missing.compare(_cells_to_fit_on(run, places.train), test, encoded.fused, encoded.usable)
    legend = imagery.legend([place.labels for place in shown if place.labels is not None], classes)
    of_queries = attention.section(shown, together, maps[:num_shown], selected, rows, classes=classes)
    sections = [
        ("course", "How it went", course.section(lines, closing)),
        ("features", "Features", colours.section(shown, together, encoded.alone, rows, classes=classes) + legend),
        ("queries", "What the queries select", of_queries),
        ("experts", "Where experts work", _experts(run, test, encoded.together, rows, num_shown)),
        (
            "neighbours",
            "Neighbours across modalities",
            retrieval.section(test, encoded.together, pairs, rows, classes=classes),
        ),
        ("missing", "With less to see", missing.section(asked, found)),
    ]
    text = f"{places.told} {len(places.train)} to fit probes on, {len(test)} others to score them on and to show."
    head = element("p", text) + glance.tiles(lines, closing, selected, pairs, asked, found, classes=classes)
    head += course.head(run, lines, events)
    return document(
        f"{run.name}: report of a run", f"{run.name}, step {run.model.step:,}", head, sections, style=_STYLE
    )


def _most_complete_first(places: Sequence[Place], run: Run) -> list[Place]:
    there = lambda place: sum(len(place.sample.days(row.name)) > 0 for row in run.model.rows)  # noqa: E731
    return sorted(places, key=lambda place: -there(place))


def _features(run: Run, places: Sequence[Place], num_dates: Mapping[str, int]) -> Iterator[SampleFeatures]:
    """Features of places of which so many dates are seen; all by one compiled network."""
    hidden = dict.fromkeys(run.model.num_dates, 0)
    return sample_features(
        run.model.network,
        run.model.params,
        run.model.rows,
        (Shown(place.sample, {**hidden, **num_dates}) for place in places),
        cells=run.model.cells,
        num_dates=run.model.num_dates,
        batch_size=run.batch_size,
    )


def _encode(run: Run, test: Sequence[Place], asked: Sequence[missing.Condition], num_shown: int) -> _Encoded:
    together, alone, fused, usable = [], {}, {}, {}
    for condition in asked:
        fused[condition.name], usable[condition.name] = [], []
        for number, features in enumerate(_features(run, test, condition.num_dates)):
            fused[condition.name].append(features.fused)
            usable[condition.name].append(features.fused_usable)
            if condition.kind == missing.EVERYTHING:
                together.append(features)
            if condition.kind == missing.ALONE and number < num_shown:
                alone.setdefault(condition.modality, []).append(features)
    return _Encoded(together, alone, fused, usable)


def _cells_to_fit_on(run: Run, train: Sequence[Place]) -> ProbeCells:
    fused, usable = zip(*((f.fused, f.fused_usable) for f in _features(run, train, run.model.num_dates)))
    labels, attributes = [place.labels for place in train], [place.attributes for place in train]
    return gather_cells(fused, usable, labels, attributes, first_scene=0)


def _experts(run, test, together, rows, num_shown) -> str:
    backbone = run.model.network.backbone
    if not backbone.num_moe_blocks:
        return element("p", "The network has no mixture of experts: every token takes the same way.")
    chosen = {
        row.name: [
            routing.routes(
                run.model.network,
                run.model.params,
                row,
                features.whole,
                extent=len(features.fused),
                cells=run.model.cells,
                batch_size=run.batch_size,
            )
            for features in together
        ]
        for row in rows
    }
    return routing.section(
        test,
        together,
        chosen,
        rows,
        num_experts=backbone.num_experts,
        where=routing.mixture_blocks(backbone.depths, backbone.num_moe_blocks, backbone.moe_from),
        classes=run.model.labels.classes,
        num_shown=num_shown,
    )
