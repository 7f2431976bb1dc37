"""Pictures as data URIs, inside the page.

Next: ingest/contact.py (samples), explain/ (what a network sees in them).
"""

import base64
import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Num, UInt8
from PIL import Image

_JPEG_QUALITY = 88


def reduced(image: Num[np.ndarray, "H W C"], side: int) -> Float[np.ndarray, "P Q C"]:
    """Means of the pixels beneath each of at most ``side`` along a side."""
    if image.shape[0] <= side:
        return image.astype(np.float32)
    bands = [Image.fromarray(image[..., band].astype(np.float32)) for band in range(image.shape[-1])]
    return np.stack([np.asarray(band.resize((side, side), Image.Resampling.BOX)) for band in bands], -1)


def jpeg(colours: Float[np.ndarray, "H W 3"]) -> str:
    """Imagery, RGB 0-1, visually without loss."""
    return _uri(_image(colours), "jpeg", quality=_JPEG_QUALITY, subsampling=0)


def png(colours: Float[np.ndarray, "H W 3"]) -> str:
    """Colours that mean something, RGB 0-1, without loss: for maps of a pixel a cell."""
    return _uri(_image(colours), "png", optimize=True)


def palette(indices: UInt8[np.ndarray, "H W"], colours: Sequence[Sequence[int]], opacity: Sequence[int]) -> str:
    """Colours (0-255) and opacities (0-255) by index."""
    image = Image.fromarray(indices)
    image.putpalette([part for colour in colours for part in colour])
    return _uri(image, "png", transparency=bytes(opacity), optimize=True)


def _image(colours: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(colours * 255).astype(np.uint8))


def _uri(image: Image.Image, kind: str, **options) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
