"""The drawing board of procedural scenes: patches drawn as polygons, and crowns stamped over them.

A patch is the smallest thing with a shape of its own (a field, one side of a roof, a car). The board is one raster of
patch numbers at the resolution of ``hr``; everything else is looked up by patch. All lengths are metres, points are
(east, south) from the north-west corner, angles are radians from east towards south.
"""

import dataclasses
import functools
import itertools

import numpy as np
from jaxtyping import Float, Int
from PIL import Image, ImageDraw

PIXELS_PER_M = 3.2  # 32 hr pixels a cell of 10 m
_CROWN_PAD = 32  # pixels around the board in which crowns may be centred
_CROWN_VARIANTS = 4
ROUND, CONE = 0, 1  # shapes of crowns


@dataclasses.dataclass(frozen=True)
class Stand:
    """Trees that grow at random on a patch: one per ``1 / density`` places of the jittered grid."""

    density: float
    round_surface: int
    cone_surface: int
    cone_share: float
    radius: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Patch:
    """Attributes of a shape on the ground; everything that the renderers look up.

    Attributes:
      surface: index into the scene's surfaces.
      truth, label: what it is and what the map says, ids of modalities.OSM (0: nothing, not mapped).
      crop, roof, forest: hidden attributes, 1-based ids, 0 = does not apply.
      height, tilt: metres above ground; slope vector (east, south) of a roof, the direction it faces.
      angle, spacing: direction of planted rows, seams or stripes, and metres between them (0: none).
      row_cover, row_shade: how much rows change leaf cover, and brightness.
      tramlines: metres between the wheel tracks of a field, 0 = none.
      rough, mottle: amplitude of brightness at the pixel, and over metres.
    """

    surface: int
    truth: int = 0
    label: int = 0
    crop: int = 0
    roof: int = 0
    forest: int = 0
    height: float = 0.0
    tilt: tuple[float, float] = (0.0, 0.0)
    angle: float = 0.0
    spacing: float = 0.0
    row_cover: float = 0.0
    row_shade: float = 0.0
    tramlines: float = 0.0
    rough: float = 0.05
    mottle: float = 0.08
    stand: Stand | None = None


def direction(angle: float) -> np.ndarray:
    """[2] the unit vector of an angle."""
    return np.array([np.cos(angle), np.sin(angle)])


def rectangle(centre: np.ndarray, *, angle: float, length: float, width: float) -> Float[np.ndarray, "4 2"]:
    """Corners of a rectangle whose length runs along ``angle``."""
    along, across = 0.5 * length * direction(angle), 0.5 * width * direction(angle + np.pi / 2)
    return centre + np.array([-along - across, along - across, along + across, -along + across])


def blob(rng: np.random.Generator, centre: np.ndarray, *, radius: float) -> np.ndarray:
    """[N 2] outline of a rounded irregular shape."""
    turn = np.linspace(0, 2 * np.pi, max(28, int(radius)), endpoint=False)
    wobble = sum(rng.normal(0, 0.22 / k) * np.cos(k * turn + rng.uniform(0, 7)) for k in (2, 3, 4, 6))
    r = radius * np.exp(wobble)
    angle = rng.uniform(0, np.pi)
    stretch = 1.4
    local = np.stack([r * np.cos(turn) * stretch**0.5, r * np.sin(turn) * stretch**-0.5], -1)
    return centre + local @ np.array([direction(angle), direction(angle + np.pi / 2)])


def ribbon(line: np.ndarray, width: np.ndarray) -> np.ndarray:
    """[2N 2] polygon of a line [N 2] with a width at each point."""
    along = np.gradient(line, axis=0)
    normal = np.stack([-along[:, 1], along[:, 0]], -1) / np.maximum(np.linalg.norm(along, axis=1, keepdims=True), 1e-6)
    half = 0.5 * normal * width.reshape(-1, 1)
    return np.concatenate([line + half, (line - half)[::-1]])


def cut(polygon: np.ndarray, *, point: np.ndarray, normal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two parts of a convex polygon [N 2] on either side of the line through ``point``; parts may be empty."""
    side = ((polygon - point) @ normal).tolist()
    parts: tuple[list, list] = ([], [])
    for i, (a, sa) in enumerate(zip(polygon.tolist(), side)):
        parts[sa >= 0].append(a)
        b, sb = polygon[(i + 1) % len(side)], side[(i + 1) % len(side)]
        if (sa >= 0) != (sb >= 0):
            crossing = (a + (b - a) * (sa / (sa - sb))).tolist()
            parts[0].append(crossing)
            parts[1].append(crossing)
    return np.array(parts[0]).reshape(-1, 2), np.array(parts[1]).reshape(-1, 2)


def densify(line: np.ndarray, *, step: float = 10.0, closed: bool = False) -> np.ndarray:
    """[N 2] the same line with a point at least every ``step``, so that it can be bent."""
    if closed:
        line = np.concatenate([line, line[:1]])
    pieces = []
    for a, b in itertools.pairwise(line):
        count = max(1, int(np.ceil(np.hypot(*(b - a)) / step)))
        pieces.append(a + (b - a) * np.arange(count)[:, None] / count)
    return np.concatenate(pieces if closed else [*pieces, line[-1:]])


class Board:
    """A raster of patch numbers, a list of patches, and the trees; straight plans are bent a little when drawn."""

    def __init__(self, rng: np.random.Generator, *, extent_cells: int):
        self.side_m = 10.0 * extent_cells
        self.side_px = 32 * extent_cells
        self.image = Image.new("I", (self.side_px, self.side_px))
        self._draw = ImageDraw.Draw(self.image)
        self.patches: list[Patch] = []
        self.trees: list[np.ndarray] = []  # rows: east, south, radius, surface, shape, patch it must stand on (or -1)
        wavelength = rng.uniform(120, 420, 3)
        turn = rng.uniform(0, 2 * np.pi, (2, 3))
        self._frequency = 2 * np.pi / wavelength[:, None] * np.stack([np.cos(turn[0]), np.sin(turn[0])], -1)
        self._phase = rng.uniform(0, 2 * np.pi, 3)
        self._push = np.stack([np.cos(turn[1]), np.sin(turn[1])], -1) * (wavelength * rng.uniform(0.004, 0.03))[:, None]

    def bend(self, points: np.ndarray) -> np.ndarray:
        """Planned places [N 2] to places on the ground: nothing in a landscape is quite straight."""
        return points + np.sin(points @ self._frequency.T + self._phase) @ self._push

    def bent_angle(self, centre: np.ndarray, angle: float) -> float:
        """Direction on the ground of a planned direction at a planned place."""
        a, b = self.bend(np.stack([centre - 4 * direction(angle), centre + 4 * direction(angle)]))
        return float(np.arctan2(b[1] - a[1], b[0] - a[0]))

    def add(self, patch: Patch) -> int:
        self.patches.append(patch)
        return len(self.patches) - 1

    def polygon(self, points: np.ndarray, patch: int, *, bend: bool = False) -> None:
        if bend:
            points = self.bend(densify(points, closed=True))
        self._draw.polygon((points * PIXELS_PER_M).ravel().tolist(), fill=patch)

    def line(self, points: np.ndarray, patch: int, *, width: float, bend: bool = False) -> None:
        if bend:
            points = self.bend(densify(points))
        if width * PIXELS_PER_M < 2:
            self._draw.line((points * PIXELS_PER_M).ravel().tolist(), fill=patch)
        else:
            self.polygon(ribbon(points, np.array(width)), patch)

    def fits(self, corners: np.ndarray, patch: int) -> bool:
        """Whether a quadrilateral on the ground lies on ``patch`` (looked up at corners, sides and centre)."""
        probes = np.concatenate([corners, 0.5 * (corners + np.roll(corners, 1, 0)), corners.mean(0, keepdims=True)])
        pixels = (probes * PIXELS_PER_M).astype(int)
        inside = [(x, y) for x, y in pixels.tolist() if 0 <= x < self.side_px and 0 <= y < self.side_px]
        return all(self.image.getpixel(xy) == patch for xy in inside)

    def plant(self, points: np.ndarray, *, radius: np.ndarray, surface: int, shape: int, patch: int = -1) -> None:
        """Trees at points [N 2]; with ``patch`` only those that stand on it grow."""
        rows = np.empty((len(points), 6), np.float32)
        rows[:, :2], rows[:, 2] = points, radius
        rows[:, 3:] = surface, shape, patch
        self.trees.append(rows)

    def look_up(self, raster: np.ndarray, points: np.ndarray) -> np.ndarray:
        """[N] patch numbers under points [N 2]; points outside read the nearest edge."""
        pixels = np.clip((points * PIXELS_PER_M).astype(np.int32), 0, self.side_px - 1)
        return raster[pixels[:, 1], pixels[:, 0]]


@functools.lru_cache(maxsize=512)
def _crown(shape: int, radius_px: int, variant: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row offsets, column offsets and relative height (0-1) of the pixels of one crown."""
    rng = np.random.default_rng((shape, radius_px, variant))
    grid = np.arange(-radius_px - 1, radius_px + 2)
    y, x = np.meshgrid(grid, grid, indexing="ij")
    turn, distance = np.arctan2(y, x), np.hypot(x, y) / (radius_px + 0.3)
    if shape == CONE:
        points = int(rng.integers(7, 12))
        distance = distance / (0.86 + 0.14 * np.cos(points * turn + rng.uniform(0, 7)))
        height = 1.0 - 0.9 * distance + 0.05 * rng.standard_normal(x.shape)
    else:
        lobes = sum(rng.normal(0, 0.16 / k**0.5) * np.cos(k * turn + rng.uniform(0, 7)) for k in (2, 3, 5))
        distance = distance / (0.92 + np.clip(lobes, -0.25, 0.25))
        height = np.sqrt(np.maximum(1.0 - 0.85 * distance**2, 0.0))
        for _ in range(max(2, radius_px // 2)):  # boughs
            bough = rng.uniform(-0.75, 0.75, 2) * radius_px
            height += 0.10 * np.exp(-((y - bough[0]) ** 2 + (x - bough[1]) ** 2) / (0.12 * radius_px**2 + 1.0))
        height = 0.85 * height + 0.03 * rng.standard_normal(x.shape)
    rows, columns = np.nonzero(distance < 1.0)
    return y[rows, columns], x[rows, columns], np.clip(height[rows, columns], 0.08, 1.1)


def stamp_crowns(
    *,
    centres: Float[np.ndarray, "N 2"],
    radius: Float[np.ndarray, "N"],
    top: Float[np.ndarray, "N"],
    shape: Int[np.ndarray, "N"],
    side_px: int,
) -> tuple[Int[np.ndarray, "H W"], Float[np.ndarray, "H W"]]:
    """Per pixel the number (from 1, 0 = none) of the tree whose crown is highest there, and that height in metres.

    ``centres``, ``radius`` and ``top`` (height of the crown's top) are metres.
    """
    padded = side_px + 2 * _CROWN_PAD
    board = np.zeros(padded * padded, np.int32)
    pixel = np.round(centres * PIXELS_PER_M).astype(np.int64) + _CROWN_PAD
    radius_px = np.clip(np.round(radius * PIXELS_PER_M), 1, _CROWN_PAD - 4).astype(np.int64)
    reach = radius_px + 2
    inside = ((pixel >= reach[:, None]) & (pixel < padded - reach[:, None])).all(1)
    key = (shape.astype(np.int64) * 64 + radius_px) * _CROWN_VARIANTS + np.arange(len(shape)) % _CROWN_VARIANTS
    order = np.argsort(key, kind="stable")
    order = order[inside[order]]
    starts = np.flatnonzero(np.diff(key[order], prepend=-1))
    for begin, end in zip(starts, [*starts[1:], len(order)]):
        trees = order[begin:end]
        kind = int(key[trees[0]])
        rows, columns, height = _crown(
            kind // (64 * _CROWN_VARIANTS), kind // _CROWN_VARIANTS % 64, kind % _CROWN_VARIANTS
        )
        place = (pixel[trees, 1] * padded + pixel[trees, 0])[:, None] + (rows * padded + columns)
        # one integer holds centimetres and tree, so that the highest crown wins with its number
        value = ((100 * top[trees])[:, None] * height.astype(np.float32)).astype(np.int32) * 2**18 + (
            trees[:, None].astype(np.int32) + 1
        )
        np.maximum.at(board, place.ravel(), value.ravel())
    board = board.reshape(padded, padded)[_CROWN_PAD:-_CROWN_PAD, _CROWN_PAD:-_CROWN_PAD]
    return board & (2**18 - 1), (board >> 18).astype(np.float32) / 100
