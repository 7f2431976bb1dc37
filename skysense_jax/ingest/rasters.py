"""Georeferenced rasters on the cell grid: choosing the cells of a sample, resampling to a row of the table.

A cell is a 10 m square of UTM ground whose corners are multiples of 10 m, as Sentinel-2 pixels are. Whatever has no
UTM coordinates is brought into the UTM zone of its centre; what says nothing about where it lies is refused.
Read next: windows.py (what reads them), sentinel.py (units of the Sentinel sensors).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import rasterio.warp
from jaxtyping import Bool, Float, Shaped
from rasterio.crs import CRS
from rasterio.transform import Affine, from_origin

from skysense_jax.modalities import METRES_PER_CELL

MAX_STRETCH = 2.0  # of a native pixel; coarser imagery belongs into another row of the table

_ROUNDING = 1.01  # a pixel of 20 m in its own zone is one of 20.02 m at the rim of the next
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

    def degrees(self) -> tuple[float, float, float, float]:
        """(west, south, east, north) of a box around it, degrees."""
        return rasterio.warp.transform_bounds(self.crs, CRS.from_epsg(4326), *self.bounds)

    def centre(self) -> tuple[float, float]:
        """(longitude, latitude), degrees."""
        west, south, east, north = self.bounds
        return lon_lat((west + east) / 2, (south + north) / 2, self.crs)


def lon_lat(x: float, y: float, crs: CRS) -> tuple[float, float]:
    """(longitude, latitude) in degrees of a point in ``crs``."""
    (longitude,), (latitude,) = rasterio.warp.transform(crs, CRS.from_epsg(4326), [x], [y])
    return longitude, latitude


def nearest(rasters: Sequence[Raster], square: Square, *, pixels_per_cell: int) -> Shaped[np.ndarray, "H W"]:
    """Class ids (one band, 0 where there is none) of the source pixels under each target pixel's centre."""
    side = square.cells * pixels_per_cell
    out = np.zeros((side, side), rasters[0].pixels.dtype)
    for raster in rasters:
        part = np.zeros_like(out)
        rasterio.warp.reproject(
            np.where(raster.valid, raster.pixels[..., 0], 0).astype(out.dtype),
            part,
            src_transform=raster.transform,
            src_crs=raster.crs,
            src_nodata=0,
            dst_transform=square.transform(pixels_per_cell),
            dst_crs=square.crs,
            dst_nodata=0,
            resampling=rasterio.warp.Resampling.nearest,
        )
        out = np.where(out == 0, part, out)
    return out


def zone_of(longitude: float, latitude: float) -> CRS:
    """The UTM zone (WGS 84) of a point in degrees."""
    return CRS.from_epsg((32600 if latitude >= 0 else 32700) + int((longitude + 180) // 6) % 60 + 1)


def utm_zone(raster: Raster) -> CRS:
    """The raster's own coordinate system if that is UTM, else the UTM zone (WGS 84) of its centre."""
    if "UTM zone" in raster.crs.to_wkt():
        return raster.crs
    west, south, east, north = raster.bounds
    return zone_of(*lon_lat((west + east) / 2, (south + north) / 2, raster.crs))


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
    """``mosaic`` of one raster."""
    return mosaic([raster], square, pixels_per_cell=pixels_per_cell, dtype=dtype)


def mosaic(rasters: Sequence[Raster], square: Square, *, pixels_per_cell: int, dtype: Any = None) -> Resampled:
    """Rasters at ``pixels_per_cell`` over ``square``: area means where pixels grow, bilinear where they shrink.

    Invalid source pixels have no weight, nor have those that are beyond the whole numbers of ``dtype`` (that of the
    first if None). Where rasters overlap the first counts, and a pixel that it covers in part is filled up from the
    next: tiles that were cut from one image give that image.

    Raises:
      Refused: a native pixel would be stretched by more than ``MAX_STRETCH``.
    """
    dtype = np.dtype(dtype or rasters[0].pixels.dtype)
    rasters = _on_one_grid([_within(raster, dtype) for raster in rasters])
    if rasters[0].pixels.dtype == dtype and rasters[0].valid.all() and _covers(rasters[0], square):
        pixels = _warp(np.moveaxis(rasters[0].pixels, -1, 0), rasters[0], square, pixels_per_cell)
        return Resampled(pixels=np.moveaxis(pixels, 0, -1), valid=np.ones(pixels.shape[1:], bool))
    total = None
    for raster in rasters:
        layers = _on_cells(raster, square, pixels_per_cell)
        if total is None:
            total = layers
        else:
            total += layers * np.minimum(1, np.clip(1 - total[-1], 0, 1) / np.maximum(layers[-1], 1e-6))
        if total[-1].min() > _COVERED:
            break  # the others would add nothing
    covered = total[-1]
    pixels = np.moveaxis(total[:-1] / np.maximum(covered, 1e-6), 0, -1)
    if dtype.kind in "ui":
        pixels = np.clip(np.rint(pixels, out=pixels), np.iinfo(dtype).min, np.iinfo(dtype).max)
    return Resampled(pixels=pixels.astype(dtype), valid=covered > _COVERED)


def _within(raster: Raster, dtype: np.dtype) -> Raster:
    """The raster, invalid where its numbers are beyond those of ``dtype``, if whole: clipped they would look valid."""
    if dtype.kind not in "ui" or np.can_cast(raster.pixels.dtype, dtype):
        return raster
    low, high = np.iinfo(dtype).min - 0.5, np.iinfo(dtype).max + 0.5  # what rounds to a number of the type
    inside = ((raster.pixels >= low) & (raster.pixels <= high)).all(-1)
    return dataclasses.replace(raster, valid=raster.valid & inside)


def _on_one_grid(rasters: Sequence[Raster]) -> list[Raster]:
    """The rasters, those whose pixels lie on one grid put together again; where they overlap the first counts."""
    found: list[Raster] = []
    for raster in rasters:
        last = found[-1] if found else None  # not an earlier one: what lies between them counts before this
        offset = _offset(last.transform, raster.transform) if last is not None and last.crs == raster.crs else None
        if offset is not None and last.pixels.dtype == raster.pixels.dtype:
            found[-1] = _put_together(last, raster, *offset)
        else:
            found.append(raster)
    return found


def _offset(one: Affine, other: Affine) -> tuple[int, int] | None:
    """Row and column in the first grid of the second one's corner, None if they are not the same pixels."""
    column, row = ~one @ (other.c, other.f)
    scale = max(abs(other.a / one.a - 1), abs(other.e / one.e - 1))
    if scale > 1e-9 or max(abs(row - round(row)), abs(column - round(column))) > 1e-4:
        return None
    return round(row), round(column)


def _put_together(first: Raster, second: Raster, row: int, column: int) -> Raster:
    """Both, the second's corner being the first's pixel (row, column)."""
    shapes = np.array([first.valid.shape, second.valid.shape])
    corners = np.array([(0, 0), (row, column)])
    start = corners.min(0)
    height, width = (corners + shapes).max(0) - start
    pixels = np.zeros((height, width, first.pixels.shape[-1]), first.pixels.dtype)
    valid = np.zeros((height, width), bool)
    for raster, corner in zip((second, first), corners[::-1] - start):
        here = tuple(slice(low, low + size) for low, size in zip(corner, raster.valid.shape))
        pixels[here] = np.where(raster.valid[..., None], raster.pixels, pixels[here])
        valid[here] |= raster.valid
    transform = first.transform @ Affine.translation(start[1], start[0])
    return dataclasses.replace(first, pixels=pixels, valid=valid, transform=transform)


def _on_cells(raster: Raster, square: Square, pixels_per_cell: int) -> Float[np.ndarray, "_ H W"]:
    """For each target pixel the sum of its source pixels' numbers, each times its share, and of their shares."""
    pixels = np.moveaxis(raster.pixels, -1, 0)
    layers = np.concatenate((np.where(raster.valid, pixels, 0), raster.valid[None]), dtype=np.float32)
    return _warp(layers, raster, square, pixels_per_cell, margin=_MARGIN)


def _warp(
    layers: Shaped[np.ndarray, "_ h w"], raster: Raster, square: Square, pixels_per_cell: int, *, margin: int = 0
) -> Shaped[np.ndarray, "_ H W"]:
    """Layers on the raster's pixels, with ``margin`` zeros around them, brought to the square's; raises Refused."""
    size, side = METRES_PER_CELL / pixels_per_cell, square.cells * pixels_per_cell
    native = native_gsd_m(raster, square.crs)
    if native > MAX_STRETCH * size * _ROUNDING:
        raise Refused(
            f"pixels of {native:.3g} m; wanted at most {MAX_STRETCH * size:.4g} m for a row of {size:.4g} m: "
            "nothing is stretched by more than 2x (coarser imagery is another row of the table)"
        )
    out, target = np.zeros((len(layers), side, side), layers.dtype), square.transform(pixels_per_cell)
    place = _offset(raster.transform, target) if raster.crs == square.crs else None
    if place is not None:
        _paste(layers, out, *place)
        return out
    if margin:
        layers = np.pad(layers, ((0, 0), (margin, margin), (margin, margin)))
    a, e = raster.transform.a, raster.transform.e
    rasterio.warp.reproject(
        np.ascontiguousarray(layers),
        out,
        src_transform=Affine(a, 0, raster.transform.c - margin * a, 0, e, raster.transform.f - margin * e),
        src_crs=raster.crs,
        dst_transform=target,
        dst_crs=square.crs,
        resampling=rasterio.warp.Resampling.average if native <= size else rasterio.warp.Resampling.bilinear,
    )
    return out


def _covers(raster: Raster, square: Square) -> bool:
    """Whether the raster reaches two pixels and more beyond the square on all sides."""
    west, south, east, north = square.bounds
    along = np.linspace(0, 1, 21)
    xs = np.concatenate([west + along * (east - west)] * 2 + [np.full(21, west), np.full(21, east)])
    ys = np.concatenate([np.full(21, south), np.full(21, north)] + [south + along * (north - south)] * 2)
    columns, rows = ~raster.transform @ np.array(
        rasterio.warp.transform(square.crs, raster.crs, xs.tolist(), ys.tolist())
    )
    height, width = raster.valid.shape
    return bool(min(columns.min(), rows.min()) >= 2 and columns.max() <= width - 2 and rows.max() <= height - 2)


def _paste(layers: np.ndarray, out: np.ndarray, row: int, column: int) -> None:
    """Copies what of ``layers`` lies over ``out``, whose corner is their pixel (row, column)."""
    here, there = [], []
    for start, size, side in zip((row, column), layers.shape[1:], out.shape[1:]):
        low, high = max(start, 0), max(min(start + side, size), max(start, 0))
        there.append(slice(low, high))
        here.append(slice(low - start, high - start))
    out[:, here[0], here[1]] = layers[:, there[0], there[1]]


def native_gsd_m(raster: Raster, crs: CRS) -> float:
    """Side of a raster's pixel (the longer one) at its centre in metres of ``crs``, a UTM zone."""
    return pixel_size_m(raster.transform, raster.valid.shape, raster.crs, crs)


def pixel_size_m(transform: Affine, shape: tuple[int, int], crs: CRS, zone: CRS) -> float:
    """The same of an image of ``shape`` rows and columns in ``crs``."""
    row, column = shape[0] / 2, shape[1] / 2
    places = [transform @ place for place in ((column, row), (column + 1, row), (column, row + 1))]
    xs, ys = rasterio.warp.transform(crs, zone, *map(list, zip(*places)))
    return max(math.hypot(xs[i] - xs[0], ys[i] - ys[0]) for i in (1, 2))


def double(grid: Shaped[np.ndarray, "T H W *C"]) -> Shaped[np.ndarray, "T 2*H 2*W *C"]:
    """A 20 m grid at 10 m: each pixel as its own four quarters, so that nothing moves and no fill value mixes in."""
    return grid.repeat(2, axis=1).repeat(2, axis=2)


def all_positive(pixels: Shaped[np.ndarray, "*N C"]) -> Bool[np.ndarray, "*N"]:
    """Where every band is a number above 0, the usual fill value of unsigned products."""
    return (np.isfinite(pixels) & (pixels > 0)).all(-1)
