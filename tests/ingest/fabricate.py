"""Made-up files in the layout of the real samples: same folders, names, bands, units and faults, other numbers."""

import datetime
import json
import pathlib

import h5py
import netCDF4
import numpy as np
import osmium
import rasterio
from rasterio.crs import CRS
from rasterio.transform import from_origin

# Reflectance x 10000 of a green field, in the order B1..B8, B8A, B9, B11, B12.
FIELD = np.array([150, 300, 500, 450, 900, 2100, 2600, 2700, 2800, 2850, 1600, 900])


def write_all(root: pathlib.Path) -> None:
    """Every folder that ingest.samples knows, under ``root``."""
    rng = np.random.default_rng(7)
    for write in (_triple, _patches, _tiles, _scenes, _aerial, _naip, _panchromatic, _extracts):
        write(root, rng)


def _tif(path, pixels, *, west, north, size, epsg, **tags):
    """A GeoTIFF of [C H W] pixels; ``nodata`` among the tags sets the nodata value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nodata = tags.pop("nodata", None)
    options = dict(driver="GTiff", count=len(pixels), height=pixels.shape[1], width=pixels.shape[2])
    crs = CRS.from_epsg(epsg)
    transform = from_origin(west, north, size, size)
    with rasterio.open(path, "w", dtype=pixels.dtype, crs=crs, transform=transform, nodata=nodata, **options) as file:
        file.write(pixels)
        file.update_tags(**tags)


def _triple(root, rng):
    folder = root / "treesatai_ts_sample"
    aerial = rng.integers(60, 200, (4, 304, 304)).astype(np.uint8)
    _tif(folder / "Abies_alba_1_1005_WEFL_NLF.tif", aerial, west=565642.6, north=5770980.4, size=0.2, epsg=25832)
    start, stamp = datetime.datetime(2020, 1, 2, 10, 24, 21), "%Y%m%dT%H%M%S"
    ten = FIELD[[1, 2, 3, 4, 5, 6, 7, 8, 10, 11]]
    dn = (ten[:, None, None] + rng.integers(-40, 40, (17, 10, 6, 6))).astype(np.float32)
    masks = np.zeros_like(dn)
    products = []
    for date in range(17):
        day = (start + datetime.timedelta(days=5 * date)).strftime(stamp)
        baseline = "N0400" if date % 6 == 5 else "N0214"
        products.append(f"S2A_MSIL2A_{day}_{baseline}_R065_T32UNC_20200102T115419".encode())
        dn[date] += 1000 * (baseline == "N0400")
        if date % 3 == 1:
            masks[date, 1] = rng.integers(0, 100, (6, 6))  # cloud
        if date % 7 == 2:
            masks[date, 0] = 100  # snow
    dn[4] = 0  # a date without data
    with h5py.File(folder / "Abies_alba_1_1005_WEFL_NLF.h5", "w") as file:
        file["sen-2-data"], file["sen-2-masks"], file["sen-2-products"] = dn, masks, products
        for orbit, num, hour in (("asc", 5, 17), ("des", 7, 5)):
            power = (rng.gamma(4, 0.02, (num, 2, 6, 6)) * np.array([1, 0.25])[:, None, None]).astype(np.float32)
            days = [datetime.datetime(2020, 1, 3, hour) + datetime.timedelta(days=6 * d) for d in range(num)]
            if orbit == "des":
                power[2, 1, 0, 3] = 1.6e-12
                power[3], days[3] = power[2], days[2] + datetime.timedelta(seconds=25)  # delivered twice
            file[f"sen-1-{orbit}-data"] = power
            file[f"sen-1-{orbit}-products"] = [
                f"S1A_IW_GRDH_1SDV_{d.strftime(stamp)}_{d.strftime(stamp)}_030639_0382D5_360A".encode() for d in days
            ]


def _patches(root, rng):
    for name, whole in (("00002806639B424A", True), ("000028085BF08E7E", False)):
        folder = root / "worldcereal_patches" / name
        folder.mkdir(parents=True)
        shape = {"10m": (11, 64, 64), "20m": (11, 32, 32)}
        bands = {"10m": {"B02": 1, "B03": 2, "B04": 3, "B08": 7}}
        bands["20m"] = {"B05": 4, "B06": 5, "B07": 6, "B8A": 8, "B11": 10, "B12": 11}
        for size in ("10m", "20m") if whole else ("20m",):
            with _netcdf(folder / f"S2_L2A_{size}_{name}_32631_2017-08-01_2018-11-30.nc", shape[size]) as file:
                for band, index in bands[size].items():
                    layer = FIELD[index] + rng.integers(-40, 40, shape[size])
                    layer[3, :2] = 0  # fill
                    _variable(file, band, layer.astype(np.uint16), scale=1e-4)
                if size == "20m":
                    scl = rng.choice(np.arange(12), shape[size], p=[0.02, 0.02, *[0.096] * 10])
                    scl[0] = 4
                    _variable(file, "SCL", scl.astype(np.uint8), scale=1)
        radar = folder / f"S1_GRD-ASCENDING_20m_{name}_32631_2017-08-01_2018-11-30.nc"
        with _netcdf(radar, (13, 32, 32)) as file:
            for band, mean in (("VV", -100_000), ("VH", -170_000)):
                layer = mean + rng.integers(-30_000, 30_000, (13, 32, 32))
                layer[5, :, 7:9] = 0  # fill
                _variable(file, band, layer.astype(np.int32), scale=1e-4)


def _netcdf(path, shape):
    file = netCDF4.Dataset(path, "w")
    for dimension, size in zip(("timestamp", "y", "x"), shape):
        file.createDimension(dimension, size)
    file.epsg, file.bounds = "32631", "(501360, 5629040, 502000, 5629680)"
    file.createVariable("spatial_ref", "i8").crs_wkt = CRS.from_epsg(32631).to_wkt()
    for axis, corner, step in (("x", 501360, 640 / shape[2]), ("y", 5629680, -640 / shape[1])):
        size = len(file.dimensions[axis])
        file.createVariable(axis, "f8", (axis,))[:] = corner + step * (np.arange(size) + 0.5)
    times = file.createVariable("timestamp", "i8", ("timestamp",))
    times.units = "seconds since 2017-08-04 10:53:28"
    times[:] = np.arange(shape[0]) * 86_400 * 5 + 3
    return file


def _variable(file, name, values, *, scale):
    variable = file.createVariable(name, values.dtype, ("timestamp", "y", "x"), fill_value=0)
    variable.set_auto_maskandscale(False)
    variable.scale_factor = scale
    variable.coordinates = "spatial_ref"
    variable[:] = values


def _tiles(root, rng):
    folder = root / "terramesh_examples"
    days = {  # tile: S2, S1, zone, offset of Level-1C, offset of Level-2A
        "637U_59R_1_3": ("2017-10-30", "2017-10-30", 32632, 0, 0),
        "433D_629L_3_1": ("2020-04-08", "2020-04-11", 32718, 1000, 1000),
        "282D_485L_3_3": ("2021-07-23", "2021-07-21", 32722, 1000, 0),
    }
    for name, (s2_day, s1_day, epsg, toa_offset, offset) in days.items():
        place = dict(west=549892.697, north=6344077.614, size=10, epsg=epsg)
        surface = FIELD[:, None, None] + rng.integers(-30, 30, (12, 224, 224))
        cirrus = rng.integers(5, 20, (1, 224, 224))
        toa = np.concatenate((surface[:10] + 100, cirrus, surface[10:] - 60)) + toa_offset
        radar = np.array([-10.0, -17.0])[:, None, None] + rng.normal(0, 3, (2, 224, 224))
        _tif(folder / "S2L2A" / f"{name}.tif", (surface + offset).astype(np.int16), **place)
        _tif(folder / "S2L1C" / f"{name}.tif", toa.astype(np.int16), **place)
        _tif(folder / "S1RTC" / f"{name}.tif", radar, **place, datetime=f"{s1_day}T05:32:30.000000000")
        rgb = np.zeros((3, 224, 224), np.uint8)
        _tif(folder / "S2RGB" / f"{name}.tif", rgb, **place, datetime=f"{s2_day}T10:41:51.000000000")


def _scenes(root, rng):
    folder = root / "s2_scenes"
    radar = rng.normal(-12, 3, (1, 21, 26)).astype(np.float32)
    radar[0, :4] = -99
    name = "S1A__IW___A_20150309T173017_VV_grd_mli_geo_norm_db.tif"
    _tif(folder / name, radar, west=620048.2, north=4830114.7, size=20, epsg=32631, nodata=-99)
    names = ("01", "02", "03", "04", "05", "06", "07", "08", "08A", "09", "11", "12")
    true = dict(zip(names, FIELD)) | {"10": 8}
    shifted = true | {"08A": true["09"] // 3, "09": true["10"], "10": true["11"], "11": true["12"], "12": true["08A"]}
    with h5py.File(folder / "geobench_m-eurosat_id_1905.hdf5", "w") as file:
        for key, level in shifted.items():
            file[f"{key} - somewhere"] = (level + rng.integers(-3, 3, (64, 64))).astype(np.int16)


def _aerial(root, rng):
    folder = root / "aerial_hr"
    for name, epsg, place in (("OSBS_029", 32617, (404211.9, 3285142.9)), ("2018_SJER", 32611, (252645.9, 4107315.9))):
        image = rng.integers(30, 250, (3, 400, 400)).astype(np.uint8)
        _tif(folder / f"{name}.tif", image, west=place[0], north=place[1], size=0.1, epsg=epsg, nodata=255)
    image = rng.integers(30, 250, (3, 40, 50)).astype(np.uint8)
    with rasterio.open(folder / "crop.png", "w", driver="PNG", dtype="uint8", count=3, height=40, width=50) as file:
        file.write(image)


def _naip(root, rng):
    folder = root / "chesapeake_naip_1m" / "geobench"
    folder.mkdir(parents=True)
    for name in ("id_000051", "id_000138"):
        with h5py.File(folder / f"{name}.hdf5", "w") as file:
            for band, level in (("Red", 120), ("Green", 140), ("Blue", 90), ("NearInfrared", 200)):
                file[band] = ((level + rng.integers(-40, 40, (256, 256))) / 255).astype(np.float32)


def _panchromatic(root, rng):
    folder = root / "spacenet_samples"
    image = rng.integers(60, 900, (1, 900, 900)).astype(np.uint16)
    _tif(folder / "sample_geotiff.tif", image, west=733601, north=3725139, size=0.5, epsg=32616, nodata=0)
    features = []
    for number in range(12):
        x, y = 733601 + rng.uniform(20, 420), 3725139 - rng.uniform(20, 420)
        angles = np.sort(rng.uniform(0, 2 * np.pi, 6))
        ring = [[x + 14 * np.cos(a), y + 11 * np.sin(a)] for a in angles]
        properties = dict(building="yes", highway=None, natural="", landuse=None, osm_id=number)
        geometry = dict(type="Polygon", coordinates=[[*ring, ring[0]]])
        features.append(dict(type="Feature", properties=properties, geometry=geometry))
    crs = dict(type="name", properties=dict(name="urn:ogc:def:crs:EPSG::32616"))
    collection = dict(type="FeatureCollection", crs=crs, features=features)
    (folder / "geotiff_labels.geojson").write_text(json.dumps(collection))


def _extracts(root, rng):
    folder = root / "osm_extracts"
    folder.mkdir()
    (folder / "planet.osm").write_text("<osm/>")
    for name, west, south in (("Helsinki", 24.936, 60.164), ("test", 26.93, 60.52)):
        header = osmium.io.Header()
        header.add_box(osmium.osm.Box(west, south, west + 0.018, south + 0.015))
        with osmium.SimpleWriter(str(folder / f"{name}.osm.pbf"), header=header) as writer:
            for number in range(60):
                x, y = west + rng.uniform(0.001, 0.017), south + rng.uniform(0.001, 0.014)
                corners = [(x, y), (x + 4e-4, y), (x + 4e-4, y + 2e-4), (x, y + 2e-4)]
                if number == 0:  # one in the middle
                    corners = [(west + 0.009 + 2e-4 * i, south + 0.0075 + 1e-4 * j) for i, j in _AROUND]
                refs = [1 + 4 * number + corner for corner in range(4)]
                for ref, place in zip(refs, corners):
                    writer.add_node(osmium.osm.mutable.Node(id=ref, location=place))
            for number in range(60):
                refs = [1 + 4 * number + corner for corner in (0, 1, 2, 3, 0)]
                writer.add_way(osmium.osm.mutable.Way(id=number + 1, nodes=refs, tags={"building": "yes"}))


_AROUND = ((-1, -1), (1, -1), (1, 1), (-1, 1))
