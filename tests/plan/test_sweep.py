"""Which candidates a sweep tries, what it says of them and which one it recommends; nothing is compiled here."""

import types

import jax
import pytest
from micro import micro_config

from skysense_jax import targets, train_state
from skysense_jax.chips import GIB
from skysense_jax.plan import __main__ as command
from skysense_jax.plan import forecast, program, sweep


def made_up(seconds, gib, target):
    """A forecast of so many seconds and so much memory."""
    work = program.Work(0.0, seconds * target.chip.memory_bandwidth)
    shape = dict(data=1, fsdp=4, tensor=1, expert=1)
    return forecast.Forecast(1, 1, int(gib * GIB), 1.0, 1.0, (work,), shape)


def test_candidates_shard_over_a_slice_a_host_and_experts():
    target = targets.parse("v5p:64")
    found = list(sweep.candidates(target, num_experts=8, batch_size=1024))
    meshes = [tuple(c.overrides[f"mesh.{axis}"] for axis in ("data", "fsdp", "expert")) for c in found[::3]]
    assert meshes == [(1, 64, 1), (1, 8, 8), (4, 16, 1), (4, 2, 8), (16, 4, 1), (16, 1, 4)]
    assert [c.overrides["efficiency.remat"] for c in found[:3]] == ["none", "matmuls", "blocks"]
    assert {c.overrides["parts.logits"] for c in found} == {16}
    dense = list(sweep.candidates(targets.parse("h200:1"), num_experts=0, batch_size=64))
    assert len(dense) == 3
    assert str(dense[0]) == (
        "--config.mesh.data=1 --config.mesh.fsdp=1 --config.mesh.expert=1 "
        "--config.efficiency.remat=none --config.parts.logits=64 --config.parts.microbatches=1"
    )
    parts, tried = dense[0], []
    while parts:
        tried.append((parts.overrides["parts.microbatches"], parts.overrides["parts.logits"]))
        parts = parts.in_more_parts()
    assert tried == [(1, 64), (2, 32), (4, 16), (8, 8), (16, 4), (32, 2), (64, 1)]
    six = sweep.Candidate({"parts.logits": 6, "parts.microbatches": 1}).in_more_parts()
    assert six.in_more_parts() == sweep.Candidate({"parts.logits": 1, "parts.microbatches": 6})


def test_best_is_the_fastest_that_fits():
    target = targets.parse("v5e:4")  # 15.75 GiB
    of = lambda seconds, gib: sweep.Outcome(sweep.Candidate({"n": gib}), made_up(seconds, float(gib), target))  # noqa: E731
    failed = sweep.Outcome(sweep.Candidate({}), None, "does not fit")
    outcomes = [of(3.0, 4), of(1.0, 15), of(2.0, 13), failed]
    assert sweep.best(outcomes, target, 0.85) is outcomes[2]
    assert sweep.best([outcomes[1], failed], target, 0.85) is None
    assert outcomes[2].row(target) == "--config.n=13: 83% of memory, 2.000 s a step"


def test_command_tries_all_and_recommends_one_or_says_why_none_fits(monkeypatch):
    config, target, tried = micro_config(), targets.parse("v5e:4"), []
    config.objective.weights.koleo = 0.0  # which compares all samples, and so wants one part

    def compile_step(config, mesh, say, quick):
        tried.append((config.efficiency.remat, config.parts.logits, config.parts.microbatches))
        if config.efficiency.remat == "none":
            raise ValueError("does not fit: 20 GiB")
        return made_up(2.0 if config.efficiency.remat == "blocks" else 1.0, 10.0, target)

    monkeypatch.setattr(forecast, "make_mesh", lambda target, sizes: types.SimpleNamespace(shape=sizes))
    monkeypatch.setattr(forecast, "compile_step", compile_step)
    text = command.sweep(config, target)
    of_mesh = [("none", 2, 1), ("none", 1, 2), ("matmuls", 2, 1), ("blocks", 2, 1)]  # what does not fit, in more parts
    assert tried == of_mesh * 2  # with and without the axis of the two experts
    assert config.efficiency.remat == "none"  # the caller's stays
    assert "remat=none --config.parts.logits=2 --config.parts.microbatches=1: does not fit: 20 GiB" in text
    assert text.splitlines()[-1].startswith("recommended: --config.mesh.data=1 --config.mesh.fsdp=4")
    assert "remat=matmuls" in text.splitlines()[-1]
    config.objective.weights.koleo = 0.1
    tried.clear()
    command.sweep(config, target)
    assert [parts for _, *parts in tried] == [[2, 1]] * 6  # what is refused for another reason is not tried again
    config.objective.weights.koleo = 0.0
    monkeypatch.setattr(command, "_FULL", 0.5)
    with pytest.raises(ValueError, match=r"nothing fits in 50% of a device's memory; try config.parts.logits"):
        command.sweep(config, target)


def test_step_that_the_compiler_cannot_fit_is_an_error_of_one_line(monkeypatch):
    def fail(options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory (143.56G), exceeds 15.75G\npages")

    lowered = types.SimpleNamespace(compile=fail)
    step = types.SimpleNamespace(trace=lambda *_: types.SimpleNamespace(lower=lambda: lowered))
    monkeypatch.setattr(train_state, "jit_step", lambda *_: step)
    mesh = forecast.sharding.make_mesh(1, 8, 1, 1)
    with pytest.raises(ValueError, match=r"does not fit: RESOURCE_EXHAUSTED: Ran out of memory \(143.56G\).*15.75G$"):
        forecast.compile_step(micro_config(), mesh)
