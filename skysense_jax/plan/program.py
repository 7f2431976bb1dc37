"""What a compiled program moves through memory and sends to other chips in one run, read from its HLO text.

Loops count as often as they run. Per device: every device runs the same program. Reading text is what is left when
the compiler's own cost analysis counts loop bodies once (TPU) or is empty (GPU). Next: forecast.py.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

_BYTES = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "f16": 2,
    "bf16": 2,
    "s32": 4,
    "u32": 4,
}
_BYTES |= {"f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
_BYTES |= dict.fromkeys(("f8e4m3fn", "f8e5m2", "f8e4m3", "f8e4m3b11fnuz", "f8e4m3fnuz", "f8e5m2fnuz"), 1)
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
_CALLED = r"(body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)"
_SLICES = ("dynamic-slice", "slice", "gather")
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
_SHAPE = re.compile(r"([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\](\{[^{}]*\})?")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+?) ([\w\-]+)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of exchange over one set of mesh axes: how often in a run, and the bytes that a device sends."""

    kind: str
    axes: tuple[str, ...]
    group: int
    count: int
    bytes_sent: float


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Of one run on one device: bytes read and written in memory, and what it sends, largest first."""

    memory_bytes: float
    collectives: tuple[Collective, ...]


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    op: str
    num_bytes: float  # of the result
    main_bytes: float  # of it, in the chip's main memory: a TPU's compiler places small arrays on the core, S(1)
    operands: tuple[str, ...]
    inside: str  # of the parenthesis, as it stands
    rest: str  # attributes
    root: bool


def traffic(text: str, mesh_shape: Mapping[str, int]) -> Traffic:
    """What the program of this HLO text moves and sends; ``mesh_shape`` names its devices, in order, by mesh axes.

    Raises:
      ValueError: the text is no HLO, or a loop does not say how often it runs.
    """
    computations, entry = _parse(text)
    memory, sent = 0.0, {}
    for name, times in _runs(computations, entry).items():
        for instruction in computations[name].values():
            kind = re.sub("-start$", "", instruction.op)
            if kind in _SENT:
                groups = _groups(instruction.rest, math.prod(mesh_shape.values()))
                axes, size = _axes(groups, mesh_shape), len(groups[0])
                num_bytes = sum(_num_bytes(computations[name], operand) for operand in instruction.operands)
                count, total = sent.get((kind, axes, size), (0, 0.0))
                sent[kind, axes, size] = count + times, total + times * num_bytes * _SENT[kind](size)
            memory += times * _moved(instruction, computations[name], computations)
    collectives = [Collective(*key, *value) for key, value in sent.items() if key[2] > 1]
    return Traffic(memory, tuple(sorted(collectives, key=lambda c: -c.bytes_sent)))


def _parse(text: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = computations.setdefault(match[2], {})
            entry = match[2] if match[1] else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            inside, rest = _split(match[5])
            operands = tuple(re.findall(r"%([\w.\-]+)", inside))
            sizes, root = (_shape_bytes(match[3]), _shape_bytes(match[3], main=True)), bool(match[1])
            current[match[2]] = _Instruction(match[2], match[4], *sizes, operands, inside, rest, root)
    if entry is None:
        raise ValueError("no ENTRY computation; wanted the text of a compiled HLO module")
    return computations, entry


def _split(text: str) -> tuple[str, str]:
    """What stands inside the parenthesis that ``text`` begins in, and what follows it."""
    depth = 1
    for index, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[:index], text[index + 1 :]
    return text, ""


def _shape_bytes(text: str, *, main: bool = False) -> float:
    """Bytes of a type, of a tuple's members together; ``main``: only of what lies in main memory."""
    total = 0.0
    for dtype, sizes, layout in _SHAPE.findall(text):
        if not (main and "S(1)" in layout):
            total += _BYTES.get(dtype, 0) * math.prod(int(n) for n in sizes.split(",") if n)
    return total


def _num_bytes(computation: Mapping[str, _Instruction], name: str) -> float:
    return computation[name].num_bytes if name in computation else 0.0


def _main_bytes(computation: Mapping[str, _Instruction], name: str) -> float:
    return computation[name].main_bytes if name in computation else 0.0


def _runs(computations: Mapping[str, Mapping[str, _Instruction]], entry: str) -> dict[str, int]:
    """How often each computation runs as a program of its own; those inside fusions are not among them."""
    runs, waiting = {}, [(entry, 1)]
    while waiting:
        name, times = waiting.pop()
        runs[name] = runs.get(name, 0) + times
        for instruction in computations[name].values():
            called = re.findall(
                r"(body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)", instruction.rest
            )
            branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
            if instruction.op == "while":
                waiting.append((dict(called)["body"], times * _trips(instruction, computations)))
            elif instruction.op in ("call", "conditional", "async-start"):
                names = [target for _, target in called] + re.findall(r"%([\w.\-]+)", branches[1] if branches else "")
                waiting += [(target, times) for target in names]
    return runs


def _trips(loop: _Instruction, computations: Mapping[str, Mapping[str, _Instruction]]) -> int:
    """How often a loop runs: as the compiler says, else the one number that its condition compares a counter with."""
    if stated := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(stated[1])
    waiting, bounds = [re.search(r"condition=%?([\w.\-]+)", loop.rest)[1]], set()
    while waiting:
        for instruction in computations[waiting.pop()].values():
            waiting += re.findall(r"calls=%?([\w.\-]+)", instruction.rest)
            if instruction.op == "constant" and re.fullmatch(r"\d+", instruction.inside):
                bounds.add(int(instruction.inside))
    if len(bounds) != 1:
        raise ValueError(f"loop {loop.name} does not say how often it runs")
    return bounds.pop()


def _moved(
    instruction: _Instruction,
    computation: Mapping[str, _Instruction],
    computations: Mapping[str, Mapping[str, _Instruction]],
) -> float:
    """Bytes read and written by an instruction; of a slice that is read or replaced, the slice."""
    op, operands = instruction.op, [_main_bytes(computation, name) for name in instruction.operands]
    if op in _FREE or op in ("while", "call", "conditional", "async-start") or op.endswith("-done"):
        return 0.0
    if op in _SLICES:
        return instruction.main_bytes + (instruction.num_bytes if operands[0] else 0.0)
    if op in ("dynamic-update-slice", "scatter"):
        return 2 * sum(operands[1 if op == "dynamic-update-slice" else 2 :])
    if op != "fusion":
        return instruction.main_bytes + sum(operands)
    inside = computations[re.search(r"calls=%?([\w.\-]+)", instruction.rest)[1]]
    moved = _written(next(i for i in inside.values() if i.root), inside)
    for parameter in (i for i in inside.values() if i.op == "parameter" and i.main_bytes):
        users = [i for i in inside.values() if parameter.name in i.operands]
        first = all(user.operands[0] == parameter.name for user in users)
        if users and first and all(user.op in _SLICES for user in users):
            moved += sum(user.num_bytes for user in users)
        elif users and first and all(user.op == "dynamic-update-slice" for user in users):
            moved += sum(_num_bytes(inside, user.operands[1]) for user in users)
        else:
            moved += parameter.main_bytes
    return moved


def _written(root: _Instruction, inside: Mapping[str, _Instruction]) -> float:
    """Bytes that a fusion writes; of an array that it replaces a slice of, the slice."""
    if root.op == "tuple":
        return sum(_written(inside[name], inside) for name in root.operands)
    if root.op == "dynamic-update-slice" and root.main_bytes:
        return _num_bytes(inside, root.operands[1])
    return root.main_bytes


def _groups(rest: str, num_devices: int) -> list[list[int]]:
    """Which devices talk to each other, by their place in the mesh."""
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        ids = np.arange(num_devices).reshape([int(n) for n in match[3].split(",")])
        ids = ids.transpose([int(n) for n in match[4].split(",")]) if match[4] else ids
        return ids.reshape(int(match[1]), int(match[2])).tolist()
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", rest):
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d, ]+)\}", match[1])]
    return [list(range(num_devices))]


def _axes(groups: Sequence[Sequence[int]], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ."""
    sizes, different = tuple(mesh_shape.values()), set()
    for group in groups:
        places = np.array(np.unravel_index(list(group), sizes))
        different |= {axis for axis, place in zip(mesh_shape, places) if len(set(place.tolist())) > 1}
    return tuple(axis for axis in mesh_shape if axis in different)
