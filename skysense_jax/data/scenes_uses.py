"""What fills a parcel of a procedural scene, one function a use: ``USES[name](plan, parcel)``.

Fields and stands are drawn at once; buildings, cars and pitches are put into ``plan.later``, when the roads are there.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from skysense_jax.data.scenes_board import CONE, ROUND, Patch, Stand, blob, direction, rectangle
from skysense_jax.data.scenes_plan import OSM_ID, Parcel, Plan, subdivide
from skysense_jax.data.scenes_surfaces import CROP_TYPES, FOREST_TYPES, ROOF_MATERIALS

TILE, METAL, CONCRETE = range(len(ROOF_MATERIALS))


def _farmland(plan: Plan, parcel: Parcel) -> None:
    rng, kind = plan.rng, int(plan.rng.choice(len(CROP_TYPES), p=plan.crop_share))
    spacing, cover, shade = [(1.5, 0.10, 0.03), (1.9, 0.10, 0.03), (1.5, 0.45, 0.05), (1.0, 0.40, 0.04)][kind]
    look = dict(spacing=spacing * rng.uniform(0.95, 1.6), row_cover=cover * rng.uniform(0.6, 1.2), row_shade=shade)
    sprayed = CROP_TYPES[kind] != "maize" or rng.random() < 0.4
    look |= dict(tramlines=float(rng.choice([18.0, 21.0, 24.0])) if sprayed else 0.0, angle=plan.row_angle(parcel))
    plan.fill(parcel, plan.patch("farmland", plan.palette.crop(kind), crop=kind + 1, rough=0.10, mottle=0.13, **look))


def _grassland(plan: Plan, parcel: Parcel) -> None:
    rng, swaths = plan.rng, {}
    if rng.random() < 0.3:
        swaths = dict(spacing=rng.uniform(4, 8), row_shade=0.05, angle=plan.row_angle(parcel))
    stand = Stand(rng.choice([0.0, 0.0, 0.01, 0.03]), plan.broadleaves[0], plan.conifer, 0.0, (1.5, 4.0))
    surface = plan.palette.grass(care=rng.uniform(0.0, 0.5))
    plan.fill(parcel, plan.patch("grassland", surface, rough=0.12, mottle=0.15, stand=stand, **swaths))


def _forest(plan: Plan, parcel: Parcel) -> None:
    rng, kind = plan.rng, int(plan.rng.choice(len(FOREST_TYPES), p=plan.forest_share))
    cone_share = {"deciduous": 0.0, "conifer": 1.0, "mixed": rng.uniform(0.35, 0.65)}[FOREST_TYPES[kind]]
    young = rng.uniform(1.5, 2.8)
    density, radius = (0.9, (young, young + 1.2)) if rng.random() < 0.5 else (0.62, (2.2, rng.uniform(4.0, 5.5)))
    stand = Stand(density, plan.palette.tree("deciduous"), plan.palette.tree("conifer"), cone_share, radius)
    planted = cone_share == 1.0 and rng.random() < 0.5
    patch = plan.patch("forest", plan.palette.floor(), forest=kind + 1, rough=0.2, mottle=0.2)
    number = plan.fill(parcel, patch if planted else dataclasses.replace(patch, stand=stand))
    if planted:
        between = rng.uniform(3.0, 4.2)
        _plant_rows(plan, parcel, number, stand.cone_surface, CONE, between=between, within=2.6, radius=(1.4, 2.0))


def _scrub(plan: Plan, parcel: Parcel) -> None:
    rng = plan.rng
    stand = Stand(rng.uniform(0.3, 0.75), plan.palette.tree("shrub"), plan.conifer, rng.choice([0.0, 0.05]), (0.7, 2.0))
    plan.fill(parcel, plan.patch("scrub", plan.palette.grass(care=0.0), rough=0.15, mottle=0.22, stand=stand))


def _plant_rows(
    plan: Plan,
    parcel: Parcel,
    patch: int,
    surface: int,
    shape: int,
    *,
    between: float,
    within: float,
    radius: tuple[float, float],
) -> None:
    """Trees in rows ``between`` metres apart along the parcel's longer side, one every ``within`` metres."""
    rng, angle = plan.rng, plan.row_angle(parcel)
    centre = plan.board.bend(parcel.centre[None])[0]
    reach = 0.75 * parcel.size.max() + 10
    u, v = np.meshgrid(np.arange(-reach, reach, within), np.arange(-reach, reach, between))
    places = np.stack([u.ravel(), v.ravel()], -1) + rng.normal(0, 0.1 * within, (u.size, 2))
    places = places[rng.random(len(places)) > 0.05]
    points = centre + places @ np.stack([direction(angle), direction(angle + np.pi / 2)])
    points = points[((points > -5) & (points < plan.side + 5)).all(1)]
    plan.board.plant(points, radius=rng.uniform(*radius, len(points)), surface=surface, shape=shape, patch=patch)


def _orchard(plan: Plan, parcel: Parcel) -> None:
    rng, between = plan.rng, plan.rng.uniform(3.8, 6.5)
    surface = plan.palette.grass(care=0.3) if rng.random() < 0.7 else plan.palette.track()
    look = dict(spacing=between, row_shade=0.05, angle=plan.row_angle(parcel), rough=0.12, mottle=0.12)
    number = plan.fill(parcel, plan.patch("orchard", surface, **look))
    size, tree = rng.uniform(0.24, 0.38) * between, plan.palette.tree("orchard")
    within = max(1.6, size * rng.uniform(1.5, 2.4))
    radius = (0.85 * size, 1.15 * size)
    _plant_rows(plan, parcel, number, tree, ROUND, between=between, within=within, radius=radius)


def _vineyard(plan: Plan, parcel: Parcel) -> None:
    rng = plan.rng
    look = dict(spacing=rng.uniform(1.9, 2.9), row_cover=rng.uniform(0.7, 1.1), row_shade=rng.uniform(0.1, 0.18))
    look |= dict(angle=plan.row_angle(parcel), rough=0.1, mottle=0.1)
    plan.fill(parcel, plan.patch("vineyard", plan.palette.vines(), **look))


def _islets(plan: Plan, parcel: Parcel, number: int, *, count: float, radius: tuple[float, float], make) -> None:
    """Blobs of other patches (``make()``) that lie wholly on patch ``number``."""
    rng = plan.rng
    for _ in range(rng.poisson(count)):
        place = parcel.centre + rng.normal(0, 0.2, 2) * parcel.size
        outline = blob(rng, plan.board.bend(place[None])[0], radius=rng.uniform(*radius))
        if plan.board.fits(outline[np.arange(4) * len(outline) // 4], number):
            plan.board.polygon(outline, plan.board.add(make()))


def _wetland(plan: Plan, parcel: Parcel) -> None:
    rng = plan.rng
    stand = Stand(rng.choice([0.0, 0.03, 0.1]), plan.shrub, plan.conifer, 0.0, (0.8, 2.4))
    patch = plan.patch("wetland", plan.palette.marsh(), rough=0.16, mottle=0.3, stand=stand)

    def other() -> Patch:  # stands of other reeds, and pools that the map counts as wetland
        if rng.random() < 0.4:
            return Patch(plan.palette.water(), OSM_ID["water"], patch.label, rough=0.02, mottle=0.04)
        return dataclasses.replace(patch, surface=plan.palette.marsh())

    _islets(plan, parcel, plan.fill(parcel, patch), count=3.5, radius=(3.0, 13.0), make=other)


def _mineral(plan: Plan, parcel: Parcel, name: str, make: Callable[[], int], **look) -> None:
    """Ground without soil, with heaps and pits of slightly other material."""
    patch = plan.patch(name, make(), **look)

    def heap() -> Patch:
        return dataclasses.replace(patch, surface=make(), tilt=tuple(plan.rng.normal(0, 0.2, 2)))

    _islets(plan, parcel, plan.fill(parcel, patch), count=3.5, radius=(3.0, 12.0), make=heap)


def _bare_ground(plan: Plan, parcel: Parcel) -> None:
    _mineral(plan, parcel, "bare_ground", plan.palette.rock, rough=0.16, mottle=0.2)


def _sand(plan: Plan, parcel: Parcel) -> None:
    ripples = dict(spacing=plan.rng.uniform(5, 11), row_shade=0.05, angle=plan.rng.uniform(0, np.pi))
    _mineral(plan, parcel, "sand", plan.palette.sand, rough=0.03, mottle=0.10, **ripples)


def building(
    plan: Plan,
    *,
    centre: np.ndarray,
    angle: float,
    length: float,
    width: float,
    height: float,
    roof: str,
    material: int,
    below: int,
) -> bool:
    """Whether a building was drawn: it must lie on patch ``below``, whose label it keeps where it is not mapped.

    ``roof``: "gable" or "hip" (ridge along the length) or "flat".
    """
    rng, board = plan.rng, plan.board
    corners = rectangle(centre, angle=angle, length=length, width=width)
    if not board.fits(corners, below):
        return False
    mapped = rng.random() < plan.mapped_buildings
    rough, mottle = {TILE: (0.09, 0.07), METAL: (0.02, 0.05), CONCRETE: (0.045, 0.12)}[material]
    base = Patch(
        plan.pick(plan.roofs[material]),
        OSM_ID["building"],
        OSM_ID["building"] if mapped else board.patches[below].label,
        roof=material + 1,
        height=height,
        angle=angle + np.pi / 2,  # seams run down the slope
        rough=rough,
        mottle=mottle,
    )
    if material == METAL:
        base = dataclasses.replace(base, spacing=rng.uniform(1.0, 1.5), row_shade=rng.uniform(0.04, 0.12))
    along, across = direction(angle), direction(angle + np.pi / 2)
    if roof == "flat":
        board.polygon(corners, board.add(base))
        if material == CONCRETE:  # a parapet, and boxes of machines
            rim = board.add(dataclasses.replace(base, surface=plan.yards[0], height=height + 0.5, mottle=0.02))
            board.line(np.concatenate([corners, corners[:1]]), rim, width=0.4)
        for _ in range(rng.poisson(length * width / 250)):
            spot = centre + along * rng.uniform(-0.4, 0.4) * length + across * rng.uniform(-0.4, 0.4) * width
            box = rectangle(spot, angle=angle, length=rng.uniform(1, 3.5), width=rng.uniform(1, 2.5))
            unit = dataclasses.replace(base, surface=plan.pick(plan.roofs[METAL]), height=height + 1.5, spacing=0.0)
            board.polygon(box, board.add(unit))
        return True
    slope = rng.uniform(0.45, 0.85) if material == TILE else rng.uniform(0.12, 0.4)
    inset = 0.5 * min(width, 0.8 * length) if roof == "hip" else 0.0
    a, b, c, d = corners
    west, east = centre - along * (length / 2 - inset), centre + along * (length / 2 - inset)
    facets = [((a, b, east, west), -across), ((d, c, east, west), across)]
    if roof == "hip":
        facets += [((a, d, west), -along), ((b, c, east), along)]
    for outline, faces in facets:
        facet = dataclasses.replace(base, tilt=tuple(slope * faces))
        board.polygon(np.stack(outline), board.add(facet))
    if material == TILE and rng.random() < 0.6:
        spot = centre + along * rng.uniform(-0.3, 0.3) * length + across * 0.15 * width
        chimney = dataclasses.replace(base, height=height + 2.0, surface=plan.yards[1])
        board.polygon(rectangle(spot, angle=angle, length=0.9, width=0.9), board.add(chimney))
    if rng.random() < 0.12:  # solar panels
        spot = centre + across * 0.24 * width
        panel = dataclasses.replace(base, surface=plan.asphalts[0], tilt=tuple(slope * across), spacing=1.2)
        shape = rectangle(spot, angle=angle, length=length * rng.uniform(0.3, 0.7), width=0.3 * width)
        board.polygon(shape, board.add(dataclasses.replace(panel, row_shade=0.1)))
    return True


def car(plan: Plan, centre: np.ndarray, *, angle: float, truth: int, label: int) -> None:
    """A car or van; the ground under it stays what it is."""
    long = plan.rng.uniform(3.9, 5.0) if plan.rng.random() < 0.9 else 8.0
    patch = Patch(plan.pick(plan.cars), truth, label, height=1.5, rough=0.05)
    plan.board.polygon(rectangle(centre, angle=angle, length=long, width=1.9), plan.board.add(patch))


def _house(plan: Plan, lot: Parcel, number: int) -> None:
    """A house on its lot, with a drive, and sometimes a shed."""
    rng, board = plan.rng, plan.board
    centre = board.bend(lot.centre[None])[0] + rng.normal(0, 1.5, 2)
    angle = board.bent_angle(lot.centre, lot.angle + rng.choice([0, np.pi / 2]))
    drive = board.add(Patch(plan.pick(plan.yards), board.patches[number].truth, board.patches[number].label))
    length, width = rng.uniform(9.5, 15), rng.uniform(7, 10.5)
    material = int(rng.choice(3, p=(0.7, 0.12, 0.18)))
    roof = "flat" if material == CONCRETE else str(rng.choice(["gable", "hip"], p=(0.7, 0.3)))
    for scale in (1.0, 0.8, 0.65):
        if building(
            plan, centre=centre, angle=angle, length=scale * length, width=scale * width, height=rng.uniform(4.5, 8),
            roof=roof, material=material, below=number,
        ):  # fmt: skip
            break
    away = direction(angle + rng.choice([0, np.pi / 2, np.pi]))
    spot = centre + away * rng.uniform(9, 13)
    if rng.random() < 0.6:
        path = rectangle(spot, angle=float(np.arctan2(away[1], away[0])), length=7.0, width=3.0)
        if board.fits(path, number):
            board.polygon(path, drive)
            if rng.random() < 0.5:
                truth = board.patches[number]
                car(plan, spot, angle=float(np.arctan2(away[1], away[0])), truth=truth.truth, label=truth.label)
    elif rng.random() < 0.5:
        size = rng.uniform(2.5, 5.5, 2)
        building(
            plan, centre=spot, angle=angle, length=size[0], width=size[1], height=2.6, roof="flat",
            material=int(rng.choice([METAL, CONCRETE])), below=number,
        )  # fmt: skip


def _residential(plan: Plan, parcel: Parcel) -> None:
    rng = plan.rng
    label = plan.label("residential")
    if rng.random() < 0.2:  # blocks of flats among lawns
        stand = Stand(rng.uniform(0.03, 0.12), plan.broadleaves[0], plan.conifer, 0.1, (1.5, 3.8))
        patch = Patch(plan.pick(plan.lawns), OSM_ID["residential"], label, rough=0.1, mottle=0.12, stand=stand)
        number = plan.fill(parcel, patch)
        plan.later.append(
            lambda: _halls(
                plan,
                parcel,
                number,
                count=3,
                length=(22.0, 46.0),
                width=(10.0, 14.0),
                height=(9.0, 20.0),
                materials=(0.25, 0.1, 0.65),
            )
        )
        return
    lots, _ = subdivide(rng, parcel, scene_side=plan.side, side_at=lambda _: rng.uniform(17, 25), turn_share=0.0)
    wooded = rng.uniform(0.01, 0.12)
    for lot in lots:
        kinds = (plan.pick(plan.broadleaves), plan.shrub if rng.random() < 0.5 else plan.broadleaves[1])
        stand = Stand(wooded * rng.uniform(0.3, 2), kinds[0], plan.conifer, rng.choice([0.0, 0.2]), (0.8, 3.4))
        paved = rng.random() < 0.12
        surface = plan.pick(plan.yards if paved else plan.lawns)
        patch = Patch(surface, OSM_ID["residential"], label, rough=0.1, mottle=0.15, stand=stand)
        number = plan.fill(lot, patch)
        if rng.random() < 0.9:
            plan.later.append(lambda lot=lot, number=number: _house(plan, lot, number))
        hedge = plan.board.bend(lot.polygon[[0, 1]])
        if rng.random() < 0.4:
            steps = np.arange(0, 1, 1.3 / max(np.hypot(*(hedge[1] - hedge[0])), 2.0))[:, None]
            points = hedge[0] + steps * (hedge[1] - hedge[0])
            plan.board.plant(points, radius=rng.uniform(0.6, 1.0, len(points)), surface=plan.shrub, shape=ROUND)


def _halls(
    plan: Plan,
    parcel: Parcel,
    number: int,
    *,
    count: int,
    length: tuple[float, float],
    width: tuple[float, float],
    height: tuple[float, float],
    materials: tuple[float, float, float],
) -> None:
    """Large buildings side by side on patch ``number``, as many as find room."""
    rng, built = plan.rng, 0
    angle = plan.board.bent_angle(parcel.centre, parcel.long_angle)
    for attempt in range(5 * count):
        place = parcel.centre + rng.uniform(-0.34, 0.34, 2) * parcel.size if attempt else parcel.centre
        material = int(rng.choice(3, p=materials))
        roof = "flat" if material == CONCRETE or (material == METAL and rng.random() < 0.4) else "gable"
        shrink = 0.92**attempt
        built += building(
            plan, centre=plan.board.bend(place[None])[0], angle=angle + rng.choice([0, np.pi / 2], p=(0.8, 0.2)),
            length=max(8.0, rng.uniform(*length) * shrink), width=max(6.0, rng.uniform(*width) * shrink),
            height=rng.uniform(*height), roof=roof, material=material, below=number,
        )  # fmt: skip
        if built == count:
            return


def _farmstead(plan: Plan, parcel: Parcel) -> None:
    rng = plan.rng
    stand = Stand(0.04, plan.broadleaves[1], plan.conifer, 0.1, (1.5, 4.0))
    patch = plan.patch("residential", plan.pick(plan.lawns + plan.yards), rough=0.12, mottle=0.15, stand=stand)
    number = plan.fill(parcel, patch)
    sizes = dict(length=(12.0, 32.0), width=(8.0, 15.0), height=(5.0, 9.0), materials=(0.45, 0.45, 0.1))
    plan.later.append(lambda: _halls(plan, parcel, number, count=int(rng.integers(3, 6)), **sizes))


def _industrial(plan: Plan, parcel: Parcel) -> None:
    rng = plan.rng
    surface = plan.pick(plan.yards + plan.asphalts)
    patch = plan.patch("industrial", surface, rough=0.06, mottle=0.12)
    number = plan.fill(parcel, patch)
    sizes = dict(length=(20.0, 62.0), width=(14.0, 36.0), height=(6.0, 14.0), materials=(0.06, 0.52, 0.42))

    def furnish() -> None:
        _halls(plan, parcel, number, count=int(rng.integers(2, 5)), **sizes)
        angle = plan.board.bent_angle(parcel.centre, parcel.long_angle)
        for _ in range(rng.poisson(2.0)):  # rows of parked cars, containers, goods
            start = plan.board.bend((parcel.centre + rng.uniform(-0.4, 0.4, 2) * parcel.size)[None])[0]
            for k in range(int(rng.integers(4, 14))):
                spot = start + 2.7 * k * direction(angle)
                if rng.random() < 0.75 and plan.board.fits(rectangle(spot, angle=angle, length=2.2, width=5.0), number):
                    car(plan, spot, angle=angle + np.pi / 2, truth=patch.truth, label=patch.label)

    plan.later.append(furnish)


def _sports_pitch(plan: Plan, parcel: Parcel) -> None:
    rng, board = plan.rng, plan.board
    stand = Stand(0.02, plan.broadleaves[0], plan.conifer, 0.0, (1.5, 3.5))
    around = plan.patch("grassland", plan.pick(plan.lawns), share=0.3, rough=0.12, mottle=0.15, stand=stand)
    number = plan.fill(parcel, around)
    court = rng.random() < 0.25
    surface = plan.palette.court() if court else plan.palette.grass(care=1.0)
    angle, centre = plan.row_angle(parcel), board.bend(parcel.centre[None])[0]
    label = plan.label("sports_pitch", share=0.92)

    def draw() -> None:
        for scale in (1.0, 0.85, 0.72, 0.6, 0.5, 0.4):
            length, width = scale * rng.uniform(85, 100), scale * rng.uniform(54, 66)
            if board.fits(rectangle(centre, angle=angle, length=length + 4, width=width + 4), number):
                break
        else:
            return
        grass = Patch(surface, OSM_ID["sports_pitch"], label, rough=0.05, mottle=0.05)
        if not court and rng.random() < 0.6:
            grass = dataclasses.replace(grass, angle=angle + np.pi / 2, spacing=rng.uniform(8, 12), row_shade=0.07)
        outline = rectangle(centre, angle=angle, length=length, width=width)
        board.polygon(outline, board.add(grass))
        line = board.add(dataclasses.replace(grass, surface=plan.paint, spacing=0.0))
        inner = rectangle(centre, angle=angle, length=length - 5, width=width - 5)
        strokes = [np.concatenate([inner, inner[:1]])]
        strokes.append(np.stack([0.5 * (inner[0] + inner[1]), 0.5 * (inner[2] + inner[3])]))
        turn = np.linspace(0, 2 * np.pi, 25)
        strokes.append(centre + 0.14 * width * np.stack([np.cos(turn), np.sin(turn)], -1))
        for end in (-1, 1):
            spot = centre + end * (0.5 * length - 2.5 - 0.08 * length) * direction(angle)
            box = rectangle(spot, angle=angle, length=0.16 * length, width=0.55 * width)
            strokes.append(np.concatenate([box, box[:1]]))
        for stroke in strokes:
            board.line(stroke, line, width=0.3)

    plan.later.append(draw)


USES: dict[str, Callable[[Plan, Parcel], None]] = {
    "farmland": _farmland,
    "grassland": _grassland,
    "forest": _forest,
    "scrub": _scrub,
    "orchard": _orchard,
    "vineyard": _vineyard,
    "wetland": _wetland,
    "bare_ground": _bare_ground,
    "sand": _sand,
    "residential": _residential,
    "farmstead": _farmstead,
    "industrial": _industrial,
    "sports_pitch": _sports_pitch,
}
