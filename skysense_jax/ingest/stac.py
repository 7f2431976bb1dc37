"""Items of a STAC catalogue, static or behind an API: Sentinel-2 Level-2A and terrain-corrected Sentinel-1.

pystac-client finds items, odc-stac says which file and band each asset is; pixels are read like those of any raster.
What is subtracted from Sentinel-2's numbers is what the item's metadata say, and they must not contradict each other.
Sources: the item properties of Earth Search ("earthsearch:boa_offset_applied") and of the Planetary Computer
("s2:processing_baseline"), the STAC extensions "processing", "raster" and "sat". Next: sources.py.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import odc.stac
import pystac
import pystac_client
import rasterio.errors
import shapely
import shapely.geometry
import urllib3
from pystac.errors import STACError
from pystac_client.errors import ClientTypeError
from pystac_client.exceptions import APIError
from pystac_client.stac_api_io import StacApiIO
from shapely.errors import ShapelyError

from skysense_jax.data.sample import ORBITS, UNDATED
from skysense_jax.ingest import geotiffs, remote, sentinel
from skysense_jax.ingest.acquisitions import Acquisition, Layer, Rejected
from skysense_jax.ingest.dates import Interval, interval, utc
from skysense_jax.ingest.grids import wrapped
from skysense_jax.ingest.ground import footprint
from skysense_jax.ingest.places import boxes_of
from skysense_jax.ingest.rasters import Refused

_SCALE = 10_000  # of reflectance in the numbers
_UNITS = {  # of a radar's numbers, as items call them; other words tell nothing
    **dict.fromkeys(("linear", "power", "linear power", "linear backscatter intensity"), "linear"),
    **dict.fromkeys(("db", "decibel", "decibels"), "dB"),
}
_TRIES, _BACKOFF, _TIMEOUT_S = 4, 0.5, 30.0  # of a request: again, seconds doubled each time, seconds
_BUSY = (408, 429, 500, 502, 503, 504)  # status codes behind which a server may answer later
_ERRORS = (APIError, ClientTypeError, STACError, OSError, ValueError, KeyError)


def find(
    href: str,
    *,
    source: str,
    collections: Sequence[str] = (),
    bbox: Sequence[float] = (),
    dates: str = "",
    **how: Any,
) -> tuple[list[Acquisition], list[Rejected]]:
    """The acquisitions of a catalogue, sorted, and its items that are none; nothing of one that breaks off.

    Args:
      href: of a static catalogue or an API.
      source: name of the source.
      collections, bbox, dates: what is asked for; ``bbox`` in degrees, ``dates`` as ``dates.interval`` reads them.
      how: further arguments of ``read_item``.
    """
    found, rejected = [], []
    try:
        for item in items(href, collections=collections, bbox=bbox, dates=dates, lost=rejected):
            try:
                found.append(read_item(item, source=source, **how))
            except (rasterio.errors.RasterioError, OSError, ValueError, KeyError, TypeError) as error:
                rejected.append(Rejected("file", item.id, remote.reason(error)))
    except Refused as error:
        found, rejected = [], [Rejected("file", href, remote.reason(error))]
    rejected = [dataclasses.replace(entry, name=f"{source}/{entry.name}") for entry in rejected]
    files = lambda acquisition: sorted(layer.path for layer in acquisition.layers.values())  # noqa: E731
    return (
        sorted(found, key=lambda acquisition: (acquisition.id, files(acquisition))),
        sorted(rejected, key=lambda entry: (entry.name, entry.reason)),
    )


def items(
    href: str,
    *,
    collections: Sequence[str] = (),
    bbox: Sequence[float] = (),
    dates: str = "",
    lost: list[Rejected] | None = None,
) -> Iterator[pystac.Item]:
    """The items of a catalogue as it gives them; to ``lost`` is added what a static one links to and is none.

    Raises:
      Refused: the catalogue does not answer after several tries, or is none; ``bbox`` is none.
    """
    lost = [] if lost is None else lost
    edges = edges_of(bbox) if bbox else None
    boxes = boxes_of(edges) if edges else []
    within = interval(dates) if dates else Interval()
    retry = urllib3.Retry(_TRIES, backoff_factor=_BACKOFF, status_forcelist=_BUSY, allowed_methods=None)
    try:
        client = pystac_client.Client.open(href, stac_io=StacApiIO(max_retries=retry, timeout=_TIMEOUT_S))
        if client.conforms_to("ITEM_SEARCH"):
            asked = dict(collections=list(collections) or None, bbox=edges and list(edges), datetime=within.asked())
            yield from client.search(**asked).items()
        else:
            for item in _linked(client, client, lost, set()):
                try:
                    wanted = _wanted(item, collections, boxes, within)
                except (ValueError, TypeError) as error:
                    lost.append(Rejected("file", item.id, remote.reason(error)))
                    continue
                if wanted:
                    yield item
    except _ERRORS as error:
        raise Refused(f"no answer of a STAC catalogue: {error}") from error


def _linked(
    catalogue: pystac.Catalog, root: pystac.Catalog, lost: list[Rejected], seen: set[str | None]
) -> Iterator[pystac.Item]:
    """The items of a static catalogue and of those below it."""
    for link in (*catalogue.get_item_links(), *catalogue.get_child_links()):
        address = link.get_absolute_href()
        if address in seen:
            continue
        seen.add(address)
        try:
            target = link.resolve_stac_object(root=root).target
        except _ERRORS as error:
            lost.append(Rejected("file", str(address), remote.reason(error)))
            continue
        if isinstance(target, pystac.Item):
            yield target
        else:
            yield from _linked(target, root, lost, seen)


def _wanted(item: pystac.Item, collections: Sequence[str], boxes: Sequence[shapely.Polygon], within: Interval) -> bool:
    """What an API would ask of an item; ``boxes``: in degrees, none: anywhere. Raises ValueError where it says none."""
    if collections and item.collection_id not in collections:
        return False
    if boxes:
        shown = boxes_of(edges_of(item.bbox)) if item.bbox else []
        if not any(box.intersects(other) for box in shown for other in boxes):
            return False
    if within == Interval():
        return True
    facts = item.common_metadata
    times = (item.datetime,) if item.datetime else (facts.start_datetime, facts.end_datetime)
    known = [utc(time) for time in times if time]
    return bool(known) and within.meets(known[0], known[-1])


def read_item(item: pystac.Item, *, modality: str, source: str, unit: str = "", sign: str = "") -> Acquisition:
    """The acquisition that an item describes.

    Args:
      modality: "s2" or "s1"; source: name of the source.
      unit: of a radar; else by the item's properties, else by the range of the numbers.
      sign: name of what signs addresses where a file must be looked into.

    Raises:
      Refused: a band is missing, or what is to be subtracted, or a radar's unit, is not known; or an address is signed.
      OSError: a file must be looked into and cannot be had.
    """
    files = {key[0].lower(): band for key, band in odc.stac.parse_item(item).bands.items() if key[1] == 1}
    of_network = remote.is_remote(item.get_self_href() or "")
    local = sorted({band.uri for band in files.values() if "://" not in band.uri or band.uri.startswith("file://")})
    if of_network and local:
        raise Refused(f"an item from the network that names files of this machine: {local[0]}")
    signed = next((band.uri for band in files.values() if remote.is_signed(band.uri)), None)
    if signed:
        raise Refused(f"a signed address, which expires before it is read: {signed} (wanted it plain, and sign = ...)")
    opening = functools.partial(remote.signed_layer, sign=remote.signer(sign))
    layers = {}
    for band, names in sentinel.NAMES[modality].items():
        found = [files[name.lower()] for name in names if name.lower() in files]
        if not found:
            raise Refused(f"no asset {' or '.join(names)} for band {band}; there are {', '.join(sorted(files))}")
        layers[band] = _layer(found[0])
    bounds = edges_of(item.bbox) if item.bbox else geotiffs.bounds_of(opening(next(iter(layers.values()))))
    date = utc(item.datetime).date() if item.datetime else None
    facts: dict[str, Any] = dict(day=UNDATED if date is None else int(np.datetime64(date, "D").astype(int)))
    if modality == "s2":
        scl = files.get(sentinel.CLASSES.lower())
        if scl is None:
            raise Refused(f"no asset {sentinel.CLASSES}, which tells clouds")
        baseline = _baseline(item)
        facts |= dict(classes=_layer(scl), offset=_offset(item, baseline), rank=round(100 * (baseline or 0)))
    else:
        orbit = str(item.properties.get("sat:orbit_state", "")).lower()
        told = _unit(item)
        if unit and told and unit != told:
            raise Refused(f"unit = {unit!r} in the list, and the item says {told!r}")
        unit = unit or told or remote.again(lambda: geotiffs.unit_of(opening(layers["VV"])))
        facts |= dict(orbit=orbit if orbit in ORBITS else "unknown", unit=unit)
    return Acquisition(item.id, source, modality, bounds, layers, footprint=_footprint(item, bounds), **facts)


def _footprint(item: pystac.Item, bounds: tuple[float, float, float, float]) -> shapely.Geometry | None:
    """The ground that an item's geometry says it shows, None if that is no part of ``bounds``."""
    try:
        return footprint(shapely.geometry.shape(item.geometry), bounds) if item.geometry else None
    except (ShapelyError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _unit(item: pystac.Item) -> str:
    """ "linear" or "dB" where an item tells what a radar's numbers are, else ""; raises Refused if they are neither.

    Told by CARD4L ("linear power") and by the unit of bands; Planetary Computer's items tell nothing.
    """
    said = [item.properties.get("card4l:measurement_convention")]
    for name in ("vv", "VV", "vh", "VH"):
        fields = item.assets[name].extra_fields if name in item.assets else {}
        said += [band.get("unit") for key in ("raster:bands", "bands") for band in fields.get(key, [])]
    words = {str(text).strip().lower() for text in said if text}
    if any("amplitude" in word for word in words):
        raise Refused(f"backscatter as {', '.join(sorted(words))}; wanted power or dB")
    units = {_UNITS[word] for word in words & _UNITS.keys()}
    if len(units) > 1:
        raise Refused(f"backscatter as {', '.join(sorted(words))}: which one?")
    return units.pop() if units else ""


def edges_of(bbox: Any) -> tuple[float, float, float, float]:
    """West, south, east, north of a box as JSON has it, perhaps with heights or beyond 180 degrees.

    West > east where it crosses 180 degrees. Raises Refused if it is none.
    """
    try:
        edges = np.array(bbox, float)
    except (TypeError, ValueError):
        edges = np.zeros(0)
    if edges.shape not in ((4,), (6,)) or not np.isfinite(edges).all():
        raise Refused(f"bbox = {bbox!r}; wanted west, south, east, north in degrees")
    return wrapped(*(edges if len(edges) == 4 else edges[[0, 1, 3, 4]]).tolist())


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
