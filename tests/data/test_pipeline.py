"""The pipeline: what a batch holds depends on sources, shares, seed and batch size, and on nothing else."""

import collections
import dataclasses
import itertools
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from random_samples import ROWS, make_sample

from configs import tiny
from skysense_jax.data.pipeline import Mix, make_pipeline
from skysense_jax.data.records import ShardWriter, encode_sample

SOURCES = (5, 7, 9)  # records per shard
VIEWS = dict(
    anchor_cells=6,
    tile_cells=3,
    num_global=2,
    global_box_cells=(4, 6),
    global_cells=4,
    num_local=1,
    local_box_cells=(2, 3),
    local_cells=2,
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for shard, count in enumerate(SOURCES):
        with ShardWriter(folder / f"{shard}.array_record") as writer:
            for i in range(count):
                sample = make_sample(100 * shard + i, extent_cells=7, dates=dict(s2=3, s1=2), name=f"{shard}-{i}")
                writer.write(encode_sample(sample, ROWS))
    return folder


def build(folder, *, sources=(("*.array_record", 1.0),), workers=0, threads=2, **arguments):
    defaults = dict(
        modalities=("s2", "s1"),
        new_modalities=(),
        sources=[(name if name == "scenes" else str(folder / name), share) for name, share in sources],
        batch_size=4,
        seed=3,
        num_dates=dict(s2=2, s1=1),
        photometric_strength=1.0,
        day_jitter=3,
        views=VIEWS,
        scenes=dict(num_scenes=3, first_index=0, seed=0, extent_cells=8),
        input_threads=threads,
        input_workers=workers,
    )
    return make_pipeline(**{**defaults, **arguments})


def take(pipeline, count):
    iterator = iter(pipeline)
    batches = list(itertools.islice(iterator, count))
    iterator.close()
    return batches


def flat(tree, path=""):
    for key, value in sorted(tree.items()):
        if isinstance(value, dict):
            yield from flat(value, f"{path}/{key}")
        else:
            yield f"{path}/{key}", np.array(value)


def assert_same(got, wanted):
    assert len(got) == len(wanted)
    for mine, theirs in zip(got, wanted):
        for (path, a), (same, b) in zip(flat(mine), flat(theirs), strict=True):
            assert path == same
            np.testing.assert_array_equal(a, b, err_msg=path)


def records(batches):
    return [int(i) for batch in batches for i in batch["record"]]


def test_pipeline_stream_does_not_depend_on_threads_or_workers(shards):
    wanted = take(build(shards, threads=0), 7)
    assert_same(take(build(shards, threads=5), 7), wanted)
    assert_same(take(build(shards, workers=2), 7), wanted)
    assert wanted[0]["global_views"]["images"]["s2"].shape == (4, 2, 2, 4, 4, 10)


def test_pipeline_every_epoch_is_another_order_of_all_records(shards):
    num_records = sum(SOURCES)
    batches = take(build(shards, batch_size=num_records), 3)
    epochs = [records([batch]) for batch in batches]
    assert [sorted(epoch) for epoch in epochs] == [list(range(num_records))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    affines = [dict(zip(epoch, batch["global_views"]["affine"][:, 0])) for epoch, batch in zip(epochs, batches)]
    moved = [not np.array_equal(affines[0][i], affines[1][i]) for i in range(num_records)]
    assert np.mean(moved) > 0.7  # the crops are drawn anew


def test_pipeline_seed_changes_order_and_crops(shards):
    assert records(take(build(shards), 3)) != records(take(build(shards, seed=4), 3))


def test_pipeline_processes_read_parts_of_the_same_global_batches(shards):
    whole = take(build(shards), 5)
    parts = [take(build(shards, places=places), 5) for places in ((0, 3), (1, 2))]
    for first, second, batch in zip(*parts, whole):
        for (path, a), (_, b), (_, both) in zip(flat(first), flat(second), flat(batch), strict=True):
            np.testing.assert_array_equal(np.stack([a[0], b[0], b[1], a[1]]), both, err_msg=path)


@pytest.mark.parametrize("workers", [0, 2])
def test_pipeline_state_restores_mid_stream_under_other_processes_and_workers(shards, workers):
    wanted = take(build(shards), 6)
    iterator = iter(build(shards, workers=workers))
    for _ in range(3):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    iterator.close()
    restored = iter(build(shards, workers=2 - workers))
    if workers:
        next(restored)  # a running iterator takes the state too
    restored.set_state(state)
    assert_same(list(itertools.islice(restored, 3)), wanted[3:])
    restored.close()
    for index in range(2):
        part = iter(build(shards, places=range(2 * index, 2 * index + 2)))
        part.set_state(state)
        half = slice(2 * index, 2 * index + 2)
        assert records(itertools.islice(part, 3)) == [int(r) for b in wanted[3:] for r in b["record"][half]]
        assert part.get_state() == {"next_index": 24}


def test_pipeline_state_does_not_count_what_was_read_ahead(shards):
    iterator = iter(build(shards, threads=4))
    assert iterator.get_state() == {"next_index": 0}
    next(iterator)
    assert iterator.get_state() == {"next_index": 4}


def test_pipeline_state_of_something_else_is_refused(shards):
    iterator = iter(build(shards))
    for state in ({}, {"next_index": "7"}, {"next_index": -1}, {"last_seen_indices": {"0": 3}}):
        with pytest.raises(ValueError, match="state of the input pipeline: got"):
            iterator.set_state(state)


def test_pipeline_mix_holds_its_shares(shards):
    mixed = build(shards, sources=(("0.array_record", 3), ("2.array_record", 1.0)))
    counts = collections.Counter(index < SOURCES[0] for index in records(take(mixed, 25)))
    assert counts == {True: 75, False: 25}
    assert mixed.describe(4).endswith("0.array_record, record 4")
    assert mixed.describe(5).endswith("2.array_record, record 0")


def test_pipeline_scenes_and_records_mix(shards):
    mixed = build(shards, sources=(("1.array_record", 1.0),))
    sources = (("scenes", 0.5), ("1.array_record", 0.5))
    with_scenes = build(shards, sources=sources)
    batch = take(with_scenes, 1)[0]
    assert sum(int(r) < 3 for r in batch["record"]) == 2
    assert with_scenes.describe(2) == "scenes, scene 2"
    assert with_scenes.reason(2) == ""
    shapes = [{path: value.shape for path, value in flat(b)} for b in (batch, take(mixed, 1)[0])]
    assert shapes[0] == shapes[1]


@pytest.fixture
def damaged(shards, tmp_path):
    """Two shards; in the first, record 2 has a damaged block."""
    path = tmp_path / "0.array_record"
    data = bytearray((shards / "0.array_record").read_bytes())
    data[data.find(b"0-2") + 900] ^= 0xFF
    path.write_bytes(data)
    (tmp_path / "1.array_record").write_bytes((shards / "1.array_record").read_bytes())
    return tmp_path


@pytest.mark.parametrize("workers", [0, 1])
def test_pipeline_bad_record_is_replaced_named_and_explained(shards, damaged, workers):
    sources = (("0.array_record", 1.0), ("1.array_record", 1.0))
    pipeline = build(damaged, sources=sources, workers=workers)
    got, healthy = (take(p, 10) for p in (pipeline, build(shards, sources=sources)))
    bad = [int(i) for batch in got for i in batch["bad_record"]]
    wanted = records(healthy)
    assert wanted.count(2) > 0
    assert bad == [2 if index == 2 else -1 for index in wanted]
    assert records(got) == [3 if index == 2 else index for index in wanted]
    for mine, theirs in zip(got, healthy):  # the others are as if nothing had happened
        good = np.asarray(mine["bad_record"]) < 0
        for (path, a), (_, b) in zip(flat(mine), flat(theirs)):
            if path != "/bad_record":
                np.testing.assert_array_equal(a[good], b[good], err_msg=path)
    assert pipeline.describe(2).endswith("0.array_record, record 2")
    assert "0.array_record, record 2: " in pipeline.reason(2)
    assert pipeline.reason(3) == ""


def test_pipeline_when_nothing_is_readable_stops_with_the_reason(tmp_path):
    with ShardWriter(tmp_path / "0.array_record") as writer:
        for _ in range(3):
            writer.write(b"rubbish")
    with pytest.raises(ValueError, match=r"3 records in a row are unreadable, from .*0\.array_record, record \d on: "):
        next(iter(build(tmp_path)))


def test_pipeline_arguments_that_make_no_sense_are_refused(shards):
    with pytest.raises(ValueError, match=r"empty dataset: no file matches '.*none\.array_record'"):
        build(shards, sources=(("none.array_record", 1.0),))
    with pytest.raises(ValueError, match=r"config\.data\.sources: got 'scenes' .*\('pan',\); wanted .*'s1'"):
        Mix(sources=(("scenes", 1.0),), modalities=[dataclasses.replace(ROWS[0], name="pan")], scenes={})


def test_pipeline_takes_the_data_section_of_a_config(shards):
    data = tiny.get_config().data
    data.sources = ((str(shards / "*.array_record"), 1.0),)
    batch = next(iter(make_pipeline(**data.to_dict(), input_threads=1, input_workers=0)))
    side = 32 * data.views.global_cells
    assert batch["global_views"]["images"]["hr"].shape == (data.batch_size, data.views.num_global, 1, side, side, 3)
    assert not batch["present"]["hr"].any()


def test_pipeline_module_needs_no_jax_and_starts_workers_outside_absl(shards):
    """Worker processes import the module; and a program that parses absl flags after it started them still can."""
    script = f"""
import sys
sys.modules["jax"] = sys.modules["flax"] = None  # an import of either fails
from absl import flags
from skysense_jax.data.pipeline import make_pipeline
flags.DEFINE_integer("mine", 1, "")
assert not flags.FLAGS.is_parsed()
iterator = iter(make_pipeline(
    modalities=("s2",), new_modalities=(), sources=(({str(shards / "0.array_record")!r}, 1.0),), batch_size=2, seed=0,
    num_dates=dict(s2=1), photometric_strength=0.0, day_jitter=0, views={VIEWS!r}, scenes={{}},
    input_threads=1, input_workers=1,
))
assert next(iterator)["present"]["s2"].all()
iterator.close()
flags.FLAGS(["program", "--mine=2"])
assert flags.FLAGS.mine == 2
"""
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
