"""Photometric changes: numbers change, masks and pixels do not move, and each modality keeps its physics."""

import colorsys
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skysense_jax import modalities, photometric
from skysense_jax.batch import Views

ROWS = modalities.select(("hr", "s2", "s1"))


def _views(images, rows=ROWS):
    valid = {
        row.name: np.ones((*x.shape[:3], x.shape[3] // row.patch, x.shape[4] // row.patch), bool)
        for row in rows
        if (x := images.get(row.name)) is not None
    }
    return Views(images=images, token_valid=valid, cell_usable={}, labels=None, affine=None)


def _random_images(rng, samples=3):
    return {
        "hr": rng.integers(0, 256, (samples, 2, 1, 12, 8, 3), np.uint8),
        "s2": rng.integers(200, 4000, (samples, 2, 2, 5, 6, 10)).astype(np.uint16),
        "s1": rng.normal(-12, 3, (samples, 2, 2, 5, 6, 2)).astype(np.float16),
    }


def test_prepare_without_key_is_normalisation_by_the_table():
    images = _random_images(np.random.default_rng(0))
    prepared = photometric.prepare(_views(images), ROWS, key=None)
    for row in ROWS:
        wanted = (images[row.name].astype(np.float64) - row.mean) / np.array(row.std)
        np.testing.assert_allclose(prepared[row.name], wanted, rtol=2e-6, atol=2e-6)


def test_prepare_draws_each_image_apart_and_repeats_with_the_same_key():
    images = {name: np.repeat(x[:1], 3, axis=0) for name, x in _random_images(np.random.default_rng(1)).items()}
    first, again = (photometric.prepare(_views(images), ROWS, key=jax.random.key(4)) for _ in range(2))
    for name, x in first.items():
        np.testing.assert_array_equal(x, again[name])
        assert not np.allclose(x[0], x[1])


def test_prepare_of_a_sample_does_not_depend_on_the_other_modalities():
    images = _random_images(np.random.default_rng(2))
    alone = photometric.prepare(_views({"s1": images["s1"]}), ROWS, key=jax.random.key(4))
    together = photometric.prepare(_views(images), ROWS, key=jax.random.key(4))
    np.testing.assert_array_equal(alone["s1"], together["s1"])


def test_zero_strength_changes_nothing():
    images = _random_images(np.random.default_rng(3))
    off = photometric.prepare(_views(images), ROWS, key=jax.random.key(0), strength=0.0)
    plain = photometric.prepare(_views(images), ROWS, key=None)
    for name, x in off.items():
        np.testing.assert_array_equal(x, plain[name])


@pytest.mark.parametrize("sigma", [0.4, 1.3])
def test_blur_equals_an_explicit_gaussian(sigma):
    x = np.random.default_rng(4).normal(size=(1, 1, 1, 9, 7, 2)).astype(np.float32)
    valid = np.random.default_rng(5).random((1, 1, 1, 9, 7, 1)) < 0.7
    hidden = np.where(valid, x, np.nan)
    blurred = photometric._blur(jnp.asarray(hidden), jnp.asarray(valid), jnp.full((1, 1, 1, 1, 1, 1), sigma))
    wanted = np.zeros_like(x)
    for row in range(9):
        for column in range(7):
            total = 0.0
            for r in range(9):
                for c in range(7):
                    weight = np.exp(-((row - r) ** 2 + (column - c) ** 2) / (2 * sigma**2)) * valid[0, 0, 0, r, c, 0]
                    wanted[0, 0, 0, row, column] += weight * x[0, 0, 0, r, c]
                    total += weight
            wanted[0, 0, 0, row, column] /= total
    np.testing.assert_allclose(np.where(valid, blurred, 0), np.where(valid, wanted, 0), atol=1e-5)


def test_speckle_keeps_the_mean_power():
    x = np.full((64, 1, 1, 32, 32, 1), -10.0, np.float32)
    changed = photometric._backscatter(jax.random.key(0), jnp.asarray(x), jnp.ones(x.shape, bool), 1.0)
    power = np.power(10.0, np.asarray(changed, np.float64) / 10)
    per_image = power.mean((1, 2, 3, 4, 5))
    gain_db = 10 * np.log10(per_image) + 10
    assert abs(gain_db.mean()) < 0.4  # the gain itself has a deviation of 1 dB: its mean over 64 images 0.13
    looks = (per_image[:, None] ** 2) / power.reshape(64, -1).var(1, keepdims=True)
    assert 15 < np.median(looks) < 45  # 20 looks; blurred images have more


def test_numbers_in_invalid_tokens_reach_no_valid_pixel():
    rng = np.random.default_rng(7)
    images = {name: np.repeat(x[:1], 8, axis=0) for name, x in _random_images(rng).items()}  # so that some are blurred
    views = _views(images)
    hidden, pixels = {}, {}
    for row in ROWS:
        valid = views.token_valid[row.name] = rng.random(views.token_valid[row.name].shape) < 0.6
        pixels[row.name] = valid.repeat(row.patch, axis=3).repeat(row.patch, axis=4)[..., None]
        other = np.where(images[row.name] == 0, 1, 0).astype(images[row.name].dtype)
        hidden[row.name] = np.where(pixels[row.name], images[row.name], other)
    changed = photometric.prepare(views, ROWS, key=jax.random.key(2))
    again = photometric.prepare(views.replace(images=hidden), ROWS, key=jax.random.key(2))
    for name, mask in pixels.items():
        assert not np.array_equal(images[name], hidden[name])
        np.testing.assert_array_equal(np.where(mask, changed[name], 0), np.where(mask, again[name], 0))


def test_rgb_to_yiq_has_the_luma_and_the_hue_order_of_colorsys():
    for rgb in np.random.default_rng(5).random((20, 3)):
        np.testing.assert_allclose(photometric._TO_YIQ @ rgb, colorsys.rgb_to_yiq(*rgb), atol=0.02)


def test_rgb_stays_in_range_and_takes_a_fourth_band():
    row = dataclasses.replace(ROWS[0], name="rgbn", bands=("R", "G", "B", "N"), mean=(1,) * 4, std=(1,) * 4)
    images = np.random.default_rng(6).integers(0, 256, (4, 1, 1, 8, 8, 4), np.uint8)
    changed = photometric.prepare(_views({"rgbn": images}, (row,)), (row,), key=jax.random.key(1))["rgbn"] + 1
    assert changed.shape == images.shape
    assert float(changed.min()) >= -1e-4
    assert float(changed.max()) <= 255.001


@pytest.mark.parametrize(
    ("name", "fields", "wanted"),
    [
        ("hr", dict(dtype="uint16"), "uint8 and 3 bands"),
        ("hr", dict(bands=("P",), mean=(0.0,), std=(1.0,)), "uint8 and 3 bands"),
        ("s2", dict(dtype="float32", value_range=(0, 1)), "reflectance x 10000"),
        ("s1", dict(value_range=(0, 10)), "negative numbers of dB"),
    ],
)
def test_photometric_family_in_another_unit_is_refused(name, fields, wanted):
    row = modalities.MODALITIES[name]
    with pytest.raises(ValueError, match=rf"modality '{name}': photometric '{row.photometric}' .*wanted .*{wanted}"):
        dataclasses.replace(row, **fields)
