"""Files of pixels and of labels as they lie in users' folders, as windows of samples and of maps.

Pictures through Pillow, GeoTIFFs through rasterio, series as .npy. What a file says of its place is not read: tasks ask
what is where within an image. Next: folders.py.
"""

import dataclasses
import functools
import itertools
import math
import pathlib
import re
import threading
import warnings
from collections.abc import Callable, Mapping

import cachetools
import numpy as np
import rasterio
from jaxtyping import Shaped, UInt8
from PIL import Image, UnidentifiedImageError
from rasterio.errors import NotGeoreferencedWarning

from skysense_jax.data import sample as samples
from skysense_jax.data.checks import validate_sample
from skysense_jax.data.sample import UNDATED, Sample, Series
from skysense_jax.eval.scores import IGNORED
from skysense_jax.ingest.tfds_sets import SETS, Options, rgb_cells
from skysense_jax.modalities import METRES_PER_CELL, Modality
from skysense_jax.tasks.cards import RGB, Card, Source

_TIFF = (".tif", ".tiff")
_EPSILON = 1e-6
_KEPT_BYTES = 2 * 2**30  # of pictures, of stacks and of label maps: Potsdam's of examples.IMAGES_AT_ONCE twice over
_QUIET = threading.Lock()  # filters of warnings are those of all threads
Image.MAX_IMAGE_PIXELS = None  # scenes of 13 000 pixels are no attack


def kept(num_bytes: int) -> Callable[[Callable], Callable]:
    """A cache of arrays: as many of those asked for last as have ``num_bytes``, of a larger one it alone.

    Each is made by one thread, and others that ask for it wait.
    """
    arrays = cachetools.LRUCache(num_bytes, getsizeof=lambda array: min(array.nbytes, num_bytes))
    return cachetools.cached(arrays, condition=threading.Condition())


@dataclasses.dataclass(frozen=True)
class Window:
    """A part of an image: its north-west pixel, its side in pixels and in cells, and how many of its first rows and
    columns of pixels lie in parts before it."""

    row: int
    column: int
    side: int
    cells: int
    seen_rows: int = 0
    seen_columns: int = 0

    @property
    def new_share(self) -> float:
        """Of its pixels, those that lie in no part before it."""
        return (1 - self.seen_rows / self.side) * (1 - self.seen_columns / self.side)


@dataclasses.dataclass(frozen=True)
class Pixels:
    """The files of one modality of one image at one date, or of its series.

    Attributes:
      row: of the table, that they are of.
      source: what the card says of them.
      paths: one, or one a band.
      days: of the dates of a series; empty: not known.
    """

    row: Modality
    source: Source
    paths: tuple[pathlib.Path, ...]
    days: tuple[int, ...] = ()

    def shape(self) -> tuple[int, int]:
        """Rows and columns, read from the headers; raises ValueError if the bands' files differ or cannot be read."""
        shapes = {shape_of(path) for path in self.paths}
        if len(shapes) > 1:
            raise ValueError(f"--dataset: {self.paths[0].parent}: bands of {sorted(shapes)} pixels; wanted one size")
        return shapes.pop()


def metres_per_pixel(pixels: Pixels, card: Card) -> float:
    """What a pixel of an image is taken to measure."""
    return card.gsd_m if pixels.source.format == RGB else METRES_PER_CELL / pixels.row.pixels_per_cell


def step_of(pixels: Pixels) -> int:
    """The pixels by which windows may be moved."""
    return 1 if pixels.source.format == RGB else pixels.row.pixels_per_cell


def windows(
    shape: tuple[int, int], *, pixel_m: float, max_cells: int, all_of_it: bool, where: str, step: int = 1
) -> list[Window]:
    """Squares of at most ``max_cells`` whole cells: those that cover an image, or one in its middle.

    Squares of an image that is no multiple of them overlap. Their corners are multiples of ``step`` pixels.

    Raises:
      ValueError: not one whole cell.
    """
    cells = min(max_cells, int(min(shape) * pixel_m / METRES_PER_CELL + _EPSILON))
    if cells < 1:
        raise ValueError(
            f"--dataset: {where}: {shape[0]} x {shape[1]} pixels of {pixel_m:.4g} m are smaller than a cell of "
            f"{METRES_PER_CELL:g} m"
        )
    side = math.ceil(cells * METRES_PER_CELL / pixel_m - _EPSILON)
    shape = tuple(length // step * step for length in shape)
    if not all_of_it:
        return [Window(*((length - side) // 2 // step * step for length in shape), side, cells)]
    starts = [sorted({*range(0, length - side, side), length - side}) for length in shape]
    seen = [[0, *(before + side - start for before, start in itertools.pairwise(line))] for line in starts]
    rows, columns = (list(zip(*line)) for line in zip(starts, seen))
    return [Window(row, column, side, cells, above, left) for row, above in rows for column, left in columns]


# ---- pixels


@dataclasses.dataclass(frozen=True)
class Picture:
    """A part of a picture that is resampled where it is asked for: a ``SampleReader`` of one date of hr.

    Attributes:
      row: of hr.
      path, part: what of which file.
      gsd_m: size of its pixels.
    """

    id: str
    row: Modality
    path: pathlib.Path
    part: Window
    gsd_m: float

    @property
    def extent_cells(self) -> int:
        return self.part.cells

    def days(self, modality: str) -> np.ndarray:
        return np.array([UNDATED] if modality == self.row.name else [], np.int32)

    def window(self, modality: str, date: int, row: int, column: int, side: int) -> samples.Window:
        assert (modality, date) == (self.row.name, 0), (modality, date)
        pixels = inside(read_picture(self.path), self.part)
        found = rgb_cells(pixels, self.gsd_m, row=row, column=column, side=side)
        return samples.Window(found.pixels, found.valid, np.zeros_like(found.valid))

    def labels_window(self, row: int, column: int, side: int) -> None:
        return None


def read_sample(parts: Mapping[str, Pixels], window: Window, card: Card, *, name: str) -> Sample:
    """The sample of a window; ``parts`` are the image's files by modality, the first one's pixels are the window's.

    Raises:
      ValueError: a file cannot be read, lacks a band, or holds numbers out of the row's range.
    """
    first, *_ = parts.values()
    if first.source.format == RGB:
        picture = inside(read_picture(first.paths[0]), window)
        content = SETS["resisc45"].read({"image": picture}, Options(gsd_m=card.gsd_m))
        series = dict(content.series)
    else:
        scale = METRES_PER_CELL / metres_per_pixel(first, card)
        start = round(window.row / scale), round(window.column / scale)
        series = {pixels.row.name: _grid_series(pixels, start, window.cells) for pixels in parts.values()}
    sample = Sample(id=name, extent_cells=window.cells, series=series)
    validate_sample(sample, [pixels.row for pixels in parts.values()], of_whole=False)
    return sample


def _grid_series(pixels: Pixels, start: tuple[int, int], cells: int) -> Series:
    """The cells from ``start`` on of numbers on the row's own grid."""
    row, source = pixels.row, pixels.source
    bands = [_band(name) for name in source.bands or row.bands]
    missing = [name for name in row.bands if name not in bands]
    if missing:
        raise ValueError(f"--dataset: bands {bands}; {row.name} wants {missing} too")
    stack = _read_stack(pixels.paths)  # T H W C
    if stack.shape[-1] != len(bands):
        raise ValueError(f"--dataset: {pixels.paths[0]}: {stack.shape[-1]} bands; the card has {len(bands)}: {bands}")
    rows, columns = (slice(i * row.pixels_per_cell, (i + cells) * row.pixels_per_cell) for i in start)
    raw = stack[:, rows, columns][..., [bands.index(name) for name in row.bands]].astype(np.float64) - source.offset
    low, high = row.value_range
    known = np.isfinite(raw)
    if low > 0:
        known &= raw > -source.offset  # 0 in the file is no data
    elif low < 0:
        known &= raw != 0
    valid = known.all(-1)
    numbers = np.clip(np.where(valid[..., None], raw, low), low, high)
    whole = np.rint(numbers) if np.dtype(row.dtype).kind in "ui" else numbers
    count = len(numbers)
    if pixels.days and len(pixels.days) != count:
        raise ValueError(f"--dataset: {pixels.paths[0]}: {count} dates, and {len(pixels.days)} days in the index")
    return Series(
        images=whole.astype(row.dtype),
        valid=valid,
        cloud=np.zeros_like(valid),
        days=np.array(pixels.days or [UNDATED] * count, np.int32),
        orbits=np.zeros(count, np.uint8),
        native_gsd_m=METRES_PER_CELL / row.pixels_per_cell,
    )


def _band(name: str) -> str:
    """B02 as B2."""
    return re.sub(r"^B0(?=\d)", "B", name)


@kept(_KEPT_BYTES)
def read_picture(path: pathlib.Path) -> UInt8[np.ndarray, "H W 3"]:
    """An 8-bit picture as RGB; raises ValueError if it is none."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("RGB", "RGBA", "L", "P", "CMYK", "YCbCr"):
                raise ValueError(f"--dataset: {path} is of mode {image.mode}; wanted an 8-bit picture")
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"--dataset: {path} cannot be read as a picture: {error}") from error


@kept(_KEPT_BYTES)
def _read_stack(paths: tuple[pathlib.Path, ...]) -> Shaped[np.ndarray, "T H W C"]:
    """The numbers of a file, or of a file a band."""
    if paths[0].suffix == ".npy":
        array = _load(paths[0])
        if array.ndim != 4:
            raise ValueError(f"--dataset: {paths[0]}: shape {array.shape}; wanted dates, bands, rows, columns")
        return np.moveaxis(np.asarray(array), 1, -1)
    layers = []
    for path in paths:
        with _opened(path) as file:
            layers.append(file.read())
    return np.moveaxis(np.concatenate(layers), 0, -1)[None]


def _opened(path: pathlib.Path) -> rasterio.DatasetReader:
    try:
        with _QUIET, warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)  # it need not say where it lies
            return rasterio.open(path)
    except rasterio.RasterioIOError as error:
        raise ValueError(f"--dataset: {path} cannot be read: {error}") from error


def _load(path: pathlib.Path) -> np.ndarray:
    """An array that stays on disk until it is used."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise ValueError(f"--dataset: {path} cannot be read as an array: {error}") from error


def num_dates(pixels: Pixels) -> int:
    """Of an image; read from the header of a series."""
    if pixels.paths[0].suffix != ".npy":
        return 1
    array = _load(pixels.paths[0])
    return len(array) if array.ndim == 4 else 1


@functools.lru_cache(maxsize=64)  # asked for again at once
def shape_of(path: pathlib.Path) -> tuple[int, int]:
    if path.suffix == ".npy":
        return tuple(_load(path).shape[-2:])
    if path.suffix.lower() in _TIFF:
        with _opened(path) as file:
            return file.height, file.width
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"--dataset: {path} cannot be read as a picture: {error}") from error


# ---- labels


@kept(_KEPT_BYTES)
def read_labels(path: pathlib.Path, card: "CardLabels") -> UInt8[np.ndarray, "H W"]:
    """The class ids of a label file, IGNORED where there is none.

    Raises:
      ValueError: the file cannot be read, or holds a number or colour that the card does not know.
    """
    if card.colours:
        picture = read_picture.__wrapped__(path)  # not kept: its ids are
        colours = np.pad(picture, ((0, 0), (0, 0), (0, 1))).view("<u4")[..., 0]
        table = {r + (g << 8) + (b << 16): number for (r, g, b), number in card.colours}
        return _mapped(colours, table, path, "colour")
    if path.suffix == ".npy":
        array = np.asarray(_load(path))
        raw = array[0] if array.ndim == 3 else array
    elif path.suffix.lower() in _TIFF:
        with _opened(path) as file:
            raw = file.read(1)
    else:
        try:
            with Image.open(path) as image:
                raw = np.asarray(image.convert("L") if image.mode in ("RGB", "RGBA", "1") else image)
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"--dataset: {path} cannot be read as a label map: {error}") from error
    table = dict(card.values) or {number: number for number in (*range(card.num_classes), IGNORED)}
    return _mapped(raw, table, path, "number")


@dataclasses.dataclass(frozen=True)
class CardLabels:
    """What of a card says how label files are read; hashable."""

    values: tuple[tuple[int, int], ...]
    colours: tuple[tuple[tuple[int, int, int], int], ...]
    num_classes: int

    @classmethod
    def of(cls, card: Card) -> "CardLabels":
        return cls(tuple(card.values.items()), tuple(card.colours.items()), len(card.classes))


def _mapped(raw: np.ndarray, table: Mapping[int, int], path: pathlib.Path, what: str) -> UInt8[np.ndarray, "H W"]:
    found = np.unique(raw)
    if unknown := [value for value in found if value not in table]:
        as_colour = lambda v: f"({v & 255},{v >> 8 & 255},{v >> 16})"  # noqa: E731
        told = [as_colour(v) if what == "colour" else f"{v}" for v in unknown[:5]]
        raise ValueError(
            f"--dataset: {path}: the {what} {', '.join(told)} has no class; the card knows {len(table)} of them"
        )
    ids = np.zeros(raw.shape, np.uint8)
    for value in found:  # sooner done than the inverse of np.unique
        ids[raw == value] = table[value]
    return ids


def label_window(labels: UInt8[np.ndarray, "H H"], window: Window, *, pixel_m: float) -> UInt8[np.ndarray, "_ _"]:
    """The labels of the whole cells of a window, out of all of its labels, as the pixels of ``read_sample`` lie.

    As they are where a cell holds a whole number of pixels; else the nearest ones, 32 a cell.
    """
    per_cell = METRES_PER_CELL / pixel_m
    exact = abs(per_cell - round(per_cell)) < _EPSILON
    side = window.cells * (round(per_cell) if exact else 32)
    offset = math.floor((window.side - window.cells * per_cell) / 2 + _EPSILON)
    places = np.floor(offset + (np.arange(side) + 0.5) * window.cells * per_cell / side).astype(int)
    return labels[np.ix_(places, places)]


def inside(array: Shaped[np.ndarray, "H W *C"], window: Window) -> Shaped[np.ndarray, "_ _ *C"]:
    """The pixels of a window."""
    return array[window.row : window.row + window.side, window.column : window.column + window.side]
