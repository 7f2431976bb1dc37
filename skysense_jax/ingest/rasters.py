"""Georeferenced rasters on the cell grid: reading, choosing the cells of a sample, resampling to a row of the table.

A cell is a 10 m square of UTM ground whose corners are multiples of 10 m, as Sentinel-2 pixels are. Whatever has no
UTM coordinates is brought into the UTM zone of its centre; what says nothing about where it lies is refused.
Read next: samples.py (who calls this), sentinel.py (units of the Sentinel sensors).
"""

import dataclasses
import math
import pathlib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import rasterio
import rasterio.warp
from jaxtyping import Bool, Shaped
from rasterio.crs import CRS
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import Affine, from_origin

from skysense_jax.modalities import METRES_PER_CELL

MAX_STRETCH = 2.0  # of a native pixel; coarser imagery belongs into another row of the table

_MARGIN = 4  # empty source pixels around the image, so that a target pixel at its rim is known to be partly covered
_COVERED = 0.999  # share of a target pixel that valid source pixels must cover


class Refused(ValueError):
    """A file that does not become a sample, with the reason."""


@dataclasses.dataclass(frozen=True)
class Raster:
    """An image and where it lies.

    Attributes:
      pixels: [H W C].
      valid: [H W] bool.
      transform, crs: pixel (column, row) to ground, as rasterio has it.
    """

    pixels: np.ndarray
    valid: np.ndarray
    transform: Affine
    crs: CRS

    def __post_init__(self):
        if self.transform.b or self.transform.d or self.transform.a <= 0 or self.transform.e >= 0:
            raise Refused(f"the image is turned or mirrored ({tuple(self.transform)[:6]}); wanted rows from the north")

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """(west, south, east, north) in ``crs``."""
        west, north = self.transform.c, self.transform.f
        height, width = self.valid.shape
        return west, north + height * self.transform.e, west + width * self.transform.a, north


@dataclasses.dataclass(frozen=True)
class Square:
    """The ground of a sample: ``cells`` x ``cells`` cells, its north-west corner, and its UTM zone."""

    west: float
    north: float
    cells: int
    crs: CRS

    def transform(self, pixels_per_cell: int) -> Affine:
        size = METRES_PER_CELL / pixels_per_cell
        return from_origin(self.west, self.north, size, size)

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """(west, south, east, north), metres."""
        side = self.cells * METRES_PER_CELL
        return self.west, self.north - side, self.west + side, self.north

    def centre(self) -> tuple[float, float]:
        """(longitude, latitude), degrees."""
        west, south, east, north = self.bounds
        return lon_lat((west + east) / 2, (south + north) / 2, self.crs)


def lon_lat(x: float, y: float, crs: CRS) -> tuple[float, float]:
    """(longitude, latitude) in degrees of a point in ``crs``."""
    (longitude,), (latitude,) = rasterio.warp.transform(crs, CRS.from_epsg(4326), [x], [y])
    return longitude, latitude


def read_raster(path: pathlib.Path, *, bands: Sequence[int] | None = None) -> Raster:
    """The bands (numbered from 1, in this order; all if None) of a file that says where it lies.

    Only a nodata value makes pixels invalid (where every band has it), never an alpha channel: GDAL takes the
    fourth band of aerial imagery for one.

    Raises:
      Refused: no coordinate system, or fewer bands.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # refused below, in our words
        source = rasterio.open(path)
    with source:
        if source.crs is None:
            raise Refused("no coordinate system: where it lies and the size of its pixels are unknown")
        bands = list(bands or range(1, source.count + 1))
        if max(bands) > source.count:
            raise Refused(f"{source.count} bands; wanted {max(bands)} or more")
        pixels = np.moveaxis(source.read(bands), 0, -1)
        valid = np.isfinite(pixels).all(-1)
        if source.nodata is not None:
            valid &= (pixels != source.nodata).any(-1)
        return Raster(pixels=pixels, valid=valid, transform=source.transform, crs=source.crs)


def utm_zone(raster: Raster) -> CRS:
    """The raster's own coordinate system if that is UTM, else the UTM zone (WGS 84) of its centre."""
    if "UTM zone" in raster.crs.to_wkt():
        return raster.crs
    west, south, east, north = raster.bounds
    longitude, latitude = lon_lat((west + east) / 2, (south + north) / 2, raster.crs)
    return CRS.from_epsg((32600 if latitude >= 0 else 32700) + int((longitude + 180) // 6) % 60 + 1)


def whole_cells(raster: Raster) -> Square:
    """The largest square of whole cells of the UTM grid inside the raster, near its centre.

    Raises:
      Refused: not one whole cell.
    """
    crs = utm_zone(raster)
    west, south, east, north = rasterio.warp.transform_bounds(raster.crs, crs, *raster.bounds)
    columns = math.floor(east / METRES_PER_CELL) - math.ceil(west / METRES_PER_CELL)
    rows = math.floor(north / METRES_PER_CELL) - math.ceil(south / METRES_PER_CELL)
    cells = min(columns, rows)
    if cells < 1:
        raise Refused(f"{east - west:.1f} m x {north - south:.1f} m hold no whole 10 m cell of the UTM grid")
    return Square(
        west=(math.ceil(west / METRES_PER_CELL) + (columns - cells) // 2) * METRES_PER_CELL,
        north=(math.floor(north / METRES_PER_CELL) - (rows - cells) // 2) * METRES_PER_CELL,
        cells=cells,
        crs=crs,
    )


def nearest_cells(raster: Raster, *, cells: int) -> Square:
    """The square of that many cells of the UTM grid whose centre is nearest to the raster's centre."""
    crs = utm_zone(raster)
    west, south, east, north = rasterio.warp.transform_bounds(raster.crs, crs, *raster.bounds)
    half = cells * METRES_PER_CELL / 2
    return Square(
        west=round(((west + east) / 2 - half) / METRES_PER_CELL) * METRES_PER_CELL,
        north=round(((south + north) / 2 + half) / METRES_PER_CELL) * METRES_PER_CELL,
        cells=cells,
        crs=crs,
    )


def own_cells(height: int, width: int, *, pixel_size_m: float) -> int:
    """How many whole cells along a side fit into an image that knows its pixel size but not its place."""
    return int(min(height, width) * pixel_size_m / METRES_PER_CELL + 1e-6)


@dataclasses.dataclass(frozen=True)
class Resampled:
    """[H W C] pixels on the cell grid in the source's type, and [H W] bool where valid source pixels cover them."""

    pixels: np.ndarray
    valid: np.ndarray


def resample(raster: Raster, square: Square, *, pixels_per_cell: int, dtype: Any = None) -> Resampled:
    """The raster at ``pixels_per_cell`` over ``square``: area means where pixels grow, bilinear where they shrink.

    Invalid source pixels have no weight. ``dtype`` as the source's if None.

    Raises:
      Refused: a native pixel would be stretched by more than ``MAX_STRETCH``.
    """
    size = METRES_PER_CELL / pixels_per_cell
    native = native_gsd_m(raster, square.crs)
    if native > MAX_STRETCH * size * (1 + 1e-6):
        raise Refused(
            f"pixels of {native:.3g} m; wanted at most {MAX_STRETCH * size:.4g} m for a row of {size:.4g} m: "
            "nothing is stretched by more than 2x (coarser imagery is another row of the table)"
        )
    weight = raster.valid[..., None].astype(np.float32)
    layers = np.concatenate((np.where(raster.valid[..., None], raster.pixels, 0), weight), -1).astype(np.float32)
    layers = np.pad(layers, ((_MARGIN, _MARGIN), (_MARGIN, _MARGIN), (0, 0)))
    out = np.zeros((layers.shape[-1], square.cells * pixels_per_cell, square.cells * pixels_per_cell), np.float32)
    a, e = raster.transform.a, raster.transform.e
    method = rasterio.warp.Resampling.average if native <= size else rasterio.warp.Resampling.bilinear
    rasterio.warp.reproject(
        np.ascontiguousarray(np.moveaxis(layers, -1, 0)),
        out,
        src_transform=Affine(a, 0, raster.transform.c - _MARGIN * a, 0, e, raster.transform.f - _MARGIN * e),
        src_crs=raster.crs,
        dst_transform=square.transform(pixels_per_cell),
        dst_crs=square.crs,
        resampling=method,
    )
    covered = out[-1]
    pixels = np.moveaxis(out[:-1] / np.maximum(covered, 1e-6), 0, -1)
    dtype = np.dtype(dtype or raster.pixels.dtype)
    if dtype.kind in "ui":
        pixels = np.clip(np.rint(pixels), np.iinfo(dtype).min, np.iinfo(dtype).max)
    return Resampled(pixels=pixels.astype(dtype), valid=covered > _COVERED)


def native_gsd_m(raster: Raster, crs: CRS) -> float:
    """Side of a raster's pixel (the longer one) in metres of ``crs``, a UTM zone."""
    west, south, east, north = rasterio.warp.transform_bounds(raster.crs, crs, *raster.bounds)
    height, width = raster.valid.shape
    return max((east - west) / width, (north - south) / height)


def double(grid: Shaped[np.ndarray, "T H W *C"]) -> Shaped[np.ndarray, "T 2*H 2*W *C"]:
    """A 20 m grid at 10 m: each pixel as its own four quarters, so that nothing moves and no fill value mixes in."""
    return grid.repeat(2, axis=1).repeat(2, axis=2)


def all_positive(pixels: Shaped[np.ndarray, "*N C"]) -> Bool[np.ndarray, "*N"]:
    """Where every band is a number above 0, the usual fill value of unsigned products."""
    return (np.isfinite(pixels) & (pixels > 0)).all(-1)
