"""Targets that a step is planned for: so many chips of a kind (chips.py), and which topology they make.

Nothing here imports jax or an accelerator's compiler. Next: plan/forecast.py.
"""

import dataclasses
import difflib
import math
import re

from skysense_jax.chips import CHIPS, Chip

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
        if self.chip.platform == "gpu":
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
        raise ValueError(f"target: got {text!r}; wanted KIND:CHIPS, e.g. v5p:64, KIND one of {known}")
    kind, mark, number = _CLOUD_NAMES.get(match[1], match[1]), match[2], int(match[3])
    if kind not in CHIPS:
        near = difflib.get_close_matches(kind, CHIPS, n=1)
        hint = f" (nearest: {near[0]})" if near else ""
        raise ValueError(f"target: unknown chip {match[1]!r}{hint}; wanted one of {known}")
    chip, remark = CHIPS[kind], ""
    if mark == "-" and chip.platform == "tpu":
        if number % chip.cores:
            raise ValueError(f"target: {text} counts cores, {chip.cores} a chip; {number} is no whole chip")
        number //= chip.cores
        counts = "cores" if chip.cores > 1 else "chips"
        remark = f"{text} is the cloud's own name and counts {counts}: {number} chips"
    if chip.platform == "gpu":
        if number < 1 or (number > chip.chips_per_host and number % chip.chips_per_host):
            raise ValueError(f"target: {text}: more than {chip.chips_per_host} GPUs are whole hosts of them")
        return Target(chip, number, remark=remark)
    num_slices = math.ceil(number / chip.largest_slice)
    if number < 1 or number % num_slices or (number // num_slices) & (number // num_slices - 1):
        raise ValueError(
            f"target: {text}: wanted 1, 2, 4, 8 ... chips, a power of two; above {chip.largest_slice}, whole slices of "
            "such a number each"
        )
    return Target(chip, number, num_slices, remark)


def _sides(chips: int, dimensions: int) -> tuple[int, ...]:
    """A power of two as near to a square or a cube as the vendor builds: 2x4, 16x16; 2x2x1, 4x4x8."""
    sides = [1] * dimensions
    while math.prod(sides) < chips:
        sides[sides.index(min(sides))] *= 2
    return tuple(sides) if dimensions == 3 and chips <= 4 else tuple(sorted(sides))
