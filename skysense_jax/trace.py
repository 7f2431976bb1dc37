"""Where the devices' time went, read from a trace that ``jax.profiler`` wrote: compute, exchanges, copies, idle.

An operation is an interval on a device. Exchanges overlap compute where a compiler hides them; what counts is the rest.
The layout of the three backends' traces: of a CPU, events of ``/host:CPU`` that name their HLO instruction and device
(threads of the host stand for devices); of a GPU, the streams of ``/device:GPU:n``; of a TPU, the lines "XLA Ops" (what
a core does) and "Async XLA Ops" (from the start of an exchange or copy to its end) of ``/device:TPU:n``. Traces of
accelerators were read as made by hand in the tests only. Next: profiling.py, which writes the trace.
"""

import dataclasses
import pathlib
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

COMPUTE, COPY = "compute", "copy"
# Kind of exchange: what its instruction may be called, by XLA or after the jax function that it stems from.
_EXCHANGES = {
    "all_reduce": "all-reduce|all_reduce|psum|psum_invariant|pmax|pmin",
    "all_gather": "all-gather|all_gather",
    "reduce_scatter": "reduce-scatter|reduce_scatter|psum_scatter|all-reduce-scatter",
    "all_to_all": "all-to-all|all_to_all|ragged-all-to-all|ragged_all_to_all",
    "permute": "collective-permute|collective_permute|ppermute",
    "broadcast": "collective-broadcast|collective_broadcast|pbroadcast",
    "send": "send|recv",
    "other_exchange": "async-collective",
}
_NUMBERING = r"(?:-start|-done)?(?:\.\w+)*"
_EXCHANGE = re.compile("|".join(f"(?P<{kind}>(?:{names}){_NUMBERING})" for kind, names in _EXCHANGES.items()))
_NCCL = re.compile(r"nccl\w*?Kernel\w*?_(AllReduce|AllGather|ReduceScatter|AllToAll|SendRecv|Broadcast)")
_NCCL_KINDS = {
    "AllReduce": "all_reduce",
    "AllGather": "all_gather",
    "ReduceScatter": "reduce_scatter",
    "AllToAll": "all_to_all",
    "SendRecv": "send",
    "Broadcast": "broadcast",
}
_COPY = re.compile(
    rf"(?:copy|infeed|outfeed){_NUMBERING}|(?:dynamic-)?(?:update-)?slice-(?:start|done)(?:\.\w+)*|(?:Memcpy|Memset)\w*"
)
_CONTROL = re.compile(r"(?:while|conditional)(?:\.\w+)*")  # their bodies' instructions are events of their own
_OPCODE = re.compile(r"\s([a-z][\w-]*)\(")

Interval = tuple[float, float]


class Op(NamedTuple):
    """An operation on a device; ``kind``: COMPUTE, COPY or a kind of exchange; times in nanoseconds."""

    device: str
    kind: str
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Split:
    """Seconds of a step, the mean over steps and devices. The four parts make ``step``.

    Attributes:
      step: from the first operation to the last on any device, over the number of steps.
      compute: in which a device computes.
      exposed_exchange: in which it exchanges and does not compute: not hidden.
      exposed_copy: in which it copies or is fed and does nothing else.
      idle: in which it does nothing.
      exchange: in which an exchange is in flight, hidden or not, waiting for the slowest device included.
      exchanges: the same by kind; kinds may overlap.
    """

    num_devices: int
    num_steps: int
    step: float
    compute: float
    exposed_exchange: float
    exposed_copy: float
    idle: float
    exchange: float
    exchanges: Mapping[str, float]

    def numbers(self) -> dict[str, float]:
        """As they are logged, all in seconds."""
        found = {
            "profile/step_seconds": self.step,
            "profile/compute_seconds": self.compute,
            "profile/exposed_exchange_seconds": self.exposed_exchange,
            "profile/exposed_copy_seconds": self.exposed_copy,
            "profile/idle_seconds": self.idle,
            "profile/exchange_seconds": self.exchange,
        }
        return found | {f"profile/{kind}_seconds": seconds for kind, seconds in self.exchanges.items()}

    def text(self) -> str:
        """A table."""
        row = lambda name, seconds: f"  {name:<34}{1e3 * seconds:>10.2f} ms  {seconds / self.step:>6.1%}"  # noqa: E731
        return "\n".join(
            [
                f"device time of a step, mean of {self.num_steps} steps on {self.num_devices} devices of this process",
                row("compute", self.compute),
                row("exchanges not hidden by compute", self.exposed_exchange),
                row("copies, feeds and nothing else", self.exposed_copy),
                row("idle", self.idle),
                row("step", self.step),
                row("exchanges in flight, hidden or not", self.exchange),
                *(row(f"  {kind}", seconds) for kind, seconds in self.exchanges.items()),
            ]
        )


# ---- arithmetic of intervals


def merge(intervals: Iterable[Interval]) -> list[Interval]:
    """The same instants as disjoint intervals, in order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        elif end > start:
            merged.append((start, end))
    return merged


def subtract(intervals: Sequence[Interval], taken: Sequence[Interval]) -> list[Interval]:
    """The instants of ``intervals`` that are not in ``taken``; both as ``merge`` returns them."""
    left, first = [], 0
    for start, end in intervals:
        while first < len(taken) and taken[first][1] <= start:
            first += 1
        at = first
        while at < len(taken) and taken[at][0] < end:
            if taken[at][0] > start:
                left.append((start, taken[at][0]))
            start = max(start, taken[at][1])
            at += 1
        if start < end:
            left.append((start, end))
    return left


def length(intervals: Sequence[Interval]) -> float:
    """Of disjoint intervals together."""
    return float(sum(end - start for start, end in intervals))


def split(ops: Sequence[Op], *, num_steps: int) -> Split | None:
    """The time of ``num_steps`` steps by what devices did; None if there is no operation."""
    if not ops:
        return None
    window = max(op.end for op in ops) - min(op.start for op in ops)
    of_devices = defaultdict(lambda: defaultdict(list))
    for op in ops:
        of_devices[op.device][op.kind].append((op.start, op.end))
    sums: dict[str, float] = defaultdict(float)
    exchanges: dict[str, float] = defaultdict(float)
    for of_kind in of_devices.values():
        compute, copies = merge(of_kind.pop(COMPUTE, [])), merge(of_kind.pop(COPY, []))
        exchange = merge(interval for intervals in of_kind.values() for interval in intervals)
        sums["compute"] += length(compute)
        sums["exchange"] += length(exchange)
        sums["exposed_exchange"] += length(subtract(exchange, compute))
        sums["exposed_copy"] += length(subtract(copies, merge([*compute, *exchange])))
        sums["idle"] += window - length(merge([*compute, *exchange, *copies]))
        for kind, intervals in of_kind.items():
            exchanges[kind] += length(merge(intervals))
    scale = 1e-9 / num_steps / len(of_devices)
    return Split(
        num_devices=len(of_devices),
        num_steps=num_steps,
        step=window * 1e-9 / num_steps,
        exchanges={kind: seconds * scale for kind, seconds in sorted(exchanges.items(), key=lambda item: -item[1])},
        **{part: seconds * scale for part, seconds in sums.items()},
    )


# ---- what stands in a trace


def kind_of(name: str, instruction: str = "") -> str | None:
    """What an event called ``name``, of an HLO ``instruction`` where one is named, does; None if its inside is told
    by other events (loops, branches).

    On a TPU ``name`` may be the instruction's whole text.
    """
    left, _, right = name.partition(" = ")
    names = [instruction, left.lstrip("%")]
    if right and (opcode := _OPCODE.search(f" {right}")):
        names.append(opcode[1])
    for known in names:
        if match := _EXCHANGE.fullmatch(known):
            return match.lastgroup
    if match := _NCCL.match(name):
        return _NCCL_KINDS[match[1]]
    if any(_CONTROL.fullmatch(known) for known in names):
        return None
    return COPY if any(_COPY.fullmatch(known) for known in names) else COMPUTE


def read(path: pathlib.Path) -> list[Op]:
    """The operations of all devices in a trace, a file ``*.xplane.pb``; of the host only where there is no other."""
    with warnings.catch_warnings():  # of the binding's types, which have no __module__
        warnings.simplefilter("ignore", DeprecationWarning)
        data = jax.profiler.ProfileData.from_file(str(path))
        planes = list(data.planes)
        ops = [op for plane in planes for op in _accelerator_ops(plane)]
        return ops or [op for plane in planes if plane.name == "/host:CPU" for op in _host_ops(plane)]


def _accelerator_ops(plane: Any) -> Iterator[Op]:
    device = re.fullmatch(r"/device:((TPU|GPU):\d+)", plane.name)
    if device is None:
        return
    for line in plane.lines:
        # of a GPU every other line says again what its streams do
        if line.name.startswith("Stream ") if device[2] == "GPU" else line.name == "XLA Ops":
            yield from _device_ops(line, device[1])
        elif device[2] == "TPU" and line.name == "Async XLA Ops":
            for op in _device_ops(line, device[1]):
                yield op._replace(kind=COPY if op.kind == COMPUTE else op.kind)


def _device_ops(line: Any, device: str) -> Iterator[Op]:
    for event in line.events:
        instruction = next((str(value) for key, value in event.stats if key == "hlo_op"), "")
        if kind := kind_of(event.name, instruction):
            yield Op(device, kind, float(event.start_ns), float(event.end_ns))


def _host_ops(plane: Any) -> Iterator[Op]:
    for event in (event for line in plane.lines for event in line.events):
        if event.name.startswith("end: "):  # most of them, and without a name of an instruction
            continue
        stats = dict(event.stats)
        if "hlo_op" in stats and "device_ordinal" in stats and (kind := kind_of(event.name, str(stats["hlo_op"]))):
            yield Op(f"CPU:{stats['device_ordinal']}", kind, float(event.start_ns), float(event.end_ns))
