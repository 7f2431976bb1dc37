"""How the blocks of a record become bytes: images (jpeg, png, zstd) and masks (packed bits).

Every decoder knows the shape it wants and looks at the block's own header first, so that a lying block allocates
nothing. Damage surfaces as whatever the library raises; records.py turns it into ``RecordError`` with the place.
"""

import io
import threading

import numpy as np
import simplejpeg
import zstandard
from jaxtyping import Bool, Shaped
from PIL import Image

CODECS = ("jpeg", "png", "zstd")
JPEG_QUALITY = 95  # 4:4:4; about 38 dB on noisy aerial imagery, a third of lossless PNG, decoded three times as fast

_ZSTD_LEVEL = 1
_PNG_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # bands: Pillow's mode
_ALL_FALSE, _ALL_TRUE, _BITS = b"\x00", b"\x01", b"\x02"  # first byte of a mask block
_local = threading.local()  # zstandard's objects may not be shared by threads


def codec_problem(codec: str, *, num_bands: int, dtype: np.dtype) -> str | None:
    """Why ``codec`` cannot hold such pixels, None if it can."""
    if codec not in CODECS:
        return f"codec {codec!r}; wanted one of {CODECS}"
    if codec == "jpeg" and (num_bands != 3 or dtype != np.uint8):
        return f"codec 'jpeg' holds 3 bands of uint8, got {num_bands} of {dtype}; take 'zstd'"
    if codec == "png" and (num_bands not in _PNG_MODES or dtype != np.uint8):
        return f"codec 'png' holds {tuple(_PNG_MODES)} bands of uint8, got {num_bands} of {dtype}; take 'zstd'"
    return None


def encode_image(pixels: Shaped[np.ndarray, "H W C"], *, codec: str) -> bytes:
    """One block of pixels as bytes."""
    if codec == "jpeg":
        return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), JPEG_QUALITY, "RGB", "444")
    if codec == "png":
        buffer = io.BytesIO()
        image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else np.ascontiguousarray(pixels))
        image.save(buffer, "PNG", compress_level=6)
        return buffer.getvalue()
    little = np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("<"))
    return _compress(little.reshape(-1, 1).view(np.uint8).T.tobytes())  # low bytes first, then high: compresses better


def decode_image(block: bytes, *, codec: str, shape: tuple[int, int, int], dtype: np.dtype) -> np.ndarray:
    """[H W C] pixels of one block.

    Raises:
      ValueError: the block says another size or number of bands; other types for damage inside.
    """
    if codec == "jpeg":
        height, width, *_ = simplejpeg.decode_jpeg_header(block)
        _check_shape((height, width, 3), shape)
        return simplejpeg.decode_jpeg(block, "RGB")
    if codec == "png":
        with Image.open(io.BytesIO(block), formats=("PNG",)) as image:
            bands = {mode: count for count, mode in _PNG_MODES.items()}.get(image.mode, 0)
            _check_shape((image.height, image.width, bands), shape)
            return np.asarray(image).reshape(shape)
    itemsize = np.dtype(dtype).itemsize
    raw = np.frombuffer(_decompress(block, size=int(np.prod(shape)) * itemsize), np.uint8)
    little = np.ascontiguousarray(raw.reshape(itemsize, -1).T).view(np.dtype(dtype).newbyteorder("<"))
    return little.reshape(shape).astype(dtype, copy=False)


def encode_mask(mask: Bool[np.ndarray, "H W"]) -> bytes:
    """A mask as bytes: one byte where it is all True or all False, else packed bits."""
    if mask.all():
        return _ALL_TRUE
    if not mask.any():
        return _ALL_FALSE
    return _BITS + _compress(np.packbits(mask).tobytes())


def decode_mask(block: bytes, *, shape: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
    """The mask of one block.

    Raises:
      ValueError: no mask of that shape; other types for damage inside.
    """
    if block in (_ALL_FALSE, _ALL_TRUE):
        return np.full(shape, block == _ALL_TRUE)
    if block[:1] != _BITS:
        raise ValueError(f"a mask block starts with {block[:1]!r}; wanted one of {_ALL_FALSE, _ALL_TRUE, _BITS}")
    num_pixels = shape[0] * shape[1]
    bits = np.frombuffer(_decompress(block[1:], size=-(-num_pixels // 8)), np.uint8)
    return np.unpackbits(bits, count=num_pixels).astype(bool).reshape(shape)


def _check_shape(got: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if got != wanted:
        raise ValueError(f"the block holds {got} (rows, columns, bands); wanted {wanted}")


def _compress(data: bytes) -> bytes:
    if not hasattr(_local, "compressor"):
        _local.compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)
    return _local.compressor.compress(data)


def _decompress(data: bytes, *, size: int) -> bytes:
    stated = zstandard.frame_content_size(data)
    if stated != size:
        raise ValueError(f"the block holds {stated} bytes; wanted {size}")
    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor()
    return _local.decompressor.decompress(data)
