"""Whether modalities say the same of a place: the same cell found in another modality, and what else lies nearest.

Similarity is the cosine of features less their modality's mean: the offsets of modalities would fill it else.
Next: report.py.
"""

import dataclasses
import html
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from skysense_jax.eval.features import SampleFeatures
from skysense_jax.explain.attention import targets_of
from skysense_jax.explain.imagery import figure, finest, square
from skysense_jax.explain.places import Place
from skysense_jax.modalities import Modality
from skysense_jax.page.markup import element, guide, table

RANKS = (1, 5)  # the same cell is looked for among so many nearest
MOST_CELLS = 1000  # of a pair that are compared
_AROUND = 2  # cells beside the one that is shown, on each side
_NEAREST, _QUERIES = 5, 6  # pictures of neighbours, and cells whose are shown


@dataclasses.dataclass(frozen=True)
class Cells:
    """Cells of several places that two modalities see.

    Attributes:
      a, b: features of the one and of the other.
      place, row, column: where.
      target: class id, 0 = none.
    """

    a: Float[np.ndarray, "N D"]
    b: Float[np.ndarray, "N D"]
    place: Int[np.ndarray, " N"]
    row: Int[np.ndarray, " N"]
    column: Int[np.ndarray, " N"]
    target: Int[np.ndarray, " N"]


def common_cells(
    places: Sequence[Place], seen: Sequence[SampleFeatures], a: str, b: str, *, most: int = MOST_CELLS
) -> Cells:
    """At most ``most`` cells that both modalities see, drawn with a fixed seed; in order."""
    both = [f.modality_usable[a] & f.modality_usable[b] for f in seen]
    where = np.concatenate([np.insert(np.argwhere(there), 0, place, 1) for place, there in enumerate(both)])
    kept = np.arange(len(where))
    if len(where) > most:
        kept = np.sort(np.random.default_rng(0).choice(len(where), most, replace=False))
    pick = lambda maps: np.concatenate([x[there] for x, there in zip(maps, both)])[kept]  # noqa: E731
    targets = [targets_of(place, f.fused_usable) for place, f in zip(places, seen)]
    return Cells(
        pick([f.modality[a] for f in seen]), pick([f.modality[b] for f in seen]), *where[kept].T, pick(targets)
    )


def unit(x: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    """Rows less their mean, of length 1."""
    x = x.astype(np.float64) - x.mean(0, dtype=np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def found_at(cells: Cells) -> dict[int, float]:
    """Per rank of ``RANKS``, the share of cells of ``a`` whose own cell of ``b`` is among so many nearest.

    Of equally near cells the own one is the last, so that features that are all alike find nothing.
    """
    near = unit(cells.a) @ unit(cells.b).T
    rank = (near >= np.diag(near)[:, None]).sum(1)
    return {k: float((rank <= k).mean()) for k in RANKS}


def nearest_elsewhere(cells: Cells, *, count: int) -> Int[np.ndarray, "N _"]:
    """Of each cell of ``a`` at most ``count`` nearest cells of ``b`` in other places, nearest first; -1: no more."""
    near = np.where(cells.place[:, None] == cells.place, -np.inf, unit(cells.a) @ unit(cells.b).T)
    nearest = np.argsort(-near, axis=1, kind="stable")[:, :count]
    return np.where(np.isfinite(np.take_along_axis(near, nearest, 1)), nearest, -1)


def same_class(cells: Cells) -> tuple[float, float]:
    """Share of cells whose nearest elsewhere has their class, and the share by chance; NaN without labels.

    Chance: a labelled cell elsewhere, drawn evenly.
    """
    labelled = np.flatnonzero(cells.target > 0)
    some = Cells(*(getattr(cells, field.name)[labelled] for field in dataclasses.fields(Cells)))
    if not len(labelled):
        return np.nan, np.nan
    nearest = nearest_elsewhere(some, count=1)[:, 0]
    asked = nearest >= 0
    if not asked.any():
        return np.nan, np.nan
    elsewhere = some.place[:, None] != some.place
    alike = (some.target[:, None] == some.target) & elsewhere
    chance = alike[asked].sum(1) / elsewhere[asked].sum(1)
    return float((some.target[asked] == some.target[nearest[asked]]).mean()), float(chance.mean())


# ---- on the page


def ordered_pairs(
    places: Sequence[Place], seen: Sequence[SampleFeatures], rows: Sequence[Modality]
) -> dict[tuple[str, str], Cells]:
    """The common cells of every two modalities that have some, either way round."""
    names = [row.name for row in rows]
    pairs = {(a, b): common_cells(places, seen, a, b) for a in names for b in names if a != b}
    return {pair: cells for pair, cells in pairs.items() if len(cells.a) > 1}


def section(
    places: Sequence[Place],
    seen: Sequence[SampleFeatures],
    pairs: Mapping[tuple[str, str], Cells],
    rows: Sequence[Modality],
    *,
    classes: Sequence[str],
) -> str:
    """HTML: accuracy of every ordered pair, and for some cells what lies nearest in other places."""
    names = [row.name for row in rows]
    if not pairs:
        return element("p", "No cell is seen by two modalities: there is nothing to compare.")
    told = guide(
        "A cell of one modality (row) is looked for among the cells of another (column), by the cosine of the "
        "backbone's features less their modality's mean.",
        good="far above chance, so that modalities say the same of a place.",
        bad="chance, so that what is learned of one modality is of no use for another.",
    )
    exact = {pair: found_at(cells) for pair, cells in pairs.items()}
    alike = {pair: same_class(cells) for pair, cells in pairs.items()}
    body = ""
    for k in RANKS:
        shares = {pair: f"{exact[pair][k]:.1%}" for pair in pairs}
        title = "The same cell is the nearest" if k == 1 else f"The same cell is among the {k} nearest"
        chance = _range([k / len(cells.a) for cells in pairs.values()], "{:.1%}")
        of = _range([len(cells.a) for cells in pairs.values()], "{:,}")
        body += _pairs(f"{title}, of {of} cells; chance: {chance}", names, shares)
    classed = {pair: of for pair, of in alike.items() if not np.isnan(of).any()}
    if classed:
        chance = _range([chance for _, chance in classed.values()], "{:.0%}")
        shares = {pair: f"{share:.0%}" for pair, (share, _) in classed.items()}
        body += _pairs(f"The nearest cell in other places has the same class; chance: {chance}", names, shares)
    body = told + element("div", body, class_="beside")
    return body + _gallery(places, seen, rows, pairs, classes)


def _range(values: Sequence[int | float], told: str) -> str:
    """One number, or the least and the most."""
    least, most = (told.format(of(values)) for of in (min, max))
    return least if least == most else f"{least} to {most}"


def _pairs(caption: str, names: Sequence[str], told: Mapping[tuple[str, str], str]) -> str:
    rows = [[f"from {a}", *(told.get((a, b), "") for b in names)] for a in names]
    return table(caption, ["", *(f"to {b}" for b in names)], rows, classes=["", *["number"] * len(names)])


def _gallery(
    places: Sequence[Place],
    seen: Sequence[SampleFeatures],
    rows: Sequence[Modality],
    pairs: Mapping[tuple[str, str], Cells],
    classes: Sequence[str],
) -> str:
    """Cells of the finest modality and what is nearest to them in the others, shown in the finest imagery there is."""
    first = max((row for row in rows if any(row.name == a for a, _ in pairs)), key=lambda row: row.pixels_per_cell).name
    grounds = [finest(f, rows) for f in seen]
    body = ""
    for (a, b), cells in pairs.items():
        if a != first:
            continue
        nearest = nearest_elsewhere(cells, count=MOST_CELLS)
        strips = []
        for query in _some(cells):
            shown = [query, *_one_a_place(cells, nearest[query])[:_NEAREST]]
            figures = []
            for number, cell in enumerate(shown):
                place, row, column = (int(of[cell]) for of in (cells.place, cells.row, cells.column))
                name = classes[cells.target[cell] - 1].replace("_", " ") if cells.target[cell] else "nothing mapped"
                uri = square(grounds[place], len(seen[place].fused), row, column, around=_AROUND)
                alike = number and cells.target[cell] == cells.target[query]
                alt = f"{'neighbour' if number else 'cell'} in {places[place].sample.id}: {name}"
                figures.append(figure(uri, element("b", html.escape(name)) if alike else html.escape(name), alt))
            strips.append(element("div", "".join(figures), class_="strip neighbours"))
        if strips:
            body += element("h3", html.escape(f"Cells of {a}, and the nearest cells of {b} in other places"))
            body += element("div", "".join(strips), class_="rows")
    told = (
        "First the cell that is asked for, outlined, then the nearest of each of the nearest places. Cells are framed "
        "in the finest imagery of their place and named by the map: in bold where it is the class of the first."
    )
    return element("p", told) + body if body else ""


def _one_a_place(cells: Cells, nearest: Int[np.ndarray, " N"]) -> list[int]:
    """The first cell of each place: those beside it hardly differ."""
    there = nearest[nearest >= 0]
    return there[np.sort(np.unique(cells.place[there], return_index=True)[1])].tolist()


def _some(cells: Cells) -> list[int]:
    """One cell of each of the commonest classes: the middle one in order; of all cells if none is labelled."""
    counts = np.bincount(cells.target)
    common = [k for k in np.argsort(-counts, kind="stable") if k > 0 and counts[k]]
    of = [np.flatnonzero(cells.target == k) for k in common[:_QUERIES]] or [np.arange(len(cells.a))]
    return [int(x[len(x) // 2]) for x in of]
