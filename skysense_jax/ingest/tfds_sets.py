"""What sets of TensorFlow Datasets hold, in the table's units: EuroSAT, BigEarthNet, So2Sat, RESISC45, UC Merced.

Shapes and features are those of the builders in tensorflow-datasets 4.9.10, which copy the numbers of the original
files; what the numbers are is known of the originals, and said here. Nothing here opens a file. Next: from_tfds.py.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped
from rasterio.crs import CRS
from rasterio.transform import from_origin

from skysense_jax.data.sample import UNDATED, Series
from skysense_jax.ingest import sentinel
from skysense_jax.ingest.rasters import Raster, Refused, Resampled, Square, all_positive, own_cells, resample
from skysense_jax.modalities import METRES_PER_CELL, MODALITIES, Modality

_HR, _S2, _S1 = (MODALITIES[name] for name in ("hr", "s2", "s1"))
# Level-1C: the atmosphere is in the numbers, blue and aerosols above all. A row of its own, or --l1c_as_s2.
S2_L1C = dataclasses.replace(
    _S2,
    name="s2_l1c",
    unit="top-of-atmosphere reflectance x 10000, without the offset of processing baseline 04.00",
    mean=(1390.782, 1314.873, 1363.524, 1549.444, 2091.749, 2371.717, 2299.905, 2560.295, 2177.072, 1524.065),
    std=(850.348, 875.065, 1138.850, 1122.178, 1161.592, 1274.392, 1248.429, 1345.527, 1336.099, 1136.538),
    statistics_source="SSL4EO-S12, Level-1C without B1, B9 and B10, clouds kept",
)
# The order of EuroSAT's files: B8A comes last. Its published means of the channels say so too (B10 is near 0).
_EUROSAT_BANDS = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B9", "B10", "B11", "B12", "B8A")
# Linear power behind a refined Lee filter. 0 to 3 are complex numbers of single looks, 6 and 7 the covariance.
_SO2SAT_VH, _SO2SAT_VV = 4, 5
_UC_MERCED_GSD_M = 0.3048  # one foot
_EDGE = 2  # pixels by which a patch is continued, so that interpolation has neighbours at its rim
_NOWHERE = Square(500_000.0, 5_000_000.0, 1, CRS.from_epsg(32631))  # for images of no place: never told


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command says of a set.

    Attributes:
      gsd_m: size of a pixel, of a set that does not say; None: not said.
      l1c_as_s2: whether Level-1C counts as ``s2``.
    """

    gsd_m: float | None = None
    l1c_as_s2: bool = False


@dataclasses.dataclass(frozen=True)
class Content:
    """What one element of a set shows; the rest of a ``Sample`` is the same for all of a set."""

    cells: int
    series: Mapping[str, Series]
    longitude: float | None = None
    latitude: float | None = None


@dataclasses.dataclass(frozen=True)
class Set:
    """A set of TensorFlow Datasets.

    Attributes:
      licence: of its data.
      told: what to know of it, for messages and provenance.
      shapes: of the features that are read.
      name: element to its name in the set.
      scenes: the feature with its classes.
      rows: of the table, that its samples may have.
      read: element and options to what it shows; raises Refused.
    """

    licence: str
    told: str
    shapes: Mapping[str, tuple[int | None, ...]]
    rows: tuple[Modality, ...]
    read: Callable[[Mapping[str, Any], Options], Content]
    name: str = "filename"
    scenes: str = "label"


def _optical(dn: Shaped[np.ndarray, "H W C"], valid: np.ndarray, *, day: int = UNDATED, offset: int = 0) -> Series:
    clear = np.zeros_like(valid)[None]  # no set says where clouds are
    return sentinel.s2_series(dn[None], valid=valid[None], cloud=clear, days=[day], offsets=[offset])


def _l1c(options: Options) -> str:
    return _S2.name if options.l1c_as_s2 else S2_L1C.name


def _read_eurosat(element: Mapping[str, Any], options: Options) -> Content:
    channels = [_EUROSAT_BANDS.index(band) for band in _S2.bands]
    dn = element["sentinel2"][..., channels]
    return Content(len(dn), {_l1c(options): _optical(dn, all_positive(dn))})


def _read_so2sat(element: Mapping[str, Any], options: Options) -> Content:
    dn = element["sentinel2"].astype(np.float64) * 10_000
    power = element["sentinel1"][..., [_SO2SAT_VV, _SO2SAT_VH]].astype(np.float64)
    valid = all_positive(power)
    db = np.where(valid[..., None], sentinel.decibels(power), 0)
    radar = sentinel.s1_series(db[None], valid=valid[None], days=[UNDATED], orbits=["unknown"])
    return Content(len(dn), {_l1c(options): _optical(dn, all_positive(dn)), _S1.name: radar})


def _read_bigearthnet(element: Mapping[str, Any], options: Options) -> Content:
    """Its patches have places and days; 20 m bands are interpolated as the builder does it."""
    told = element["metadata"]
    corners = [int(told["coordinates"][name]) for name in ("ulx", "uly", "lrx", "lry")]
    west, north, east, south = corners
    side = east - west
    if side != north - south or any(corner % METRES_PER_CELL for corner in corners):
        raise Refused(f"corners {corners}; wanted a square of whole 10 m cells")
    crs = CRS.from_wkt(text_of(told["projection"]))
    square = Square(float(west), float(north), round(side / METRES_PER_CELL), crs)
    parts = {}
    for band in _S2.bands:
        pixels = element[f"B{int(band[1:]):02d}" if band[1:].isdigit() else band][..., None].astype(np.float32)
        parts[band] = _on_cells(pixels, square)
    dn = np.concatenate([parts[band].pixels for band in _S2.bands], axis=-1)
    valid = np.logical_and.reduce([parts[band].valid for band in _S2.bands])
    day, product = text_of(told["acquisition_date"])[:10], text_of(told["tile_source"])
    baseline = re.search(r"_N(\d{4})_", product)
    if baseline is None or not re.fullmatch(r"\d{4}-\d\d-\d\d", day):
        raise Refused(f"acquired {day!r} as {product!r}; wanted a day, and a product with a processing baseline")
    offset = sentinel.offset_of_baseline(int(baseline[1]) / 100)
    series = _optical(dn, valid, day=int(np.datetime64(day, "D").astype(int)), offset=offset)
    return Content(square.cells, {_S2.name: series}, *square.centre())


def _on_cells(pixels: Float[np.ndarray, "h w 1"], square: Square) -> Resampled:
    """A patch that covers ``square`` on its cells; its rim is continued, so that the rim's cells have neighbours."""
    size = square.cells * METRES_PER_CELL / len(pixels)
    padded = np.pad(pixels, ((_EDGE, _EDGE), (_EDGE, _EDGE), (0, 0)), mode="edge")
    corner = from_origin(square.west - _EDGE * size, square.north + _EDGE * size, size, size)
    return resample(Raster(padded, all_positive(padded), corner, square.crs), square, pixels_per_cell=1)


def rgb_cells(pixels: np.ndarray, gsd_m: float, *, row: int, column: int, side: int) -> Resampled:
    """As pixels of ``hr`` the square of ``side`` cells from cell (row, column) on, among the whole cells in the middle
    of an RGB image whose pixels measure ``gsd_m``."""
    per_cell, all_cells = METRES_PER_CELL / gsd_m, own_cells(*pixels.shape[:2], pixel_size_m=gsd_m)
    first_row, first_column = (math.floor((size - all_cells * per_cell) / 2 + 1e-6) for size in pixels.shape[:2])
    if math.isclose(per_cell, _HR.pixels_per_cell):  # already on the row's grid
        north, west, size = (i * _HR.pixels_per_cell for i in (row, column, side))
        found = pixels[first_row + north :, first_column + west :][:size, :size]
        return Resampled(np.ascontiguousarray(found), np.ones((size, size), bool))
    corner = from_origin(_NOWHERE.west - first_column * gsd_m, _NOWHERE.north + first_row * gsd_m, gsd_m, gsd_m)
    north, west = _NOWHERE.north - row * METRES_PER_CELL, _NOWHERE.west + column * METRES_PER_CELL
    raster = Raster(pixels, np.ones(pixels.shape[:2], bool), corner, _NOWHERE.crs)
    square = dataclasses.replace(_NOWHERE, north=north, west=west, cells=side)
    return resample(raster, square, pixels_per_cell=_HR.pixels_per_cell)


def _read_rgb(element: Mapping[str, Any], options: Options, *, gsd_m: float | None = None) -> Content:
    """The whole cells in the middle of an image that knows at most the size of its pixels."""
    gsd_m, pixels = gsd_m or options.gsd_m, element["image"]
    cells = own_cells(*pixels.shape[:2], pixel_size_m=gsd_m)
    if not cells:
        raise Refused(f"{pixels.shape[0]} x {pixels.shape[1]} pixels of {gsd_m:.4g} m hold no whole cell of 10 m")
    found = rgb_cells(pixels, gsd_m, row=0, column=0, side=cells)
    nothing, undated = np.zeros_like(found.valid), np.array([UNDATED], np.int32)
    series = Series(found.pixels[None], found.valid[None], nothing[None], undated, np.zeros(1, np.uint8), gsd_m)
    return Content(cells, {_HR.name: series})


SETS = {
    "eurosat/all": Set(
        licence="Copernicus Sentinel data; terms of the set at github.com/phelber/eurosat",
        told="Level-1C",
        shapes={"sentinel2": (64, 64, 13)},
        rows=(S2_L1C,),
        read=_read_eurosat,
    ),
    "bigearthnet/all": Set(
        licence="CDLA-Permissive-1.0",
        told="Level-2A by sen2cor",
        shapes={"B02": (120, 120), "B05": (60, 60), "B8A": (60, 60), "B12": (60, 60)},
        rows=(_S2,),
        read=_read_bigearthnet,
        scenes="labels",
    ),
    "so2sat/all": Set(
        licence="CC-BY-4.0",
        told="Level-1C mosaics of a season; radar behind a refined Lee filter",
        shapes={"sentinel1": (32, 32, 8), "sentinel2": (32, 32, 10)},
        rows=(S2_L1C, _S1),
        read=_read_so2sat,
        name="sample_id",
    ),
    "resisc45": Set(
        licence="not stated by its authors; images of Google Earth",
        told="pixels of 0.2 to 30 m, taken as of one size",
        shapes={"image": (256, 256, 3)},
        rows=(_HR,),
        read=_read_rgb,
    ),
    "uc_merced": Set(
        licence="public domain (USGS National Map)",
        told="pixels of one foot",
        shapes={"image": (None, None, 3)},
        rows=(_HR,),
        read=functools.partial(_read_rgb, gsd_m=_UC_MERCED_GSD_M),
    ),
}
OF_UNKNOWN_SIZE = ("resisc45",)


def text_of(value: Any) -> str:
    """A text as TensorFlow Datasets gives it, or a number, as a text."""
    return value.decode() if isinstance(value, bytes) else str(value)
