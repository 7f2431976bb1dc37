"""Records: what goes in comes out, only what is needed is decoded, and everything wrong is said."""

import dataclasses
import pickle
import zlib

import msgpack
import numpy as np
import pytest
from random_samples import ROWS, make_sample, with_series

from skysense_jax import modalities
from skysense_jax.data import checks, codecs
from skysense_jax.data.records import Record, RecordError, RecordSource, ShardWriter, encode_sample, validate_sample
from skysense_jax.data.sample import UNDATED

LOSSLESS = {"hr": "png"}


def assert_same_sample(got, wanted):
    for field in dataclasses.fields(wanted):
        if field.name not in ("series", "labels"):
            assert getattr(got, field.name) == getattr(wanted, field.name), field.name
    assert sorted(got.series) == sorted(wanted.series)
    for name, series in wanted.series.items():
        for field in dataclasses.fields(series):
            got_value, value = getattr(got.series[name], field.name), getattr(series, field.name)
            assert np.array_equal(got_value, value), (name, field.name)
            assert np.asarray(got_value).dtype == np.asarray(value).dtype
    assert (got.labels is None) == (wanted.labels is None)
    if wanted.labels is not None:
        np.testing.assert_array_equal(got.labels, wanted.labels)


@pytest.mark.parametrize("codec", ["png", "zstd"])
def test_record_lossless_codecs_return_the_sample(codec):
    sample = make_sample(extent_cells=9)
    sample = with_series(sample, "s1", days=np.array([UNDATED, 0, 47_000], np.int32))
    record = Record(encode_sample(sample, ROWS, codecs={"hr": codec}), ROWS)
    assert_same_sample(record.decode(), sample)


def test_record_without_labels_place_or_most_modalities_returns_the_sample():
    sample = dataclasses.replace(
        make_sample(extent_cells=6, dates=dict(s2=2), labels=False), longitude=None, latitude=None
    )
    assert_same_sample(Record(encode_sample(sample, ROWS), ROWS).decode(), sample)


def test_record_masks_all_true_and_all_false_are_stored_and_returned():
    sample = make_sample(extent_cells=9, dates=dict(s2=2), labels=False)
    valid = np.stack([np.ones((9, 9), bool), np.zeros((9, 9), bool)])
    sample = with_series(sample, "s2", valid=valid, cloud=~valid)
    payload = encode_sample(sample, ROWS)
    assert_same_sample(Record(payload, ROWS).decode(), sample)
    assert sorted(len(block) for block in msgpack.unpackb(payload)["blocks"])[:4] == [1, 1, 1, 1]


def test_record_jpeg_of_smooth_imagery_is_above_35_db():
    y, x = np.mgrid[:288, :288] / 40
    smooth = np.stack([127 + 90 * np.sin(x + k) * np.cos(0.7 * y - k) for k in range(3)], -1)
    noisy = np.clip(smooth + np.random.default_rng(0).normal(0, 2, smooth.shape), 0, 255).astype(np.uint8)[None]
    sample = make_sample(extent_cells=9, dates=dict(hr=1))
    sample = with_series(sample, "hr", images=noisy)
    decoded = Record(encode_sample(sample, ROWS), ROWS).decode().series["hr"].images
    mse = np.mean((decoded.astype(float) - noisy) ** 2)
    assert 10 * np.log10(255**2 / mse) > 35
    assert mse > 0  # or this is no test of jpeg


def test_record_jpeg_that_rings_out_of_the_range_is_clipped_not_refused():
    rows = [dataclasses.replace(row, value_range=(20, 235)) if row.name == "hr" else row for row in ROWS]
    edges = np.random.default_rng(0).choice(np.array([20, 235], np.uint8), (1, 288, 288, 3))
    sample = with_series(make_sample(extent_cells=9, dates=dict(hr=1)), "hr", images=edges)
    payload = encode_sample(sample, rows)
    assert Record(payload, ROWS).decode().series["hr"].images.min() < 20  # what the codec makes of it
    images = Record(payload, rows).decode().series["hr"].images
    assert (images.min(), images.max()) == (20, 235)


@pytest.mark.parametrize(("bands", "codec"), [(1, "png"), (4, "png"), (5, "zstd")])
def test_record_other_band_counts_return_the_pixels(bands, codec):
    row = modalities.Modality(
        name="nir",
        bands=tuple("abcde"[:bands]),
        dtype="uint8",
        unit="digital number",
        value_range=(0, 255),
        typical_range=(1, 254),
        wrong_unit_hint="something else",
        pixels_per_cell=4,
        patch=2,
        mean=(90,) * bands,
        std=(30,) * bands,
        statistics_source="none",
        codec=codec,
    )
    sample = make_sample(extent_cells=5, dates=dict(nir=2), rows=(row,))
    assert_same_sample(Record(encode_sample(sample, (row,)), (row,)).decode(), sample)


def test_record_windows_equal_slices_of_the_whole():
    sample = make_sample(extent_cells=19)  # 608 px: tiles of 256, 256 and 96
    record = Record(encode_sample(sample, ROWS, codecs=LOSSLESS), ROWS)
    rng = np.random.default_rng(1)
    for _ in range(25):
        side = int(rng.integers(1, 20))
        row, column = (int(v) for v in rng.integers(0, 20 - side, 2))
        for name, series in sample.series.items():
            date = int(rng.integers(len(series.days)))
            got, wanted = (s.window(name, date, row, column, side) for s in (record, sample))
            for field in ("pixels", "valid", "cloud"):
                np.testing.assert_array_equal(getattr(got, field), getattr(wanted, field))
        np.testing.assert_array_equal(record.labels_window(row, column, side), sample.labels_window(row, column, side))


def test_record_window_decodes_only_the_tiles_under_it(monkeypatch):
    record = Record(encode_sample(make_sample(extent_cells=24, dates=dict(hr=1, s2=5)), ROWS), ROWS)
    shapes = []
    decode = codecs.decode_image
    monkeypatch.setattr(codecs, "decode_image", lambda b, **kw: shapes.append(kw["shape"]) or decode(b, **kw))
    record.window("hr", 0, 8, 8, 8)  # on the grid: 1 of 9 tiles
    assert shapes == [(256, 256, 3)]
    shapes.clear()
    record.window("hr", 0, 7, 8, 8)
    assert len(shapes) == 2
    shapes.clear()
    record.window("s2", 3, 2, 5, 11)  # one date, one block
    assert shapes == [(24, 24, 10)]


def test_record_modality_that_the_run_does_not_use_is_never_touched():
    sample = make_sample(extent_cells=9)
    payload = encode_sample(sample, ROWS)
    outer = msgpack.unpackb(payload)
    outer["blocks"][0] = b"rubbish"  # the hr tile
    header = msgpack.unpackb(outer["header"])
    header["modalities"]["hr"]["bands"] = ["X"]
    s2_only = Record(_pack(outer, header), modalities.select(("s2",)))
    np.testing.assert_array_equal(s2_only.decode().series["s2"].images, sample.series["s2"].images)
    assert s2_only.days("hr").shape == (0,)


def _linear(sample):
    return with_series(sample, "s1", images=(10 ** (sample.series["s1"].images.astype(float) / 10)).astype(np.float16))


def _edit(sample, modality, index, value):
    images = sample.series[modality].images.copy()
    images[index] = value
    return with_series(sample, modality, images=images)


def _as(sample, modality, field, change):
    return with_series(sample, modality, **{field: change(getattr(sample.series[modality], field))})


BAD_SAMPLES = {
    "band count": (
        lambda s: _as(s, "s2", "images", lambda a: a[..., :9]),
        "sample 'sample-0', modality 's2': 9 bands; wanted 10, in this order: B2 B3 B4",
    ),
    "linear backscatter": (_linear, "modality 's1', band VV: mean .* wanted -40 to -0.5 .* linear power"),
    "reflectance 0-1 in uint16": (
        lambda s: _as(s, "s2", "images", lambda a: (a / 10000).astype(np.uint16)),
        "modality 's2', band B2: mean .* wanted 1 to 16000 .*reflectance 0-1",
    ),
    "reflectance 0-1 in float": (
        lambda s: _as(s, "s2", "images", lambda a: (a / 10000).astype(np.float32)),
        "modality 's2', band B2: mean .*reflectance 0-1",
    ),
    "dtype": (
        lambda s: _as(s, "s2", "images", lambda a: a.astype(np.float32)),
        "modality 's2': dtype float32; wanted uint16",
    ),
    "hr size": (
        lambda s: _as(s, "hr", "images", lambda a: a[:, :-32, :-32]),
        r"modality 'hr': 256 x 256 pixels; wanted 288 x 288 \(9 cells at 32 pixels per cell\)",
    ),
    "no date axis": (lambda s: _as(s, "s2", "images", lambda a: a[0]), "shape .9, 9, 10.; wanted .dates, rows"),
    "out of range": (
        lambda s: _edit(s, "s2", (3, 8, 7, 2), 20_001),
        r"modality 's2', band B4, date 3 \(day 18051\): got 20001 on 1 valid pixels; wanted 1 to 20000",
    ),
    "nan": (lambda s: _edit(s, "s1", (1, 5, 5, 1), np.nan), r"'s1', band VH, date 1 \(day 18017\): 1 valid .* NaN"),
    "inf": (lambda s: _edit(s, "s1", (2, 5, 5, 0), np.inf), "'s1', band VV, date 2 .* NaN or infinite"),
    "nodata marked valid": (lambda s: _edit(s, "hr", np.s_[:], 0), "band R: mean 0 .* nodata that is marked valid"),
    "day type": (
        lambda s: _as(s, "s2", "days", lambda a: a.astype(np.int64)),
        r"'s2': days are int64 of shape \(5,\); wanted int32",
    ),
    "day count": (lambda s: _as(s, "s2", "days", lambda a: a[:4]), r"days are int32 of shape \(4,\)"),
    "day of a calendar": (
        lambda s: _as(s, "s2", "days", lambda a: (a * 0 + 20_240_501).astype(np.int32)),
        "'s2', date 0: day 20240501; wanted days since 1970-01-01",
    ),
    "day before 1970": (lambda s: _as(s, "s2", "days", lambda a: a - np.int32(19_000)), "day -1000; wanted"),
    "valid shape": (lambda s: _as(s, "s1", "valid", lambda a: a[:2]), r"mask 'valid' is bool of shape \(2, 9, 9\)"),
    "cloud type": (lambda s: _as(s, "s1", "cloud", lambda a: a.astype(np.uint8)), "mask 'cloud' is uint8"),
    "orbit id": (lambda s: _as(s, "s1", "orbits", lambda a: a + np.uint8(3)), "orbits uint8 .*wanted uint8"),
    "gsd": (lambda s: with_series(s, "hr", native_gsd_m=0.0), "native_gsd_m 0.0; wanted metres above 0"),
    "no dates": (
        lambda s: _as(s, "s1", "images", lambda a: a[:0]),
        "'s1': 0 dates; wanted 1 to .* never seen has no entry",
    ),
    "too much": (
        lambda s: _as(s, "s1", "images", lambda a: np.broadcast_to(a[:1], (4096, 9, 9, 2)).astype(np.float16)),
        "modality 's1': 1327104 bytes of pixels; wanted at most 1000000",
    ),
    "unknown modality": (
        lambda s: dataclasses.replace(s, series={**s.series, "sar": s.series["s1"]}),
        r"modalities \['sar'\] have no row",
    ),
    "label shape": (
        lambda s: dataclasses.replace(s, labels=s.labels[:-1]),
        r"labels .* wanted uint8 of shape \(36, 36",
    ),
    "label id": (lambda s: dataclasses.replace(s, labels=s.labels + np.uint8(9)), "label id 25; wanted 0 .* to 16"),
    "extent": (lambda s: dataclasses.replace(s, extent_cells=0), "extent of 0 cells"),
    "place": (lambda s: dataclasses.replace(s, latitude=95.0), "latitude 95.0; wanted -90 to 90"),
    "nothing valid": (
        lambda s: dataclasses.replace(
            s,
            series={k: dataclasses.replace(v, valid=np.zeros_like(v.valid)) for k, v in s.series.items()},
        ),
        r"no modality has a valid pixel \(modalities: \['hr', 's1', 's2'\]\)",
    ),
    "no modality": (lambda s: dataclasses.replace(s, series={}), "no modality has a valid pixel"),
}


@pytest.mark.parametrize("case", BAD_SAMPLES)
def test_sample_that_is_wrong_is_refused_with_the_reason(case, monkeypatch):
    break_it, message = BAD_SAMPLES[case]
    monkeypatch.setattr(checks, "MAX_DECODED_BYTES", 10**6)
    sample = make_sample()
    validate_sample(sample, ROWS)
    with pytest.raises(RecordError, match=message):
        encode_sample(break_it(sample), ROWS)


def test_sample_rubbish_on_invalid_pixels_is_accepted():
    sample = make_sample()
    rubbish = sample.series["s1"].images.copy()
    rubbish[~sample.series["s1"].valid] = np.nan
    validate_sample(with_series(sample, "s1", images=rubbish), ROWS)


def test_sample_codec_that_cannot_hold_a_modality_is_refused():
    with pytest.raises(RecordError, match="'s2': codec 'jpeg' holds 3 bands of uint8, got 10 of uint16"):
        encode_sample(make_sample(), ROWS, codecs={"s2": "jpeg"})
    with pytest.raises(RecordError, match="codec 'webp'; wanted one of"):
        encode_sample(make_sample(), ROWS, codecs={"hr": "webp"})


def _pack(outer, header):
    packed = msgpack.packb(header)
    return msgpack.packb({**outer, "header": packed, "header_crc32": zlib.crc32(packed)})


def _lie(**changes):
    def apply(outer, header):
        header.update(changes)

    return apply


def _lie_about(modality, **changes):
    def apply(outer, header):
        header["modalities"][modality].update(changes)

    return apply


def _lying_block(modality_block, block):
    def apply(outer, header):
        outer["blocks"][modality_block] = block
        header["block_crc32"][modality_block] = zlib.crc32(block)

    return apply


def _drop_block(outer, header):
    outer["blocks"].pop()


def _too_much(outer, header):
    header.update(extent_cells=256)
    header["modalities"] = {"s2": header["modalities"]["s2"]}
    header["modalities"]["s2"].update(size=256, tile=256, days=[0] * 4096, orbits=[0] * 4096)


LIES = {
    "schema": (lambda outer, header: outer.update(schema=7), "schema 7; this version reads 1"),
    "extent": (_lie(extent_cells=10), "'hr': 288 pixels along a side; wanted 320"),
    "extent type": (_lie(extent_cells="9"), "'extent_cells' is '9'; wanted an integer"),
    "huge extent": (_lie(extent_cells=10**9), "'extent_cells' is 1000000000; wanted an integer of 1 to 256"),
    "id": (_lie(id=4), "'id' is 4"),
    "place": (_lie(longitude=float("nan")), "'longitude' is nan"),
    "bands": (_lie_about("s1", bands=["VH", "VV"]), r"'s1': 2 bands \['VH', 'VV'\]; wanted \['VV', 'VH'\], in this"),
    "dtype": (_lie_about("s1", dtype="float32"), "'s1': dtype float32; wanted float16"),
    "codec": (_lie_about("s1", codec="png"), "'s1': codec 'png' holds"),
    "tile": (_lie_about("hr", tile=0), "'tile' is 0; wanted an integer of 1 to 288"),
    "tiles": (_lie_about("hr", tile=16), "blocks, .* checksums; the header asks for"),
    "dates": (_lie_about("s2", days=[1], orbits=[0]), "the header asks for"),
    "many dates": (_lie_about("s2", days=[0] * 5000, orbits=[0] * 5000), "5000 dates; wanted 1 to 4096"),
    "too much": (_too_much, "bytes when decoded; wanted at most"),
    "day": (_lie_about("s2", days=[1, 2, 3, 4, 90_000]), "'s2': days .* wanted 0 to 47846"),
    "orbits": (_lie_about("s1", orbits=[0, 9, 0]), "'s1': orbits .*wanted 3 of 0 to 2"),
    "classes": (_lie(label_classes=["sea", "land"]), r"label classes \['sea', 'land'\]; wanted \['water'"),
    "block gone": (_drop_block, "the header asks for"),
    "jpeg of another size": (
        _lying_block(0, codecs.encode_image(np.zeros((64, 64, 3), np.uint8), codec="jpeg")),
        r"'hr', date 0, image tile \(0, 0\): cannot be decoded: .*holds \(64, 64, 3\) .*; wanted \(256, 256, 3\)",
    ),
    "no jpeg": (_lying_block(0, b"no jpeg"), "'hr', date 0, image tile .* cannot be decoded"),
    "mask of another size": (
        _lying_block(4, codecs.encode_mask(np.arange(64).reshape(8, 8) % 3 == 0)),
        r"'hr', date 0, valid tile \(0, 0\): cannot be decoded: .* 8 bytes; wanted 8192",
    ),
    "no mask": (_lying_block(4, b"\x07"), "a mask block starts with"),
    "zstd of another size": (
        _lying_block(12, codecs.encode_image(np.zeros((90, 90, 10), np.uint16), codec="zstd")),
        r"'s2', date 0, image tile .* the block holds 162000 bytes; wanted 1620",
    ),
    "values out of range": (
        _lying_block(12, codecs.encode_image(np.zeros((9, 9, 10), np.uint16), codec="zstd")),
        "record 'sample-0', modality 's2', date 0, band B2: got 0 on .* valid pixels; wanted 1 to 20000",
    ),
}


@pytest.mark.parametrize("case", LIES)
def test_record_that_lies_is_refused_with_the_reason(case):
    lie, message = LIES[case]
    outer = msgpack.unpackb(encode_sample(make_sample(), ROWS))
    header = msgpack.unpackb(outer["header"])
    lie(outer, header)
    with pytest.raises(RecordError, match=message):
        Record(_pack(outer, header), ROWS).decode()


def test_record_damaged_bytes_give_an_error_or_the_right_values():
    sample = make_sample(extent_cells=5, dates=dict(hr=1, s2=2, s1=1))
    payload = encode_sample(sample, ROWS, codecs=LOSSLESS)
    rng = np.random.default_rng(2)
    damaged = [payload[:length] for length in rng.integers(0, len(payload), 40)]
    for position in [*range(64), *rng.integers(0, len(payload), 250)]:
        flipped = bytearray(payload)
        flipped[position] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(flipped))
    num_refused = 0
    for bad in damaged:
        try:
            decoded = Record(bad, ROWS).decode()
        except RecordError:
            num_refused += 1
        else:
            assert_same_sample(decoded, sample)
    assert num_refused >= 0.99 * len(damaged)


@pytest.mark.parametrize("payload", [b"", b"\x00", b"\xc1", msgpack.packb([1, 2]), b"\xdf\xff\xff\xff\xff", b"\x80"])
def test_record_that_is_no_record_is_refused(payload):
    with pytest.raises(RecordError, match=r"^record"):
        Record(payload, ROWS)


def test_shards_records_come_back_in_order_and_are_located(tmp_path):
    samples = [make_sample(seed, extent_cells=3, dates=dict(s2=1)) for seed in range(5)]
    for shard, members in (("a", samples[:2]), ("b", []), ("c", samples[2:])):
        with ShardWriter(tmp_path / f"{shard}.array_record") as writer:
            for sample in members:
                writer.write(encode_sample(sample, ROWS))
    source = pickle.loads(pickle.dumps(RecordSource(str(tmp_path / "*.array_record"), ROWS)))
    assert len(source) == 5
    assert [source[i].id for i in range(5)] == [s.id for s in samples]
    assert source.locate(1).endswith("a.array_record, record 1")
    assert source.locate(2).endswith("c.array_record, record 0")
    files = [tmp_path / "c.array_record", tmp_path / "a.array_record"]
    assert RecordSource(files, ROWS)[0].id == "sample-2"


def test_shard_writer_leaves_nothing_after_an_error(tmp_path):
    path = tmp_path / "shard.array_record"

    def fail():
        with ShardWriter(path) as writer:
            writer.write(b"payload")
            assert not path.exists()  # not under its name before it is whole
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_shard_writer_keeps_the_old_shard_when_it_fails(tmp_path):
    path = tmp_path / "shard.array_record"
    with ShardWriter(path) as writer:
        writer.write(encode_sample(make_sample(extent_cells=3), ROWS))

    def fail():
        with ShardWriter(path) as writer:
            writer.write(b"other")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert RecordSource(str(path), ROWS)[0].id == "sample-0"


def test_source_without_files_or_records_is_an_empty_dataset(tmp_path):
    with pytest.raises(ValueError, match=r"empty dataset: no file matches '.*none\*'"):
        RecordSource(str(tmp_path / "none*"), ROWS)
    with ShardWriter(tmp_path / "empty.array_record"):
        pass
    with pytest.raises(ValueError, match=r"empty dataset: the 1 files of .*empty\*' hold no record"):
        RecordSource(str(tmp_path / "empty*"), ROWS)
    with pytest.raises(ValueError, match=r"is a folder; wanted a glob of files: .*/\*\.array_record"):
        RecordSource(str(tmp_path), ROWS)
    (tmp_path / "cut.array_record").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cut\.array_record is no whole ArrayRecord file"):
        RecordSource(str(tmp_path / "cut*"), ROWS)


def test_source_damaged_payload_is_named_and_its_neighbours_are_readable(tmp_path):
    path = tmp_path / "shard.array_record"
    with ShardWriter(path) as writer:
        for seed in range(3):
            writer.write(encode_sample(make_sample(seed, extent_cells=3), ROWS))
    data = bytearray(path.read_bytes())
    place = data.find(b"sample-1")
    data[place] ^= 0xFF
    path.write_bytes(data)
    source = RecordSource(str(path), ROWS)
    with pytest.raises(RecordError, match=r"shard\.array_record, record 1: "):
        source[1].decode()
    assert [source[i].id for i in (0, 2)] == ["sample-0", "sample-2"]
