"""Where things lie in a procedural scene: terrain, water, parcels, roads, trees, and what the map knows of them.

A landscape type sets the mix. Land is cut recursively into parcels; long cuts become roads; each parcel gets a use and
surfaces of its own (scenes_uses.py). The result is one raster of patches, crowns above it, and tables to look up.
Next: scenes_render.py (what the sensors see).
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from skysense_jax.data.scenes_board import (
    CONE,
    PIXELS_PER_M,
    ROUND,
    Patch,
    Stand,
    blob,
    densify,
    direction,
    ribbon,
    stamp_crowns,
)
from skysense_jax.data.scenes_plan import OSM_ID, Cut, Parcel, Plan, subdivide
from skysense_jax.data.scenes_surfaces import Surface
from skysense_jax.data.scenes_uses import USES, car

# Weights of the uses of a landscape's parcels.
_USE_WEIGHTS = {
    "agricultural": dict(farmland=60, grassland=13, orchard=7, vineyard=5, forest=6, scrub=4, farmstead=5),
    "forest": dict(forest=64, grassland=10, scrub=11, farmland=6, bare_ground=5, wetland=4),
    "village": dict(farmland=30, grassland=20, orchard=16, vineyard=10, forest=14, scrub=12),
    "industrial": dict(industrial=56, bare_ground=12, grassland=8, scrub=8, farmland=12, sports_pitch=4),
    "wetland": dict(wetland=46, grassland=18, forest=12, scrub=10, farmland=8, sand=6),
    "coast": dict(grassland=26, scrub=24, forest=16, residential=12, sand=12, farmland=10),
    "hills": dict(vineyard=38, orchard=30, farmland=8, forest=10, scrub=6, bare_ground=4, farmstead=4),
}
_SETTLED_WEIGHTS = dict(residential=68, sports_pitch=16, grassland=5, industrial=4, forest=3, orchard=4)
_WET_WEIGHTS = dict(wetland=30, grassland=40, forest=20, scrub=10)
_RAILWAY_SHARE = dict(agricultural=0.15, forest=0.12, village=0.22, industrial=0.5, wetland=0.05, coast=0.1, hills=0.1)
_RIVER_SHARE = dict(agricultural=0.2, forest=0.22, village=0.2, industrial=0.15, wetland=0.5, coast=0.0, hills=0.08)
_POND_MEAN = dict(agricultural=0.3, forest=0.3, village=0.25, industrial=0.25, wetland=2.2, coast=0.2, hills=0.15)
_TREE_GRID_M = 3.3
MAX_EXTENT_CELLS = 160  # the crown map numbers at most 2**18 trees


@dataclasses.dataclass(frozen=True)
class Layout:
    """A scene before any sensor has looked at it; rasters [H W] have the 32 pixels per cell of ``hr``.

    Attributes:
      patch: number of the patch on the ground.
      patches, surfaces: what patch and surface numbers mean.
      tree: number of the crown seen from above, from 1; 0 = none.
      crown_height: metres, 0 where no crown is.
      tree_surface, tree_shape: per tree; index 0 stands for no tree.
      relief: terrain height in metres, per cell.
    """

    extent_cells: int
    landscape: str
    patch: Int[np.ndarray, "H W"]
    patches: list[Patch]
    surfaces: list[Surface]
    tree: Int[np.ndarray, "H W"]
    crown_height: Float[np.ndarray, "H W"]
    tree_surface: Int[np.ndarray, " N"]
    tree_shape: Int[np.ndarray, " N"]
    relief: Float[np.ndarray, "P Q"]

    def column(self, field: str, dtype: type = np.float32) -> np.ndarray:
        """One attribute of all patches, to be indexed with ``patch``."""
        return np.array([getattr(patch, field) for patch in self.patches], dtype)


Shapes = list[tuple[np.ndarray, str]]


def _plan_water(plan: Plan) -> Shapes:
    """Outlines and kinds, in the order of drawing: of a river, of ponds and of the sea."""
    rng, side, shapes = plan.rng, plan.side, []

    def sway(t: np.ndarray, size: float) -> np.ndarray:
        waves = (np.sin(t * 2 * np.pi / rng.uniform(80, 400) + rng.uniform(0, 7)) for _ in range(3))
        return sum(rng.normal(0, size) * wave for wave in waves)[:, None]

    if rng.random() < _RIVER_SHARE[plan.landscape]:
        angle, t = rng.uniform(0, np.pi), np.linspace(-0.9, 0.9, 60) * (side + 60)
        centre = side * rng.uniform(0.25, 0.75, 2)
        line = centre + t[:, None] * direction(angle) + sway(t, 14.0) * direction(angle + np.pi / 2)
        width = np.exp(rng.uniform(np.log(6), np.log(38))) * (1 + 0.2 * np.sin(t / 37 + rng.uniform(0, 7)))
        shapes += [(ribbon(line, width + rng.uniform(4, 16)), "bank"), (ribbon(line, width), "river")]
    for _ in range(rng.poisson(_POND_MEAN[plan.landscape] * (side / 160) ** 1.5)):
        place, radius = side * rng.uniform(0, 1, 2), np.exp(rng.uniform(np.log(9), np.log(45)))
        outline = blob(rng, place, radius=radius)
        bank = place + (outline - place) * (1 + rng.uniform(2, 8) / radius)
        shapes += [(bank, "bank"), (outline, "pond")]
    if plan.landscape == "coast":
        toward, reach = direction(rng.uniform(0, 2 * np.pi)), 2 * side + 200
        along, t = np.array([-toward[1], toward[0]]), np.linspace(-reach, reach, 240)
        shore = side / 2 + t[:, None] * along + (sway(t, 7.0) + side * rng.uniform(-0.15, 0.3)) * toward
        sea = [shore[-1] + reach * toward, shore[0] + reach * toward]
        beach, dunes = np.cumsum(rng.uniform((6, 12), (16, 34)))
        bays = 4 * np.sin(t / 31 + rng.uniform(0, 7))[:, None] * toward
        for kind, width in (("dune", dunes), ("beach", beach), ("surf", 2.5), ("sea", 0.0)):
            shapes.append((np.concatenate([shore - width * toward + bays * (kind in ("dune", "beach")), sea]), kind))
    return shapes


def _draw_water(plan: Plan, shapes: Shapes) -> None:
    rng, palette = plan.rng, plan.palette
    willows = Stand(rng.choice([0.0, 0.05, 0.25]), plan.broadleaves[0], plan.conifer, 0.0, (1.4, 3.4))
    banks = [
        Patch(plan.verge, rough=0.14, mottle=0.2, stand=willows),
        plan.patch("wetland", palette.marsh(), share=0.5, rough=0.15, mottle=0.3, stand=willows),
        plan.patch("sand", palette.sand(), share=0.6, rough=0.04, mottle=0.12),
    ]
    thicket = Stand(rng.uniform(0.1, 0.4), plan.shrub, plan.conifer, 0.0, (0.6, 1.4))
    shore = {
        "bank": banks[int(rng.choice(3, p=(0.5, 0.35, 0.15)))],
        "dune": plan.patch("scrub", palette.grass(care=0.0), rough=0.14, mottle=0.35, stand=thicket),
        "beach": plan.patch("sand", palette.sand(), share=0.9, rough=0.025, mottle=0.07),
    }
    shore["surf"] = dataclasses.replace(shore["beach"], surface=palette.sand(), mottle=0.05)
    for outline, kind in shapes:
        patch = shore.get(kind) or plan.patch("water", palette.water(), share=0.95, rough=0.025, mottle=0.05)
        if kind == "sea":
            patch = dataclasses.replace(patch, spacing=rng.uniform(4, 12), row_shade=0.025, angle=rng.uniform(0, np.pi))
        number = plan.board.add(patch)
        plan.board.polygon(outline, number)
        if kind not in ("bank", "river"):
            plan.no_roads.append(number)


def _draw_parcel(plan: Plan, parcel: Parcel, water: np.ndarray) -> None:
    """Choose a use, by landscape, settlement and nearness of ``water`` [N 2], and fill the parcel with it."""
    rng = plan.rng
    weights = _SETTLED_WEIGHTS if plan.settled(parcel.centre) else _USE_WEIGHTS[plan.landscape]
    if len(water) and np.hypot(*(water - parcel.centre).T).min() < 55 and rng.random() < 0.35:
        weights = _WET_WEIGHTS
    share = np.array(list(weights.values()), float)
    USES[str(rng.choice(list(weights), p=share / share.sum()))](plan, parcel)


def _draw_cuts(plan: Plan, cuts: list[Cut]) -> None:
    """Roads along the long cuts; tracks, hedges or strips of grass along the others."""
    rng, board, roads = plan.rng, plan.board, []
    verge = board.add(Patch(plan.verge, rough=0.14, mottle=0.15))
    dirt = board.add(Patch(plan.dirt, rough=0.08, mottle=0.1))
    ground, longest = np.array(board.image, np.int32), max((line.length for line in cuts), default=0.0)
    for line in sorted(cuts, key=lambda line: line.length):
        settled = plan.settled(line.ends.mean(0))
        busy = settled or plan.landscape == "industrial"
        wild = plan.landscape in ("forest", "wetland")
        main = (0.25 if wild else 0.5) if line.length > max(230, 0.45 * longest) else 0.0
        shares = ((85, 0.03), (125, 0.8 if busy else 0.03), (230, 0.8 if busy else 0.03 if wild else 0.36))
        paved = next((share for limit, share in shares if line.length < limit), 0.3 if wild else 0.85)
        draw = rng.random()
        ends = _on_land(plan, ends=line.ends, ground=ground)
        if ends is None:
            continue
        if ends is line.ends and draw < max(main, paved):
            width = rng.uniform(7.5, 10.5) if draw < main else rng.uniform(4.2, 6.2)
            roads.append((ends, width, settled))
        elif draw < max(main, paved) + 0.25:
            board.line(ends, dirt, width=rng.uniform(2.4, 3.4), bend=True)
        else:
            board.line(ends, verge, width=rng.uniform(0.8, 2.6), bend=True)
            if rng.random() < 0.35 and not busy:
                _tree_line(plan, ends, spacing=rng.uniform(2.0, 7.0), offset=0.0)
    for ends, width, settled in roads:  # the longest last, so that it passes over the others
        _road(plan, ends, width=width, settled=settled, verge=verge)


def _on_land(plan: Plan, *, ends: np.ndarray, ground: np.ndarray) -> np.ndarray | None:
    """The longest part of a line that stays off ponds, sea and dunes (the very same ``ends`` if all of it does).

    ``ground``: the raster of patches so far. None where less than 15 m remain.
    """
    line = densify(ends, step=5.0)
    pixels = (plan.board.bend(line) * PIXELS_PER_M).astype(np.int32)
    inside = ((pixels >= 0) & (pixels < plan.board.side_px)).all(1)
    blocked = np.zeros(len(line), bool)
    blocked[inside] = np.isin(ground[pixels[inside, 1], pixels[inside, 0]], plan.no_roads)
    if not blocked.any():
        return ends
    stops = np.concatenate([[-1], np.flatnonzero(blocked), [len(line)]])
    longest = int(np.diff(stops).argmax())
    part = line[stops[longest] + 1 : stops[longest + 1]]
    return part[[0, -1]] if len(part) > 3 else None


def _road(plan: Plan, ends: np.ndarray, *, width: float, settled: bool, verge: int) -> None:
    rng, board = plan.rng, plan.board
    line, broad = board.bend(densify(ends)), width > 7
    if settled:
        board.line(line, board.add(Patch(plan.yards[0], rough=0.06, mottle=0.06)), width=width + 3.0)
    else:
        board.line(line, verge, width=width + rng.uniform(1.5, 3.5))
    patch = plan.patch("road", plan.pick(plan.asphalts), share=1.0 if broad else 0.93, rough=0.05, mottle=0.06)
    board.line(line, board.add(patch), width=width)
    if broad:
        paint, dashes = board.add(dataclasses.replace(patch, surface=plan.paint)), densify(line, step=5.0)
        for start in range(0, len(dashes) - 1, 2):
            board.line(dashes[start : start + 2], paint, width=0.3)
    if rng.random() < 0.35:
        _tree_line(plan, ends, spacing=rng.uniform(7, 14), offset=width / 2 + 2.5)
    for _ in range(rng.poisson(np.hypot(*(ends[1] - ends[0])) / 150)):
        k = int(rng.integers(len(line) - 1))
        step = line[k + 1] - line[k]
        angle = float(np.arctan2(step[1], step[0]))
        lane = direction(angle + np.pi / 2) * width / 4 * rng.choice([-1, 1])
        car(plan, line[k] + rng.random() * step + lane, angle=angle, truth=patch.truth, label=patch.label)


def _tree_line(plan: Plan, ends: np.ndarray, *, spacing: float, offset: float) -> None:
    rng, line = plan.rng, plan.board.bend(densify(ends, step=spacing))
    step = np.gradient(line, axis=0)
    normal = np.stack([-step[:, 1], step[:, 0]], -1) / np.maximum(np.hypot(*step.T), 1e-6)[:, None]
    points = line + offset * normal + rng.normal(0, 0.5, line.shape)
    surface = plan.pick([*plan.broadleaves, plan.shrub])
    plan.board.plant(points, radius=rng.uniform(1.4, 3.2, len(points)), surface=surface, shape=ROUND)


def _railway(plan: Plan) -> None:
    rng, board = plan.rng, plan.board
    if rng.random() > _RAILWAY_SHARE[plan.landscape]:
        return
    angle, reach = plan.angle + rng.normal(0, 0.15) + rng.choice([0, np.pi / 2]), 0.9 * plan.side + 40
    along, across = direction(angle), direction(angle + np.pi / 2)
    t = np.linspace(-reach, reach, 60)[:, None]
    line = plan.side * rng.uniform(0.2, 0.8, 2) + t * along + (t / 300) ** 2 * rng.normal(0, 12) * across
    tracks = int(rng.choice([1, 2, 2, 3]))
    bed = plan.patch("railway", plan.palette.ballast(), share=0.95, rough=0.12, mottle=0.08)
    board.line(line, board.add(Patch(plan.verge, rough=0.14, mottle=0.2)), width=4.5 * tracks + 8)
    board.line(line, board.add(bed), width=4.5 * tracks)
    rail = board.add(dataclasses.replace(bed, surface=plan.paint, rough=0.02))  # worn bright
    for track in range(tracks):
        for side in (-0.75, 0.75):
            board.line(line + ((track - (tracks - 1) / 2) * 4.3 + side) * across, rail, width=0.3)


def _grow(plan: Plan, patch: np.ndarray) -> np.ndarray:
    """[N 5] all trees (east, south, radius, surface, shape): planted ones on their patch, and stands at random."""
    rng, board = plan.rng, plan.board
    planted = np.concatenate([np.zeros((0, 6), np.float32), *board.trees])
    under = board.look_up(patch, planted[:, :2])
    taken = [OSM_ID[name] for name in ("road", "building", "water", "railway", "sports_pitch", "sand")]
    free = ~np.isin([p.truth for p in board.patches], taken)
    planted = planted[np.where(planted[:, 5] < 0, free[under], planted[:, 5] == under)]

    ticks = np.arange(-6, plan.side + 6, _TREE_GRID_M)
    places = np.stack(np.meshgrid(ticks, ticks), -1).reshape(-1, 2)
    places = places + rng.uniform(-0.5, 0.5, places.shape) * _TREE_GRID_M
    chance, kind, size = rng.random((3, len(places)), dtype=np.float32)
    none = Stand(0.0, 0, 0, 0.0, (0.0, 0.0))
    stands = [p.stand or none for p in board.patches]
    table = [(s.density, s.round_surface, s.cone_surface, s.cone_share, *s.radius) for s in stands]
    density, broad, cone, cone_share, low, high = np.array(table, np.float32)[board.look_up(patch, places)].T
    # clumps: the conifers of a mixed forest stand together
    clump = sum(np.sin(places @ rng.normal(0, 0.12, 2) + rng.uniform(0, 7)) for _ in range(3)) / 3
    is_cone = kind + 0.35 * clump * ((cone_share > 0) & (cone_share < 1)) < cone_share
    radius = (low + (high - low) * size**1.5) * np.where(is_cone, 0.8, 1.0)
    wild = [places, radius, np.where(is_cone, cone, broad), np.where(is_cone, CONE, ROUND)]
    return np.concatenate([planted[:, :5], np.column_stack(wild)[chance < density]]).astype(np.float32)


def _relief(rng: np.random.Generator, *, extent_cells: int, water: np.ndarray) -> np.ndarray:
    """[P Q] terrain height in metres: rolling ground that falls towards the water [N 2]."""
    ticks = (np.arange(extent_cells) + 0.5) * 10.0
    places = np.stack(np.meshgrid(ticks, ticks), -1).reshape(-1, 2)
    height = np.zeros(len(places))
    for _ in range(5):
        wavelength = rng.uniform(80, 600)
        turn = direction(rng.uniform(0, 2 * np.pi)) * 2 * np.pi / wavelength
        height += rng.normal(0, 0.01 * wavelength) * np.sin(places @ turn + rng.uniform(0, 7))
    if len(water):
        near = np.sqrt(((places[:, None] - water) ** 2).sum(-1).min(1))
        height = height * np.minimum(near / 80, 1) + 0.05 * np.minimum(near, 150)
    return height.reshape(extent_cells, extent_cells).astype(np.float32)


def build(rng: np.random.Generator, *, extent_cells: int) -> Layout:
    """The layout of a scene of ``extent_cells`` x ``extent_cells`` cells, drawn from ``rng`` alone."""
    if not 1 <= extent_cells <= MAX_EXTENT_CELLS:
        raise ValueError(
            f"config.data.scenes.extent_cells: got {extent_cells}; wanted 1 to {MAX_EXTENT_CELLS} cells of 10 m"
        )
    plan = Plan(rng, extent_cells=extent_cells)
    shapes = _plan_water(plan)
    outlines = [outline for outline, kind in shapes if kind in ("river", "pond")]
    water = np.concatenate([np.zeros((0, 2)), *outlines])
    half, axes = 0.72 * plan.side + 30, np.stack([direction(plan.angle), direction(plan.angle + np.pi / 2)])
    square = plan.side / 2 + half * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) @ axes
    low, high = {"forest": (60, 115), "industrial": (65, 115), "hills": (45, 100)}.get(plan.landscape, (42, 105))

    def side_at(place: np.ndarray) -> float:
        return rng.uniform(50, 78) if plan.settled(place) else rng.uniform(low, high)

    parcels, cuts = subdivide(rng, Parcel(square, plan.angle), scene_side=plan.side, side_at=side_at)
    for parcel in parcels:
        _draw_parcel(plan, parcel, water)
    _draw_water(plan, shapes)
    _draw_cuts(plan, cuts)
    _railway(plan)
    for draw in plan.later:
        draw()

    patch = np.array(plan.board.image, np.int32)
    trees = _grow(plan, patch)
    shape = trees[:, 4].astype(np.int64)
    top = np.where(shape == CONE, 3.0 * trees[:, 2] + 4.0, 1.7 * trees[:, 2] + 1.5 * np.minimum(trees[:, 2], 1.5))
    tree, crown_height = stamp_crowns(
        centres=trees[:, :2], radius=trees[:, 2], top=top, shape=shape, side_px=round(plan.side * PIXELS_PER_M)
    )
    return Layout(
        extent_cells=extent_cells,
        landscape=plan.landscape,
        patch=patch,
        patches=plan.board.patches,
        surfaces=plan.palette.surfaces,
        tree=tree,
        crown_height=crown_height,
        tree_surface=np.concatenate([[0], trees[:, 3].astype(np.int64)]),
        tree_shape=np.concatenate([[0], shape]),
        relief=_relief(rng, extent_cells=extent_cells, water=water),
    )
