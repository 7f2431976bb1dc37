"""What names and tags of files tell: which belong together, on which day they were acquired, from which orbit.

Next: geotiffs.py, cubes.py.
"""

import pathlib
import re
from collections.abc import Mapping, Sequence

import numpy as np

from skysense_jax.data.checks import FIRST_DAY, LAST_DAY
from skysense_jax.data.sample import ORBITS, UNDATED
from skysense_jax.ingest.rasters import Refused

UNSET = "unknown"  # of an orbit
_POLARISATION = re.compile(r"(?<![A-Za-z])(VV|VH)(?![A-Za-z])", re.IGNORECASE)
_SIZE = re.compile(r"(?<![A-Za-z0-9])(10|20|60)m(?![A-Za-z0-9])")  # of Sentinel-2's pixels


def radar_files(paths: Sequence[pathlib.Path]) -> list[dict[str, pathlib.Path]]:
    """Files by polarisation: those whose names differ in VV and VH alone belong together; others hold both."""
    groups: dict[str, dict[str, pathlib.Path]] = {}
    for path in sorted(paths):
        found = _POLARISATION.findall(path.stem)
        if len(found) == 1:
            key = str(path.with_name(_POLARISATION.sub("*", path.name)))
            groups.setdefault(key, {})[found[0].upper()] = path
        else:
            groups[str(path)] = {"VV": path, "VH": path}
    return list(groups.values())


def cube_files(paths: Sequence[pathlib.Path]) -> list[tuple[pathlib.Path, ...]]:
    """Files that belong together: those of one folder whose names differ in 10m, 20m and 60m alone."""
    groups: dict[pathlib.Path, list[pathlib.Path]] = {}
    for path in sorted(paths):
        groups.setdefault(path.with_name(_SIZE.sub("*", path.name)), []).append(path)
    return [tuple(group) for group in groups.values()]


def parse_day(text: str) -> int:
    """Days since 1970-01-01 of year-month-day; raises Refused if it is none, or not from 1970 to 2100."""
    try:
        day = int(np.datetime64(text, "D").astype(int)) if re.fullmatch(r"\d{4}-\d\d-\d\d", text) else -1
    except ValueError:
        day = -1
    if not FIRST_DAY <= day <= LAST_DAY:
        raise Refused(f"date {text!r}; wanted year-month-day, from 1970 to 2100")
    return day


def check_day_pattern(pattern: str) -> None:
    """Nothing; raises ValueError if a regular expression that is not empty has no three groups: year, month, day."""
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"day_pattern = {pattern!r}: {error}") from error
    if pattern and groups != 3:
        raise ValueError(f"day_pattern = {pattern!r} has {groups} groups ( ); wanted three: year, month, day")


def day_of(path: pathlib.Path, tags: Mapping[str, str], *, pattern: str, given: str) -> int:
    """The day that was ``given``, else that of ``pattern`` in the name, else that of the tags, else ``UNDATED``."""
    if given:
        return parse_day(given)
    if pattern:
        match = re.search(pattern, path.name)
        if match is None or len(match.groups()) != 3:
            raise Refused(f"day_pattern = {pattern!r} finds no year, month and day in the name")
        return parse_day("-".join(match.groups()))
    text = (tags.get("TIFFTAG_DATETIME") or tags.get("datetime") or "")[:10].replace(":", "-")
    return parse_day(text) if text else UNDATED


def orbit_of(path: pathlib.Path, tags: Mapping[str, str], *, given: str) -> str:
    """The orbit that was ``given``, else that of the tags or the name, else ``UNSET``."""
    if given != UNSET:
        return given
    lowered = f"{tags.get('orbit', '')} {tags.get('ORBIT_DIRECTION', '')} {path.name}".lower()
    found = {orbit for orbit in ORBITS[1:] if orbit in lowered}
    return found.pop() if len(found) == 1 else UNSET
