"""Sentinel-2 Level-2A products in their SAFE folders, as the Copernicus archives hand them out.

The metadata decide what is subtracted from the numbers, and must not contradict themselves; nothing is told by a date.
Source: Sentinel-2 Products Specification Document, Level-2A product metadata (MTD_MSIL2A.xml). Next: sources.py.
"""

import pathlib
from xml.etree import ElementTree

import numpy as np
import shapely
from shapely.errors import ShapelyError

from skysense_jax.ingest.acquisitions import Acquisition, Layer
from skysense_jax.ingest.geotiffs import bounds_of
from skysense_jax.ingest.ground import footprint
from skysense_jax.ingest.rasters import Refused
from skysense_jax.ingest.sentinel import offset_of_baseline, product_day
from skysense_jax.modalities import MODALITIES

METADATA = "MTD_MSIL2A.xml"
_QUANTIFICATION = 10000
_IN_20M = ("B5", "B6", "B7", "B8A", "B11", "B12")
_BAND_IDS = dict(B2=1, B3=2, B4=3, B5=4, B6=5, B7=6, B8=7, B8A=8, B11=11, B12=12)  # as the metadata number them


def read_product(folder: pathlib.Path, *, name: str, source: str) -> Acquisition:
    """The product in a .SAFE folder.

    Raises:
      Refused: metadata or bands are missing, it is no Level-2A, or what it says of its offset contradicts its baseline.
    """
    path = folder / METADATA
    if not path.exists():
        raise Refused(f"no {METADATA}: the product is not whole, or no Level-2A")
    try:
        tree = ElementTree.parse(path)
    except ElementTree.ParseError as error:
        raise Refused(f"{METADATA}: {error}") from error
    found = {}
    for field in ("PRODUCT_URI", "PROCESSING_LEVEL", "PROCESSING_BASELINE", "BOA_QUANTIFICATION_VALUE"):
        node = tree.find(f".//{field}")
        if node is None or not node.text:
            raise Refused(f"{METADATA} has no {field}")
        found[field] = node.text.strip()
    if not found["PROCESSING_LEVEL"].startswith("Level-2A"):
        raise Refused(f"{found['PROCESSING_LEVEL']}; wanted Level-2A, surface reflectance")
    if float(found["BOA_QUANTIFICATION_VALUE"]) != _QUANTIFICATION:
        raise Refused(f"BOA_QUANTIFICATION_VALUE {found['BOA_QUANTIFICATION_VALUE']}; wanted {_QUANTIFICATION}")
    baseline = float(found["PROCESSING_BASELINE"])
    images = [pathlib.PurePosixPath(node.text.strip()) for node in tree.iterfind(".//IMAGE_FILE") if node.text]
    layers = {
        band: _layer(folder, images, band, "20m" if band in _IN_20M else "10m") for band in MODALITIES["s2"].bands
    }
    bounds = bounds_of(layers["B2"])
    return Acquisition(
        id=name,
        source=source,
        modality="s2",
        bounds=bounds,
        layers=layers,
        classes=_layer(folder, images, "SCL", "20m"),
        day=product_day(found["PRODUCT_URI"]),
        offset=_offset(tree, baseline),
        rank=round(100 * baseline),
        footprint=_footprint(tree, bounds),
    )


def _footprint(tree: ElementTree.ElementTree, bounds: tuple[float, float, float, float]) -> shapely.Geometry | None:
    """The ground with data, by the metadata's list of latitudes and longitudes in turn; None if there is none."""
    text = tree.findtext(".//Global_Footprint/EXT_POS_LIST") or ""
    try:
        corners = np.array(text.split(), float).reshape(-1, 2)[:, ::-1]
        return footprint(shapely.Polygon(corners), bounds)
    except (ShapelyError, ValueError):
        return None


def _offset(tree: ElementTree.ElementTree, baseline: float) -> int:
    """What to subtract, by the metadata's own list, which baseline 04.00 introduced."""
    said = {int(node.get("band_id", -1)): -float(node.text or "nan") for node in tree.iterfind(".//BOA_ADD_OFFSET")}
    wanted = offset_of_baseline(baseline)
    if not said and not wanted:
        return 0
    if not said:
        raise Refused(f"processing baseline {baseline:05.2f} without BOA_ADD_OFFSET values: the offset is not known")
    offsets = {said.get(number, np.nan) for number in _BAND_IDS.values()}
    if offsets != {wanted}:
        raise Refused(
            f"processing baseline {baseline:05.2f} with offsets {sorted(-offset for offset in offsets)}; wanted "
            f"{-wanted} in every band"
        )
    return wanted


def _layer(folder: pathlib.Path, images: list[pathlib.PurePosixPath], band: str, size: str) -> Layer:
    """The image of a band at "10m" or "20m"; names say B02 for B2, B8A and SCL as they are."""
    name = band if not band[1:].isdigit() else f"B{int(band[1:]):02d}"
    listed = [image for image in images if image.name.endswith(f"_{name}_{size}")]
    if len(listed) != 1:
        raise Refused(f"{METADATA} lists {len(listed)} images of {name} at {size}; wanted one")
    path = folder / listed[0].with_suffix(".jp2")
    if ".." in listed[0].parts or listed[0].is_absolute() or not path.exists():
        raise Refused(f"{listed[0]}.jp2 is missing: band {name} at {size}")
    return Layer(str(path))
