"""Distillation of a trained run into a smaller one: what may teach, what moves, resume, meshes, export."""

import dataclasses
import pathlib
from unittest import mock

import jax
import numpy as np
import pytest
import torch
from loading import module_from_file
from micro import Compiled, StopBehind, assembled_once, created_once, distil_config, mono_config
from safetensors.numpy import load_file

from skysense_jax import (
    assembly,
    checkpoint,
    cost,
    feed,
    metrics,
    modalities,
    outputs,
    resume,
    sharding,
    targets,
    train,
    train_state,
)
from skysense_jax import config as config_lib
from skysense_jax.data import scenes
from skysense_jax.data.pipeline import FIRST_STATE, PipelineIterator
from skysense_jax.eval.features import sample_features
from skysense_jax.export import __main__ as export
from skysense_jax.export import write
from skysense_jax.launch.stop import Stopped
from skysense_jax.losses import distil
from skysense_jax.models import skysense
from skysense_jax.plan import __main__ as plan
from skysense_jax.plan import forecast
from skysense_jax.sides import Side
from skysense_jax.train_step import frozen_sees
from skysense_jax.trees import named_leaves

STEPS = (3, 8)


def _teacher_config():
    """Of another width, depth and kind of block than the student, and with a modality more."""
    config = mono_config()
    config.name = "mono_teacher"
    config.data.update(modalities=("s1", "s2"), num_dates=dict(s1=3, s2=1))
    config.model.backbone.update(width=64, depths=(1, 1, 2, 1))
    config.model.fusion.update(width=96)
    return config


def _save(workdir: pathlib.Path, config, steps) -> None:
    """A run of ``config`` with random weights, others at each of ``steps``."""
    run = assembly.assemble(config)
    shapes = assembly.batch_shapes(config, run.modalities)
    boxed = jax.eval_shape(lambda batch: run.network.init(jax.random.key(0), batch, train=False), shapes)["params"]
    checkpoints = checkpoint.Checkpoints(workdir, every_steps=1, keep_last=3, keep_every_steps=100)
    for step in steps:
        rng = np.random.default_rng(step)
        draw = lambda leaf: jax.numpy.asarray(0.15 * rng.standard_normal(leaf.shape), leaf.dtype)  # noqa: E731
        state = {"teacher": jax.tree.map(draw, sharding.unbox(boxed))}
        checkpoints.save(step, state, data_state=FIRST_STATE, meta={"config": config_lib.flat_text(config)})
    checkpoints.close()


def _save_nothing_but_the_config(workdir: pathlib.Path, config) -> None:
    checkpoints = checkpoint.Checkpoints(workdir, every_steps=1, keep_last=3, keep_every_steps=100)
    state = {"teacher": jax.numpy.zeros(1)}
    checkpoints.save(1, state, data_state=FIRST_STATE, meta={"config": config_lib.flat_text(config)})
    checkpoints.close()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("teacher")
    _save(workdir, _teacher_config(), STEPS)
    return workdir


def _train(config, workdir, **given):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "assemble", assembled_once)
        patch.setattr(train, "create_state", created_once)
        patch.setattr(outputs.Outputs, "write_pictures", lambda *args: None)
        return jax.device_get(train.train(config, workdir, **given))


@pytest.fixture(scope="module")
def straight(teacher, tmp_path_factory):
    """Ten steps without a stop."""
    workdir = tmp_path_factory.mktemp("straight")
    config = distil_config(teacher)
    config.optim.learning_rate = 2e-3
    return workdir, config, _train(config, workdir)


def _first_state(config):
    """What ``straight`` began with."""
    run, mesh = assembled_once(config), sharding.make_mesh(**config.mesh)
    shapes = assembly.batch_shapes(config, run.modalities)
    with jax.set_mesh(mesh):
        return created_once(run.network, run.optimizer, shapes, seed=config.optim.seed, mesh=mesh)


def _leaves(tree):
    return {path: np.asarray(leaf) for path, leaf in named_leaves(jax.device_get(tree)).items()}


# ---- a run


def test_loss_falls_at_every_level(straight):
    lines = metrics.read_json_lines(straight[0] / metrics.FILE_NAME)
    names = {name for name in lines[0] if name.startswith(("distil/", "loss/"))}
    levels = {"distil/stage3_s1", "distil/stage4_s1", "distil/fused_fused"}
    assert names == {"loss/distil", *levels}
    for name, share in dict.fromkeys(levels, 0.95).items() | {("loss/distil", 0.8)}:
        assert np.mean([line[name] for line in lines[-3:]]) < share * lines[0][name], name
    mean = sum(lines[3][name] for name in levels) / 3
    assert lines[3]["loss/distil"] == pytest.approx(mean, rel=1e-5)


def test_stop_and_restart_equal_ten_steps_and_hold_no_weight_of_the_teacher(straight, tmp_path):
    _, config, wanted = straight
    with pytest.raises(Stopped):
        _train(config, tmp_path, stop=StopBehind(5))
    got = _train(config, tmp_path)
    wanted, got = _leaves(wanted), _leaves(got)
    assert wanted.keys() == got.keys()
    for path, value in wanted.items():
        np.testing.assert_array_equal(got[path], value, err_msg=path)
    assert wanted["student/distil/stage3/kernel"].shape == (128, 256)
    assert wanted["student/distil/stage4/kernel"].shape == (256, 512)
    assert wanted["student/distil/fused/kernel"].shape == (32, 96)
    assert not [path for path in wanted if "frozen" in path]
    students = sum(leaf.size for path, leaf in wanted.items() if path.startswith("student/"))
    assert sum(leaf.size for leaf in wanted.values()) == pytest.approx(4 * students, rel=1e-3)  # and the counters


def test_resume_with_other_weights_of_the_teacher_is_refused(straight):
    workdir, config, _ = straight
    other = config.copy_and_resolve_references()
    other.objective.distil.step = STEPS[0]
    with pytest.raises(ValueError, match=r"learns from step 8 of a run .*, this config from step 3 .*distil\.step"):
        _train(other, workdir)


@pytest.fixture(scope="module")
def alone(straight):
    """The step on one device in microbatches, and what ``straight`` gave its first one: state and batch."""
    config = straight[1].copy_and_resolve_references()
    config.mesh.update(data=1, fsdp=1)
    config.parts.microbatches = 2
    first = jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf), jax.devices()[0]), _first_state(straight[1]))
    return Compiled(config, jax.devices()[:1]), first, next(iter(train.make_pipeline(config)))


def test_one_device_in_microbatches_gives_the_numbers_of_eight_and_a_gradient_to_the_student_alone(straight, alone):
    workdir, (alone, first, element) = straight[0], alone
    before = _leaves(alone.frozen)
    state, logged = alone(first, element)
    of_eight = metrics.read_json_lines(workdir / metrics.FILE_NAME)[0]
    for name, value in logged.items():
        np.testing.assert_allclose(value, of_eight[name], rtol=1e-5, atol=1e-5, err_msg=name)
    for path, value in _leaves(alone.frozen).items():
        np.testing.assert_array_equal(value, before[path], err_msg=path)
    # after one step from zero, Adam's first moment is the clipped gradient times 1 - beta1
    moments = _leaves(next(part for part in state.optimizer if hasattr(part, "mu")).mu)
    asked = {path for path, value in moments.items() if np.any(value)}
    unasked = ("heads_", "queries/", "text/")
    assert not [path for path in asked if path.startswith(unasked)]
    silent = {path for path in set(moments) - asked if not path.startswith(unasked)}
    # days and modalities that no sample has; biases that a softmax does not see
    assert not [path for path in silent if not path.endswith(("embedding", "bias"))]
    assert {"distil/stage3/kernel", "distil/stage4/kernel", "distil/fused/kernel"} <= asked


def test_gradient_of_the_term_beside_another_is_its_gradient_alone(straight, alone):
    """Of the norms of a step on both terms, against the step on one."""
    config = alone[0].config.copy_and_resolve_references()
    config.objective.weights.text_alignment = 1.0
    run, mesh = assembly.assemble(config), alone[0].mesh
    with jax.set_mesh(mesh):
        boxed = train_state.boxed_state(run.network, run.optimizer, alone[0].shapes).student
        given = alone[1], feed.to_device(alone[2], mesh), run.seed, alone[0].frozen
        found = jax.device_get(jax.jit(lambda *given: run.norms(boxed, *given))(*given))["gradient"]
    assert set(found) == {"distil", "text_alignment", "loss"}
    first = metrics.read_json_lines(straight[0] / metrics.FILE_NAME)[0]
    total = {term: np.sqrt(sum(np.square(float(norm)) for norm in of.values())) for term, of in found.items()}
    assert total["distil"] == pytest.approx(first["gradient_norm"], rel=1e-4)
    assert total["text_alignment"] > 0
    assert abs(total["loss"] - total["distil"]) > 1e-3 * total["distil"]


def test_teacher_routes_as_after_its_training(alone):
    """Its experts take all tokens; with the capacity of training they would leave some out."""
    step, first, element = alone
    (sides,), network = step.run.norms.args, step.run.frozen.network

    def said(state, batch, seed, params):
        inputs, _, targets = sides.look(state, batch, seed, params)
        ways = [Side(network, params, drops=False, train=train) for train in (False, True)]
        seen = [frozen_sees(side, inputs, objective=sides.objective) for side in ways]
        return targets.frozen.sets, *(distil.standardised(sets) for sets in seen)

    with jax.set_mesh(step.mesh):
        got, whole, limited = map(
            _leaves, jax.jit(said)(first, feed.to_device(element, step.mesh), step.run.seed, step.frozen)
        )
    for path, value in whole.items():
        np.testing.assert_allclose(got[path], value, atol=1e-3, err_msg=path)
    assert max(np.abs(got[path] - value).max() for path, value in limited.items() if "features" in path) > 0.1


def test_frozen_weights_lie_divided_over_the_mesh_and_their_cost_is_counted(teacher):
    config = distil_config(teacher)
    run, mesh = assembly.assemble(config), sharding.make_mesh(data=2, fsdp=4, tensor=1, expert=1)
    kernel = run.frozen.restore(mesh).params["backbone"]["stage3"]["mlp"]["hidden"]["kernel"]
    assert kernel.shape == (2, 256, 1024)
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size
    more = assembly.batch_flops(config, run.modalities, run.frozen) - assembly.batch_flops(config, run.modalities)
    alone = config.copy_and_resolve_references()  # 3 + 1 forward passes of the global views alone
    alone.data.views.num_local = 0
    model = run.frozen.config.model
    whole = cost.batch_flops(run.modalities, data=alone.data, model=model, teacher_local=False)
    assert more == pytest.approx(whole / 4, rel=1e-12)
    alone.objective.distil.fused_weight = 0.0
    images = cost.view_costs(run.modalities, data=alone.data, model=model)["global"].image_flops
    fewer = assembly.batch_flops(alone, run.modalities, run.frozen) - assembly.batch_flops(alone, run.modalities)
    assert fewer == alone.data.batch_size * alone.data.views.num_global * sum(
        alone.data.num_dates[name] * of_image for name, of_image in images.items()
    )


def test_plan_compares_with_the_formula_of_both_networks(teacher, monkeypatch):
    """Of a step that only adds, which compiles at once."""
    config = distil_config(teacher)
    run = assembled_once(config)
    whole = assembly.batch_flops(config, run.modalities, run.frozen)
    step = lambda state, batch, seed, frozen: (jax.tree.map(lambda leaf: leaf + 1, state), {})  # noqa: E731
    monkeypatch.setattr(forecast.assembly, "assemble", lambda *args: dataclasses.replace(run, step=step))
    mesh = sharding.make_mesh(**config.mesh)
    found = dataclasses.replace(forecast.compile_step(config, mesh), flops=3 * whole / mesh.size)
    target = targets.parse("v5p:8")
    text = plan.report(config, target, found)
    assert "3.00 x the model's by formula" in text
    used = whole / mesh.size / target.chip.flops / found.step_seconds(target)
    assert f"{used:.0%} of the rated FLOPs" in text


def test_weights_of_the_teacher_that_the_mesh_does_not_divide_are_told(teacher, caplog):
    frozen = assembly.assemble(distil_config(teacher)).frozen  # 64 wide, its fusion 96
    frozen.restore(sharding.make_mesh(data=1, fsdp=3, tensor=1, expert=1, devices=jax.devices()[:3]))
    (told,) = (record.getMessage() for record in caplog.records if "does not divide" in record.getMessage())
    assert "parameters of the teacher (config.objective.distil.teacher)" in told
    assert "['backbone']['stage3']['mlp']['hidden']['kernel']" in told
    assert "['fusion']['day_embedding']" not in told


@pytest.mark.parametrize(
    ("student", "of_teacher", "chosen"),
    [
        ({}, {}, ("cudnn", "cudnn")),
        ({}, {"backbone.head_width": 4}, ("cudnn", "xla")),
        ({"backbone.num_prompts": 3}, {}, ("xla", "cudnn")),
    ],
)
def test_attention_of_each_network_is_by_its_own_fields(student, of_teacher, chosen, tmp_path):
    theirs = _teacher_config()
    theirs.model.update_from_flattened_dict(of_teacher)
    _save_nothing_but_the_config(tmp_path, theirs)
    config = distil_config(tmp_path)
    config.data.num_dates.s1 = 3
    config.model.update_from_flattened_dict({"compute_dtype": "bfloat16", **student})
    run = assembly.assemble(config, "gpu")
    assert (run.network.backbone.attention, run.frozen.network.backbone.attention) == chosen


def test_cudnn_by_name_that_does_not_take_the_teacher_is_refused(tmp_path):
    theirs = _teacher_config()
    theirs.model.fusion.head_width = 4
    _save_nothing_but_the_config(tmp_path, theirs)
    config = distil_config(tmp_path)
    config.data.num_dates.s1 = 3
    config.model.compute_dtype, config.efficiency.attention = "bfloat16", "cudnn"
    with pytest.raises(ValueError, match=r"^config\.objective\.distil\.teacher: .*fusion\.head_width: got 4; .*'auto'"):
        assembly.assemble(config, "gpu")


# ---- what comes out of it


def test_export_holds_no_projector_and_equals_the_jax_features(straight, tmp_path):
    workdir, config, state = straight
    out = tmp_path / "model"
    export.main([f"--workdir={workdir}", f"--out={out}", "--part=all"])
    assert not [name for name in load_file(out / write.WEIGHTS) if "distil" in name]
    assert not [name for name in load_file(out / write.HEADS) if "distil" in name]
    rows = modalities.select(config.data.modalities)
    network = skysense.build(rows, **config.model)
    cells = config.data.views.global_cells
    scene = scenes.render(7, seed=0, extent_cells=cells, modalities=("s1",), complete=True).sample
    given = dict(cells=cells, num_dates=dict(s1=2), batch_size=1)
    plain = {part: leaves for part, leaves in state.teacher.items() if part != checkpoint.DISTIL}
    found = next(iter(sample_features(network, plain, rows, [scene], **given)))
    tensor = lambda x: torch.tensor(np.asarray(x))[None]  # noqa: E731
    images = {"s1": tensor(found.whole.images["s1"]).permute(0, 1, 4, 2, 3)}
    model = module_from_file(out / "modeling_skysensev2.py").SkySenseV2.from_pretrained(out)
    with torch.no_grad():
        seen = model(images, day_of_year={"s1": tensor(found.whole.day_of_year["s1"])})
    ours = seen.fused[0].permute(1, 2, 0).numpy()
    assert found.fused_usable.all()
    np.testing.assert_allclose(ours, found.fused, atol=2e-5 * found.fused.std(), rtol=1e-4)


def test_weights_begin_a_run_without_a_teacher_and_the_other_way_round(straight, tmp_path):
    workdir, config, state = straight
    run, mesh, made = assembled_once(config), sharding.make_mesh(**config.mesh), _first_state(config)
    fresh = _leaves(made.student)
    with jax.set_mesh(mesh):
        boxed = train_state.boxed_state(run.network, run.optimizer, assembly.batch_shapes(config, run.modalities))
        abstract = train_state.abstract_state(boxed, mesh)
        network = {part: leaves for part, leaves in abstract.teacher.items() if part != checkpoint.DISTIL}
        plain = checkpoint.restore_params(workdir, network)
        source = mock.create_autospec(PipelineIterator, instance=True)
        checkpoints = checkpoint.Checkpoints(tmp_path / "new", every_steps=5, keep_last=2, keep_every_steps=100)
        _, begun, _ = resume.first_state(
            checkpoints, abstract, source, new=lambda: made, config=config, facts_now={}, init_from=workdir
        )
        checkpoints.close()
    wanted = _leaves(state.teacher)
    assert set(_leaves(plain.state)) == {path for path in wanted if not path.startswith("distil/")}
    for path, value in _leaves(begun.student).items():
        whole = fresh if path.startswith("distil/") else wanted
        np.testing.assert_array_equal(value, whole[path], err_msg=path)


# ---- what may not teach


def _s1(**changes):
    row = dataclasses.asdict(modalities.MODALITIES["s1"])
    return {**row, "name": "radar", **changes}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective.distil.teacher": "nowhere/run"}, r"config\.objective\.distil\.teacher: got 'nowhere/run'.*wanted"),
        ({"objective.distil.step": 5}, r"distil\.teacher: .*step 5.*steps \[3, 8\]; wanted step 5"),
        ({"data.modalities": ("hr", "s1"), "data.num_dates.hr": 1}, r"config\.data\.modalities: .*wanted some of"),
        (
            {"data.views.global_cells": 6, "data.views.local_box_cells": (1, 2)},
            r"config\.data\.views\.global_cells: got 6; wanted 4, .*: --config\.data\.views\.global_cells=4 "
            r"'--config\.data\.views\.local_box_cells=\(2, 3\)'$",
        ),
    ],
)
def test_teacher_that_cannot_teach_is_refused_before_anything_is_compiled(teacher, change, message):
    config = distil_config(teacher)
    with config.unlocked(), config.ignore_type():
        config.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match=message):
        assembly.assemble(config)


def test_teacher_that_knows_a_sensor_otherwise_is_refused(tmp_path):
    config = _teacher_config()
    config.data.update(modalities=("radar",), new_modalities=(_s1(),))
    with config.data.unlocked():
        config.data.num_dates = dict(radar=1)
    _save(tmp_path, config, STEPS[:1])
    student = distil_config(tmp_path)
    student.data.update(modalities=("radar",), new_modalities=(_s1(mean=(-9.0, -16.0)),))
    student.data.num_dates = config.data.num_dates
    with pytest.raises(ValueError, match=r"config\.data\.new_modalities: 'radar' has mean \(-9\.0, -16\.0\); wanted"):
        assembly.assemble(student)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights.distil": 0.0, "weights.qsacl": 1.0}, r"distil\.teacher: got 'runs/.*weights\.distil 0\.0; wanted"),
        ({"distil.teacher": ""}, r"config\.objective\.distil\.teacher: got '' with .*weights\.distil 1\.0"),
        (
            {"distil.stage3_weight": 0.0, "distil.stage4_weight": 0.0, "distil.fused_weight": 0.0},
            r"config\.objective\.distil: got 0 for stage3_weight",
        ),
        ({"distil.distance": "angle"}, r"config\.objective\.distil\.distance: got 'angle'; wanted one of 'cosine'"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(change, message):
    config = distil_config("runs/teacher")
    config.objective.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match=message):
        config_lib.validate(config)
