"""The one table of sensors: what a modality is, for tokenizers, normalisation, records, checks and exports.

A further sensor is a row here, or a row in ``config.data.new_modalities``. Input, network and losses read no
modality's name; procedural scenes and converters do, which make particular ones.
The label map (OpenStreetMap) stands beside the sensors: it is never an input of the network.
Nothing here imports anything of the project.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping

METRES_PER_CELL = 10.0
NATURAL_BANDS = (("R", "G", "B"), ("B4", "B3", "B2"))  # shown as red, green, blue where a modality has them
# Ground size of a token that stages 2, 3 and 4 aim at, in cells (2.5, 5 and 10 m): spec "Adaptive Patch Merging".
TRANSITION_TARGET_CELLS = (0.25, 0.5, 1.0)

DTYPES = ("uint8", "uint16", "int16", "float16", "float32")
PHOTOMETRIC = ("rgb", "reflectance", "backscatter", "none")
# Names no modality may take: the fused features beside the modalities', the label map; what a PyTorch container of
# modules has as attributes, so that exported weights could not be loaded; flags of export/embed.py.
RESERVED_NAMES = frozenset(
    """fused osm
    T_destination add_module apply bfloat16 buffers call_super_init children clear compile copy cpu cuda double
    dump_patches eval extra_repr float forward fromkeys get get_buffer get_extra_state get_parameter get_submodule half
    ipu items keys load_state_dict modules mtia named_buffers named_children named_modules named_parameters parameters
    pop popitem register_backward_hook register_buffer register_forward_hook register_forward_pre_hook
    register_full_backward_hook register_full_backward_pre_hook register_load_state_dict_post_hook
    register_load_state_dict_pre_hook register_module register_parameter register_state_dict_post_hook
    register_state_dict_pre_hook requires_grad_ set_extra_state set_submodule setdefault share_memory state_dict to
    to_empty train training type update values xpu zero_grad
    model out preview overwrite features tile overlap bounds crs device help""".split()  # noqa: SIM905
)


@dataclasses.dataclass(frozen=True)
class Modality:
    """A sensor, as every room of the project sees it. Hashable, so that it may be a field of a linen module.

    Attributes:
      name: key in batches, records, parameter paths and metrics.
      bands: names in the order of the last axis.
      dtype: type on disk and on the way to the device, one of ``DTYPES``.
      unit: what a stored number is.
      value_range: (low, high) that valid pixels can take; outside is refused.
      typical_range: (low, high) in which the mean of a band over a sample lies; a reader uses it to tell
        a wrong unit (linear power for dB, 0-1 for 0-10000) and names ``wrong_unit_hint`` in its error.
      wrong_unit_hint: what the numbers probably are when ``typical_range`` is left.
      pixels_per_cell: pixels along a side of one 10 m cell; readers and builders resample to it.
      patch: pixels along a side of one token at stage 1; ``pixels_per_cell = patch * 2**merges``.
      mean, std: per band, in ``unit``.
      statistics_source: where ``mean`` and ``std`` come from: product level, clouds kept or not, corpus.
      photometric: which family of changes a training view takes, one of ``PHOTOMETRIC``.
      codec: how a record stores it: "jpeg" (visually lossless, 3 bands uint8), "png" (lossless, uint8), "zstd".
    """

    name: str
    bands: tuple[str, ...]
    dtype: str
    unit: str
    value_range: tuple[int | float, int | float]
    typical_range: tuple[int | float, int | float]
    wrong_unit_hint: str
    pixels_per_cell: int
    patch: int
    mean: tuple[int | float, ...]
    std: tuple[int | float, ...]
    statistics_source: str
    photometric: str = "none"
    codec: str = "zstd"

    def __post_init__(self):
        for field in ("bands", "value_range", "typical_range", "mean", "std"):  # lists come from config files
            object.__setattr__(self, field, tuple(getattr(self, field)))
        where = f"modality {self.name!r}"
        if not self.name.isidentifier() or self.name in RESERVED_NAMES:
            raise ValueError(
                f"{where}: wanted letters, digits and underscores for a name, and none of modalities.RESERVED_NAMES, "
                "which mean something else already"
            )
        if not self.bands or self.patch < 1 or not self.value_range[0] < self.value_range[1]:
            raise ValueError(
                f"{where}: bands {self.bands}, patch {self.patch}, value_range {self.value_range}; wanted one band or "
                "more, a patch of 1 or more, and the lower value first"
            )
        if not (len(self.bands) == len(self.mean) == len(self.std)):
            raise ValueError(
                f"{where}: {len(self.bands)} bands, {len(self.mean)} means and {len(self.std)} deviations; "
                "wanted one of each per band"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"{where}: dtype {self.dtype!r}; wanted one of {DTYPES}")
        if self.photometric not in PHOTOMETRIC:
            raise ValueError(f"{where}: photometric {self.photometric!r}; wanted one of {PHOTOMETRIC}")
        self._check_photometric(where)
        if min(self.std) <= 0:
            raise ValueError(f"{where}: std {self.std}; wanted values above 0")
        ratio = self.pixels_per_cell / self.patch
        if ratio < 1 or not math.log2(ratio).is_integer() or self.num_merges > len(TRANSITION_TARGET_CELLS):
            raise ValueError(
                f"{where}: {self.pixels_per_cell} pixels per cell with patch {self.patch}; wanted "
                "pixels_per_cell = patch * 2**merges with 0 to 3 merges"
            )

    def _check_photometric(self, where: str) -> None:
        """Each family's strengths are sizes in one unit (photometric.py)."""
        low, high = self.value_range
        fits, wanted = {
            "rgb": (self.dtype == "uint8" and self.num_bands >= 3, "dtype uint8 and 3 bands or more"),
            "reflectance": (low >= 0 and high >= 5000, "a value_range of reflectance x 10000"),
            "backscatter": (
                self.dtype.startswith("float") and low < 0,
                "floating point with the negative numbers of dB in value_range",
            ),
            "none": (True, ""),
        }[self.photometric]
        if not fits:
            raise ValueError(
                f"{where}: photometric {self.photometric!r} with dtype {self.dtype}, {self.num_bands} bands and "
                f"value_range {self.value_range}; wanted {wanted}, or photometric='none'"
            )

    @property
    def num_bands(self) -> int:
        return len(self.bands)

    @property
    def num_merges(self) -> int:
        """2x2 merges from the first token grid to one token a cell."""
        return int(math.log2(self.pixels_per_cell // self.patch))

    @property
    def tokens_per_cell(self) -> int:
        """Tokens along a side of a cell at stage 1."""
        return self.pixels_per_cell // self.patch

    @property
    def merges_at(self) -> tuple[bool, bool, bool]:
        """For the transitions into stages 2, 3, 4: whether the grid is merged 2x2 (else kept).

        Our choice where the paper is silent: merge when the token is finer than the next stage's target.
        """
        token_cells, merges = 1.0 / self.tokens_per_cell, []
        for target in TRANSITION_TARGET_CELLS:
            merges.append(token_cells < target)
            token_cells *= 2 if merges[-1] else 1
        return tuple(merges)


_HR = Modality(
    name="hr",
    bands=("R", "G", "B"),
    dtype="uint8",
    unit="8-bit digital number, display-ready RGB",
    value_range=(0, 255),
    typical_range=(2, 254),
    wrong_unit_hint="values 0-1 or 16-bit numbers (wanted 8-bit 0-255)",
    pixels_per_cell=32,
    patch=4,
    mean=(123.675, 116.28, 103.53),
    std=(58.395, 57.12, 57.375),
    statistics_source="ImageNet, as in SkySense and SkySense++ (0.485 0.456 0.406 / 0.229 0.224 0.225, times 255)",
    photometric="rgb",
    codec="jpeg",
)

_S2 = Modality(
    name="s2",
    bands=("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B11", "B12"),
    dtype="uint16",
    unit="surface reflectance x 10000, without the offset of processing baseline 04.00",
    value_range=(1, 20000),
    typical_range=(1, 16000),  # the short-wave infrared of a lake is close to the lowest number, 1
    wrong_unit_hint="reflectance 0-1 (multiply by 10000)",
    pixels_per_cell=1,
    patch=1,
    mean=(884.297, 1144.162, 1297.473, 1624.910, 2194.642, 2422.212, 2517.761, 2581.647, 2368.512, 1805.068),
    std=(1155.152, 1183.629, 1368.114, 1370.265, 1355.554, 1416.515, 1474.789, 1439.309, 1455.521, 1343.484),
    statistics_source="SSL4EO-S12, Level-2A without B1 and B9, clouds kept; also used by SkySense++",
    photometric="reflectance",
)

_S1 = Modality(
    name="s1",
    bands=("VV", "VH"),
    dtype="float16",
    unit="backscatter in dB (10 log10 of linear power), GRD IW",
    value_range=(-60, 30),
    typical_range=(-40, -0.5),
    wrong_unit_hint="linear power (take 10 log10)",
    pixels_per_cell=1,
    patch=1,
    mean=(-12.548, -20.192),
    std=(5.257, 5.912),
    statistics_source="SSL4EO-S12, GRD; also used by SkySense++",
    photometric="backscatter",
)

MODALITIES: Mapping[str, Modality] = {row.name: row for row in (_HR, _S2, _S1)}


@dataclasses.dataclass(frozen=True)
class LabelMap:
    """A raster of class ids that objectives read; 0 = nothing mapped.

    ``classes[i]`` is the name of class id ``i + 1``; ``prompts[i]`` is the sentence that a text encoder reads for it.
    """

    name: str
    pixels_per_cell: int
    classes: tuple[str, ...]
    prompts: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.classes)


_OSM_CLASSES = {  # name: sentence for the text encoder (our wording; the tag groups are OpenStreetMap's)
    "water": "open water, a river, lake or pond",
    "wetland": "wetland, marsh or reed bed",
    "forest": "forest, dense trees",
    "scrub": "scrub, bushes and shrubs",
    "grassland": "grassland, meadow or pasture",
    "farmland": "farmland, a field of annual crops",
    "orchard": "orchard, fruit trees planted in rows",
    "vineyard": "vineyard, rows of grape vines",
    "bare_ground": "bare ground, rock or quarry",
    "sand": "sand, beach or dune",
    "residential": "residential area, houses with gardens",
    "industrial": "industrial or commercial area",
    "building": "a building with a roof",
    "road": "a paved road or street",
    "railway": "railway tracks",
    "sports_pitch": "a sports pitch",
}

OSM = LabelMap(
    name="osm",
    pixels_per_cell=4,
    classes=tuple(_OSM_CLASSES),
    prompts=tuple(_OSM_CLASSES.values()),
)


def label_map(classes: Iterable[str] = (), prompts: Iterable[str] = ()) -> LabelMap:
    """A label map of these classes, in the order of their ids; without any that of OpenStreetMap.

    ``prompts``: what a text encoder reads for each; their names if none are given.

    Raises:
      ValueError: a name twice, or more than 255.
    """
    classes = tuple(classes)
    if not classes:
        return OSM
    if (
        not all(name and isinstance(name, str) for name in classes)
        or len(set(classes)) < len(classes)
        or len(classes) > 255
    ):
        raise ValueError(f"classes {classes}; wanted names, each once, 255 or fewer")
    return LabelMap(OSM.name, OSM.pixels_per_cell, classes, tuple(prompts) or classes)


def arguments(row: Mapping) -> dict:
    """Arguments of ``Modality`` as TOML and JSON have them, with tuples for lists."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}


def from_json(row: Mapping) -> Modality:
    """The row that ``dataclasses.asdict`` and JSON made this of."""
    return Modality(**arguments(row))


def select(names: Iterable[str], new: Iterable[Mapping] = ()) -> tuple[Modality, ...]:
    """The rows called ``names``, in that order, from the table and from ``new`` rows (keyword arguments of Modality).

    Raises:
      ValueError: a name that no row has, or a new row that takes the name of an existing one.
    """
    table = dict(MODALITIES)
    for row in new:
        modality = Modality(**row)
        if modality.name in table:
            raise ValueError(f"config.data.new_modalities: {modality.name!r} is already a row of the table")
        table[modality.name] = modality
    names = tuple(names)
    unknown = [name for name in names if name not in table]
    if unknown or not names or len(set(names)) != len(names):
        raise ValueError(f"config.data.modalities: got {names}; wanted one or more, each once, of {sorted(table)}")
    return tuple(table[name] for name in names)
