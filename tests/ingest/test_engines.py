"""Shards made by Apache Beam and by processes of this machine: the same bytes, after kills and in buckets too."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from etils import epath

from skysense_jax.ingest import beam, build, engines, folder, plan
from tests.ingest import earth

ROOT = pathlib.Path(__file__).parents[2]
IN_THIS_PROCESS = ("--", "--direct_running_mode=in_memory")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Two products and a radar image of 4 x 4 places of 160 m, and their manifest."""
    root = tmp_path_factory.mktemp("engines")
    for day in ("20220601", "20220611"):
        earth.write_safe(root / "s2", day=day, side_m=640, west=earth.WEST, north=earth.NORTH)
    earth.write_radar(root / "s1" / "a.tif", side_m=640, west=earth.WEST, north=earth.NORTH)
    source = '[[source]]\nname = "{0}"\nkind = "{1}"\nfiles = "{2}"\nlicence = "Copernicus"\n'
    (root / "list.toml").write_text(
        source.format("optical", "s2_safe", "s2/*.SAFE") + source.format("radar", "s1", "s1/*.tif")
    )
    choice = ["--cells", "16", "--require", "s2", "--block_km", "0.3", "--validation_share", "0.5"]
    plan.main(["--sources", str(root / "list.toml"), "--out", str(root / "manifest"), *choice])
    return root


@pytest.fixture(scope="module")
def local(archive):
    _build(archive, archive / "local")
    return _files(archive / "local")


def _arguments(archive, out, *flags):
    return ["--manifest", str(archive / "manifest"), "--out", str(out), "--places_per_shard=1", "--workers=1", *flags]


def _build(archive, out, *flags):
    build.main(_arguments(archive, out, *flags))


def _start(archive, out, *flags):
    command = [sys.executable, "-m", "skysense_jax.ingest.build", *_arguments(archive, out, *flags)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return subprocess.Popen(command, cwd=out.parent, env=environ, start_new_session=True, **quiet)


def _files(out):
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def _die(shard):
    os._exit(1)


def _made(out):
    return len(list((out / folder.PARTS).glob("*.json")))


def test_beam_writes_every_file_as_processes_of_this_machine_do(archive, local, tmp_path):
    shards = [name for name in local if name.endswith(".array_record")]
    assert sorted(name.partition("-")[0] for name in shards) == ["train"] * 6 + ["validation"] * 2
    run = _start(archive, tmp_path / "out", "--engine=beam", "--workers=2")
    assert run.wait(timeout=240) == 0
    assert _files(tmp_path / "out") == local


def test_what_beam_left_when_it_was_killed_is_finished_by_either(archive, local, tmp_path):
    """Its workers are not killed with it: they write on, and may end inside a file, which the next build clears."""
    out = tmp_path / "out"
    run = _start(archive, out, "--engine=beam", "--workers=2")
    while run.poll() is None and not _made(out):
        time.sleep(0.002)
    run.kill()
    assert run.wait() == -signal.SIGKILL
    assert 1 <= _made(out) < 8
    shutil.copytree(out, tmp_path / "other", ignore=shutil.ignore_patterns("*.incomplete-*"))
    _build(archive, out)
    _build(archive, tmp_path / "other", "--engine=beam", *IN_THIS_PROCESS)
    deadline = time.monotonic() + 60
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(run.pid, 0)  # as long as a worker is there
            time.sleep(0.1)
    assert time.monotonic() < deadline
    _build(archive, out)
    assert _files(out) == local
    assert _files(tmp_path / "other") == local


def test_file_out_of_reach_of_beam_is_listed_and_asked_for_again_by_either(archive, local, tmp_path, capsys):
    product = next((archive / "s2").glob("*20220601*"))
    product.rename(archive / "away")
    try:
        _build(archive, tmp_path / "out", "--engine=beam", *IN_THIS_PROCESS)
    finally:
        (archive / "away").rename(product)
    told = [json.loads(line)["reason"] for line in (tmp_path / "out" / plan.REJECTED).read_text().splitlines()]
    assert len(told) == 8
    assert all(reason.startswith("unreachable: ") for reason in told)
    said = capsys.readouterr().err.splitlines()  # start and end alone
    assert said[0] == "8 places in 8 shards are planned"
    assert said[-1].startswith("made 8 of 8 shards in ")
    assert not any(" samples, " in line for line in said)
    _build(archive, tmp_path / "out")
    assert _files(tmp_path / "out") == local


def test_bucket_holds_what_a_folder_does(archive, local, emulator):
    bucket = epath.Path("gs://bucket/ingest")
    for name in ("places.parquet", "acquisitions.parquet", "labels.parquet", "sources.json", "rejected.jsonl"):
        (bucket / "manifest" / name).write_bytes((archive / "manifest" / name).read_bytes())
    arguments = ["--manifest", str(bucket / "manifest"), "--out", str(bucket / "out"), "--places_per_shard=1"]
    build.main([*arguments, "--engine=beam", *IN_THIS_PROCESS])
    names = [name for name in local if name != folder.LOCK]
    assert {name: (bucket / "out" / name).read_bytes() for name in names} == {name: local[name] for name in names}
    (bucket / "out" / "train-00000-of-00006.array_record").unlink()
    build.main([*arguments, "--workers=1"])
    assert {name: (bucket / "out" / name).read_bytes() for name in names} == {name: local[name] for name in names}


def test_workers_that_have_one_shard_at_once_leave_one_whole_shard(archive, local, tmp_path):
    out = epath.Path(tmp_path / "out")
    (out / folder.PARTS).mkdir(parents=True)
    shard = build.Builder(archive / "manifest", places_per_shard=1, min_clear_share=0.1).shards[0]

    def work(_):
        folder.write_shard(build.Builder(archive / "manifest", places_per_shard=1, min_clear_share=0.1), shard, out)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(12)))
    written = _files(tmp_path / "out")
    assert len(written) == 4  # records, figures, counts, what was said of them
    assert written == {name: local[name] for name in written}


def test_shard_of_which_two_workers_made_different_things_is_made_again(archive, local, tmp_path, monkeypatch):
    """One worker is overtaken between its records and what it says of them by another, for whom a source is away."""
    out = epath.Path(tmp_path / "out")
    (out / folder.PARTS).mkdir(parents=True)
    maker = build.Builder(archive / "manifest", places_per_shard=1, min_clear_share=0.1)
    away = build.Builder(archive / "manifest", places_per_shard=1, min_clear_share=0.1)
    away.rows = [row for row in away.rows if row.name != "s1"]
    shard, put = maker.shards[0], folder.put

    def overtaken(path, write):
        if path.suffix == when:
            monkeypatch.setattr(folder, "put", put)
            folder.write_shard(away, shard, out)
        return put(path, write)

    for when in (".npz", ".parquet", ".json"):
        monkeypatch.setattr(folder, "put", overtaken)
        with pytest.raises(OSError, match="another worker made something else of it"):
            folder.write_shard(maker, shard, out)
        assert folder.to_make(out, [shard]) == [shard], when
    folder.write_shard(maker, shard, out)
    assert folder.to_make(out, [shard]) == []
    written = _files(tmp_path / "out")
    assert written == {name: local[name] for name in written}


def test_processes_end_with_a_parent_that_is_killed(archive, local, tmp_path):
    out = tmp_path / "out"
    run = _start(archive, out, "--workers=2")
    while run.poll() is None and not _made(out):
        time.sleep(0.002)
    run.kill()
    assert run.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 30
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(run.pid, 0)
            time.sleep(0.05)
    assert time.monotonic() < deadline
    assert _made(out) < 8
    _build(archive, out)
    assert _files(out) == local


def test_shard_that_is_not_that_of_its_part_is_made_again(archive, local, tmp_path):
    out = tmp_path / "out"
    _build(archive, out)
    first, second, *_ = sorted(out.glob("train-*"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    parts = out / folder.PARTS
    (parts / "train-00002-of-00006.json").write_text("")  # as a loss of power leaves a file
    (parts / "train-00003-of-00006.npz").unlink()
    (parts / "train-00004-of-00006.parquet").write_bytes(b"")
    maker = build.Builder(archive / "manifest", places_per_shard=1, min_clear_share=0.1)
    with pytest.raises(OSError, match=r"train-00000-of-00006.array_record is not whole"):
        folder.finish(maker, epath.Path(out))
    assert [shard.number for shard in folder.to_make(epath.Path(out), maker.shards)] == [0, 1, 2, 3, 4]
    _build(archive, out)
    assert _files(out) == local


@pytest.mark.parametrize("name", ["train-00000-of-00001.array_record", "train-00000-of-00001.parquet"])
def test_what_is_unfinished_has_no_name_that_readers_look_for(name, tmp_path):
    def write(path):
        path.write_text("half")
        assert [found.name for found in tmp_path.iterdir()] == [path.name]
        assert not list(tmp_path.glob(f"*{pathlib.Path(name).suffix}"))

    assert folder.put(epath.Path(tmp_path / name), write) == hashlib.sha256(b"half").digest()
    assert [found.name for found in tmp_path.iterdir()] == [name]


def test_facts_that_are_damaged_are_told(archive, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / folder.FACTS).write_text("")
    with pytest.raises(SystemExit):
        _build(archive, tmp_path / "out")
    assert "build.json is damaged" in capsys.readouterr().err


def test_disk_that_is_full_ends_a_beam_build_with_words(archive, tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "write_shard", full)
    with pytest.raises(SystemExit):
        _build(archive, tmp_path / "out", "--engine=beam", *IN_THIS_PROCESS)
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: Apache Beam: OSError: [Errno 28] No space left on device")
    assert told.endswith("What is whole stays; the same command goes on")


def _no_maker():
    if multiprocessing.parent_process():
        raise ValueError("a mount that is not there yet")
    return build.Builder(_no_maker.manifest, places_per_shard=1, min_clear_share=0.1)


def test_process_that_cannot_make_its_maker_says_why(archive, tmp_path):
    _no_maker.manifest = archive / "manifest"
    out = engines.folder.directory(tmp_path / "out", flag="--out")
    with pytest.raises(ValueError, match="a mount that is not there yet"):
        engines.build(_no_maker, out, facts={}, engine=engines.Engine(workers=2))


class _Job:
    """A job of a runner whose errors have a class of their own, as those of Dataflow."""

    def __init__(self, error):
        self._error = error

    def wait_until_finish(self):
        raise self._error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (Exception("Dataflow pipeline failed. State: FAILED, Error:\nno quota"), "Apache Beam: no quota"),
        (
            Exception("Dataflow pipeline failed. State: CANCELLED\nNone"),
            "Apache Beam: Dataflow pipeline failed. State: CAN",
        ),
        (Exception(), "Apache Beam: Exception"),
        (ValueError("no such runner"), "no such runner"),
    ],
)
def test_job_that_fails_on_a_cluster_ends_a_build_with_words(archive, tmp_path, monkeypatch, capsys, error, told):
    monkeypatch.setattr(beam.apache_beam.Pipeline, "run", lambda self: _Job(error))
    with pytest.raises(SystemExit):
        _build(archive, tmp_path / "out", "--engine=beam", *IN_THIS_PROCESS)
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {told}")


def test_process_that_is_killed_ends_a_build_with_words(archive, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engines, "_write_one", _die)
    with pytest.raises(SystemExit):
        _build(archive, tmp_path / "out", "--workers=2")
    assert "a process was killed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--", "--runner=FlinkRunner"], "got --runner=FlinkRunner; wanted --engine=beam"),
        (["--engine=beam", "--runner=FlinkRunner"], "unrecognized arguments: --runner=FlinkRunner"),
        (["--engine=beam", "--", "--runer=FlinkRunner"], "Apache Beam has no flag --runer"),
        (["--engine=beam", "--", "--runner=Flank"], "Flank"),
        (["--engine=spark"], "invalid choice: 'spark'"),
        (["--workers=0"], "--workers: got 0; wanted 1 or more"),
        (["--out=s3://bucket/x"], "--out: got s3://bucket/x: only gs:// is read without mounting"),
        (["--manifest=nowhere"], "nowhere has no places.parquet"),
    ],
)
def test_wrong_flags_end_with_words(archive, tmp_path, capsys, flags, told):
    with pytest.raises(SystemExit):
        _build(archive, tmp_path / "out", *flags)
    assert told in capsys.readouterr().err.splitlines()[-1]


def test_runners_of_clusters_ask_their_server_what_a_flag_means():
    """What this machine's Beam does not know of Flink's flags must not end the build."""
    flags = ("--runner=FlinkRunner", "--flink_master=x:1", "--parallelism_of_flink=4")
    options = beam.options_of(engines.Engine("beam", 1, flags))
    assert options.get_all_options(retain_unknown_options=True)["parallelism_of_flink"] == "4"


def test_machine_without_beam_says_what_to_install(archive, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    monkeypatch.delitem(sys.modules, "skysense_jax.ingest.beam")
    monkeypatch.delattr("skysense_jax.ingest.beam")
    with pytest.raises(SystemExit):
        _build(archive, tmp_path / "out", "--engine=beam")
    assert "--engine=beam needs: pip install --editable '.[beam]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
