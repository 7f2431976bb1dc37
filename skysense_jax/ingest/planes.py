"""Planes of arrays in NetCDF and HDF5 files: the rows and columns of a variable at one index of its other axes.

netCDF4 reads both formats, classic NetCDF too. Numbers are those that are stored; attributes are read as text and
numbers, and none is ever unpickled. Next: cubes.py (which variables are which band), windows.py.
"""

import functools
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import netCDF4
import numpy as np
from rasterio.transform import Affine
from rasterio.windows import Window

from skysense_jax.ingest.acquisitions import Layer
from skysense_jax.ingest.grids import Grid, crs_of
from skysense_jax.ingest.rasters import Raster, Refused, Square

_FILLS, _UNSIGNED = ("_FillValue", "missing_value"), "_Unsigned"
_LOOK_AT = 512  # pixels along a side of what tells a unit
_LOCK = threading.Lock()  # the library is not to be called by two threads at once


def read_window(layers: Sequence[Layer], square: Square, *, masked: bool) -> Raster | None:
    """``windows.read_window`` of planes: valid where every band is a number and not, if ``masked``, its fill value.

    Raises:
      Refused: a variable is missing, or its fill value is none.
      OSError: there is no file, or none of these formats, or a block of it is damaged.
    """
    first = layers[0]
    shape = _shape(first)
    grid = Grid(crs_of(first.crs), Affine(*first.transform), shape).turned_to(square)
    window = grid.window(square)
    if window is None:
        return None
    read = [_read(layer, window, masked=masked) for layer in layers]
    pixels = np.stack([numbers for numbers, _ in read], axis=-1)
    valid = np.logical_and.reduce([there for _, there in read])
    transform = grid.transform @ Affine.translation(window.col_off, window.row_off)
    if transform.e > 0:  # rows from the south, as many models have them
        pixels, valid = pixels[::-1], valid[::-1]
        transform = transform @ Affine.translation(0, window.height) @ Affine.scale(1, -1)
    return Raster(pixels=pixels, valid=valid, transform=transform, crs=grid.crs)


def middle(layer: Layer) -> np.ndarray:
    """The valid numbers in the middle of a plane, one after the other, to tell a unit by."""
    height, width = _shape(layer)
    rows, columns = min(height, _LOOK_AT), min(width, _LOOK_AT)
    numbers, valid = _read(layer, Window((width - columns) // 2, (height - rows) // 2, columns, rows), masked=True)
    return numbers[valid]


def type_of(stored: np.dtype, attributes: Mapping[str, Any]) -> np.dtype:
    """That of a variable's numbers: without a sign where _Unsigned says so, since NetCDF-3 stores no such type."""
    unsigned = stored.kind == "i" and str(attributes.get(_UNSIGNED)).lower() == "true"
    return np.dtype(stored.str.replace("i", "u")) if unsigned else stored


def fills_of(name: str, stored: np.dtype, attributes: Mapping[str, Any]) -> list[np.generic]:
    """The numbers that the variable ``name`` has where pixels are missing, in its own type, whatever theirs is.

    Raises:
      Refused: an attribute says what is no number of this type.
    """
    meant, found = type_of(stored, attributes).newbyteorder("="), []
    for attribute in _FILLS:
        for fill in np.ravel(attributes.get(attribute, ())):
            number = _cast(fill, stored)
            number = _cast(fill, meant) if number is None else number.view(meant)
            if number is None:
                raise Refused(
                    f"{name}: {attribute} = {fill}; wanted a number of type {meant}: which pixels are missing?"
                )
            found.append(number)
    return found


def _cast(fill: np.generic, kind: np.dtype) -> np.generic | None:
    """A number, or a text that is one, as type ``kind``; None if that has no such number."""
    try:
        number = np.float64(fill) if isinstance(fill, np.character) else fill
    except ValueError:
        return None
    with np.errstate(all="ignore"):
        found = number.astype(kind)
    same = np.isfinite(found) == np.isfinite(number) if kind.kind == "f" else found == number
    return found if same else None


def _shape(layer: Layer) -> tuple[int, int]:
    with _LOCK:
        return _variable(layer).shape[-2:]


def _read(layer: Layer, window: Window, *, masked: bool) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of a plane's window in the row's unit, and where they are numbers and not, if ``masked``, fills."""
    rows = slice(window.row_off, window.row_off + window.height)
    columns = slice(window.col_off, window.col_off + window.width)
    with _LOCK:
        variable = _variable(layer)
        told = {name: variable.getncattr(name) for name in (*_FILLS, _UNSIGNED) if name in variable.ncattrs()}
        try:
            numbers = np.asarray(variable[(*layer.index, rows, columns)])
        except (RuntimeError, IndexError) as error:  # a damaged block; a file that was changed since
            raise OSError(f"{layer.path}: {layer.variable}{list(layer.index)}: {error}") from error
    fills = fills_of(layer.variable, numbers.dtype, told) if masked else []
    numbers = numbers.view(type_of(numbers.dtype, told))
    valid = np.isfinite(numbers) & ~np.isin(numbers, fills)
    if (layer.scale, layer.add) != (1, 0):
        numbers = numbers * layer.scale + layer.add
    return numbers, valid


def _variable(layer: Layer) -> netCDF4.Variable:
    facts = os.stat(layer.path)
    try:
        return _opened(layer.path, facts.st_mtime_ns, facts.st_size)[layer.variable]
    except IndexError as error:
        raise Refused(f"{layer.path}: no variable {layer.variable}") from error


@functools.lru_cache(maxsize=8)
def _opened(path: str, changed_ns: int, size: int) -> netCDF4.Dataset:
    """The open file; kept open, since the dates of a cube are read from it one after the other."""
    file = netCDF4.Dataset(path)
    file.set_auto_maskandscale(False)
    return file
