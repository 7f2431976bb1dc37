"""Where a step's seconds go: names against parts and passes, and a compiled step against its own totals."""

import pytest

from skysense_jax.plan import parts, program

_STUDENT = "jit(train_step)/student/"
_STAGE3 = "transpose(jvp(SkySense.encode))/backbone/backbone._run/backbone._global_stage/backbone._scan/while/body"


@pytest.mark.parametrize(
    ("scope", "part", "phase"),
    [
        ("jit(train_step)/teacher/SkySense.encode/backbone/tokenizer_hr/norm/mul", "tokenizers", "teacher"),
        (_STUDENT + "jvp(SkySense.encode)/backbone/stage1_0.body/stage1_0/mlp/dot", "stage 1", "student, forward"),
        (_STUDENT + f"{_STAGE3}/closed_call/checkpoint/stage3.body/stage3/mlp/dot", "stage 3", "student, backward"),
        (
            _STUDENT + f"{_STAGE3}/checkpoint/rematted_computation/stage3_experts.body/stage3_experts/dot",
            "stage 3, mixtures",
            "student, recomputed",
        ),
        (_STUDENT + f"{_STAGE3}/dynamic_slice", "between blocks", "student, backward"),
        (_STUDENT + "jvp(SkySense.project)/heads_query/hidden1/dot_general", "heads", "student, forward"),
        (_STUDENT + "transpose(jvp())/mul", "losses and targets", "student, backward"),
        ("jit(train_step)/teacher/while/body/reduce_sum", "losses and targets", "teacher"),
        ("jit(train_step)/add", "update and average", "outside both"),
        ("", "no name", "outside both"),
    ],
)
def test_name_belongs_to_one_part_and_one_pass(scope, part, phase):
    events = (program.Loop(3, (program.Work(2.0, 5.0, scope),)),)
    seconds = lambda work: work.num_bytes  # noqa: E731
    assert parts.by_part(events, seconds) == (parts.Part(part, 6.0, 15.0, 15.0),)
    assert parts.by_phase(events, seconds) == (parts.Part(phase, 6.0, 15.0, 15.0),)
