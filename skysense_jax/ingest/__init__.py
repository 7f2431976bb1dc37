"""Builders and converters: from other people's files to records. Needs the extra "ingest" (GDAL, OpenStreetMap ...)."""

from importlib.util import find_spec

_MISSING = [name for name in ("h5py", "netCDF4", "osmium", "pyarrow", "rasterio", "shapely") if find_spec(name) is None]
if _MISSING:
    raise ModuleNotFoundError(
        f"skysense_jax.ingest needs {', '.join(_MISSING)}, which training does not: pip install --editable '.[ingest]'"
    )
