"""The on-disk sample: writing it, reading what a window needs of it, and shards of many.

A record is one msgpack map: ``schema``, ``header`` (itself msgpack, its CRC-32 beside it) and ``blocks``. The header
says what the sample is and, per modality, how its blocks are stored; blocks follow in the header's order, for each
modality and date the image tiles, then the valid masks, then the cloud masks of the same tiles, and last the label
raster. Tiles are ``TILE_PIXELS`` wide, the last ones narrower; a Sentinel date is one tile. So only the tiles under a
window and only the drawn dates are decoded. Every block's CRC-32 is in the header: damage is found where it is read.
Blocks: codecs.py. What is accepted: checks.py. Next: views.py, which cuts training views out of a ``SampleReader``.
"""

import contextlib
import dataclasses
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgpack
import numpy as np
from array_record.python import array_record_module

from skysense_jax.data import codecs
from skysense_jax.data.checks import (
    FIRST_DAY,
    LAST_DAY,
    MAX_DATES,
    MAX_DECODED_BYTES,
    MAX_EXTENT_CELLS,
    RecordError,
    check_range,
    coordinate_field,
    field,
    integer_field,
    unpack_map,
    validate_sample,
    wrapped,
)
from skysense_jax.data.sample import ORBITS, UNDATED, Sample, Series, Window
from skysense_jax.data.shards import Shards
from skysense_jax.modalities import OSM, LabelMap, Modality

__all__ = ["Record", "RecordError", "RecordSource", "ShardWriter", "encode_sample", "validate_sample"]

SCHEMA = 1
TILE_PIXELS = 256
_PER_DATE = ("image", "valid", "cloud")  # kinds of blocks, in order


def encode_sample(
    sample: Sample,
    modalities: Sequence[Modality],
    *,
    labels: LabelMap = OSM,
    codecs: Mapping[str, str] | None = None,
) -> bytes:
    """The record of a sample; ``codecs`` overrides a modality's codec (jpeg, png, zstd) by name.

    Raises:
      RecordError: the sample is not what its modalities' rows promise, or a codec cannot hold it.
    """
    validate_sample(sample, modalities, labels)
    blocks: list[bytes] = []
    stored = {}
    for modality in modalities:
        if modality.name in sample.series:
            codec = (codecs or {}).get(modality.name, modality.codec)
            stored[modality.name] = _encode_series(sample, modality, codec, blocks)
    if sample.labels is not None:
        blocks.append(_encode_labels(sample.labels))
    header = msgpack.packb(
        dict(
            id=sample.id,
            extent_cells=sample.extent_cells,
            longitude=sample.longitude,
            latitude=sample.latitude,
            provenance=sample.provenance,
            licence=sample.licence,
            modalities=stored,
            label_classes=None if sample.labels is None else list(labels.classes),
            block_crc32=[zlib.crc32(block) for block in blocks],
        )
    )
    return msgpack.packb(dict(schema=SCHEMA, header=header, header_crc32=zlib.crc32(header), blocks=blocks))


def _encode_series(sample: Sample, modality: Modality, codec: str, blocks: list[bytes]) -> dict[str, Any]:
    """The header's entry of one modality; appends its blocks."""
    series = sample.series[modality.name]
    problem = codecs.codec_problem(codec, num_bands=modality.num_bands, dtype=np.dtype(modality.dtype))
    if problem:
        raise RecordError(f"sample {sample.id!r}, modality {modality.name!r}: {problem}")
    size = series.images.shape[1]
    squares = _tile_slices(size, min(size, TILE_PIXELS))
    for image, valid, cloud in zip(series.images, series.valid, series.cloud):
        blocks += [codecs.encode_image(image[square], codec=codec) for square in squares]
        blocks += [codecs.encode_mask(valid[square]) for square in squares]
        blocks += [codecs.encode_mask(cloud[square]) for square in squares]
    return dict(
        bands=list(modality.bands),
        dtype=modality.dtype,
        size=size,
        tile=min(size, TILE_PIXELS),
        codec=codec,
        native_gsd_m=float(series.native_gsd_m),
        days=[None if day == UNDATED else int(day) for day in series.days],
        orbits=[int(orbit) for orbit in series.orbits],
    )


def _tile_slices(size: int, tile: int) -> list[tuple[slice, slice]]:
    starts = range(0, size, tile)
    return [
        np.s_[row : min(row + tile, size), column : min(column + tile, size)] for row in starts for column in starts
    ]


def _encode_labels(labels: np.ndarray) -> bytes:
    return codecs.encode_image(labels[..., None], codec="zstd")


@dataclasses.dataclass(frozen=True)
class _Stored:
    """Where one modality's blocks are and what they hold, checked."""

    modality: Modality
    size: int
    tile: int
    codec: str
    native_gsd_m: float
    days: np.ndarray
    orbits: np.ndarray
    first_block: int
    check_range: bool  # whether the type can hold numbers outside the range

    @property
    def tiles_per_side(self) -> int:
        return -(-self.size // self.tile)


class Record:
    """A sample in its bytes, decoded window by window: a ``SampleReader``.

    Modalities that ``modalities`` does not name are left untouched. Every damage surfaces as ``RecordError``, and so do
    labels of other classes than those of ``labels``.

    Attributes:
      id, extent_cells, longitude, latitude, provenance, licence: as in ``Sample``.
    """

    def __init__(self, payload: bytes, modalities: Sequence[Modality], labels: LabelMap = OSM):
        self.id, self._labels = "?", labels
        header, self._blocks = self._open(payload)
        self.id = field(header, "id", str, "record")
        where = f"record {self.id!r}"
        self.extent_cells = integer_field(header, "extent_cells", 1, MAX_EXTENT_CELLS, where)
        self.longitude = coordinate_field(header, "longitude", 180.0, where)
        self.latitude = coordinate_field(header, "latitude", 90.0, where)
        self.provenance = field(header, "provenance", str, where)
        self.licence = field(header, "licence", str, where)
        self._crc32 = field(header, "block_crc32", list, where)
        table = {modality.name: modality for modality in modalities}
        self._stored: dict[str, _Stored] = {}
        num_blocks = 0
        for name, entry in field(header, "modalities", dict, where).items():
            inner = f"{where}, modality {name!r}"
            if not isinstance(entry, dict):
                raise RecordError(f"{inner}: got {type(entry).__name__}; wanted a map")
            if name in table:
                self._stored[name] = self._check_entry(entry, table[name], num_blocks, inner)
            num_blocks += _count_blocks(entry, inner)
        self._labels_block = None
        classes = header.get("label_classes")
        if classes is not None:
            if classes != list(labels.classes):
                told = f"wanted {list(labels.classes)}, as config.data.label_classes says"
                raise RecordError(f"{where}: label classes {classes}; {told}")
            self._labels_block = num_blocks
            num_blocks += 1
        if not num_blocks == len(self._blocks) == len(self._crc32):
            raise RecordError(
                f"{where}: {len(self._blocks)} blocks, {len(self._crc32)} checksums; the header asks for {num_blocks}"
            )

    def _open(self, payload: bytes) -> tuple[dict, list]:
        outer = unpack_map(payload, "record")
        schema = outer.get("schema")
        if schema != SCHEMA:
            raise RecordError(f"record: schema {schema!r}; this version reads {SCHEMA}")
        packed = field(outer, "header", bytes, "record")
        if zlib.crc32(packed) != outer.get("header_crc32"):
            raise RecordError("record: the header is damaged (checksum)")
        blocks = field(outer, "blocks", list, "record")
        return unpack_map(packed, "record header"), blocks

    def _check_entry(self, entry: dict, modality: Modality, first_block: int, where: str) -> _Stored:
        bands = field(entry, "bands", list, where)
        if bands != list(modality.bands):
            raise RecordError(f"{where}: {len(bands)} bands {bands}; wanted {list(modality.bands)}, in this order")
        dtype = field(entry, "dtype", str, where)
        if dtype != modality.dtype:
            raise RecordError(f"{where}: dtype {dtype}; wanted {modality.dtype}")
        codec = field(entry, "codec", str, where)
        problem = codecs.codec_problem(codec, num_bands=len(bands), dtype=np.dtype(dtype))
        if problem:
            raise RecordError(f"{where}: {problem}")
        size = integer_field(entry, "size", 1, 2**20, where)
        if size != self.extent_cells * modality.pixels_per_cell:
            raise RecordError(
                f"{where}: {size} pixels along a side; wanted {self.extent_cells * modality.pixels_per_cell} "
                f"({self.extent_cells} cells at {modality.pixels_per_cell} pixels per cell)"
            )
        days = [UNDATED if day is None else day for day in field(entry, "days", list, where)]
        if not all(type(day) is int and (day == UNDATED or FIRST_DAY <= day <= LAST_DAY) for day in days):
            raise RecordError(f"{where}: days {days}; wanted {FIRST_DAY} to {LAST_DAY} since 1970-01-01, or none")
        orbits = field(entry, "orbits", list, where)
        if len(orbits) != len(days) or not all(type(o) is int and 0 <= o < len(ORBITS) for o in orbits):
            raise RecordError(f"{where}: orbits {orbits}; wanted {len(days)} of 0 to {len(ORBITS) - 1}")
        decoded = len(days) * size**2 * len(bands) * np.dtype(dtype).itemsize
        if decoded > MAX_DECODED_BYTES:
            raise RecordError(f"{where}: {decoded} bytes when decoded; wanted at most {MAX_DECODED_BYTES}")
        low, high = modality.value_range
        limits = np.iinfo(dtype) if np.dtype(dtype).kind in "ui" else None
        return _Stored(
            modality=modality,
            size=size,
            tile=integer_field(entry, "tile", 1, size, where),
            codec=codec,
            native_gsd_m=float(field(entry, "native_gsd_m", (int, float), where)),
            days=np.array(days, np.int32),
            orbits=np.array(orbits, np.uint8),
            first_block=first_block,
            check_range=limits is None or limits.min < low or limits.max > high,
        )

    def days(self, modality: str) -> np.ndarray:
        return self._stored[modality].days if modality in self._stored else np.zeros(0, np.int32)

    def window(self, modality: str, date: int, row: int, column: int, side: int) -> Window:
        """Decodes the tiles under the window and no other.

        Raises:
          RecordError: a block is damaged, or valid pixels leave the modality's range.
        """
        stored = self._stored[modality]
        assert max(row, column) + side <= self.extent_cells, (row, column, side, self.extent_cells)
        per_cell = stored.modality.pixels_per_cell
        origin, side_pixels = (row * per_cell, column * per_cell), side * per_cell
        window = Window(*(self._assemble(stored, date, kind, origin, side_pixels) for kind in _PER_DATE))
        where = f"record {self.id!r}, modality {modality!r}, date {date}"
        if stored.check_range and stored.codec == "jpeg":  # what was in range when it was written may come back outside
            return dataclasses.replace(window, pixels=window.pixels.clip(*stored.modality.value_range))
        if stored.check_range:
            check_range(window.pixels, window.valid, stored.modality, where)
        return window

    def labels_window(self, row: int, column: int, side: int) -> np.ndarray | None:
        if self._labels_block is None:
            return None
        per_cell = self._labels.pixels_per_cell
        size = self.extent_cells * per_cell
        where = f"record {self.id!r}, labels"
        block = self._block(self._labels_block, where)
        with wrapped(where):
            raster = codecs.decode_image(block, codec="zstd", shape=(size, size, 1), dtype=np.dtype(np.uint8))[..., 0]
        if raster.max() > self._labels.num_classes:
            raise RecordError(f"{where}: id {raster.max()}; wanted at most {self._labels.num_classes}")
        return raster[row * per_cell : (row + side) * per_cell, column * per_cell : (column + side) * per_cell]

    def decode(self) -> Sample:
        """The whole sample, validated."""
        series = {}
        for name, stored in self._stored.items():
            windows = [self.window(name, date, 0, 0, self.extent_cells) for date in range(len(stored.days))]
            stacks = (np.stack([getattr(w, part) for w in windows]) for part in ("pixels", "valid", "cloud"))
            series[name] = Series(*stacks, stored.days, stored.orbits, stored.native_gsd_m)
        sample = Sample(
            id=self.id,
            extent_cells=self.extent_cells,
            series=series,
            labels=self.labels_window(0, 0, self.extent_cells),
            longitude=self.longitude,
            latitude=self.latitude,
            provenance=self.provenance,
            licence=self.licence,
        )
        validate_sample(sample, [stored.modality for stored in self._stored.values()], self._labels)
        return sample

    def _assemble(self, stored: _Stored, date: int, kind: str, origin: tuple[int, int], side: int) -> np.ndarray:
        """The square of ``side`` pixels at ``origin`` out of the tiles that it touches."""
        modality, tile, per_side = stored.modality, stored.tile, stored.tiles_per_side
        out = None
        for tile_row in range(origin[0] // tile, (origin[0] + side - 1) // tile + 1):
            for tile_column in range(origin[1] // tile, (origin[1] + side - 1) // tile + 1):
                corner = (tile_row * tile, tile_column * tile)
                shape = tuple(min(tile, stored.size - start) for start in corner)
                index = stored.first_block + (date * len(_PER_DATE) + _PER_DATE.index(kind)) * per_side**2
                index += tile_row * per_side + tile_column
                where = (
                    f"record {self.id!r}, modality {modality.name!r}, date {date}, {kind} tile {tile_row, tile_column}"
                )
                block = self._block(index, where)
                with wrapped(where):
                    if kind == "image":
                        part = codecs.decode_image(
                            block,
                            codec=stored.codec,
                            shape=(*shape, modality.num_bands),
                            dtype=np.dtype(modality.dtype),
                        )
                    else:
                        part = codecs.decode_mask(block, shape=shape)
                if out is None:
                    out = np.empty((side, side, *part.shape[2:]), part.dtype)
                _paste(out, part, (corner[0] - origin[0], corner[1] - origin[1]))
        return out

    def _block(self, index: int, where: str) -> bytes:
        block = self._blocks[index]
        if not isinstance(block, bytes) or zlib.crc32(block) != self._crc32[index]:
            raise RecordError(f"{where}: the block is damaged (checksum)")
        return block


def _paste(out: np.ndarray, part: np.ndarray, offset: tuple[int, int]) -> None:
    """Writes what of ``part``, whose corner lies at ``offset``, falls inside ``out``."""
    inside, source = [], []
    for start, length, limit in zip(offset, part.shape, out.shape):
        low, high = max(start, 0), min(start + length, limit)
        inside.append(slice(low, high))
        source.append(slice(low - start, high - start))
    out[tuple(inside)] = part[tuple(source)]


def _count_blocks(entry: dict, where: str) -> int:
    num_dates = len(field(entry, "days", list, where))
    if not 1 <= num_dates <= MAX_DATES:
        raise RecordError(f"{where}: {num_dates} dates; wanted 1 to {MAX_DATES}")
    size = integer_field(entry, "size", 1, 2**20, where)
    return num_dates * len(_PER_DATE) * (-(-size // integer_field(entry, "tile", 1, size, where))) ** 2


class ShardWriter:
    """Writes records into one ArrayRecord file that appears under its name only when it is complete.

    A context manager; after an exception nothing is left behind.

    Raises:
      OSError: it cannot be written, for want of space perhaps.
    """

    def __init__(self, path: str | os.PathLike):
        self._path = os.fspath(path)
        self._temporary = f"{self._path}.incomplete-{os.getpid()}"
        # Uncompressed: blocks are compressed already. group_size 1: a record is read without its neighbours.
        with _as_os_errors():
            self._writer = array_record_module.ArrayRecordWriter(self._temporary, "group_size:1,uncompressed")

    def write(self, payload: bytes) -> None:
        with _as_os_errors():
            self._writer.write(payload)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            with _as_os_errors():
                self._writer.close()
            if kind is None:
                os.replace(self._temporary, self._path)
        finally:
            if os.path.exists(self._temporary):
                os.remove(self._temporary)


@contextlib.contextmanager
def _as_os_errors() -> Iterator[None]:
    """Where the library says RuntimeError of a full disk, an OSError."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error)) from error


class RecordSource:
    """Random access to the records of all shards; picklable.

    Args:
      paths: a glob of files or of gs://bucket/..., or files in the order wanted.
      modalities: what the run uses; the rest of a record is not touched.
      labels: the classes that labels are of.

    Raises:
      ValueError: no file matches, a file is no ArrayRecord, or there are no records.
    """

    def __init__(
        self, paths: str | Sequence[str | os.PathLike], modalities: Sequence[Modality], labels: LabelMap = OSM
    ):
        self._shards, self._modalities, self._labels = Shards(paths), tuple(modalities), labels

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: int) -> Record:
        """The record at ``index``.

        Raises:
          RecordError: it cannot be read, or its header is wrong; names file and place.
        """
        payload = self._shards.payload(index)
        try:
            return Record(payload, self._modalities, self._labels)
        except RecordError as error:
            raise RecordError(f"{self.locate(index)}: {error}") from error

    def locate(self, index: int) -> str:
        """Which file and which record of it ``index`` is."""
        return self._shards.locate(index)
