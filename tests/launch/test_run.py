"""Runs of 1, 2 and 4 real processes on loopback, 8 devices in all each time: the same losses, the same data.

The run of one process lies in a directory, that of several in a bucket (a server on loopback).
"""

import itertools
import json

import numpy as np
from etils import epath

from skysense_jax import metrics
from skysense_jax.launch.stop import EXIT_AGAIN


def _run(start, count, workdir, records, **more):
    """(statuses, outputs, records of each step as they stood in the global batch)."""
    command = ["tests/launch/run_nano.py"]
    own = [
        [str(records / f"{count}-{i}.json"), "--config=tests/launch/nano.py", f"--workdir={workdir}"]
        for i in range(count)
    ]
    statuses, texts = zip(*start(count, command, per_process=own, **more))
    read = [json.loads((records / f"{count}-{i}.json").read_text()) for i in range(count)]
    return statuses, texts, [list(itertools.chain(*parts)) for parts in zip(*read)]


def _losses(workdir):
    return {line["step"]: line["loss"] for line in metrics.read_json_lines(workdir / metrics.FILE_NAME)}


def test_one_two_and_four_processes_read_the_same_and_come_to_the_same(start, emulator, tmp_path):
    """One goes through; two are told to stop, by a signal to one of them; four go on from their checkpoint."""
    statuses, texts, straight = _run(start, 1, tmp_path / "one", tmp_path)
    assert statuses == (0,), texts[0]
    assert len(straight) >= 4

    bucket = epath.Path("gs://bucket/many")
    statuses, texts, before = _run(start, 2, bucket, tmp_path, STOP_AFTER="1")
    assert statuses == (EXIT_AGAIN, EXIT_AGAIN), "\n".join(texts)
    saved = sorted(int(path.name) for path in (bucket / "checkpoints").iterdir())
    stopped = saved[-1]
    assert 2 <= stopped < 4
    assert f"stopped behind step {stopped}, which is saved" in texts[0]

    statuses, texts, after = _run(start, 4, bucket, tmp_path)
    assert statuses == (0,) * 4, "\n".join(texts)
    assert f"starting at step {stopped} of 4" in texts[0]

    # none lost, none read twice: what came after the stop is what would have come, in each place of the batch
    assert before[:stopped] + after[: 4 - stopped] == straight[:4]
    assert all(len(set(step)) == 8 for step in straight[:3])  # 24 scenes: three steps before any comes again
    assert len(set(itertools.chain(*straight[:3]))) == 24

    one, many = _losses(tmp_path / "one"), _losses(bucket)
    assert sorted(one) == sorted(many) == [1, 2, 3, 4]
    assert not [path.name for path in bucket.iterdir() if "preflight" in path.name]
    np.testing.assert_allclose([many[step] for step in one], list(one.values()), rtol=1e-5)
