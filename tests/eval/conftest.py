"""A small sample with a cloud and a hole in it."""

import numpy as np
import pytest

from skysense_jax import modalities
from skysense_jax.data.sample import UNDATED, Sample, Series

ROWS = modalities.select(("hr", "s2", "s1"))


def _sample(extent, *, without=(), seed=0):
    """Cloud in the north-west cell of the first s2 date, no data in the south-east one of all; a random scene."""
    rng = np.random.default_rng(seed)
    series = {}
    for modality, dates in zip(ROWS, (1, 5, 1)):
        if modality.name in without:
            continue
        side, block = extent * modality.pixels_per_cell, modality.pixels_per_cell
        low, high = modality.typical_range
        images = rng.uniform(low, high, (dates, side, side, modality.num_bands)).astype(modality.dtype)
        valid, cloud = np.ones((dates, side, side), bool), np.zeros((dates, side, side), bool)
        valid[:, -block:, -block:] = False
        cloud[0, :block, :block] = True
        days = np.array([UNDATED, 31, 90, 365 + 1, 400], np.int32)[:dates]
        series[modality.name] = Series(images, valid, cloud, days, np.zeros(dates, np.uint8), 10.0)
    return Sample("s", extent, series)


@pytest.fixture
def make_sample():
    """``make_sample(extent, without=(), seed=0)``."""
    return _sample
