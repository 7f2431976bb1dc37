"""Cubes of imagery in NetCDF and HDF5 files: variables over time, rows and columns, each date an acquisition.

A file says where it lies by its coordinates and its CF grid mapping, and when by its time axis; or the list of sources
says it (tables.py), and names of Sentinel products say the days. xarray and odc-geo read what CF says. Pixels are read
place by place (planes.py). Next: sources.py.
"""

import dataclasses
import pathlib
import posixpath
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import odc.geo.xr  # noqa: F401  (gives xarray the accessor .odc)
import xarray as xr
from rasterio.transform import Affine

from skysense_jax.ingest import planes, sentinel
from skysense_jax.ingest.acquisitions import Acquisition, Layer, Rejected
from skysense_jax.ingest.dates import Interval, interval
from skysense_jax.ingest.geotiffs import check_type
from skysense_jax.ingest.grids import NOWHERE, Grid, Ground, crs_of
from skysense_jax.ingest.names import UNSET, day_of, orbit_of, parse_day
from skysense_jax.ingest.rasters import Refused
from skysense_jax.modalities import Modality

_REFLECTANCE = 10_000  # of Sentinel-2's numbers
_EVEN = 0.05  # of a pixel that a coordinate may be off
_DATES_THAT_TELL = 8  # of a cube, what unit its numbers have


@dataclasses.dataclass(frozen=True)
class Layout:
    """How cubes of a source are laid out, as its list says; what is not said is told by the file.

    Attributes:
      variables: of the row's bands, in its order; by the bands' names if empty.
      array: one variable with all bands, of axes [time, band, row, column]; ``bands`` are numbers in it, from 1.
      group: of the file that holds the variables.
      products: variable with the name of the Sentinel product of each date, for days and offsets.
      classes: of Level-2A's scene classification; clouds: with probabilities of what hides the ground, percent, the
        planes ``cloud_bands`` of it if it has an axis of bands.
      dates: which are wanted, as ``dates.interval`` reads them.
      scale: numbers times this are in the row's unit, instead of scale_factor and add_offset.
      offset, unit, orbit, day_pattern, day: see geotiffs.py.
    """

    variables: Sequence[str] = ()
    array: str = ""
    bands: Sequence[int] = ()
    group: str = ""
    products: str = ""
    classes: str = ""
    clouds: str = ""
    cloud_bands: Sequence[int] = ()
    dates: str = ""
    scale: float = 0.0
    offset: int | None = None
    unit: str = ""
    orbit: str = UNSET
    day_pattern: str = ""
    day: str = ""


@dataclasses.dataclass(frozen=True)
class _Time:
    """A date of a file: what it is called, its day, what to subtract if its name tells, and its baseline times 100."""

    name: str
    day: int
    offset: int | None = None
    rank: int = 0


@dataclasses.dataclass(frozen=True)
class _Band:
    """A band in all its dates: its file and variable, its number there (None: the variable is the band), its grid."""

    path: str
    variable: str
    number: int | None
    axis: str | None  # of time
    grid: Grid
    scale: float = 1.0
    add: float = 0.0

    def layer(self, time: int) -> Layer:
        index = () if self.axis is None else (time,)
        index += () if self.number is None else (self.number,)
        crs, transform = self.grid.crs.to_string(), tuple(self.grid.transform)[:6]
        return Layer(self.path, 1, self.variable, index, self.scale, self.add, crs, transform)


@dataclasses.dataclass(frozen=True)
class _File:
    """What a file has of the row and of what tells clouds, and its dates (None: no axis of time).

    ``added``: the offset in the numbers of Sentinel-2 by its add_offset, None if it has none.
    """

    path: str
    bands: Mapping[str, _Band]
    classes: _Band | None
    clouds: Sequence[_Band]
    times: Sequence[_Time] | None
    added: int | None


def read_cube(
    paths: Sequence[pathlib.Path],
    row: Modality,
    layout: Layout,
    *,
    name: str,
    source: str,
    ground: Ground | None = None,
) -> list[Acquisition | Rejected]:
    """An acquisition for each date of files that belong together, and the dates that not all of them have.

    ``ground`` says where they lie instead of the files, whose rows then begin in the north.

    Raises:
      Refused: a band, the place, the days, the offset or the unit is missing or contradicts another one.
    """
    files = [_look(path, row, layout, ground) for path in paths]
    bands = _bands(files, row, layout)
    bounds = bands[row.bands[0]].grid.degrees()
    for band in bands.values():
        band.grid.check_size(row)
    classes = [file.classes for file in files if file.classes]
    clouds = [band for file in files for band in file.clouds]
    for field, given, bands_found in (("classes", layout.classes, classes), ("clouds", layout.clouds, clouds)):
        if given and not bands_found:
            raise Refused(f"{field} = {given!r}: no file has this variable")
    orbit = orbit_of(paths[0], {}, given=layout.orbit)
    unit = _unit(bands, files, layout) if row.name == "s1" else ""
    dates, rejected = _dates(files, layout)
    found: list[Acquisition | Rejected] = [Rejected("date", f"{name} {date}", told) for date, told in rejected.items()]
    for time, index in dates:
        found.append(
            Acquisition(
                id=f"{name} {time.name}".rstrip(),
                source=source,
                modality=row.name,
                bounds=bounds,
                layers={key: bands[key].layer(index[bands[key].path]) for key in row.bands},
                classes=classes[0].layer(index[classes[0].path]) if classes else None,
                clouds=tuple(band.layer(index[band.path]) for band in clouds),
                day=time.day,
                orbit=orbit,
                offset=_offset(time, files, layout) if row.name == "s2" else 0,
                unit=unit,
                rank=time.rank,
            )
        )
    return found


def _bands(files: Sequence[_File], row: Modality, layout: Layout) -> dict[str, _Band]:
    """The bands of all files; each is in one of them."""
    found: dict[str, _Band] = {}
    for file in files:
        twice = sorted(set(found) & set(file.bands))
        if twice:
            raise Refused(f"{pathlib.Path(file.path).name} has {' '.join(twice)}, and so has a file before it")
        found |= file.bands
    missing = [band for band in row.bands if band not in found]
    if missing:
        wanted = layout.variables or [" or ".join(_names(band, row)) for band in missing]
        raise Refused(f"no variable for {' '.join(missing)}; wanted {', '.join(wanted)} (say: variables = ...)")
    return found


def _names(band: str, row: Modality) -> tuple[str, ...]:
    return tuple(dict.fromkeys((band, *sentinel.NAMES.get(row.name, {}).get(band, ()))))


def _dates(files: Sequence[_File], layout: Layout) -> tuple[list[tuple[_Time, dict[str, int]]], dict[str, str]]:
    """The dates that all files have, each with its index in every file; those that some lack, with a reason."""
    timed = [file for file in files if file.times is not None]
    if not timed:
        day = day_of(pathlib.Path(files[0].path), {}, pattern=layout.day_pattern, given=layout.day)
        return [(_Time("", day), {file.path: 0 for file in files})], {}
    if layout.day:
        raise Refused(f"day = {layout.day!r} for files that have an axis of time")
    within = interval(layout.dates) if layout.dates else Interval()
    numbers = {file.path: {time.name: number for number, time in enumerate(file.times)} for file in timed}
    found, rejected = [], {}
    for time in {time.name: time for file in timed for time in file.times}.values():
        if not within.meets_day(time.day):
            continue
        lacking = [pathlib.Path(path).name for path, named in numbers.items() if time.name not in named]
        if lacking:
            rejected[time.name] = f"no such date in {', '.join(lacking)}"
            continue
        found.append((time, {file.path: numbers.get(file.path, {}).get(time.name, 0) for file in files}))
    return found, rejected


def _offset(time: _Time, files: Sequence[_File], layout: Layout) -> int:
    """What to subtract from Sentinel-2's numbers: all that tell it must agree, and something must."""
    told = {time.offset, layout.offset, *(file.added for file in files)} - {None}
    if len(told) != 1:
        got = f"offsets {' and '.join(map(str, sorted(told)))} at once" if told else "offset is not known"
        raise Refused(
            f"{got}; wanted offset = 0, or {sentinel.BASELINE_OFFSET} where the numbers are those of baseline 04.00 or "
            "later, or products = ..., or add_offset in the file"
        )
    return told.pop()


def _unit(bands: Mapping[str, _Band], files: Sequence[_File], layout: Layout) -> str:
    """ "linear" or "dB", as the list says or as numbers of some dates tell."""
    if layout.unit:
        return layout.unit
    num = min((len(file.times) for file in files if file.times is not None), default=1)
    times = np.unique(np.linspace(0, num - 1, _DATES_THAT_TELL).round().astype(int)).tolist()
    units = {
        sentinel.unit_of(np.concatenate([planes.middle(band.layer(time)) for time in times]).astype(np.float64))
        for band in bands.values()
    }
    if len(units) != 1:
        raise Refused(f"VV and VH in different units: {', '.join(sorted(units))}")
    return units.pop()


# ---- One file


def _look(path: pathlib.Path, row: Modality, layout: Layout, ground: Ground | None) -> _File:
    """What a file has, by the rules of CF and the layout; raises Refused, whatever a library says of it."""
    how = dict(engine="netcdf4", group=layout.group or None, mask_and_scale=False, decode_coords="all")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # attributes that only look like those of CF
            with xr.open_dataset(path, **how) as dataset:
                return _Reader(dataset, path, row, layout, ground).read()
    except Refused as error:
        raise Refused(f"{path.name}: {error}") from error
    except (OSError, RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise Refused(f"{path.name}: no NetCDF or HDF5 file that can be read: {error}") from error


class _Reader:
    """Looks up in an open file what a layout names; its methods raise Refused."""

    def __init__(self, dataset: xr.Dataset, path: pathlib.Path, row: Modality, layout: Layout, ground: Ground | None):
        self._dataset, self._path, self._row, self._layout, self._ground = dataset, path, row, layout, ground

    def read(self) -> _File:
        layout, s2 = self._layout, self._row.name == "s2"
        bands = {key: self._in_unit(name, number) for key, (name, number) in self._where().items()}
        usual = next((name for name in map(str, self._dataset) if name.upper() == sentinel.CLASSES), "")
        numbers = [band - 1 for band in layout.cloud_bands] or [None]
        told = [self._stored(name) for name in [layout.classes or usual] if s2 and name in self._dataset]
        clouds = [self._stored(layout.clouds, number) for number in numbers if layout.clouds in self._dataset]
        return _File(
            path=str(self._path),
            bands=bands,
            classes=told[0] if told else None,
            clouds=clouds,
            times=self._times({band.axis for band in (*bands.values(), *told, *clouds)} - {None}),
            added=self._added([posixpath.basename(band.variable) for band in bands.values()]) if s2 else None,
        )

    def _where(self) -> dict[str, tuple[str, int | None]]:
        """For each band of the row that is here its variable, and its number in it."""
        layout, row = self._layout, self._row
        for field, given in (("variables", layout.variables), ("bands", layout.bands)):
            if given and len(given) != row.num_bands:
                raise Refused(f"{field} = {list(given)}; wanted {row.num_bands}, for {' '.join(row.bands)}")
        if layout.array:
            if layout.array not in self._dataset:
                raise Refused(f"no variable {layout.array!r}; there are {', '.join(map(str, self._dataset))}")
            numbers = layout.bands or range(1, row.num_bands + 1)
            return {band: (layout.array, number - 1) for band, number in zip(row.bands, numbers)}
        here = {str(name).lower(): str(name) for name in self._dataset}
        wanted = [(name,) for name in layout.variables] or [_names(band, row) for band in row.bands]
        hits = {band: [here[n.lower()] for n in names if n.lower() in here] for band, names in zip(row.bands, wanted)}
        return {band: (names[0], None) for band, names in hits.items() if names}

    def _in_unit(self, variable: str, number: int | None) -> _Band:
        """A band whose numbers are of the row's type, or are brought to its unit; an offset of Sentinel-2 stays."""
        array, layout = self._dataset[variable], self._layout
        attrs = array.attrs
        scale, add = float(attrs.get("scale_factor", 1)), float(attrs.get("add_offset", 0))
        if self._row.name == "s2":
            scale, add = (scale * _REFLECTANCE if "scale_factor" in attrs else 1.0), 0.0
        if layout.scale:
            scale, add = layout.scale, 0.0
        scale = 1.0 if np.isclose(scale, 1, rtol=1e-5) else scale
        if (scale, add) == (1, 0) and self._row.name != "s2":
            check_type({str(planes.type_of(array.dtype, attrs))}, self._row)
        band = self._stored(variable, number)
        planes.fills_of(variable, array.dtype, attrs)  # refused here, before places are chosen by what the file covers
        return dataclasses.replace(band, scale=scale, add=add)

    def _added(self, variables: Sequence[str]) -> int | None:
        attrs = [self._dataset[name].attrs for name in variables]
        told = {round(-_REFLECTANCE * float(a["add_offset"])) for a in attrs if "add_offset" in a}
        if self._layout.scale or not told:
            return None
        if len(told) > 1 or told - {0, sentinel.BASELINE_OFFSET}:
            raise Refused(f"add_offset of {sorted(-t / _REFLECTANCE for t in told)}; wanted 0 or -0.1 in every band")
        return told.pop()

    def _stored(self, variable: str, number: int | None = None) -> _Band:
        """A variable as it is stored."""
        array = self._dataset[variable]
        if array.dtype.kind not in "uif":
            raise Refused(f"{variable} is of type {array.dtype}; wanted numbers")
        others = array.ndim - 2 - (number is not None)
        if others not in (0, 1):
            axes = f"[time, {'band, ' if number is not None else ''}row, column]"
            raise Refused(f"{variable} has the axes {array.dims} of {array.shape}; wanted {axes}")
        if number is not None and number >= array.shape[-3]:
            raise Refused(f"{variable} has {array.shape[-3]} bands; wanted {number + 1} or more")
        path = posixpath.join(self._layout.group, variable)
        return _Band(str(self._path), path, number, str(array.dims[0]) if others else None, self._grid(array))

    def _grid(self, array: xr.DataArray) -> Grid:
        shape = array.shape[-2:]
        if self._ground is not None:
            return self._ground.grid(shape)
        dims = array.odc.spatial_dims
        if dims is None or not all(dim in array.coords for dim in dims):
            raise Refused(f"{NOWHERE} (no coordinates of {array.name})")
        if dims != array.dims[-2:]:
            raise Refused(f"{array.name} has the axes {array.dims}; wanted {dims[0]} and {dims[1]} last, in this order")
        (top, height), (left, width) = (_steps(array.coords[dim]) for dim in dims)
        crs = array.odc.crs or self._dataset.odc.crs
        if crs is None and not all(str(array.coords[dim].attrs.get("units")).startswith("degree") for dim in dims):
            raise Refused(NOWHERE)
        corner = Affine.translation(left - width / 2, top - height / 2)
        return Grid(crs_of("EPSG:4326" if crs is None else str(crs)), corner @ Affine.scale(width, height), shape)

    def _times(self, axes: set[str]) -> list[_Time] | None:
        """The dates along the axis of all variables."""
        if len(axes) > 1:
            raise Refused(f"variables have different axes of time: {', '.join(sorted(axes))}")
        if not axes:
            return None
        axis, products = axes.pop(), self._layout.products
        if products:
            if products not in self._dataset or self._dataset[products].shape != (self._dataset.sizes[axis],):
                raise Refused(f"products = {products!r}; wanted a variable with the name of a product for each date")
            names = [t.decode() if isinstance(t, bytes) else str(t) for t in self._dataset[products].values.tolist()]
            times = [_of_product(name, self._row) for name in names]
        else:
            stamps = self._dataset.coords[axis].values if axis in self._dataset.coords else np.zeros(0)
            if stamps.dtype.kind != "M" or np.isnat(stamps).any():
                raise Refused(f"axis {axis} has no dates; wanted a coordinate of times, or products = ...")
            stamps = stamps.astype("datetime64[s]").astype(str).tolist()
            times = [_Time(stamp, parse_day(stamp[:10])) for stamp in stamps]
        seen = Counter[str]()
        for number, time in enumerate(times):
            seen[time.name] += 1
            if seen[time.name] > 1:  # two parts of one pass
                times[number] = dataclasses.replace(time, name=f"{time.name} ({seen[time.name]})")
        return times


def _of_product(name: str, row: Modality) -> _Time:
    """A date by the name of its Sentinel product."""
    day = sentinel.product_day(name)
    if row.name != "s2":
        return _Time(name, day)
    return _Time(name, day, sentinel.offset_from_product(name), round(100 * sentinel.baseline_from_product(name)))


def _steps(coordinate: xr.DataArray) -> tuple[float, float]:
    """The first centre of a row or column and the step to the next; raises Refused if steps differ."""
    centres = coordinate.values.astype(np.float64)
    if centres.ndim != 1 or len(centres) < 2:
        raise Refused(f"coordinate {coordinate.name} of {centres.shape}; wanted two rows and columns or more")
    step = (centres[-1] - centres[0]) / (len(centres) - 1)
    off = np.abs(centres - (centres[0] + step * np.arange(len(centres)))).max()
    if not off <= _EVEN * abs(step):
        raise Refused(f"coordinate {coordinate.name} is not evenly spaced: off by {off:.4g} of steps of {step:.4g}")
    return float(centres[0]), float(step)
