"""Georeferenced rasters of users (GeoTIFF, COG, whatever GDAL opens): images of any row of the table, and Sentinel-1.

A file that does not say where it lies, or says what cannot be, is refused; so is one whose unit cannot be told.
Next: sources.py.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import rasterio

from skysense_jax.ingest import sentinel
from skysense_jax.ingest.acquisitions import Acquisition, Layer
from skysense_jax.ingest.grids import Grid, Ground
from skysense_jax.ingest.names import UNSET, day_of, orbit_of
from skysense_jax.ingest.rasters import Refused
from skysense_jax.ingest.windows import opened
from skysense_jax.modalities import MODALITIES, Modality

_LOOK_AT = 256  # pixels along a side of the overview that tells a unit


def read_image(
    path: pathlib.Path,
    row: Modality,
    *,
    name: str,
    source: str,
    bands: Sequence[int] = (),
    day_pattern: str = "",
    day: str = "",
    ground: Ground | None = None,
) -> Acquisition:
    """A raster whose ``bands`` (from 1; the first ones if none are given) are those of ``row``, in its order and unit.

    The day is ``day``, else three groups (year, month, day) of ``day_pattern`` in the file's name, else that of the tag
    TIFFTAG_DATETIME or "datetime". ``ground`` says where it lies instead of the file.

    Raises:
      Refused: no or no possible place, too few bands, another type of numbers, pixels too coarse for the row.
    """
    bands = list(bands or range(1, row.num_bands + 1))
    if len(bands) != row.num_bands:
        raise Refused(f"bands = {bands} of source {source!r}; wanted {row.num_bands}, for {' '.join(row.bands)}")
    with opened(path) as file:
        grid = Grid.of(file, ground)
        bounds = grid.degrees()
        if max(bands) > file.count:
            raise Refused(f"{file.count} bands; wanted {max(bands)} or more, for {' '.join(row.bands)}")
        check_type({file.dtypes[band - 1] for band in bands}, row)
        grid.check_size(row)
        acquired = day_of(path, file.tags(), pattern=day_pattern, given=day)
    layers = {key: _layer(path, band, grid, ground) for key, band in zip(row.bands, bands)}
    return Acquisition(name, source, row.name, bounds, layers, day=acquired)


def check_type(kinds: set[str], row: Modality) -> None:
    """Nothing; raises Refused if the row has numbers without a sign and types of ``kinds`` are none of its size.

    Reflectance is often stored with a sign, and what is below 0 is then invalid (rasters.py); of bytes with a sign the
    brighter half of the imagery would be.
    """
    size = np.dtype(row.dtype).itemsize
    wanted = {f"u{size}", f"i{size}"} if size > 1 else {"u1"}
    if row.dtype.startswith("uint") and not {np.dtype(kind).str[1:] for kind in kinds} <= wanted:
        raise Refused(f"numbers of type {', '.join(sorted(kinds))}; wanted {row.dtype}: {row.unit}")


def read_surface(path: pathlib.Path, *, offset: int, **how: Any) -> Acquisition:
    """Sentinel-2 Level-2A bands in one raster, of whose numbers ``offset`` is to be subtracted: who exported it knows.

    ``how``: as of ``read_image``; raises Refused as it does.
    """
    return dataclasses.replace(read_image(path, MODALITIES["s2"], **how), offset=offset)


def read_radar(
    paths: Mapping[str, pathlib.Path],
    *,
    name: str,
    source: str,
    unit: str = "",
    orbit: str = UNSET,
    day_pattern: str = "",
    day: str = "",
    ground: Ground | None = None,
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
            grid = Grid.of(file, ground)
            bounds = grid.degrees()
            grid.check_size(row)
            both = len(set(paths.values())) == 1
            band = _described(file, polarisation) or (number + 1 if both else 1)
            if band > file.count:
                raise Refused(f"{file.count} bands; wanted VV and VH")
            layers[polarisation] = _layer(path, band, grid, ground)
            units.add(unit or _unit(file, band))
            acquired = day_of(path, file.tags(), pattern=day_pattern, given=day)
            orbit = orbit_of(path, file.tags(), given=orbit)
    if len(units) != 1:
        raise Refused(f"VV and VH in different units: {', '.join(sorted(units))}")
    return Acquisition(name, source, "s1", bounds, layers, day=acquired, orbit=orbit, unit=units.pop())


def bounds_of(layer: Layer) -> tuple[float, float, float, float]:
    """West, south, east, north in degrees of a layer's file; raises Refused if its place cannot be."""
    with opened(layer.path) as file:
        return Grid.of(file).degrees()


def unit_of(layer: Layer) -> str:
    """ "linear" or "dB", by the range of a radar's numbers; raises Refused if they are neither."""
    with opened(layer.path) as file:
        return _unit(file, layer.band)


def _layer(path: pathlib.Path, band: int, grid: Grid, ground: Ground | None) -> Layer:
    if ground is None:
        return Layer(str(path), band)
    return Layer(str(path), band, crs=ground.crs, transform=tuple(grid.transform)[:6])


def _described(file: rasterio.DatasetReader, name: str) -> int | None:
    """The band whose description is ``name``."""
    found = [band for band, text in enumerate(file.descriptions, 1) if (text or "").upper() == name]
    return found[0] if len(found) == 1 else None


def _unit(file: rasterio.DatasetReader, band: int) -> str:
    """``sentinel.unit_of`` an overview of the band."""
    shape = (min(_LOOK_AT, file.height), min(_LOOK_AT, file.width))
    pixels = file.read(band, out_shape=shape).astype(np.float64)
    valid = np.isfinite(pixels)
    if file.nodata is not None:
        valid &= pixels != file.nodata
    return sentinel.unit_of(pixels[valid])
