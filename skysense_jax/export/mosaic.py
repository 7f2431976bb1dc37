"""Features of overlapping tiles to one GeoTIFF: which tiles, their blending, the file, and its picture.

What does not fit in memory is summed on disk; memory follows the tile and the width of a feature, not the scene.
numpy and rasterio only. Next: ground.py (where the grid lies), embed.py (what computes the features).
"""

import dataclasses
import math
import os
import pathlib
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import rasterio
import rasterio.shutil
from rasterio.errors import NotGeoreferencedWarning
from rasterio.windows import Window

from skysense_jax.export.ground import Grid

PREVIEW_SIDE = 2048  # pixels at most
STRETCH_PERCENT = (2, 98)
_BLOCK_BYTES = 2**24  # of a block of all features; GDAL holds a few of them
_DISK_SHARE = 2.8  # sums, the file at worst as large, and its overviews, twice a third


@dataclasses.dataclass(frozen=True)
class Tile:
    """A tile in cells of the grid, and the part of it that is no other tile's: the cores make up the grid."""

    cells: Window
    core: Window


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles start along a side: evenly, the last at the end, at least ``overlap`` shared with the next."""
    if size <= tile:
        return [0]
    count = math.ceil((size - overlap) / (tile - overlap))
    return [i * (size - tile) // (count - 1) for i in range(count)]


def tiles(rows: int, columns: int, *, tile: int, overlap: int) -> list[Tile]:
    """Tiles of ``tile`` x ``tile`` cells (of the grid's own side where that is less) that cover it, row after row."""
    tops, lefts = _starts(rows, tile, overlap), _starts(columns, tile, overlap)
    return [
        Tile(
            cells=Window(left, top, min(tile, columns), min(tile, rows)),
            core=Window(left, top, next_left - left, next_top - top),
        )
        for top, next_top in zip(tops, [*tops[1:], rows])
        for left, next_left in zip(lefts, [*lefts[1:], columns])
    ]


def _ramp(start: int, length: int, size: int, overlap: int) -> np.ndarray:
    """[length] weights of a tile along a side: a raised cosine at an edge inside the image, 1 at the image's own."""
    rise = np.sin(np.pi / 2 * (np.arange(overlap) + 0.5) / max(overlap, 1)) ** 2
    weights = np.ones(length)
    if start > 0:
        weights[:overlap] *= rise
    if start + length < size:
        weights[length - overlap :] *= rise[::-1]
    return weights


def weights(tile: Tile, rows: int, columns: int, *, overlap: int) -> np.ndarray:
    """[P Q] float32 above 0, by which a tile's features count where tiles overlap."""
    down = _ramp(int(tile.cells.row_off), int(tile.cells.height), rows, overlap)
    across = _ramp(int(tile.cells.col_off), int(tile.cells.width), columns, overlap)
    return np.outer(down, across).astype(np.float32)


class Principal:
    """Mean and covariance of vectors that come in parts, exact in float64 (Chan, Golub and LeVeque 1979)."""

    def __init__(self, dim: int):
        self.count, self.mean, self.scatter = 0, np.zeros(dim), np.zeros((dim, dim))

    def add(self, vectors: np.ndarray) -> None:
        """Takes [N D] into account."""
        if not len(vectors):
            return
        vectors = vectors.astype(np.float64)
        mean = vectors.mean(0)
        apart, total = mean - self.mean, self.count + len(vectors)
        centred = vectors - mean
        self.scatter += centred.T @ centred + np.outer(apart, apart) * (self.count * len(vectors) / total)
        self.mean += apart * len(vectors) / total
        self.count = total

    def components(self, number: int = 3) -> np.ndarray:
        """[D number] of unit length, the widest first; the largest entry of each is positive."""
        _, vectors = np.linalg.eigh(self.scatter)
        vectors = vectors[:, ::-1][:, :number]
        largest = np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], axis=0)
        vectors = vectors * np.where(largest < 0, -1, 1)
        return np.pad(vectors, ((0, 0), (0, number - vectors.shape[1])))


class Mosaic:
    """A scene's features on their way into a GeoTIFF ``out`` and a picture ``preview``, which appear when whole.

    A context: until ``finish`` everything is in hidden places beside them, and is gone when it ends otherwise.

    Raises:
      ValueError: no such folder, or its disk has no room.
    """

    def __init__(self, out: pathlib.Path, preview: pathlib.Path, *, grid: Grid, dim: int):
        self.out, self.preview, self.grid, self.dim = out.absolute(), preview.absolute(), grid, dim
        for flag, path in (("--out", self.out), ("--preview", self.preview)):
            if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
                raise ValueError(f"{flag}: no folder {path.parent} that may be written")
        needed = round(grid.rows * grid.columns * 4 * (dim * _DISK_SHARE + 1)) + 2**20
        free = shutil.disk_usage(self.out.parent).free
        if needed > free:
            raise ValueError(
                f"--out: {grid.rows} x {grid.columns} cells of {dim} features need {needed / 2**30:.1f} GiB at "
                f"{self.out.parent}, {free / 2**30:.1f} are free; wanted a larger disk, or --bounds"
            )
        self.block = 512
        while self.block > 16 and self.block**2 * dim * 4 > _BLOCK_BYTES:
            self.block //= 2

    def __enter__(self) -> "Mosaic":
        self.folder = pathlib.Path(
            tempfile.mkdtemp(prefix=f".{self.out.name}.", suffix=".incomplete", dir=self.out.parent)
        )
        self.hidden_preview = self.preview.parent / f"{self.folder.name}.png"
        profile = dict(
            driver="GTiff",
            width=self.grid.columns,
            height=self.grid.rows,
            dtype="float32",
            crs=self.grid.crs,
            transform=self.grid.transform(),
            tiled=True,
            blockxsize=self.block,
            blockysize=self.block,
            interleave="pixel",
            BIGTIFF="IF_SAFER",
            SPARSE_OK=True,
        )
        try:
            self.sums = rasterio.open(self.folder / "sums.tif", "w+", count=self.dim, **profile)
            self.weights = rasterio.open(self.folder / "weights.tif", "w+", count=1, **profile)
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.sums.close()
        self.weights.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        for path in (self.hidden_preview, self.hidden_preview.with_name(f"{self.hidden_preview.name}.aux.xml")):
            path.unlink(missing_ok=True)

    def add(self, cells: Window, features: np.ndarray, weight: np.ndarray) -> None:
        """Adds a tile's features [D P Q]; ``weight`` [P Q] is 0 where there are none."""
        features = np.where(weight > 0, features, 0) * weight
        self.sums.write(self.sums.read(window=cells) + features, window=cells)
        self.weights.write(self.weights.read(1, window=cells) + weight, 1, window=cells)

    def finish(self, *, descriptions: Sequence[str], tags: Mapping[str, str]) -> int:
        """Writes the means, overviews and the picture, and puts them in their places; how many cells have no data.

        Raises:
          ValueError: no cell has any.
        """
        principal, empty = Principal(self.dim), 0
        for window in self._blocks():
            weight = self.weights.read(1, window=window)
            mean = self.sums.read(window=window) / np.where(weight > 0, weight, np.nan)
            self.sums.write(mean, window=window)
            principal.add(mean[:, weight > 0].T)
            empty += int((weight <= 0).sum())
        if not principal.count:
            raise ValueError(f"none of {self.grid.rows} x {self.grid.columns} cells has data; wanted one or more")
        self.sums.nodata = np.nan
        self.sums.descriptions = tuple(descriptions)
        self.sums.update_tags(**tags)
        self._draw(principal)
        self.sums.close()  # what GDAL still holds goes to the file
        whole = self.folder / "features.tif"
        rasterio.shutil.copy(
            self.folder / "sums.tif",
            whole,
            driver="COG",
            COMPRESS="DEFLATE",
            PREDICTOR="FLOATING_POINT",
            BLOCKSIZE=self.block,
            OVERVIEW_RESAMPLING="AVERAGE",
            BIGTIFF="IF_SAFER",
        )
        os.replace(whole, self.out)
        os.replace(self.hidden_preview, self.preview)
        return empty

    def _blocks(self, side: int | None = None) -> Iterator[Window]:
        side = side or self.block
        for top in range(0, self.grid.rows, side):
            for left in range(0, self.grid.columns, side):
                yield Window(left, top, min(side, self.grid.columns - left), min(side, self.grid.rows - top))

    def _draw(self, principal: Principal) -> None:
        """The first three principal components as red, green and blue; transparent where there is no data."""
        step = math.ceil(max(self.grid.rows, self.grid.columns) / PREVIEW_SIDE)
        axes, picture = (
            principal.components(),
            np.full((-(-self.grid.rows // step), -(-self.grid.columns // step), 3), np.nan),
        )
        for window in self._blocks(max(self.block // step, 1) * step):
            features = np.moveaxis(self.sums.read(window=window).astype(np.float64), 0, -1)
            pad = (0, -features.shape[0] % step), (0, -features.shape[1] % step), (0, 0)
            colours = np.pad((features - principal.mean) @ axes, pad, constant_values=np.nan)
            colours = colours.reshape(colours.shape[0] // step, step, colours.shape[1] // step, step, 3)
            there = np.isfinite(colours[..., 0]).sum((1, 3))[..., None]
            colours = np.nansum(colours, (1, 3)) / np.where(there, there, np.nan)
            top, left = int(window.row_off) // step, int(window.col_off) // step
            picture[top : top + colours.shape[0], left : left + colours.shape[1]] = colours
        there = np.isfinite(picture[..., 0])
        low, high = np.percentile(picture[there], STRETCH_PERCENT, axis=0)
        share = np.where(high > low, (picture - low) / np.where(high > low, high - low, 1), 0.5)
        layers = np.zeros((4, *there.shape), np.uint8)
        layers[:3, there] = np.rint(255 * share[there].clip(0, 1)).T
        layers[3] = 255 * there
        profile = dict(driver="PNG", width=there.shape[1], height=there.shape[0], count=4, dtype="uint8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)  # a picture
            with rasterio.open(self.hidden_preview, "w", **profile) as png:
                png.write(layers)
