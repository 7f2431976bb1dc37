"""Small random samples that the tests of this folder write, read and cut."""

import dataclasses

import numpy as np

from skysense_jax import modalities
from skysense_jax.data.sample import Sample, Series

ROWS = modalities.select(("hr", "s2", "s1"))


def make_series(rng, row, *, extent_cells, num_dates, first_day=18_000):
    """Valid but for a corner, cloudy in a band that differs per date."""
    size = extent_cells * row.pixels_per_cell
    shape = (num_dates, size, size, len(row.bands))
    noise = rng.normal(size=shape) * np.asarray(row.std) * 0.3
    images = np.clip(np.asarray(row.mean) + noise, *row.value_range).astype(row.dtype)
    valid = np.ones(shape[:3], bool)
    valid[:, : size // 5, : size // 3] = False
    cloud = rng.random(shape[:3]) < 0.2
    days = (first_day + 17 * np.arange(num_dates)).astype(np.int32)
    return Series(images, valid, cloud, days, rng.integers(0, 3, num_dates).astype(np.uint8), 0.5)


def make_sample(seed=0, *, extent_cells=9, dates=None, labels=True, name=None, rows=ROWS):
    rng = np.random.default_rng(seed)
    dates = dict(hr=1, s2=5, s1=3) if dates is None else dates
    series = {
        row.name: make_series(rng, row, extent_cells=extent_cells, num_dates=dates[row.name])
        for row in rows
        if row.name in dates
    }
    size = extent_cells * modalities.OSM.pixels_per_cell
    return Sample(
        id=name or f"sample-{seed}",
        extent_cells=extent_cells,
        series=series,
        labels=rng.integers(0, modalities.OSM.num_classes + 1, (size, size)).astype(np.uint8) if labels else None,
        longitude=11.5,
        latitude=-4.25,
        provenance="drawn at random",
        licence="CC0-1.0",
    )


def with_series(sample, modality, **changes):
    """The sample with fields of one of its series replaced."""
    series = {**sample.series, modality: dataclasses.replace(sample.series[modality], **changes)}
    return dataclasses.replace(sample, series=series)
