"""10 000 damaged and lying records: each an error with a reason or a sample as promised, in bounded memory."""

import io
import random
import resource
import zlib

import msgpack
import numpy as np
import pytest
import zstandard
from PIL import Image
from random_samples import ROWS, make_sample

from skysense_jax.data.records import Record, RecordError, encode_sample, validate_sample

SAMPLE = make_sample(3, extent_cells=2, dates=dict(hr=1, s2=2, s1=1))
PAYLOADS = [encode_sample(SAMPLE, ROWS, codecs=dict(hr=codec)) for codec in ("jpeg", "png", "zstd")]
MOST_MIB = 300  # that the reader may grow by while it reads all of them

# Values that somebody careless or malicious may write.
NASTY = [
    None,
    -1,
    0,
    1,
    2**31,
    2**63,
    -(2**63),
    1e308,
    float("nan"),
    float("inf"),
    True,
    "",
    "../../etc/passwd",
    "\x00",
    b"",
    [],
    {},
    [[]] * 1000,
    list(range(5000)),
    {"a": {"b": {}}},
]


def _bombs():
    """Blocks that claim or unfold to much more than their bytes."""
    zeros = zstandard.ZstdCompressor(level=19).compress(bytes(2**28))
    png = io.BytesIO()
    Image.new("RGB", (8192, 8192)).save(png, "PNG")
    lying = bytearray(png.getvalue())
    lying[16:24] = (2**31 - 1).to_bytes(4, "big") * 2
    lying[29:33] = zlib.crc32(bytes(lying[12:29])).to_bytes(4, "big")
    jpeg = io.BytesIO()
    Image.new("RGB", (8, 8)).save(jpeg, "JPEG")
    large = jpeg.getvalue()
    place = large.index(b"\xff\xc0") + 5
    return [
        zeros,
        png.getvalue(),
        bytes(lying),
        large[:place] + b"\xff\xff\xff\xff" + large[place + 4 :],
        b"\x02" + zeros,
    ]


BOMBS = _bombs()
# A map or list that claims 2**32 - 1 entries, deep nesting, a string that claims 4 GiB.
CLAIMS = [
    b"\xdf\xff\xff\xff\xff",
    b"\xdd\xff\xff\xff\xff",
    b"\x91" * 100_000,
    b"\xdb\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
]


def _with_places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _with_places(inner, (*path, key))


def _lying_header(rng, outer):
    """A field of the header replaced, or left out, and all checksums right."""
    header = msgpack.unpackb(outer["header"])
    path = rng.choice([path for path in _with_places(header) if path])
    inner = header
    for key in path[:-1]:
        inner = inner[key]
    if rng.random() < 0.2:
        del inner[path[-1]]
    else:
        inner[path[-1]] = rng.choice(NASTY)
    packed = msgpack.packb(header)
    return {**outer, "header": packed, "header_crc32": zlib.crc32(packed)}


def _lying_blocks(rng, outer):
    """A block replaced by another, by noise, a part of itself or a bomb; all checksums right."""
    header, blocks = msgpack.unpackb(outer["header"]), list(outer["blocks"])
    place = rng.randrange(len(blocks))
    block = blocks[place]
    blocks[place] = rng.choice(
        [
            rng.choice(blocks),
            rng.randbytes(rng.randrange(2000)),
            block[: rng.randrange(len(block) + 1)],
            rng.choice(BOMBS),
        ]
    )
    if rng.random() < 0.1:
        blocks = blocks[:place]
    header["block_crc32"] = [zlib.crc32(block) for block in blocks]
    packed = msgpack.packb(header)
    return {**outer, "header": packed, "header_crc32": zlib.crc32(packed), "blocks": blocks}


def _damaged(rng, how):
    payload = rng.choice(PAYLOADS)
    if how == "noise":
        return rng.choice([b"", rng.choice(CLAIMS)]) + rng.randbytes(rng.randrange(4000))
    if how == "truncated":
        return payload[: rng.randrange(len(payload))]
    if how == "flipped":
        content = bytearray(payload)
        for _ in range(rng.choice([1, 1, 2, 30])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        return bytes(content)
    lie = {"lying header": _lying_header, "lying blocks": _lying_blocks}[how]
    return msgpack.packb(lie(rng, msgpack.unpackb(payload)))


@pytest.mark.parametrize("how", ["noise", "truncated", "flipped", "lying header", "lying blocks"])
def test_two_thousand_records_are_refused_with_a_reason_or_right(how):
    rng, reasons, right = random.Random(how), [], 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2000):
        try:
            sample = Record(_damaged(rng, how), ROWS).decode()
        except RecordError as error:
            reasons.append(str(error))
            continue
        validate_sample(sample, ROWS)
        right += 1
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mib < MOST_MIB, f"{grown_mib:.0f} MiB more"
    assert all(reasons)
    assert len(reasons) > 1000
    assert (right > 0) == how.startswith("lying")  # checksums show the rest; some lies are none, as another id
    for payload in PAYLOADS:  # healthy ones still read
        np.testing.assert_array_equal(Record(payload, ROWS).decode().series["s2"].images, SAMPLE.series["s2"].images)
