"""Is the builder as fast as a plain loop of rasterio over the same windows, and what does each stage cost?

python -m benchmarks.ingest --places=48
python -m benchmarks.ingest --kills=20

An archive is made up (tests/ingest/earth.py): aerial imagery of 0.5 m beside the grid, four Sentinel-2 products and
three Sentinel-1 rasters in the zone beside, OpenStreetMap objects. The plain loop opens each file and reprojects each
band onto the place, without masks, units, offsets, clouds or records. One process each, by turns.

With --kills the archive is built once in peace and once by a build that is killed again and again, with all its
processes and at random; the second one's files must be those of the first, to the byte.
"""

import argparse
import dataclasses
import multiprocessing
import os
import pathlib
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import numpy as np
import rasterio
import rasterio.warp
import shapely

from skysense_jax.data.records import encode_sample
from skysense_jax.ingest import acquisitions as acquisitions_lib
from skysense_jax.ingest import build, labels, osm, places, plan, sources
from skysense_jax.ingest.acquisitions import Acquisition
from skysense_jax.ingest.places import Place
from skysense_jax.ingest.series import read_series
from skysense_jax.modalities import MODALITIES
from tests.ingest import earth

ROOT = pathlib.Path(__file__).parents[1]
_LIST = """
[[source]]
name = "aerial"
kind = "image"
files = "aerial/*.tif"
licence = "made up"
modality = "hr"
[[source]]
name = "s2"
kind = "s2_safe"
files = "s2/*.SAFE"
licence = "made up"
[[source]]
name = "s1"
kind = "s1"
files = "s1/*.tif"
licence = "made up"
"""
_ROWS = ("hr", "s2", "s1")


@dataclasses.dataclass(frozen=True)
class Archive:
    """A made-up archive in ``root``, with its manifest there, and what that lists."""

    root: pathlib.Path
    found: Sequence[Acquisition]
    chosen: Sequence[Place]


def make_files(root: pathlib.Path, side_m: int) -> None:
    """Files around the corner of the made-up Earth's square, those of Sentinel in the zone beside."""
    step = side_m // 4
    for row in range(4):
        for column in range(4):
            west, north = earth.WEST - 3.3 + step * column, earth.NORTH + 2.9 - step * row
            path, pixels = root / "aerial" / f"{row}{column}.tif", 2 * step + 100
            earth.write_aerial(path, west=west, north=north, width=pixels, height=pixels, size=0.5)
    around = (earth.WEST - 500, earth.NORTH - side_m - 500, earth.WEST + side_m + 500, earth.NORTH + 500)
    west, south, east, north = rasterio.warp.transform_bounds(f"EPSG:{earth.ZONE}", "EPSG:32631", *around)
    corner = dict(
        west=round(west, -2), north=round(north, -2), side_m=int(max(east - west, north - south) // 100 * 100)
    )
    for day in ("20220601", "20220606", "20220611", "20220616"):
        earth.write_safe(root / "s2", day=day, epsg=32631, **corner)
    for day in ("2022:06:02", "2022:06:08", "2022:06:14"):
        earth.write_radar(root / "s1" / f"{day[-2:]}.tif", day=day, epsg=32631, **corner)
    (root / "list.toml").write_text(_LIST)


def make_archive(root: pathlib.Path, *, side_m: int, cells: int) -> Archive:
    """The archive of a ground of ``side_m``; its files are made by another process, whose memory is not counted."""
    maker = multiprocessing.get_context("spawn").Process(target=make_files, args=(root, side_m))
    maker.start()
    maker.join()
    assert maker.exitcode == 0
    ground = (earth.WEST, earth.NORTH - side_m, earth.WEST + side_m, earth.NORTH)
    bounds = rasterio.warp.transform_bounds(f"EPSG:{earth.ZONE}", "EPSG:4326", *ground)
    inner = shapely.box(*bounds).buffer(-1.5e-2 * side_m / 6400)  # where the slanting strip of Sentinel is whole
    choice = plan.Choice(cells=cells, require=_ROWS, validation_share=0.0)
    plan.plan(sources.read_list(root / "list.toml"), root / "manifest", area=inner, choice=choice)
    found = acquisitions_lib.read(root / "manifest" / plan.ACQUISITIONS)
    return Archive(root, found, places.read(root / "manifest" / plan.PLACES))


def make_maps(root: pathlib.Path) -> labels.LabelMaps:
    """20 000 buildings."""
    corners = np.random.default_rng(0).uniform((11.83, 49.58), (11.93, 49.66), (20_000, 2))
    houses = [osm.Feature("building", shapely.box(x, y, x + 2e-4, y + 1e-4)) for x, y in corners]
    writer = labels.Writer(root / "labels.parquet")
    writer.add("map", houses)
    writer.close(["map"])
    return labels.LabelMaps(root / "labels.parquet", [labels.Coverage("map", (11.0, 49.0, 12.5, 50.5))])


def plainly(acquisitions, square) -> None:
    """What anyone would write: each band of each file onto the grid of the place."""
    for acquisition in acquisitions:
        per_cell = MODALITIES[acquisition.modality].pixels_per_cell
        side = square.cells * per_cell
        files = {}
        for layer in [*acquisition.layers.values(), *([acquisition.classes] if acquisition.classes else [])]:
            files.setdefault(layer.path, []).append(layer.band)
        for path, bands in files.items():
            out = np.zeros((len(bands), side, side), np.float32)
            with rasterio.open(path) as file:
                rasterio.warp.reproject(
                    rasterio.band(file, bands),
                    out,
                    dst_transform=square.transform(per_cell),
                    dst_crs=square.crs,
                    resampling=rasterio.warp.Resampling.bilinear,
                )


def measure(archive: Archive, *, num_places: int, rounds: int) -> None:
    """Prints the table."""
    maps, chosen, found = make_maps(archive.root), archive.chosen[:num_places], archive.found
    builder = build.Builder(archive.root / "manifest", min_clear_share=0.1, places_per_shard=64)
    seconds: dict[str, list[float]] = {}
    gibibytes = []

    def timed(stage, do):
        began = time.perf_counter()
        result = do()
        seconds.setdefault(stage, []).append(time.perf_counter() - began)
        return result

    for _ in range(rounds):
        for place in chosen:
            looks = [found[row] for row in place.acquisitions]
            timed("plain loop", lambda: plainly(looks, place.square))
            for name in _ROWS:
                of_row, row = [look for look in looks if look.modality == name], MODALITIES[name]
                timed(f"series {name}", lambda: read_series(of_row, place.square, row, min_clear_share=0.1))
            timed("labels", lambda: maps.draw(place.square))
            sample, rejected = builder.sample(place)
            assert not rejected, rejected
            timed("record", lambda: encode_sample(sample, tuple(MODALITIES.values())))
        gibibytes.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    side_m = 10 * chosen[0].cells
    print(f"{len(chosen)} places of {side_m} m, {rounds} rounds, medians; one process")
    median = {stage: statistics.median(values) for stage, values in seconds.items()}
    for stage, value in median.items():
        print(f"{stage:12} {1000 * value:8.1f} ms a sample {1000 * value / 60:8.2f} minutes for 1000")
    ours = sum(median[f"series {name}"] for name in _ROWS)
    print(f"series against the plain loop: {median['plain loop'] / ours:.2f} times as fast")
    print(f"samples a second and core: {1 / (ours + median['labels'] + median['record']):.2f}")
    print(f"most memory of the process after each round: {', '.join(f'{size:.2f}' for size in gibibytes)} GiB")


def kill(archive: Archive, *, num_kills: int, seed: int) -> None:
    """Prints what so many kills did; ends the process if what came of a killed build differs.

    A build that came to its end before all kills is compared, and another one is begun.
    """
    rng = random.Random(seed)
    peaceful, killed = archive.root / "peaceful", archive.root / "killed"
    began = time.perf_counter()
    assert _start(archive, peaceful).wait() == 0
    whole_s, wanted = time.perf_counter() - began, _files(peaceful)
    kills = gained = ends = 0
    while kills < num_kills or killed.exists() or not ends:
        had, run = _num_done(killed), _start(archive, killed)
        try:
            status = run.wait(rng.uniform(0.02, 0.35) * whole_s if kills < num_kills else None)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
            kills += 1
            gained += _num_done(killed) > had
            continue
        found = _files(killed)
        differing = [name for name in sorted(set(wanted) | set(found)) if wanted.get(name) != found.get(name)]
        if status or differing:
            sys.exit(f"a build that was killed ended with status {status}; differing: {differing}")
        shutil.rmtree(killed)
        ends += 1
    print(f"{len(archive.chosen)} places in peace: {whole_s:.1f} s with two workers; killed {kills} times")
    print(
        f"{gained} of these runs had finished a shard; {ends} whole builds, all {len(wanted)} files as those in peace"
    )


def _start(archive: Archive, out: pathlib.Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "skysense_jax.ingest.build", "--manifest", str(archive.root / "manifest")]
    command += ["--out", str(out), "--workers", "2", "--places_per_shard", "2"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.DEVNULL, start_new_session=True)


def _num_done(out: pathlib.Path) -> int:
    return len(list((out / "parts").glob("*.json")))


def _files(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--places", type=int, default=48, help="at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side_m", type=int, default=6400, help="of the made-up ground")
    parser.add_argument("--cells", type=int, default=64, help="along a side of a place")
    parser.add_argument("--kills", type=int, default=0, help="so many, instead of times")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        archive = make_archive(pathlib.Path(folder), side_m=given.side_m, cells=given.cells)
        if given.kills:
            kill(archive, num_kills=given.kills, seed=given.seed)
        else:
            measure(archive, num_places=given.places, rounds=given.rounds)


if __name__ == "__main__":
    main()
