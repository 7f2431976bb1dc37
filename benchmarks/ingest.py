"""Is the builder as fast as a plain loop of rasterio over the same windows, and what does each stage cost?

python -m benchmarks.ingest --places=48

An archive is made up (tests/ingest/earth.py): aerial imagery of 0.5 m beside the grid, four Sentinel-2 products and
three Sentinel-1 rasters in the zone beside, OpenStreetMap objects. The plain loop opens each file and reprojects each
band onto the place, without masks, units, offsets, clouds or records. One process each, by turns.
"""

import argparse
import pathlib
import resource
import statistics
import tempfile
import time

import numpy as np
import rasterio
import rasterio.warp
import shapely

from skysense_jax.data.records import encode_sample
from skysense_jax.ingest import acquisitions as acquisitions_lib
from skysense_jax.ingest import build, labels, osm, places, plan, sources
from skysense_jax.ingest.series import read_series
from skysense_jax.modalities import MODALITIES
from tests.ingest import earth

_ROUNDS = 3
_SIDE_M = 6400  # of the made-up ground
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


def make_archive(root: pathlib.Path) -> None:
    """Files around the corner of the made-up Earth's square, those of Sentinel in the zone beside."""
    for row in range(4):
        for column in range(4):
            west, north = earth.WEST - 3.3 + 1600 * column, earth.NORTH + 2.9 - 1600 * row
            path = root / "aerial" / f"{row}{column}.tif"
            earth.write_aerial(path, west=west, north=north, width=3300, height=3300, size=0.5)
    around = (earth.WEST - 500, earth.NORTH - _SIDE_M - 500, earth.WEST + _SIDE_M + 500, earth.NORTH + 500)
    west, south, east, north = rasterio.warp.transform_bounds(f"EPSG:{earth.ZONE}", "EPSG:32631", *around)
    corner = dict(
        west=round(west, -2), north=round(north, -2), side_m=int(max(east - west, north - south) // 100 * 100)
    )
    for day in ("20220601", "20220606", "20220611", "20220616"):
        earth.write_safe(root / "s2", day=day, epsg=32631, **corner)
    for day in ("2022:06:02", "2022:06:08", "2022:06:14"):
        earth.write_radar(root / "s1" / f"{day[-2:]}.tif", day=day, epsg=32631, **corner)
    (root / "list.toml").write_text(_LIST)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--places", type=int, default=48)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        make_archive(root)
        listed = sources.read_list(root / "list.toml")
        ground = (earth.WEST, earth.NORTH - _SIDE_M, earth.WEST + _SIDE_M, earth.NORTH)
        bounds = rasterio.warp.transform_bounds(f"EPSG:{earth.ZONE}", "EPSG:4326", *ground)
        choice = plan.Choice(require=("hr", "s2", "s1"), validation_share=0.0)
        plan.plan(listed, root / "manifest", area=shapely.box(*bounds).buffer(-0.015), choice=choice)
        found = acquisitions_lib.read(root / "manifest" / plan.ACQUISITIONS)
        chosen = places.read(root / "manifest" / plan.PLACES)[: given.places]
        rng = np.random.default_rng(0)
        corners = rng.uniform((11.83, 49.58), (11.93, 49.66), (20_000, 2))
        houses = [osm.Feature("building", shapely.box(x, y, x + 2e-4, y + 1e-4)) for x, y in corners]
        writer = labels.Writer(root / "labels.parquet")
        writer.add("map", houses)
        writer.close(["map"])
        maps = labels.LabelMaps(root / "labels.parquet", [labels.Coverage("map", (11.0, 49.0, 12.5, 50.5))])
        seconds: dict[str, list[float]] = {}

        def timed(stage, do):
            began = time.perf_counter()
            result = do()
            seconds.setdefault(stage, []).append(time.perf_counter() - began)
            return result

        def of(place, name):
            return [found[row] for row in place.acquisitions if found[row].modality == name]

        builder = build.Builder(root / "manifest", min_clear_share=0.1, places_per_shard=64)
        for _ in range(_ROUNDS):
            for place in chosen:
                looks = [found[row] for row in place.acquisitions]
                timed("plain loop", lambda: plainly(looks, place.square))
                for name in ("hr", "s2", "s1"):
                    how = dict(min_clear_share=0.1)
                    timed(f"series {name}", lambda: read_series(of(place, name), place.square, MODALITIES[name], **how))
                timed("labels", lambda: maps.draw(place.square))
                sample, rejected = builder.sample(place)
                assert not rejected, rejected
                timed("record", lambda: encode_sample(sample, tuple(MODALITIES.values())))
        print(f"{len(chosen)} places of 640 m, {_ROUNDS} rounds, medians; one process")
        median = {stage: statistics.median(values) for stage, values in seconds.items()}
        for stage, value in median.items():
            print(f"{stage:12} {1000 * value:8.1f} ms a sample {1000 * value / 60:8.2f} minutes for 1000")
        ours = sum(median[f"series {name}"] for name in ("hr", "s2", "s1"))
        print(f"series against the plain loop: {median['plain loop'] / ours:.2f} times as fast")
        whole = ours + median["labels"] + median["record"]
        print(f"samples a second and core: {1 / whole:.2f}")
        print(f"most memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
