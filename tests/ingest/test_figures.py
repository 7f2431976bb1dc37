"""Figures of a sample's pixels are those of loops over its dates and bands, and a build writes them beside a shard."""

import dataclasses

import numpy as np
import pyarrow.parquet as pq
import pytest

from skysense_jax.data.sample import UNDATED
from skysense_jax.ingest import figures
from tests.data.random_samples import ROWS, make_sample, with_series

PIXELS = ("images", "valid", "cloud")


def _measure(sample):
    return {entry["modality"]: entry for entry in figures.measure(sample, ROWS, shard="train-00000-of-00001", record=7)}


def _loops(series, row):
    """The same figures, date by date and band by band."""
    low, high = row.value_range
    of = dict(means=[], flat=0, full=[], filled=[], darkest=[], clipped=[], unseen=[])
    for image, valid, cloud in zip(series.images, series.valid, series.cloud):
        pixels = [image[i, j].astype(float) for i, j in np.argwhere(valid)]
        clear = [image[i, j].astype(float) for i, j in np.argwhere(valid & ~cloud)]
        for band in range(row.num_bands):
            numbers = [pixel[band] for pixel in pixels]
            of["means"].append(sum(numbers) / len(numbers))
            of["flat"] += len(set(numbers)) == 1
            of["full"].append(sum(number >= high for number in numbers) / len(numbers))
        at_ends = [sum((pixel == end).all() for pixel in pixels) for end in (low, high)]
        of["filled"].append(max(at_ends) / len(pixels))
        of["darkest"].append(np.percentile([pixel.min() for pixel in clear], 1))
        natural = [row.bands.index(name) for name in ("B4", "B3", "B2") if name in row.bands]
        of["clipped"].append(min((sum(p[b] <= low for p in clear) / len(clear) for b in natural), default=None))
        of["unseen"].append(1 - len(clear) / valid.size)
    return of


@pytest.mark.parametrize("name", ["hr", "s2", "s1"])
def test_figures_are_those_of_loops_over_pixels(name):
    sample = make_sample(3, extent_cells=13, dates=dict(hr=1, s2=5, s1=3))
    row = next(row for row in ROWS if row.name == name)
    series = sample.series[name]
    if name == "hr":  # loops over so many pixels take long
        row = dataclasses.replace(row, pixels_per_cell=4)
        series = dataclasses.replace(
            series, **{k: getattr(series, k)[:, ::8, ::8] for k in ("images", "valid", "cloud")}
        )
    series.images[0, 3:9, 4:11] = row.value_range[0]
    series.images[0, 9:, :7] = row.value_range[1]
    series.images[0, :, 10:, 1] = row.value_range[1]
    sample = with_series(sample, name, **{k: getattr(series, k) for k in PIXELS})
    (found,) = figures.measure(sample, (row,), shard="a", record=0)
    wanted = _loops(series, row)
    assert found["least_mean"] == pytest.approx(min(wanted["means"]), rel=1e-3)
    assert found["largest_mean"] == pytest.approx(max(wanted["means"]), rel=1e-3)
    assert found["single_valued"] == wanted["flat"] == 0
    assert found["full_scale"] == pytest.approx(max(wanted["full"]))
    assert found["full_scale"] > 0.1
    assert found["filled"] == pytest.approx(max(wanted["filled"]))
    assert found["filled"] > 0.05
    assert found["unseen"] == pytest.approx(max(wanted["unseen"]))
    clear = series.images[series.valid & ~series.cloud].astype(float)
    np.testing.assert_allclose(found["mean"], clear.mean(0), rtol=1e-6)
    if name == "s2":
        assert found["darkest"] == pytest.approx(sorted(wanted["darkest"])[3])  # of five dates
        assert found["clipped"] == pytest.approx(max(wanted["clipped"]))
        assert found["clipped"] > 0.05
    else:
        assert found["darkest"] is found["clipped"] is None


def test_days_order_and_repeated_dates_are_counted():
    sample = make_sample(extent_cells=16)
    images, days = sample.series["s2"].images.copy(), np.array([30, 20, UNDATED, 50, 40], np.int32)
    valid = sample.series["s2"].valid
    images[3] = np.where(valid[3][..., None], images[1], 7)  # what is not valid does not count
    found = _measure(with_series(sample, "s2", images=images, days=days))["s2"]
    assert found["days"] == [30, 20, None, 50, 40]
    assert found["disordered"] == 2
    assert found["repeated"] == 1
    assert found["record"] == 7


def test_digest_is_of_valid_pixels_alone():
    sample = make_sample(extent_cells=16)
    series = sample.series["s2"]
    same = with_series(sample, "s2", images=np.where(series.valid[..., None], series.images, 9))
    other = series.images.copy()
    other[4, 10, 10, 3] += 1
    digest = lambda sample: _measure(sample)["s2"]["digest"]  # noqa: E731
    assert digest(same) == digest(sample)
    assert digest(with_series(sample, "s2", images=other)) != digest(sample)
    assert digest(with_series(sample, "s2", valid=np.ones_like(series.valid))) != digest(sample)


def test_dates_of_few_pixels_have_no_shares_and_no_clear_pixel_no_mean():
    sample = make_sample(extent_cells=7)
    found = _measure(with_series(sample, "s2", cloud=np.ones_like(sample.series["s2"].cloud)))["s2"]
    assert found["mean"] is found["filled"] is found["darkest"] is None
    assert found["unseen"] == 1


def test_table_of_figures_comes_back_as_it_was(tmp_path):
    entries = figures.measure(make_sample(extent_cells=16), ROWS, shard="a", record=2)
    figures.write(entries, tmp_path / "figures.parquet")
    figures.write([], tmp_path / "none.parquet")
    back = pq.read_table(tmp_path / "figures.parquet").to_pylist()
    assert [entry["digest"] for entry in back] == [entry["digest"] for entry in entries]
    np.testing.assert_allclose(back[1]["mean"], entries[1]["mean"], rtol=1e-6)
    assert pq.read_table(tmp_path / "none.parquet").schema == figures.SCHEMA
