"""Storage that fails now and then is asked again, damage is not; a worker process that is killed is replaced."""

import collections
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
from absl import logging
from micro import mono_config

from skysense_jax.assembly import make_pipeline
from skysense_jax.data import pipeline, shards
from skysense_jax.data.checks import RecordError
from skysense_jax.data.records import ShardWriter
from skysense_jax.data.shards import Shards


@pytest.fixture
def shard(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "RETRY_AFTER_S", (0.01, 0.02, 0.03))
    path = tmp_path / "a.array_record"
    with ShardWriter(path) as writer:
        for number in range(8):
            writer.write(bytes([number]) * 1000)
    return path


@pytest.fixture
def told(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: lines.append(text % args))
    monkeypatch.setattr(logging, "error", lambda text, *args: lines.append(text % args))
    return lines


def _failing(source, error, times):
    """``source``, whose first ``times`` reads fail."""
    left = [times]

    class Failing:
        def __getitem__(self, index):
            left[0] -= 1
            if left[0] >= 0:
                raise RuntimeError(error)
            return source[index]

    return Failing()


@pytest.mark.parametrize("error", ["pread() failed: Input/output error; reading", "UNAVAILABLE: try later"])
def test_storage_that_fails_three_times_is_asked_a_fourth(shard, told, monkeypatch, error):
    source = Shards(str(shard))
    source._source = failing = _failing(source._source, error, times=3)
    monkeypatch.setattr(source, "_open", lambda: failing)
    assert source.payload(5) == bytes([5]) * 1000
    assert [line.split("trying again in ")[1] for line in told] == ["0.01 s", "0.02 s", "0.03 s"]
    assert "a.array_record, record 5" in told[0]


def test_storage_that_goes_on_failing_is_an_error_that_names_the_place(shard, told, monkeypatch):
    source = Shards(str(shard))
    source._source = failing = _failing(source._source, "read() failed: Stale file handle", times=9)
    monkeypatch.setattr(source, "_open", lambda: failing)
    with pytest.raises(RecordError, match=r"a.array_record, record 2: .*Stale file handle"):
        source.payload(2)
    assert len(told) == 3


def test_file_that_vanishes_and_comes_back_is_read(shard, told):
    """By the reader itself: what it says of a file that is not there is one of storage's failures."""
    hidden = shard.with_suffix(".hidden")
    source = Shards(str(shard))
    os.rename(shard, hidden)
    with pytest.raises(RecordError, match=r"open\(\) failed"):
        source.payload(0)
    assert len(told) == 3
    os.rename(hidden, shard)
    assert source.payload(0) == bytes([0]) * 1000


def test_damage_is_not_asked_for_again(shard, told):
    content = bytearray(shard.read_bytes())
    place = content.index(bytes([3]) * 1000) + 500
    content[place] ^= 1
    shard.write_bytes(bytes(content))
    source = Shards(str(shard))
    with pytest.raises(RecordError, match=r"record 3: .*hash mismatch"):
        source.payload(3)
    assert source.payload(4) == bytes([4]) * 1000
    assert told == []


def _stream(workers):
    config = mono_config()
    config.run.update(input_workers=workers, input_threads=1)
    config.data.update(batch_size=2)
    return iter(make_pipeline(config))


def test_killed_worker_is_replaced_and_no_batch_is_lost_or_read_twice(told):
    straight = _stream(0)
    wanted = [next(straight)["record"].tolist() for _ in range(40)]
    stream = _stream(2)
    found = [next(stream)["record"].tolist() for _ in range(3)]
    victim = multiprocessing.active_children()[-1]
    os.kill(victim.pid, signal.SIGKILL)
    found += [next(stream)["record"].tolist() for _ in range(37)]
    stream.close()
    np.testing.assert_array_equal(found, wanted)
    assert ["exit code -9" in line and "all are started again" in line for line in told] == [True]


def test_workers_that_go_on_dying_end_the_run(told, monkeypatch):
    monkeypatch.setattr(pipeline, "MAX_RESTARTS", 0)
    stream = _stream(2)
    next(stream)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"exit code -9.*after 0 restarts"):
        collections.deque(stream, maxlen=0)


def test_storage_that_hangs_is_told_while_it_does(told, monkeypatch):
    monkeypatch.setattr(pipeline, "_TELL_EVERY_S", 0.1)
    load = pipeline.LoadViews.random_map

    def slow(self, element, rng):
        time.sleep(0.5)
        return load(self, element, rng)

    monkeypatch.setattr(pipeline.LoadViews, "random_map", slow)
    stream = _stream(0)
    next(stream)
    stream.close()
    assert len(told) >= 3
    assert "does the storage of the sources hang?" in told[0]
