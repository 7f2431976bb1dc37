"""The state of a procedural scene while it is laid out: its landscape, what its map knows, its pools of surfaces.

Next: scenes_uses.py (what fills a parcel), scenes_layout.py (water, roads, trees; the order of drawing).
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from skysense_jax.data.scenes_board import Board, Patch, cut, direction
from skysense_jax.data.scenes_surfaces import CROP_TYPES, FOREST_TYPES, ROOF_MATERIALS, Palette
from skysense_jax.modalities import OSM

OSM_ID = {name: number for number, name in enumerate(OSM.classes, start=1)}
LANDSCAPES = ("agricultural", "forest", "village", "industrial", "wetland", "coast", "hills")
_LANDSCAPE_SHARE = (0.26, 0.13, 0.22, 0.14, 0.08, 0.08, 0.09)


@dataclasses.dataclass(frozen=True)
class Parcel:
    """A convex piece of planned land and the direction of its sides."""

    polygon: np.ndarray
    angle: float

    @property
    def centre(self) -> np.ndarray:
        return self.polygon.mean(0)

    @property
    def size(self) -> np.ndarray:
        """[2] metres along and across ``angle``."""
        return np.ptp(self.polygon @ np.stack([direction(self.angle), direction(self.angle + np.pi / 2)], -1), axis=0)

    @property
    def long_angle(self) -> float:
        """Direction of the longer side."""
        along, across = self.size
        return self.angle if along > across else self.angle + np.pi / 2


@dataclasses.dataclass(frozen=True)
class Cut:
    """A line that divided land: its two ends, and the length of the piece that it divided."""

    ends: np.ndarray
    length: float


def subdivide(
    rng: np.random.Generator,
    parcel: Parcel,
    *,
    scene_side: float,
    side_at: Callable[[np.ndarray], float],
    turn_share: float = 0.15,
) -> tuple[list[Parcel], list[Cut]]:
    """Parcels cut from ``parcel`` down to sides of about ``side_at(centre)`` metres, and the cuts.

    ``scene_side``: metres; pieces outside the scene are dropped. ``turn_share``: how often the two halves of a large
    piece are turned against each other.
    """
    stack, leaves, cuts = [parcel], [], []
    while stack:
        piece = stack.pop()
        if (piece.polygon.max(0) < -10).any() or (piece.polygon.min(0) > scene_side + 10).any():
            continue
        axes = np.stack([direction(piece.angle), direction(piece.angle + np.pi / 2)])
        places = piece.polygon @ axes.T
        low, size = places.min(0), np.ptp(places, axis=0)
        longest = int(size.argmax())
        place = low + 0.5 * size
        place[longest] = low[longest] + size[longest] * rng.uniform(0.36, 0.64)
        tilt = rng.normal(0, 0.05)
        normal = direction(piece.angle + longest * np.pi / 2 + tilt)
        parts = cut(piece.polygon, point=place @ axes, normal=normal)
        if size[longest] < 1.3 * side_at(piece.centre) or min(len(part) for part in parts) < 3:
            leaves.append(piece)
            continue
        on_line = parts[0][np.abs((parts[0] - place @ axes) @ normal) < 1e-6]
        along = on_line @ np.array([-normal[1], normal[0]])
        cuts.append(Cut(on_line[np.argsort(along)[[0, -1]]], float(size[longest])))
        for part in parts:
            turned = rng.uniform(-0.7, 0.7) if size[longest] > 120 and rng.random() < turn_share else 0.0
            stack.append(Parcel(part, piece.angle + tilt + turned))
    return leaves, cuts


class Plan:
    """A board, a palette, and what the whole scene has in common; ``later`` is drawn when the roads are there."""

    def __init__(self, rng: np.random.Generator, *, extent_cells: int):
        self.rng, self.side = rng, 10.0 * extent_cells
        self.landscape = str(rng.choice(LANDSCAPES, p=_LANDSCAPE_SHARE))
        self.board, self.palette = Board(rng, extent_cells=extent_cells), Palette(rng)
        self.unmapped = rng.uniform(0.04, 0.3)  # share of parcels that nobody mapped
        self.mapped_buildings = rng.uniform(0.7, 1.0)
        self.crop_share = rng.dirichlet(np.full(len(CROP_TYPES), 1.5))
        self.forest_share = rng.dirichlet(np.full(len(FOREST_TYPES), 1.2))
        self.angle = rng.uniform(0, np.pi)
        centre = rng.uniform(0.1, 0.9, 2) * self.side
        reach = {"village": rng.uniform(80, 190), "agricultural": 60.0, "hills": 60.0, "industrial": 70.0}
        settled = self.landscape == "village" or rng.random() < 0.25
        self.settlement = (centre, reach.get(self.landscape, 0.0) * settled)
        palette = self.palette
        self.lawns = [palette.grass(care=rng.uniform(0.4, 1.0)) for _ in range(4)]
        self.verge = palette.grass(care=0.1)
        self.asphalts = [palette.asphalt() for _ in range(2)]
        self.yards = [palette.yard() for _ in range(3)]
        self.dirt = palette.track()
        self.broadleaves = [palette.tree("deciduous") for _ in range(2)]
        self.shrub, self.conifer = palette.tree("shrub"), palette.tree("conifer")
        self.roofs = [[palette.roof(material) for _ in range(4)] for material in range(len(ROOF_MATERIALS))]
        self.cars = [palette.car() for _ in range(5)]
        self.paint = palette.paint()
        self.board.add(Patch(self.verge, rough=0.14, mottle=0.15))  # patch 0: what nothing else covers
        self.no_roads: list[int] = []  # patches that a road does not cross
        self.later: list[Callable[[], None]] = []

    def pick(self, pool: list[int]) -> int:
        return pool[int(self.rng.integers(len(pool)))]

    def label(self, name: str, *, share: float | None = None) -> int:
        """The map's id for something of class ``name``; 0 when nobody mapped it (``share`` of such things is)."""
        missed = self.unmapped if share is None else 1.0 - share
        return 0 if self.rng.random() < missed else OSM_ID[name]

    def patch(self, name: str, surface: int, *, share: float | None = None, **attributes) -> Patch:
        """A patch of class ``name`` that the map may know."""
        return Patch(surface, OSM_ID[name], self.label(name, share=share), **attributes)

    def settled(self, place: np.ndarray) -> bool:
        centre, reach = self.settlement
        return bool(np.hypot(*(place - centre)) < reach)

    def row_angle(self, parcel: Parcel) -> float:
        """Direction on the ground of rows along the longer side."""
        return self.board.bent_angle(parcel.centre, parcel.long_angle)

    def fill(self, parcel: Parcel, patch: Patch) -> int:
        """Number of the patch that the whole parcel now is."""
        number = self.board.add(patch)
        self.board.polygon(parcel.polygon, number, bend=True)
        return number
