"""Georeferenced rasters of users (GeoTIFF, COG, whatever GDAL opens): images of any row of the table, and Sentinel-1.

A file that does not say where it lies, or says what cannot be, is refused; so is one whose unit cannot be told.
Next: sources.py.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence

import numpy as np
import rasterio
import rasterio.warp
from rasterio.crs import CRS

from skysense_jax.data.checks import FIRST_DAY, LAST_DAY
from skysense_jax.data.sample import ORBITS, UNDATED
from skysense_jax.ingest.acquisitions import Acquisition, Layer
from skysense_jax.ingest.rasters import MAX_STRETCH, Refused, lon_lat, opened, pixel_size_m, zone_of
from skysense_jax.modalities import METRES_PER_CELL, MODALITIES, Modality

_LON_LAT = CRS.from_epsg(4326)
_LOOK_AT = 256  # pixels along a side of the overview that tells a unit
_MOST_LINEAR = 1e3  # linear backscatter of IW; digital numbers of amplitudes are in the hundreds on average
_UNSET = "unknown"
_POLARISATION = re.compile(r"(?<![A-Za-z])(VV|VH)(?![A-Za-z])", re.IGNORECASE)


def read_image(
    path: pathlib.Path, row: Modality, *, name: str, source: str, bands: Sequence[int] = (), day_pattern: str = ""
) -> Acquisition:
    """A raster whose ``bands`` (from 1; the first ones if none are given) are those of ``row``, in its order and unit.

    The day is that of the tag TIFFTAG_DATETIME or "datetime", or three groups (year, month, day) of ``day_pattern`` in
    the file's name.

    Raises:
      Refused: no or no possible place, too few bands, another type of numbers, pixels too coarse for the row.
    """
    bands = list(bands or range(1, row.num_bands + 1))
    if len(bands) != row.num_bands:
        raise Refused(f"bands = {bands} of source {source!r}; wanted {row.num_bands}, for {' '.join(row.bands)}")
    with opened(path) as file:
        bounds = _bounds(file)
        if max(bands) > file.count:
            raise Refused(f"{file.count} bands; wanted {max(bands)} or more, for {' '.join(row.bands)}")
        kinds, size = {file.dtypes[band - 1] for band in bands}, np.dtype(row.dtype).itemsize
        integers = all(np.dtype(kind).kind in "ui" and np.dtype(kind).itemsize == size for kind in kinds)
        if row.dtype.startswith("uint") and not integers:
            raise Refused(f"numbers of type {', '.join(sorted(kinds))}; wanted {row.dtype}: {row.unit}")
        _check_size(file, row)
        day = _day(path, file.tags(), day_pattern)
    layers = {key: Layer(str(path), band) for key, band in zip(row.bands, bands)}
    return Acquisition(name, source, row.name, bounds, layers, day=day)


def read_surface(
    path: pathlib.Path, *, name: str, source: str, offset: int, bands: Sequence[int] = (), day_pattern: str = ""
) -> Acquisition:
    """Sentinel-2 Level-2A bands in one raster, of whose numbers ``offset`` is to be subtracted: who exported it knows.

    Raises:
      Refused: as of ``read_image``.
    """
    row = MODALITIES["s2"]
    found = read_image(path, row, name=name, source=source, bands=bands, day_pattern=day_pattern)
    return dataclasses.replace(found, offset=offset)


def read_radar(
    paths: Mapping[str, pathlib.Path],
    *,
    name: str,
    source: str,
    unit: str = "",
    orbit: str = _UNSET,
    day_pattern: str = "",
) -> Acquisition:
    """Calibrated or terrain-corrected Sentinel-1 backscatter: a file with both bands, or one for each.

    Args:
      paths: by polarisation, VV and VH; the same file twice has VV as its first band and VH as its second, unless its
        band descriptions say otherwise.
      unit: "linear" or "dB"; told by the range of the numbers if empty.
      orbit: "ascending" or "descending" if that is known of the whole source; else by the file's tags or name.

    Raises:
      Refused: as of ``read_image``; a polarisation is missing; the unit cannot be told.
    """
    row = MODALITIES["s1"]
    missing = [name for name in row.bands if name not in paths]
    if missing:
        raise Refused(f"polarisations {' '.join(sorted(paths)) or 'unknown'}; missing: {' '.join(missing)}")
    layers, units = {}, set()
    for number, polarisation in enumerate(row.bands):
        path = paths[polarisation]
        with opened(path) as file:
            bounds = _bounds(file)
            _check_size(file, row)
            both = len(set(paths.values())) == 1
            band = _described(file, polarisation) or (number + 1 if both else 1)
            if band > file.count:
                raise Refused(f"{file.count} bands; wanted VV and VH")
            layers[polarisation] = Layer(str(path), band)
            units.add(unit or _unit(file, band))
            day, orbit = _day(path, file.tags(), day_pattern), _orbit(path, file.tags(), orbit)
    if len(units) != 1:
        raise Refused(f"VV and VH in different units: {', '.join(sorted(units))}")
    return Acquisition(name, source, "s1", bounds, layers, day=day, orbit=orbit, unit=units.pop())


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


def bounds_of(layer: Layer) -> tuple[float, float, float, float]:
    """West, south, east, north in degrees of a layer's file; raises Refused if its place cannot be."""
    with opened(layer.path) as file:
        return _bounds(file)


def _bounds(file: rasterio.DatasetReader) -> tuple[float, float, float, float]:
    """West, south, east, north in degrees; raises Refused if the file's place is unknown or not on this planet."""
    if file.crs is None:
        raise Refused("no coordinate system: where it lies and the size of its pixels are unknown")
    west, south, east, north = file.bounds
    if file.crs.is_geographic and not (-180.1 <= west < east <= 360.1 and -90.1 <= south < north <= 90.1):
        raise Refused(
            f"{file.crs} with longitudes {west:.6g} to {east:.6g} and latitudes {south:.6g} to {north:.6g}; wanted "
            "-180 to 180 and -90 to 90 (swapped, or metres?)"
        )
    if "UTM zone" in file.crs.to_wkt() and not (-5e5 <= west < east <= 1.5e6 and -1e6 <= south < north <= 1.1e7):
        raise Refused(
            f"{file.crs} with eastings {west:.6g} to {east:.6g} and northings {south:.6g} to {north:.6g}: no place of "
            "a UTM zone (another coordinate system?)"
        )
    bounds = rasterio.warp.transform_bounds(file.crs, _LON_LAT, *file.bounds)
    if not np.isfinite(bounds).all():
        raise Refused(f"{file.crs} with bounds {tuple(file.bounds)}: not on the map of that system")
    return bounds


def _check_size(file: rasterio.DatasetReader, row: Modality) -> None:
    """Raises Refused if a pixel is more than ``MAX_STRETCH`` as large as one of the row."""
    west, south, east, north = file.bounds
    zone = zone_of(*lon_lat((west + east) / 2, (south + north) / 2, file.crs))
    metres = pixel_size_m(file.transform, file.shape, file.crs, zone)
    wanted = MAX_STRETCH * METRES_PER_CELL / row.pixels_per_cell
    if metres > 1.02 * wanted:  # what is a matter of rounding is decided on the cells of a place
        raise Refused(f"pixels of {metres:.3g} m; wanted at most {wanted:.4g} m for {row.name}")


def _described(file: rasterio.DatasetReader, name: str) -> int | None:
    """The band whose description is ``name``."""
    found = [band for band, text in enumerate(file.descriptions, 1) if (text or "").upper() == name]
    return found[0] if len(found) == 1 else None


def unit_of(layer: Layer) -> str:
    """ "linear" or "dB", by the range of a radar's numbers; raises Refused if they are neither."""
    with opened(layer.path) as file:
        return _unit(file, layer.band)


def _unit(file: rasterio.DatasetReader, band: int) -> str:
    """ "linear" or "dB", by an overview of the band; raises Refused if its numbers are neither."""
    shape = (min(_LOOK_AT, file.height), min(_LOOK_AT, file.width))
    pixels = file.read(band, out_shape=shape).astype(np.float64)
    valid = np.isfinite(pixels) & (pixels != 0)
    if file.nodata is not None:
        valid &= pixels != file.nodata
    if not valid.any():
        raise Refused("no valid pixel")
    low, middle, high = np.percentile(pixels[valid], (1, 50, 99))
    if low > 0 and high < _MOST_LINEAR and middle < 10:
        return "linear"
    if low >= -60 and middle < 0 and high <= 30:
        return "dB"
    raise Refused(
        f"the unit cannot be told: half of the pixels lie below {middle:.4g}, all but two hundredths from {low:.4g} to "
        f"{high:.4g}; wanted calibrated linear power or dB (say which: unit = ...), no digital numbers"
    )


def _day(path: pathlib.Path, tags: Mapping[str, str], pattern: str) -> int:
    if pattern:
        match = re.search(pattern, path.name)
        if match is None or len(match.groups()) != 3:
            raise Refused(f"day_pattern = {pattern!r} finds no year, month and day in the name")
        text = "-".join(match.groups())
    else:
        text = (tags.get("TIFFTAG_DATETIME") or tags.get("datetime") or "")[:10].replace(":", "-")
        if not text:
            return UNDATED
    try:
        day = int(np.datetime64(text, "D").astype(int)) if re.fullmatch(r"\d{4}-\d\d-\d\d", text) else -1
    except ValueError:
        day = -1
    if not FIRST_DAY <= day <= LAST_DAY:
        raise Refused(f"date {text!r}; wanted year-month-day, from 1970 to 2100")
    return day


def _orbit(path: pathlib.Path, tags: Mapping[str, str], given: str) -> str:
    if given != _UNSET:
        return given
    lowered = f"{tags.get('orbit', '')} {tags.get('ORBIT_DIRECTION', '')} {path.name}".lower()
    found = {orbit for orbit in ORBITS[1:] if orbit in lowered}
    return found.pop() if len(found) == 1 else _UNSET
