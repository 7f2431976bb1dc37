"""A run that is killed three times is the one in peace to the last bit; by hand fifty: benchmarks/chaos.py."""

from benchmarks import chaos


def test_run_killed_three_times_equals_the_one_in_peace(tmp_path):
    how = dict(processes=1, steps=45)
    (status,) = chaos.wait(chaos.start("tests/nano.py", tmp_path / "peaceful", **how), 600)
    assert status == 0, (tmp_path / "peaceful-0.log").read_text()[-2000:]
    rows = chaos.chaos("tests/nano.py", tmp_path / "killed", kills=3, longest=15.0, seed=1, **how)
    assert [row["kind"] for row in rows] == ["SIGKILL", "SIGTERM", "SIGKILL"]
    assert not any(row["hung"] or row["unexpected"] for row in rows), rows
    wanted, found = (chaos.last_state(tmp_path / name) for name in ("peaceful", "killed"))
    assert wanted["step"] == 45
    assert sorted(wanted["losses"]) == list(range(1, 46))
    assert found == wanted
