"""What a compiled program multiplies, moves through memory and sends to other chips, in the order of its schedule.

``read`` makes events of the program's text, of one device: every device runs the same. ``totals`` adds them up, loops
as often as they run; ``play`` lets exchanges run beside the work that the schedule places between their start and end,
which shows what of the network nothing hides. Next: forecast.py.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from skysense_jax.plan import hlo

# Bytes that a device sends in a group of g, per byte of its operand (ring algorithms, which are optimal in bytes).
_SENT = {
    "all-gather": lambda g: float(g - 1),
    "all-reduce": lambda g: 2 * (g - 1) / g,
    "reduce-scatter": lambda g: (g - 1) / g,
    "all-to-all": lambda g: (g - 1) / g,
    "ragged-all-to-all": lambda g: (g - 1) / g,
    "collective-permute": lambda g: 1.0,
    "collective-broadcast": lambda g: 1.0,
}
_SLICES = ("dynamic-slice", "slice", "gather")
_PASSES = {"highest": 6, "high": 3}  # of a TPU over fp32 numbers, each the sum of three (two) of 16 bits
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}


@dataclasses.dataclass(frozen=True)
class Work:
    """What a device does by itself: FLOPs of matrix products and convolutions, bytes read and written in memory.

    ``scope`` is the name of the operation that it was made for, module by module; empty where it says none.
    ``passes``: how often a TPU's matrix units, for 16 bits, go over its products, a mean by FLOPs.
    """

    flops: float
    num_bytes: float
    scope: str = ""
    passes: float = 1.0


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Between groups of devices that differ along these mesh axes; the bytes that a device sends.

    ``name`` is empty if the device waits for it, else that of the ``Wait`` that ends it.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    bytes_sent: float
    name: str = ""


@dataclasses.dataclass(frozen=True)
class Wait:
    """Until the exchange of this name has ended."""

    name: str


@dataclasses.dataclass(frozen=True)
class Loop:
    """Events that run ``times`` times."""

    times: int
    body: tuple["Event", ...]


Event = Work | Exchange | Wait | Loop


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of exchange over one set of mesh axes: how often in a run, and the bytes that a device sends."""

    kind: str
    axes: tuple[str, ...]
    group: int
    count: int
    bytes_sent: float


@dataclasses.dataclass(frozen=True)
class Totals:
    """Of one run on one device: FLOPs of its instructions, bytes read and written, what it sends, largest first."""

    flops: float
    memory_bytes: float
    collectives: tuple[Collective, ...]


def read(text: str, mesh_shape: Mapping[str, int]) -> tuple[Event, ...]:
    """The events of the program of this HLO text; ``mesh_shape`` names its devices, in order, by mesh axes.

    Raises:
      ValueError: the text is no HLO, or a loop does not say how often it runs.
    """
    program = hlo.parse(text)
    return tuple(_events(program, program.entry, mesh_shape))


def totals(events: Sequence[Event]) -> Totals:
    """All of a run."""
    flops, memory, sent = 0.0, 0.0, {}
    for event, times in flatten(events):
        if isinstance(event, Work):
            flops, memory = flops + times * event.flops, memory + times * event.num_bytes
        elif isinstance(event, Exchange):
            key = event.kind, event.axes, event.group
            count, total = sent.get(key, (0, 0.0))
            sent[key] = count + times, total + times * event.bytes_sent
    collectives = [Collective(*key, *value) for key, value in sent.items()]
    return Totals(flops, memory, tuple(sorted(collectives, key=lambda c: -c.bytes_sent)))


def flatten(events: Sequence[Event], times: int = 1) -> Iterator[tuple[Work | Exchange | Wait, int]]:
    """Each event outside and inside loops, with how often it happens."""
    for event in events:
        if isinstance(event, Loop):
            yield from flatten(event.body, times * event.times)
        else:
            yield event, times


def play(
    events: Sequence[Event], work_seconds: Callable[[Work], float], exchange_seconds: Callable[[Exchange], float]
) -> tuple[float, float]:
    """Seconds that a device works and seconds that it waits for exchanges, which go one after the other."""
    working, waiting, free, ends = 0.0, 0.0, 0.0, {}
    for event in events:
        now = working + waiting
        if isinstance(event, Work):
            working += work_seconds(event)
        elif isinstance(event, Exchange):
            free = max(free, now) + exchange_seconds(event)
            if event.name:
                ends[event.name] = free
            else:
                waiting += free - now
        elif isinstance(event, Wait):
            waiting += max(ends.pop(event.name, now) - now, 0.0)  # begun before a loop: no wait is known
        else:
            works, waits = play(event.body, work_seconds, exchange_seconds)
            working, waiting = working + event.times * works, waiting + event.times * waits
    return working, waiting


def widen(events: Sequence[Event], axis: str, times: int) -> tuple[Event, ...]:
    """The events if ``times`` as many devices lay along a mesh axis, each with the work it has.

    What is exchanged stays, in larger groups; so do samples of a device. An axis of one device has no exchanges.
    """
    wider = []
    for event in events:
        if isinstance(event, Loop):
            event = Loop(event.times, widen(event.body, axis, times))
        elif isinstance(event, Exchange) and axis in event.axes and event.kind != "collective-permute":
            group = event.group * times
            sent = event.bytes_sent * (1 - 1 / group) / (1 - 1 / event.group)
            event = dataclasses.replace(event, group=group, bytes_sent=sent)
        wider.append(event)
    return tuple(wider)


def _events(program: hlo.Text, name: str, mesh_shape: Mapping[str, int]) -> Iterator[Event]:
    """Of one computation, calls in their places."""
    computation = program.computations[name]
    for i in computation.values():
        inside = [(e, its) for e, its in program.within(i) if _kind(e.op) in _SENT]
        if i.op == "while":
            yield Loop(program.trips(i), tuple(_events(program, i.called[0], mesh_shape)))
        elif i.op == "call":
            for called in i.called:
                yield from _events(program, called, mesh_shape)
        elif i.op == "conditional":  # one of its branches runs: the dearest
            branches = [tuple(_events(program, called, mesh_shape)) for called in i.called]
            yield from max(branches, key=lambda events: (totals(events).flops, totals(events).memory_bytes))
        elif _kind(i.op) in _SENT:
            yield from _exchange(i, computation, mesh_shape, i.name if i.op.endswith("-start") else "")
        elif i.op == "async-start" and inside:
            for exchange, its in inside:
                yield from _exchange(exchange, its, mesh_shape, i.name)
        elif i.op.endswith("-done"):
            if (start := _start(i, computation)) and _group(start, program, mesh_shape) > 1:
                yield Wait(start.name)
        else:
            begins, ends = _ends(i)
            for exchange, its in inside if begins else ():
                yield from _exchange(exchange, its, mesh_shape, _channel(exchange))
            flops, passes = _products(i, computation, program)
            work = Work(flops, _moved(i, computation, program), i.scope, passes)
            if work.flops or work.num_bytes:
                yield work
            for exchange, _ in inside if ends else ():
                if _group(exchange, program, mesh_shape) > 1:
                    yield Wait(_channel(exchange))


def _ends(fusion: hlo.Instruction) -> tuple[bool, bool]:
    """Whether an exchange within the fusion begins and ends with it: a TPU's compiler lets one run beside several
    fusions, each of which holds it, from one that it calls so to one that it calls so."""
    if fusion.name.startswith("async-collective-"):
        return fusion.name.startswith("async-collective-start"), fusion.name.startswith("async-collective-done")
    return (alone := not any(name.startswith("async_collective_fusion") for name in fusion.called)), alone


def _kind(op: str) -> str:
    return re.sub("-start$", "", op)


def _channel(instruction: hlo.Instruction) -> str:
    match = re.search(r"channel_id=(\d+)", instruction.rest)
    return match[1] if match else instruction.name


def _start(done: hlo.Instruction, computation: hlo.Computation) -> hlo.Instruction | None:
    """The instruction that began what ``done`` ends; None for a copy, which is work."""
    start = computation.get(done.operands[0])
    while start is not None and start.op == "async-update":
        start = computation.get(start.operands[0])
    return start if start is not None and (_kind(start.op) in _SENT or start.op == "async-start") else None


def _group(instruction: hlo.Instruction, program: hlo.Text, mesh_shape: Mapping[str, int]) -> int:
    """Devices of an exchange's groups; 1 if ``instruction`` is none."""
    found = [instruction, *(inner for inner, _ in program.within(instruction))]
    exchange = next((e for e in found if _kind(e.op) in _SENT), None)
    return len(hlo.groups(exchange.rest, math.prod(mesh_shape.values()))[0]) if exchange else 1


def _exchange(
    instruction: hlo.Instruction, computation: hlo.Computation, mesh_shape: Mapping[str, int], name: str
) -> Iterator[Exchange]:
    """The exchange of an instruction, unless each device is alone in it."""
    groups = hlo.groups(instruction.rest, math.prod(mesh_shape.values()))
    if len(groups[0]) > 1:
        kind, size = _kind(instruction.op), len(groups[0])
        users = [i for i in computation.values() if instruction.name in i.operands]
        if kind == "all-reduce" and users and all(user.op == "dynamic-slice" for user in users):
            kind = "reduce-scatter"  # a TPU's compiler writes it so, in one fusion
        num_bytes = sum(_num_bytes(computation, operand) for operand in instruction.operands)
        yield Exchange(kind, hlo.mesh_axes(groups, mesh_shape), size, num_bytes * _SENT[kind](size), name)


def _num_bytes(computation: hlo.Computation, name: str) -> float:
    return computation[name].num_bytes if name in computation else 0.0


def _main_bytes(computation: hlo.Computation, name: str) -> float:
    return computation[name].main_bytes if name in computation else 0.0


def _products(instruction: hlo.Instruction, computation: hlo.Computation, program: hlo.Text) -> tuple[float, float]:
    """FLOPs of an instruction's matrix products and convolutions, a fusion's inside it (a multiply-add is two), and how
    often a TPU's units go over them."""
    found = program.within(instruction) if instruction.op == "fusion" else ((instruction, computation),)
    products = [(_product_flops(i, c), _passes(i)) for i, c in found]
    flops = sum((flops for flops, _ in products), 0.0)
    return flops, sum(flops * passes for flops, passes in products) / flops if flops else 1.0


def _passes(product: hlo.Instruction) -> int:
    match = re.search(r"operand_precision=\{(\w+),(\w+)\}", product.rest)
    return max((_PASSES.get(precision, 1) for precision in match.groups()), default=1) if match else 1


def _product_flops(i: hlo.Instruction, computation: hlo.Computation) -> float:
    operands = [computation[name].sizes for name in i.operands if name in computation]
    if i.op == "dot" or (i.op == "custom-call" and 'custom_call_target="__cublas' in i.rest):
        contracted = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d,"]*)[}\]]', i.rest)
        return 2.0 * math.prod(i.sizes) * math.prod(operands[0][int(n)] for n in re.findall(r"\d+", contracted[1]))
    if i.op == "custom-call" and 'custom_call_target="__cudnn$fmha' in i.rest:  # attention of B N A K and B M A K
        products = 5 if 'Backward"' in i.rest else 2
        return products * 2.0 * math.prod(operands[0]) * operands[1][1]
    if i.op == "custom-call" and (said := re.search(r'"cost_estimate":\{"flops":"(\d+)"', i.rest)):  # a kernel of ours
        return float(said[1])
    if i.op == "convolution":
        return _convolution_flops(i, operands)
    return 0.0


def _convolution_flops(i: hlo.Instruction, operands: Sequence[tuple[int, ...]]) -> float:
    """Two for each place of the kernel that lies on the image: TPUs write products and batches of them as convolutions
    of which most places lie outside, in the padding or between dilated pixels."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest)
    window = re.search(r"window=\{([^}]*)\}", i.rest)
    fields = dict(re.findall(r"(\w+)=([\dx_\-]+)", window[1] if window else ""))
    image, kernel, out = (dict(zip(names, sizes)) for names, sizes in zip(labels.groups(), (*operands, i.sizes)))
    flops = 2.0 * out["b"] * out["f"] * kernel["i"]
    for axis in range(len(i.sizes) - 2):
        of = lambda field, default, axis=axis: fields.get(field, "x".join([default] * 9)).split("x")[axis]  # noqa: E731
        stride, spread, dilation = (int(of(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
        low = int(of("pad", "0_0").split("_")[0])
        pixels, places = np.arange(out[str(axis)]) * stride - low, np.arange(kernel[str(axis)]) * dilation
        at = pixels[:, None] + places
        flops *= int(((at >= 0) & (at <= (image[str(axis)] - 1) * spread) & (at % spread == 0)).sum())
    return flops


def _moved(instruction: hlo.Instruction, computation: hlo.Computation, program: hlo.Text) -> float:
    """Bytes read and written by an instruction; of a slice that is read or replaced, the slice."""
    op, operands = instruction.op, [_main_bytes(computation, name) for name in instruction.operands]
    if op in _FREE or op in ("async-start", "async-update"):
        return 0.0
    if op in _SLICES:
        return instruction.main_bytes + (instruction.num_bytes if operands[0] else 0.0)
    if op in ("dynamic-update-slice", "scatter"):
        return 2 * sum(operands[1 if op == "dynamic-update-slice" else 2 :])
    if op == "copy-start":  # its result names source and copy
        return instruction.main_bytes
    if op != "fusion":
        return instruction.main_bytes + sum(operands)
    inside = program.computations[instruction.called[0]]
    # buffers of an exchange that runs beside it are only handed on
    handed_on = {"parameter", "custom-call", *_SENT} if any(i.op in _SENT for i in inside.values()) else set()
    moved = _written(next(i for i in inside.values() if i.root), inside, handed_on)
    parameters = [i for i in inside.values() if i.op == "parameter" and i.main_bytes]
    return moved + sum(_read(parameter, inside, program, handed_on) for parameter in parameters)


def _read(array: hlo.Instruction, inside: hlo.Computation, program: hlo.Text, handed_on: set[str]) -> float:
    """Bytes that a fusion reads of an array of it: all, or what its slices take, in fusions inside it too."""
    users = [i for i in inside.values() if array.name in i.operands]
    if handed_on:
        users = [i for i in users if i.op not in handed_on and i.op != "tuple"]
        if not users:
            return 0.0
    if not users:
        return array.main_bytes
    total = 0.0
    for user in users:
        first = user.operands[0] == array.name
        if user.op in _SLICES and first:
            total += user.num_bytes
        elif user.op == "dynamic-update-slice" and first:
            total += _num_bytes(inside, user.operands[1])
        elif user.op == "fusion":
            own = program.computations[user.called[0]]
            of_places = {int(i.inside): i for i in own.values() if i.op == "parameter"}
            places = [place for place, name in enumerate(user.operands) if name == array.name]
            total += sum(_read(of_places[place], own, program, set()) for place in places)
        else:
            return array.main_bytes
    return min(total, array.main_bytes)


def _written(root: hlo.Instruction, inside: hlo.Computation, handed_on: set[str]) -> float:
    """Bytes that a fusion writes; of an array that it replaces a slice of, the slice."""
    if root.op == "tuple":
        return sum(_written(inside[name], inside, handed_on) for name in root.operands)
    if root.op in handed_on:
        return 0.0
    if root.op == "dynamic-update-slice" and root.main_bytes:
        return _num_bytes(inside, root.operands[1])
    return root.main_bytes
