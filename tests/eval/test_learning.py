"""The table of benchmarks/learning.py from stored figures: means, paired differences, verdicts."""

import json
import pathlib
import types

import pytest
from loading import module_from_file

from configs import tiny


@pytest.fixture(scope="module")
def learning():
    return module_from_file(pathlib.Path(__file__).parents[2] / "benchmarks" / "learning.py")


def _cells(seeds, **miou):
    scores = {f"{task}/{metric}": value for task, value in miou.items() for metric in ("miou", "accuracy")}
    run = {"minutes": 9.5, "process_minutes": 11.25, "steps": 70}
    return {s: {"scores": {k: v + 0.02 * s for k, v in scores.items()}, **run} for s in seeds}


@pytest.fixture
def cells():
    return {
        "raw": _cells([0], osm=0.20, crop_type=0.3, roof_material=0.4, forest_type=0.5),
        "untrained": _cells([0, 1, 2], osm=0.20, crop_type=0.3, roof_material=0.4, forest_type=float("nan")),
        "ita_off": _cells([0, 1], osm=0.24, crop_type=0.2, roof_material=0.46, forest_type=float("nan")),
        "ita_on": _cells([0, 1], osm=0.31, crop_type=0.3, roof_material=0.4, forest_type=0.5),
    }


def test_differences_are_paired_by_seed_and_leave_out_seeds_that_lack_one(learning, cells):
    assert learning.differences(cells, "ita_off", "osm") == pytest.approx([0.04, 0.04])


def test_report_says_which_of_the_wanted_gains_are_met(learning, cells):
    text = learning.report(cells)
    assert "| osm | 20.0 | 22.0 ± 2.0 | 25.0 ± 1.4 | 32.0 ± 1.4 | 4.0 ± 0.0 | 11.0 ± 0.0 |" in text
    assert "L_ITA off, osm: +4.0 points mIoU, wanted +5: NOT met" in text
    assert "L_ITA off, roof_material: +6.0 points mIoU, wanted +5: met" in text
    assert "L_ITA on, osm: +11.0 points mIoU, wanted +10: met" in text
    assert "4 runs of 70 steps, 9.5 to 9.5 minutes of training (at most 11.2" in text


def test_report_of_a_part_of_the_columns_gives_no_verdict(learning, cells):
    text = learning.report({name: cells[name] for name in ("raw", "ita_on")})
    assert "wanted" not in text
    assert "| osm | 20.0 | 32.0 ± 1.4 |" in text


def test_parse_keeps_columns_in_order_and_refuses_no_seed(learning, tmp_path):
    args = learning.parse([f"--out={tmp_path}", "--only=ita_on", "--only=raw"])
    assert args.only == ["raw", "ita_on"]
    with pytest.raises(SystemExit):
        learning.parse([f"--out={tmp_path}", "--seeds=0"])


def test_minutes_of_training_leave_out_the_time_between_two_processes(learning, tmp_path, monkeypatch):
    lines = [
        {"step": 1, "time": 0.0},
        {"step": 5, "time": 40.0, "step_seconds": 6.0},
        {"step": 6, "time": 9000.0},  # the next morning
        {"step": 10, "time": 9040.0, "step_seconds": 9.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(learning.subprocess, "run", lambda *args, **how: types.SimpleNamespace(returncode=0))
    found = learning.train(tiny.get_config(), "configs/tiny.py", tmp_path, tmp_path / "records")
    assert found["minutes"] == pytest.approx((4 * 6 + 4 * 9) / 60)
