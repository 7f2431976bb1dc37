"""Counts give numpy's statistics of the whole, however the whole was cut."""

import numpy as np
import pytest

from skysense_jax.ingest.histograms import Histograms, load
from skysense_jax.modalities import MODALITIES

ROWS = tuple(MODALITIES.values())


def _numbers(name):
    rng = np.random.default_rng(0)
    row = MODALITIES[name]
    shape = (3, 40, 30, row.num_bands)
    images = rng.gamma(2, 900, shape) if row.dtype == "uint16" else rng.normal(-12, 5, shape)
    images = rng.integers(0, 256, shape) if row.dtype == "uint8" else images
    return images.astype(row.dtype), rng.random(shape[:3]) < 0.8


@pytest.mark.parametrize("name", ["hr", "s2", "s1"])
def test_statistics_are_numpys_of_valid_pixels(name):
    images, valid = _numbers(name)
    histograms = Histograms(ROWS)
    histograms.add(name, images, valid)
    found, pixels = histograms.summary()[name], images[valid].astype(np.float64)
    assert found["pixels"] == len(pixels)
    np.testing.assert_allclose(found["mean"], pixels.mean(0), rtol=1e-9)
    np.testing.assert_allclose(found["std"], pixels.std(0), rtol=1e-6)
    for percent in (1, 50, 99):
        wanted = np.percentile(pixels, percent, axis=0, method="inverted_cdf")
        np.testing.assert_array_equal(found[f"percentile_{percent}"], wanted)


def test_parts_add_up_to_the_whole_in_any_order(tmp_path):
    images, valid = _numbers("s1")
    whole = Histograms(ROWS)
    whole.add("s1", images, valid)
    parts = [Histograms(ROWS) for _ in range(3)]
    for part, image, mask in zip(parts, images, valid):
        part.add("s1", image, mask)
    for order in ((0, 1, 2), (2, 0, 1)):
        total = Histograms(ROWS)
        for i in order:
            parts[i].save(tmp_path / "part.npz")
            total.merge(load(tmp_path / "part.npz"))
        assert total.summary() == whole.summary()


def test_rows_of_32_bits_are_left_out():
    histograms = Histograms([])
    histograms.add("hr", *_numbers("hr"))
    assert histograms.summary() == {}
