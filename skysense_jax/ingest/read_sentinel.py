"""Readers of the folders with Sentinel imagery: TreeSatAI time series, WorldCereal patches, TerraMesh tiles, scenes.

Each ``find_*`` lists the items of a folder; an item reads into samples or raises ``Refused``. Bands are taken by name
or by the order that the source documents, never filled in when missing. HDF5 attributes are never unpickled.
Read next: read_aerial.py (the other folders), samples.py (which runs them all).
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence

import h5py
import netCDF4
import numpy as np
import rasterio
from rasterio.crs import CRS

from skysense_jax.data.sample import UNDATED, Sample, Series
from skysense_jax.ingest import sentinel
from skysense_jax.ingest.rasters import (
    Raster,
    Refused,
    Square,
    all_positive,
    double,
    native_gsd_m,
    nearest_cells,
    resample,
)
from skysense_jax.ingest.windows import read_raster
from skysense_jax.modalities import MODALITIES

S2_BANDS = MODALITIES["s2"].bands


@dataclasses.dataclass(frozen=True)
class Item:
    """What becomes one or several samples of one place, or is refused as a whole.

    Attributes:
      path: the file or folder that names it in messages.
      files: all that it is made of, side layers that stay out too.
      read: its samples; raises Refused.
    """

    path: pathlib.Path
    files: tuple[pathlib.Path, ...]
    read: Callable[[], Iterable[Sample]]


def find_triples(folder: pathlib.Path) -> list[Item]:
    """TreeSatAI time series: an aerial .tif and an .h5 of Sentinel series of the same name, one item each."""
    return [
        Item(path=tif, files=(tif, tif.with_suffix(".h5")), read=lambda tif=tif: [_read_triple(tif)])
        for tif in sorted(folder.glob("*.tif"))
    ]


_TRIPLE_SETS = (
    *("sen-2-data", "sen-2-masks", "sen-2-products"),
    *("sen-1-asc-data", "sen-1-asc-products", "sen-1-des-data", "sen-1-des-products"),
)


def _read_triple(tif: pathlib.Path) -> Sample:
    """The sample of one place: ``hr`` on the cell grid, ``s2``, both orbits of ``s1``.

    The .h5 does not say where its pixels lie. Sentinel pixels lie on the UTM grid, so its square is taken to be the one
    of that many cells nearest to the centre of the aerial image; what the image does not reach of it is invalid.
    """
    aerial = read_raster(tif, bands=(4, 2, 3))  # the file has IR, G, B, R
    path = tif.with_suffix(".h5")
    if not path.exists():
        raise Refused(f"no {path.name} beside it: the Sentinel series of this place are missing")
    with h5py.File(path) as file:
        data = {name: file[name][:] for name in _wanted(file, _TRIPLE_SETS)}
    names = {key: [_text(p) for p in data[key]] for key in data if key.endswith("products")}
    dn = np.moveaxis(data["sen-2-data"], 1, -1)
    masks = np.moveaxis(data["sen-2-masks"], 1, -1)
    s2 = sentinel.s2_series(
        dn,
        valid=all_positive(dn),
        cloud=sentinel.hidden_by_probability(masks[..., 0], masks[..., 1]),  # snow, cloud; the other eight are empty
        days=[sentinel.product_day(p) for p in names["sen-2-products"]],
        offsets=[sentinel.offset_from_product(p) for p in names["sen-2-products"]],
    )
    power = np.moveaxis(np.concatenate((data["sen-1-asc-data"], data["sen-1-des-data"])), 1, -1)
    products = names["sen-1-asc-products"] + names["sen-1-des-products"]
    s1 = sentinel.s1_series(
        sentinel.decibels(power),
        valid=all_positive(power),
        days=[sentinel.product_day(p) for p in products],
        orbits=["ascending"] * len(data["sen-1-asc-data"]) + ["descending"] * len(data["sen-1-des-data"]),
    )
    square = nearest_cells(aerial, cells=dn.shape[1])
    return _place(
        Sample(
            id=f"triple/{tif.stem}",
            extent_cells=square.cells,
            series={"hr": aerial_series(aerial, square, "hr"), "s2": s2, "s1": s1},
            provenance=f"TreeSatAI-Time-Series {tif.name}, {path.name}",
            licence="CC-BY-4.0",
        ),
        square,
    )


def aerial_series(raster: Raster, square: Square, modality: str) -> Series:
    """One undated image of the row called ``modality`` (of the table) from a raster."""
    image = resample(raster, square, pixels_per_cell=MODALITIES[modality].pixels_per_cell)
    return single(image.pixels, image.valid, native_gsd_m=native_gsd_m(raster, square.crs))


def single(pixels: np.ndarray, valid: np.ndarray, *, native_gsd_m: float, day: int = UNDATED) -> Series:
    """A series of one date without clouds or orbit."""
    return Series(
        images=pixels[None],
        valid=valid[None],
        cloud=np.zeros_like(valid)[None],
        days=np.array([day], np.int32),
        orbits=np.zeros(1, np.uint8),
        native_gsd_m=native_gsd_m,
    )


def _place(sample: Sample, square: Square) -> Sample:
    longitude, latitude = square.centre()
    return dataclasses.replace(sample, longitude=longitude, latitude=latitude)


def find_patches(folder: pathlib.Path) -> list[Item]:
    """WorldCereal patches: a folder of NetCDF files each."""
    return [
        Item(path=d, files=tuple(sorted(d.glob("*.nc"))), read=lambda d=d: [_read_patch(d)])
        for d in sorted(folder.iterdir())
        if d.is_dir() and list(d.glob("*.nc"))
    ]


_PATCH_BANDS = {"10m": ("B02", "B03", "B04", "B08"), "20m": ("B05", "B06", "B07", "B8A", "B11", "B12")}


def _read_patch(folder: pathlib.Path) -> Sample:
    """The sample of one patch; refused as a whole if bands of ``s2`` are missing, its ``s1`` too."""
    files = {key: sorted(folder.glob(f"S2_L2A_{key}_*.nc")) for key in _PATCH_BANDS}
    radar = sorted(folder.glob("S1_GRD-*_20m_*.nc"))
    for key, found in files.items():
        if not found:
            raise Refused(f"no file S2_L2A_{key}_*.nc: bands {' '.join(_PATCH_BANDS[key])} are missing")
        if len(found) > 1:
            raise Refused(f"{len(found)} files S2_L2A_{key}_*.nc; wanted one")
    if len(radar) != 1:
        raise Refused(f"{len(radar)} files S1_GRD-*_20m_*.nc; wanted one (bands VV VH)")
    bands, days = {}, {}
    for key, (path,) in files.items():
        with netCDF4.Dataset(path) as file:
            file.set_auto_maskandscale(False)  # the numbers as stored: reflectance x 10000
            layers = {name: file[name][:] for name in _wanted(file.variables, _PATCH_BANDS[key])}
            days[key] = _netcdf_days(file)
            if key == "20m":
                scl = double(file[_wanted(file.variables, ("SCL",))[0]][:])
                layers = {name: double(layer) for name, layer in layers.items()}
                square = _netcdf_square(file, cells=scl.shape[1])
        bands |= {name.replace("B0", "B"): layer for name, layer in layers.items()}
    if days["10m"] != days["20m"]:
        raise Refused("the 10 m and the 20 m bands have different dates")
    dn = np.stack([bands[name] for name in S2_BANDS], -1)
    valid = all_positive(dn) & sentinel.valid_by_scl(scl)
    cloud = sentinel.hidden_by_scl(scl)
    sentinel.check_no_offset(dn, valid & ~cloud)  # the file names no products
    s2 = sentinel.s2_series(dn, valid=valid, cloud=cloud, days=days["10m"], offsets=[0] * len(dn))
    return _place(
        Sample(
            id=f"sentinel_series/{folder.name}",
            extent_cells=square.cells,
            series={"s2": s2, "s1": _read_patch_radar(radar[0])},
            provenance=f"WorldCereal training patch {folder.name}",
            licence="Copernicus Sentinel data terms",
        ),
        square,
    )


def _read_patch_radar(path: pathlib.Path) -> Series:
    orbit = re.search(r"S1_GRD-(ASCENDING|DESCENDING)_", path.name)
    if orbit is None:
        raise Refused(f"{path.name}: no orbit direction in the name; wanted S1_GRD-ASCENDING or S1_GRD-DESCENDING")
    with netCDF4.Dataset(path) as file:
        file.set_auto_maskandscale(False)
        raw = np.stack([file[name][:] for name in _wanted(file.variables, ("VV", "VH"))], -1)
        scale, days = float(file["VV"].scale_factor), _netcdf_days(file)  # stored in 1e-4 dB
    valid = (raw != 0).all(-1)
    return sentinel.s1_series(
        double(raw * scale),
        valid=double(valid),
        days=days,
        orbits=[orbit[1].lower()] * len(days),
        native_gsd_m=20.0,
    )


def _netcdf_days(file: netCDF4.Dataset) -> list[int]:
    """Days since 1970-01-01 of a file's timestamps."""
    variable = file[_wanted(file.variables, ("timestamp",))[0]]
    match = re.fullmatch(r"seconds since (\d{4}-\d{2}-\d{2}) (\d{2}:\d{2}:\d{2})", variable.units)
    if match is None:
        raise Refused(f"timestamps in {variable.units!r}; wanted seconds since a date and time")
    times = np.datetime64("T".join(match.groups()), "s") + variable[:].astype("timedelta64[s]")
    return times.astype("datetime64[D]").astype(int).tolist()


def _netcdf_square(file: netCDF4.Dataset, *, cells: int) -> Square:
    west, south, east, north = (float(n) for n in re.findall(r"-?\d+(?:\.\d+)?", str(file.bounds)))
    if (east - west, north - south) != (10.0 * cells,) * 2:
        raise Refused(f"bounds {file.bounds} for {cells} cells of 10 m along a side")
    return Square(west=west, north=north, cells=cells, crs=CRS.from_epsg(int(file.epsg)))


_TILE_CROP_CELLS = 64
_TILE_S2_BANDS = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B11", "B12")
_TILE_L1C_BANDS = (*_TILE_S2_BANDS[:10], "B10", *_TILE_S2_BANDS[10:])


def find_tiles(folder: pathlib.Path) -> list[Item]:
    """TerraMesh tiles. Land cover, elevation, NDVI and 10 m RGB stay out: labels for probes, and no ``hr``."""
    names = sorted({path.name for layer in ("S2L2A", "S1RTC") for path in (folder / layer).glob("*.tif")})
    return [
        Item(
            path=folder / "S2L2A" / name,
            files=tuple(folder.glob(f"*/{name}")),
            read=lambda name=name: _read_tile(folder, name),
        )
        for name in names
    ]


def _read_tile(folder: pathlib.Path, name: str) -> list[Sample]:
    """Nine samples of 64 cells: crops spread over the tile, on its own pixel grid, which is off the 10 m UTM grid."""
    paths = {layer: folder / layer / name for layer in ("S2L2A", "S2L1C", "S1RTC")}
    missing = [layer for layer, path in paths.items() if not path.exists()]
    if missing:
        raise Refused(f"{', '.join(missing)} of this tile are missing (S2L1C tells the processing baseline of S2L2A)")
    surface, top, radar = (read_raster(path) for path in paths.values())
    for layer, raster, num in (("S2L2A", surface, 12), ("S2L1C", top, 13), ("S1RTC", radar, 2)):
        if raster.pixels.shape[-1] != num:
            raise Refused(f"{layer}: {raster.pixels.shape[-1]} bands; wanted {num}")
        if not np.allclose(raster.bounds, surface.bounds, atol=0.01) or raster.crs != surface.crs:
            raise Refused(f"{layer} lies at {raster.bounds}, S2L2A at {surface.bounds}")
    s2_bands = dict(zip(_TILE_S2_BANDS, np.moveaxis(surface.pixels, -1, 0)))
    offset = sentinel.offset_from_toa(s2_bands, dict(zip(_TILE_L1C_BANDS, np.moveaxis(top.pixels, -1, 0))))
    dn = np.stack([s2_bands[band] for band in S2_BANDS], -1)[None]
    s2_day, s1_day = _tag_day(folder / "S2RGB" / name), _tag_day(paths["S1RTC"])
    samples = []
    starts = np.linspace(0, dn.shape[1] - _TILE_CROP_CELLS, 3).astype(int)
    for row in starts:
        for column in starts:
            crop = np.s_[:, row : row + _TILE_CROP_CELLS, column : column + _TILE_CROP_CELLS]
            db = radar.pixels[None][crop].astype(np.float64)
            s2 = sentinel.s2_series(
                dn[crop],
                valid=all_positive(dn[crop]),
                cloud=np.zeros(dn[crop].shape[:3], bool),  # no mask is given
                days=[s2_day],
                offsets=[offset],
            )
            s1 = sentinel.s1_series(db, valid=(np.isfinite(db) & (db != 0)).all(-1), days=[s1_day], orbits=["unknown"])
            west, north = surface.transform.c + 10 * column, surface.transform.f - 10 * row
            samples.append(
                _place(
                    Sample(
                        id=f"sentinel_single/{pathlib.Path(name).stem}/{row}_{column}",
                        extent_cells=_TILE_CROP_CELLS,
                        series={"s2": s2, "s1": s1},
                        provenance=f"TerraMesh {name}, S2L2A (offset {offset} removed) and S1RTC",
                        licence="CC-BY-SA-4.0",
                    ),
                    Square(west=float(west), north=float(north), cells=_TILE_CROP_CELLS, crs=surface.crs),
                )
            )
    return samples


def _tag_day(path: pathlib.Path) -> int:
    """Acquisition day in a GeoTIFF's tag "datetime", UNDATED if there is no file or tag."""
    if not path.exists():
        return UNDATED
    with rasterio.open(path) as file:
        text = file.tags().get("datetime")
    return UNDATED if text is None else int(np.datetime64(text[:10], "D").astype(int))


def find_scenes(folder: pathlib.Path) -> list[Item]:
    """Single chips (.hdf5, a band each data set) and Sentinel-1 scenes (.tif, a polarisation each file)."""
    chips = [Item(path=p, files=(p,), read=lambda p=p: [_read_chip(p)]) for p in sorted(folder.glob("*.hdf5"))]
    return chips + [
        Item(path=p, files=(p,), read=lambda p=p: _read_s1_scene(p)) for p in sorted(folder.glob("S1*.tif"))
    ]


def _read_chip(path: pathlib.Path) -> Sample:
    """The sample of a Sentinel-2 chip whose data sets start with a band's number ("08A - ...")."""
    bands = {}
    with h5py.File(path) as file:
        for key in file:
            match = re.match(r"0?(\d+A?)\b", key)
            if match:
                bands["B" + match[1]] = file[key][:]
    sentinel.check_bands({name: float(np.median(band)) for name, band in bands.items()})
    if "B10" in bands:
        raise Refused("has cirrus band B10, so it is Level-1C (top of atmosphere); wanted Level-2A (surface)")
    dn = np.stack([bands[name] for name in _wanted(bands, S2_BANDS)], -1)[None]
    valid = all_positive(dn)
    sentinel.check_no_offset(dn, valid)
    s2 = sentinel.s2_series(dn, valid=valid, cloud=np.zeros_like(valid), days=[UNDATED], offsets=[0])
    return Sample(
        id=f"scenes/{path.stem}",
        extent_cells=dn.shape[1],
        series={"s2": s2},
        provenance=path.name,
        licence="Copernicus Sentinel data terms",
    )


def _read_s1_scene(path: pathlib.Path) -> list[Sample]:
    found = re.findall(r"_(VV|VH|HH|HV)_", path.name)
    missing = [band for band in MODALITIES["s1"].bands if band not in found]
    if missing:
        raise Refused(f"polarisations in the file: {' '.join(found) or 'none'}; missing: {' '.join(missing)}")
    raise Refused("a scene with both polarisations in one file: no reader for its layout")


def _wanted(have: Iterable[str], names: Sequence[str]) -> Sequence[str]:
    """``names``, if all are there; raises Refused that names those that are not."""
    missing = [name for name in names if name not in have]
    if missing:
        raise Refused(f"missing: {' '.join(missing)}; there are {' '.join(sorted(have))}")
    return names


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
