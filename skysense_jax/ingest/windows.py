"""The pixels of files over a piece of ground: only these are read.

Rasters come through GDAL, planes of NetCDF and HDF5 arrays through netCDF4. Next: series.py (what a date is made of).
"""

import contextlib
import pathlib
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import rasterio
from rasterio.enums import MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioIOError
from rasterio.transform import Affine
from rasterio.windows import Window

from skysense_jax.ingest import planes, remote
from skysense_jax.ingest.acquisitions import Layer
from skysense_jax.ingest.grids import NOWHERE, Grid, crs_of
from skysense_jax.ingest.rasters import Raster, Refused, Square


def read_window(layers: Sequence[Layer], square: Square, *, masked: bool = True) -> Raster | None:
    """What layers of one grid of one file have of the ground of ``square`` and a few pixels around it; None if nothing.

    ``masked``: pixels that the file's mask hides, or with its nodata value (in every band; in any of an array's), are
    invalid.
    """
    first = layers[0]
    if first.variable:
        return planes.read_window(layers, square, masked=masked)
    with opened(first.path) as source:
        given = bool(first.crs)
        grid = Grid(crs_of(first.crs), Affine(*first.transform), source.shape) if given else Grid.of(source)
        grid = grid.turned_to(square)
        window = grid.window(square)
        bands = [layer.band for layer in layers]
        return window and _read(source, bands, window, grid, masked=masked)


def read_raster(path: pathlib.Path, *, bands: Sequence[int] | None = None) -> Raster:
    """The bands (numbered from 1, in this order; all if None) of a file that says where it lies.

    Only a nodata value makes pixels invalid (where every band has it), never an alpha channel: GDAL takes the
    fourth band of aerial imagery for one.

    Raises:
      Refused: no coordinate system, or fewer bands.
    """
    with opened(path) as source:
        if source.crs is None:
            raise Refused(NOWHERE)
        bands = list(bands or range(1, source.count + 1))
        if max(bands) > source.count:
            raise Refused(f"{source.count} bands; wanted {max(bands)} or more")
        return _read(source, bands, Window(0, 0, source.width, source.height), Grid.of(source), masked=True)


@contextlib.contextmanager
def opened(path: str | pathlib.Path) -> Iterator[rasterio.DatasetReader]:
    """A context with the open file; one without a place gives no warning, as callers refuse it in their own words."""
    with remote.environment(path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            file = rasterio.open(path)
        with remote.told(path), file:
            yield file


def _read(source: rasterio.DatasetReader, bands: Sequence[int], window: Window, grid: Grid, *, masked: bool) -> Raster:
    """A window of a file; ``masked``: what its nodata value or its own mask hides is invalid.

    JPEG imagery has such a mask for its collar. An alpha channel is none.
    """
    try:
        pixels = np.moveaxis(source.read(list(bands), window=window), 0, -1)
    except RasterioIOError as error:  # it says "see previous exception", and not of which file
        raise RasterioIOError(f"{source.name}: {error.__cause__ or error}") from error
    whole_numbers = pixels.dtype.kind in "ui"
    valid = np.ones(pixels.shape[:2], bool) if whole_numbers else np.isfinite(pixels).all(-1)
    if masked and source.nodata is not None:
        valid &= (pixels != source.nodata).any(-1)
    flags = source.mask_flag_enums[bands[0] - 1]
    if masked and MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags:
        valid &= source.read_masks(bands[0], window=window) > 0
    corner = Affine.translation(window.col_off, window.row_off)
    return Raster(pixels=pixels, valid=valid, transform=grid.transform @ corner, crs=grid.crs)
