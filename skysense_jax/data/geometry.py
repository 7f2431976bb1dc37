"""Boxes on the ground, how a view lies on them, and the resampling of what they hold. Pure numpy.

Ground is measured in cells from the sample's north-west corner, (row, column). A view shows a square box of ground,
first resized, then mirrored and turned; ``view_affine`` says where in the sample a point of the view lies, and ``turn``
does to arrays what that affine says. Nodata never bleeds: resampling divides by the weight of the pixels with data.
Next: views.py, which cuts views with it.
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Bool, Float, Shaped
from PIL import Image

# A pixel of a view holds data if this much of its filter's weight does; below one half only for rounding's sake.
_MIN_WEIGHT = 0.5 - 1e-4


@dataclasses.dataclass(frozen=True)
class Box:
    """A square of ground: its north-west corner (may lie outside the sample) and its side, whole cells."""

    row: int
    column: int
    side: int

    def overlap(self, other: "Box") -> tuple[slice, slice]:
        """Rows and columns of ``self``, counted from its corner, that lie in ``other``; in cells."""
        starts = (max(other.row - self.row, 0), max(other.column - self.column, 0))
        stops = (other.row + other.side - self.row, other.column + other.side - self.column)
        return tuple(slice(start, min(stop, self.side)) for start, stop in zip(starts, stops))


@dataclasses.dataclass(frozen=True)
class Orientation:
    """An element of the square's symmetry group: mirror left-right if ``mirrored``, then quarter turns to the left."""

    mirrored: bool
    quarter_turns: int

    @property
    def matrix(self) -> np.ndarray:
        """[2, 2] float32: an offset (row, column) in the view's axes to an offset on the ground."""
        mirror = np.diag([1, -1 if self.mirrored else 1])
        quarter = np.array([[0, 1], [-1, 0]])  # np.rot90: the view's down is the ground's left
        return (mirror @ np.linalg.matrix_power(quarter, self.quarter_turns)).astype(np.float32)


def draw_anchor(rng: np.random.Generator, *, extent_cells: int, anchor_cells: int, tile_cells: int) -> Box:
    """The square in which all views of a sample lie: min(anchor, extent) cells, its corner on the tile grid."""
    side = min(anchor_cells, extent_cells)
    steps = (extent_cells - side) // tile_cells
    row, column = rng.integers(0, steps + 1, 2) * tile_cells
    return Box(int(row), int(column), side)


def draw_box(rng: np.random.Generator, anchor: Box, *, box_cells: tuple[int, int]) -> Box:
    """A square of a side drawn from ``box_cells`` (both ends included), inside the anchor.

    One larger than the anchor covers it at a random offset and sticks out; that happens only where the anchor is the
    whole sample.
    """
    side = int(rng.integers(box_cells[0], box_cells[1] + 1))
    slack = anchor.side - side
    row, column = rng.integers(min(slack, 0), max(slack, 0) + 1, 2)
    return Box(anchor.row + int(row), anchor.column + int(column), side)


def draw_orientation(rng: np.random.Generator) -> Orientation:
    """One of the eight, each as likely."""
    return Orientation(bool(rng.integers(2)), int(rng.integers(4)))


def view_affine(box: Box, orientation: Orientation, *, view_cells: int) -> Float[np.ndarray, "2 3"]:
    """Offset from the view's centre, in the view's axes and cells, to ground cells of the sample (batch.Views)."""
    centre = np.array([[box.row + box.side / 2], [box.column + box.side / 2]], np.float32)
    return np.concatenate([orientation.matrix * np.float32(box.side / view_cells), centre], axis=1)


def turn(array: Shaped[np.ndarray, "..."], orientation: Orientation, *, axes: tuple[int, int]) -> np.ndarray:
    """The array with its row and column ``axes`` mirrored and turned; a view of the same memory."""
    if orientation.mirrored:
        array = np.flip(array, axes[1])
    return np.rot90(array, orientation.quarter_turns, axes)


@functools.lru_cache(maxsize=1024)
def triangle_weights(size: int, out_size: int) -> Float[np.ndarray, "out in"]:
    """Weights of the triangle filter (bilinear, widened when it shrinks: antialiased); each row sums to 1."""
    scale = size / out_size
    support = max(scale, 1.0)
    centres = (np.arange(out_size)[:, None] + 0.5) * scale
    weights = np.maximum(0.0, 1.0 - np.abs(np.arange(size) + 0.5 - centres) / support)
    return _frozen(weights / weights.sum(1, keepdims=True))


@functools.lru_cache(maxsize=1024)
def area_weights(size: int, out_size: int) -> Float[np.ndarray, "out in"]:
    """Share of each output pixel's ground that each input pixel covers; each row sums to 1."""
    edges = np.arange(out_size + 1) * (size / out_size)
    low = np.maximum(edges[:-1, None], np.arange(size))
    high = np.minimum(edges[1:, None], np.arange(size) + 1)
    return _frozen(np.maximum(0.0, high - low) * (out_size / size))


def resize_masked(
    pixels: Shaped[np.ndarray, "T H W C"],
    mask: Bool[np.ndarray, "T H W"],
    *,
    box_size: int,
    out_size: int,
    offset: tuple[int, int] = (0, 0),
) -> tuple[Float[np.ndarray, "T P Q C"], Bool[np.ndarray, "T P Q"]]:
    """Pixels under the triangle filter over those that hold data, and where at least half of its weight holds data.

    ``pixels`` are the rows and columns from ``offset`` of a square of ``box_size`` pixels, the rest of which holds no
    data. The result is arbitrary, but finite, where its mask is False.
    """
    rows, columns = _cut_weights(pixels.shape[1:3], box_size, out_size, offset)
    data = np.where(mask[..., None], pixels, 0).astype(np.float32)
    total = _separable(rows, data, columns)
    if mask.all() and pixels.shape[1:3] == (box_size, box_size):
        return total, np.ones(total.shape[:3], bool)
    weight = _separable(rows, mask[..., None].astype(np.float32), columns)
    return total / np.maximum(weight, 1e-6), weight[..., 0] >= _MIN_WEIGHT


def resize_mask(
    mask: Bool[np.ndarray, "T H W"], *, box_size: int, out_size: int, offset: tuple[int, int] = (0, 0)
) -> Bool[np.ndarray, "T P Q"]:
    """Where at least half of the filter's weight is True; arguments as in ``resize_masked``."""
    if mask.all() and mask.shape[1:] == (box_size, box_size):
        return np.ones((mask.shape[0], out_size, out_size), bool)
    rows, columns = _cut_weights(mask.shape[1:], box_size, out_size, offset)
    return _separable(rows, mask[..., None].astype(np.float32), columns)[..., 0] >= _MIN_WEIGHT


def resize_uint8(
    pixels: Shaped[np.ndarray, "H W C"], *, out_size: int, orientation: Orientation
) -> Shaped[np.ndarray, "P Q C"]:
    """A whole square of uint8 with 1, 3 or 4 bands, resized by Pillow (the same filter, to rounding) and turned."""
    mode = PILLOW_MODES[pixels.shape[-1]]
    image = Image.frombuffer(mode, pixels.shape[:2], np.ascontiguousarray(pixels), "raw", mode, 0, 1)
    if pixels.shape[0] != out_size:
        image = image.resize((out_size, out_size), Image.Resampling.BILINEAR)
    if orientation.mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if orientation.quarter_turns:
        image = image.transpose(_TURNS[orientation.quarter_turns])
    return np.asarray(image).reshape(out_size, out_size, pixels.shape[-1])


# CMYK for four bands: the resize of RGBA takes the last band for opacity and weighs the others with it.
PILLOW_MODES = {1: "L", 3: "RGB", 4: "CMYK"}
_TURNS = {1: Image.Transpose.ROTATE_90, 2: Image.Transpose.ROTATE_180, 3: Image.Transpose.ROTATE_270}


def class_shares(
    labels: Shaped[np.ndarray, "H W"],
    *,
    num_classes: int,
    box_size: int,
    out_size: int,
    offset: tuple[int, int] = (0, 0),
) -> Float[np.ndarray, "P Q L"]:
    """Share of each output cell's ground that has label 1, 2, ... ``num_classes``; 0 and ground outside have none."""
    height, width = labels.shape
    weights = area_weights(box_size, out_size)
    rows = weights[:, offset[0] : offset[0] + height]
    columns = weights[:, offset[1] : offset[1] + width]
    one_hot = (labels[None, ..., None] == np.arange(1, num_classes + 1)).astype(np.float32)
    return _separable(rows, one_hot, columns)[0]


def share_true(mask: Bool[np.ndarray, "... H W"], *, block: int) -> Float[np.ndarray, "... P Q"]:
    """Share of True pixels in each square of ``block`` pixels."""
    *lead, height, width = mask.shape
    if mask.all():
        return np.ones((*lead, height // block, width // block), np.float32)
    blocks = mask.reshape(*lead, height // block, block, width // block, block)
    return blocks.mean(axis=(-3, -1), dtype=np.float32)


def _cut_weights(
    shape: tuple[int, ...], box_size: int, out_size: int, offset: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    weights = triangle_weights(box_size, out_size)
    return weights[:, offset[0] : offset[0] + shape[0]], weights[:, offset[1] : offset[1] + shape[1]]


def _separable(rows: np.ndarray, data: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """einsum("P H, T H W C, Q W -> T P Q C") as two matrix products."""
    dates, height, width, bands = data.shape
    num_rows, num_columns = rows.shape[0], columns.shape[0]
    tall = (rows @ data.reshape(dates, height, width * bands)).reshape(dates, num_rows, width, bands)
    turned = tall.swapaxes(1, 2).reshape(dates, width, num_rows * bands)
    return (columns @ turned).reshape(dates, num_columns, num_rows, bands).swapaxes(1, 2)


def _frozen(weights: np.ndarray) -> np.ndarray:
    weights = weights.astype(np.float32)
    weights.flags.writeable = False  # the cache hands the same array to every caller
    return weights
