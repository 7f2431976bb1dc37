"""Procedural scenes, the embedded default dataset: aligned ``hr``, ``s2``, ``s1`` and ``osm`` labels of made-up places.

A scene depends on (seed, index) alone, and what one modality shows does not depend on which others are asked for.
``Scene.attributes`` are truths that no record carries and no loss sees: probes read them. Layout: scenes_layout.py
(with scenes_plan, scenes_uses, scenes_board); seasons and spectra: scenes_surfaces.py; sensors: scenes_render.py.

Write records:  python -m skysense_jax.data.scenes --out=DIR --num_scenes=64
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import functools
import multiprocessing
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from skysense_jax.data import records, scenes_layout, scenes_render
from skysense_jax.data.sample import ORBITS, UNDATED, Sample, Series
from skysense_jax.data.scenes_surfaces import CROP_TYPES, FOREST_TYPES, ROOF_MATERIALS
from skysense_jax.modalities import OSM, select

MODALITIES = ("hr", "s2", "s1")
# Names of the values 1, 2, ... of the hidden attributes; 0 = does not apply.
ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "crop_type": CROP_TYPES,
    "roof_material": ROOF_MATERIALS,
    "forest_type": FOREST_TYPES,
}
_MISSING_SHARE = dict(labels=0.1, hr=0.1, s2=0.0, s1=0.1)
_UNDATED_SHARE = 0.04
_SWATH_EDGE_SHARE = 0.06
_STREAMS = ("place", "layout", "hr", "s2", "s1", "gaps")  # order is part of the dataset


@dataclasses.dataclass(frozen=True)
class Scene:
    """A sample and what is known about it beyond any record.

    Attributes:
      sample: as a record would give it.
      attributes: per name of ``ATTRIBUTES`` [4 extent, 4 extent] uint8, aligned with the labels; also where the map
        has no label.
      landscape: which mix of land uses it was drawn from.
    """

    sample: Sample
    attributes: Mapping[str, np.ndarray]
    landscape: str


def _days(rng: np.random.Generator, *, count: int, year: int) -> tuple[np.ndarray, np.ndarray]:
    """Days since 1970 and days of the year of ``count`` dates, at least five days apart."""
    of_year = np.sort(rng.choice(73, count, replace=False)) * 5 + int(rng.integers(1, 6))
    start = (datetime.date(year, 1, 1) - datetime.date(1970, 1, 1)).days
    return (start + of_year - 1).astype(np.int32), of_year.astype(np.float32)


def _series(images: np.ndarray, *, days: np.ndarray, gsd_m: float, cloud=None, orbits=None) -> Series:
    shape = images.shape[:3]
    return Series(
        images=images,
        valid=np.ones(shape, bool),
        cloud=np.zeros(shape, bool) if cloud is None else cloud,
        days=days,
        orbits=np.zeros(len(days), np.uint8) if orbits is None else orbits,
        native_gsd_m=gsd_m,
    )


def _with_gaps(series: Series, rng: np.random.Generator) -> Series:
    """The series as archives have it: some dates without a day, some cut by the edge of a swath."""
    valid, images = series.valid.copy(), series.images.copy()
    days = np.where(rng.random(len(series.days)) < _UNDATED_SHARE, UNDATED, series.days).astype(np.int32)
    side = images.shape[1]
    y, x = np.meshgrid(*[np.linspace(-0.5, 0.5, side)] * 2, indexing="ij")
    for date in np.flatnonzero(rng.random(len(days)) < _SWATH_EDGE_SHARE):
        turn = rng.uniform(0, 2 * np.pi)
        valid[date] = x * np.cos(turn) + y * np.sin(turn) < rng.uniform(-0.1, 0.45)
        images[date][~valid[date]] = 0
    return dataclasses.replace(series, images=images, valid=valid, days=days)


def render(
    index: int,
    *,
    seed: int,
    extent_cells: int,
    modalities: Sequence[str] = MODALITIES,
    complete: bool = False,
) -> Scene:
    """Scene number ``index`` of the dataset ``seed``, a square of ``extent_cells`` cells.

    ``complete``: every modality and label is there, every date dated, every pixel valid (for probes and pictures);
    otherwise some are missing, as in real archives. Clouds and unmapped ground stay in either case.

    Raises:
      ValueError: a modality that scenes do not have, or an extent out of range.
    """
    unknown = [name for name in modalities if name not in MODALITIES]
    if unknown or not modalities:
        raise ValueError(
            f"config.data.modalities: got {tuple(modalities)}; procedural scenes have {MODALITIES}, wanted one or more"
        )
    rng = {name: np.random.default_rng((seed, index, stream)) for stream, name in enumerate(_STREAMS)}
    place = rng["place"]
    latitude, longitude, year = place.uniform(38, 58), place.uniform(-8, 30), int(place.integers(2017, 2025))
    layout = scenes_layout.build(rng["layout"], extent_cells=extent_cells)
    needs_shares = "s2" in modalities or "s1" in modalities
    shares = scenes_render.surface_shares(layout) if needs_shares else None

    series = {}
    if "hr" in modalities:
        days, of_year = _days(rng["hr"], count=1, year=year)
        image = scenes_render.render_hr(layout, rng["hr"], day_of_year=float(of_year[0]), latitude=latitude)
        series["hr"] = _series(image[None], days=days, gsd_m=10.0 / scenes_render.PER_CELL)
    if "s2" in modalities:
        days, of_year = _days(rng["s2"], count=int(rng["s2"].integers(8, 17)), year=year)
        seen = scenes_render.render_s2(layout, rng["s2"], shares=shares, days_of_year=of_year, latitude=latitude)
        series["s2"] = _series(seen.images, days=days, gsd_m=10.0, cloud=seen.cloud)
    if "s1" in modalities:
        days, of_year = _days(rng["s1"], count=int(rng["s1"].integers(4, 9)), year=year)
        descending = rng["s1"].random(len(days)) < rng["s1"].choice([0.0, 0.5, 0.5, 1.0])
        images = scenes_render.render_s1(layout, rng["s1"], shares=shares, days_of_year=of_year, descending=descending)
        orbits = np.where(descending, ORBITS.index("descending"), ORBITS.index("ascending")).astype(np.uint8)
        series["s1"] = _series(images, days=days, gsd_m=10.0, orbits=orbits)

    def raster(field: str) -> np.ndarray:
        return scenes_render.sample_raster(layout, layout.column(field, np.int64), pixels_per_cell=OSM.pixels_per_cell)

    labels = raster("label")
    if not complete:
        # drawn for all, whatever was asked for, so that a scene has the same gaps in every subset
        lost = {name: rng["gaps"].random() < share for name, share in _MISSING_SHARE.items()}
        streams = dict(zip(MODALITIES, rng["gaps"].spawn(len(MODALITIES))))
        kept = [name for name in series if not lost[name]] or list(series)[:1]
        series = {name: _with_gaps(series[name], streams[name]) for name in kept}
        labels = None if lost["labels"] else labels
    sample = Sample(
        id=f"scene-{seed}-{index}",
        extent_cells=extent_cells,
        series=series,
        labels=labels,
        longitude=round(longitude, 4),
        latitude=round(latitude, 4),
        provenance=f"procedural scene, seed {seed}, index {index}",
        licence="Apache-2.0",
    )
    attributes = dict(zip(ATTRIBUTES, (raster("crop"), raster("roof"), raster("forest"))))
    return Scene(sample=sample, attributes=attributes, landscape=layout.landscape)


@dataclasses.dataclass(frozen=True)
class SceneSource:
    """A random-access source of samples for Grain: scenes ``first_index`` to ``first_index + num_scenes - 1``."""

    num_scenes: int
    first_index: int = 0
    seed: int = 0
    extent_cells: int = 24
    modalities: tuple[str, ...] = MODALITIES
    complete: bool = False

    def __post_init__(self):
        if self.num_scenes < 1:
            raise ValueError(f"config.data.scenes.num_scenes: got {self.num_scenes}; wanted at least 1")
        largest = scenes_layout.MAX_EXTENT_CELLS
        if not 1 <= self.extent_cells <= largest:
            raise ValueError(f"config.data.scenes.extent_cells: got {self.extent_cells}; wanted 1 to {largest}")
        if self.first_index < 0 or self.seed < 0:
            raise ValueError(
                f"config.data.scenes: got first_index {self.first_index} and seed {self.seed}; wanted both 0 or greater"
            )

    def __len__(self) -> int:
        return self.num_scenes

    def __getitem__(self, i: int) -> Sample:
        if not 0 <= i < self.num_scenes:
            raise IndexError(f"scene {i} of {self.num_scenes}")
        return render(
            self.first_index + int(i),
            seed=self.seed,
            extent_cells=self.extent_cells,
            modalities=self.modalities,
            complete=self.complete,
        ).sample


def write_records(
    source: SceneSource,
    directory: pathlib.Path,
    *,
    scenes_per_shard: int,
    num_processes: int,
    codecs: Mapping[str, str] | None = None,
) -> list[pathlib.Path]:
    """The files written: all scenes of ``source`` as records, in order, ``scenes_per_shard`` a file.

    ``codecs`` as in ``records.encode_sample``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    starts, paths = range(0, len(source), scenes_per_shard), []
    spawn = multiprocessing.get_context("spawn")  # a fork would copy the locks of running threads
    with concurrent.futures.ProcessPoolExecutor(num_processes, mp_context=spawn) as pool:
        for shard, start in enumerate(starts):
            path = directory / f"scenes-{shard:05d}-of-{len(starts):05d}.array_record"
            indices = range(start, min(start + scenes_per_shard, len(source)))
            with records.ShardWriter(path) as writer:
                for payload in pool.map(functools.partial(_encode, source, codecs), indices, chunksize=8):
                    writer.write(payload)
            paths.append(path)
    return paths


def _encode(source: SceneSource, codecs: Mapping[str, str] | None, i: int) -> bytes:
    return records.encode_sample(source[i], select(source.modalities), codecs=codecs)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m skysense_jax.data.scenes", description="Procedural scenes as record files."
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="directory; made if it is not there")
    parser.add_argument("--num_scenes", type=int, required=True)
    parser.add_argument("--first_index", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--extent_cells", type=int, default=24, help="side of a scene in cells of 10 m")
    parser.add_argument("--modalities", nargs="+", default=list(MODALITIES), choices=MODALITIES)
    parser.add_argument("--complete", action="store_true", help="nothing missing: every modality, date and pixel")
    parser.add_argument("--hr_codec", choices=("jpeg", "png"), default="jpeg", help="visually lossless, or lossless")
    parser.add_argument("--scenes_per_shard", type=int, default=1024)
    parser.add_argument("--num_processes", type=int, default=os.cpu_count())
    options = vars(parser.parse_args(arguments))
    directory, codecs = options.pop("out"), {"hr": options.pop("hr_codec")}
    how = {name: options.pop(name) for name in ("scenes_per_shard", "num_processes")}
    try:
        source = SceneSource(**{**options, "modalities": tuple(options["modalities"])})
    except ValueError as error:
        parser.error(str(error))
    if there := sorted(directory.glob("*.array_record")):
        parser.error(
            f"--out: {directory} holds {len(there)} record files, which a glob would read too; wanted a new folder"
        )
    for path in write_records(source, directory, codecs=codecs, **how):
        print(path)


if __name__ == "__main__":
    main()
