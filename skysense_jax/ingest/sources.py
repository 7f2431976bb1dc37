"""The user's list of sources, a TOML file, and the acquisitions and label maps that they hold.

    [[source]]
    name = "aerial"            # in messages, statistics and the card
    kind = "image"             # one of KINDS
    files = "aerial/**/*.tif"  # a pattern, from the list's own folder; or a table of files (tables.py)
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
import textwrap
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import rasterio.errors
import shapely

from skysense_jax.ingest import cubes, dates, geotiffs, ground, names, osm, remote, safe, stac, tables
from skysense_jax.ingest.acquisitions import Acquisition, Rejected
from skysense_jax.ingest.manifest import rows_with
from skysense_jax.ingest.sentinel import BASELINE_OFFSET
from skysense_jax.modalities import Modality

LABELS = "osm"  # the kind whose files are label maps, and no acquisitions


@dataclasses.dataclass(frozen=True)
class Source:
    """An entry of the list.

    Attributes:
      name, kind, licence: see above.
      root: the folder that the pattern begins in.
      files: what the pattern found, sorted; a catalogue's address as it is.
      options: the other fields.
      told: by a table, of each file.
    """

    name: str
    kind: str
    licence: str
    root: pathlib.Path
    files: tuple[pathlib.Path | str, ...]
    options: Mapping[str, Any]
    told: Mapping[pathlib.Path, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


# What each entry has, and what it says.
ALWAYS: Mapping[str, str] = {
    "name": "of the source, in messages, statistics and the card",
    "kind": "how its files are read, see below",
    "files": "a pattern from the list's own folder (** too), or a CSV or Parquet table of files; of stac an address",
    "licence": "a text that goes into the card and every sample; if it is not known, say so",
}
# By kind: its further fields, and their types.
KINDS: Mapping[str, Mapping[str, type]] = {
    "image": dict(modality=str, bands=list, day_pattern=str),
    "s2_safe": {},
    "s2_geotiff": dict(offset=int, bands=list, day_pattern=str),
    "s1": dict(unit=str, orbit=str, day_pattern=str),
    "cube": {
        **dict.fromkeys(("modality", "array", "group", "products", "classes", "clouds", "dates"), str),
        **dict(variables=list, bands=list, cloud_bands=list, scale=float, offset=int),
        **dict(unit=str, orbit=str, day_pattern=str),
    },
    "stac": dict(modality=str, collections=list, bbox=list, dates=str, unit=str, sign=str),
    LABELS: dict(tags=str, coverage=str),
}
_FILES = {  # by kind what files are
    "image": "rasters that GDAL opens",
    "s2_safe": "Sentinel-2 Level-2A product folders",
    "s2_geotiff": "Sentinel-2 Level-2A bands in one raster",
    "s1": "Sentinel-1 backscatter, VV and VH in one file or two",
    "cube": "NetCDF and HDF5",
    "stac": "a static catalogue, or the address of an API",
    LABELS: "OpenStreetMap as .osm.pbf, .osm or GeoJSON",
}
_NEEDED = (
    ("stac", "modality", "s2 or s1"),
    ("image", "modality", "the row of the table that its images are"),
    ("cube", "modality", "the row of the table that its bands are"),
    ("s2_geotiff", "offset", f"0, or {BASELINE_OFFSET} where the numbers are those of baseline 04.00 or later"),
)
_OWN_KINDS = {"s2": "'s2_safe', 's2_geotiff' or 'stac', which know the offset", "s1": "'s1', which knows the unit"}
_PLACED = ("image", "s2_geotiff", "s1", "cube")  # the kinds whose files a table may tell day and place of
_WORDS = dict(offset=(0, BASELINE_OFFSET), unit=("linear", "dB"), orbit=("ascending", "descending"))
_ONLY_OF = dict(offset="s2", classes="s2", clouds="s2", unit="s1", orbit="s1")  # fields of a cube by its modality


@dataclasses.dataclass(frozen=True)
class SourceList:
    """The sources, the rows of the table with the list's own, and the list's own classes of the label map."""

    sources: tuple[Source, ...]
    rows: tuple[Modality, ...]
    classes: tuple[Mapping[str, Any], ...] = ()


def help_text() -> str:
    """How a list is written, for a terminal: an example, the fields of all entries, and those of each kind."""
    example = dict(name="aerial", kind="image", files="aerial/**/*.tif", licence="CC0-1.0", modality="hr")
    needed = {(kind, field) for kind, field, _ in _NEEDED}
    lines = ["LIST.toml has an entry for each source, all four of its first fields required:", "", "  [[source]]"]
    lines += [f'  {field} = "{value}"' for field, value in example.items()]
    lines += ["", *(f"  {field:8} {told}" for field, told in ALWAYS.items())]
    lines += ["", "kinds: what their files are; further fields (required ones with *):", ""]
    for kind, fields in KINDS.items():
        listed = ", ".join(f"{field}{'*' if (kind, field) in needed else ''}" for field in fields)
        listed = f"{_FILES[kind]}; {listed or 'none'}"
        lines += textwrap.wrap(listed, 96, initial_indent=f"  {kind:11} ", subsequent_indent=" " * 14)
    words = "; ".join(f"{field}: {', '.join(map(str, values))}" for field, values in _WORDS.items())
    return "\n".join(
        [*lines, "", f"{words}.", "Rows and classes of your own, and what each field means: docs/data.md."]
    )


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


def _source(entry: Mapping[str, Any], path: pathlib.Path) -> Source:
    where = f"--sources: {path}, source {entry.get('name', '?')!r}"
    _check_types(entry, where)
    _check_values(entry, where)
    name, kind, licence = entry["name"], entry["kind"], entry["licence"]
    options = {field: value for field, value in entry.items() if field not in ALWAYS}
    options |= {field: float(value) for field, value in options.items() if KINDS[kind][field] is float}
    if kind == "stac" and "://" in entry["files"]:
        return Source(name, kind, licence, pathlib.Path(), (entry["files"],), options)
    pattern = pathlib.Path(entry["files"]).expanduser()
    root = pathlib.Path(pattern.anchor) if pattern.is_absolute() else path.resolve().parent
    files = tuple(sorted(root.glob(str(pattern.relative_to(pattern.anchor)))))
    if not files:
        raise ValueError(f"{where}: files = {entry['files']!r} finds nothing under {root}")
    told: Mapping[pathlib.Path, Mapping[str, Any]] = {}
    if pattern.suffix in tables.SUFFIXES and kind not in ("stac", LABELS):
        root, told = _table(entry, files, where)
        files = tuple(sorted(told))
    for of_kind, field, why in _NEEDED:
        if kind == of_kind and field not in entry and not (told and all(field in row for row in told.values())):
            raise ValueError(f"{where}: {field} is missing: {why}")
    return Source(name, kind, licence, root, files, options, told)


def _check_types(entry: Mapping[str, Any], where: str) -> None:
    """Raises ValueError if a field is missing, unknown, or of another type."""
    for field in ALWAYS:
        if not isinstance(entry.get(field), str) or not entry[field]:
            raise ValueError(f"{where}: {field} = {entry.get(field)!r}; wanted a text")
    if entry["kind"] not in KINDS:
        raise ValueError(f"{where}: kind = {entry['kind']!r}; wanted one of {sorted(KINDS)}")
    known = KINDS[entry["kind"]]
    for field, value in entry.items():
        if field not in (*ALWAYS, *known):
            raise ValueError(f"{where}: {field} is no field of {entry['kind']!r}; it has {sorted((*ALWAYS, *known))}")
        wanted = known.get(field, str)
        if not isinstance(value, (int, float) if wanted is float else wanted):
            raise ValueError(f"{where}: {field} = {value!r}; wanted a {wanted.__name__}")


def _check_values(entry: Mapping[str, Any], where: str) -> None:
    """Raises ValueError if a field's value is none of those that it may have."""
    kind, modality = entry["kind"], entry.get("modality")
    for field, words in {**_WORDS, **(dict(modality=("s2", "s1")) if kind == "stac" else {})}.items():
        if field in entry and entry[field] not in words:
            raise ValueError(f"{where}: {field} = {entry[field]!r}; wanted one of {words}")
    if "/" in entry["name"]:
        raise ValueError(f"{where}: wanted a name without /")
    for field in ("bands", "cloud_bands"):
        if any(not isinstance(band, int) or band < 1 for band in entry.get(field, [])):
            raise ValueError(f"{where}: {field} = {entry[field]!r}; wanted numbers from 1")
    if any(not isinstance(name, str) for name in entry.get("variables", [])):
        raise ValueError(f"{where}: variables = {entry['variables']!r}; wanted names")
    if kind == "image" and modality in _OWN_KINDS:
        raise ValueError(f"{where}: modality = {modality!r}; wanted kind = {_OWN_KINDS[modality]}")
    if kind == "cube" and ("variables" in entry) + ("array" in entry) == 2:
        raise ValueError(f"{where}: variables and array; wanted one of them")
    for field, row in _ONLY_OF.items():
        if kind == "cube" and field in entry and modality != row:
            raise ValueError(f"{where}: {field} with modality = {modality!r}; it is a field of {row!r}")
    try:
        names.check_day_pattern(entry.get("day_pattern", ""))
        if entry.get("bbox"):
            stac.edges_of(entry["bbox"])
        remote.signer(entry.get("sign", ""))
        if "dates" in entry:
            dates.interval(entry["dates"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _table(
    entry: Mapping[str, Any], files: Sequence[pathlib.Path], where: str
) -> tuple[pathlib.Path, dict[pathlib.Path, dict[str, Any]]]:
    """The folder that paths of a table begin in, and what it tells of each."""
    if len(files) > 1:
        raise ValueError(f"{where}: files = {entry['files']!r} finds {len(files)} tables; wanted one")
    kind = entry["kind"]
    columns = [name for name in tables.COLUMNS if kind in _PLACED and (name in KINDS[kind] or name not in _WORDS)]
    try:
        told = tables.read_table(files[0], columns)
    except (ValueError, OSError) as error:
        raise ValueError(f"{where}: {error}") from error
    for path, row in told.items():
        for field, words in _WORDS.items():
            if field in row and row[field] not in words:
                raise ValueError(f"{where}: {files[0]}: {field} {row[field]!r} of {path.name}; wanted one of {words}")
    return files[0].resolve().parent, told


def find(source: Source, rows: Sequence[Modality]) -> tuple[list[Acquisition], list[Rejected]]:
    """The acquisitions of a source, sorted by name, and its files and dates that are none.

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
            entries = read()
        except (rasterio.errors.RasterioError, OSError, ValueError, KeyError, TypeError) as error:
            rejected.append(Rejected("file", f"{source.name}/{name}", str(error)))  # Refused is a ValueError
            continue
        for entry in entries if isinstance(entries, list) else [entries]:
            if isinstance(entry, Acquisition):
                found.append(entry)
            else:
                rejected.append(dataclasses.replace(entry, name=f"{source.name}/{entry.name}"))
    return sorted(found, key=lambda acquisition: acquisition.id), rejected


_Found = Acquisition | list[Acquisition | Rejected]


def _readers(source: Source, rows: Sequence[Modality]) -> Iterator[tuple[str, Callable[[], _Found]]]:
    """For each file or group of files of a source its name and what reads it."""
    options = dict(source.options)
    if source.kind in ("image", "cube"):
        modality, table = options.pop("modality"), {row.name: row for row in rows}
        if modality not in table:
            raise ValueError(f"source {source.name!r}: modality = {modality!r}; wanted one of {sorted(table)}")
        options["row"] = table[modality]
    grouped: dict[str, Callable] = {"s1": names.radar_files, "cube": names.cube_files}
    for files in grouped.get(source.kind, list)(source.files):
        several = list(files.values()) if isinstance(files, dict) else list(files) if source.kind == "cube" else [files]
        first = min(several)
        name = (first.relative_to(source.root) if first.is_relative_to(source.root) else first).as_posix()
        yield name, functools.partial(_read, source, files, several, name, options)


def _read(source: Source, files: Any, several: Sequence[pathlib.Path], name: str, options: Mapping[str, Any]) -> _Found:
    """What a file, or files that belong together, hold; what a table tells of them counts before what the list says."""
    options = {**options, **tables.together([source.told.get(path, {}) for path in several])}
    if source.kind == "cube":
        row, ground = options.pop("row"), options.pop("ground", None)
        return cubes.read_cube(files, row, cubes.Layout(**options), name=name, source=source.name, ground=ground)
    read = {
        "image": geotiffs.read_image,
        "s2_geotiff": geotiffs.read_surface,
        "s2_safe": safe.read_product,
        "s1": geotiffs.read_radar,
    }[source.kind]
    return read(files, name=name, source=source.name, **options)
