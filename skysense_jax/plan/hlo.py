"""The text of a compiled program, taken apart: computations of instructions in the order in which they run.

Text is what is left when the compiler's own cost analysis counts loop bodies once (TPU) or is empty (GPU).
Next: program.py, what the instructions move, multiply and send.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

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
_BYTES |= {"token": 0, "opaque": 0, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
_BYTES |= dict.fromkeys(("f8e4m3fn", "f8e5m2", "f8e4m3", "f8e4m3b11fnuz", "f8e4m3fnuz", "f8e5m2fnuz"), 1)
_SHAPE = re.compile(r"([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\](\{[^{}]*\})?")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+?) ([\w\-]+)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_CALLED = re.compile(r"(body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
# 'axis_0' or a part of it: 'axis_0':(sizes before)size
_MESH_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of the text.

    Attributes:
      sizes: of the result; of a tuple, those of its first array.
      num_bytes: of the result, of a tuple's members together.
      main_bytes: of it, in the chip's main memory: a TPU's compiler places small arrays on the core, S(1).
      operands: names.
      inside: of the parenthesis, as it stands.
      rest: the attributes behind it.
      root: whether it is its computation's result.
    """

    name: str
    op: str
    sizes: tuple[int, ...]
    num_bytes: float
    main_bytes: float
    operands: tuple[str, ...]
    inside: str
    rest: str
    root: bool

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it runs, a loop's condition left out."""
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.rest)
        names = [name for _, name in _CALLED.findall(self.rest)]
        return tuple(names + re.findall(r"%?([\w.\-]+)", branches[1] if branches else ""))

    @property
    def scope(self) -> str:
        """The name of the operation that it was made for; empty if it says none."""
        named = re.search(r'op_name="([^"]*)"', self.rest)
        return named[1] if named else ""


Computation = Mapping[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Text:
    """All computations by name, instructions in order, and the name of the one that runs."""

    computations: Mapping[str, Computation]
    entry: str

    def within(self, instruction: Instruction) -> Iterator[tuple[Instruction, Computation]]:
        """A fusion's instructions, those of fusions inside it too, each with the computation that it stands in."""
        for name in instruction.called if instruction.op in ("fusion", "async-start") else ():
            for inner in self.computations[name].values():
                yield inner, self.computations[name]
                yield from self.within(inner)

    def trips(self, loop: Instruction) -> int:
        """How often a loop runs: as the compiler says, else the one number that its condition compares a counter with,
        over what its body adds to that counter.

        Raises:
          ValueError: it does not say.
        """
        if stated := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(stated[1])
        condition = self.computations[re.search(r"condition=%?([\w.\-]+)", loop.rest)[1]]
        bounds = self._whole_numbers(condition)
        if len(bounds) != 1:
            raise ValueError(f"loop {loop.name} does not say how often it runs")
        places = {i.rest for i in condition.values() if i.op == "get-tuple-element"}
        steps = {1}
        if len(places) == 1 and (place := re.search(r"index=(\d+)", places.pop())):
            body = self.computations[loop.called[0]]
            root = next(i for i in body.values() if i.root)
            counter = body.get(root.operands[int(place[1])]) if root.op == "tuple" else None
            if counter is not None and counter.op in ("add", "fusion"):
                added = {name: body[name] for name in counter.operands if name in body}
                steps = self._whole_numbers(added | {counter.name: counter}) or steps
        if len(steps) != 1:
            raise ValueError(f"loop {loop.name} does not say by how much it counts")
        return math.ceil(bounds.pop() / steps.pop())

    def _whole_numbers(self, computation: Computation) -> set[int]:
        """Constants of a computation and of the fusions in it."""
        every = [*computation.values(), *(inner for i in computation.values() for inner, _ in self.within(i))]
        return {int(i.inside) for i in every if i.op == "constant" and re.fullmatch(r"\d+", i.inside)}


def parse(text: str) -> Text:
    """Computations of a compiled module's text.

    Raises:
      ValueError: it is no HLO.
    """
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = computations.setdefault(match[2], {})
            entry = match[2] if match[1] else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            inside, rest = _split(match[5])
            arrays = [
                (dtype, tuple(int(n) for n in sizes.split(",") if n), layout)
                for dtype, sizes, layout in _SHAPE.findall(match[3])
            ]
            if unknown := {dtype for dtype, _, _ in arrays} - _BYTES.keys():
                raise ValueError(f"{line.strip()[:200]}: unknown types {sorted(unknown)}; known: {sorted(_BYTES)}")
            num_bytes = [_BYTES[dtype] * math.prod(sizes) for dtype, sizes, _ in arrays]
            current[match[2]] = Instruction(
                name=match[2],
                op=match[4],
                sizes=arrays[0][1] if arrays else (),
                num_bytes=float(sum(num_bytes)),
                main_bytes=float(sum(n for n, (*_, layout) in zip(num_bytes, arrays) if "S(1)" not in layout)),
                operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
                inside=inside,
                rest=rest,
                root=bool(match[1]),
            )
    if entry is None:
        raise ValueError("no ENTRY computation; wanted the text of a compiled HLO module")
    return Text(computations, entry)


def _split(text: str) -> tuple[str, str]:
    """What stands inside the parenthesis that ``text`` begins in, and what follows it."""
    depth = 1
    for index, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[:index], text[index + 1 :]
    return text, ""


def groups(rest: str, num_devices: int) -> list[list[int]]:
    """Which devices talk to each other in an exchange with these attributes, by their place in the mesh."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?) \{([^}]*)\}", rest):
        return _mesh_groups(match[1], _order(match[2], num_devices), match[3])
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\](<=\[[\d,]+\](?:T\([\d,]+\))?)", rest):
        return _order(match[3], num_devices).reshape(int(match[1]), int(match[2])).tolist()
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", rest):
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d, ]+)\}", match[1])]
    if match := re.search(r"(?:replica_groups|source_target_pairs)=(?!\{\})\S+", rest):
        raise ValueError(f"{match[0]}: a notation of groups that is not known here; wanted that of jaxlib 0.10 to 0.12")
    return [list(range(num_devices))]


def _order(text: str, num_devices: int) -> np.ndarray:
    """The devices in the order of ``[sizes]T(axes)``, which turns an array of them; without it as they are."""
    ids, match = np.arange(num_devices), re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?\)?$", text)
    if match is None:
        return ids
    ids = ids.reshape([int(n) for n in match[1].split(",")])
    return (ids.transpose([int(n) for n in match[2].split(",")]) if match[2] else ids).ravel()


def _mesh_groups(mesh: str, order: np.ndarray, grouped: str) -> list[list[int]]:
    """Groups along some axes, or parts of axes, of the compiler's own mesh: 'a'=2,'b'=4 and 'a','b':(2)2."""
    parts = {name: [] for name in re.findall(r"'([^']+)'=", mesh)}
    for name, before, size in _MESH_AXIS.findall(grouped):
        parts[name].append((int(before or 1), int(size or 0)))
    sizes, together = [], []
    for name, whole in re.findall(r"'([^']+)'=(\d+)", mesh):
        done = 1
        for before, size in sorted(parts[name]):
            size = size or int(whole)
            sizes.append(before // done)
            together.append(len(sizes))
            sizes.append(size)
            done = before * size
        sizes.append(int(whole) // done)
    alone = [axis for axis in range(len(sizes)) if axis not in together]
    group = math.prod(sizes[axis] for axis in together)
    return order.reshape(sizes).transpose(alone + together).reshape(-1, group).tolist()


def mesh_axes(groups: Sequence[Sequence[int]], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ."""
    sizes, different = tuple(mesh_shape.values()), set()
    for group in groups:
        places = np.array(np.unravel_index(list(group), sizes))
        different |= {axis for axis, place in zip(mesh_shape, places) if len(set(place.tolist())) > 1}
    return tuple(axis for axis in mesh_shape if axis in different)
