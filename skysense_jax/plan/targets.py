"""Chips that a step is planned for: what they hold, what they are rated at, how many make which topology.

The one table of rates; every figure is a vendor's data sheet, named in the row. Nothing here imports an accelerator's
compiler. Next: forecast.py.
"""

import dataclasses
import difflib
import math
import re

GIB, GB = 2**30, 1e9


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator.

    Attributes:
      platform: "tpu" or "cuda".
      memory_bytes: what a program may use of it, less than the label says.
      flops: bf16 multiply-adds a second, dense, as two operations each.
      memory_bandwidth: bytes a second, read and written.
      link_bandwidth: bytes a second that a chip sends to others of its slice (TPU: all links, one direction) or of its
        host (GPU: NVLink, one direction).
      network_bandwidth: bytes a second that a chip sends beyond its slice or host.
      chips_per_host: of the usual machine.
      largest_slice: chips that are linked without the network.
      cores: TensorCores of a TPU (more than one: the cloud's own names count them), multiprocessors of a GPU.
      dimensions: of the torus that links a slice; 0: all chips of a host are linked to each other.
      source: where the figures come from.
    """

    name: str
    platform: str
    memory_bytes: int
    flops: float
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    chips_per_host: int
    largest_slice: int
    cores: int
    dimensions: int
    source: str


def _tpu(name, memory_gib, teraflops, bandwidth, link_gbits, largest, cores, dimensions) -> Chip:
    source = f"Google Cloud TPU documentation, {name}; memory as its compiler states it"
    # Links are quoted as both directions of all of them; 100 Gbit/s to the network for a host of four chips.
    rates = teraflops * 1e12, bandwidth * GB, link_gbits / 16 * GB, 3.1 * GB
    return Chip(name, "tpu", int(memory_gib * GIB), *rates, 4, largest, cores, dimensions, source)


def _gpu(name, memory_gib, teraflops, bandwidth, nvlink, cores, label) -> Chip:
    source = f"NVIDIA data sheet of {label}; {memory_gib} GiB of it usable"
    # NVLink is quoted as both directions; 400 Gbit/s of InfiniBand or RoCE a GPU, as in machines of eight.
    rates = teraflops * 1e12, bandwidth * GB, nvlink / 2 * GB, 50 * GB
    return Chip(name, "cuda", int(memory_gib * GIB), *rates, 8, 8, cores, 0, source)


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        _tpu("v5e", 15.75, 197, 819, 1600, 256, 1, 2),
        _tpu("v5p", 95.74, 459, 2765, 4800, 8960, 2, 3),
        _tpu("v6e", 31.25, 918, 1640, 3584, 256, 1, 2),
        _gpu("h20", 94, 148, 4000, 900, 78, "H20, 96 GB"),
        _gpu("h100", 78, 989, 3350, 900, 132, "H100 SXM, 80 GB"),
        _gpu("h200", 139, 989, 4800, 900, 132, "H200, 141 GB"),
    )
}
_CLOUD_NAMES = {"v5litepod": "v5e"}  # beside the chips' own names


@dataclasses.dataclass(frozen=True)
class Target:
    """So many chips of a kind.

    Attributes:
      num_slices: groups of chips that only the network joins (TPU slices; GPU hosts are one slice).
      remark: how a cloud's own name was understood; else empty.
    """

    chip: Chip
    num_chips: int
    num_slices: int = 1
    remark: str = ""

    @property
    def chips_per_slice(self) -> int:
        return self.num_chips // self.num_slices

    @property
    def topology(self) -> str:
        """What the compiler calls it: "v5p:4x4x4" of one slice, or "1x8x8" (slices, hosts, chips of a host)."""
        if self.chip.platform == "cuda":
            per_host = min(self.num_chips, self.chip.chips_per_host)
            return f"1x{self.num_chips // per_host}x{per_host}"
        sides = _sides(self.chips_per_slice, self.chip.dimensions)
        return f"{self.chip.name}:{'x'.join(map(str, sides))}"

    def __str__(self) -> str:
        slices = f" in {self.num_slices} slices" if self.num_slices > 1 else ""
        return f"{self.num_chips} x {self.chip.name}{slices}"


def parse(text: str) -> Target:
    """The target of KIND:CHIPS, or of a cloud's own name (v5p-128 counts cores: 64 chips).

    Raises:
      ValueError: an unknown kind, or a number of chips that does not exist.
    """
    match = re.fullmatch(r"([a-z0-9]+)([:-])(\d+)", text.strip().lower())
    known = " ".join(CHIPS)
    if match is None:
        raise ValueError(f"--target: got {text!r}; wanted KIND:CHIPS, e.g. v5p:64, KIND one of {known}")
    kind, mark, number = _CLOUD_NAMES.get(match[1], match[1]), match[2], int(match[3])
    if kind not in CHIPS:
        near = difflib.get_close_matches(kind, CHIPS, n=1)
        hint = f" (nearest: {near[0]})" if near else ""
        raise ValueError(f"--target: unknown chip {match[1]!r}{hint}; wanted one of {known}")
    chip, remark = CHIPS[kind], ""
    if mark == "-" and chip.platform == "tpu":
        if number % chip.cores:
            raise ValueError(f"--target: {text} counts cores, {chip.cores} a chip; {number} is no whole chip")
        number //= chip.cores
        counts = "cores" if chip.cores > 1 else "chips"
        remark = f"{text} is the cloud's own name and counts {counts}: {number} chips"
    if chip.platform == "cuda":
        if number < 1 or (number > chip.chips_per_host and number % chip.chips_per_host):
            raise ValueError(f"--target: {text}: more than {chip.chips_per_host} GPUs are whole hosts of them")
        return Target(chip, number, remark=remark)
    num_slices = math.ceil(number / chip.largest_slice)
    if number < 1 or number % num_slices or (number // num_slices) & (number // num_slices - 1):
        raise ValueError(
            f"--target: {text}: wanted 1, 2, 4, 8 ... chips, above {chip.largest_slice} whole slices of that many"
        )
    return Target(chip, number, num_slices, remark)


def _sides(chips: int, dimensions: int) -> tuple[int, ...]:
    """A power of two as near to a square or a cube as the vendor builds: 2x4, 16x16; 2x2x1, 4x4x8."""
    sides = [1] * dimensions
    while math.prod(sides) < chips:
        sides[sides.index(min(sides))] *= 2
    return tuple(sides) if dimensions == 3 and chips <= 4 else tuple(sorted(sides))
