"""Picks the places that become samples: ``python -m skysense_jax.ingest.plan --sources=LIST.toml --out=MANIFEST``.

MANIFEST is a folder: places.parquet, acquisitions.parquet, labels.parquet, sources.json (names, licences, ground with
labels) and rejected.jsonl; it appears when everything in it is written. Places are the squares of a grid (places.py) in
the area of interest that some source shows. Next: build.py, which makes the samples.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import rasterio
import rasterio.warp
import shapely

from skysense_jax.data.checks import MAX_EXTENT_CELLS
from skysense_jax.ingest import acquisitions as acquisitions_lib
from skysense_jax.ingest import ground, labels, places, sources
from skysense_jax.ingest.acquisitions import Acquisition, Rejected
from skysense_jax.ingest.manifest import ACQUISITIONS, LABELS, PLACES, REJECTED, SOURCES
from skysense_jax.ingest.places import Place
from skysense_jax.ingest.rasters import Refused
from skysense_jax.modalities import METRES_PER_CELL, MODALITIES


@dataclasses.dataclass(frozen=True)
class Choice:
    """How places are chosen.

    Attributes:
      cells: along a side of a place.
      require: rows of the table of which each place must have an acquisition.
      validation_share: of blocks that are held out; block_km: their side.
      land: polygons, degrees, outside of which no place has its centre; None: anywhere.
      land_cover: a raster of classes, of each of which at most ``per_class`` places are chosen; None: all places.
      seed: of what is drawn.
    """

    cells: int = 64
    require: tuple[str, ...] = ()
    validation_share: float = 0.05
    block_km: float = 20.0
    land: shapely.Geometry | None = None
    land_cover: pathlib.Path | None = None
    per_class: int = 1000
    seed: int = 0


def plan(
    listed: sources.SourceList,
    out: pathlib.Path,
    *,
    area: shapely.Geometry | None,
    choice: Choice,
) -> str:
    """What was found and chosen, as a table; writes the manifest ``out``.

    ``area``: of interest, degrees; None: wherever the sources have imagery.

    Raises:
      ValueError: ``out`` exists, or not one place is left.
    """
    if out.exists():
        raise ValueError(f"--out: {out} exists; wanted a new folder")
    maps = [source for source in listed.sources if source.kind == sources.LABELS]
    legends = {source.name: sources.legend_of(source, listed) for source in maps}
    found: list[Acquisition] = []
    rejected: list[Rejected] = []
    for source in listed.sources:
        if source.kind != sources.LABELS:
            of_source, refused = sources.find(source, listed.rows)
            found += of_source
            rejected += refused
    has = sorted({acquisition.modality for acquisition in found})
    if absent := [name for name in choice.require if name not in has]:
        told = "\n".join(f"  {entry.name}: {entry.reason}" for entry in rejected)
        raise ValueError(
            f"--require: no source gives {', '.join(absent)}; they give {', '.join(has) or 'nothing'}\n{told}"
        )
    chosen = _choose(found, area, choice)
    used = {row for place in chosen for row in place.acquisitions}
    names = Counter(found[row].source for row in used)
    for source in listed.sources:
        if source.kind != sources.LABELS and not names[source.name]:
            rejected.append(Rejected("source", source.name, "none of its files meets a place that was chosen"))
    if not chosen:
        reasons = "\n".join(f"  {entry.name}: {entry.reason}" for entry in rejected)
        side = choice.cells * METRES_PER_CELL
        raise ValueError(
            f"no place is left of {len(found)} acquisitions: imagery must reach the middle of a place, which has "
            f"{side:g} m a side (--cells={choice.cells}); rejected:\n{reasons}"
        )
    unfinished = out.with_name(f"{out.name}.incomplete-{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        acquisitions_lib.write(found, unfinished / ACQUISITIONS)
        places.write(chosen, unfinished / PLACES)
        coverages, refused = _write_labels(maps, legends, chosen, unfinished / LABELS)
        rejected += refused
        elsewhere = _elsewhere(labels.LabelMaps(unfinished / LABELS, coverages), chosen, coverages)
        rejected += elsewhere
        facts = {
            "sources": [_facts(source) for source in listed.sources],
            "modalities": [dataclasses.asdict(row) for row in listed.rows if row.name not in MODALITIES],
            "labels": [coverage.facts() for coverage in coverages],
            "choice": {"cells": choice.cells, "require": list(choice.require), "seed": choice.seed},
        }
        if listed.classes:
            facts["classes"] = list(listed.classes)
        (unfinished / SOURCES).write_text(json.dumps(facts, indent=1) + "\n")
        write_rejected(rejected, unfinished / REJECTED)
        os.replace(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    unused = {entry.name for entry in elsewhere}
    of_maps = [(coverage.source.partition("/")[0], coverage.source not in unused) for coverage in coverages]
    of_images = [(acquisition.source, row in used) for row, acquisition in enumerate(found)]
    return _table(listed.sources, Counter([*of_images, *of_maps]), chosen, rejected)


def _facts(source: sources.Source) -> dict[str, str]:
    facts = dict(name=source.name, kind=source.kind, licence=source.licence)
    return facts | ({"sign": source.options["sign"]} if "sign" in source.options else {})


def write_rejected(rejected: Sequence[Rejected], path: pathlib.Path) -> None:
    """Writes JSON lines of ``Rejected``."""
    path.write_text("".join(json.dumps(dataclasses.asdict(entry)) + "\n" for entry in rejected))


def _write_labels(
    maps: Sequence[sources.Source],
    legends: Mapping[str, sources.Legend],
    chosen: Sequence[Place],
    path: pathlib.Path,
) -> tuple[list[labels.Coverage], list[Rejected]]:
    """Writes the table of the objects near the places; returns the ground that it covers, and what came to nothing."""
    boxes = [box.bounds for place in chosen for box in places.boxes_of(place.square.degrees())]
    writer = labels.Writer(path, near=labels.Near(np.array(boxes)))
    coverages, rejected = [], []
    for source in maps:
        covered, refused = _read_labels(source, legends[source.name], writer)
        coverages += covered
        rejected += refused
    writer.close([coverage.source for coverage in coverages])
    return coverages, rejected


def _read_labels(
    source: sources.Source, legend: sources.Legend, writer: labels.Writer
) -> tuple[list[labels.Coverage], list[Rejected]]:
    """What a source covers: each of its files its own ground, or all of them together what "coverage" says."""
    coverages, rejected, num_refused, polygons = [], [], 0, legend.ground
    for path in source.files:
        name = f"{source.name}/{path.relative_to(source.root).as_posix()}"
        covering = name if polygons is None else source.name
        try:
            bounds, lost = labels.read_file(path, writer, source=covering, table=legend.table, classes=legend.classes)
        except Refused as error:
            rejected.append(Rejected("file", name, str(error)))
            num_refused += 1
            continue
        rejected += [Rejected("file", name, reason) for reason in lost]
        if polygons is None:
            coverages.append(labels.Coverage(name, bounds))
    if polygons is None:
        return coverages, rejected
    if num_refused:  # what the file has is missing somewhere on the source's ground
        told = f"{num_refused} of its {len(source.files)} files cannot be read: it covers nothing"
        return [], [*rejected, Rejected("source", source.name, told)]
    return [labels.Coverage(source.name, polygons.bounds, polygons.wkt)], rejected


def _elsewhere(maps: labels.LabelMaps, chosen: Sequence[Place], coverages: Sequence[labels.Coverage]) -> list[Rejected]:
    """The label maps that cover no place."""
    unseen = {coverage.source for coverage in coverages}
    for place in chosen:
        if not unseen:
            break
        unseen.difference_update(maps.covering(place.square))
    return [Rejected("file", name, "it covers none of the places that were chosen") for name in sorted(unseen)]


def _choose(found: Sequence[Acquisition], area: shapely.Geometry | None, choice: Choice) -> list[Place]:
    shown = shapely.union_all([part for acquisition in found for part in places.shown_by(acquisition)])
    area = shown if area is None else area.intersection(shown)
    if choice.land is not None:
        area = area.intersection(choice.land)
    chosen = places.seen_by(list(places.grid(area, cells=choice.cells)), found) if not area.is_empty else []
    wanted = set(choice.require)
    chosen = [place for place in chosen if wanted <= {found[row].modality for row in place.acquisitions}]
    if choice.land_cover is not None:
        classes = _classes(chosen, choice.land_cover)
        chosen = places.balanced(chosen, classes, most=choice.per_class, seed=choice.seed)
    return places.with_splits(chosen, share=choice.validation_share, block_km=choice.block_km, seed=choice.seed)


def _classes(chosen: Sequence[Place], path: pathlib.Path) -> dict[str, int]:
    """The class of a raster under each place's centre; -1 outside of it."""
    found = {}
    with rasterio.open(path) as file:
        if file.crs is None:
            raise ValueError(f"--land_cover: {path} has no coordinate system")
        turns = (0, 360, -360) if file.crs.is_geographic else (0,)  # longitudes of a file may go on to 360
        for place in chosen:
            (x,), (y,) = rasterio.warp.transform("EPSG:4326", file.crs, *([axis] for axis in place.square.centre()))
            inside = [x + turn for turn in turns if file.bounds.left <= x + turn < file.bounds.right]
            if not inside or not file.bounds.bottom < y <= file.bounds.top:
                found[place.id] = -1
            else:
                found[place.id] = int(next(file.sample([(inside[0], y)]))[0])
    return found


def _table(listed, counts: Counter[tuple[str, bool]], chosen, rejected) -> str:
    """``counts``: of acquisitions and maps, by source and whether a place has them."""
    lines = [f"{'source':24} {'kind':8} {'found':>7} {'used':>7}"]
    for source in listed:
        used = counts[source.name, True]
        lines.append(f"{source.name:24} {source.kind:8} {used + counts[source.name, False]:7} {used:7}")
    splits = Counter(place.split for place in chosen)
    lines.append(f"places: {splits[places.TRAIN]} to train on, {splits[places.VALIDATION]} held out")
    lines += [f"rejected {entry.what} {entry.name}: {entry.reason}" for entry in rejected]
    return "\n".join(lines)


def read_area(text: str, *, flag: str = "--area") -> shapely.Geometry:
    """An area that ``flag`` gives: "west,south,east,north" in degrees, or a file as of ``ground.read_ground``.

    Raises:
      ValueError: neither, or no place on Earth.
    """
    path = pathlib.Path(text)
    if path.exists():
        try:
            return ground.read_ground(path)
        except ValueError as error:
            raise ValueError(f"{flag}: got {error}") from error
    try:
        west, south, east, north = (float(edge) for edge in text.split(","))
    except ValueError as error:
        raise ValueError(
            f"{flag}: got {text!r}; wanted west,south,east,north or a file of GeoJSON, WKT or .poly"
        ) from error
    if not (-180 <= west < east <= 180 and -90 <= south < north <= 90):
        raise ValueError(f"{flag}: got {text!r}; wanted degrees, west before east, south before north")
    return shapely.box(west, south, east, north)


_REQUIRE = (
    "rows that each place must have, such as hr,s2; asked of outlines of images (SAFE, STAC) or boxes around them, not "
    "of pixels: build leaves out places where they are empty"
)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """With defaults, and with the lines of the epilog as they are."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Nothing; the command line."""
    parser = argparse.ArgumentParser(
        formatter_class=_Help,
        description="Places that become samples, from a list of sources.",
        epilog=sources.help_text(),
    )
    parser.add_argument("--sources", type=pathlib.Path, required=True, help="the list, LIST.toml: see below")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="new folder for the manifest")
    parser.add_argument("--area", help="west,south,east,north in degrees, or GeoJSON, WKT or .poly; without: all")
    parser.add_argument("--land", help="GeoJSON, WKT or .poly of land; places elsewhere are left out")
    parser.add_argument("--land_cover", type=pathlib.Path, help="raster of classes to balance places by")
    parser.add_argument("--per_class", type=int, default=Choice.per_class, help="places of each class of it at most")
    parser.add_argument("--cells", type=int, default=64, help="side of a place in cells of 10 m")
    parser.add_argument("--require", default="", help=_REQUIRE)
    parser.add_argument("--validation_share", type=float, default=0.05, help="of the ground that is held out")
    parser.add_argument("--block_km", type=float, default=20.0, help="side of the blocks that are held out")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    try:
        print(_run(given))
    except (ValueError, OSError) as error:  # OSError: a raster of classes or a table of tags that cannot be read
        parser.exit(1, f"error: {error}\n")


def _run(given: Any) -> str:
    if not 1 <= given.cells <= MAX_EXTENT_CELLS:
        raise ValueError(f"--cells: got {given.cells}; wanted 1 to {MAX_EXTENT_CELLS}")
    if not 0 <= given.validation_share < 1 or given.block_km <= 0 or given.per_class < 1:
        raise ValueError(
            f"--validation_share, --block_km, --per_class: got {given.validation_share}, {given.block_km}, "
            f"{given.per_class}; wanted 0 to below 1, above 0, and 1 or more"
        )
    listed = sources.read_list(given.sources)
    require, known = tuple(name for name in given.require.split(",") if name), {row.name for row in listed.rows}
    if not known.issuperset(require):
        raise ValueError(f"--require: got {sorted(set(require) - known)}; wanted rows of {sorted(known)}")
    choice = Choice(
        cells=given.cells,
        require=require,
        validation_share=given.validation_share,
        block_km=given.block_km,
        land=None if given.land is None else read_area(given.land, flag="--land"),
        land_cover=given.land_cover,
        per_class=given.per_class,
        seed=given.seed,
    )
    area = None if given.area is None else read_area(given.area)
    return plan(listed, given.out, area=area, choice=choice)


if __name__ == "__main__":
    main()
