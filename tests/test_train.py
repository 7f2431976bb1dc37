"""Runs of the micro config through the entry point's functions: exact resume, refusals, new sensors, bad input."""

import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import made_folders
import numpy as np
import pytest
from micro import StopBehind, assembled_once, created_once, micro_config, mono_config

from skysense_jax import checkpoint, metrics, modalities, monitor, outputs, train, watch
from skysense_jax import config as config_lib
from skysense_jax.data import records
from skysense_jax.data.records import ShardWriter, encode_sample
from skysense_jax.data.sample import Sample, Series
from skysense_jax.eval.probes import MAX_CELLS
from skysense_jax.launch.stop import Stopped
from skysense_jax.tasks import evaluate

ROOT = pathlib.Path(__file__).resolve().parents[1]


class _Preempted(Exception):
    """Stands in for a pre-emption between two steps."""


def _train(
    config,
    workdir,
    monkeypatch,
    *,
    stop_after=None,
    pictures=False,
    change=lambda batch: batch,
    assemble=assembled_once,
    **given,
):
    """The final state and the records of every step, in order; raises _Preempted after ``stop_after`` steps.

    ``change``: what happens to each batch on its way.
    """
    order, prefetch = [], train.prefetch

    def watched(*args):
        for i, (batch, element, state) in enumerate(prefetch(*args)):
            if i == stop_after:
                raise _Preempted
            order.append(element["record"].tolist())
            yield change(batch), element, state

    with monkeypatch.context() as patch:
        patch.setattr(train, "prefetch", watched)
        patch.setattr(train, "assemble", assemble)
        patch.setattr(train, "create_state", created_once)
        if not pictures:
            patch.setattr(outputs.Outputs, "write_pictures", lambda *args: None)
        try:
            state = train.train(config, workdir, **given)
        except _Preempted:
            return None, order
    return jax.device_get(state), order


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Ten steps without a stop, one of them traced: workdir, state, data order."""
    workdir = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as monkeypatch:
        return workdir, *_train(mono_config(), workdir, monkeypatch, profile_steps="4:4")


def test_five_steps_and_a_restart_equal_ten_to_the_last_bit(straight, tmp_path, monkeypatch):
    workdir, state, order = straight
    stopped, before = _train(mono_config(), tmp_path, monkeypatch, stop_after=7)
    assert stopped is None
    resumed, after = _train(mono_config(), tmp_path, monkeypatch)
    assert before[:5] + after == order  # steps 6 and 7 were lost with the process and come again
    wanted, got = (dict(jax.tree_util.tree_leaves_with_path(s)) for s in (state, resumed))
    assert wanted.keys() == got.keys()
    for path, value in wanted.items():
        np.testing.assert_array_equal(got[path], value, err_msg=jax.tree_util.keystr(path))
    lines = [metrics.read_json_lines(w / metrics.FILE_NAME) for w in (workdir, tmp_path)]
    losses = [[(line["step"], line["loss"]) for line in of_run] for of_run in lines]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == list(range(1, 11))


def test_loss_falls_on_the_mono_run(straight):
    lines = metrics.read_json_lines(straight[0] / metrics.FILE_NAME)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_speed_is_written_with_the_loss_and_a_trace_with_the_step_that_ends_it(straight):
    lines = {line["step"]: line for line in metrics.read_json_lines(straight[0] / metrics.FILE_NAME)}
    assert "step_seconds" not in lines[1]  # the first step of a process compiles
    for step in (2, 6, 10):
        line = lines[step]
        assert line["samples_per_second"] == pytest.approx(8 / line["step_seconds"])
        assert 0 <= line["input_wait_seconds"] < line["step_seconds"]
        assert line["input_wait_share"] == pytest.approx(line["input_wait_seconds"] / line["step_seconds"])
        assert 0 <= line["input_late_share"] <= 1
        assert line["device_teraflops_per_second"] > 0
        assert line["experts/skew_block0"] == pytest.approx(
            2 * max(line[f"experts/load_block0_expert{e}"] for e in (0, 1))
        )
        # a CPU has no rated FLOPs and counts no memory: absent, not zero
        assert not {name for name in line if "utilization" in name or "memory" in name}
    assert lines[6]["input_wait_seconds"] > 0
    traced = {name: value for name, value in lines[4].items() if name.startswith("profile/")}
    assert not any(name.startswith("profile/") for step, line in lines.items() if step != 4 for name in line)
    assert "step_seconds" not in lines[4]  # a trace slows it down
    parts = ("compute", "exposed_exchange", "exposed_copy", "idle")
    assert sum(traced[f"profile/{part}_seconds"] for part in parts) == pytest.approx(traced["profile/step_seconds"])
    assert traced["profile/compute_seconds"] > 0
    assert traced["profile/all_reduce_seconds"] > 0  # gradients over the devices
    assert traced["profile/exposed_exchange_seconds"] <= traced["profile/exchange_seconds"]
    written = sorted((straight[0] / "profile" / "plugins" / "profile" / "steps_4_4").iterdir())
    assert [path.name.split("_process0")[1] for path in written] == [".trace.json.gz", ".xplane.pb"]


def test_wrong_profile_steps_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"--profile_steps: got '9:11'; wanted an END in the run, 10"):
        _train(mono_config(), tmp_path / "run", monkeypatch, profile_steps="9:11")
    assert not (tmp_path / "run").exists()


def test_teacher_alone_is_restored(straight):
    workdir, state, _ = straight
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state.teacher)
    restored = checkpoint.restore_params(workdir, shapes)
    assert restored.step == 10
    for path, value in jax.tree_util.tree_leaves_with_path(state.teacher):
        np.testing.assert_array_equal(dict(jax.tree_util.tree_leaves_with_path(restored.state))[path], value)


def test_resume_with_another_model_is_refused_by_field(straight, monkeypatch):
    config = mono_config()
    config.model.fusion.depth = 3
    with pytest.raises(ValueError, match=r"config\.model\.fusion\.depth: 2 -> 3"):
        _train(config, straight[0], monkeypatch)


def test_run_begins_with_the_teacher_of_another_and_goes_on_with_its_own(tmp_path, monkeypatch, caplog):
    config = mono_config()
    config.optim.seed = 1
    other, workdir = _first_state(config), tmp_path / "other"
    checkpoints = checkpoint.Checkpoints(workdir, every_steps=1, keep_last=2, keep_every_steps=100)
    checkpoints.save(7, other, data_state={}, meta={"config": config_lib.flat_text(config)})
    checkpoints.close()
    for stop_after in (5, 0):  # steps, of which the fifth is saved
        with caplog.at_level("INFO"):
            _train(mono_config(), tmp_path / "run", monkeypatch, stop_after=stop_after, init_from=workdir)
    assert "--init_from is not looked at" in caplog.text
    events = _lines(tmp_path / "run" / "events.jsonl")
    assert [(line["event"], line["step"]) for line in events] == [("started", 0), ("started", 5)]
    assert events[0]["origin"] == f"the teacher of step 7 in {workdir}"
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), other.teacher)
    for weights in ("teacher", "student"):
        after = checkpoint.restore_params(tmp_path / "run", shapes, weights=weights).state
        assert 0 < _largest_difference(after, other.teacher) < 0.01
        assert _largest_difference(after, _first_state(mono_config()).teacher) > 0.05


def _largest_difference(tree, other):
    return max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(jax.tree.map(np.subtract, tree, other)))


def test_weights_of_another_network_or_of_none_are_refused(straight, tmp_path, monkeypatch):
    config = mono_config()
    config.model.fusion.depth = 3
    with pytest.raises(ValueError, match=r"--init_from: .* config\.model\.fusion\.depth: 2 -> 3.*from_torch"):
        _train(config, tmp_path / "run", monkeypatch, init_from=straight[0])
    with pytest.raises(ValueError, match=r"--init_from: there is no .*nothing"):
        _train(mono_config(), tmp_path / "run", monkeypatch, init_from=tmp_path / "nothing")


def test_looks_on_the_way_are_written_and_the_best_probed_checkpoint_stays(straight, tmp_path, monkeypatch):
    config = mono_config()
    config.run.update(checkpoint_every_steps=1, keep_last=2, keep_every_steps=100, keep_best=True, norms_every_steps=3)
    config.eval.update(probe_every_steps=1, num_train_scenes=2, num_test_scenes=1)
    mious = iter([0.1, 0.5, None, 0.2, 0.3, 0.1])
    found = lambda shown, step, teacher: {"osm/miou": next(mious), "osm/accuracy": 0.9}  # noqa: E731
    monkeypatch.setattr(outputs.Outputs, "probe", found)
    stub = lambda boxed, state, batch, seed, frozen: {"gradient": {"loss": {"a/b": state.step + 0.5}}}  # noqa: E731
    assemble = lambda config: dataclasses.replace(assembled_once(config), norms=stub)  # noqa: E731
    for stop_after, kept in ((4, [2, 3, 4]), (2, [2, 5, 6])):
        _train(config, tmp_path, monkeypatch, stop_after=stop_after, assemble=assemble)
        assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == kept
    looked = _lines(tmp_path / "norms.jsonl")
    assert [(line["step"], line["gradient"]["loss"]["a/b"]) for line in looked] == [(3, 2.5), (6, 5.5)]
    lines = {line["step"]: line for line in metrics.read_json_lines(tmp_path / metrics.FILE_NAME)}
    told = {step: line["probe/osm/miou"] for step, line in lines.items() if "probe/osm/miou" in line}
    assert told == {1: 0.1, 2: 0.5, 5: 0.3}  # those of 4 and 6 had not been written when the run was stopped
    of_straight = {line["step"]: line["loss"] for line in metrics.read_json_lines(straight[0] / metrics.FILE_NAME)}
    assert all("probe/share_of_time" in line for step, line in lines.items() if step in told)
    assert {step: line["loss"] for step, line in lines.items()} == {step: of_straight[step] for step in (1, 2, 3, 5)}


def test_run_is_probed_on_labelled_data_of_the_user_and_keeps_the_best(tmp_path, monkeypatch):
    folder = made_folders.labelled_records(tmp_path / "records")
    config = mono_config()
    config.optim.num_steps = 3
    config.run.update(checkpoint_every_steps=1, keep_last=2, keep_every_steps=100, keep_best=True)
    config.eval.update(datasets=(("land", str(folder), "segmentation"),), probe_every_steps=2, batch_size=8)
    _train(config, tmp_path / "run", monkeypatch)
    lines = {line["step"]: line for line in metrics.read_json_lines(tmp_path / "run" / metrics.FILE_NAME)}
    mious = {step: line["probe/land/miou"] for step, line in lines.items() if "probe/land/miou" in line}
    assert list(mious) == [2, 3]  # every second step, and the last
    assert json.loads((tmp_path / "run" / "probe.json").read_text())["teacher"]["land/miou"] == mious[3]
    assert checkpoint.asked_step(tmp_path / "run", "best") == max(reversed(mious), key=mious.get)
    assert {int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()} == {2, 3}
    request = evaluate.Request(
        model=str(tmp_path / "run"), dataset=str(folder), task="segmentation", protocol="linear", max_cells=MAX_CELLS
    )
    assert evaluate.evaluate(request)["scores"]["miou"] == pytest.approx(mious[3], abs=1e-6)


@pytest.mark.parametrize(
    ("every", "saved", "probed"),
    [(3, 1, [3, 6, 9, 12]), (3, 2, [4, 6, 10, 12]), (5, 3, [6, 12]), (1, 4, [4, 8, 12]), (0, 1, [])],
)
def test_probes_come_with_the_first_checkpoint_behind_every_so_many_steps(every, saved, probed):
    config = mono_config()
    config.eval.probe_every_steps, config.run.checkpoint_every_steps = every, saved
    assert [step for step in range(1, 13) if train._probe_due(step, config)] == probed


def test_run_that_is_told_to_stop_saves_without_a_probe(tmp_path, monkeypatch):
    config = mono_config()
    config.run.checkpoint_every_steps = 1
    config.eval.update(probe_every_steps=1, num_train_scenes=2, num_test_scenes=1)
    probed = []
    monkeypatch.setattr(outputs.Outputs, "probe", lambda shown, step, teacher: probed.append(step) or {})
    with pytest.raises(Stopped, match="behind step 2"):
        _train(config, tmp_path, monkeypatch, stop=StopBehind(2))
    assert probed == [1]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def test_mesh_that_does_not_match_the_devices_is_refused(tmp_path, monkeypatch):
    config = mono_config()
    config.mesh.update(data=3, fsdp=1)
    config.data.batch_size = 24
    with pytest.raises(ValueError, match=r"config\.mesh.*8"):
        _train(config, tmp_path, monkeypatch)
    assert not list(tmp_path.iterdir())


def test_empty_dataset_is_refused_by_its_glob(tmp_path, monkeypatch):
    config = mono_config()
    config.data.sources = ((str(tmp_path / "none-*.array_record"), 1.0),)
    with pytest.raises(ValueError, match="none-"):
        _train(config, tmp_path / "run", monkeypatch)


def _row(name, bands, dtype, value_range, pixels_per_cell, patch, **more):
    low, high = value_range
    count = len(bands)
    return dict(
        name=name,
        bands=bands,
        dtype=dtype,
        unit="made up for a test",
        value_range=value_range,
        typical_range=value_range,
        wrong_unit_hint="something else",
        pixels_per_cell=pixels_per_cell,
        patch=patch,
        mean=((low + high) / 2,) * count,
        std=((high - low) / 4,) * count,
        statistics_source="made up for a test",
        **more,
    )


RGBN = _row("rgbn", ("R", "G", "B", "N"), "uint8", (0, 255), 16, 4, photometric="rgb", codec="png")
NEW_SENSORS = {  # row, metres of its own pixels
    "rgbn": (RGBN, 1.5),
    "hyper": (_row("hyper", tuple(f"B{i}" for i in range(200)), "int16", (0, 10000), 1, 1), 30.0),
    "lidar": (_row("lidar", ("height",), "float32", (-10, 60), 8, 2), 1.0),
}


def _new_sensor_records(path, *, damaged=0):
    """Eight samples of sensors that the table does not have, the first ``damaged`` unreadable; of three one sensor is
    missing."""
    rows = modalities.select(NEW_SENSORS, [row for row, _ in NEW_SENSORS.values()])
    rng = np.random.default_rng(0)
    with ShardWriter(path) as writer:
        for i in range(8):
            series = {}
            for k, row in enumerate(rows):
                if i == 5 + k:
                    continue
                side = 8 * row.pixels_per_cell
                series[row.name] = Series(
                    images=rng.uniform(*row.value_range, (1, side, side, row.num_bands)).astype(row.dtype),
                    valid=np.ones((1, side, side), bool),
                    cloud=np.zeros((1, side, side), bool),
                    days=np.array([18000 + i], np.int32),
                    orbits=np.zeros(1, np.uint8),
                    native_gsd_m=NEW_SENSORS[row.name][1],
                )
            payload = encode_sample(Sample(id=f"new-{i}", extent_cells=8, series=series), rows)
            writer.write(payload[: len(payload) // 2] if i < damaged else payload)


def test_new_sensors_are_rows_in_the_config_and_bad_records_are_named(tmp_path, monkeypatch, caplog):
    """A 1.5 m RGB-NIR camera, a 200-band spectrometer at 30 m and a height raster at 1 m, no line of code."""
    _new_sensor_records(tmp_path / "new.array_record", damaged=2)
    config = mono_config()
    config.data.new_modalities = tuple(row for row, _ in NEW_SENSORS.values())
    config.data.update(modalities=tuple(NEW_SENSORS), sources=((str(tmp_path / "*.array_record"), 1.0),))
    config.data.num_dates = dict.fromkeys(NEW_SENSORS, 1)
    config.model.backbone.num_moe_blocks, config.model.fusion.depth = 0, 1
    config.objective.weights.update(qsacl=0.0, koleo=0.0)
    config.optim.num_steps, config.optim.warmup_steps = 2, 1
    config.eval.update(num_train_scenes=1, num_test_scenes=1)  # scenes lack these sensors: no probe, no error
    with caplog.at_level("WARNING"):
        state, _ = _train(config, tmp_path / "run", monkeypatch, pictures=True)
    before = jax.device_get(_first_state(config).student["backbone"])
    for name in NEW_SENSORS:
        kernel = lambda tree, name=name: tree[f"tokenizer_{name}"]["projection"]["kernel"]  # noqa: E731
        assert np.abs(kernel(state.student["backbone"]) - kernel(before)).max() > 1e-5  # it trains
    lines = metrics.read_json_lines(tmp_path / "run" / metrics.FILE_NAME)
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert lines[-1]["loss/text_alignment"] == 0  # no labels in these records
    assert lines[-1]["bad_records"] >= 4  # two of eight, seen twice
    assert "new.array_record" in caplog.text
    assert not (tmp_path / "run" / "probe.json").exists()
    assert (tmp_path / "run" / "pictures" / "features.png").exists()
    shown = outputs.Outputs(config, train.assemble(config), train.make_pipeline(config), tmp_path)._pictured()
    assert [sample.id for sample in shown] == ["new-2", "new-3", "new-4"]  # the run's own; 0 and 1 are damaged


def _first_state(config):
    run, mesh = train.assemble(config), train.sharding.make_mesh(**config.mesh)
    shapes = train.batch_shapes(config, run.modalities)
    with jax.set_mesh(mesh):
        return train.create_state(run.network, run.optimizer, shapes, seed=config.optim.seed, mesh=mesh)


def test_source_whose_records_all_lie_is_refused_before_the_first_step(tmp_path, monkeypatch):
    """Written by somebody else's writer: linear backscatter lies inside the range of dB, so no window shows it."""
    series = Series(
        images=np.full((1, 8, 8, 2), 0.05, np.float16),
        valid=np.ones((1, 8, 8), bool),
        cloud=np.zeros((1, 8, 8), bool),
        days=np.array([18000], np.int32),
        orbits=np.zeros(1, np.uint8),
        native_gsd_m=10.0,
    )
    rows = modalities.select(("s1",))
    with ShardWriter(tmp_path / "linear.array_record") as writer, monkeypatch.context() as patch:
        patch.setattr(records, "validate_sample", lambda *_: None)
        for i in range(6):
            writer.write(encode_sample(Sample(id=f"linear-{i}", extent_cells=8, series={"s1": series}), rows))
    config = mono_config()
    config.data.update(modalities=("s1",), sources=((str(tmp_path / "*.array_record"), 1.0),))
    with pytest.raises(ValueError, match=r"config\.data\.sources: .*none of 4 records .* like linear power") as error:
        _train(config, tmp_path / "run", monkeypatch)
    assert "VV" in str(error.value)


def test_run_whose_numbers_are_not_finite_stops_and_keeps_its_checkpoint(straight, tmp_path, monkeypatch):
    steps = []

    def poison_from_the_sixth(batch):
        steps.append(batch)
        images = batch.global_views.images
        nan = {name: x * jnp.nan if x.dtype == jnp.float16 else x for name, x in images.items()}
        return batch if len(steps) < 6 else batch.replace(global_views=batch.global_views.replace(images=nan))

    config = mono_config()
    config.run.max_nonfinite_in_row = 3
    with pytest.raises(RuntimeError, match=r"step 8: 3 updates in a row .*config\.run\.max_nonfinite_in_row=3"):
        _train(config, tmp_path, monkeypatch, change=poison_from_the_sixth)
    lines = metrics.read_json_lines(tmp_path / metrics.FILE_NAME)
    assert [line["nonfinite_in_row"] for line in lines] == [0] * 5 + [1, 2, 3]
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), straight[1].teacher)
    restored = checkpoint.restore_params(tmp_path, shapes)
    assert restored.step == 5
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(restored.state))


def _jumping(monkeypatch, bad_batches):
    """The loss is 100 higher on these batches, counted as they come."""
    seen = itertools.count(1)

    class Jumping(monitor.Monitor):
        def after_step(self, step, numbers, element):
            jump = 100 if next(seen) in bad_batches else 0
            super().after_step(step, {**numbers, "loss": numbers["loss"] + jump}, element)

    monkeypatch.setattr(train, "Monitor", Jumping)
    monkeypatch.setattr(watch, "_FEWEST", 4)


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def _watching(**changes):
    config = mono_config()
    config.run.update(checkpoint_every_steps=2)
    config.run.watch.update({"spike_in_row": 2, **changes})
    return config


def test_run_whose_loss_jumps_goes_back_and_past_the_data(straight, tmp_path, monkeypatch):
    _jumping(monkeypatch, bad_batches=(7, 8))
    state, order = _train(_watching(), tmp_path, monkeypatch)
    assert int(state.step) == 10
    # Steps 7 and 8 jump, told behind step 9; the run goes on behind step 6, with the data that follow those of step 9.
    lines = metrics.read_json_lines(tmp_path / metrics.FILE_NAME)
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert max(line["loss"] for line in lines) < 100
    assert order[:9] == straight[2][:9]
    assert len(order) == 9 + 4
    assert not set(map(tuple, order[9:])) & set(map(tuple, order[:9]))
    found = _lines(tmp_path / "events.jsonl")[1:]  # behind the start
    assert [line["event"] for line in found] == ["loss spike", "went back"]
    assert (found[0]["first_step"], found[0]["last_step"], found[1]["to_step"]) == (7, 8, 6)
    assert sorted(found[0]["samples"]) == ["7", "8"]
    assert all(len(names) == 8 and "scene" in names[0] for names in found[0]["samples"].values())
    assert [path.name for path in (tmp_path / "rewound_checkpoints").iterdir() if path.name != "README"] == ["8"]


def test_run_that_goes_on_jumping_stops_and_so_does_one_without_a_checkpoint_before(tmp_path, monkeypatch):
    config = _watching(spike_rewinds=1)
    _jumping(monkeypatch, bad_batches=range(7, 100))
    with pytest.raises(RuntimeError, match=r"step 8: the loss is 1.* since step 7, once more \(config.run.watch"):
        _train(config, tmp_path / "again", monkeypatch)
    config.run.checkpoint_every_steps = 100
    _jumping(monkeypatch, bad_batches=range(7, 100))
    with pytest.raises(RuntimeError, match="there is no checkpoint before it to go back to"):
        _train(config, tmp_path / "without", monkeypatch)


def test_collapse_is_told_with_the_signal_and_stops_a_run_that_is_asked_to(tmp_path, monkeypatch):
    """Forced: a teacher temperature of 100 leaves its targets uniform."""
    config = mono_config()
    config.objective.update(teacher_temperature=100.0, teacher_temperature_start=100.0)
    config.optim.warmup_steps = 1
    config.run.watch.update(collapse_in_row=3, collapse_stops=True)
    with pytest.raises(
        RuntimeError, match=r"step 3: collapse: .*target_entropy/\w+ is 3.1\d+, beyond .*nearly uniform"
    ):
        _train(config, tmp_path, monkeypatch)
    found = _lines(tmp_path / "events.jsonl")[1:]  # behind the start
    assert {line["event"] for line in found} == {"collapse"}
    assert {line["step"] for line in found} == {3}
    assert any(line["signal"].startswith("target_entropy/") for line in found)


def test_command_of_a_dry_run_prints_and_writes_nothing(tmp_path):
    command = [sys.executable, "-m", "skysense_jax.train", "--config=configs/tiny.py", f"--workdir={tmp_path / 'run'}"]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # one device
    done = subprocess.run([*command, "--dry_run"], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert "GFLOP per sample" in done.stdout
    assert "hr: 1x2x1x128x128x3 uint8" in done.stdout
    assert not list(tmp_path.iterdir())


def test_dry_run_prints_config_sizes_cost_and_a_sample(capsys):
    train.print_dry_run(micro_config())
    text = capsys.readouterr().out
    for wanted in (
        "data.views.global_cells = 4",
        "  backbone ",
        "GFLOP per sample",
        "state: ",
        "GiB in fp32",
        "hr: 1x2x1x128x128x3 uint8",
    ):
        assert wanted in text


def test_wrong_batch_is_named_before_compilation():
    config = mono_config()
    run = train.assemble(config)
    shapes = train.batch_shapes(config, run.modalities)
    element = next(iter(train.make_pipeline(config)))
    element["global_views"]["images"]["s1"] = element["global_views"]["images"]["s1"][..., :1]
    with pytest.raises(ValueError, match=r"s1.*got float16\(8, 2, 2, 4, 4, 1\); wanted float16\(8, 2, 2, 4, 4, 2\)"):
        train.dry_run.check_element(element, shapes, num_samples=config.data.batch_size)


def test_end_of_a_run_writes_pictures_and_scores(straight, tmp_path, monkeypatch):
    workdir, state, _ = straight
    config = mono_config()
    config.eval.update(num_train_scenes=4, num_test_scenes=2, batch_size=8, probe_untrained=False)
    pipeline, mesh = train.make_pipeline(config), train.sharding.make_mesh(**config.mesh)
    (tmp_path / metrics.FILE_NAME).write_text((workdir / metrics.FILE_NAME).read_text())
    shown = outputs.Outputs(config, train.assemble(config), pipeline, tmp_path)
    with jax.set_mesh(mesh):
        shown.write_pictures(state.teacher, next(iter(pipeline)))
        scores = shown.probe(6, state.teacher)
        with monkeypatch.context() as patch:  # the same step is not probed again
            patch.setattr(outputs.probes, "probe_scenes", None)
            shown.write_probe(6, state, mesh)
    assert {"views.png", "features.png", "queries.png", "curves.png"} <= {
        p.name for p in (tmp_path / "pictures").iterdir()
    }
    assert 0 <= scores["osm/miou"] <= 1
    assert json.loads((tmp_path / "probe.json").read_text()) == {"step": 6, "teacher": scores}
