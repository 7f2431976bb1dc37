"""Items of a STAC catalogue, static or behind an API: Sentinel-2 Level-2A and terrain-corrected Sentinel-1.

pystac-client finds items, odc-stac says which file and band each asset is; pixels are read like those of any raster.
What is subtracted from Sentinel-2's numbers is what the item's metadata say, and they must not contradict each other.
Sources: the item properties of Earth Search ("earthsearch:boa_offset_applied") and of the Planetary Computer
("s2:processing_baseline"), the STAC extensions "processing", "raster" and "sat". Next: sources.py.
"""

import datetime
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import odc.stac
import pystac
import pystac_client
import shapely
from pystac.errors import STACError
from pystac_client.errors import ClientTypeError
from pystac_client.exceptions import APIError

from skysense_jax.data.sample import ORBITS, UNDATED
from skysense_jax.ingest import geotiffs, sentinel
from skysense_jax.ingest.acquisitions import Acquisition, Layer
from skysense_jax.ingest.rasters import Refused

_SCALE = 10_000  # of reflectance in the numbers


def items(
    href: str, *, collections: Sequence[str] = (), bbox: Sequence[float] = (), dates: str = ""
) -> Iterator[pystac.Item]:
    """The items of a catalogue, sorted by their ids, within ``bbox`` (degrees) and ``dates`` ("2022-01-01/2022-06-30").

    Raises:
      Refused: the catalogue does not answer or is none.
    """
    try:
        client = pystac_client.Client.open(href)
        if client.conforms_to("ITEM_SEARCH"):
            asked = dict(collections=list(collections) or None, bbox=list(bbox) or None, datetime=dates or None)
            found = list(client.search(**asked).items())
        else:
            found = [item for item in client.get_items(recursive=True) if _wanted(item, collections, bbox, dates)]
    except (APIError, ClientTypeError, STACError, OSError, ValueError) as error:
        raise Refused(f"no answer of a STAC catalogue: {error}") from error
    yield from sorted(found, key=lambda item: (item.id, item.collection_id or "", item.get_self_href() or ""))


def _wanted(item: pystac.Item, collections: Sequence[str], bbox: Sequence[float], dates: str) -> bool:
    begin, _, end = dates.partition("/")
    day = _utc(item.datetime).date().isoformat() if item.datetime else ""
    within = not dates or (bool(day) and begin <= day <= (end or begin))
    near = not bbox or (item.bbox is not None and shapely.box(*bbox).intersects(shapely.box(*_flat(item.bbox))))
    return within and near and (not collections or item.collection_id in collections)


def read_item(item: pystac.Item, *, modality: str, source: str, unit: str = "") -> Acquisition:
    """The acquisition that an item describes.

    Raises:
      Refused: a band is missing, or what is to be subtracted, or a radar's unit, is not known.
    """
    files = {key[0].lower(): band for key, band in odc.stac.parse_item(item).bands.items() if key[1] == 1}
    remote = "://" in (item.get_self_href() or "") and not str(item.get_self_href()).startswith("file://")
    local = sorted({band.uri for band in files.values() if "://" not in band.uri or band.uri.startswith("file://")})
    if remote and local:
        raise Refused(f"an item from the network that names files of this machine: {local[0]}")
    layers = {}
    for band, names in sentinel.NAMES[modality].items():
        found = [files[name.lower()] for name in names if name.lower() in files]
        if not found:
            raise Refused(f"no asset {' or '.join(names)} for band {band}; there are {', '.join(sorted(files))}")
        layers[band] = _layer(found[0])
    bounds = _flat(item.bbox) if item.bbox else geotiffs.bounds_of(next(iter(layers.values())))
    date = _utc(item.datetime).date() if item.datetime else None
    facts: dict[str, Any] = dict(day=UNDATED if date is None else int(np.datetime64(date, "D").astype(int)))
    if modality == "s2":
        scl = files.get(sentinel.CLASSES.lower())
        if scl is None:
            raise Refused(f"no asset {sentinel.CLASSES}, which tells clouds")
        baseline = _baseline(item)
        facts |= dict(classes=_layer(scl), offset=_offset(item, baseline), rank=round(100 * (baseline or 0)))
    else:
        orbit = str(item.properties.get("sat:orbit_state", "")).lower()
        first = next(iter(layers.values()))
        facts |= dict(orbit=orbit if orbit in ORBITS else "unknown", unit=unit or geotiffs.unit_of(first))
    return Acquisition(item.id, source, modality, tuple(float(edge) for edge in bounds), layers, **facts)


def _flat(bbox: Sequence[float]) -> Sequence[float]:
    """West, south, east, north, of a box that may have heights too."""
    return [bbox[i] for i in (0, 1, 3, 4)] if len(bbox) == 6 else bbox


def _utc(time: datetime.datetime) -> datetime.datetime:
    return time.astimezone(datetime.UTC) if time.tzinfo else time.replace(tzinfo=datetime.UTC)


def _baseline(item: pystac.Item) -> float | None:
    text = item.properties.get("s2:processing_baseline", item.properties.get("processing:version"))
    try:
        return None if text is None else float(text)
    except (TypeError, ValueError) as error:
        raise Refused(f"processing baseline {text!r}; wanted a number such as 04.00") from error


def _offset(item: pystac.Item, baseline: float | None) -> int:
    """What to subtract: 0 where a catalogue says that it did so, else by the baseline."""
    applied = item.properties.get("earthsearch:boa_offset_applied")
    if applied is True:
        return 0
    if baseline is None:
        raise Refused("neither earthsearch:boa_offset_applied nor a processing baseline: the offset is not known")
    offset = sentinel.offset_of_baseline(baseline)
    said = {
        round(-_SCALE * float(band["offset"]))
        for name in ("B02", "blue")
        if name in item.assets
        for band in item.assets[name].extra_fields.get("raster:bands", [])
        if "offset" in band
    }
    if said - {offset}:
        raise Refused(f"processing baseline {baseline:05.2f}, and raster:bands with an offset of {sorted(said)}")
    return offset


def _layer(band: Any) -> Layer:
    return Layer(band.uri.removeprefix("file://"), band.band)
