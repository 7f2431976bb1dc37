"""What a run's numbers say of its health: a loss that jumps, and targets or features that collapse.

Plain arithmetic on the numbers of single steps in their order, so that all processes come to the same verdict behind
the same step. What follows from a verdict is train.py's. Sources: going back behind spikes, PaLM (arXiv 2204.02311)
sec. 5.1; what collapse looks like, DINO (2104.14294) sec. 5.3. All limits are our choice.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping

import numpy as np

_FEWEST = 20  # losses before a jump can be told from the course of things
_LEAST_SHARE = 0.02  # of the median that counts as a deviation, however quiet the loss was


@dataclasses.dataclass(frozen=True)
class Spike:
    """A loss above its limit, several steps in a row.

    Attributes:
      first_step, last_step: of these steps.
      loss: at the last.
      limit: what it stayed above.
    """

    first_step: int
    last_step: int
    loss: float
    limit: float


class LossSpikes:
    """Tells a jump of the loss from its noise, by median and median deviation of the losses before.

    Args:
      window: losses that say what is usual.
      deviations: a loss is too high this many deviations above their median (1.48 median absolute deviations are one,
        as of a normal distribution); 0: nothing is a spike.
      in_row: steps in a row that make a spike; a single bad batch is none.
    """

    def __init__(self, *, window: int, deviations: float, in_row: int):
        self._deviations, self._in_row = deviations, in_row
        self._usual: collections.deque[float] = collections.deque(maxlen=window)
        self._high: list[tuple[int, float]] = []

    def see(self, step: int, loss: float) -> Spike | None:
        """The spike that ``step`` completes. A loss that is not finite says nothing: its step changed nothing."""
        if not math.isfinite(loss) or not self._deviations:
            return None
        limit = self._limit()
        if loss <= limit:
            self._usual.extend(high for _, high in self._high)  # they were noise after all
            self._high = []
            self._usual.append(loss)
            return None
        self._high.append((step, loss))
        if len(self._high) < self._in_row:
            return None
        first, self._high = self._high[0][0], []
        return Spike(first, step, loss, limit)

    def _limit(self) -> float:
        if len(self._usual) < _FEWEST:
            return math.inf
        median = float(np.median(self._usual))
        deviation = 1.4826 * float(np.median(np.abs(np.asarray(self._usual) - median)))
        return median + self._deviations * max(deviation, _LEAST_SHARE * abs(median))


@dataclasses.dataclass(frozen=True)
class Collapse:
    """A signal that stayed beyond its limit.

    Attributes:
      signal: its name among the metrics.
      value: at the last step.
      limit: what it stayed beyond.
      means: in words.
    """

    signal: str
    value: float
    limit: float
    means: str


class Collapses:
    """Tells when self-distillation has stopped to say anything, by the signals of ``train_step``.

    Args:
      num_prototypes: Z; targets have an entropy of log Z nats where they say nothing.
      num_queries: of a view.
      in_row: steps in a row beyond a limit; each signal is told once, and again after it had recovered.
      from_step: nothing is told before: a network at its start says nothing either.
    """

    def __init__(self, *, num_prototypes: int, num_queries: int, in_row: int, from_step: int):
        most = math.log(num_prototypes)
        # Beginning of a signal's name, whether it must not be above (or below), limit, what it means.
        self._rules = (
            ("target_entropy/", True, 0.98 * most, "the teacher's targets are nearly uniform: it says nothing"),
            ("target_entropy_of_mean/", False, 0.5 * most, "few prototypes are used: all rows say the same"),
            ("feature_std/", False, 0.05, "features of all images are nearly the same"),
            ("query_usage", False, 1.2 / num_queries, "all queries stand for the same"),
            ("query_content", False, 0.1, "targets of queries hardly tell what a query sees: too few prototypes?"),
            ("experts/dropped", True, 0.5, "most choices find no place: few experts get all tokens"),
        )
        self._in_row, self._from_step = in_row, from_step
        self._beyond: collections.Counter[str] = collections.Counter()

    def see(self, step: int, numbers: Mapping[str, float]) -> list[Collapse]:
        """What ``step`` makes certain."""
        if step < self._from_step or not self._in_row:
            return []
        found = []
        for signal, value in numbers.items():
            rule = next((rule for rule in self._rules if signal.startswith(rule[0])), None)
            if rule is None or not math.isfinite(value) or value == 0:  # 0: nothing valid that could be measured
                continue
            _, above, limit, means = rule
            if value <= limit if above else value >= limit:
                self._beyond[signal] = 0
                continue
            self._beyond[signal] += 1
            if self._beyond[signal] == self._in_row:
                found.append(Collapse(signal, float(value), limit, means))
        return found
