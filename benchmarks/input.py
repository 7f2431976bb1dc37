"""How many samples a second a core decodes, crops and resizes, against what training asks for; prints tables.

The real workload: 2048-px samples of 64 cells, an anchor of 24 cells (768 px), the dates and views of the base config,
in synthetic aerial-like imagery with sensor noise (noise is what costs in JPEG). Beside it, in the same run, the plain
alternative: the whole image in one JPEG, decoded whole before it is cropped. Then the pipeline end to end, and its
memory over many small samples.

    python benchmarks/input.py
    python benchmarks/input.py --num_workers=8 --asked_samples_per_s=700
"""

import os

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_variable] = "1"  # before numpy: figures are per core

import itertools  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402

import numpy as np  # noqa: E402
import simplejpeg  # noqa: E402
from absl import app, flags  # noqa: E402

from configs import base  # noqa: E402
from skysense_jax import cost, modalities  # noqa: E402
from skysense_jax.data.codecs import JPEG_QUALITY  # noqa: E402
from skysense_jax.data.pipeline import make_pipeline  # noqa: E402
from skysense_jax.data.records import Record, ShardWriter, encode_sample  # noqa: E402
from skysense_jax.data.sample import Sample, SampleReader, Series, Window  # noqa: E402
from skysense_jax.data.views import MultiView  # noqa: E402

_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 60, "Samples timed per line.")
_NUM_WORKERS = flags.DEFINE_integer("num_workers", 2, "Worker processes of the end-to-end line.")
_NUM_MEMORY = flags.DEFINE_integer("num_memory_samples", 10_000, "Small samples over which memory is watched.")
_ASKED = flags.DEFINE_float(
    "asked_samples_per_s", None, "Samples a second that the accelerator asks for; left out: by formula, for an H200."
)
# Nominal dense bf16 rate of an H200, and the share of it that a step is taken to reach as long as none was measured.
_H200_FLOPS, _UTILISATION = 989e12, 0.4

_EXTENT = 64
_STORED_DATES = dict(hr=1, s2=16, s1=8)
_ROWS = modalities.select(("hr", "s2", "s1"))


def aerial_image(rng: np.random.Generator, size: int) -> np.ndarray:
    """[size, size, 3] uint8: structure at all scales, sharp edges of fields and roofs, sensor noise."""
    image = np.zeros((size, size, 3), np.float32)
    for cell in (256, 64, 16, 8):
        coarse = rng.normal(0, 14, (size // cell, size // cell, 3)).astype(np.float32)
        image += coarse.repeat(cell, 0).repeat(cell, 1)
    noise = rng.normal(0, 3, image.shape).astype(np.float32)
    return np.clip(110 + image + noise, 0, 255).astype(np.uint8)


def make_sample(rng: np.random.Generator, *, extent_cells: int, stored_dates: dict[str, int]) -> Sample:
    series = {}
    for row in _ROWS:
        if row.name in stored_dates:
            shape = (stored_dates[row.name], *(extent_cells * row.pixels_per_cell,) * 2, row.num_bands)
            if row.photometric == "rgb":
                images = aerial_image(rng, shape[1])[None]
            else:
                spread = 0.3 * np.asarray(row.std) * rng.normal(size=shape)
                images = np.clip(np.asarray(row.mean) + spread, *row.value_range).astype(row.dtype)
            cloud = np.zeros(shape[:3], bool)
            if row.photometric == "reflectance":
                cloud[:, : extent_cells // 3] = rng.random(shape[0])[:, None, None] < 0.4
            days = (18_000 + 20 * np.arange(shape[0])).astype(np.int32)
            valid = np.ones(shape[:3], bool)
            series[row.name] = Series(images, valid, cloud, days, np.zeros(shape[0], np.uint8), 0.3)
    labels = rng.integers(0, 17, (extent_cells,) * 2).astype(np.uint8).repeat(4, 0).repeat(4, 1)
    return Sample(f"bench-{rng.integers(1 << 30)}", extent_cells, series, labels)


class WholeImageReader:
    """The plain alternative: hr is one JPEG, decoded whole for every sample; the rest comes from the record."""

    def __init__(self, record: Record, jpeg: bytes):
        self._record, self._jpeg = record, jpeg
        self.id, self.extent_cells = record.id, record.extent_cells
        self.days, self.labels_window = record.days, record.labels_window

    def window(self, modality: str, date: int, row: int, column: int, side: int) -> Window:
        if modality != "hr":
            return self._record.window(modality, date, row, column, side)
        per_cell = modalities.MODALITIES["hr"].pixels_per_cell
        image = simplejpeg.decode_jpeg(self._jpeg, "RGB")
        cut = np.s_[row * per_cell : (row + side) * per_cell, column * per_cell : (column + side) * per_cell]
        nothing = np.zeros((side * per_cell,) * 2, bool)
        return Window(image[cut], ~nothing, nothing)


def timed(make_reader, multi_view, count: int) -> float:
    """Seconds of one core per sample, of opening, decoding and cutting."""
    for i in range(3):
        multi_view(make_reader(i), np.random.default_rng(i))
    start = time.process_time()  # other programs on the machine do not count
    for i in range(count):
        multi_view(make_reader(i), np.random.default_rng(i))
    return (time.process_time() - start) / count


def decode_only(make_reader, views, count: int) -> float:
    """Seconds per sample of opening and decoding the anchor: what ``timed`` is without the cutting."""

    def decode(reader: SampleReader, rng: np.random.Generator) -> None:
        side = views["anchor_cells"]
        row, column = rng.integers(0, (_EXTENT - side) // views["tile_cells"] + 1, 2) * views["tile_cells"]
        for name, dates in base.get_config().data.num_dates.items():
            for date in range(dates):
                reader.window(name, date, int(row), int(column), side)
        reader.labels_window(int(row), int(column), side)

    return timed(make_reader, decode, count)


def resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def write_shard(path: str, samples: list[Sample]) -> list[bytes]:
    payloads = [encode_sample(sample, _ROWS) for sample in samples]
    with ShardWriter(path) as writer:
        for payload in payloads:
            writer.write(payload)
    return payloads


def pipeline_rate(data: dict, count: int, *, threads: int, workers: int) -> float:
    """Samples a second, end to end, after the first batches."""
    iterator = iter(make_pipeline(**data, input_threads=threads, input_workers=workers))
    warm_up = max(1, 2 * workers)
    for _ in range(warm_up):
        next(iterator)
    num_batches = max(1, count // data["batch_size"])
    start = time.perf_counter()
    for _ in itertools.islice(iterator, num_batches):
        pass
    rate = num_batches * data["batch_size"] / (time.perf_counter() - start)
    iterator.close()
    return rate


def memory(data: dict, folder: str, count: int) -> list[tuple[int, float]]:
    """(samples read, MiB resident) at the start, at each quarter and at the end."""
    rng = np.random.default_rng(1)
    dates = dict(hr=1, s2=4, s1=2)
    write_shard(
        f"{folder}/small.array_record", [make_sample(rng, extent_cells=8, stored_dates=dates) for _ in range(64)]
    )
    small = dict(anchor_cells=6, tile_cells=2, global_box_cells=(4, 6), global_cells=4, local_box_cells=(2, 3))
    views = {**data["views"], **small, "local_cells": 2, "num_local": 1}
    data = {**data, "views": views, "sources": ((f"{folder}/small.array_record", 1.0),), "batch_size": 20}
    iterator = iter(make_pipeline(**data, input_threads=2, input_workers=0))
    seen = []
    for batch in range(count // 20 + 1):
        if batch % max(1, count // 80) == 0:
            seen.append((batch * 20, resident_mib()))
        next(iterator)
    iterator.close()
    return seen


def asked_by_formula() -> float:
    """Samples a second that a step of the base config takes on one H200 at its assumed utilisation."""
    config = base.get_config()
    costs = cost.view_costs(_ROWS, data=config.data, model=config.model)
    fields = dict(views=config.data.views, num_dates=config.data.num_dates, teacher_local=True)
    step = cost.step_flops(costs["global"], costs["local"], **fields)
    return _UTILISATION * _H200_FLOPS / step


def main(_) -> None:
    count = _NUM_SAMPLES.value
    data = base.get_config().data.to_dict()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        samples = [make_sample(rng, extent_cells=_EXTENT, stored_dates=_STORED_DATES) for _ in range(8)]
        payloads = write_shard(f"{folder}/big.array_record", samples)
        jpegs = [simplejpeg.encode_jpeg(s.series["hr"].images[0], JPEG_QUALITY, "RGB", "444") for s in samples]
        data.update(sources=((f"{folder}/big.array_record", 1.0),), batch_size=8)
        multi_view = MultiView(
            modalities=_ROWS, num_dates=data["num_dates"], day_jitter=data["day_jitter"], **data["views"]
        )

        def tiled(i):
            return Record(payloads[i % len(payloads)], _ROWS)

        def whole(i):
            return WholeImageReader(tiled(i), jpegs[i % len(jpegs)])

        print(f"record {np.mean([len(p) for p in payloads]) / 2**20:.2f} MiB, one core, {count} samples a line\n")
        print(f"{'':34}{'tiles, ms':>12}{'whole image, ms':>18}{'ratio':>8}")
        for name, measure in (
            ("open and decode the anchor", lambda r: decode_only(r, data["views"], count)),
            ("and cut and resize all views", lambda r: timed(r, multi_view, count)),
        ):
            ours, plain = measure(tiled), measure(whole)
            print(f"{name:34}{1e3 * ours:12.1f}{1e3 * plain:18.1f}{plain / ours:8.2f}")
        per_core = 1 / ours
        print(f"\nsamples/s per core{per_core:16.1f}")
        workers = _NUM_WORKERS.value
        print(f"pipeline, 1 thread{pipeline_rate(data, count, threads=1, workers=0):16.1f} samples/s")
        rate = pipeline_rate(data, 2 * count, threads=1, workers=workers)
        print(f"pipeline, {workers} workers{rate:15.1f} samples/s ({os.cpu_count()} cores here)")
        asked = _ASKED.value or asked_by_formula()
        print(f"asked for{asked:25.1f} samples/s: {asked / per_core:.1f} cores")
        print("\nsamples read   resident MiB")
        for read, mib in memory(data, folder, _NUM_MEMORY.value):
            print(f"{read:12d}{mib:15.1f}")


if __name__ == "__main__":
    app.run(main)
