"""The user's list of sources, a TOML file, and the acquisitions and label maps that they hold.

    [[source]]
    name = "aerial"            # in messages, statistics and the card
    kind = "image"             # one of KINDS
    files = "aerial/**/*.tif"  # a pattern, from the list's own folder
    licence = "CC0-1.0"
    modality = "hr"            # "image": the row of the table; further fields: those of the kind's reader

    [[modality]]               # a row that the table lacks, with the arguments of modalities.Modality
    name = "pan"

    [[class]]                  # the label map's own classes, if any is listed: see osm.read_classes
    name = "greenhouse"

A file that comes to nothing is named with its reason, and the others go on. Next: acquisitions.py, plan.py.
"""

import dataclasses
import functools
import pathlib
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import rasterio.errors
import shapely

from skysense_jax.ingest import geotiffs, ground, osm, remote, safe, stac
from skysense_jax.ingest.acquisitions import Acquisition, Rejected
from skysense_jax.ingest.sentinel import BASELINE_OFFSET
from skysense_jax.modalities import MODALITIES, Modality, select

LABELS = "osm"  # the kind whose files are label maps, and no acquisitions


@dataclasses.dataclass(frozen=True)
class Source:
    """An entry of the list.

    Attributes:
      name, kind, licence: see above.
      root: the folder that the pattern begins in.
      files: what the pattern found, sorted; a catalogue's address as it is.
      options: the other fields.
    """

    name: str
    kind: str
    licence: str
    root: pathlib.Path
    files: tuple[pathlib.Path | str, ...]
    options: Mapping[str, Any]


# By kind: its further fields, and their types.
KINDS: Mapping[str, Mapping[str, type]] = {
    "image": dict(modality=str, bands=list, day_pattern=str),
    "s2_safe": {},
    "s2_geotiff": dict(offset=int, bands=list, day_pattern=str),
    "s1": dict(unit=str, orbit=str, day_pattern=str),
    "stac": dict(modality=str, collections=list, bbox=list, dates=str, unit=str, sign=str),
    LABELS: dict(tags=str, coverage=str),
}
_NEEDED = (
    ("stac", "modality", "s2 or s1"),
    ("image", "modality", "the row of the table that its images are"),
    ("s2_geotiff", "offset", f"0, or {BASELINE_OFFSET} where the numbers are those of baseline 04.00 or later"),
)
_OWN_KINDS = {"s2": "'s2_safe', 's2_geotiff' or 'stac', which know the offset", "s1": "'s1', which knows the unit"}
_ALWAYS = ("name", "kind", "files", "licence")
_WORDS = {
    ("s2_geotiff", "offset"): (0, BASELINE_OFFSET),
    ("s1", "unit"): ("linear", "dB"),
    ("s1", "orbit"): ("ascending", "descending"),
    ("stac", "unit"): ("linear", "dB"),
    ("stac", "modality"): ("s2", "s1"),
}


@dataclasses.dataclass(frozen=True)
class SourceList:
    """The sources, the rows of the table with the list's own, and the list's own classes of the label map."""

    sources: tuple[Source, ...]
    rows: tuple[Modality, ...]
    classes: tuple[Mapping[str, Any], ...] = ()


def read_list(path: pathlib.Path) -> SourceList:
    """What a TOML file lists.

    Raises:
      ValueError: the file is none, or an entry lacks a field, has one that its kind does not know, or finds no file.
    """
    try:
        with path.open("rb") as file:
            content = tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"--sources: {path}: {error}") from error
    entries = content.get("source")
    if not entries or not isinstance(entries, list):
        raise ValueError(f"--sources: {path} has no entry [[source]]")
    try:
        rows = rows_with(content.get("modality", []))
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"--sources: {path}, [[modality]]: {error}") from error
    classes = tuple(content.get("class", ()))
    try:
        osm.read_classes(classes)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"--sources: {path}: {error}") from error
    sources = tuple(_source(entry, path) for entry in entries)
    twice = {source.name for source in sources if sum(other.name == source.name for other in sources) > 1}
    if twice:
        raise ValueError(f"--sources: {path}: name = {sorted(twice)} more than once")
    return SourceList(sources, rows, classes)


@dataclasses.dataclass(frozen=True)
class Legend:
    """How a source of label maps is read: tags, classes, and the ground that it covers (None: each file its own)."""

    table: osm.Table
    classes: osm.Classes
    ground: shapely.Geometry | None


def legend_of(source: Source, listed: SourceList) -> Legend:
    """That of a source of the list, from the files that its entry names.

    Raises:
      ValueError: a file is none, or its tags are of other classes than the list's.
      OSError: it cannot be read.
    """
    where, classes = f"--sources: source {source.name!r}", osm.read_classes(listed.classes)
    if listed.classes and "tags" not in source.options:
        raise ValueError(f"{where}: tags is missing: the list has classes of its own")
    try:
        table = osm.read_table(source.root / source.options["tags"], classes) if "tags" in source.options else osm.TAGS
        area = ground.read_ground(source.root / source.options["coverage"]) if "coverage" in source.options else None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return Legend(table, classes, area)


def rows_with(new: Sequence[Mapping[str, Any]]) -> tuple[Modality, ...]:
    """The rows of the table, then ``new`` ones, as TOML and JSON have them.

    Raises:
      TypeError, ValueError, AttributeError: they are no arguments of ``Modality``.
    """
    new = [{key: tuple(value) if isinstance(value, list) else value for key, value in row.items()} for row in new]
    return select([*MODALITIES, *(row.get("name", "?") for row in new)], new)


def _source(entry: Mapping[str, Any], path: pathlib.Path) -> Source:
    where = f"--sources: {path}, source {entry.get('name', '?')!r}"
    for field in _ALWAYS:
        if not isinstance(entry.get(field), str) or not entry[field]:
            raise ValueError(f"{where}: {field} = {entry.get(field)!r}; wanted a text")
    if entry["kind"] not in KINDS:
        raise ValueError(f"{where}: kind = {entry['kind']!r}; wanted one of {sorted(KINDS)}")
    known = KINDS[entry["kind"]]
    for field, value in entry.items():
        if field not in (*_ALWAYS, *known):
            raise ValueError(f"{where}: {field} is no field of {entry['kind']!r}; it has {sorted((*_ALWAYS, *known))}")
        if field in known and not isinstance(value, known[field]):
            raise ValueError(f"{where}: {field} = {value!r}; wanted a {known[field].__name__}")
        words = _WORDS.get((entry["kind"], field))
        if words and value not in words:
            raise ValueError(f"{where}: {field} = {value!r}; wanted one of {words}")
    if "/" in entry["name"]:
        raise ValueError(f"{where}: wanted a name without /")
    if any(not isinstance(band, int) or band < 1 for band in entry.get("bands", [])):
        raise ValueError(f"{where}: bands = {entry['bands']!r}; wanted numbers from 1")
    if entry["kind"] == "image" and entry.get("modality") in _OWN_KINDS:
        raise ValueError(f"{where}: modality = {entry['modality']!r}; wanted kind = {_OWN_KINDS[entry['modality']]}")
    try:
        remote.signer(entry.get("sign", ""))
        if "dates" in entry:
            stac.interval(entry["dates"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    for kind, field, why in _NEEDED:
        if entry["kind"] == kind and field not in entry:
            raise ValueError(f"{where}: {field} is missing: {why}")
    options = {field: value for field, value in entry.items() if field not in _ALWAYS}
    if entry["kind"] == "stac" and "://" in entry["files"]:
        return Source(entry["name"], "stac", entry["licence"], pathlib.Path(), (entry["files"],), options)
    pattern = pathlib.Path(entry["files"]).expanduser()
    root = pathlib.Path(pattern.anchor) if pattern.is_absolute() else path.resolve().parent
    files = tuple(sorted(root.glob(str(pattern.relative_to(pattern.anchor)))))
    if not files:
        raise ValueError(f"{where}: files = {entry['files']!r} finds nothing under {root}")
    return Source(entry["name"], entry["kind"], entry["licence"], root, files, options)


def find(source: Source, rows: Sequence[Modality]) -> tuple[list[Acquisition], list[Rejected]]:
    """The acquisitions of a source, sorted by name, and its files that are none.

    Raises:
      ValueError: the source's modality is no row of ``rows``.
    """
    found, rejected = [], []
    if source.kind == "stac":
        for href in source.files:
            of_catalogue, refused = stac.find(str(href), source=source.name, **source.options)
            found += of_catalogue
            rejected += refused
        return sorted(found, key=lambda acquisition: acquisition.id), rejected
    for name, read in _readers(source, rows):
        try:
            found.append(read())
        except (rasterio.errors.RasterioError, OSError, ValueError, KeyError, TypeError) as error:
            rejected.append(Rejected("file", f"{source.name}/{name}", str(error)))  # Refused is a ValueError
    return sorted(found, key=lambda acquisition: acquisition.id), rejected


def _readers(source: Source, rows: Sequence[Modality]) -> Iterator[tuple[str, Callable[[], Acquisition]]]:
    """For each file or group of files of a source its name and what reads it."""
    options = dict(source.options)
    if source.kind == "image":
        modality, table = options.pop("modality"), {row.name: row for row in rows}
        if modality not in table:
            raise ValueError(f"source {source.name!r}: modality = {modality!r}; wanted one of {sorted(table)}")
        read = functools.partial(geotiffs.read_image, row=table[modality])
    else:
        read = {"s1": geotiffs.read_radar, "s2_geotiff": geotiffs.read_surface, "s2_safe": safe.read_product}[
            source.kind
        ]
    for files in geotiffs.radar_files(source.files) if source.kind == "s1" else source.files:
        path = min(files.values()) if isinstance(files, dict) else files
        name = path.relative_to(source.root).as_posix()
        yield name, functools.partial(read, files, name=name, source=source.name, **options)
