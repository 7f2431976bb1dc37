"""Blended windows: equal to a plain sum over all windows, to the image where windows agree, in any order and size."""

import tracemalloc

import numpy as np
import pytest

from skysense_jax.tasks import sliding


def image(rows, columns, per_cell, seed=0):
    return np.random.default_rng(seed).normal(size=(rows * per_cell, columns * per_cell, 3)).astype(np.float32)


def windows_of(picture, cells, per_cell, asked=None, tint=0.0):
    """``predict`` that cuts windows out of a picture; ``tint`` makes windows differ in what they overlap."""
    side = cells * per_cell

    def predict(places):
        if asked is not None:
            asked.extend(places)
        out = np.full((len(places), side, side, 3), 99.0, np.float32)
        for window, (row, column) in zip(out, places):
            part = picture[row * per_cell : row * per_cell + side, column * per_cell : column * per_cell + side]
            window[: part.shape[0], : part.shape[1]] = part + tint * (row + 2 * column)
        return out

    return predict


def whole(strips):
    strips = list(strips)
    ends = np.cumsum([len(strip) for _, strip in strips])
    assert [first for first, _ in strips] == [0, *ends[:-1]]
    return np.concatenate([strip for _, strip in strips])


@pytest.mark.parametrize("weighting", sliding.WEIGHTINGS)
@pytest.mark.parametrize(("rows", "columns", "cells", "overlap"), [(11, 7, 4, 0.5), (9, 9, 4, 0.0), (5, 13, 3, 0.8)])
def test_blend_equals_a_plain_weighted_mean_over_windows(rows, columns, cells, overlap, weighting):
    per_cell, asked, picture = 3, [], image(rows, columns, 3)
    predict = windows_of(picture, cells, per_cell, asked, tint=0.3)
    how = dict(extent=(rows, columns), cells=cells, per_cell=per_cell, overlap=overlap, weighting=weighting)
    got = whole(sliding.blended(predict, **how))
    n = cells * per_cell
    if weighting == "hann":
        line = [0.5 - 0.5 * np.cos(2 * np.pi * (i + 0.5) / n) for i in range(n)]
    else:
        line = [min(i + 0.5, n - i - 0.5) / (n / 2) for i in range(n)]
    total, norm = np.zeros(picture.shape), np.zeros(picture.shape)
    for row, column in reversed(asked):  # in another order
        logits = predict([(row, column)])[0]
        for i in range(n):
            for j in range(n):
                total[row * per_cell + i, column * per_cell + j] += line[i] * line[j] * logits[i, j]
                norm[row * per_cell + i, column * per_cell + j] += line[i] * line[j]
    assert norm.min() > 0
    np.testing.assert_allclose(got, total / norm, atol=1e-5)


@pytest.mark.parametrize("extent", [(1, 1), (3, 2), (4, 4), (5, 4), (23, 6)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.9])
def test_where_windows_agree_the_image_comes_out_edges_included(extent, overlap):
    picture = image(*extent, 2)
    got = whole(sliding.blended(windows_of(picture, 4, 2), extent=extent, cells=4, per_cell=2, overlap=overlap))
    np.testing.assert_allclose(got, picture, atol=1e-6)


def test_one_window_gives_its_own_logits():
    logits = image(4, 4, 5)
    ((first, got),) = sliding.blended(lambda places: logits[None], extent=(4, 4), cells=4, per_cell=5)
    assert first == 0
    np.testing.assert_allclose(got, logits, rtol=1e-6)


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5, 0.99])
def test_starts_cover_the_extent_and_overlap_enough(overlap):
    for extent in range(1, 40):
        for cells in (1, 3, 8):
            found = sliding.starts(extent, cells, overlap)
            assert found[0] == 0
            assert found[-1] == max(extent - cells, 0)
            steps = np.diff(found)
            assert (steps >= 1).all()
            assert (cells - steps >= np.minimum(np.floor(cells * overlap), cells - 1)).all()


def test_memory_is_a_strip_whatever_the_height():
    peaks = []
    for rows in (16, 160):
        picture = image(rows, 64, 4)
        tracemalloc.start()
        for _ in sliding.blended(windows_of(picture, 8, 4), extent=(rows, 64), cells=8, per_cell=4):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]
    assert peaks[1] < picture.nbytes


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"overlap 1; wanted 0 to below 1"):
        next(sliding.blended(lambda places: None, extent=(4, 4), cells=2, overlap=1.0))
    with pytest.raises(ValueError, match=r"weighting 'flat'; wanted one of \('hann', 'linear'\)"):
        next(sliding.blended(lambda places: None, extent=(4, 4), cells=2, weighting="flat"))
