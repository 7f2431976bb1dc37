"""Several ways of doing the same work, checked against fp32 and then timed in turns: a row each.

A way that is not here, does not compile or gives wrong numbers has a row that says so, and the others go on. What a
row's figures mean: ``Report``. Knows neither networks nor PyTorch. Next: gpu.py (the command), gpu_kernels.py.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.timing import median_seconds

COLUMNS = ("part", "case", "pass", "contestant", "ms", "speed / first", "TFLOP/s", "of matmul", "further")
PERCENTILES = (50, 90, 99)  # of the errors; the largest of a million in bf16 says little
# Errors that are let pass, as shares of the largest number wanted: of the first contestant, and of the others beyond
# twice the first one's. Wrong windows or a wrong mask are off by more than 0.1 in a tenth of the numbers.
FIRST_MAY, OTHERS_MAY = 0.1, 0.01
_NUM_COMPARED = 1_000_000  # numbers of an array: all of them would take longer than the timing
_LONGEST = 120  # letters of an error


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Work that may be started: built, compiled, its arguments on the device.

    Attributes:
      start: starts the work once and returns what it will give, without waiting.
      wait: until what ``start`` returned is there.
      read: the results by name, from what ``start`` returned; arrays of either framework. Not timed.
      further: what the row says beside its figures.
    """

    start: Callable[[], Any]
    wait: Callable[[Any], Any] = jax.block_until_ready
    read: Callable[[Any], Mapping[str, Any]] = dict
    further: Callable[[], str] = str


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One way of doing the work.

    Attributes:
      absent: why it is not here; empty if it is.
    """

    name: str
    prepare: Callable[[], Prepared]
    absent: str = ""


@dataclasses.dataclass
class Result:
    """Of a contestant: median seconds of the work (NaN if it was not timed), and why not or what is to be said."""

    seconds: float = math.nan
    told: str = ""
    further: str = ""


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where and how large.

    Attributes:
      platform: of jax's device: "cpu", "gpu".
      torch: benchmarks/gpu_torch.py; None where PyTorch is not here or does not see jax's device.
      no_torch: why it is None; else empty.
      tiny: whether kernels run interpreted on a CPU, so that their code is run at all.
    """

    platform: str
    torch: Any
    no_torch: str
    tiny: bool
    images: int
    pixels: int

    def release(self) -> None:
        """What PyTorch keeps between cases goes back to the device."""
        if self.torch is not None:
            self.torch.release()


class WrongNumbersError(Exception):
    """A contestant's results are not near those wanted."""


def sampled(x: Any) -> np.ndarray:
    """About a million numbers of an array of either framework, always the same ones, in fp32 on the host."""
    flat = x.reshape(-1)
    flat = flat[:: max(1, flat.shape[0] // _NUM_COMPARED) | 1]
    return flat.detach().float().cpu().numpy() if hasattr(flat, "detach") else np.asarray(flat, np.float32)


def errors(got: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """``PERCENTILES`` of the difference, as shares of the largest number wanted."""
    if got.shape != wanted.shape:
        raise WrongNumbersError(f"{got.shape} numbers; wanted {wanted.shape}")
    return np.percentile(np.abs(got - wanted), PERCENTILES) / np.abs(wanted).max()


def check(
    got: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray], first: Mapping[str, np.ndarray] | None
) -> dict[str, np.ndarray]:
    """The errors of each result, by name; ``first`` holds those of the first contestant, None for itself.

    Raises:
      WrongNumbersError: a result is further off than rounding explains.
    """
    found = {}
    if wanted and not got.keys() & wanted.keys():
        raise WrongNumbersError(f"results {sorted(got)}; wanted some of {sorted(wanted)}")
    for name in got.keys() & wanted.keys():
        found[name] = errors(got[name], wanted[name])
        of_first = np.zeros(len(PERCENTILES)) if first is None else first.get(name, np.zeros(len(PERCENTILES)))
        allowed = 2 * of_first + (FIRST_MAY if first is None else OTHERS_MAY)
        if not (found[name] <= allowed).all():  # NaN is not
            raise WrongNumbersError(f"{name}: errors {_shares(found[name])} at {PERCENTILES} %, may {_shares(allowed)}")
    return found


def _shares(values: np.ndarray) -> str:
    return " ".join(f"{value:.1e}" for value in values)


def first_line(error: BaseException) -> str:
    """What an error says first, cut."""
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return text[:_LONGEST].replace("|", "/")


class Report:
    """The table, and what went wrong in it.

    ``ms``: median over ``repeats`` of many starts in a row, waited for at the end of all, divided by their number; the
    contestants take turns. ``speed / first``: how many times as fast as the first contestant of the case. ``TFLOP/s``:
    by formula, without recomputation. ``of matmul``: that, over the largest rate measured of a matrix product. Work
    that takes the device less time than the host needs to start it is timed as what the host needs.
    """

    def __init__(self, *, repeats: int, seconds: float):
        """``seconds``: of each of the ``repeats`` timings at least, but for one start."""
        self.repeats, self.seconds = repeats, seconds
        self.matmul_rate = math.nan  # FLOP/s
        self.failures: list[str] = []

    def say(self, text: str) -> None:
        """A line, at once."""
        print(text, flush=True)

    def heading(self) -> None:
        """The head of a table."""
        self.say(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")

    def contest(
        self,
        part: str,
        case: str,
        passes: str,
        contestants: Sequence[Contestant],
        *,
        flops: float,
        reference: Callable[[], Mapping[str, np.ndarray]] = dict,
        samples: int = 0,
        may_not_fit: bool = False,
    ) -> dict[str, Result]:
        """Checks, times and prints the contestants of a case; the first is what the others are compared with.

        ``reference``: the results wanted, of which ``sampled`` is compared; empty: none are. ``samples`` of each start
        give samples/s. ``may_not_fit``: whether to be out of memory is no failure.
        """
        results = {contestant.name: Result() for contestant in contestants}
        try:
            wanted = {name: sampled(x) for name, x in reference().items()}
        except Exception as error:  # then nothing can be checked, and what is not checked is not timed
            wanted = None
            broken = first_line(error)
        ready, first = {}, None
        for contestant in contestants:
            result = results[contestant.name]
            if contestant.absent:
                result.told = f"not here: {contestant.absent}"
            elif wanted is None:
                result.told = f"failed: fp32 reference: {broken}"
            else:
                try:
                    prepared = contestant.prepare()
                    got = {name: sampled(x) for name, x in prepared.read(prepared.start()).items()}
                    plain = None if contestant is contestants[0] else first or {}
                    found = check(got, wanted, plain)
                    first = found if contestant is contestants[0] else first
                    ready[contestant.name] = prepared
                except WrongNumbersError as error:
                    result.told = f"REFUSED, wrong numbers: {error}"
                except Exception as error:  # one that does not compile must not lose the rest
                    unfit = may_not_fit and ("RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error))
                    result.told = f"{'does not fit' if unfit else 'failed'}: {first_line(error)}"
        self._time(ready, results)
        for name, result in results.items():
            if result.told.startswith(("failed", "REFUSED")):
                self.failures.append(f"{part}, {case}, {passes}, {name}: {result.told}")
            self._row((part, case, passes, name), result, next(iter(results.values())), flops, samples)
        return results

    def _time(self, ready: Mapping[str, Prepared], results: Mapping[str, Result]) -> None:
        """Median seconds of one start of each, into ``results``; one that fails on the way is told and left out."""
        counts, loops = {}, []

        def guarded(name: str, run: Callable[[], None]) -> Callable[[], None]:
            def loop():
                if not results[name].told:
                    try:
                        run()
                    except Exception as error:
                        results[name].told = f"failed: {first_line(error)}"

            return loop

        def run_all(name: str, prepared: Prepared) -> None:
            for _ in range(counts[name]):
                last = prepared.start()
            prepared.wait(last)

        for name, prepared in ready.items():
            loop = guarded(name, lambda name=name, prepared=prepared: run_all(name, prepared))
            one = 0.0
            for starts in (1, 5):  # what is queued takes less than what is waited for
                counts[name] = starts
                if one < self.seconds:
                    start = time.perf_counter()
                    loop()
                    one = (time.perf_counter() - start) / starts
            counts[name] = max(1, math.ceil(self.seconds / one))
            loops.append(loop)
        medians = median_seconds(loops, self.repeats) if loops else []
        for name, seconds in zip(ready, medians):
            if results[name].told:
                continue
            try:
                results[name].further = ready[name].further()
                results[name].seconds = float(seconds) / counts[name]
            except Exception as error:
                results[name].told = f"failed: {first_line(error)}"

    def _row(self, names: tuple[str, ...], result: Result, first: Result, flops: float, samples: int) -> None:
        if result.told:
            cells = [result.told, "-", "-", "-", "-"]
        else:
            rate = flops / result.seconds
            speed = "-" if math.isnan(first.seconds) else f"{first.seconds / result.seconds:.4g}"
            share = "-" if math.isnan(self.matmul_rate) else f"{rate / self.matmul_rate:.3g}"
            further = [f"{samples / result.seconds:.4g} samples/s"] if samples else []
            further += [result.further] if result.further else []
            cells = [f"{1e3 * result.seconds:.4g}", speed, f"{rate / 1e12:.4g}", share, ", ".join(further) or "-"]
        self.say(f"| {' | '.join((*names, *cells))} |")
