"""Which mesh, which recomputation, how many parts: candidates for a target, compiled one after the other.

Next: forecast.py (one candidate), __main__.py (``--sweep``).
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from skysense_jax.plan.forecast import DOES_NOT_FIT, Forecast
from skysense_jax.targets import Target

REMATS = ("none", "matmuls", "blocks")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What is tried: overrides by dotted field, in the order of the table."""

    overrides: Mapping[str, Any]

    def in_more_parts(self) -> "Candidate | None":
        """The same with fewer samples of a device at a time, by their smallest factor; None where it is one already."""
        samples, microbatches = self.overrides["parts.logits"], self.overrides["parts.microbatches"]
        factor = next((n for n in range(2, samples + 1) if samples % n == 0), None)
        if factor is None:
            return None
        parts = {"parts.logits": samples // factor, "parts.microbatches": microbatches * factor}
        return Candidate({**self.overrides, **parts})

    def __str__(self) -> str:
        return " ".join(f"--config.{field}={value}" for field, value in self.overrides.items())


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A candidate and what became of it: a forecast, or the reason why there is none."""

    candidate: Candidate
    forecast: Forecast | None
    reason: str = ""

    def too_large(self, target: Target, full: float) -> bool:
        """Whether memory, and nothing else, is what speaks against it."""
        if self.forecast is None:
            return self.reason.startswith(DOES_NOT_FIT)
        return not self.fits(target, full)

    def share(self, target: Target) -> float:
        """Of a device's memory."""
        assert self.forecast is not None
        return self.forecast.peak_bytes / target.chip.memory_bytes

    def fits(self, target: Target, full: float) -> bool:
        """Whether it compiled and takes at most ``full`` of a device's memory."""
        return self.forecast is not None and self.share(target) <= full

    def row(self, target: Target) -> str:
        """A line of the table."""
        if self.forecast is None:
            return f"{self.candidate}: {self.reason}"
        return (
            f"{self.candidate}: {self.share(target):.0%} of memory, {self.forecast.step_seconds(target):.3f} s a step"
        )


def candidates(target: Target, *, num_experts: int, batch_size: int) -> Iterator[Candidate]:
    """Meshes that shard parameters over all chips of a slice, over a host, and for mixtures over the experts' axis too.

    ``num_experts``: 0 without a mixture. Each mesh with each way of recomputing, prototype logits a sample at a time.
    All samples of a device at once: what is too large is to be tried ``in_more_parts``.
    """
    slice_size = target.chips_per_slice
    host = min(target.chip.chips_per_host, slice_size)
    for fsdp in dict.fromkeys((slice_size, min(max(host, 16), slice_size), host)):
        for expert in dict.fromkeys((1, math.gcd(num_experts, fsdp) if num_experts else 1)):
            mesh = {"mesh.data": target.num_chips // fsdp, "mesh.fsdp": fsdp // expert, "mesh.expert": expert}
            samples = batch_size // target.num_chips
            for remat in REMATS:
                parts = {"parts.logits": max(samples, 1), "parts.microbatches": 1}
                yield Candidate(mesh | {"efficiency.remat": remat, **parts})


def best(outcomes: Sequence[Outcome], target: Target, full: float) -> Outcome | None:
    """The fastest of those that fit, by the prediction; None if none does."""
    fitting = [outcome for outcome in outcomes if outcome.fits(target, full)]
    return min(fitting, key=lambda outcome: outcome.forecast.step_seconds(target), default=None)
