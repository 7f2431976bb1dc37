"""What the report says of hosts that differ: every line names process, host, what was got and what was wanted."""

import pathlib

import pytest

from skysense_jax import storage
from skysense_jax.launch import facts, report


@pytest.fixture
def files(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.array_record").write_bytes(b"x" * (i + 1))
    return tmp_path


def _facts(files, *, hosts=("a", "b", "c")):
    known = facts.collect(
        config_text="name = 'x'\noptim.learning_rate = 0.1\n", sources=(str(files / "*.array_record"), "scenes")
    )
    return [{**known, "host": host} for host in hosts]


def _told(everyone, offsets=(0.0, 0.0, 0.0)):
    lines, findings = report.compare(everyone, clock_offsets_s=offsets)
    return report.Report("3 processes", lines, findings).text


def test_equal_hosts_have_a_table_without_findings(files):
    text = _told(_facts(files))
    assert text.splitlines()[0] == "preflight: 3 processes"
    assert [line.split()[0] for line in text.splitlines()[1:]] == [
        "versions",
        "code",
        "config",
        "flags",
        "devices",
        "data",
        "clocks",
    ]
    assert all(" ok " in line for line in text.splitlines()[1:])
    assert "3 files" in text


def test_other_version_names_host_got_wanted_and_remedy(files):
    everyone = _facts(files)
    wanted = everyone[0]["versions"]["jax"]
    everyone[2]["versions"] = {**everyone[2]["versions"], "jax": "0.1.2"}
    text = _told(everyone)
    assert f"versions: process 2 on c: jax: got 0.1.2; wanted {wanted}. Install the same version" in text
    assert sum("FAILED" in line for line in text.splitlines()) == 1


def test_most_hosts_are_right_also_against_process_zero(files):
    everyone = _facts(files)
    everyone[0]["code"] = "0.0.0 abc"
    assert "code: process 0 on a: skysense_jax 0.0.0 abc; wanted" in _told(everyone)


def test_other_config_names_the_field(files):
    everyone = _facts(files)
    everyone[1]["config"] = "name = 'x'\noptim.learning_rate = 0.2\n"
    assert "config: process 1 on b: config.optim.learning_rate: got 0.2; wanted 0.1. Start every" in _told(everyone)


def test_other_flags_are_named_but_for_those_of_one_host(files, monkeypatch):
    everyone = _facts(files)
    monkeypatch.setenv("XLA_FLAGS", "--xla_b=1 --xla_dump_to=here --xla_a=2 --xla_force_host_platform_device_count=3")
    everyone[1]["flags"] = _facts(files)[0]["flags"]
    assert everyone[1]["flags"]["XLA_FLAGS"] == "--xla_a=2 --xla_b=1"
    assert "flags: process 1 on b: environment variable XLA_FLAGS: got '--xla_a=2 --xla_b=1'" in _told(everyone)


def test_missing_unreadable_and_other_files_are_told(files, tmp_path_factory):
    everyone = _facts(files)
    pattern = str(files / "*.array_record")
    empty, other, fewer = (tmp_path_factory.mktemp("elsewhere") for _ in range(3))
    for name, size in (("0", 1), ("1", 2), ("z", 3)):
        (other / f"{name}.array_record").write_bytes(b"x" * size)
    (fewer / "0.array_record").write_bytes(b"x")
    for folder, told in (
        (empty, "no file matches; wanted files this host can read"),
        (other, "as many files and bytes, but other names or sizes"),
        (fewer, "1 files of 1 bytes; wanted 3 of 6"),
    ):
        everyone[1]["sources"] = {pattern: facts.source_facts(str(folder / "*.array_record"))}
        text = _told(everyone)
        assert f"data: process 1 on b: config.data.sources: {pattern!r}: {told}" in text


def test_file_that_cannot_be_opened_is_a_problem(tmp_path):
    (tmp_path / "a.array_record").symlink_to(tmp_path / "gone")
    assert facts.source_facts(str(tmp_path / "*.array_record"))["problem"].endswith("No such file or directory")


def test_clock_that_is_off_is_named_also_that_of_process_zero(files):
    assert "clocks: process 1 on b: 60.9 s ahead of the others; wanted at most 5" in _told(
        _facts(files), (0.0, 61.0, 0.1)
    )
    assert "clocks: process 0 on a: 60.0 s behind the others" in _told(_facts(files), (0.0, 60.0, 60.1))


def test_devices_fewer_or_of_another_kind_are_named():
    found = report.device_findings({0: 8, 1: 7, 2: 8}, ["a", "b", "c"], wanted=None, kinds={0: "H100", 1: "H100"})
    assert [(f.process_id, f.host) for f in found] == [(1, "b")]
    assert "7 devices; wanted 8 as elsewhere" in found[0].text
    found = report.device_findings({0: 4, 1: 4}, ["a", "b"], wanted=8, kinds={0: "H100", 1: "H200"})
    assert [f.text.split(".")[0] for f in found] == [
        "4 devices; wanted 8 (--devices_per_process)",
        "4 devices; wanted 8 (--devices_per_process)",
        "devices are H200; wanted H100, one kind in a run",
    ]


def test_token_is_seen_where_it_is_and_not_elsewhere(tmp_path):
    token = facts.Token(tmp_path / "run", "t")
    assert token.write() == ""
    assert token.is_there(wait_s=0.0)
    assert not facts.Token(tmp_path, "t").is_there(wait_s=0.3)
    token.remove()
    assert list((tmp_path / "run").iterdir()) == []
    (tmp_path / "file").write_text("")
    assert "Not a directory" in facts.Token(pathlib.Path(tmp_path / "file" / "run"), "t").write()


def test_long_lists_of_findings_are_cut():
    many = [report.Finding("data", i, f"h{i}", "x") for i in range(50)]
    assert report.Report("t", {"data": ""}, many).text.endswith("and 30 more")


@pytest.mark.parametrize("address", ["s3://bucket/run", "az://bucket/run", "gs:/bucket/run", "gs:///run", "gs://"])
def test_other_addresses_are_refused_with_what_to_do(address):
    with pytest.raises(ValueError, match=rf"--workdir: got {address}; wanted gs://bucket/name, or a directory"):
        storage.run_directory(address)
    assert "mount the bucket" in facts.source_facts(f"{address}/*.array_record")["problem"]


def test_directories_are_taken_and_files_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.run_directory("a:b/c") == tmp_path / "a:b" / "c"
    assert str(storage.run_directory("gs://bucket/run")) == "gs://bucket/run"
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--workdir: got the file file"):
        storage.run_directory("file")


def test_host_that_shows_fewer_devices_is_named_before_jax_starts(files):
    everyone = _facts(files)
    for known, count in zip(everyone, (8, 7, 8)):
        known["device_files"] = {"gpu": count}
    assert "devices: process 1 on b: 7 gpu devices in /dev; wanted 8 as elsewhere. Look at" in _told(everyone)


def test_workdir_that_cannot_be_made_is_told_and_nothing_else_is_raised(tmp_path):
    (tmp_path / "file").write_text("")
    token = facts.Token(tmp_path / "file" / "run", "0")
    assert token.write().startswith("Not a directory")
    token.remove()
