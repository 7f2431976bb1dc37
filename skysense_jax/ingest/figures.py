"""Figures of a sample's pixels by which what is odd can be found later without reading them again.

A builder measures each sample while it has it in memory and writes the figures of a shard beside it. They are numbers
and no verdicts: what is odd about them says suspicions.py. Next: inspect.py.
"""

import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Shaped

from skysense_jax.data.sample import UNDATED, Sample, Series
from skysense_jax.modalities import NATURAL_BANDS, Modality

_FEWEST = 64  # pixels from which shares and percentiles say something
_OF_DATES = {  # figures of which the most telling date counts
    "least_mean": min,
    **dict.fromkeys(("largest_mean", "full_scale", "filled", "clipped"), max),
}

# A row for each sample and row of the modality table that it has. No figure: too few pixels, or none of such bands.
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("shard", pa.string()),
        ("record", pa.int32()),
        ("modality", pa.string()),
        ("days", pa.list_(pa.int32())),  # since 1970-01-01, None where undated
        ("mean", pa.list_(pa.float32())),  # of each band, over clear pixels of all dates
        ("least_mean", pa.float32()),  # of the bands of each date, over its valid pixels
        ("largest_mean", pa.float32()),
        ("single_valued", pa.int32()),  # bands of dates that are one number everywhere
        ("full_scale", pa.float32()),  # largest share of a date's valid pixels at a band's upper limit
        ("filled", pa.float32()),  # largest share of a date's valid pixels of which all bands are at one limit
        ("darkest", pa.float32()),  # 1st percentile of clear pixels' lowest band, third quartile of dates; reflectance
        (
            "clipped",
            pa.float32(),
        ),  # largest share of clear pixels at the lower limit in red, green and blue; reflectance
        ("unseen", pa.float32()),  # largest share of a date's pixels that are not clear
        ("disordered", pa.int32()),  # dates that lie before the one ahead of them
        ("repeated", pa.int32()),  # dates whose pixels are those of another, each one
        ("digest", pa.uint64()),  # of all valid pixels
    ]
)


def measure(sample: Sample, rows: Sequence[Modality], *, shard: str, record: int) -> list[dict[str, Any]]:
    """The figures of a sample that is ``record`` of the file ``shard``: one entry for each of ``rows`` that it has."""
    where = dict(id=sample.id, shard=shard, record=record)
    having = [row for row in rows if row.name in sample.series]
    return [dict(**where, modality=row.name, **_of_series(sample.series[row.name], row)) for row in having]


def write(measured: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Writes a Parquet table of what ``measure`` gave."""
    pq.write_table(pa.Table.from_pylist(list(measured), SCHEMA), path)


def _of_series(series: Series, row: Modality) -> dict[str, Any]:
    clear = series.valid & ~series.cloud
    dates = [_of_date(*date, row) for date in zip(series.images, series.valid, clear)]
    found = {name: [date[name] for date in dates if name in date] for name in _OF_DATES}
    darkest = [
        date["darkest"] for date in dates if "darkest" in date
    ]  # clouds that no mask tells leave a quarter alone
    digests = [date["digest"] for date in dates]
    dated = series.days[series.days != UNDATED]
    return dict(
        days=[None if day == UNDATED else day for day in series.days.tolist()],
        mean=(sum(date["sums"] for date in dates) / clear.sum()).tolist() if clear.any() else None,
        **{name: of(found[name], default=None) for name, of in _OF_DATES.items()},
        darkest=float(np.percentile(darkest, 75, method="higher")) if darkest else None,
        single_valued=sum(date.get("single_valued", 0) for date in dates),
        unseen=float(1 - clear.mean((1, 2)).min()),
        disordered=int((np.diff(dated) < 0).sum()),
        repeated=len(digests) - len(set(digests)),
        digest=int.from_bytes(_digest(*digests), "little"),
    )


def _of_date(
    image: Shaped[np.ndarray, "H W C"], valid: Bool[np.ndarray, "H W"], clear: Bool[np.ndarray, "H W"], row: Modality
) -> dict[str, Any]:
    """Figures of one date, of those of too few pixels none; and the sums of its clear pixels, and a digest."""
    bands = _bands(image, valid)
    seen = bands if valid.sum() == clear.sum() else _bands(image, clear)
    found = dict(sums=seen.sum(1, dtype=np.float64), digest=_digest(bands.tobytes(), np.packbits(valid).tobytes()))
    if bands.shape[1] < _FEWEST:
        return found
    low, high = row.value_range
    means = bands.mean(1, dtype=np.float64)
    at_low, at_high = bands <= low, bands >= high
    found |= dict(
        least_mean=float(means.min()),
        largest_mean=float(means.max()),
        single_valued=int((bands.min(1) == bands.max(1)).sum()),
        full_scale=float(at_high.mean(1).max()),
        filled=float(max(at_low.all(0).mean(), at_high.all(0).mean())),
    )
    if row.photometric == "reflectance" and seen.shape[1] >= _FEWEST:
        found["darkest"] = float(np.percentile(seen.min(0), 1))
        natural = next((names for names in NATURAL_BANDS if set(names) <= set(row.bands)), None)
        if natural:
            found["clipped"] = float((seen[[row.bands.index(name) for name in natural]] <= low).mean(1).min())
    return found


def _bands(image: Shaped[np.ndarray, "H W C"], mask: Bool[np.ndarray, "H W"]) -> Shaped[np.ndarray, "C N"]:
    """The pixels of a mask, band by band, which numpy picks and adds up many times faster than pixel by pixel."""
    return np.stack([np.ascontiguousarray(image[..., band])[mask] for band in range(image.shape[-1])])


def _digest(*parts: bytes) -> bytes:
    total = hashlib.blake2b(digest_size=8)
    for part in parts:
        total.update(part)
    return total.digest()
