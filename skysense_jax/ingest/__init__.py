"""Builders and converters: from other people's files to records. Needs the extra "ingest" (GDAL, OpenStreetMap ...)."""

from importlib.util import find_spec

_NEEDED = (
    "cachetools",
    "h5py",
    "netCDF4",
    "odc.stac",
    "osmium",
    "pyarrow",
    "pystac_client",
    "rasterio",
    "shapely",
    "xarray",
)
_MISSING = [name for name in _NEEDED if find_spec(name.split(".")[0]) is None]
if _MISSING:
    raise ModuleNotFoundError(
        f"skysense_jax.ingest needs {', '.join(_MISSING)}, which training does not: pip install --editable '.[ingest]'"
    )
