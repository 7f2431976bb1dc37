"""What the three sensors see of a layout: aerial RGB, Sentinel-2 reflectance, Sentinel-1 backscatter.

All three read the same surfaces on their own days. Aerial pixels are lit, shaded and coloured one by one; Sentinel
cells are mixtures of the surfaces within them, blurred by the sensor. Every date has a sun, weather and an atmosphere
of its own, and the aerial camera an exposure and white balance, so that no class keeps a colour.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Float16, Float32, Int, UInt8, UInt16
from PIL import Image
from scipy import ndimage

from skysense_jax.data.scenes_board import CONE, PIXELS_PER_M, direction
from skysense_jax.data.scenes_layout import Layout
from skysense_jax.data.scenes_surfaces import State, backscatter, state_on

PER_CELL = 32
LOOKS = 4.4  # of a Sentinel-1 GRD pixel
_RGB = [2, 1, 0]  # bands of s2 that the aerial camera has
_NOISE_FLOOR = 10**-2.6  # of Sentinel-1, linear power
_HAZE = np.array([0.060, 0.045, 0.034, 0.028, 0.020, 0.018, 0.015, 0.013, 0.005, 0.003], np.float32)
_CLOUD = np.array([0.62, 0.60, 0.61, 0.63, 0.64, 0.65, 0.66, 0.66, 0.46, 0.36], np.float32)
_COARSE_BANDS = (3, 4, 5, 7, 8, 9)  # of s2: 20 m pixels


@dataclasses.dataclass(frozen=True)
class Optical:
    """Sentinel-2 images (reflectance x 10000) and where clouds or their shadows hide the ground."""

    images: UInt16[np.ndarray, "T H W C"]
    cloud: Bool[np.ndarray, "T H W"]


def smooth_noise(rng: np.random.Generator, *, side: int, scale: float) -> Float32[np.ndarray, "H W"]:
    """Noise of about unit variance with structures of ``scale`` pixels."""
    grid = rng.standard_normal((int(side / scale) + 3,) * 2, dtype=np.float32)
    box = (0.7, 0.7, 0.7 + side / scale, 0.7 + side / scale)
    return np.asarray(Image.fromarray(grid).resize((side, side), Image.Resampling.BICUBIC, box=box)) * 1.35


def sun_position(*, day_of_year: float, latitude: float, hour: float) -> tuple[float, float]:
    """Elevation, and direction towards the sun (radians from east towards south), at ``hour`` from local noon."""
    tilt = np.deg2rad(-23.44 * np.cos(2 * np.pi * (day_of_year + 10) / 365))
    place, turn = np.deg2rad(latitude), np.deg2rad(15 * hour)
    up = np.sin(place) * np.sin(tilt) + np.cos(place) * np.cos(tilt) * np.cos(turn)
    west = np.cos(tilt) * np.sin(turn)
    south = np.sin(place) * np.cos(tilt) * np.cos(turn) - np.cos(place) * np.sin(tilt)
    return float(max(np.arcsin(up), np.deg2rad(12))), float(np.arctan2(south, -west))


def surface_shares(layout: Layout) -> Float32[np.ndarray, "P Q K"]:
    """Share of each cell that each surface covers, seen from above."""
    extent, count = layout.extent_cells, len(layout.surfaces)
    ground = layout.column("surface", np.int64)[layout.patch]
    seen = np.where(layout.tree > 0, layout.tree_surface[layout.tree], ground)
    index = np.arange(extent * PER_CELL) // PER_CELL
    seen += (index[:, None] * extent + index) * count
    shares = np.bincount(seen.ravel(), minlength=extent * extent * count)
    return (shares.reshape(extent, extent, count) / PER_CELL**2).astype(np.float32)


def _relief_shade(layout: Layout, elevation: float, toward: float) -> np.ndarray:
    """[P Q] brightness of the terrain relative to flat ground."""
    if layout.extent_cells < 2:
        return np.ones_like(layout.relief)
    south, east = np.gradient(layout.relief, 10.0)
    to_east, to_south = direction(toward)
    return np.clip(1.0 - 0.8 * (east * to_east + south * to_south) / np.tan(elevation), 0.5, 1.5).astype(np.float32)


def cast_shadow(height: Float[np.ndarray, "H W"], *, elevation: float, toward: float) -> Bool[np.ndarray, "H W"]:
    """Whether something towards the sun hides it; ``height`` in metres at the pixels of ``hr``.

    A pixel is dark if any pixel on its way to the sun stands higher than the ray. The maximum over the way is taken in
    steps of 1, 2, 4 ... pixels, each on the result of the last.
    """
    drop = np.tan(elevation) / PIXELS_PER_M  # of the ray, metres a pixel
    best, step, length = height.copy(), direction(toward), 1
    rows, columns = height.shape
    while length <= min(height.max() / drop, rows, columns):  # best holds the ``length`` pixels nearest to the pixel
        down, right = (round(length * s) for s in step[::-1])
        here = np.s_[max(0, -down) : rows - max(0, down), max(0, -right) : columns - max(0, right)]
        there = np.s_[max(0, down) : rows - max(0, -down), max(0, right) : columns - max(0, -right)]
        best[here] = np.maximum(best[here], best[there] - length * drop)
        length *= 2
    return best > height + 0.25


def _crowns(layout: Layout, rng: np.random.Generator, rgb: np.ndarray, state: State, toward: float) -> None:
    """Paint crowns over the ground ``rgb`` [3 N] in place: leafless ones let it through."""
    pixels = np.flatnonzero(layout.tree)
    tree = layout.tree.ravel()[pixels]
    surface = layout.tree_surface
    leafy = state.leaf_cover[0, surface]
    own = np.exp(rng.normal(0, 0.11, (2, len(surface)))).astype(np.float32)
    own[1] **= 0.6  # hue: red and blue against green
    bare, leaf = state.ground[0][surface][:, _RGB].T, state.leaf[0][surface][:, _RGB].T
    colour = (bare + leafy * (leaf - bare)) * own[0] * np.stack([own[1], np.ones_like(own[1]), own[1]])
    height = layout.crown_height
    shift = np.round(2.3 * direction(toward)[::-1]).astype(int)
    rise = (height - np.roll(height, -shift, (0, 1))).ravel()[pixels]
    steep = np.where(layout.tree_shape == CONE, 0.26, 0.32).astype(np.float32)[tree]
    light = np.clip(0.94 + steep * rise, 0.45, 1.45) * (1 + 0.1 * rng.standard_normal(len(pixels), dtype=np.float32))
    opaque = (0.5 + 0.5 * leafy).astype(np.float32)[tree]
    for band in range(3):
        ground = rgb[band, pixels]
        rgb[band, pixels] = ground + opaque * (colour[band].astype(np.float32)[tree] * light - ground)


def render_hr(
    layout: Layout, rng: np.random.Generator, *, day_of_year: float, latitude: float
) -> UInt8[np.ndarray, "H W C"]:
    """One aerial image on that day: rows, crowns, roofs, shadows; then haze, exposure, white balance, blur, noise."""
    side, patch = layout.extent_cells * PER_CELL, layout.patch.astype(np.intp)
    elevation, toward = sun_position(day_of_year=day_of_year, latitude=latitude, hour=rng.uniform(-2.5, 2.5))
    elevation = max(elevation, np.deg2rad(22))  # flights wait for the sun
    state = state_on(
        layout.surfaces, days=np.array([day_of_year], np.float32), moisture=rng.beta(1.2, 2.5, 1).astype(np.float32)
    )

    def look_up(values: np.ndarray) -> np.ndarray:
        return np.take(np.asarray(values, np.float32), patch)

    surface = layout.column("surface", np.intp)
    fine = rng.standard_normal((side, side), dtype=np.float32)
    coarse = [smooth_noise(rng, side=side, scale=scale) for scale in (4.0, 13.0, 55.0)]
    blotch = 0.35 * coarse[0] + 0.5 * coarse[1] + 0.65 * coarse[2]

    # across the rows, metres
    angle = layout.column("angle")
    metres = (np.arange(side, dtype=np.float32) + 0.5) / PIXELS_PER_M
    across = metres[:, None] * look_up(np.cos(angle)) - metres * look_up(np.sin(angle))
    spacing, tramlines = layout.column("spacing"), layout.column("tramlines")
    wave = np.cos(across * look_up(np.where(spacing > 0, 2 * np.pi / np.maximum(spacing, 0.1), 0)))
    passes = across * look_up(np.where(tramlines > 0, 1 / np.maximum(tramlines, 1), 0)) + 0.5
    wheels = np.abs(np.abs(passes - np.rint(passes)) * look_up(tramlines) - 0.95) < 0.28

    mottle, rough = look_up(layout.column("mottle")), look_up(layout.column("rough"))
    cover = look_up(state.leaf_cover[0, surface])
    cover = cover * (1 + look_up(layout.column("row_cover")) * wave + 1.3 * mottle * coarse[1] + rough * fine)
    cover = np.clip(cover, 0, 1)
    cover[wheels] *= 0.35
    under, leaf = state.ground[0][surface][:, _RGB], state.leaf[0][surface][:, _RGB]
    bright = 1 + look_up(layout.column("row_shade")) * wave + mottle * blotch + rough * (0.75 * fine + 0.5 * coarse[0])
    bright = np.maximum(bright, 0.25)
    rgb = np.empty((3, side * side), np.float32)
    for band in range(3):
        ground = look_up(under[:, band])
        rgb[band] = ((ground + cover * (look_up(leaf[:, band]) - ground)) * bright).ravel()
    _crowns(layout, rng, rgb, state, toward)

    height = np.maximum(look_up(layout.column("height")), layout.crown_height)
    tilt = layout.column("tilt")
    facing = (tilt @ direction(toward) / np.tan(elevation) + 1) / np.sqrt(1 + (tilt**2).sum(-1))
    relief = Image.fromarray(_relief_shade(layout, elevation, toward)).resize((side, side), Image.Resampling.BICUBIC)
    lit = np.where(cast_shadow(height, elevation=elevation, toward=toward), 0.06, look_up(np.clip(facing, 0.05, 1.8)))
    lit = (lit * np.asarray(relief)).ravel()
    sky = rng.uniform(0.22, 0.45)
    for band, blue in enumerate((0.9, 1.0, 1.15)):
        rgb[band] *= sky * blue + (1 - sky * blue) * lit
    return _expose(rgb.reshape(3, side, side), rng)


def _expose(rgb: Float[np.ndarray, "C H W"], rng: np.random.Generator) -> UInt8[np.ndarray, "H W C"]:
    """What camera and operator make of radiance (overwritten): haze, white balance, tone curve, noise, blur."""
    haze = rng.exponential(0.012) * np.array([0.7, 0.9, 1.2]) + rng.uniform(0, 0.006)
    white = rng.uniform(0.2, 0.37) * np.exp(rng.normal(0, 0.05, 3))
    saturation, curve = rng.uniform(0.65, 1.2), rng.uniform(0.55, 1.0)
    grain = rng.uniform(0.004, 0.018)
    weight = np.float32(rng.uniform(0.08, 0.24))  # of the neighbours, in a 3-tap blur
    side = rgb.shape[-1]
    offset = rng.integers(0, 8 * side, 3)  # one field of noise, read from another place for every band
    noise = grain * rng.standard_normal((side + 8) * side, dtype=np.float32)
    grey = np.zeros_like(rgb[0])
    for band in range(3):
        rgb[band] = (rgb[band] + np.float32(haze[band])) / np.float32(white[band])
        grey += rgb[band] / 3
    image = np.empty((side, side, 3), np.uint8)
    for band in range(3):
        values = rgb[band]
        values -= grey
        values *= np.float32(saturation)
        values += grey
        np.clip(values, 0, 1.4, out=values)
        values = np.float32(curve) * np.sqrt(values) + np.float32(1 - curve) * values
        values += noise[offset[band] : offset[band] + side * side].reshape(side, side)
        padded = np.pad(values, 1, mode="edge")
        rows = (1 - 2 * weight) * padded[1:-1] + weight * (padded[:-2] + padded[2:])
        values = (1 - 2 * weight) * rows[:, 1:-1] + weight * (rows[:, :-2] + rows[:, 2:])
        image[..., band] = np.clip(values * 235 + 6, 0, 255)
    return image


def _blur(images: np.ndarray, *, side_weight: float, shift: np.ndarray) -> np.ndarray:
    """[T P Q C] images seen by pixels that take ``side_weight`` from each neighbour, moved by ``shift`` [T 2] cells."""
    for axis in (1, 2):
        move = shift[:, axis - 1, None, None, None]
        size = images.shape[axis]
        before = np.take(images, np.maximum(np.arange(size) - 1, 0), axis=axis)
        after = np.take(images, np.minimum(np.arange(size) + 1, size - 1), axis=axis)
        images = images * (1 - 2 * side_weight) + (side_weight - move) * before + (side_weight + move) * after
    return images


def _clouds(rng: np.random.Generator, *, extent: int, toward: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Thickness 0-1, shadow 0-1, and mask [P Q] of a broken cloud cover."""
    pad = 12
    field = smooth_noise(rng, side=extent + 2 * pad, scale=rng.uniform(6, 26))
    field += 0.35 * smooth_noise(rng, side=extent + 2 * pad, scale=3.0)
    thickness = np.clip((field - rng.uniform(-1.6, 1.2)) * rng.uniform(0.25, 1.4), 0, 1)
    sunward = np.round(rng.uniform(3, pad) * direction(toward)[::-1]).astype(int)
    here = np.s_[pad : pad + extent, pad : pad + extent]
    shadow = np.roll(thickness, -sunward, (0, 1))[here]
    thickness = thickness[here]
    mask = ndimage.binary_dilation((thickness > 0.12) | (shadow > 0.3), iterations=1)
    return thickness, shadow, mask


def render_s2(
    layout: Layout,
    rng: np.random.Generator,
    *,
    shares: Float32[np.ndarray, "P Q K"],
    days_of_year: Float[np.ndarray, "T"],
    latitude: float,
) -> Optical:
    """Sentinel-2 on these days: mixtures of the cell's surfaces, with weather, atmosphere, clouds and noise."""
    dates, extent = len(days_of_year), layout.extent_cells
    moisture = rng.beta(1.2, 2.0, dates).astype(np.float32)
    state = state_on(layout.surfaces, days=days_of_year, moisture=moisture)
    vigour = np.clip(0.5 + 0.3 * smooth_noise(rng, side=extent, scale=5.0), 0, 1)[..., None]
    flat = shares.reshape(extent * extent, -1)
    weak, strong = (
        (flat @ np.moveaxis(state.reflectance(v), 1, 0).reshape(flat.shape[1], -1)).reshape(extent, extent, dates, 10)
        for v in (0.7, 1.35)
    )
    images = np.moveaxis(weak + vigour[..., None] * (strong - weak), 2, 0).astype(np.float32)

    clouded = np.zeros((dates, extent, extent), bool)
    shift = rng.normal(0, 0.05, (dates, 2)).clip(-0.1, 0.1).astype(np.float32)
    fine = [band for band in range(10) if band not in _COARSE_BANDS]
    images[..., fine] = _blur(images[..., fine], side_weight=0.12, shift=shift)
    images[..., _COARSE_BANDS] = _blur(images[..., _COARSE_BANDS], side_weight=0.27, shift=shift)
    for date, day in enumerate(days_of_year):
        elevation, toward = sun_position(day_of_year=float(day), latitude=latitude, hour=-1.0)
        image = images[date]
        image *= (0.6 + 0.4 * _relief_shade(layout, max(elevation, 0.5), toward))[..., None]
        image *= np.float32(np.exp(rng.normal(0, 0.035)))
        image += np.float32(rng.exponential(0.25)) * _HAZE
        if rng.random() < 0.42:
            thickness, shadow, clouded[date] = _clouds(rng, extent=extent, toward=toward)
            image *= 1 - 0.6 * shadow[..., None]
            image += 0.95 * thickness[..., None] * (_CLOUD * np.float32(rng.uniform(0.75, 1.15)) - image)
    images *= 1 + 0.012 * rng.standard_normal(images.shape, dtype=np.float32)
    images += 0.0015 * rng.standard_normal(images.shape, dtype=np.float32)
    return Optical(np.clip(np.rint(images * 10000), 1, 20000).astype(np.uint16), clouded)


def speckle(power: Float[np.ndarray, "..."], rng: np.random.Generator, *, looks: float = LOOKS) -> np.ndarray:
    """``power`` (linear) times gamma noise of mean 1 and variance 1 / looks."""
    return power * rng.gamma(looks, 1 / looks, power.shape)


def _echoes(layout: Layout, look: float) -> Float32[np.ndarray, "P Q"]:
    """Mean power that walls of buildings send back by double bounce, strongest where they face the radar."""
    extent = layout.extent_cells
    off = np.mod(layout.column("angle") - look + np.pi / 4, np.pi / 2) - np.pi / 4  # walls stand at right angles
    facing = 0.12 + 1.6 * np.exp(-0.5 * (off / np.deg2rad(10)) ** 2)
    echo = np.where(layout.column("roof") > 0, facing * layout.column("height") / 8, 0.0).astype(np.float32)
    blocks = echo[layout.patch].reshape(extent, PER_CELL, extent, PER_CELL)
    return blocks.mean((1, 3))


def render_s1(
    layout: Layout,
    rng: np.random.Generator,
    *,
    shares: Float32[np.ndarray, "P Q K"],
    days_of_year: Float[np.ndarray, "T"],
    descending: Bool[np.ndarray, "T"],
) -> Float16[np.ndarray, "T H W C"]:
    """Sentinel-1 on these days, VV and VH in dB: surfaces, walls, slopes and the orbit's incidence, then speckle."""
    dates, extent = len(days_of_year), layout.extent_cells
    moisture, wind = rng.beta(1.2, 1.8, dates).astype(np.float32), rng.normal(0, 0.8, dates).astype(np.float32)
    state = state_on(layout.surfaces, days=days_of_year, moisture=moisture)
    mixed = backscatter(layout.surfaces, state, moisture=moisture, wind=wind)
    power = np.einsum("pqk,tkc->tpqc", shares, mixed, optimize=True)
    south, east = np.gradient(layout.relief, 10.0) if extent > 1 else np.zeros((2, 1, 1))
    for is_descending in (False, True):
        # the radar looks to the right of its track, eastwards when it ascends; slopes that rise that way face it
        look = float(np.deg2rad(190 if is_descending else -10))
        incidence, along = rng.uniform(31, 45), direction(look)
        echoes = _echoes(layout, look)[..., None] * np.array([1.0, 0.13])
        slope = np.clip(1 + 2.0 * (east * along[0] + south * along[1]), 0.5, 2.0)[..., None]
        factor = slope * 10 ** (-0.014 * (incidence - 38))
        dates_of = descending == is_descending
        power[dates_of] = (power[dates_of] + echoes) * factor
    power *= 10 ** (rng.normal(0, 0.02, (dates, 1, 1, 1)))
    power = _blur(power, side_weight=0.16, shift=np.zeros((dates, 2))) + _NOISE_FLOOR * np.array([0.3, 0.6])
    decibels = 10 * np.log10(speckle(power, rng))
    return np.clip(decibels, -60, 30).astype(np.float16)


def sample_raster(layout: Layout, values: Int[np.ndarray, " N"], *, pixels_per_cell: int) -> UInt8[np.ndarray, "H W"]:
    """``values`` of the patches at the centres of a coarser grid."""
    step = PER_CELL // pixels_per_cell
    return values.astype(np.uint8)[layout.patch[step // 2 :: step, step // 2 :: step]]
