"""GeoTIFFs on a grid of 10 m cells: where the grid lies, what the bands are, and pixels brought onto it in pieces.

Resampled as in ingest/rasters.py: area means where pixels grow, bilinear where they shrink, valid where valid source
pixels cover a pixel fully, nothing stretched by more than 2x. Memory follows the window that is read, not the file.
numpy, rasterio, and the sensors' table of modeling_skysensev2.py. Next: mosaic.py (tiles to a raster), embed.py.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import rasterio
import rasterio.warp
from rasterio.crs import CRS
from rasterio.enums import MaskFlags
from rasterio.errors import CRSError, NotGeoreferencedWarning, RasterioIOError
from rasterio.transform import Affine, from_origin
from rasterio.warp import Resampling
from rasterio.windows import Window, intersection, transform

from skysense_jax.export.modeling_skysensev2 import Modality, plain_band

MAX_STRETCH = 2.0  # of a native pixel; coarser imagery belongs into another row of the table
MAX_SCALE_ERROR = 0.02  # of a map projection's metre at the scene; Web Mercator's at 60 degrees is half a metre

_MARGIN = 4  # source pixels around a window, empty outside the file, so that a partly covered pixel is known as such
_COVERED = 0.999  # share of a pixel that valid source pixels must cover
_UNIT_CHECK_SIDE = 512  # pixels of the decimated read
_VALUES_AT_ONCE = 2**24  # of a warp's source: 64 MiB


@dataclasses.dataclass(frozen=True)
class Grid:
    """Cells of ``cell_m`` metres in rows from the north: north-west corner in ``crs``, a projection in metres."""

    west: float
    north: float
    rows: int
    columns: int
    cell_m: float
    crs: CRS

    def transform(self, pixels_per_cell: int = 1) -> Affine:
        """Pixel (column, row) to ground, of the grid's pixels at ``pixels_per_cell``."""
        size = self.cell_m / pixels_per_cell
        return from_origin(self.west, self.north, size, size)

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """(west, south, east, north), metres."""
        south, east = self.north - self.rows * self.cell_m, self.west + self.columns * self.cell_m
        return self.west, south, east, self.north


@dataclasses.dataclass(frozen=True)
class Pixels:
    """Pixels of a modality on the grid.

    Attributes:
      values: [C H W] float32, 0 where not valid.
      valid: [H W] bool, valid source pixels cover the pixel.
      out_of_range: [H W] bool, a source pixel here holds what the sensor cannot measure; not valid.
    """

    values: np.ndarray
    valid: np.ndarray
    out_of_range: np.ndarray


class Raster:
    """A file of a modality, open, with its wanted bands picked; ``notes`` is what its user should be told.

    Only a nodata value (where every wanted band has it), a mask inside or beside the file, and what is no finite number
    make pixels invalid, never an alpha channel: GDAL takes the fourth band of aerial imagery for one.

    Raises:
      ValueError: it cannot be read, does not say where it lies, or its bands are not those that are wanted.
    """

    def __init__(
        self,
        path: str,
        modality: Modality,
        *,
        band_order: Callable[[str, Sequence[str]], list[int]],
        band_names: Sequence[str] | None = None,
    ):
        self.path, self.modality, self.notes = path, modality, []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)  # refused below, in our words
            try:
                self.source = rasterio.open(path)
            except RasterioIOError as error:
                raise ValueError(f"--{modality.name}: no raster at {path}: {error}") from error
        crs = self.source.crs
        if crs is None or not (crs.is_geographic or crs.is_projected):
            raise ValueError(
                f"{path}: {'no coordinate system' if crs is None else f'coordinate system {crs.to_wkt()[:60]}'}; "
                "wanted a geographic or projected one: where it lies is unknown"
            )
        if self.source.transform == Affine.identity():
            raise ValueError(f"{path}: no geo-transform; wanted one: where its pixels lie is unknown")
        self.bands = [index + 1 for index in self._order(band_order, band_names)]
        scaled = {(self.source.scales[i - 1], self.source.offsets[i - 1]) for i in self.bands} - {(1.0, 0.0)}
        if scaled:
            self.notes.append(f"{path}: its scale and offset {sorted(scaled)} are not applied")

    def _order(self, band_order: Callable[[str, Sequence[str]], list[int]], names: Sequence[str] | None) -> list[int]:
        """Where the wanted bands stand in the file, counted from 0."""
        name, wanted, count = self.modality.name, self.modality.bands, self.source.count
        same = {plain_band(band): band for band in wanted}
        table_names = lambda bands: [same.get(plain_band(band or ""), band or "") for band in bands]  # noqa: E731
        if names is not None:
            if len(names) != count:
                raise ValueError(f"--{name}_bands: {len(names)} names, {' '.join(names)}; {self.path} has {count}")
            return band_order(name, table_names(names))
        described = table_names(self.source.descriptions)
        found = [band for band in wanted if band in described]
        if len(found) == len(wanted):
            return band_order(name, described)
        if count != len(wanted) or found:
            described = " ".join(band or "?" for band in described)
            raise ValueError(
                f"{self.path}: {count} bands, described as {described}; wanted the {len(wanted)} bands "
                f"{' '.join(wanted)}. Name those of the file in its order: --{name}_bands"
            )
        self.notes.append(f"{self.path}: bands not described, taken as {' '.join(wanted)}")
        return list(range(count))

    # ---- where it lies

    def footprint(self, crs: CRS) -> tuple[float, float, float, float]:
        """(west, south, east, north) in ``crs`` of the file's outline, whichever way its rows run."""
        outline = _outline(Window(0, 0, self.source.width, self.source.height))
        x, y = _moved(self.source.crs, crs, *_applied(self.source.transform, *outline))
        if not np.isfinite(x).all() or not np.isfinite(y).all():
            raise ValueError(f"{self.path}: its outline is not on the map of {crs}; wanted another --crs")
        return float(x.min()), float(y.min()), float(x.max()), float(y.max())

    # ---- its pixels

    def check_unit(self) -> None:
        """Nothing, or a ValueError: the mean of a band, of a decimated read, is not in the modality's unit."""
        shape = [min(side, _UNIT_CHECK_SIDE) for side in self.source.shape]
        values, valid, out_of_range = self._read(shape=shape)
        in_range = valid & ~out_of_range
        used = in_range if 2 * in_range.sum() >= valid.sum() else valid  # fill values, or another unit
        if not used.any():
            self.notes.append(f"{self.path}: no valid pixel among {shape[0]} x {shape[1]} that were looked at")
            return
        m = self.modality
        for band, layer in zip(m.bands, values):
            mean = float(layer[used].mean(dtype=np.float64))
            if not m.typical_range[0] <= mean <= m.typical_range[1]:
                digital = " or digital numbers that are not calibrated" if mean > m.value_range[1] else ""
                raise ValueError(
                    f"{self.path}, band {band}: mean {mean:.4g}; wanted {m.typical_range[0]} to {m.typical_range[1]} "
                    f"({m.unit}). It looks like {m.wrong_unit_hint}{digital}, or nodata that the file does not declare"
                )

    def place(self, grid: Grid) -> None:
        """Settles that the file is read onto ``grid``, and how.

        Raises:
          ValueError: its pixels are too coarse for the modality.
        """
        column, row = self.source.width / 2, self.source.height / 2
        x, y = np.array([column, column + 1, column]), np.array([row, row, row + 1])
        x, y = _moved(self.source.crs, grid.crs, *_applied(self.source.transform, x, y))
        native = float(np.hypot(x[1:] - x[0], y[1:] - y[0]).max())  # the longer side of the pixel at the centre
        wanted = grid.cell_m / self.modality.pixels_per_cell
        if not native <= MAX_STRETCH * wanted * (1 + 1e-6):
            raise ValueError(
                f"{self.path}: pixels of {native:.3g} m; wanted at most {MAX_STRETCH * wanted:.4g} m for "
                f"{self.modality.name} ({wanted:.4g} m): nothing is stretched by more than 2x"
            )
        self.grid = grid
        self.method = Resampling.average if native <= wanted * (1 + 1e-6) else Resampling.bilinear

    def read(self, cells: Window) -> Pixels:
        """The pixels of these ``cells`` of the grid. A file whose pixels are the grid's is read, not resampled."""
        per_cell = self.modality.pixels_per_cell
        pixels = Window(*(per_cell * side for side in cells.flatten()))
        own = self._own_window(pixels)
        return self._warped(pixels) if own is None else self._pasted(own)

    def _own_window(self, pixels: Window) -> Window | None:
        """Where the grid's pixels are in the file, if they are pixels of the file."""
        wanted, own = self.grid.transform(self.modality.pixels_per_cell), self.source.transform
        drift = max(abs(own.a - wanted.a) * self.source.width, abs(own.e - wanted.e) * self.source.height)
        if own.b or own.d or drift > 0.01 * wanted.a or self.source.crs != self.grid.crs:
            return None
        column, row = _applied(~own, *_applied(wanted, pixels.col_off, pixels.row_off))
        if abs(column - round(column)) > 0.01 or abs(row - round(row)) > 0.01:
            return None
        return Window(round(column), round(row), pixels.width, pixels.height)

    def _pasted(self, window: Window) -> Pixels:
        """The window of the file, empty where it reaches beyond it."""
        shape = int(window.height), int(window.width)
        values = np.zeros((len(self.bands), *shape), np.float32)
        valid, out_of_range = np.zeros(shape, bool), np.zeros(shape, bool)
        inside = _clipped(window, Window(0, 0, self.source.width, self.source.height))
        if inside is not None:
            top, left = int(inside.row_off - window.row_off), int(inside.col_off - window.col_off)
            place = slice(top, top + int(inside.height)), slice(left, left + int(inside.width))
            values[:, *place], valid[place], out_of_range[place] = self._read(window=inside)
            valid &= ~out_of_range
            values *= valid
        return Pixels(values, valid, out_of_range)

    def _warped(self, pixels: Window) -> Pixels:
        """The pixels of the grid, resampled; a window whose source is large is split."""
        empty = np.zeros((len(self.bands) + 2, int(pixels.height), int(pixels.width)), np.float32)
        whole = Window(0, 0, self.source.width, self.source.height)
        window = self._source_window(pixels)
        if window is None or _clipped(window, whole) is None:
            return Pixels(empty[:-2], empty[-1] > 0, empty[-1] > 0)
        if window.width * window.height * len(empty) > _VALUES_AT_ONCE and max(pixels.width, pixels.height) > 1:
            rows = pixels.height >= pixels.width
            half = int(pixels.height if rows else pixels.width) // 2
            column, row, width, height = pixels.flatten()
            first = Window(column, row, width, half) if rows else Window(column, row, half, height)
            second = Window(column, row + half, width, height - half)
            second = second if rows else Window(column + half, row, width - half, height)
            halves = [self._warped(part) for part in (first, second)]
            layers = zip(*((part.values, part.valid, part.out_of_range) for part in halves))
            return Pixels(*(np.concatenate(pair, axis=-2 if rows else -1) for pair in layers))
        source = self._pasted(window)  # invalid pixels are 0 and have no weight
        layers = np.concatenate((source.values, source.valid[None], source.out_of_range[None]), dtype=np.float32)
        rasterio.warp.reproject(
            layers,
            empty,
            src_transform=transform(window, self.source.transform),
            src_crs=self.source.crs,
            dst_transform=transform(pixels, self.grid.transform(self.modality.pixels_per_cell)),
            dst_crs=self.grid.crs,
            resampling=self.method,
        )
        values, share, out_of_range = empty[:-2], empty[-2], empty[-1] > 0
        valid = share > _COVERED
        values = np.where(valid, values / np.maximum(share, 1e-6), 0).astype(np.float32)
        return Pixels(values, valid, out_of_range & ~valid)

    def _source_window(self, pixels: Window) -> Window | None:
        """Whole source pixels that the grid's pixels need, with a margin; None: the grid is not on the file's map."""
        x, y = _applied(self.grid.transform(self.modality.pixels_per_cell), *_outline(pixels))
        column, row = _applied(~self.source.transform, *_moved(self.grid.crs, self.source.crs, x, y))
        column, row = column[np.isfinite(column)], row[np.isfinite(row)]
        if not len(column) or not len(row):
            return None
        left, top = math.floor(column.min()) - _MARGIN, math.floor(row.min()) - _MARGIN
        window = Window(left, top, math.ceil(column.max()) + _MARGIN - left, math.ceil(row.max()) + _MARGIN - top)
        width, height = self.source.width + 2 * _MARGIN, self.source.height + 2 * _MARGIN
        return _clipped(window, Window(-_MARGIN, -_MARGIN, width, height))

    def _read(
        self, *, window: Window | None = None, shape: Sequence[int] | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Values [C H W] float32, where they are data [H W], and where data is out of the modality's range [H W]."""
        shape = (None, None) if shape is None else ((len(self.bands), *shape), tuple(shape))
        try:
            raw = self.source.read(self.bands, window=window, out_shape=shape[0])
            valid = np.isfinite(raw).all(0)
            nodata = [self.source.nodatavals[band - 1] for band in self.bands]
            if None not in nodata:
                valid &= ~np.all([layer == value for layer, value in zip(raw, nodata)], axis=0)
            for band in self.bands:
                flags = self.source.mask_flag_enums[band - 1]
                if not {MaskFlags.alpha, MaskFlags.nodata, MaskFlags.all_valid} & set(flags):
                    valid &= self.source.read_masks(band, window=window, out_shape=shape[1]) > 0
        except RasterioIOError as error:
            raise ValueError(f"{self.path}: damaged, or not readable: {error.__cause__ or error}") from error
        low, high = self.modality.value_range
        out_of_range = valid & ((raw < low) | (raw > high)).any(0)
        return np.where(valid, raw, 0).astype(np.float32), valid, out_of_range


# ---- where the grid lies


def choose_crs(raster: Raster, wanted: str | None) -> CRS:
    """The output's coordinate system: ``wanted``, else the raster's own if its metre is one, else its UTM zone.

    Raises:
      ValueError: ``wanted`` is no coordinate system, or no projection whose metre is one at the raster.
    """
    own, geographic = raster.source.crs, CRS.from_epsg(4326)
    west, south, east, north = raster.footprint(own)
    (longitude,), (latitude,) = _moved(
        own, geographic, *(np.array([x]) for x in ((west + east) / 2, (south + north) / 2))
    )
    utm = CRS.from_epsg((32600 if latitude >= 0 else 32700) + int((longitude + 180) // 6) % 60 + 1)
    if wanted is None:
        return own if _metres(own, utm, longitude, latitude)[0] else utm
    try:
        crs = CRS.from_user_input(wanted)
    except CRSError as error:
        raise ValueError(f"--crs: {wanted} is no coordinate system: {error}") from error
    ok, what = _metres(crs, utm, longitude, latitude)
    if not ok:
        raise ValueError(f"--crs: {wanted} {what}; wanted a projection whose metre is one here, e.g. {utm}")
    return crs


def _metres(crs: CRS, utm: CRS, longitude: float, latitude: float) -> tuple[bool, str]:
    """Whether a metre of ``crs`` is a metre of ground at this point, and what it is else."""
    if not crs.is_projected or crs.linear_units_factor[1] != 1:
        return False, "is not in metres"
    x, y = _moved(CRS.from_epsg(4326), crs, np.array([longitude]), np.array([latitude]))
    x, y = _moved(crs, utm, x + np.array([0, 1000, 0]), y + np.array([0, 0, 1000]))
    scale = np.hypot(x[1:] - x[0], y[1:] - y[0]) / 1000
    worst = float(scale[np.abs(scale - 1).argmax()])
    return abs(worst - 1) < MAX_SCALE_ERROR, f"has metres of {worst:.3g} m of ground here"


def choose_grid(
    raster: Raster, *, cell_m: float, crs: str | None, bounds: tuple[float, float, float, float] | None
) -> Grid:
    """Whole cells that cover the raster, or ``bounds`` (west, south, east, north in the output's coordinate system).

    The raster's own corner is the grid's if its pixels are the modality's size in this coordinate system, so that they
    need not be resampled; else corners are multiples of ``cell_m``.

    Raises:
      ValueError: no such coordinate system, or ``bounds`` that do not meet the raster.
    """
    target, size = choose_crs(raster, crs), cell_m / raster.modality.pixels_per_cell
    covered = raster.footprint(target)
    at = raster.source.transform
    exact = raster.source.crs == target and not (at.b or at.d) and np.allclose((at.a, at.e), (size, -size), 1e-6, 0)
    west, north = (at.c, at.f) if exact else (0.0, 0.0)
    if bounds is not None:
        if not (bounds[0] < bounds[2] and bounds[1] < bounds[3]):
            raise ValueError(f"--bounds: {bounds}; wanted west south east north, the lower value first")
        apart = bounds[0] >= covered[2] or bounds[2] <= covered[0] or bounds[1] >= covered[3] or bounds[3] <= covered[1]
        if apart:
            said = " ".join(f"{value:.1f}" for value in covered)
            raise ValueError(f"--bounds: {bounds} do not meet {raster.path}, which covers {said} in {target}")
        covered = bounds
    left, right = math.floor((covered[0] - west) / cell_m + 1e-4), math.ceil((covered[2] - west) / cell_m - 1e-4)
    top, bottom = math.floor((north - covered[3]) / cell_m + 1e-4), math.ceil((north - covered[1]) / cell_m - 1e-4)
    return Grid(
        west=west + left * cell_m,
        north=north - top * cell_m,
        rows=max(bottom - top, 1),
        columns=max(right - left, 1),
        cell_m=cell_m,
        crs=target,
    )


# ---- small things


def _outline(window: Window) -> tuple[np.ndarray, np.ndarray]:
    """Columns and rows of 21 points along each side of a window."""
    there = np.linspace(0, 1, 21)
    zeros, ones = np.zeros(21), np.ones(21)
    columns, rows = np.concatenate((there, there, zeros, ones)), np.concatenate((zeros, ones, there, there))
    return window.col_off + columns * window.width, window.row_off + rows * window.height


def _applied(affine: Affine, x: Any, y: Any) -> tuple[Any, Any]:
    """A point, or arrays of them, moved by a transform; affine 2 and 3 have different operators for it."""
    return affine.a * x + affine.b * y + affine.c, affine.d * x + affine.e * y + affine.f


def _clipped(window: Window, to: Window) -> Window | None:
    """What two windows share; None: nothing."""
    try:
        return intersection(window, to)
    except rasterio.errors.WindowError:
        return None


def _moved(source: CRS, target: CRS, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points in ``source`` as points in ``target``; not finite where they are not on its map."""
    if source == target:
        return x, y
    return tuple(np.array(axis) for axis in rasterio.warp.transform(source, target, x, y))
