"""Sentinel-1 and Sentinel-2 in the table's units: offsets, decibels, clouds, dates, and checks of band names.

``s2_series`` and ``s1_series`` are the only ways into a ``Series``: nodata is masked first, an offset is subtracted
once, dates without data and repeated deliveries are dropped. Nothing here opens a file.
Sources: Sentinel-2 Products Specification (product names, SCL classes, the offset of processing baseline 04.00).
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int, Num, Shaped, UInt8, UInt16

from skysense_jax.data.sample import ORBITS, Series
from skysense_jax.ingest.rasters import Refused
from skysense_jax.modalities import MODALITIES

BASELINE_OFFSET = 1000  # in the numbers of processing baseline 04.00 and later
S1_FLOOR_DB = -50.0  # below any echo; IW's noise lies at about -25 dB
HIDDEN_PERCENT = 10  # cloud or snow probability from which the ground counts as hidden

# Names of bands by band of the row: Sentinel's own, and the common names.
NAMES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "s2": dict(
        B2=("B02", "blue"),
        B3=("B03", "green"),
        B4=("B04", "red"),
        B5=("B05", "rededge1"),
        B6=("B06", "rededge2"),
        B7=("B07", "rededge3"),
        B8=("B08", "nir"),
        B8A=("B8A", "nir08"),
        B11=("B11", "swir16"),
        B12=("B12", "swir22"),
    ),
    "s1": dict(VV=("VV",), VH=("VH",)),
}
CLASSES = "SCL"  # Level-2A's scene classification

_FIRST_OFFSET_BASELINE = 4.0
_MOST_LINEAR = 1e3  # linear backscatter of IW; digital numbers of amplitudes are in the hundreds on average
NOT_DARK = 900  # darkest surfaces of a clear image lie below this, unless the offset is in the numbers
_SCL_INVALID = (0, 1)  # no data, saturated or defective
_SCL_HIDDEN = (3, 8, 9, 10, 11)  # cloud shadow, cloud of medium and of high probability, thin cirrus, snow

# Medians over land, water, snow and clouds keep these ratios, since the bands lie side by side in the spectrum.
_BAND_RATIOS = (("B8A", "B8", 0.6, 1.6), ("B8A", "B7", 0.6, 1.9), ("B12", "B11", 0.1, 1.5))
_ENOUGH_LIGHT = 300  # a ratio of two smaller medians says nothing


def product_day(product_id: str) -> int:
    """Days since 1970-01-01 of the start of acquisition in a Sentinel product's name; raises Refused without one."""
    match = re.search(r"_(\d{4})(\d{2})(\d{2})T\d{6}_", product_id)
    if match is None:
        raise Refused(f"product name {product_id!r} holds no acquisition time such as _20200102T102421_")
    return int(np.datetime64("-".join(match.groups()), "D").astype(int))


def offset_of_baseline(baseline: float) -> int:
    """What to subtract from the numbers of a Level-2A product of this processing baseline, such as 4.0."""
    return BASELINE_OFFSET if baseline >= _FIRST_OFFSET_BASELINE else 0


def offset_from_product(product_id: str) -> int:
    """What to subtract from the numbers of a Level-2A product, 0 or ``BASELINE_OFFSET``, by its processing baseline.

    The baseline decides and not the date: old acquisitions were processed again with later baselines.
    """
    return offset_of_baseline(baseline_from_product(product_id))


def baseline_from_product(product_id: str) -> float:
    """The processing baseline in the name of a Level-2A product, such as 4.0.

    Raises:
      Refused: no baseline in the name, or not Level-2A.
    """
    match = re.match(r"S2[A-Z]_MSI(L\d[A-C])_\d{8}T\d{6}_N(\d{4})_", product_id)
    if match is None or match[1] != "L2A":
        raise Refused(f"product name {product_id!r}; wanted S2?_MSIL2A_<time>_N<baseline>_... of a surface product")
    return int(match[2]) / 100


def offset_from_toa(
    surface: Mapping[str, Shaped[np.ndarray, "H W"]], top_of_atmosphere: Mapping[str, Shaped[np.ndarray, "H W"]]
) -> int:
    """What to subtract from surface numbers of unknown baseline, by the same image at the top of the atmosphere.

    Cirrus band B10 is near 0 below a clear sky, so its darkest pixels show the offset of the Level-1C numbers; in B11
    and B12 the atmosphere changes little, so their difference shows whether the surface numbers carry one too.

    Raises:
      Refused: the two images cannot be told to agree with or without an offset.
    """
    toa_offset = BASELINE_OFFSET if np.percentile(top_of_atmosphere["B10"], 1) > NOT_DARK else 0
    excess = [float(np.median(surface[b] - (top_of_atmosphere[b].astype(float) - toa_offset))) for b in ("B11", "B12")]
    nearest = {BASELINE_OFFSET * round(e / BASELINE_OFFSET) for e in excess}
    if len(nearest) != 1 or not nearest <= {0, BASELINE_OFFSET}:
        raise Refused(
            f"unknown processing baseline: B11 and B12 exceed the Level-1C image by {excess[0]:.0f} and "
            f"{excess[1]:.0f}; wanted both near 0 or near {BASELINE_OFFSET}"
        )
    return nearest.pop()


def check_no_offset(dn: Num[np.ndarray, "T H W C"], clear: Bool[np.ndarray, "T H W"]) -> None:
    """Nothing; returns only if dark ground shows that numbers of unknown baseline carry no offset.

    Raises:
      Refused: the darkest hundredth of the clear pixels is bright, or nothing is clear.
    """
    dark = np.percentile(dn.min(-1)[clear], 1) if clear.any() else np.inf
    if dark > NOT_DARK:
        raise Refused(
            f"unknown processing baseline, and the darkest hundredth of the clear pixels is at {dark:.0f}; wanted "
            f"below {NOT_DARK}: the offset of {BASELINE_OFFSET} may be in the numbers"
        )


def remove_offset(
    dn: Num[np.ndarray, "T H W C"], valid: Bool[np.ndarray, "T H W"], offsets: Int[np.ndarray, "T"]
) -> UInt16[np.ndarray, "T H W C"]:
    """Reflectance x 10000, 1 to 20000 where valid, else 0; subtracts each date's offset, so call it once."""
    low, high = MODALITIES["s2"].value_range
    shifted = np.rint(np.where(valid[..., None], dn, 0)).astype(np.int64) - offsets[:, None, None, None]
    return np.where(valid[..., None], np.clip(shifted, low, high), 0).astype(np.uint16)


def decibels(power: Num[np.ndarray, "*N"]) -> Num[np.ndarray, "*N"]:
    """10 log10 of linear power, never below the floor; NaN where the power is no number above 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        db = np.maximum(10 * np.log10(power), S1_FLOOR_DB)
    return np.where(np.isfinite(power) & (power > 0), db, np.nan)


def unit_of(numbers: Num[np.ndarray, "N"]) -> str:
    """ "linear" or "dB", by the range of a radar's numbers that are not nodata; raises Refused if they are neither."""
    numbers = numbers[numbers != 0]
    if not len(numbers):
        raise Refused("no valid pixel")
    low, middle, high = np.percentile(numbers, (1, 50, 99))
    if low > 0 and high < _MOST_LINEAR and middle < 10:
        return "linear"
    if low >= -60 and middle < 0 and high <= 30:
        return "dB"
    raise Refused(
        f"the unit cannot be told: half of the pixels lie below {middle:.4g}, all but two hundredths from {low:.4g} to "
        f"{high:.4g}; wanted calibrated linear power or dB (say which: unit = ...), no digital numbers"
    )


def valid_by_scl(scl: UInt8[np.ndarray, "*N"]) -> Bool[np.ndarray, "*N"]:
    """Where Level-2A's scene classification says that there are usable numbers."""
    return ~np.isin(scl, _SCL_INVALID)


def hidden_by_scl(scl: UInt8[np.ndarray, "*N"]) -> Bool[np.ndarray, "*N"]:
    """Where Level-2A's scene classification says cloud, thin cirrus, cloud shadow or snow.

    Snow counts: it covers the ground, and the processor takes bright ice clouds for snow, in June too.
    """
    return np.isin(scl, _SCL_HIDDEN)


def hidden_by_probability(*percents: Num[np.ndarray, "*N"]) -> Bool[np.ndarray, "*N"]:
    """Where any of the probabilities (0-100; cloud, and snow for the reason above) hides the ground."""
    return np.max(np.stack(percents), axis=0) >= HIDDEN_PERCENT


def band_contradictions(medians: Mapping[str, float | int]) -> list[str]:
    """How medians by band name ("B8A") contradict the spectrum; empty if they may be right.

    Finds shifted or swapped names in the near and short-wave infrared, where neighbours are alike.
    """
    found = []
    for upper, lower, least, most in _BAND_RATIOS:
        if upper in medians and lower in medians and max(medians[upper], medians[lower]) >= _ENOUGH_LIGHT:
            ratio = medians[upper] / max(medians[lower], 1.0)
            if not least <= ratio <= most:
                found.append(
                    f"{upper} / {lower} is {ratio:.2f} ({medians[upper]:.0f} / {medians[lower]:.0f}), "
                    f"wanted {least} to {most}"
                )
    return found


def check_bands(medians: Mapping[str, float | int]) -> None:
    """Nothing; returns only if the values are what the band names say. Raises Refused."""
    found = band_contradictions(medians)
    if found:
        raise Refused(f"band names contradict the values, as if names were shifted or swapped: {'; '.join(found)}")


def s2_series(
    dn: Num[np.ndarray, "T H W C"],
    *,
    valid: Bool[np.ndarray, "T H W"],
    cloud: Bool[np.ndarray, "T H W"],
    days: Sequence[int],
    offsets: Sequence[int],
) -> Series:
    """The Sentinel-2 series of a sample, dates in order, those without a valid pixel dropped.

    Args:
      dn: numbers of the product, bands in the table's order.
      days: since 1970-01-01, or UNDATED.
      offsets: per date what to subtract.

    Raises:
      Refused: no date is left, or band names contradict the values.
    """
    images = remove_offset(dn, valid, np.asarray(offsets))
    seen = valid & ~cloud if (valid & ~cloud).any() else valid
    if seen.any():
        check_bands(dict(zip(MODALITIES["s2"].bands, np.median(images[seen], axis=0))))
    return _series(images, valid, valid & cloud, days, np.zeros(len(images), np.uint8), 10.0)


def s1_series(
    db: Num[np.ndarray, "T H W C"],
    *,
    valid: Bool[np.ndarray, "T H W"],
    days: Sequence[int],
    orbits: Sequence[str],
    native_gsd_m: float = 10.0,
) -> Series:
    """The Sentinel-1 series of a sample (dB, bands VV, VH), dates in order.

    Dates without a valid pixel are dropped, and those that repeat another of the same day to the last number: one
    acquisition delivered as two products. Raises Refused if no date is left.
    """
    low, high = MODALITIES["s1"].value_range
    images = np.clip(np.where(valid[..., None], db, low), low, high).astype(np.float16)
    orbit_ids = np.array([ORBITS.index(orbit) for orbit in orbits], np.uint8)
    return _series(images, valid, np.zeros_like(valid), days, orbit_ids, native_gsd_m)


def _series(
    images: np.ndarray,
    valid: np.ndarray,
    cloud: np.ndarray,
    days: Sequence[int],
    orbits: np.ndarray,
    native_gsd_m: float,
) -> Series:
    days = np.asarray(days, np.int32)
    kept = []
    for date in np.argsort(days, kind="stable"):
        same_day = [k for k in kept if days[k] == days[date] and orbits[k] == orbits[date]]
        if valid[date].any() and not any(np.array_equal(images[date], images[k]) for k in same_day):
            kept.append(int(date))
    if not kept:
        raise Refused(f"none of the {len(days)} dates has a valid pixel")
    return Series(
        images=images[kept],
        valid=valid[kept],
        cloud=cloud[kept],
        days=days[kept],
        orbits=orbits[kept],
        native_gsd_m=native_gsd_m,
    )
