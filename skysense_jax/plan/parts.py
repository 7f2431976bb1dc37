"""Which parts of a step its seconds go to, by the names that instructions carry: modules, and scopes of train_step.py.

What a compiler made for no named operation (copies, padding) is a part of its own. Next: __main__.py, which prints it.
"""

import dataclasses
from collections.abc import Callable, Sequence

from skysense_jax.plan import program

# The first whose pattern a name holds; in this order they are printed.
_PARTS = (
    ("tokenizers", ("/tokenizer_",)),
    ("stage 1", ("/stage1_",)),
    ("stage 2", ("/stage2_",)),
    ("stage 3, mixtures", ("/stage3_experts",)),
    ("stage 3", ("/stage3/",)),
    ("stage 4, mixtures", ("/stage4_experts",)),
    ("stage 4", ("/stage4/",)),
    ("merging", ("/merging_",)),
    ("between blocks", ("/backbone/",)),
    ("fusion", ("/fusion/",)),
    ("queries", ("/queries/",)),
    ("heads", ("/heads_", "/text/")),
    ("losses and targets", ("/teacher", "/frozen_teacher", "/student")),
    ("inputs", ("/inputs",)),
    ("update and average", ("jit(train_step)",)),
    ("no name", ("",)),
)
NAMES = tuple(name for name, _ in _PARTS)
_PHASES = (
    ("teacher", ("/teacher",)),
    ("frozen teacher", ("/frozen_teacher",)),
    ("student, recomputed", ("/rematted_computation",)),
    ("student, backward", ("/student/transpose(",)),
    ("student, forward", ("/student",)),
    ("outside both", ("",)),
)


@dataclasses.dataclass(frozen=True)
class Part:
    """Work of one name, of one device and step: FLOPs, bytes of memory traffic, seconds by instruction."""

    name: str
    flops: float
    num_bytes: float
    seconds: float


def by_part(events: Sequence[program.Event], work_seconds: Callable[[program.Work], float]) -> tuple[Part, ...]:
    """The parts of the network and of the step around it, in the order of a step; those without work left out."""
    return _grouped(events, work_seconds, _PARTS)


def by_phase(events: Sequence[program.Event], work_seconds: Callable[[program.Work], float]) -> tuple[Part, ...]:
    """Teacher, the student's passes, and the rest."""
    return _grouped(events, work_seconds, _PHASES)


def _grouped(events, work_seconds, named):
    sums = {name: [0.0, 0.0, 0.0] for name, _ in named}
    for event, times in program.flatten(events):
        if isinstance(event, program.Work):
            name = next(name for name, patterns in named if any(pattern in event.scope for pattern in patterns))
            for i, value in enumerate((event.flops, event.num_bytes, work_seconds(event))):
                sums[name][i] += times * value
    return tuple(Part(name, *values) for name, values in sums.items() if any(values))
