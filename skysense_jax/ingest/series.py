"""What a sensor saw of a place: the acquisitions of one row of the table, read, brought to its cells, in its unit.

Sentinel-1 and -2 go through sentinel.py, which knows their units; any other row is read as it is. A date that is of no
use is left out with its reason, and the others go on; a band is never filled in.
Next: windows.py (what is read), rasters.py (how pixels come to cells), build.py (which places).
"""

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike
from rasterio.errors import RasterioError

from skysense_jax.data.checks import RecordError, check_series
from skysense_jax.data.sample import Series
from skysense_jax.ingest import remote, sentinel
from skysense_jax.ingest.acquisitions import Acquisition, Layer, Rejected, by_date
from skysense_jax.ingest.rasters import (
    Raster,
    Refused,
    Square,
    all_positive,
    mosaic,
    native_gsd_m,
    nearest,
)
from skysense_jax.ingest.windows import read_window
from skysense_jax.modalities import Modality


@dataclasses.dataclass(frozen=True)
class Date:
    """One date over a place.

    Attributes:
      image: [H W C] in the row's unit; arbitrary where not ``valid``.
      valid, hidden: [H W] bool.
      native_gsd_m: of its coarsest file.
    """

    image: np.ndarray
    valid: np.ndarray
    hidden: np.ndarray
    native_gsd_m: float


def read_series(
    acquisitions: Sequence[Acquisition],
    square: Square,
    row: Modality,
    *,
    min_clear_share: float,
    signs: Mapping[str, remote.Sign] = types.MappingProxyType({}),
) -> tuple[Series | None, list[Rejected]]:
    """The series of one row over ``square``, None if no date is left, and the dates that were left out.

    Args:
      min_clear_share: of a date's pixels, valid and not hidden, below which it is left out.
      signs: by source what makes addresses of its files those to open now.
    """
    read = {"s2": _read_s2, "s1": _read_s1}.get(row.name, _read_image)
    dates: list[Date] = []
    kept: list[Acquisition] = []
    rejected = []
    of_group = lambda files: read(_signed(files, signs), square, row)  # noqa: E731
    waiting = by_date(acquisitions)
    while waiting:
        group = waiting.pop(0)
        names = ", ".join(acquisition.id for acquisition in group)
        try:
            date = remote.again(functools.partial(of_group, group))
            clear = float((date.valid & ~date.hidden).mean())
            if clear < min_clear_share or not clear:
                told = f"{clear:.1%} of its pixels are clear; wanted {min_clear_share:.1%}"
                raise Refused(f"{told} ({float(date.valid.mean()):.1%} have data)")
        except (Refused, RasterioError, OSError) as error:
            several = len(group) > 1 and not isinstance(error, Refused)
            alone = {a.id: _failure(of_group, a) for a in group} if several else {}
            whole = [acquisition for acquisition in group if acquisition.id in alone and alone[acquisition.id] is None]
            if 0 < len(whole) < len(group):  # what one file has lost is no loss of the others
                rejected += [
                    Rejected("date", name, remote.reason(torn)) for name, torn in alone.items() if torn is not None
                ]
                waiting.insert(0, whole)
            else:
                rejected.append(Rejected("date", names, remote.reason(error)))
            continue
        dates.append(date)
        kept.append(group[0])
    series, unlike = _acceptable(row, square.cells, kept, dates)
    return series, [*rejected, *unlike]


def _acceptable(
    row: Modality, cells: int, acquisitions: Sequence[Acquisition], dates: Sequence[Date]
) -> tuple[Series | None, list[Rejected]]:
    """The series of dates that are what the row promises, and the others: one must not cost those beside it."""

    def joined(some: Sequence[int]) -> tuple[Series | None, str]:
        try:
            series = _joined(row, [acquisitions[i] for i in some], [dates[i] for i in some])
            check_series(series, _hinting(row, acquisitions[some[0]]), cells, row.name)
        except (Refused, RecordError) as error:
            return None, str(error)
        return series, ""

    left, rejected = list(range(len(dates))), []
    if not left:
        return None, []
    series, told = joined(left)
    if series is None and len(dates) > 1:
        reasons = {i: joined([i])[1] for i in left}
        left = [i for i in left if not reasons[i]]
        rejected = [Rejected("date", acquisitions[i].id, reason) for i, reason in reasons.items() if reason]
        if left and rejected:
            series, told = joined(left)
    if series is None and left:
        rejected.append(Rejected("date", ", ".join(acquisitions[i].id for i in left), told))
    return series, rejected


def _hinting(row: Modality, acquisition: Acquisition) -> Modality:
    """The row, with a hint at the field of the list that says a radar's unit: nobody should convert files for it."""
    if acquisition.unit != "dB":
        return row
    told = f'linear power that was taken for dB (wanted unit = "linear" for source {acquisition.source!r} in the list)'
    return dataclasses.replace(row, wrong_unit_hint=told)


def _failure(read: Callable[[Sequence[Acquisition]], Date], acquisition: Acquisition) -> Exception | None:
    """Why the files of an acquisition cannot be read, None if they can: that they show nothing here is no failure."""
    try:
        read([acquisition])
    except Refused:
        return None
    except (RasterioError, OSError) as error:
        return error
    return None


def _signed(group: Sequence[Acquisition], signs: Mapping[str, remote.Sign]) -> list[Acquisition]:
    return [remote.signed(a, signs[a.source]) if a.source in signs else a for a in group]


def _joined(row: Modality, acquisitions: Sequence[Acquisition], dates: Sequence[Date]) -> Series:
    images, valid, hidden = (np.stack([getattr(date, name) for date in dates]) for name in ("image", "valid", "hidden"))
    days = [acquisition.day for acquisition in acquisitions]
    gsd = max(date.native_gsd_m for date in dates)
    if row.name == "s2":
        return sentinel.s2_series(images, valid=valid, cloud=hidden, days=days, offsets=[0] * len(days))
    if row.name == "s1":
        orbits = [acquisition.orbit for acquisition in acquisitions]
        return sentinel.s1_series(images, valid=valid, days=days, orbits=orbits, native_gsd_m=gsd)
    return Series(images, valid, hidden, np.asarray(days, np.int32), np.zeros(len(days), np.uint8), gsd)


def _read_image(group: Sequence[Acquisition], square: Square, row: Modality) -> Date:
    """Pixels beyond the row's range have no data, whatever the file says of them."""
    date, (low, high) = _date(_read(group, square, row), square, row, dtype=row.dtype), row.value_range
    inside = date.valid & ((date.image >= low) & (date.image <= high)).all(-1)
    if date.valid.any() and not inside.any():
        raise Refused(f"none of its pixels lies between {low} and {high} ({row.unit})")
    return dataclasses.replace(date, valid=inside)


def _read_s1(group: Sequence[Acquisition], square: Square, row: Modality) -> Date:
    """dB of the mean power: decibels are made linear before anything is averaged."""

    def power(raster: Raster, acquisition: Acquisition) -> Raster:
        numbers = raster.pixels.astype(np.float64)
        valid = raster.valid & (np.isfinite(numbers) & (numbers != 0)).all(-1)
        linear = 10 ** (np.where(valid[..., None], numbers, 0) / 10) if acquisition.unit == "dB" else numbers
        return dataclasses.replace(raster, pixels=linear, valid=valid & (linear > 0).all(-1))

    date = _date(_read(group, square, row, power), square, row, dtype=np.float32)
    return dataclasses.replace(date, image=sentinel.decibels(date.image))


def _read_s2(group: Sequence[Acquisition], square: Square, row: Modality) -> Date:
    """Numbers without their offset, which may be below 0; SCL by the nearest pixel."""

    def without_offset(raster: Raster, acquisition: Acquisition) -> Raster:
        dn = raster.pixels.astype(np.float32)
        return dataclasses.replace(raster, pixels=dn - acquisition.offset, valid=raster.valid & all_positive(dn))

    date = _date(_read(group, square, row, without_offset), square, row, dtype=np.float32)
    on_cells = functools.partial(_nearest, square=square, pixels_per_cell=row.pixels_per_cell)
    scl = on_cells([acquisition.classes for acquisition in group if acquisition.classes])
    if scl is not None:
        valid, hidden = date.valid & sentinel.valid_by_scl(scl), sentinel.hidden_by_scl(scl)
        date = dataclasses.replace(date, valid=valid, hidden=hidden)
    for percents in map(on_cells, zip(*(acquisition.clouds for acquisition in group if acquisition.clouds))):
        date = dataclasses.replace(date, hidden=date.hidden | sentinel.hidden_by_probability(percents))
    return date


def _nearest(layers: Sequence[Layer], square: Square, pixels_per_cell: int) -> np.ndarray | None:
    """The nearest numbers of what tells clouds; None if there is no such layer. Raises Refused if none reaches here."""
    if not layers:
        return None
    read = [read_window([layer], square, masked=False) for layer in layers]
    reaching = [raster for raster in read if raster is not None]
    if not reaching:
        raise Refused("what tells clouds does not reach this place")
    return nearest(reaching, square, pixels_per_cell=pixels_per_cell)


def _date(
    found: Mapping[tuple[str, ...], Sequence[Raster]], square: Square, row: Modality, *, dtype: DTypeLike
) -> Date:
    """The bands of all sizes on the cells of the square, valid where all of them are."""
    parts = [mosaic(rasters, square, pixels_per_cell=row.pixels_per_cell, dtype=dtype) for rasters in found.values()]
    order = [band for bands in found for band in bands]
    image = np.concatenate([part.pixels for part in parts], axis=-1)[..., [order.index(band) for band in row.bands]]
    valid = np.logical_and.reduce([part.valid for part in parts])
    gsd = max(native_gsd_m(raster, square.crs) for rasters in found.values() for raster in rasters)
    return Date(image, valid, np.zeros_like(valid), gsd)


_Change = Callable[[Raster, Acquisition], Raster]


def _read(
    group: Sequence[Acquisition], square: Square, row: Modality, change: _Change = lambda raster, acquisition: raster
) -> dict[tuple[str, ...], list[Raster]]:
    """For bands whose pixels have one size the rasters of all acquisitions that reach the square, after ``change``."""
    found: dict[tuple[str, ...], list[Raster]] = {}
    for acquisition in group:
        for bands, raster in _of_one_size(acquisition, square, row.bands):
            found.setdefault(bands, []).append(change(raster, acquisition))
    if not found:
        raise Refused("no file reaches this place")
    if sum(map(len, found)) != row.num_bands:
        raise Refused(f"files of one day differ in which bands have pixels of one size: {sorted(found)}")
    return found


def _of_one_size(
    acquisition: Acquisition, square: Square, bands: Sequence[str]
) -> list[tuple[tuple[str, ...], Raster]]:
    """What an acquisition has of the square: a raster for each size of pixels, and its bands; empty if nothing."""
    files: dict[Any, list[str]] = {}
    for band in bands:
        layer = acquisition.layers[band]
        files.setdefault((layer.path, layer.crs, layer.transform), []).append(band)
    sizes: dict[float, list[tuple[list[str], Raster]]] = {}
    for names in files.values():
        raster = read_window([acquisition.layers[name] for name in names], square)
        if raster is None:
            return []
        sizes.setdefault(raster.transform.a, []).append((names, raster))
    return [
        (tuple(name for names, _ in parts for name in names), _stacked([raster for _, raster in parts]))
        for parts in sizes.values()
    ]


def _stacked(rasters: Sequence[Raster]) -> Raster:
    """The bands of several files on one grid as one raster."""
    first = rasters[0]
    if any((r.transform, r.crs, r.valid.shape) != (first.transform, first.crs, first.valid.shape) for r in rasters):
        raise Refused("files with pixels of one size lie on different grids")
    pixels = np.concatenate([raster.pixels for raster in rasters], axis=-1)
    return dataclasses.replace(first, pixels=pixels, valid=np.logical_and.reduce([raster.valid for raster in rasters]))
