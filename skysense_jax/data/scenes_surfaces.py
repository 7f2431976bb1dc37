"""What the ground of a procedural scene is made of: reflectance over the year, and radar backscatter.

A ``Surface`` is a ground under leaves. Leaves come and go with the day of the year (sums of logistic bumps), dry straw
or litter lies between, flowers may cover them, moisture darkens the ground: the three sensors see the same state.
``Palette`` draws the surfaces of one scene; every scene has its own soil, climate and pigments, so that a class has no
colour of its own. The figures are round numbers of ours, of the size that field spectra and Sentinel-1 series show.
Next: scenes_layout.py (where surfaces lie), scenes_render.py (what sensors make of them).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

CROP_TYPES = ("winter_cereal", "rapeseed", "maize", "sugar_beet")
ROOF_MATERIALS = ("tile", "metal", "concrete")
FOREST_TYPES = ("deciduous", "conifer", "mixed")

# Reflectance in the bands of modality s2: B2 B3 B4 B5 B6 B7 B8 B8A B11 B12.
_ENDMEMBERS = {
    "soil_brown": (0.065, 0.090, 0.125, 0.150, 0.170, 0.190, 0.210, 0.230, 0.310, 0.270),
    "soil_red": (0.050, 0.085, 0.160, 0.195, 0.215, 0.235, 0.255, 0.275, 0.350, 0.310),
    "soil_pale": (0.130, 0.170, 0.215, 0.240, 0.255, 0.270, 0.285, 0.300, 0.370, 0.330),
    "soil_dark": (0.045, 0.058, 0.075, 0.090, 0.105, 0.120, 0.135, 0.150, 0.210, 0.190),
    "leaf": (0.025, 0.059, 0.034, 0.095, 0.290, 0.375, 0.410, 0.430, 0.205, 0.095),
    "needle": (0.020, 0.036, 0.022, 0.055, 0.150, 0.190, 0.215, 0.225, 0.105, 0.048),
    "straw": (0.090, 0.130, 0.180, 0.215, 0.240, 0.260, 0.285, 0.310, 0.350, 0.260),
    "litter": (0.040, 0.055, 0.078, 0.100, 0.130, 0.150, 0.170, 0.190, 0.225, 0.160),
    "flower": (0.050, 0.215, 0.235, 0.270, 0.350, 0.410, 0.450, 0.470, 0.230, 0.125),
    "water_clear": (0.042, 0.038, 0.022, 0.017, 0.012, 0.011, 0.010, 0.009, 0.005, 0.004),
    "water_silt": (0.075, 0.105, 0.115, 0.100, 0.062, 0.058, 0.048, 0.040, 0.012, 0.008),
    "water_algae": (0.030, 0.062, 0.038, 0.058, 0.036, 0.038, 0.034, 0.030, 0.008, 0.005),
    "sand": (0.170, 0.225, 0.275, 0.300, 0.320, 0.335, 0.350, 0.365, 0.430, 0.410),
    "rock": (0.120, 0.140, 0.165, 0.180, 0.190, 0.200, 0.210, 0.220, 0.265, 0.245),
    "asphalt": (0.080, 0.088, 0.096, 0.102, 0.108, 0.113, 0.118, 0.123, 0.145, 0.140),
    "concrete": (0.170, 0.195, 0.215, 0.225, 0.235, 0.242, 0.250, 0.257, 0.290, 0.275),
    "gravel": (0.115, 0.135, 0.155, 0.168, 0.178, 0.186, 0.195, 0.202, 0.245, 0.232),
    "tile_red": (0.050, 0.075, 0.165, 0.205, 0.230, 0.245, 0.265, 0.290, 0.400, 0.395),
    "tile_brown": (0.052, 0.066, 0.105, 0.125, 0.145, 0.158, 0.172, 0.188, 0.280, 0.285),
    "tile_slate": (0.062, 0.067, 0.072, 0.077, 0.082, 0.087, 0.093, 0.100, 0.150, 0.155),
    "metal_bright": (0.340, 0.350, 0.350, 0.345, 0.340, 0.330, 0.325, 0.325, 0.265, 0.240),
    "metal_grey": (0.135, 0.140, 0.142, 0.142, 0.143, 0.142, 0.140, 0.140, 0.120, 0.105),
    "metal_red": (0.050, 0.055, 0.145, 0.180, 0.190, 0.195, 0.200, 0.205, 0.170, 0.145),
    "metal_green": (0.055, 0.100, 0.070, 0.068, 0.075, 0.090, 0.105, 0.115, 0.120, 0.100),
    "metal_blue": (0.140, 0.105, 0.070, 0.068, 0.075, 0.100, 0.125, 0.140, 0.130, 0.105),
    "bitumen": (0.052, 0.056, 0.060, 0.063, 0.067, 0.070, 0.073, 0.076, 0.095, 0.092),
    "clay_court": (0.055, 0.085, 0.185, 0.225, 0.250, 0.265, 0.285, 0.305, 0.400, 0.390),
    "paint": (0.420, 0.430, 0.430, 0.430, 0.430, 0.430, 0.430, 0.430, 0.400, 0.380),
}
SPECTRA = {name: np.array(values, np.float32) for name, values in _ENDMEMBERS.items()}

# VV and VH of the ground when dry, VV and VH of a closed canopy (dB), extinction per unit of leaf area, and the leaf
# area that stems stand for when leaves are gone.
_RADAR = {
    "cereal": (-12.0, -20.5, -17.0, -20.5, 0.28, 0.0),
    "rape": (-12.0, -20.5, -10.5, -15.5, 0.20, 0.0),
    "maize": (-12.0, -20.5, -9.8, -15.8, 0.18, 0.0),
    "beet": (-12.0, -20.5, -9.3, -17.3, 0.25, 0.0),
    "grass": (-12.5, -20.5, -13.8, -20.5, 0.30, 0.4),
    "deciduous": (-10.5, -17.0, -8.6, -13.6, 0.30, 2.6),
    "conifer": (-11.0, -17.5, -9.6, -15.2, 0.30, 3.0),
    "shrub": (-11.5, -19.0, -11.0, -16.5, 0.30, 1.2),
    "vine": (-11.0, -18.5, -10.8, -17.5, 0.25, 0.6),
    "reed": (-10.5, -19.5, -10.5, -17.8, 0.25, 0.8),
    "water": (-20.0, -28.0, -20.0, -28.0, 0.0, 0.0),
    "asphalt": (-16.5, -25.0, -16.5, -25.0, 0.0, 0.0),
    "yard": (-13.0, -21.5, -13.0, -21.5, 0.0, 0.0),
    "roof": (-7.0, -15.5, -7.0, -15.5, 0.0, 0.0),
    "rough": (-9.5, -17.5, -9.5, -17.5, 0.0, 0.0),
    "sand": (-16.5, -26.0, -16.5, -26.0, 0.0, 0.0),
}

_NO_BUMP = (0.0, 0.0, 1.0, 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Surface:
    """One material with its seasons.

    Attributes:
      ground: reflectance of what lies under and between the leaves.
      leaf: reflectance of a closed canopy.
      radar: name of a row of the backscatter table.
      wet: how much moisture changes the ground, 0-1.
      leaf_area: bumps (amount, day up, days to rise, day down, days to fall); their sum is the leaf area.
      dry: bumps of the share of ground that straw, litter or dry leaves cover.
      flower: (share of the canopy, day of the peak).
      cuts: days on which it is mown, 0 = none.
      wind: how much wind raises the backscatter (water), dB per unit.
      flooding: share of the ground that stands under water at the wettest.
    """

    ground: np.ndarray
    leaf: np.ndarray
    radar: str
    wet: float = 0.0
    leaf_area: tuple = ()
    dry: tuple = ()
    flower: tuple[float, float] = (0.0, 0.0)
    cuts: tuple = ()
    wind: float = 0.0
    flooding: float = 0.0


def _bumps(rows: Sequence[tuple], days: np.ndarray) -> np.ndarray:
    """[T, K] sum of each surface's bumps at the days of the year."""
    width = max(1, *(len(row) for row in rows))
    table = np.array([[*row, *[_NO_BUMP] * (width - len(row))] for row in rows], np.float32)  # K bumps 5
    amount, up, rise, down, fall = np.moveaxis(table, -1, 0)
    day = days[:, None, None]

    def logistic(x):
        return 0.5 + 0.5 * np.tanh(2.0 * x)

    return (amount * logistic((day - up) / rise) * logistic((down - day) / fall)).sum(-1)


@dataclasses.dataclass(frozen=True)
class State:
    """All surfaces of a scene on some days: ``ground``, ``leaf`` [T K C] reflectance and the shares of leaves [T K].

    ``leaf`` is the closed canopy with its flowers, ``ground`` what is seen between: soil, straw, litter, water.
    """

    ground: np.ndarray
    leaf: np.ndarray
    leaf_cover: np.ndarray
    leaf_area: np.ndarray

    def reflectance(self, vigour: float = 1.0) -> Float[np.ndarray, "T K C"]:
        """What is seen from above when leaf area is ``vigour`` times the usual."""
        cover = 1.0 - (1.0 - self.leaf_cover) ** vigour
        return self.ground + cover[..., None] * (self.leaf - self.ground)


def state_on(surfaces: Sequence[Surface], *, days: Float[np.ndarray, "T"], moisture: Float[np.ndarray, "T"]) -> State:
    """The surfaces on these days of the year (1-366); ``moisture`` 0 (dry) to 1 (after rain) per day."""
    days = np.asarray(days, np.float32)
    area = np.maximum(_bumps([s.leaf_area for s in surfaces], days), 0.0)
    dry = np.clip(_bumps([s.dry for s in surfaces], days), 0.0, 0.95)
    for row, surface in enumerate(surfaces):
        for cut in surface.cuts:
            since = days - cut
            lost = np.where(since >= 0, 0.7 * np.exp(-np.maximum(since, 0.0) / 16.0), 0.0)
            area[:, row] *= 1.0 - lost
    cover = 1.0 - np.exp(-0.62 * area)
    amount, peak = np.array([s.flower for s in surfaces], np.float32).T
    flowers = amount * np.exp(-0.5 * ((days[:, None] - peak) / 9.0) ** 2)
    wet = np.array([s.wet for s in surfaces], np.float32) * moisture[:, None].astype(np.float32)
    darkening = np.array([0.42] * 8 + [0.52, 0.58], np.float32)
    ground = np.stack([s.ground for s in surfaces]) * (1.0 - wet[..., None] * darkening)
    flooded = np.array([s.flooding for s in surfaces], np.float32) * moisture[:, None].astype(np.float32)
    ground += flooded[..., None] * (SPECTRA["water_silt"] * 0.6 - ground)
    ground += dry[..., None] * (SPECTRA["straw"] * 0.95 - ground)
    leaf = np.stack([s.leaf for s in surfaces]) + flowers[..., None] * (SPECTRA["flower"] - SPECTRA["leaf"])
    return State(ground=ground, leaf=leaf, leaf_cover=cover, leaf_area=area + 0.4 * dry)


def backscatter(
    surfaces: Sequence[Surface],
    state: State,
    *,
    moisture: Float[np.ndarray, "T"],
    wind: Float[np.ndarray, "T"],
) -> Float[np.ndarray, "T K C"]:
    """Mean backscatter VV, VH in linear power: ground seen through a canopy (the water-cloud model).

    Moisture raises the ground by up to 4 dB, wind the water; flooded stems give a double bounce in VV.
    """
    rows = np.array([_RADAR[s.radar] for s in surfaces], np.float32)
    wet = np.array([s.wet for s in surfaces], np.float32) * moisture[:, None]
    stirred = np.array([s.wind for s in surfaces], np.float32) * wind[:, None]
    flooded = np.array([s.flooding for s in surfaces], np.float32) * moisture[:, None]
    area = np.maximum(state.leaf_area, rows[:, 5]) + 0.25 * rows[:, 5]
    through = np.exp(-2.0 * rows[:, 4] * area)[..., None]
    ground_db = rows[:, :2] + (4.0 * wet + stirred)[..., None] + flooded[..., None] * np.float32([2.0, -0.5])
    return 10 ** (ground_db / 10) * through + 10 ** (rows[:, 2:4] / 10) * (1.0 - through)


class Palette:
    """Draws the surfaces of one scene and keeps them in ``surfaces``; methods return an index into that list.

    The scene's soil, spring, drought, pigments and dirt are drawn once; every call varies around them.
    """

    def __init__(self, rng: np.random.Generator):
        self.rng, self.surfaces = rng, []
        kinds = rng.choice(4, 2, replace=False, p=(0.42, 0.18, 0.2, 0.2))
        names = [("soil_brown", "soil_red", "soil_pale", "soil_dark")[kind] for kind in kinds]
        mix = rng.uniform(0.0, 0.35)
        self.soil = ((1 - mix) * SPECTRA[names[0]] + mix * SPECTRA[names[1]]) * rng.uniform(0.75, 1.2)
        self.spring = rng.normal(0.0, 10.0)  # days late
        self.drought = float(np.clip(rng.normal(0.3, 0.4), 0.0, 1.0))
        self.pigment = np.exp(rng.normal(0.0, 0.16))  # visible brightness of leaves
        self.red = np.exp(rng.normal(0.0, 0.12))
        self.infrared = np.exp(rng.normal(0.0, 0.07))
        self.silt = rng.beta(0.8, 1.2)

    def _add(self, *args, **kwargs) -> int:
        self.surfaces.append(Surface(*args, **kwargs))
        return len(self.surfaces) - 1

    def _soil(self, spread: float = 0.12) -> np.ndarray:
        tilt = 1.0 + self.rng.normal(0.0, 0.05) * np.linspace(-1.0, 1.0, 10, dtype=np.float32)
        return self.soil * np.float32(np.exp(self.rng.normal(0.0, spread))) * tilt

    def _leaf(self, name: str = "leaf", spread: float = 0.12) -> np.ndarray:
        visible = self.pigment * np.exp(self.rng.normal(0.0, spread))
        red = self.red * np.exp(self.rng.normal(0.0, spread * 0.8))
        infrared = self.infrared * np.exp(self.rng.normal(0.0, spread * 0.6))
        factors = (visible, visible, visible * red, visible * red, *([infrared] * 4), visible**0.5, visible**0.5)
        return SPECTRA[name] * np.array(factors, np.float32)

    def _fixed(self, *names: str, radar: str, spread: float = 0.15, wet: float = 0.4, **kwargs) -> int:
        """A surface without leaves: a random mixture of ``names``, with the scene's soil as dirt."""
        shares = self.rng.dirichlet(np.full(len(names), 0.6))
        ground = sum(share * SPECTRA[name] for share, name in zip(shares, names))
        ground = (0.92 * ground + 0.08 * self.soil) * np.exp(self.rng.normal(0.0, spread))
        return self._add(ground.astype(np.float32), SPECTRA["leaf"], radar, wet, **kwargs)

    def crop(self, kind: int) -> int:
        """A field of ``CROP_TYPES[kind]``, with its own sowing date, density and what follows the harvest."""
        rng, late = self.rng, self.spring + self.rng.normal(0.0, 6.0)
        dense, harvest = rng.uniform(0.8, 1.2), rng.normal(0.0, 7.0) + 0.5 * self.spring
        flower, name = (0.0, 0.0), CROP_TYPES[kind]
        if name == "winter_cereal":
            cut = 204 + harvest
            area = [(0.8 * dense, -60, 25, 190, 10), (3.6 * dense, 102 + late, 26, 178 + late, 16)]
            area += [(0.7 * dense, 305 + late, 20, 500, 10)] if rng.random() < 0.5 else []
            dry = [(0.85, 176 + late, 12, cut, 3), (0.55, cut, 3, cut + rng.uniform(12, 70), 8)]
            catch = 0.35
        elif name == "rapeseed":
            cut = 196 + harvest
            area = [(1.3 * dense, -100, 25, 80, 20), (3.6 * dense, 78 + late, 22, 172 + late, 18)]
            area += [(1.4 * dense, 262 + late, 16, 500, 10)] if rng.random() < 0.3 else []
            dry = [(0.75, 172 + late, 12, cut, 3), (0.45, cut, 3, cut + rng.uniform(10, 50), 8)]
            flower, catch = (rng.uniform(0.6, 0.9), 121 + late), 0.15
        elif name == "maize":
            cut = 268 + harvest
            area = [(4.0 * dense, 171 + late, 20, 252 + 0.5 * late, 18)]
            dry = [(0.6, 250, 12, cut, 3), (0.35, cut, 3, cut + rng.uniform(15, 200), 8)]
            area += [(0.8, -60, 30, 105 + late, 10)] if rng.random() < 0.3 else []  # winter cover, ploughed in
            catch = 0.0
        else:
            cut = 302 + harvest
            area = [(3.9 * dense, 156 + late, 20, cut, 5)]
            dry = []
            catch = 0.0
        if rng.random() < catch:
            area.append((rng.uniform(1.0, 2.4), cut + rng.uniform(28, 45), 14, rng.choice([330.0, 500.0]), 12))
        radar = {"winter_cereal": "cereal", "rapeseed": "rape", "maize": "maize", "sugar_beet": "beet"}[name]
        return self._add(self._soil(), self._leaf(), radar, 1.0, tuple(area), tuple(dry), flower)

    def grass(self, *, care: float = 0.3) -> int:
        """Meadow (``care`` 0: rough and dry in drought) to lawn (1: watered and short)."""
        rng = self.rng
        drought = self.drought * (1.0 - 0.8 * care) * rng.uniform(0.4, 1.2)
        base, top = rng.uniform(0.7, 1.5) + 0.5 * care, rng.uniform(1.2, 2.6)
        area = ((base, -200, 10, 600, 10), (top, 92 + self.spring, 24, 292, 26))
        area += ((-drought * (base + 0.8 * top), 178, 18, 258, 16),)
        dry = ((0.25 * (1 - care), -200, 10, 95 + self.spring, 20), (0.8 * drought, 180, 18, 265, 18))
        dry += ((0.3 * (1 - care), 300, 20, 600, 10),)
        first = 140 + self.spring + rng.normal(0, 10)
        cuts = (first, first + rng.uniform(35, 60), first + rng.uniform(80, 120)) if rng.random() < 0.5 - care else ()
        return self._add(self._soil(), self._leaf(), "grass", 0.5, area, dry, cuts=cuts)

    def floor(self) -> int:
        """The ground of a forest: litter, some herbs."""
        area = ((0.3, -200, 10, 600, 10), (self.rng.uniform(0.2, 1.4), 88 + self.spring, 18, 290, 20))
        ground = 0.7 * SPECTRA["litter"] * np.exp(self.rng.normal(0, 0.1)) + 0.3 * self._soil()
        return self._add(ground.astype(np.float32), self._leaf(), "deciduous", 0.4, area)

    def tree(self, kind: str) -> int:
        """Crowns: "deciduous", "conifer", "orchard" or "shrub"."""
        rng, late = self.rng, self.spring + self.rng.normal(0.0, 5.0)
        bark = SPECTRA["litter"] * np.float32(np.exp(rng.normal(-0.25, 0.12)))
        if kind == "conifer":
            grow = (0.5, 130 + late, 20, 300, 40)
            young = rng.random() < 0.3  # pale young stands are as bright as dull broad leaves
            leaf = self._leaf("needle", 0.16) * np.float32(1.45 if young else 1.1)
            return self._add(bark, leaf, "conifer", 0.0, ((3.4, -200, 10, 600, 10), grow))
        if kind == "shrub":
            evergreen = rng.uniform(0.2, 1.2)
            area = ((evergreen, -200, 10, 600, 10), (rng.uniform(1.5, 2.8), 105 + late, 20, 296, 20))
            return self._add(bark, self._leaf(spread=0.18) * np.float32(0.85), "shrub", 0.1, area)
        area = ((rng.uniform(3.4, 4.8), 112 + late, 12, 298 + rng.normal(0, 6), 12),)
        turned = ((rng.uniform(0.3, 0.7), 285, 8, 315, 8),)
        flower = (rng.uniform(0.0, 0.25), 102 + late) if kind == "orchard" else (0.0, 0.0)
        shade = np.float32(rng.uniform(0.62, 0.95))  # crowns shade themselves
        return self._add(bark, self._leaf(spread=0.18) * shade, "deciduous", 0.05, area, turned, flower)

    def vines(self) -> int:
        area = ((self.rng.uniform(1.2, 2.2), 138 + self.spring, 16, 292, 14),)
        if self.rng.random() < 0.5:  # grass between the rows
            area += ((self.rng.uniform(0.4, 0.9), -200, 10, 600, 10),)
        return self._add(self._soil(), self._leaf(), "vine", 0.8, area, ((0.2, 280, 10, 310, 10),))

    def water(self) -> int:
        name = "water_algae" if self.rng.random() < 0.3 else "water_clear"
        share = np.float32(np.clip(self.silt + self.rng.normal(0, 0.08), 0, 1))
        ground = ((1 - share) * SPECTRA[name] + share * SPECTRA["water_silt"]) * np.exp(self.rng.normal(0.0, 0.12))
        return self._add(ground.astype(np.float32), SPECTRA["leaf"], "water", wind=self.rng.uniform(3.0, 6.0))

    def marsh(self) -> int:
        """Reeds and sedges in wet soil that floods."""
        rng = self.rng
        area = ((rng.uniform(0.1, 0.5), -200, 10, 600, 10), (rng.uniform(1.2, 3.0), 142 + self.spring, 22, 280, 24))
        dry = ((rng.uniform(0.4, 0.7), -200, 10, 140 + self.spring, 24), (rng.uniform(0.4, 0.7), 278, 20, 600, 10))
        return self._add(
            self._soil() * np.float32(0.6), self._leaf(), "reed", 0.8, area, dry, flooding=rng.uniform(0.3, 0.9)
        )

    def rock(self) -> int:
        weeds = ((self.rng.uniform(0.0, 0.3), 100, 30, 280, 30),)
        return self._fixed("rock", "soil_pale", "gravel", "soil_brown", radar="rough", spread=0.2, leaf_area=weeds)

    def sand(self) -> int:
        return self._fixed("sand", "sand", "soil_pale", radar="sand", wet=0.7)

    def asphalt(self) -> int:
        return self._fixed("asphalt", "bitumen", "gravel", radar="asphalt", spread=0.22)

    def yard(self) -> int:
        return self._fixed("concrete", "asphalt", "gravel", radar="yard", spread=0.2)

    def track(self) -> int:
        return self._add(self._soil(0.2) * np.float32(1.15), self._leaf(), "yard", 0.8, ((0.25, 90, 20, 300, 20),))

    def ballast(self) -> int:
        return self._fixed("gravel", "tile_brown", "asphalt", radar="rough", spread=0.15)

    def court(self) -> int:
        return self._fixed(str(self.rng.choice(["clay_court", "metal_green", "metal_blue"])), radar="asphalt")

    def paint(self) -> int:
        return self._fixed("paint", radar="asphalt", spread=0.05)

    def car(self) -> int:
        names = ["metal_bright", "metal_grey", "bitumen", "metal_red", "metal_blue", "paint"]
        return self._fixed(str(self.rng.choice(names)), radar="roof", wet=0.0)

    def roof(self, material: int) -> int:
        names = {
            "tile": ("tile_red", "tile_red", "tile_brown", "tile_slate"),
            "metal": ("metal_bright", "metal_grey", "metal_grey", "metal_red", "metal_green", "metal_blue"),
            "concrete": ("concrete", "gravel", "bitumen", "asphalt"),
        }[ROOF_MATERIALS[material]]
        return self._fixed(str(self.rng.choice(names)), radar="roof", spread=0.18, wet=0.15)
