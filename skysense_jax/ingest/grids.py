"""Where the pixels of a file lie: its grid, the degrees that it covers, and the pixels over a piece of ground.

A file that does not say where it lies, or says what cannot be, is refused, unless who lists it knows and says it.
Next: windows.py (which reads the pixels).
"""

import dataclasses
import functools
import math

import numpy as np
import rasterio
import rasterio.warp
from rasterio.crs import CRS
from rasterio.errors import CRSError
from rasterio.transform import Affine, from_bounds
from rasterio.windows import Window

from skysense_jax.ingest.rasters import MAX_STRETCH, Refused, Square, lon_lat, pixel_size_m, zone_of
from skysense_jax.modalities import METRES_PER_CELL, Modality

NOWHERE = "no coordinate system: where it lies and the size of its pixels are unknown"
MARGIN = 4  # pixels around what lies over a square that are read too: bilinear interpolation needs them
_LON_LAT = CRS.from_epsg(4326)
_ALL_AROUND = 359.9  # degrees of longitude; rounding must not make a strip of them


@functools.lru_cache(maxsize=256)
def crs_of(text: str) -> CRS:
    """The coordinate system of an EPSG code, a WKT or what else PROJ reads; raises Refused if it reads none."""
    try:
        return CRS.from_string(text)
    except CRSError as error:
        raise Refused(f"coordinate system {text!r}: {error}; wanted one such as EPSG:32632") from error


@dataclasses.dataclass(frozen=True)
class Ground:
    """Where a file lies, as its list says: ``bounds`` are west, south, east, north in units of ``crs``."""

    crs: str
    bounds: tuple[float, float, float, float]

    def grid(self, shape: tuple[int, int]) -> "Grid":
        """Of an image of ``shape`` rows and columns."""
        west, south, east, north = self.bounds
        if not (west < east and south < north):
            raise Refused(f"west, south, east, north = {self.bounds}; wanted west below east and south below north")
        return Grid(crs_of(self.crs), from_bounds(*self.bounds, width=shape[1], height=shape[0]), shape)


@dataclasses.dataclass(frozen=True)
class Grid:
    """Pixels: ``transform`` brings (column, row) to coordinates of ``crs``; ``shape`` counts rows and columns."""

    crs: CRS
    transform: Affine
    shape: tuple[int, int]

    @classmethod
    def of(cls, file: rasterio.DatasetReader, ground: Ground | None = None) -> "Grid":
        """Of an open raster; raises Refused if neither it nor ``ground``, which counts, says where it lies."""
        if ground is not None:
            return ground.grid(file.shape)
        if file.crs is None:
            raise Refused(NOWHERE)
        return cls(file.crs, file.transform, file.shape)

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """West, south, east, north in units of ``crs``."""
        height, width = self.shape
        (x, other_x), (y, other_y) = zip(self.transform @ (0, 0), self.transform @ (width, height))
        return min(x, other_x), min(y, other_y), max(x, other_x), max(y, other_y)

    def degrees(self) -> tuple[float, float, float, float]:
        """West, south, east, north in degrees, -180 to 180; west > east where it crosses 180 degrees.

        Longitudes of the file may go on to 360, as models count them. Raises Refused if that is not on this planet.
        """
        west, south, east, north = self.bounds
        if self.crs.is_geographic and not (-180.1 <= west < east <= 360.1 and -90.1 <= south < north <= 90.1):
            raise Refused(
                f"{self.crs} with longitudes {west:.6g} to {east:.6g} and latitudes {south:.6g} to {north:.6g}; wanted "
                "-180 to 180 and -90 to 90 (swapped, or metres?)"
            )
        if "UTM zone" in self.crs.to_wkt() and not (-5e5 <= west < east <= 1.5e6 and -1e6 <= south < north <= 1.1e7):
            raise Refused(
                f"{self.crs} with eastings {west:.6g} to {east:.6g} and northings {south:.6g} to {north:.6g}: no place "
                "of a UTM zone (another coordinate system?)"
            )
        bounds = rasterio.warp.transform_bounds(self.crs, _LON_LAT, west, south, east, north)
        if not np.isfinite(bounds).all():
            raise Refused(f"{self.crs} with bounds {(west, south, east, north)}: not on the map of that system")
        return wrapped(*bounds)

    def turned_to(self, square: Square) -> "Grid":
        """The grid, if in degrees moved by whole turns to where ``square`` is: 185 and -175 are one longitude."""
        if not self.crs.is_geographic:
            return self
        west, _, east, _ = self.bounds
        turns = round((square.centre()[0] - (west + east) / 2) / 360)
        return dataclasses.replace(self, transform=Affine.translation(360 * turns, 0) @ self.transform)

    def check_size(self, row: Modality) -> None:
        """Nothing; raises Refused if a pixel is more than ``MAX_STRETCH`` as large as one of the row."""
        west, south, east, north = self.bounds
        zone = zone_of(*lon_lat((west + east) / 2, (south + north) / 2, self.crs))
        metres = pixel_size_m(self.transform, self.shape, self.crs, zone)
        wanted = MAX_STRETCH * METRES_PER_CELL / row.pixels_per_cell
        if metres > 1.02 * wanted:  # what is a matter of rounding is decided on the cells of a place
            raise Refused(f"pixels of {metres:.3g} m; wanted at most {wanted:.4g} m for {row.name}")

    def window(self, square: Square) -> Window | None:
        """The pixels over ``square`` and ``MARGIN`` around it; None if there are none."""
        west, south, east, north = rasterio.warp.transform_bounds(square.crs, self.crs, *square.bounds)
        columns, rows = zip(*(~self.transform @ corner for corner in ((west, north), (east, south))))
        left, top = max(math.floor(min(columns)) - MARGIN, 0), max(math.floor(min(rows)) - MARGIN, 0)
        right = min(math.ceil(max(columns)) + MARGIN, self.shape[1])
        bottom = min(math.ceil(max(rows)) + MARGIN, self.shape[0])
        return Window(left, top, right - left, bottom - top) if left < right and top < bottom else None


def wrapped(west: float, south: float, east: float, north: float) -> tuple[float, float, float, float]:
    """Bounds whose longitudes lie within -180 to 180; west > east where they cross 180 degrees."""
    if east - west > _ALL_AROUND:
        return -180.0, south, 180.0, north
    if max(abs(west), abs(east)) > 180:
        west, east = (west + 180) % 360 - 180, 180 - (180 - east) % 360
    return west, south, east, north
