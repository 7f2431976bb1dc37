"""A made-up Earth whose colour at a place is a function of that place, and sources that show it in many ways.

Waves along easting and northing of UTM zone 32 tell where a pixel really lies, to a small part of a wave.
"""

import pathlib

import netCDF4
import numpy as np
import pyproj
import rasterio
from rasterio.crs import CRS
from rasterio.transform import from_origin

ZONE = 32632
WEST, NORTH = 704_000, 5_504_000  # corner of a square of the grid of 640 m, inside the zone
PRODUCT = "S2A_MSIL2A_{day}T101021_N{baseline}_R022_T32UQV_{day}T130000"


def centres(transform, height, width, epsg):
    """Easting and northing (zone 32) of the centres of an image's pixels."""
    columns, rows = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    xs, ys = transform @ (columns, rows)
    if epsg == ZONE:
        return xs, ys
    return pyproj.Transformer.from_crs(epsg, ZONE, always_xy=True).transform(xs, ys)


def waves(x, y, *, length_m, mean, height):
    """[H W 3]: a wave along easting, one along northing, and one across both."""
    turn = lambda metres: mean + height * np.sin(2 * np.pi * metres / length_m)  # noqa: E731
    return np.stack([turn(x), turn(y), turn(0.6 * x + 0.8 * y)], axis=-1)


def colours(x, y):
    """Of 0.3 m imagery, 0-255."""
    return waves(x - WEST, y - NORTH, length_m=12.0, mean=128.0, height=100.0)


def reflectances(x, y, band):
    """Of the band with this number in the table, x 10000; near infrared above red, as in a field."""
    level = (1000, 1100, 1200, 1800, 2500, 2600, 2700, 2800, 2000, 1500)[band]
    return waves(x - WEST, y - NORTH, length_m=240.0, mean=level, height=300.0)[..., band % 3]


def power(x, y, band):
    """Linear backscatter of VV (0) or VH (1)."""
    return waves(x - WEST, y - NORTH, length_m=240.0, mean=(0.1, 0.025)[band], height=(0.05, 0.01)[band])[..., band]


def write_tif(path, pixels, transform, epsg, *, nodata=None, **tags):
    """A GeoTIFF of [H W C] pixels; no coordinate system if ``epsg`` is None."""
    path.parent.mkdir(parents=True, exist_ok=True)
    how = dict(driver="GTiff", count=pixels.shape[2], height=pixels.shape[0], width=pixels.shape[1], nodata=nodata)
    crs = None if epsg is None else CRS.from_epsg(epsg)
    with rasterio.open(path, "w", dtype=pixels.dtype, crs=crs, transform=transform, **how) as file:
        file.write(np.moveaxis(pixels, -1, 0))
        file.update_tags(**tags)


def write_aerial(path, *, west, north, width, height, size, epsg=ZONE, day=None):
    """An RGB image; corner and pixel size in units of its coordinate system."""
    transform = from_origin(west, north, size, size)
    pixels = np.rint(colours(*centres(transform, height, width, epsg))).astype(np.uint8)
    write_tif(path, pixels, transform, epsg, **({"TIFFTAG_DATETIME": day} if day else {}))


def write_safe(
    root: pathlib.Path,
    *,
    day="20220615",
    baseline="0400",
    west=WEST - 600,
    north=NORTH + 600,
    side_m=2400,
    epsg=ZONE,
    offsets=None,
    drop=(),
    scl=None,
    empty=None,
):
    """A Level-2A product around the square; ``offsets``: what its metadata say (by baseline if None)."""
    name = PRODUCT.format(day=day, baseline=baseline)
    folder = root / f"{name}.SAFE"
    number = int(baseline) / 100
    add = 1000 if number >= 4 else 0
    images = []
    for position, band in enumerate(("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12", "SCL")):
        size = 10 if band in ("B02", "B03", "B04", "B08") else 20
        transform, pixels = from_origin(west, north, size, size), side_m // size
        x, y = centres(transform, pixels, pixels, epsg)
        if band == "SCL":
            found = np.full(x.shape, 4, np.uint8)
            if scl is not None:
                found[scl(x, y)] = 9
        else:
            found = np.rint(reflectances(x, y, position) + add).astype(np.uint16)
        if empty is not None:
            found[empty(x, y)] = 0
        listed = pathlib.PurePosixPath(f"GRANULE/L2A_T32UQV/IMG_DATA/R{size}m/T32UQV_{day}T101021_{band}_{size}m")
        images.append(listed)
        if band in drop:
            continue
        path = folder / f"{listed}.jp2"
        path.parent.mkdir(parents=True, exist_ok=True)
        how = dict(driver="JP2OpenJPEG", count=1, height=pixels, width=pixels, QUALITY="100", REVERSIBLE="YES")
        with rasterio.open(path, "w", dtype=found.dtype, crs=CRS.from_epsg(epsg), transform=transform, **how) as file:
            file.write(found, 1)
    said = offsets if offsets is not None else ([-1000] * 13 if number >= 4 else [])
    (folder / "MTD_MSIL2A.xml").write_text(
        '<?xml version="1.0"?><n1:Level-2A_User_Product xmlns:n1="https://psd-14.sentinel2.eo.esa.int/PSD/User_Product">'
        f"<n1:General_Info><Product_Info><PROCESSING_LEVEL>Level-2A</PROCESSING_LEVEL>"
        f"<PROCESSING_BASELINE>{number:05.2f}</PROCESSING_BASELINE><PRODUCT_URI>{name}.SAFE</PRODUCT_URI>"
        "<Product_Organisation><Granule_List><Granule>"
        + "".join(f"<IMAGE_FILE>{image}</IMAGE_FILE>" for image in images)
        + "</Granule></Granule_List></Product_Organisation></Product_Info><Product_Image_Characteristics>"
        "<QUANTIFICATION_VALUES_LIST><BOA_QUANTIFICATION_VALUE>10000</BOA_QUANTIFICATION_VALUE>"
        "</QUANTIFICATION_VALUES_LIST>"
        + (
            "<BOA_ADD_OFFSET_VALUES_LIST>"
            + "".join(f'<BOA_ADD_OFFSET band_id="{i}">{v}</BOA_ADD_OFFSET>' for i, v in enumerate(said))
            + "</BOA_ADD_OFFSET_VALUES_LIST>"
            if said
            else ""
        )
        + "</Product_Image_Characteristics></n1:General_Info></n1:Level-2A_User_Product>"
    )
    return folder


def write_radar(
    path,
    *,
    west=WEST - 600,
    north=NORTH + 600,
    side_m=2400,
    size=10,
    unit="linear",
    orbit="ascending",
    day="2022:06:14",
    epsg=ZONE,
):
    """Backscatter of both polarisations in one file."""
    transform, pixels = from_origin(west, north, size, size), side_m // size
    x, y = centres(transform, pixels, pixels, epsg)
    linear = np.stack([power(x, y, 0), power(x, y, 1)], -1)
    numbers = (10 * np.log10(linear) if unit == "dB" else linear).astype(np.float32)
    write_tif(path, numbers, transform, epsg, TIFFTAG_DATETIME=day, orbit=orbit)


def write_cube(
    path,
    bands,
    times,
    *,
    west=WEST - 100,
    north=NORTH + 100,
    side_m=600,
    size=10.0,
    epsg=ZONE,
    how="grid_mapping",
    rows="y",
    columns="x",
    southward=True,
    file_format="NETCDF4",
):
    """A NetCDF file of variables [time, row, column] by name; times in seconds since 2018-03-01 10:00.

    ``bands``: name: (function of easting, northing and number of the date, type, attributes). ``how``: what tells the
    coordinate system: "grid_mapping" as CF has it, "attribute" of the file, or nothing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    num = round(side_m / size)
    x, y = centres(from_origin(west, north, size, size), num, num, epsg)
    with netCDF4.Dataset(path, "w", format=file_format) as file:
        for name, length in (("t", len(times)), (rows, num), (columns, num)):
            file.createDimension(name, length)
        axis = file.createVariable("t", "f8", ("t",))
        axis.units = "seconds since 2018-03-01 10:00:00"
        axis[:] = times
        degrees = rasterio.crs.CRS.from_epsg(epsg).is_geographic
        centre = size * (np.arange(num) + 0.5)
        for name, values, unit, x_or_y in ((columns, west + centre, "east", "x"), (rows, north - centre, "north", "y")):
            axis = file.createVariable(name, "f8", (name,))
            axis.units = f"degrees_{unit}" if degrees else "m"
            axis.standard_name = (
                dict(x="longitude", y="latitude")[x_or_y] if degrees else f"projection_{x_or_y}_coordinate"
            )
            axis[:] = values if southward or name == columns else values[::-1]
        if how == "grid_mapping":
            file.createVariable("crs", "i4").setncatts(pyproj.CRS(epsg).to_cf())
        elif how == "attribute":
            file.crs = f"EPSG:{epsg}"
        for name, (numbers, dtype, attributes) in bands.items():
            fill = attributes.get("_FillValue")
            variable = file.createVariable(name, dtype, ("t", rows, columns), fill_value=fill)
            variable.set_auto_maskandscale(False)
            variable.setncatts({key: value for key, value in attributes.items() if key != "_FillValue"})
            if how == "grid_mapping":
                variable.grid_mapping = "crs"
            layers = [numbers(x, y, date) for date in range(len(times))]
            layers = np.stack(layers) if np.issubdtype(np.dtype(dtype), np.floating) else np.rint(layers)
            variable[:] = (layers if southward else layers[:, ::-1]).astype(dtype)
