"""What happens to the numbers of a view inside jit: photometric changes of training, then normalisation.

Crops and resizes are done on the host (data/views.py); here every value may change and no pixel moves (but for a blur).
A modality's row of the table names its family of changes. All strengths are our choice (BYOL's for RGB, then scaled by
``config.data.photometric_strength``); the paper says only that views are augmented.
"""

import math
import zlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num

from skysense_jax.batch import Views
from skysense_jax.modalities import Modality

Mask = Bool[Array, "B V T H W 1"]  # pixels of valid tokens: the others reach no statistic and no neighbour

# RGB to YIQ and back: a turn of the IQ plane is a change of hue.
_TO_YIQ = np.array(((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)))
_FROM_YIQ = np.linalg.inv(_TO_YIQ)


def named_key(key: jax.Array, name: str) -> jax.Array:
    """A key for one named use; the same name gives the same key in every process and version of Python."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)


def normalise(images: Num[Array, "*batch C"], modality: Modality) -> Float[Array, "*batch C"]:
    """Zero mean and unit deviation per band by the statistics of the table, fp32."""
    mean, std = (jnp.asarray(values, jnp.float32) for values in (modality.mean, modality.std))
    return (images.astype(jnp.float32) - mean) / std


def _noise(key: jax.Array, x: jax.Array, draw: Callable[..., jax.Array] = jax.random.normal) -> jax.Array:
    """Noise of the shape of ``x``, drawn as a matrix: XLA's CPU compiler takes 25 times as long over six axes."""
    return draw(key, (x.shape[0], math.prod(x.shape[1:]))).reshape(x.shape)


def _draws(key: jax.Array, x: jax.Array, count: int) -> Float[Array, "count B V T 1 1 1"]:
    """``count`` uniform numbers in [0, 1) per image."""
    per_image = jnp.broadcast_to(x[:, :, :, :1, :1, :1], (*x.shape[:3], count, 1, 1))
    return jnp.moveaxis(_noise(key, per_image, jax.random.uniform)[..., None], 3, 0)


def _between(draw: jax.Array, low: float, high: float) -> jax.Array:
    return low + (high - low) * draw


def _blur(
    x: Float[Array, "B V T H W C"], valid: Mask, sigma: Float[Array, "B V T 1 1 1"]
) -> Float[Array, "B V T H W C"]:
    """Gaussian blur of ``sigma`` pixels among valid ones, renormalised where some are missing.

    As two products with a banded matrix per image: a convolution whose kernel differs by image is slow on every
    device, and a sum of shifted images makes a graph that compiles slowly.
    """

    def weights(size: int) -> Float[Array, "B V T N N"]:
        offsets = jnp.arange(size)[:, None] - jnp.arange(size)
        return jnp.exp(-0.5 * jnp.square(offsets / sigma[..., 0]))

    x = jnp.concatenate((jnp.where(valid, x, 0.0), valid.astype(x.dtype)), -1)
    fp32 = jax.lax.Precision.HIGHEST  # of speckled radar this is linear power, over five orders of magnitude
    x = jnp.einsum("bvthg,bvtgwc->bvthwc", weights(x.shape[3]), x, precision=fp32)
    x = jnp.einsum("bvtwg,bvthgc->bvthwc", weights(x.shape[4]), x, precision=fp32)
    return x[..., :-1] / jnp.maximum(x[..., -1:], 1e-6)


def _rgb(key: jax.Array, x: Float[Array, "B V T H W C"], valid: Mask, strength: float) -> Float[Array, "B V T H W C"]:
    """Colour jitter, grey, blur and solarise of 8-bit RGB; further bands keep out of hue, saturation and grey."""
    brightness, contrast, hue, saturation, grey, sigma, blur, solarise = _draws(key, x, 8)
    x = x / 255.0
    x = x * _between(brightness, 1 - 0.4 * strength, 1 + 0.4 * strength)
    centre = jnp.where(valid, x, 0.0).sum((3, 4, 5), keepdims=True)
    centre = centre / (x.shape[-1] * jnp.maximum(valid.sum((3, 4, 5), keepdims=True), 1))
    x = (x - centre) * _between(contrast, 1 - 0.4 * strength, 1 + 0.4 * strength) + centre

    to_yiq = jnp.asarray(_TO_YIQ, jnp.float32)
    angle = _between(hue, -0.2 * jnp.pi * strength, 0.2 * jnp.pi * strength)[..., 0]
    chroma = _between(saturation, 1 - 0.2 * strength, 1 + 0.2 * strength)
    chroma = jnp.where(grey < 0.2 * strength, 0.0, chroma)[..., 0]
    y, i, q = jnp.moveaxis(jnp.einsum("...c,yc->...y", x[..., :3], to_yiq), -1, 0)
    i, q = (
        chroma * (jnp.cos(angle) * i - jnp.sin(angle) * q),
        chroma * (jnp.sin(angle) * i + jnp.cos(angle) * q),
    )
    colour = jnp.einsum("...y,cy->...c", jnp.stack((y, i, q), -1), jnp.asarray(_FROM_YIQ, jnp.float32))
    x = jnp.concatenate((colour, x[..., 3:]), -1)

    x = jnp.where(blur < 0.3 * strength, _blur(x, valid, _between(sigma, 0.1, 1.5)), x)
    x = jnp.clip(x, 0.0, 1.0)
    return 255.0 * jnp.where((solarise < 0.1 * strength) & (x > 0.5), 1.0 - x, x)


def _reflectance(
    key: jax.Array, x: Float[Array, "B V T H W C"], valid: Mask, strength: float
) -> Float[Array, "B V T H W C"]:
    """Gain of the whole spectrum and of each band, and noise: illumination, haze and calibration."""
    del valid  # each pixel on its own
    whole_key, band_key, noise_key = jax.random.split(key, 3)
    gain = 0.1 * _noise(whole_key, x[:, :, :, :1, :1, :1]) + 0.05 * _noise(band_key, x[:, :, :, :1, :1])
    return x * jnp.exp(strength * gain) + strength * 50.0 * _noise(noise_key, x)


def _backscatter(
    key: jax.Array, x: Float[Array, "B V T H W C"], valid: Mask, strength: float
) -> Float[Array, "B V T H W C"]:
    """Gain per band, blur and speckle of a dB image; speckle multiplies linear power.

    Speckle is log-normal with the variance and mean of 20 looks: a gamma draw would need a loop inside jit.
    """
    gain_key, blur_key, speckle_key = jax.random.split(key, 3)
    x = x + strength * _noise(gain_key, x[:, :, :, :1, :1])
    power = jnp.power(10.0, x / 10.0)
    sigma, blur = _draws(blur_key, x, 2)
    power = jnp.where(blur < 0.3 * strength, _blur(power, valid, _between(sigma, 0.3, 0.8)), power)
    variance = jnp.log1p(strength**2 / 20.0)
    speckle = jnp.exp(jnp.sqrt(variance) * _noise(speckle_key, x) - variance / 2)
    return 10.0 * jnp.log10(jnp.maximum(power * speckle, 1e-6))


def _pixels(token_valid: Bool[Array, "B V T P Q"], patch: int) -> Mask:
    """For each pixel whether its token is valid."""
    return jnp.repeat(jnp.repeat(token_valid, patch, axis=3), patch, axis=4)[..., None]


_FAMILIES = {"rgb": _rgb, "reflectance": _reflectance, "backscatter": _backscatter}


def prepare(
    views: Views, modalities: tuple[Modality, ...], *, key: jax.Array | None, strength: float = 1.0
) -> Mapping[str, Float[Array, "B V T H W C"]]:
    """Normalised fp32 images per modality; with a ``key``, photometrically changed first (each date and view apart)."""
    prepared = {}
    for modality in modalities:
        if modality.name not in views.images:
            continue
        images = jnp.asarray(views.images[modality.name]).astype(jnp.float32)
        if key is not None and strength > 0 and modality.photometric in _FAMILIES:
            valid = _pixels(jnp.asarray(views.token_valid[modality.name]), modality.patch)
            images = _FAMILIES[modality.photometric](named_key(key, modality.name), images, valid, strength)
        prepared[modality.name] = normalise(images, modality)
    return prepared
