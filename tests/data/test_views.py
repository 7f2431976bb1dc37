"""Views: their shapes never change, their pixels lie where the affine says, and what is missing is masked."""

import dataclasses
import importlib

import numpy as np
import pytest
from random_samples import ROWS, make_sample, with_series

from skysense_jax import modalities
from skysense_jax.data.records import Record, encode_sample
from skysense_jax.data.sample import UNDATED, Sample, Series
from skysense_jax.data.views import MultiView, day_of_year

NUM_DATES = dict(hr=1, s2=3, s1=2)
SMALL = dict(
    anchor_cells=9,
    tile_cells=4,
    num_global=2,
    global_box_cells=(6, 9),
    global_cells=6,
    num_local=3,
    local_box_cells=(3, 5),
    local_cells=4,
)
KINDS = ("global_views", "local_views")


def make_views(rows=ROWS, num_dates=NUM_DATES, day_jitter=0, **views):
    return MultiView(modalities=rows, num_dates=num_dates, day_jitter=day_jitter, **{**SMALL, **views})


def clear(sample):
    """The sample with every pixel valid and none cloudy."""
    for name, series in sample.series.items():
        nothing = np.zeros_like(series.valid)
        sample = with_series(sample, name, valid=~nothing, cloud=nothing)
    return sample


def leaves(tree, path=()):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def expected_shapes(rows, num_dates, views):
    wanted = {("record",): ((), np.int32), ("bad_record",): ((), np.int32)}
    for row in rows:
        wanted["present", row.name] = ((num_dates[row.name],), bool)
        wanted["day_of_year", row.name] = ((num_dates[row.name],), np.int32)
    for kind in KINDS:
        scope = kind.removesuffix("_views")
        num, cells = views[f"num_{scope}"], views[f"{scope}_cells"]
        wanted[kind, "labels"] = ((num, cells, cells, modalities.OSM.num_classes), np.float16)
        wanted[kind, "affine"] = ((num, 2, 3), np.float32)
        for row in rows:
            lead = (num, num_dates[row.name])
            side = cells * row.pixels_per_cell
            wanted[kind, "images", row.name] = ((*lead, side, side, row.num_bands), np.dtype(row.dtype))
            wanted[kind, "token_valid", row.name] = ((*lead, side // row.patch, side // row.patch), bool)
            wanted[kind, "cell_usable", row.name] = ((*lead, cells, cells), bool)
    return wanted


@pytest.mark.parametrize("name", ["tiny", "small", "base", "large", "huge"])
@pytest.mark.parametrize("case", ["full", "extent 6", "no hr", "only s1"])
def test_views_of_every_config_have_the_shapes_of_a_batch(name, case):
    data = importlib.import_module(f"configs.{name}").get_config().data.to_dict()
    rows = modalities.select(data["modalities"])
    dates = {"no hr": dict(s2=1, s1=4), "only s1": dict(s1=1)}.get(case, dict(hr=1, s2=9, s1=2))
    sample = make_sample(extent_cells=6 if case == "extent 6" else 24, dates=dates, labels=case == "full")
    multi_view = make_views(rows, data["num_dates"], data["day_jitter"], **data["views"])
    element = multi_view(sample, np.random.default_rng(0), record=7, bad_record=5)
    got = {path: (np.shape(value), value.dtype) for path, value in leaves(element)}
    assert got == expected_shapes(rows, data["num_dates"], data["views"])
    assert (element["record"], element["bad_record"]) == (7, 5)


def ramp_row(name, pixels_per_cell, patch):
    """A float modality whose two bands hold ground coordinates."""
    return modalities.Modality(
        name=name,
        bands=("row", "column"),
        dtype="float32",
        unit="cells",
        value_range=(0, 1e6),
        typical_range=(0, 1e6),
        wrong_unit_hint="nothing",
        pixels_per_cell=pixels_per_cell,
        patch=patch,
        mean=(0, 0),
        std=(1, 1),
        statistics_source="none",
    )


def ramp_sample(rows, extent_cells):
    series = {}
    for row in rows:
        along = (np.arange(extent_cells * row.pixels_per_cell, dtype=np.float32) + 0.5) / row.pixels_per_cell
        image = np.stack(np.meshgrid(along, along, indexing="ij"), -1)[None]
        mask = np.ones(image.shape[:3], bool)
        series[row.name] = Series(image, mask, ~mask, np.array([100], np.int32), np.zeros(1, np.uint8), 1.0)
    return Sample("ramp", extent_cells, series)


@pytest.mark.parametrize("extent_cells", [5, 9, 17])
def test_views_of_ground_coordinates_come_back_through_the_affine(extent_cells):
    rows = (ramp_row("fine", 4, 2), ramp_row("coarse", 1, 1))
    sample, multi_view = ramp_sample(rows, extent_cells), make_views(rows, dict(fine=1, coarse=1))
    seen = set()
    for seed in range(12):
        element = multi_view(sample, np.random.default_rng(seed))
        for kind in KINDS:
            for row in rows:
                for view, affine in enumerate(element[kind]["affine"]):
                    image = element[kind]["images"][row.name][view, 0]
                    valid = element[kind]["token_valid"][row.name][view, 0]
                    valid = valid.repeat(row.patch, 0).repeat(row.patch, 1)
                    size = len(image)
                    along = (np.arange(size) + 0.5 - size / 2) / row.pixels_per_cell
                    offsets = np.stack(np.meshgrid(along, along, indexing="ij"), -1)
                    ground = offsets @ affine[:, :2].T + affine[:, 2]
                    # A filter that widens shows the nearer half of its ground where it meets the edge of a crop or
                    # of the data: compare where it lies inside.
                    scale = abs(affine[:, :2]).max()
                    reach = (max(scale, 1.0) + 0.51) / row.pixels_per_cell
                    box = [affine[:, 2] - scale * size / row.pixels_per_cell / 2 * s for s in (1, -1)]
                    low, high = np.maximum(box[0], 0) + reach, np.minimum(box[1], extent_cells) - reach
                    inside = ((ground > low) & (ground < high)).all(-1)
                    assert valid[inside].all()
                    # The triangle filter sampled at pixels is off by up to 0.09 of a source pixel where it shrinks
                    # (at 11 to 9 pixels, say), and exact where it does not. Half a pixel would be a fault.
                    atol = 0.09 / row.pixels_per_cell if scale > 1 else 1e-4
                    np.testing.assert_allclose(image[inside], ground[inside], atol=atol)
                    seen.add((inside.any(), *np.sign(affine[:, :2]).ravel()))
    assert len({key[1:] for key in seen if key[0]}) == 8  # every flip and turn took part


def test_views_masks_are_what_the_masked_ground_says():
    """Half of the sample is nodata, a quarter is cloudy: every token and cell knows, in every orientation."""
    row = ramp_row("fine", 4, 2)
    sample = ramp_sample((row,), 9)
    ground = sample.series["fine"].images[0]
    valid, cloud = ground[..., 0] < 4.5, ground[..., 1] < 3
    sample = with_series(sample, "fine", valid=valid[None], cloud=cloud[None])
    multi_view = make_views((row,), dict(fine=1))
    checked = 0
    for seed in range(8):
        element = multi_view(sample, np.random.default_rng(seed))
        for kind in KINDS:
            for name, per_side in (("token_valid", 2), ("cell_usable", 1)):
                masks = element[kind][name]["fine"][:, 0]
                for mask, affine in zip(masks, element[kind]["affine"]):
                    along = (np.arange(len(mask)) + 0.5 - len(mask) / 2) / per_side
                    where = np.stack(np.meshgrid(along, along, indexing="ij"), -1) @ affine[:, :2].T + affine[:, 2]
                    wanted, sure = where[..., 0] < 4.5, abs(where[..., 0] - 4.5) > 1
                    if name == "cell_usable":
                        wanted, sure = wanted & (where[..., 1] >= 3), sure & (abs(where[..., 1] - 3) > 1)
                    np.testing.assert_array_equal(mask[sure], wanted[sure])
                    checked += sure.sum()
    assert checked > 500


def test_views_of_modalities_are_aligned():
    """hr shows at 32 px per cell what s2 shows at 1: the same bright square of ground, in every view."""
    sample = clear(make_sample(extent_cells=9))
    hr, s2 = np.full_like(sample.series["hr"].images, 20), np.full_like(sample.series["s2"].images, 500)
    hr[:, 64:160, 32:192] = 220
    s2[:, 2:5, 1:6] = 5500
    sample = with_series(with_series(sample, "hr", images=hr), "s2", images=s2)
    element = make_views()(sample, np.random.default_rng(3))
    for kind in KINDS:
        views = element[kind]["images"]
        fine = views["hr"][:, 0, ..., 0].astype(float)
        num, side = fine.shape[:2]
        share_hr = (fine.reshape(num, side // 32, 32, side // 32, 32).mean((2, 4)) - 20) / 200
        share_s2 = (views["s2"][:, 0, ..., 0].astype(float) - 500) / 5000
        assert share_hr.max() > 0.9
        assert np.abs(share_hr - share_s2).mean() < 0.12


def test_views_pixels_without_data_hold_the_rounded_band_mean():
    sample = make_sample(extent_cells=9)
    images, valid = sample.series["s2"].images.copy(), sample.series["s2"].valid.copy()
    valid[:, 3:, :6] = False
    images[~valid] = 60_000
    element = make_views()(with_series(sample, "s2", images=images, valid=valid), np.random.default_rng(1))
    found = 0
    for kind in KINDS:
        for row in ROWS:
            fill = np.asarray(row.mean) if row.dtype == "float16" else np.rint(row.mean)
            masks = element[kind]["token_valid"][row.name].repeat(row.patch, -1).repeat(row.patch, -2)
            pixels = element[kind]["images"][row.name]
            if row.patch == 1:
                assert (pixels[~masks] == fill.astype(row.dtype)).all()
                found += (~masks).sum()
            assert pixels.max() <= row.value_range[1]  # nothing of the 60000 came through
    assert found > 50


def test_views_absent_modality_is_masked_and_holds_the_mean():
    full, partial = clear(make_sample(extent_cells=9)), clear(make_sample(extent_cells=9))
    partial = dataclasses.replace(partial, series={"s1": partial.series["s1"]}, labels=None)
    element = make_views()(partial, np.random.default_rng(0))
    for name in ("hr", "s2"):
        assert not element["present"][name].any()
        assert not element["day_of_year"][name].any()
        row = modalities.MODALITIES[name]
        for kind in KINDS:
            assert not element[kind]["token_valid"][name].any()
            assert not element[kind]["cell_usable"][name].any()
            assert (element[kind]["images"][name] == np.rint(row.mean)).all()
    assert element["present"]["s1"].all()
    for kind in KINDS:
        assert element[kind]["token_valid"]["s1"].all()
        assert not element[kind]["labels"].any()
    same = make_views()(full, np.random.default_rng(0))
    np.testing.assert_array_equal(same["global_views"]["affine"], element["global_views"]["affine"])


def constant_dates(days):
    """A sample whose s2 date number t holds 1000 + 100 t everywhere."""
    images = (
        np.zeros((len(days), 9, 9, 10), np.uint16) + 1000 + 100 * np.arange(len(days), dtype=np.uint16)[:, *[None] * 3]
    )
    mask = np.ones(images.shape[:3], bool)
    series = Series(images, mask, ~mask, np.array(days, np.int32), np.zeros(len(days), np.uint8), 10.0)
    return Sample("dates", 9, {"s2": series})


def drawn_dates(element):
    images = element["global_views"]["images"]["s2"][0]
    return [(int(image[0, 0, 0]) - 1000) // 100 for image, there in zip(images, element["present"]["s2"]) if there]


def test_views_dates_are_drawn_once_in_time_order_and_shared():
    days = [500, 100, 400, 200, 300, 250]
    multi_view = make_views(modalities.select(("s2",)))
    drawn = set()
    for seed in range(40):
        element = multi_view(constant_dates(days), np.random.default_rng(seed))
        dates = drawn_dates(element)
        assert len(set(dates)) == 3
        assert [days[d] for d in dates] == sorted(days[d] for d in dates)
        assert element["day_of_year"]["s2"].tolist() == [day_of_year(days[d]) for d in dates]
        for kind in KINDS:
            for image in element[kind]["images"]["s2"]:
                assert [(int(v) - 1000) // 100 for v in image[:, 0, 0, 0]] == dates
        drawn.update(dates)
    assert drawn == set(range(6))


def test_views_fewer_dates_than_drawn_leave_absent_slots():
    element = make_views(modalities.select(("s2",)))(constant_dates([90, 30]), np.random.default_rng(0))
    assert drawn_dates(element) == [1, 0]
    assert element["present"]["s2"].tolist() == [True, True, False]
    assert element["day_of_year"]["s2"].tolist() == [31, 91, 0]
    assert element["global_views"]["token_valid"]["s2"][:, :2].all()
    assert not element["global_views"]["token_valid"]["s2"][:, 2].any()
    assert not element["local_views"]["cell_usable"]["s2"][:, 2].any()


def test_views_undated_dates_are_present_with_day_zero():
    multi_view = make_views(modalities.select(("s2",)), day_jitter=5)
    element = multi_view(constant_dates([UNDATED, 40, UNDATED]), np.random.default_rng(0))
    assert element["present"]["s2"].all()
    assert element["day_of_year"]["s2"][:2].tolist() == [0, 0]
    assert abs(int(element["day_of_year"]["s2"][2]) - 41) <= 5


def test_views_day_jitter_reaches_its_bounds_and_wraps():
    multi_view = make_views(modalities.select(("s2",)), day_jitter=2)
    new_year = 365 * 10 + 2  # 1980-01-01
    days = [
        int(multi_view(constant_dates([new_year]), np.random.default_rng(seed))["day_of_year"]["s2"][0])
        for seed in range(60)
    ]
    assert set(days) == {365, 366, 1, 2, 3}


def test_day_of_year_of_known_dates():
    known = {"1970-01-01": 1, "2023-03-01": 60, "2024-03-01": 61, "2024-12-31": 366, "2023-12-31": 365}
    for date, wanted in known.items():
        assert day_of_year(int(np.datetime64(date, "D").astype(int))) == wanted


def test_views_cloud_hides_cells_but_not_tokens():
    sample = clear(make_sample(extent_cells=9))
    sample = with_series(sample, "s2", cloud=np.ones_like(sample.series["s2"].cloud))
    element = make_views()(sample, np.random.default_rng(0))
    for kind in KINDS:
        assert element[kind]["token_valid"]["s2"].all()
        assert not element[kind]["cell_usable"]["s2"].any()
        assert element[kind]["cell_usable"]["s1"].all()


def test_views_small_extent_is_padded_not_stretched():
    sample = clear(make_sample(extent_cells=4, labels=True))
    multi_view = make_views()
    for seed in range(5):
        views = multi_view(sample, np.random.default_rng(seed))["global_views"]
        for name in ("hr", "s2", "s1"):
            scale = np.abs(views["affine"][:, :, :2]).max((1, 2))
            share = views["cell_usable"][name].mean((1, 2, 3))
            np.testing.assert_allclose(share, (4 / (6 * scale)) ** 2, atol=0.2)
        assert views["labels"].astype(float).sum((1, 2, 3)).max() <= 36 * (4 / 6) ** 2 + 1e-2


def test_views_labels_turn_with_the_images():
    sample = clear(make_sample(extent_cells=9))
    ground = np.zeros((36, 36), np.uint8)
    ground[:20, :12] = 3
    s2 = np.full_like(sample.series["s2"].images, 100)
    s2[:, :5, :3] = 10_100
    sample = dataclasses.replace(with_series(sample, "s2", images=s2), labels=ground)
    for seed in range(6):
        element = make_views()(sample, np.random.default_rng(seed))
        for kind in KINDS:
            labels = element[kind]["labels"].astype(float)
            share = (element[kind]["images"]["s2"][:, 0, ..., 0].astype(float) - 100) / 10_000
            assert not np.delete(labels, 2, -1).any()
            assert (labels.sum(-1) <= 1.001).all()
            assert np.abs(labels[..., 2] - share).mean() < 0.12


def test_views_of_a_record_equal_views_of_its_sample():
    sample = make_sample(extent_cells=19)
    record = Record(encode_sample(sample, ROWS, codecs={"hr": "png"}), ROWS)
    elements = [make_views()(reader, np.random.default_rng(5)) for reader in (sample, record)]
    for (path, wanted), (same, got) in zip(*map(leaves, elements), strict=True):
        assert path == same
        np.testing.assert_array_equal(got, wanted, err_msg=str(path))


def test_views_decode_every_date_once():
    class Counting:
        def __init__(self, sample):
            self.sample, self.calls = sample, []
            self.id, self.extent_cells = sample.id, sample.extent_cells
            self.days, self.labels_window = sample.days, sample.labels_window

        def window(self, modality, date, *square):
            self.calls.append((modality, date, square))
            return self.sample.window(modality, date, *square)

    reader = Counting(make_sample(extent_cells=19))
    make_views()(reader, np.random.default_rng(0))
    assert len(reader.calls) == len(set(reader.calls)) == sum(NUM_DATES.values())
    assert len({square for _, _, square in reader.calls}) == 1
