"""Windows, masks and stitching against a stand-in network whose features say where a cell is and what it saw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from skysense_jax import modalities, sharding
from skysense_jax.eval import features
from skysense_jax.models.skysense import Features

ROWS = modalities.select(("hr", "s2", "s1"))
NUM_DATES = dict(hr=1, s2=3, s1=2)


class Echo(nn.Module):
    """Fused: ground position, and the sum of s2's first band over usable dates. Modality: first band per date."""

    def encode(self, images, views, *, present, day_of_year, train):
        assert not train
        cells = {}
        for name, x in images.items():
            x = sharding.constrain_batch(x)
            block = x.shape[3] // views.cell_usable[name].shape[3]
            b, v, t, h, w, c = x.shape
            mean = x.reshape(b, v, t, h // block, block, w // block, block, c).mean((4, 6))
            cells[name] = mean
        usable = {m: views.cell_usable[m] & present[m][:, None, :, None, None] for m in images}
        side = views.cell_usable["s2"].shape[-1]
        offset = jnp.stack(jnp.meshgrid(*(jnp.arange(side) + 0.5 - side / 2,) * 2, indexing="ij"), -1)
        ground = jnp.einsum("bvij,pqj->bvpqi", views.affine[..., :2], offset) + views.affine[:, :, None, None, :, 2]
        seen = jnp.sum(cells["s2"][..., :1] * usable["s2"][..., None], axis=2)
        day = jnp.broadcast_to(day_of_year["s2"].sum(1)[:, None, None, None, None], seen.shape)
        fused = jnp.concatenate((ground, seen, day), -1)
        return Features(cells, usable, fused, jnp.any(usable["s2"], axis=2), None)


def _run(samples, cells=4, batch_size=3, **asked):
    with_mesh = dict(cells=cells, num_dates=NUM_DATES, batch_size=batch_size, **asked)
    return list(features.sample_features(Echo(), {}, ROWS, samples, **with_mesh))


def test_spread_dates_are_even_and_never_more_than_there_are():
    assert features.spread_dates(9, 3).tolist() == [1, 4, 7]
    assert features.spread_dates(5, 1).tolist() == [2]
    assert features.spread_dates(2, 4).tolist() == [0, 1]
    assert features.spread_dates(0, 4).tolist() == []


def test_window_starts_cover_the_extent_without_leaving_it():
    assert features.window_starts(16, 8) == (0, 8)
    assert features.window_starts(11, 4) == (0, 4, 7)
    assert features.window_starts(4, 4) == features.window_starts(3, 4) == (0,)


@pytest.mark.parametrize("extent", [3, 4, 7])
def test_sample_features_of_any_extent_are_where_their_cell_is(make_sample, extent):
    (found,) = _run([make_sample(extent)])
    assert found.fused.shape == (extent, extent, 4)
    rows, columns = np.mgrid[:extent, :extent] + 0.5
    np.testing.assert_allclose(found.fused[..., 0], rows, atol=1e-5)
    np.testing.assert_allclose(found.fused[..., 1], columns, atol=1e-5)


def test_fused_features_alone_are_those_beside_the_modalities(make_sample):
    (found,), (alone,) = _run([make_sample(6)]), _run([make_sample(6)], fused_only=True)
    np.testing.assert_array_equal(alone.fused, found.fused)
    np.testing.assert_array_equal(alone.fused_usable, found.fused_usable)
    assert set(found.modality) == set(found.modality_usable) == {"hr", "s2", "s1"}
    assert alone.modality == alone.modality_usable == {}


def test_sample_features_read_even_dates_and_leave_out_cloud_and_nodata(make_sample):
    sample = make_sample(5)
    (found,) = _run([sample])
    series = sample.series["s2"]
    band = (series.images[..., 0].astype(np.float64) - ROWS[1].mean[0]) / ROWS[1].std[0]
    dates = [0, 2, 4]
    usable = (series.valid & ~series.cloud)[dates]
    np.testing.assert_allclose(found.fused[..., 2], (band[dates] * usable).sum(0), rtol=1e-4, atol=1e-5)
    mean = (band[dates] * usable).sum(0) / np.maximum(usable.sum(0), 1)
    np.testing.assert_allclose(found.modality["s2"][..., 0], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.modality_usable["s2"], usable.any(0))
    assert not found.fused_usable[-1, -1]
    assert found.fused_usable.sum() == 24
    # Days: undated, 1 April 1970 (day 91), 400 days on: 5 February 1971 (day 36).
    assert found.whole.day_of_year["s2"].tolist() == [0, 91, 36]
    assert (found.fused[..., 3] == 0 + 91 + 36).all()


def test_sample_features_of_an_absent_modality_are_unusable_zeros(make_sample):
    (found,) = _run([make_sample(4, without=("hr",))])
    assert not found.whole.present["hr"].any()
    assert not found.modality_usable["hr"].any()
    assert (found.modality["hr"] == 0).all()
    assert found.fused_usable.any()


def test_sample_features_of_many_samples_do_not_depend_on_the_batch(make_sample):
    samples = [make_sample(extent, seed=seed) for seed, extent in enumerate((7, 4, 5))]
    together = _run(samples, batch_size=2)
    for sample, found in zip(samples, together):
        (alone,) = _run([sample], batch_size=5)
        jax.tree.map(np.testing.assert_array_equal, found.fused, alone.fused)
        jax.tree.map(np.testing.assert_array_equal, dict(found.modality), dict(alone.modality))


def test_sample_features_under_a_mesh_equal_those_without(make_sample):
    samples = [make_sample(7)]
    (alone,) = _run(samples)
    with jax.set_mesh(sharding.make_mesh(data=4, fsdp=2, tensor=1, expert=1)):
        (sharded,) = _run(samples)
    np.testing.assert_allclose(sharded.fused, alone.fused, rtol=1e-6)
    np.testing.assert_array_equal(sharded.fused_usable, alone.fused_usable)


def test_read_whole_fills_invalid_pixels_with_the_rounded_band_mean(make_sample):
    whole = features.read_whole(make_sample(3), ROWS, num_dates=NUM_DATES, min_cells=4)
    assert whole.images["hr"].shape == (1, 128, 128, 3)
    assert whole.images["hr"].dtype == np.uint8
    assert (whole.images["s2"][:, 2, 2] == np.round(ROWS[1].mean)).all()
    assert (whole.images["s2"][:, 3] == np.round(ROWS[1].mean)).all()
    assert whole.token_valid["hr"].shape == (1, 32, 32)
    assert whole.token_valid["hr"][0].sum() == 8 * 8 * 8
    assert whole.cell_usable["s2"].sum(axis=(1, 2)).tolist() == [7, 8, 8]
