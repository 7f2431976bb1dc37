"""benchmarks/ingest.py on a small ground: every stage has a figure, and a killed build ends as one in peace."""

import re

from benchmarks import ingest

TINY = ["--side_m=1200", "--cells=8"]


def test_every_stage_has_a_figure(capsys):
    ingest.main([*TINY, "--places=2", "--rounds=2"])
    text = capsys.readouterr().out
    assert text.startswith("2 places of 80 m, 2 rounds")
    stages = dict(re.findall(r"^(\w[\w ]*?) +([\d.]+) ms a sample", text, re.MULTILINE))
    assert set(stages) == {"plain loop", "series hr", "series s2", "series s1", "labels", "record"}
    ours = sum(float(stages[f"series {name}"]) for name in ("hr", "s2", "s1"))
    ratio = float(re.search(r"plain loop: ([\d.]+) times as fast", text)[1])
    assert abs(ratio - float(stages["plain loop"]) / ours) < 0.02
    assert len(re.search(r"each round: (.*) GiB", text)[1].split(", ")) == 2


def test_killed_build_ends_as_the_one_in_peace(capsys):
    ingest.main(["--side_m=1200", "--cells=32", "--kills=1"])
    text = capsys.readouterr().out
    assert "killed 1 times" in text
    assert re.search(r"whole builds, all \d\d+ files as those in peace", text)
