"""Units of the Sentinel sensors against the product specification, worked out by hand."""

import math

import numpy as np
import pytest

from skysense_jax.data.sample import UNDATED
from skysense_jax.ingest import sentinel
from skysense_jax.ingest.rasters import Refused, double

S2_OLD = "S2A_MSIL2A_20200102T102421_N0213_R065_T32UNC_20200102T115419"
S2_NEW = "S2B_MSIL2A_20200102T102421_N0500_R065_T32UNC_20230502T115419"  # processed again
S1 = "S1B_IW_GRDH_1SDV_20200229T053252_20200229T053317_019692_025399_6B7A"
LAND = dict(B2=300, B3=500, B4=450, B5=900, B6=2100, B7=2600, B8=2700, B8A=2800, B9=2850, B10=8, B11=1600, B12=900)
SNOW = dict(B7=8200, B8=8000, B8A=7800, B11=900, B12=800)
WATER = dict(B7=60, B8=40, B8A=9, B11=2, B12=1)


def test_product_day_is_the_start_of_acquisition():
    assert sentinel.product_day(S2_OLD) == 18263  # 2020-01-02: 50 years of 365.2425 days, and one day
    assert sentinel.product_day(S1) == 18263 + 29 + 29  # 29 February
    with pytest.raises(Refused, match="'scene_7' holds no acquisition time"):
        sentinel.product_day("scene_7")


def test_offset_follows_the_baseline_and_not_the_date():
    assert sentinel.offset_from_product(S2_OLD) == 0
    assert sentinel.offset_from_product(S2_NEW) == 1000
    assert sentinel.offset_from_product(S2_NEW.replace("N0500", "N0400")) == 1000
    assert sentinel.offset_from_product(S2_NEW.replace("N0500", "N0301")) == 0


@pytest.mark.parametrize("name", [S2_OLD.replace("L2A", "L1C"), S1, "B04.tif"])
def test_offset_of_what_is_no_surface_product_is_refused(name):
    with pytest.raises(Refused, match="wanted S2"):
        sentinel.offset_from_product(name)


def test_remove_offset_masks_first_and_clips():
    dn = np.array([0, 500, 1000, 1001, 3457, 30000], np.uint16).reshape(1, 2, 3, 1)
    valid = dn[..., 0] > 0
    got = sentinel.remove_offset(dn, valid, np.array([1000]))
    assert got.dtype == np.uint16
    assert got.ravel().tolist() == [0, 1, 1, 1, 2457, 20000]
    same = sentinel.remove_offset(dn, valid, np.array([0]))
    assert same.ravel().tolist() == [0, 500, 1000, 1001, 3457, 20000]


def test_s2_series_of_mixed_baselines_equals_that_without_offsets():
    """The offset comes off exactly once, on the dates that have it."""
    rng = np.random.default_rng(0)
    true = np.array([LAND[b] for b in sentinel.MODALITIES["s2"].bands]) + rng.integers(0, 90, (5, 3, 4, 10))
    offsets = np.array([0, 1000, 0, 1000, 1000])
    masks = dict(valid=np.ones((5, 3, 4), bool), cloud=np.zeros((5, 3, 4), bool), days=[4, 9, 11, 30, 2])
    with_offsets = sentinel.s2_series(true + offsets[:, None, None, None], offsets=offsets.tolist(), **masks)
    without = sentinel.s2_series(true, offsets=[0] * 5, **masks)
    assert without.days.tolist() == [2, 4, 9, 11, 30]
    assert np.array_equal(without.images, true[[4, 0, 1, 2, 3]])
    assert np.array_equal(with_offsets.images, without.images)


def test_s2_series_drops_dates_without_data_and_hides_only_valid_pixels():
    dn = np.broadcast_to([LAND[b] for b in sentinel.MODALITIES["s2"].bands], (3, 2, 2, 10)).copy()
    dn[1] = 0
    valid = (dn > 0).all(-1)
    valid[0, 0, 1] = False
    series = sentinel.s2_series(
        dn, valid=valid, cloud=np.ones((3, 2, 2), bool), days=[5, UNDATED, UNDATED], offsets=[0] * 3
    )
    assert series.days.tolist() == [UNDATED, 5]
    assert series.images[1, 0, 1].tolist() == [0] * 10
    assert np.array_equal(series.cloud, series.valid)
    with pytest.raises(Refused, match="none of the 3 dates has a valid pixel"):
        sentinel.s2_series(dn, valid=valid & False, cloud=valid, days=[1, 2, 3], offsets=[0] * 3)


@pytest.mark.parametrize(("toa", "offset"), [(0, 0), (1000, 0), (1000, 1000), (0, 1000)])
def test_offset_from_toa_is_found_in_every_combination(toa, offset):
    rng = np.random.default_rng(1)
    surface = {b: LAND[b] + rng.integers(-200, 200, (9, 7)) for b in ("B11", "B12")}
    top = {b: (0.93 * surface[b]).astype(int) + toa for b in surface} | {"B10": rng.integers(4, 30, (9, 7)) + toa}
    assert sentinel.offset_from_toa({b: v + offset for b, v in surface.items()}, top) == offset


def test_offset_from_toa_that_fits_neither_is_refused():
    surface = {b: np.full((3, 3), 5000) for b in ("B11", "B12")}
    top = {"B10": np.full((3, 3), 9), "B11": np.full((3, 3), 2000), "B12": np.full((3, 3), 1000)}
    with pytest.raises(Refused, match="exceed the Level-1C image by 3000 and 4000"):
        sentinel.offset_from_toa(surface, top)


def test_check_no_offset_wants_dark_ground():
    dn = np.random.default_rng(2).integers(200, 4000, (2, 20, 20, 10))
    clear = np.ones((2, 20, 20), bool)
    sentinel.check_no_offset(dn, clear)
    with pytest.raises(Refused, match=r"at 12\d\d; wanted below 900"):
        sentinel.check_no_offset(dn + 1000, clear)
    with pytest.raises(Refused, match="at inf"):
        sentinel.check_no_offset(dn, ~clear)


def test_decibels_equal_the_logarithm_above_the_floor():
    power = np.array([1.0, 0.05, 2e-5, 1.6e-12, 0.0, -1.0, np.nan, np.inf], np.float32)
    got = sentinel.decibels(power)
    wanted = [0.0, 10 * math.log10(0.05), 10 * math.log10(2e-5), -50.0]
    assert got[:4] == pytest.approx(wanted, abs=1e-5)
    assert np.isnan(got[4:]).all()


def test_s1_series_drops_a_repeated_delivery_but_no_second_pass():
    db = np.random.default_rng(3).normal(-12, 3, (5, 2, 3, 2))
    db[2] = db[1]  # same day, same orbit: one acquisition twice
    db[4] = db[3]  # another orbit
    series = sentinel.s1_series(
        db,
        valid=np.ones((5, 2, 3), bool),
        days=[3, 7, 7, 9, 9],
        orbits=["ascending", "ascending", "ascending", "ascending", "descending"],
    )
    assert series.days.tolist() == [3, 7, 9, 9]
    assert series.orbits.tolist() == [1, 1, 1, 2]
    assert series.images.dtype == np.float16
    assert np.abs(series.images - db[[0, 1, 3, 4]]).max() < 0.02


def test_scl_classes_are_sorted_into_valid_and_hidden():
    names = (
        "nodata",
        "defect",
        "dark",
        "shadow",
        "plant",
        "soil",
        "water",
        "other",
        "medium",
        "high",
        "cirrus",
        "snow",
    )
    classes = dict(enumerate(names))
    scl = np.arange(12, dtype=np.uint8)
    assert {classes[i] for i in range(12) if not sentinel.valid_by_scl(scl)[i]} == {"nodata", "defect"}
    hidden = {classes[i] for i in range(12) if sentinel.hidden_by_scl(scl)[i]}
    assert hidden == {"shadow", "medium", "high", "cirrus", "snow"}


def test_probabilities_hide_where_either_reaches_the_limit():
    cloud, snow = np.array([0, 9.9, 10, 0, 3]), np.array([0, 9, 0, 100, 12])
    assert sentinel.hidden_by_probability(cloud, snow).tolist() == [False, False, True, True, True]


@pytest.mark.parametrize("medians", [LAND, SNOW, WATER])
def test_true_spectra_contradict_nothing(medians):
    assert sentinel.band_contradictions(medians) == []


def test_shifted_or_swapped_names_are_found():
    names = ("B8A", "B9", "B10", "B11", "B12")
    shifted = LAND | dict(zip(names, [LAND[n] for n in ("B9", "B10", "B11", "B12", "B8A")]))
    with pytest.raises(Refused, match=r"B12 / B11 is 3\.11 \(2800 / 900\), wanted 0\.1 to 1\.5"):
        sentinel.check_bands(shifted)
    for first, second in (("B8A", "B11"), ("B8", "B4"), ("B7", "B12"), ("B11", "B12"), ("B8A", "B10")):
        swapped = LAND | {first: LAND[second], second: LAND[first]}
        assert sentinel.band_contradictions(swapped), (first, second)


def test_double_keeps_a_ramp_in_its_place():
    """A ramp over the ground, sampled at 20 m and doubled, deviates from itself at 10 m evenly to both sides."""
    coarse = 10.0 + 20 * np.arange(7)  # ground of the pixel centres, metres
    fine = 5.0 + 10 * np.arange(14)
    grid = np.broadcast_to(coarse[:, None] * 3 + coarse * 2, (2, 7, 7))
    got = double(grid)
    wanted = fine[:, None] * 3 + fine * 2
    error = got - wanted
    assert got.shape == (2, 14, 14)
    assert error.mean() == pytest.approx(0, abs=1e-9)  # a shift by half a 10 m pixel would make it 25
    assert np.abs(error).max() == 25
    assert np.array_equal(got.reshape(2, 7, 2, 7, 2).mean((2, 4)), grid)  # and the means are kept
    assert double(np.zeros((1, 2, 3, 5))).shape == (1, 4, 6, 5)
