"""One run along processes and devices: samples and numbers stay those of a run that nothing happened to.

Real processes on loopback; the run lies in a bucket (a server on loopback).
"""

import itertools
import json
import pathlib
import re

import numpy as np
import pytest
from etils import epath
from micro import StopBehind, assembled_once, created_once
from nano import get_config

from skysense_jax import assembly, checkpoint, metrics, sharding, train, train_state
from skysense_jax.launch.stop import EXIT_AGAIN, Stopped
from skysense_jax.trees import named_leaves

_STEPS, _LEG = 24, 5


def _config():
    config = get_config()
    config.run.update(checkpoint_every_steps=_LEG, keep_last=9)
    config.optim.num_steps = _STEPS
    config.mesh.fsdp = 4
    return config


def _here(monkeypatch, workdir, stop_behind):
    """The records of each step as they stood in the global batch, of a run by this process on its eight devices."""
    read, prefetch = [], train.prefetch

    def watched(*args):
        for batch, element, state in prefetch(*args):
            read.append(element["record"].tolist())
            yield batch, element, state

    with monkeypatch.context() as patch:
        patch.setattr(train, "prefetch", watched)
        patch.setattr(train, "assemble", assembled_once)
        patch.setattr(train, "create_state", created_once)
        with pytest.raises(Stopped, match=f"stopped behind step {stop_behind}, which is saved"):
            train.train(_config(), workdir, stop=StopBehind(stop_behind))
    return read


def _elsewhere(start, workdir, records, *, devices, fsdp, stop_after):
    """The same of processes that share ``devices``, and the step that they stopped behind; 0: they go to the end."""
    fields = dict(optim__num_steps=_STEPS, run__checkpoint_every_steps=_LEG, run__keep_last=9, mesh__fsdp=fsdp)
    config = [f"--config.{field.replace('__', '.')}={value}" for field, value in fields.items()]
    own = [
        [
            str(records / f"{i}.json"),
            "--config=tests/nano.py",
            f"--workdir={workdir}",
            *config,
        ]
        for i in range(len(devices))
    ]
    command = ["tests/launch/run_nano.py"]
    statuses, texts = zip(*start(len(devices), command, per_process=own, devices=devices, STOP_AFTER=str(stop_after)))
    assert set(statuses) == {EXIT_AGAIN if stop_after else 0}, "\n".join(texts)[-6000:]
    read = [json.loads((records / f"{i}.json").read_text()) for i in range(len(devices))]
    stopped = re.search(r"stopped behind step (\d+), which is saved", texts[0])
    return [list(itertools.chain(*parts)) for parts in zip(*read)], int(stopped[1]) if stopped else _STEPS


def _straight():
    """The records of every step, from one pipeline without a stop."""
    return [batch["record"].tolist() for batch in itertools.islice(assembly.make_pipeline(_config()), _STEPS)]


def _copy(source, target: pathlib.Path):
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_dir():
            _copy(path, target / path.name)
        else:
            (target / path.name).write_bytes(path.read_bytes())


def _numbers(workdir, step):
    """The losses of all steps, and both networks of a checkpoint."""
    losses = {line["step"]: line["loss"] for line in metrics.read_json_lines(workdir / metrics.FILE_NAME)}
    run = assembled_once(_config())
    boxed = train_state.boxed_state(run.network, run.optimizer, assembly.batch_shapes(_config(), run.modalities))
    shapes = sharding.unbox(boxed.student)
    networks = {
        weights: checkpoint.restore_params(workdir, shapes, weights=weights, step=step).state
        for weights in ("student", "teacher")
    }
    return losses, named_leaves(networks)


def test_samples_and_five_steps_after_each_restore_are_those_of_a_straight_run(start, emulator, tmp_path, monkeypatch):
    """Devices 8, 4, 2 and 8, processes 1, 4, 2 and 1, shards 4, 1, 1 and 8; each leg takes five steps or more."""
    bucket = epath.Path("gs://bucket/chain")
    read, ends = _here(monkeypatch, bucket, _LEG), [_LEG]
    for devices, fsdp, stop_after in (((1, 1, 1, 1), 1, _LEG - 1), ((1, 1), 1, _LEG - 1), ((8,), 8, 0)):
        of_leg, stopped = _elsewhere(start, bucket, tmp_path, devices=devices, fsdp=fsdp, stop_after=stop_after)
        read = read[: ends[-1]] + of_leg
        ends.append(stopped)
    assert ends[-1] == _STEPS
    assert all(end >= begin + _LEG for begin, end in itertools.pairwise(ends)), ends

    # none lost, none read twice, each in its place of the batch
    assert read[:_STEPS] == _straight()
    assert len(set(itertools.chain(*read[:3]))) == 24  # three steps before any comes again
    assert not [path.name for path in bucket.iterdir() if "preflight" in path.name]

    for begin, end in itertools.pairwise(ends):  # eight devices from where each leg began
        whole = tmp_path / f"from-{begin}"
        _copy(bucket / "checkpoints" / str(begin), whole / "checkpoints" / str(begin))
        _here(monkeypatch, whole, end)
        (our_losses, ours), (losses, theirs) = (_numbers(where, end) for where in (bucket, whole))
        steps = range(begin + 1, end + 1)
        np.testing.assert_allclose([our_losses[i] for i in steps], [losses[i] for i in steps], rtol=1e-5)
        assert ours.keys() == theirs.keys()
        # softmax does not see a bias of the keys: its gradient is rounding, of which Adam makes steps of full length
        differing = {
            path: float(np.abs(ours[path] - value).max())
            for path, value in theirs.items()
            if not path.endswith("attention/key/bias") and not np.allclose(ours[path], value, rtol=1e-5, atol=1e-5)
        }
        assert not differing
