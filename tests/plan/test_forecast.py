"""The step compiled for chips that are not here, by their own compiler, and what the command says of it."""

import importlib.metadata
import importlib.util
import pathlib
import re

import jax
import pytest
from micro import mono_config

from skysense_jax import assembly, sharding, targets, train_state
from skysense_jax.plan import __main__ as command
from skysense_jax.plan import forecast, parts, program

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
LIBTPU = "0.0.42.1"  # of tests/golden/plan_mono_v5e_4.txt


@pytest.fixture(scope="module")
def planned():
    """The mono step for four v5e chips."""
    config, target = mono_config(), targets.parse("v5e:4")
    config.mesh.update(data=2, fsdp=2)
    mesh = forecast.make_mesh(target, dict(config.mesh))
    return config, target, mesh, forecast.compile_step(config, mesh, quick=True)


def test_state_of_a_device_is_its_share_of_the_arrays(planned):
    config, _, mesh, found = planned
    run = assembly.assemble(config)
    shapes = assembly.batch_shapes(config, run.modalities)
    boxed = train_state.boxed_state(run.network, run.optimizer, shapes)
    wanted = sum(
        leaf.dtype.itemsize * int(jax.numpy.prod(jax.numpy.array(leaf.sharding.shard_shape(leaf.shape))))
        for leaf in jax.tree.leaves(train_state.abstract_state(boxed, mesh))
    )
    wanted += sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)) // mesh.size
    # the compiler pads the last axes of small arrays to its tiles
    assert wanted <= found.state_bytes <= 8 * wanted
    assert found.state_bytes < found.peak_bytes < targets.CHIPS["v5e"].memory_bytes


def test_exchanges_of_the_step_lie_on_the_axes_of_the_mesh(planned):
    found = planned[3].totals.collectives
    assert {axis for c in found for axis in c.axes} == {"data", "fsdp"}
    assert "all-gather" in {c.kind for c in found if c.axes == ("fsdp",)}  # parameters before they are used
    assert all(c.bytes_sent > 0 and c.count > 0 for c in found)
    assert planned[3].totals.memory_bytes > planned[3].state_bytes


def test_report_says_what_does_not_depend_on_rates(planned):
    config, target, mesh, found = planned
    text = command.report(config, target, found)
    assert text.startswith("mono, batch 8, on 4 x v5e")
    assert "mesh: data 2, fsdp 2, tensor 1, expert 1" in text
    assert f"{found.flops / 1e12:.4f}" in text
    # mono's heads, which the formula leaves out, are as large as its backbone
    assert found.flops * mesh.size > assembly.batch_flops(config, assembly.assemble(config).modalities)


def test_parts_of_the_step_add_up_and_all_have_names(planned):
    _, target, _, found = planned
    seconds = lambda work: forecast.work_seconds(work, target.chip)  # noqa: E731
    for grouped in (parts.by_part, parts.by_phase):
        of_parts = grouped(found.schedule, seconds)
        assert sum(part.flops for part in of_parts) == pytest.approx(found.totals.flops)
        assert sum(part.num_bytes for part in of_parts) == pytest.approx(found.totals.memory_bytes)
        assert sum(part.seconds for part in of_parts) == pytest.approx(found.played(target)[0])
    flops = {part.name: part.flops for part in parts.by_part(found.schedule, seconds)}
    assert {"tokenizers", "stage 1", "stage 2", "stage 3", "stage 4, mixtures", "merging", "fusion"} <= set(flops)
    assert flops["no name"] < 0.01 * found.totals.flops
    passes = {part.name: part.flops for part in parts.by_phase(found.schedule, seconds)}
    assert 1.5 * passes["student, forward"] < passes["student, backward"] < 2.5 * passes["student, forward"]


def test_figures_of_a_small_plan_are_as_last_read(planned, matches_golden):
    """All of them by the compiler that made the kept text; by another what is counted before it."""
    config, target, _, found = planned
    text = command.report(config, target, found)
    if importlib.metadata.version("libtpu") == LIBTPU:
        matches_golden("plan_mono_v5e_4", text + "\n")
    traced = re.compile(r"FLOPs as traced, T +\d+\.\d+")
    assert traced.findall(text) == traced.findall((GOLDEN / "plan_mono_v5e_4.txt").read_text())


@pytest.mark.parametrize(
    ("target", "kind", "axes", "group", "seconds"),
    [
        # 8 neighbours of a host, by links; groups of 2 over the network, one on each host; a group over both hosts,
        # whose 8 members each have the network
        ("h200:16", "all-gather", ("fsdp",), 8, 1 / 450 + 7 * 1.9e-6),
        ("h200:16", "all-gather", ("data",), 2, 1 / 50 + 4e-6),
        ("h200:16", "all-reduce", ("data",), 2, 1 / 50 + 2 * 4e-6),
        ("h200:16", "all-reduce", ("data", "fsdp"), 16, 1 / 400 + 2 * (7 * 1.9e-6 + 4e-6)),
        ("h200:16", "all-to-all", ("data",), 2, 1 / 50 + 4e-6),
        ("h200:16", "all-to-all", ("data", "fsdp"), 16, 16 / 15 / 2 / 50 + 4e-6),  # half of it for the other host
        # one slice: half way around a torus of 16 chips, all axes together
        ("v5p:16", "all-gather", ("data", "fsdp"), 16, 1 / 300 + 3 * 16 ** (1 / 3) / 2 * 1e-6),
    ],
)
def test_exchange_takes_the_network_where_its_axes_leave_the_host(target, kind, axes, group, seconds):
    target, mesh_shape = targets.parse(target), dict(data=2, fsdp=8, tensor=1, expert=1)
    exchange = program.Exchange(kind, axes, group, 1e9)
    found = forecast.Forecast(1, 1, 1, 1.0, 1.0, (program.Loop(3, (exchange,)),), mesh_shape)
    assert found.exchange_seconds(exchange, target) == pytest.approx(seconds)
    assert found.network_seconds(target) == pytest.approx(3 * seconds)
    assert found.played(target) == pytest.approx((0.0, 3 * seconds))


def test_scaling_counts_larger_groups_along_data_and_no_more_work():
    target, mesh_shape = targets.parse("h200:16"), dict(data=2, fsdp=8, tensor=1, expert=1)
    within = program.Exchange("all-gather", ("fsdp",), 8, 7e9)
    between = program.Exchange("all-reduce", ("data",), 2, 1e9)  # of an operand of 1 GB
    work = program.Work(989e12, 0.0)
    found = forecast.Forecast(1, 1, 1, 1.0, 1.0, (within, program.Loop(2, (between, work))), mesh_shape)
    alone = found.step_seconds(target)
    assert alone == pytest.approx(2 + 7 / 450 + 7 * 1.9e-6 + 2 * (1 / 50 + 2 * 4e-6))
    # 8 along data: 2 x 7/8 GB each, three levels of a tree instead of one
    assert found.scaling(target, targets.parse("h200:64")) == pytest.approx(
        alone / (alone + 2 * (0.75 / 50 + 2 * 2 * 4e-6))
    )
    assert found.scaling(target, target) == 1.0


@pytest.mark.parametrize(
    ("target", "more"), [("h20:6", [24, 48]), ("h20:8", [16, 32, 64]), ("v5e:128", [256, 512, 1024])]
)
def test_more_chips_are_those_that_exist(target, more):
    assert [wider.num_chips for wider in command._more_chips(targets.parse(target))] == more


def test_step_that_does_not_fit_is_refused_after_the_table(planned, monkeypatch, capsys):
    config, target, mesh, found = planned
    monkeypatch.setattr(forecast, "make_mesh", lambda *_: mesh)
    monkeypatch.setattr(forecast, "compile_step", lambda *_, **__: found)
    command.plan(config, target)
    assert "predicted" in capsys.readouterr().out
    monkeypatch.setattr(command, "_FULL", found.peak_bytes / target.chip.memory_bytes / 2)
    with pytest.raises(ValueError, match=r"does not fit: .* try config.parts.logits or .*; config.mesh.fsdp larger"):
        command.plan(config, target)


def test_missing_compiler_names_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--target=v5e: no compiler for it: pip install --editable '.\[plan-tpu\]'"):
        forecast.make_mesh(targets.parse("v5e:4"), dict(data=1, fsdp=4, tensor=1, expert=1))


def test_mesh_of_slices_divides_the_data_axis_and_refuses_others():
    target = targets.parse("v5e:512")
    mesh = forecast.make_mesh(target, dict(data=2, fsdp=256, tensor=1, expert=1))
    slices = [{device.slice_index for device in row.ravel()} for row in mesh.devices]
    assert slices == [{0}, {1}]
    with pytest.raises(ValueError, match=r"config.mesh.data: got 1; wanted a multiple of the 2 slices"):
        forecast.make_mesh(target, dict(data=1, fsdp=512, tensor=1, expert=1))


def test_sharding_of_a_tpu_mesh_covers_every_chip_once():
    mesh = forecast.make_mesh(targets.parse("v5p:64"), dict(data=4, fsdp=16, tensor=1, expert=1))
    assert dict(mesh.shape) == {"data": 4, "fsdp": 16, "tensor": 1, "expert": 1}
    assert len({device.id for device in mesh.devices.ravel()}) == 64
    assert mesh.axis_names == sharding.MESH_AXES
