"""Readers of the folders that hold images of 1 m and finer, each into the row of the table whose pixels fit.

The rows ``naip`` and ``pan`` are not in the table: the caller gives them (config.data.new_modalities).
Read next: read_sentinel.py (the other folders), samples.py (which runs them all).
"""

import json
import pathlib
from collections.abc import Mapping

import h5py
import numpy as np
from rasterio.crs import CRS
from rasterio.transform import from_origin

from skysense_jax.data.sample import Sample
from skysense_jax.ingest import osm
from skysense_jax.ingest.rasters import (
    Raster,
    Refused,
    Square,
    native_gsd_m,
    own_cells,
    resample,
    whole_cells,
)
from skysense_jax.ingest.read_sentinel import Item, aerial_series, single
from skysense_jax.ingest.windows import read_raster
from skysense_jax.modalities import Modality


def find_aerial(folder: pathlib.Path) -> list[Item]:
    """NEON camera images: RGB of about 0.1 m."""
    images = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".tif", ".png", ".jpg"))
    return [Item(path=p, files=(p,), read=lambda p=p: [_read_aerial(p)]) for p in images]


def _read_aerial(path: pathlib.Path) -> Sample:
    """An ``hr`` sample of the whole cells that the image covers; the day is not in the file."""
    raster = read_raster(path, bands=(1, 2, 3))
    square = whole_cells(raster)
    longitude, latitude = square.centre()
    return Sample(
        id=f"hr/{path.stem}",
        extent_cells=square.cells,
        series={"hr": aerial_series(raster, square, "hr")},
        longitude=longitude,
        latitude=latitude,
        provenance=f"NEON airborne camera, {path.name}",
        licence="CC0-1.0",
    )


_NAIP_BANDS = ("Red", "Green", "Blue", "NearInfrared")
_NAIP_GSD_M = 1.0
_NOWHERE = CRS.from_epsg(32617)  # any UTM zone: a chip without a place needs metres, not a position


def find_naip(folder: pathlib.Path, rows: Mapping[str, Modality]) -> list[Item]:
    """GEO-Bench chips of Chesapeake land cover: NAIP RGB and near infrared of 1 m in HDF5."""
    chips = sorted((folder / "geobench").glob("*.hdf5"))
    return [Item(path=p, files=(p,), read=lambda p=p: [_read_naip(p, _row(rows, "naip"))]) for p in chips]


def _read_naip(path: pathlib.Path, row: Modality) -> Sample:
    """A ``naip`` sample of the whole cells from the chip's north-west corner; place and day are not in the file."""
    with h5py.File(path) as file:
        missing = [name for name in _NAIP_BANDS if name not in file]
        if missing:
            raise Refused(f"bands missing: {' '.join(missing)}; there are {' '.join(sorted(file))}")
        pixels = np.stack([file[name][:] for name in _NAIP_BANDS], -1)
    valid = np.isfinite(pixels).all(-1)
    if not valid.any():
        raise Refused("no pixel is a number in all bands")
    if not (pixels[valid].min() >= 0 and pixels[valid].max() <= 1):
        raise Refused(f"values {pixels[valid].min():.3g} to {pixels[valid].max():.3g}; wanted shares 0-1 of 255")
    raster = Raster(
        pixels=np.where(valid[..., None], pixels, 0) * 255,
        valid=valid,
        transform=from_origin(5e5, 4e6, _NAIP_GSD_M, _NAIP_GSD_M),
        crs=_NOWHERE,
    )
    cells = own_cells(*valid.shape, pixel_size_m=_NAIP_GSD_M)
    if cells < 1:
        raise Refused(f"{valid.shape[0]} x {valid.shape[1]} pixels of {_NAIP_GSD_M:g} m hold no whole 10 m cell")
    square = Square(west=5e5, north=4e6, cells=cells, crs=_NOWHERE)
    image = resample(raster, square, pixels_per_cell=row.pixels_per_cell, dtype=row.dtype)
    return Sample(
        id=f"naip/{path.stem}",
        extent_cells=cells,
        series={"naip": single(image.pixels, image.valid, native_gsd_m=_NAIP_GSD_M)},
        provenance=f"NAIP, GEO-Bench cvpr_chesapeake_landcover {path.name}",
        licence="public domain (USDA NAIP)",
    )


def find_panchromatic(folder: pathlib.Path, rows: Mapping[str, Modality]) -> list[Item]:
    """The SpaceNet sample: a panchromatic image and building outlines with OpenStreetMap's attributes."""
    image, outlines = folder / "sample_geotiff.tif", folder / "geotiff_labels.geojson"
    if not image.exists():
        return []
    return [
        Item(path=image, files=(image, outlines), read=lambda: [_read_panchromatic(image, outlines, _row(rows, "pan"))])
    ]


def _read_panchromatic(path: pathlib.Path, outlines: pathlib.Path, row: Modality) -> Sample:
    """A ``pan`` sample with labels: one band of 16 bits is no ``hr``, and labels without imagery are no sample."""
    if not outlines.exists():
        raise Refused(f"no {outlines.name} beside it: the outlines are missing")
    raster = read_raster(path, bands=(1,))
    square = whole_cells(raster)
    image = resample(raster, square, pixels_per_cell=row.pixels_per_cell, dtype=row.dtype)
    collection = json.loads(outlines.read_text())
    features = [(feature["geometry"], feature["properties"]) for feature in collection["features"]]
    longitude, latitude = square.centre()
    return Sample(
        id=f"pan_osm/{path.stem}",
        extent_cells=square.cells,
        series={"pan": single(image.pixels, image.valid, native_gsd_m=native_gsd_m(raster, square.crs))},
        labels=osm.rasterise(features, square, crs=osm.geojson_crs(collection)),
        longitude=longitude,
        latitude=latitude,
        provenance=f"SpaceNet 4, WorldView-2 panchromatic {path.name}, outlines {outlines.name}",
        licence="CC-BY-SA-4.0",
    )


def find_extracts(folder: pathlib.Path) -> list[Item]:
    """OpenStreetMap extracts: refused here, since no imagery of their places lies in the folder."""
    extracts = sorted(p for p in folder.iterdir() if p.suffix in (".pbf", ".osm"))
    return [Item(path=p, files=(p,), read=_refuse_extract) for p in extracts]


def _refuse_extract() -> list[Sample]:
    raise Refused("labels without imagery of the same place are no sample")


def _row(rows: Mapping[str, Modality], name: str) -> Modality:
    if name not in rows:
        raise Refused(f"no row {name!r} in the table; wanted one in config.data.new_modalities")
    return rows[name]
