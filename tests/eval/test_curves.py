"""Reading of metrics with gaps, and that a picture comes out of whatever a run has logged."""

import json

import numpy as np

from skysense_jax.eval import curves


def _write(path, records, tail=""):
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return path


def test_read_metrics_with_gaps_and_nulls_puts_nan_where_nothing_is(tmp_path):
    records = [
        {"step": 10, "time": 1.5, "loss": 2.0},
        {"step": 20, "time": 2.5, "loss": None, "nonfinite": {"loss": "nan"}, "experts/0": 0.25},
    ]
    series = curves.read_metrics(_write(tmp_path / "m.jsonl", records, tail='{"step": 30, "lo'))
    assert set(series) == {"step", "time", "loss", "experts/0"}
    np.testing.assert_array_equal(series["step"], [10, 20])
    np.testing.assert_array_equal(series["loss"], [2.0, np.nan])
    np.testing.assert_array_equal(series["experts/0"], [np.nan, 0.25])


def test_pictures_of_a_run_without_experts_are_curves_only(tmp_path):
    path = _write(
        tmp_path / "m.jsonl",
        [{"step": s, "loss": 1 / s, "mgcl/fused_pixel": s, "gradient_norm": None} for s in (1, 2, 3)],
    )
    assert curves.curves_picture(tmp_path / "curves.png", path).stat().st_size > 5000
    assert curves.expert_picture(tmp_path / "experts.png", path) is None
    assert not (tmp_path / "experts.png").exists()


def test_curves_leave_out_steps_whose_batch_had_none_of_the_features(tmp_path, monkeypatch):
    numbers = {"mgcl/pan_pixel": [4.0, 0.0, 3.0], "target_entropy/pan_pixel": [2.0, 0.0, 1.0], "loss": [0.0, 1.0, 0.0]}
    records = [{"step": i + 1, **{key: values[i] for key, values in numbers.items()}} for i in range(3)]
    drawn = []
    save = lambda figure, path: drawn.extend(line.get_xdata().tolist() for a in figure.axes for line in a.lines)  # noqa: E731
    monkeypatch.setattr(curves, "save", save)
    curves.curves_picture(tmp_path / "curves.png", _write(tmp_path / "m.jsonl", records))
    assert drawn == [[1, 2, 3], [1, 3], [1, 3]]


def test_pictures_of_an_empty_run_are_none(tmp_path):
    assert curves.curves_picture(tmp_path / "curves.png", _write(tmp_path / "m.jsonl", [])) is None


def test_expert_picture_of_two_blocks_is_written(tmp_path):
    records = [
        {"step": s, **{f"experts/load_block{b}_expert{e}": 0.1 * e for b in range(2) for e in range(4)}}
        for s in (10, 20)
    ]
    assert curves.expert_picture(tmp_path / "e.png", _write(tmp_path / "m.jsonl", records)).stat().st_size > 5000
