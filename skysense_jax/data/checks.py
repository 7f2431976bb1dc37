"""What makes a sample or the fields of a record acceptable, and the error that says why one is not.

Samples are checked when a record is written and when one is decoded whole (records.py). A message names the sample, the
modality, the band and the date, what was got and what was wanted; a wrong unit is called by its name.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import msgpack
import numpy as np

from skysense_jax.data.sample import ORBITS, UNDATED, Sample, Series
from skysense_jax.modalities import OSM, LabelMap, Modality

MAX_EXTENT_CELLS = 256
MAX_DATES = 4096
MAX_DECODED_BYTES = 2**31  # of one modality of one sample, all dates
FIRST_DAY, LAST_DAY = 0, 47846  # 1970-01-01 to 2100-12-31, in days since 1970-01-01


class RecordError(ValueError):
    """A sample or record that cannot be used, with the reason."""


def validate_sample(
    sample: Sample, modalities: Sequence[Modality], labels: LabelMap = OSM, *, of_whole: bool = True
) -> None:
    """Nothing; returns only if the sample is what its modalities' rows, and its label map's classes, promise.

    ``of_whole``: False for a part of a larger image, which may have no valid pixel, or means that no image has.

    Raises:
      RecordError: with what was got, what was wanted, and where.
    """
    where = f"sample {sample.id!r}"
    if not 1 <= sample.extent_cells <= MAX_EXTENT_CELLS:
        raise RecordError(f"{where}: extent of {sample.extent_cells} cells; wanted 1 to {MAX_EXTENT_CELLS}")
    for name, value, limit in (("longitude", sample.longitude, 180), ("latitude", sample.latitude, 90)):
        if value is not None and not abs(value) <= limit:
            raise RecordError(f"{where}: {name} {value}; wanted -{limit} to {limit} degrees, or None")
    table = {modality.name: modality for modality in modalities}
    unknown = sorted(set(sample.series) - set(table))
    if unknown:
        raise RecordError(f"{where}: modalities {unknown} have no row in the table; known: {sorted(table)}")
    for name, series in sample.series.items():
        check_series(series, table[name], sample.extent_cells, f"{where}, modality {name!r}", of_whole=of_whole)
    if of_whole and not any(series.valid.any() for series in sample.series.values()):
        raise RecordError(f"{where}: no modality has a valid pixel (modalities: {sorted(sample.series)})")
    if sample.labels is not None:
        _check_labels(sample.labels, sample.extent_cells, labels, where)


def check_series(series: Series, modality: Modality, extent_cells: int, where: str, *, of_whole: bool = True) -> None:
    """Nothing; returns only if the series is what its row promises; ``of_whole`` as above; raises RecordError."""
    _check_shapes(series, modality, extent_cells, where)
    _check_dates(series, where)
    _check_values(series, modality, where, of_whole=of_whole)


def check_range(
    pixels: np.ndarray, valid: np.ndarray, modality: Modality, where: str, dates: np.ndarray | None = None
) -> None:
    """Nothing; returns only if every valid pixel of [... H W C] lies in the modality's range.

    ``dates`` names the date of each image in the message; raises RecordError.
    """
    low, high = modality.value_range
    with np.errstate(invalid="ignore"):
        if low <= pixels.min() and pixels.max() <= high:  # a NaN compares False
            return
        bad = ~((pixels >= low) & (pixels <= high)) & valid[..., None]
    if bad.any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        date = "" if dates is None else f", date {first[0]} (day {dates[first[0]]})"
        got = "no finite number" if not np.isfinite(pixels[first]) else f"{pixels[first]}"
        raise RecordError(
            f"{where}, band {modality.bands[first[-1]]}{date}: got {got} on {int(bad.sum())} valid pixels; "
            f"wanted {low} to {high} ({modality.unit}), or the pixel marked invalid"
        )


def _check_shapes(series, modality: Modality, extent_cells: int, where: str) -> None:
    images = series.images
    if images.ndim != 4:
        raise RecordError(f"{where}: images of shape {images.shape}; wanted [dates, rows, columns, bands]")
    if images.shape[-1] != modality.num_bands:
        raise RecordError(
            f"{where}: {images.shape[-1]} bands; wanted {modality.num_bands}, in this order: {' '.join(modality.bands)}"
        )
    size = extent_cells * modality.pixels_per_cell
    if images.shape[1:3] != (size, size):
        raise RecordError(
            f"{where}: {images.shape[1]} x {images.shape[2]} pixels; wanted {size} x {size} "
            f"({extent_cells} cells at {modality.pixels_per_cell} pixels per cell)"
        )
    if not 1 <= images.shape[0] <= MAX_DATES:
        raise RecordError(
            f"{where}: {images.shape[0]} dates; wanted 1 to {MAX_DATES} (a modality never seen has no entry)"
        )
    if images.nbytes > MAX_DECODED_BYTES:
        raise RecordError(f"{where}: {images.nbytes} bytes of pixels; wanted at most {MAX_DECODED_BYTES}")
    for name in ("valid", "cloud"):
        mask = getattr(series, name)
        if mask.shape != images.shape[:3] or mask.dtype != bool:
            raise RecordError(
                f"{where}: mask {name!r} is {mask.dtype} of shape {mask.shape}; wanted bool of shape {images.shape[:3]}"
            )


def _check_dates(series, where: str) -> None:
    num_dates = series.images.shape[0]
    days, orbits = series.days, series.orbits
    if days.shape != (num_dates,) or days.dtype != np.int32:
        raise RecordError(f"{where}: days are {days.dtype} of shape {days.shape}; wanted int32 of shape ({num_dates},)")
    dated = days != UNDATED
    wrong = np.flatnonzero(dated & ((days < FIRST_DAY) | (days > LAST_DAY)))
    if wrong.size:
        raise RecordError(
            f"{where}, date {wrong[0]}: day {days[wrong[0]]}; wanted days since 1970-01-01 up to 2100 "
            f"({FIRST_DAY} to {LAST_DAY}), or UNDATED"
        )
    if orbits.shape != (num_dates,) or orbits.dtype != np.uint8 or (orbits >= len(ORBITS)).any():
        raise RecordError(
            f"{where}: orbits {orbits.dtype} of shape {orbits.shape}, values {sorted(set(orbits.ravel().tolist()))}; "
            f"wanted uint8 of shape ({num_dates},), 0 to {len(ORBITS) - 1} for {ORBITS}"
        )
    if not (np.isfinite(series.native_gsd_m) and series.native_gsd_m > 0):
        raise RecordError(f"{where}: native_gsd_m {series.native_gsd_m}; wanted metres above 0")


def _check_values(series, modality: Modality, where: str, *, of_whole: bool) -> None:
    """Finite, in a plausible unit, of the right type, in range: in that order, so that the message names the cause."""
    images = series.images
    if images.dtype.kind not in "uif":
        raise RecordError(f"{where}: dtype {images.dtype}; wanted {modality.dtype}")
    if images.dtype.kind == "f":
        bad = ~np.isfinite(images) & series.valid[..., None]
        if bad.any():
            date, _, _, band = (int(i) for i in np.argwhere(bad)[0])
            raise RecordError(
                f"{where}, band {modality.bands[band]}, date {date} (day {series.days[date]}): {int(bad.sum())} valid "
                "pixels are NaN or infinite; wanted numbers, or the pixels marked invalid"
            )
    low, high = modality.typical_range
    for band, name in enumerate(modality.bands):
        if not of_whole or not series.valid.any():
            break
        mean = float(images[..., band].mean(where=series.valid, dtype=np.float64))
        if not low <= mean <= high:
            raise RecordError(
                f"{where}, band {name}: mean {mean:.4g} over valid pixels; wanted {low} to {high} ({modality.unit}); "
                f"it looks like {modality.wrong_unit_hint}, or nodata that is marked valid"
            )
    if images.dtype != np.dtype(modality.dtype):
        raise RecordError(f"{where}: dtype {images.dtype}; wanted {modality.dtype} ({modality.unit})")
    check_range(images, series.valid, modality, where, series.days)


def _check_labels(labels: np.ndarray, extent_cells: int, known: LabelMap, where: str) -> None:
    size = extent_cells * known.pixels_per_cell
    if labels.shape != (size, size) or labels.dtype != np.uint8:
        raise RecordError(
            f"{where}: labels are {labels.dtype} of shape {labels.shape}; wanted uint8 of shape ({size}, {size}) "
            f"({known.pixels_per_cell} pixels per cell)"
        )
    if labels.max(initial=0) > known.num_classes:
        raise RecordError(
            f"{where}: label id {labels.max()}; wanted 0 (nothing mapped) to {known.num_classes} "
            f"({', '.join(known.classes)})"
        )


def unpack_map(data: bytes, where: str) -> dict:
    """The msgpack map that ``data`` is; raises RecordError."""
    with wrapped(where):
        value = msgpack.unpackb(data, raw=False, strict_map_key=True)  # lengths are bounded by len(data)
    if not isinstance(value, dict):
        raise RecordError(f"{where}: got {type(value).__name__}; wanted a msgpack map")
    return value


@contextlib.contextmanager
def wrapped(where: str):
    """A context in which whatever a library says about damaged bytes becomes a RecordError that names the place.

    Not what says nothing of the bytes: memory that ran out, and files one may not read.
    """
    try:
        yield
    except (MemoryError, PermissionError):
        raise
    except Exception as error:
        raise RecordError(f"{where}: cannot be decoded: {type(error).__name__}: {error}") from error


def field(mapping: dict, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """``mapping[key]``, which must be of ``kind``; raises RecordError."""
    value = mapping.get(key)
    if not isinstance(value, kind):
        raise RecordError(f"{where}: field {key!r} is {value!r:.80}; wanted {kind}")
    return value


def integer_field(mapping: dict, key: str, low: int, high: int, where: str) -> int:
    """``mapping[key]``, an integer of ``low`` to ``high``; raises RecordError."""
    value = mapping.get(key)
    if type(value) is not int or not low <= value <= high:
        raise RecordError(f"{where}: field {key!r} is {value!r:.80}; wanted an integer of {low} to {high}")
    return value


def coordinate_field(mapping: dict, key: str, limit: float, where: str) -> float | None:
    """``mapping[key]``, degrees within +-``limit`` or None; raises RecordError."""
    value = mapping.get(key)
    if value is None:
        return None
    if not (isinstance(value, (int, float)) and abs(value) <= limit):
        raise RecordError(f"{where}: field {key!r} is {value!r:.80}; wanted -{limit} to {limit} degrees or none")
    return float(value)
