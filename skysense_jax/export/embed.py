"""Writes a GeoTIFF of features of GeoTIFFs: ``python -m skysense_jax.export.embed --model=DIR --MODALITY FILE...``.

Files of any size and coordinate system come onto one grid of 10 m cells (ground.py), tiles with overlap go through the
network of an exported directory, and what comes out is blended (mosaic.py). Needs torch, safetensors, numpy and
rasterio; no code of the directory is run.
"""

import argparse
import contextlib
import dataclasses
import datetime
import pathlib
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import click
import numpy as np
import rasterio
import torch
from rasterio.errors import RasterioError

from skysense_jax.export.ground import Grid, Raster, choose_grid
from skysense_jax.export.modeling_skysensev2 import CHECKSUMS, CONFIG, WEIGHTS, SkySenseV2, read_config
from skysense_jax.export.mosaic import Mosaic, Tile, tiles, weights

CACHE_MB = 256  # of GDAL, whose default is a share of the machine's memory
FUSED = "fused"


@dataclasses.dataclass(frozen=True)
class Series:
    """The files of a modality, one a date, and their days of the year 1-366, 0 for undated."""

    rasters: tuple[Raster, ...]
    days: tuple[int, ...]
    dates: tuple[str, ...]


# ---- the command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help says what is wanted")


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and the names of the model's modalities, each of which has flags of its own.

    Raises:
      ValueError: a wrong argument, or ``--model`` is no exported directory.
    """
    options = dict(prog="python -m skysense_jax.export.embed", allow_abbrev=False)
    first = _Parser(**options, add_help=False)
    first.add_argument("--model")
    model = first.parse_known_args(arguments)[0].model
    try:
        names = [row["name"] for row in read_config(model, verify=False)["modalities"]] if model else []
    except (KeyError, TypeError) as error:
        raise ValueError(f"--model: {model}/{CONFIG} has no modalities; wanted an exported directory") from error
    first_line, _, rest = (__doc__ or "").partition("\n\n")
    parser = _Parser(**options, description=first_line, epilog=rest)
    parser.add_argument("--model", required=True, help="an exported directory; with --help, says its modalities")
    for name in names:
        group = parser.add_argument_group(name)
        group.add_argument(f"--{name}", nargs="+", metavar="FILE", help="one a date")
        group.add_argument(
            f"--{name}_dates", nargs="+", metavar="DATE", help="2021-07-23, one a file; undated if absent"
        )
        group.add_argument(f"--{name}_bands", nargs="+", metavar="BAND", help="the bands of the files, in their order")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="GeoTIFF to write")
    parser.add_argument("--preview", type=pathlib.Path, help="PNG to write; OUT with .png")
    parser.add_argument("--overwrite", action="store_true", help="--out and --preview may exist")
    parser.add_argument(
        "--features", choices=(FUSED, *names), help="fused, or a modality's last stage, the mean over its dates"
    )
    parser.add_argument("--tile", type=int, default=64, help="side in cells of what the network sees at once")
    parser.add_argument("--overlap", type=int, default=16, help="cells that neighbouring tiles share")
    parser.add_argument("--bounds", type=float, nargs=4, metavar=("WEST", "SOUTH", "EAST", "NORTH"), help="in --crs")
    parser.add_argument("--crs", help="of the output, e.g. EPSG:32633; the finest file's, or its UTM zone")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    if not any(getattr(args, name) for name in names):
        raise ValueError(f"no file given; wanted one or more of {' '.join(f'--{name}' for name in names)}")
    if not 0 <= args.overlap < args.tile:
        raise ValueError(f"--overlap {args.overlap}, --tile {args.tile}; wanted 0 or more and less than --tile")
    args.bounds = args.bounds and tuple(args.bounds)
    args.preview = args.preview or args.out.with_suffix(".png")
    inputs = {pathlib.Path(path).absolute() for name in names for path in getattr(args, name) or ()}
    if args.out.absolute() == args.preview.absolute() or {args.out.absolute(), args.preview.absolute()} & inputs:
        raise ValueError(f"--out {args.out}, --preview {args.preview}; wanted two files that are not read")
    for flag, path in (("--out", args.out), ("--preview", args.preview)):
        if path.is_dir() or (path.exists() and not args.overwrite):
            raise ValueError(f"{flag}: {path} exists; wanted a new name, or a file and --overwrite")
    return args, names


def _series(args: argparse.Namespace, name: str, model: SkySenseV2) -> Series | None:
    """The files of a modality, open; None: none are given."""
    paths, dates, bands = (getattr(args, f"{name}{what}") for what in ("", "_dates", "_bands"))
    if not paths:
        if dates or bands:
            raise ValueError(f"--{name}_dates or --{name}_bands without --{name}; wanted its files")
        return None
    if dates and len(dates) != len(paths):
        raise ValueError(f"--{name}_dates: {len(dates)} dates, {len(paths)} files; wanted one a file")
    days = []
    for date in dates or ():
        try:
            days.append(datetime.date.fromisoformat(date).timetuple().tm_yday)
        except ValueError as error:
            raise ValueError(f"--{name}_dates: {date!r}; wanted a date such as 2021-07-23") from error
    rasters = tuple(
        Raster(path, model.modalities[name], band_order=model.band_order, band_names=bands) for path in paths
    )
    return Series(rasters, tuple(days or [0] * len(paths)), tuple(dates or ["undated"] * len(paths)))


# ---- from files to features


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """What the network gets of a tile: of each modality with data there, the dates with data there."""

    images: dict[str, torch.Tensor]
    valid: dict[str, torch.Tensor]
    days: dict[str, torch.Tensor]


def _read(series: Mapping[str, Series], tile: Tile, out_of_range: dict[str, int], device: torch.device) -> _Inputs:
    """A tile of all files; adds to ``out_of_range`` the pixels of the tile's core that are."""
    images, valid, days = {}, {}, {}
    for name, of_modality in series.items():
        dates = []
        per_cell = of_modality.rasters[0].modality.pixels_per_cell
        top, left = tile.core.row_off - tile.cells.row_off, tile.core.col_off - tile.cells.col_off
        rows, columns = (
            slice(per_cell * a, per_cell * (a + b)) for a, b in ((top, tile.core.height), (left, tile.core.width))
        )
        for raster, day in zip(of_modality.rasters, of_modality.days):
            pixels = raster.read(tile.cells)
            out_of_range[name] += int(pixels.out_of_range[rows, columns].sum())
            if pixels.valid.any():
                dates.append((pixels.values, pixels.valid, day))
        if not dates:
            continue
        values, masks, of_dates = zip(*dates)
        images[name] = torch.from_numpy(np.stack(values))[None].to(device)
        if not np.all(masks):
            valid[name] = torch.from_numpy(np.stack(masks))[None].to(device)
        days[name] = torch.tensor([of_dates], device=device)
    return _Inputs(images, valid, days)


def _features(model: SkySenseV2, inputs: _Inputs, wanted: str) -> tuple[np.ndarray, np.ndarray]:
    """[D P Q] features of a tile and [P Q] where they are some."""
    arguments = dict(valid=inputs.valid, day_of_year=inputs.days)
    if wanted == FUSED:
        out = model(inputs.images, **arguments)
        return out.fused[0].float().cpu().numpy(), out.fused_valid[0].cpu().numpy()
    out = model(inputs.images, **arguments, fuse=False)
    maps, there = out.stages[wanted][-1][0].float(), out.valid[wanted][0][:, None]  # T D P Q, T 1 P Q
    mean = torch.where(there, maps, 0.0).sum(0) / there.sum(0).clamp(min=1)
    return mean.cpu().numpy(), there[:, 0].any(0).cpu().numpy()


def _wanted(args: argparse.Namespace, model: SkySenseV2, given: Sequence[str]) -> str:
    """Whose features are written.

    Raises:
      ValueError: the weights have no fusion, or a modality's features without its files.
    """
    wanted = args.features or (FUSED if model.fusion is not None else given[0])
    if wanted == FUSED and model.fusion is None:
        raise ValueError(f"--features fused: {args.model} holds the backbone alone; wanted one of {' '.join(given)}")
    if wanted != FUSED and wanted not in given:
        raise ValueError(f"--features {wanted}: no file of it is given; wanted --{wanted}")
    return wanted


def _tags(
    args: argparse.Namespace, config: Mapping[str, Any], wanted: str, series: Mapping[str, Series]
) -> dict[str, str]:
    """What the GeoTIFF says about where it comes from."""
    lines = (line.split(maxsplit=1) for line in (pathlib.Path(args.model) / CHECKSUMS).read_text().splitlines())
    sums, training = {line[1]: line[0] for line in lines if len(line) == 2}, config["training"]
    tags = {
        "MODEL": (training.get("config") or {}).get("name", pathlib.Path(args.model).name),
        "STEP": training.get("step", "unknown"),
        "WEIGHTS": training.get("weights", "unknown"),
        "WEIGHTS_SHA256": sums[WEIGHTS],
        "FEATURES": wanted,
        "TILE_CELLS": args.tile,
        "OVERLAP_CELLS": args.overlap,
    }
    tags.update({f"DATES_{name.upper()}": " ".join(of_modality.dates) for name, of_modality in series.items()})
    return {key: str(value) for key, value in tags.items()}


@contextlib.contextmanager
def _opened(args: argparse.Namespace, names: Sequence[str], model: SkySenseV2) -> Iterator[dict[str, Series]]:
    """The given series, in the order of the model's table, closed at the end."""
    series: dict[str, Series] = {}
    try:
        for name in names:
            if (of_modality := _series(args, name, model)) is not None:
                series[name] = of_modality
        yield series
    finally:
        for of_modality in series.values():
            for raster in of_modality.rasters:
                raster.source.close()


def embed(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Writes ``args.out`` and ``args.preview``, and prints what came out.

    Raises:
      ValueError: a file, its place, its bands or its unit is not what is wanted; the model is; the disk is full.
    """
    start = time.monotonic()
    try:
        device = torch.empty(0, device=args.device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device}: {str(error).splitlines()[0]}") from error
    config = read_config(args.model)
    model = SkySenseV2.from_pretrained(args.model, verify=False, check_inputs=False, out_indices=(3,)).to(device)
    with _opened(args, names, model) as series:
        wanted = _wanted(args, model, tuple(series))
        finest = max(series, key=lambda name: model.modalities[name].pixels_per_cell)
        grid = choose_grid(series[finest].rasters[0], cell_m=config["cell_m"], crs=args.crs, bounds=args.bounds)
        for raster in (raster for of_modality in series.values() for raster in of_modality.rasters):
            raster.place(grid)
            raster.check_unit()
            for note in raster.notes:
                print(f"note: {note}", file=sys.stderr)
        dim = model.fused_dim if wanted == FUSED else model.num_features[-1]
        read = series if wanted == FUSED else {wanted: series[wanted]}
        out_of_range = dict.fromkeys(read, 0)
        with Mosaic(args.out, args.preview, grid=grid, dim=dim) as mosaic:
            todo = tiles(grid.rows, grid.columns, tile=args.tile, overlap=args.overlap)
            with click.progressbar(todo, label="tiles", file=sys.stderr) as bar, torch.inference_mode():
                for tile in bar:
                    inputs = _read(read, tile, out_of_range, device)
                    if inputs.images:
                        features, there = _features(model, inputs, wanted)
                        share = weights(tile, grid.rows, grid.columns, overlap=args.overlap)
                        mosaic.add(tile.cells, features, np.where(there, share, 0))
            descriptions = [f"{wanted}_{index:03d}" for index in range(dim)]
            empty = mosaic.finish(descriptions=descriptions, tags=_tags(args, config, wanted, series))
        _report(args, grid, dim, empty, read, out_of_range, time.monotonic() - start)


def _report(
    args: argparse.Namespace,
    grid: Grid,
    dim: int,
    empty: int,
    read: Mapping[str, Series],
    out_of_range: Mapping[str, int],
    seconds: float,
) -> None:
    """Prints what came out."""
    cells = grid.rows * grid.columns
    print(f"{args.out}: {grid.rows} x {grid.columns} cells of {grid.cell_m:g} m, {dim} features, {grid.crs}")
    print(f"{args.preview}: three principal components as red, green and blue")
    print(f"{cells} cells, {empty} without data")
    for name, count in out_of_range.items():
        m = read[name].rasters[0].modality
        pixels = cells * m.pixels_per_cell**2 * len(read[name].rasters)
        low, high = m.value_range
        print(f"{name}: {count} of {pixels} pixels held values outside {low} to {high}, taken as no data")
    print(f"{seconds:.1f} s, {args.out.stat().st_size / 2**20:.1f} MiB")


def main(arguments: Sequence[str]) -> int:
    """Exit status 0, or 1 after one line that says what is wrong; then nothing was written."""
    try:
        with rasterio.Env(GDAL_CACHEMAX=CACHE_MB):
            embed(*parse(arguments))
    except torch.cuda.OutOfMemoryError:
        print("error: the tile does not fit the device's memory; wanted a smaller --tile", file=sys.stderr)
    except (ValueError, OSError, RasterioError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
    else:
        return 0
    return 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a scheduler's kill tidies up as Ctrl-C does
    sys.exit(main(sys.argv[1:]))
