"""benchmarks/gpu.py as it runs on a CPU: every part, every reason, and that wrong numbers and errors are told."""

import contextlib
import importlib.util
import io
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks import contest, gpu, gpu_kernels, gpu_torch
from benchmarks.contest import Contestant, Prepared, Report
from skysense_jax.models import swin
from skysense_jax.sharding import unbox

PASSES = ("forward", "forward + backward")
ABSENT = {
    ("window", "torch flex"): "flex attention needs CUDA",
    ("global", "cudnn"): "cuDNN needs an NVIDIA GPU; this is cpu",
    ("global", "cudnn without mask"): "cuDNN needs an NVIDIA GPU; this is cpu",
    ("backbone", "cudnn"): "config.efficiency.attention: got 'cudnn' on cpu",
    ("backbone", "cudnn+triton"): "config.efficiency.attention: got 'cudnn+triton' on cpu",
}
HERE = {
    ("matmul", "xla"),
    ("matmul", "torch"),
    ("window", "xla"),
    ("window", "triton interpreted"),
    ("window", "torch sdpa"),
    ("window", "torch sdpa alone"),
    ("global", "xla"),
    ("global", "torch sdpa"),
    ("backbone", "xla"),
    ("backbone", "triton interpreted"),
    ("backbone", "torch"),
    ("step", "auto: xla, in windows xla"),
}


def _rows(text):
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    lines = [dict(zip(contest.COLUMNS, line, strict=True)) for line in lines]
    return [row for row in lines if row["part"] != "part"]


def _run(*argv):
    """The exit code and what was printed; one thread for PyTorch, whose threads and XLA's wait for each other."""
    printed, threads = io.StringIO(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stdout(printed):
            code = gpu.main(["--tiny", *argv])
    finally:
        torch.set_num_threads(threads)
    return code, printed.getvalue()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    code, text = _run(f"--trace={tmp_path_factory.mktemp('trace')}")
    assert code == 0, text
    return text, _rows(text)


def test_tiny_run_has_every_part_case_and_contestant(tiny):
    text, rows = tiny
    assert {(row["part"], row["contestant"]) for row in rows} == HERE | ABSENT.keys()
    cases = {part: {row["case"] for row in rows if row["part"] == part} for part in ("window", "global")}
    assert len(cases["window"]) == 2
    assert sum("shifted" in case for case in cases["window"]) == 1
    assert len(cases["global"]) == 2
    for part, names in cases.items():
        for case in names:
            assert {row["pass"] for row in rows if (row["part"], row["case"]) == (part, case)} == set(PASSES)
    assert text.rstrip().endswith("0 failed")


def test_tiny_run_has_figures_that_fit_each_other(tiny):
    first = {}
    for row in (row for row in tiny[1] if (row["part"], row["contestant"]) in HERE):
        key = row["part"], row["case"], row["pass"]
        milliseconds, speed, rate = (float(row[name]) for name in ("ms", "speed / first", "TFLOP/s"))
        assert all(math.isfinite(x) and x > 0 for x in (milliseconds, speed, rate)), row
        assert speed == pytest.approx(first.setdefault(key, milliseconds) / milliseconds, rel=2e-3)
        if row["part"] != "matmul":
            share = float(row["of matmul"])
            assert math.isfinite(share), row
            assert share > 0, row
        if row["part"] in ("backbone", "step"):
            samples = float(row["further"].split(" samples/s")[0])
            assert samples == pytest.approx(2 / (milliseconds / 1e3), rel=0.01)
            assert ("GiB" in row["further"]) == (row["contestant"] != "torch")
    assert len(first) == 2 + 2 * 2 + 2 * 2 + 1 + 1


def test_tiny_run_tells_where_a_traced_step_spends_its_time(tiny):
    table = tiny[0].partition(".xplane.pb: device time of a step, mean of 2 steps on 1 devices")[2]
    parts = {line[2:36].strip(): float(line[36:46]) for line in table.splitlines()[1:7]}
    assert parts["compute"] > 0
    of_step = ("compute", "exchanges not hidden by compute", "copies, feeds and nothing else", "idle")
    assert sum(parts[name] for name in of_step) == pytest.approx(parts["step"], abs=0.02)


def test_tiny_run_says_why_a_contestant_is_absent(tiny):
    for row in (row for row in tiny[1] if (row["part"], row["contestant"]) in ABSENT):
        assert row["ms"].startswith(f"not here: {ABSENT[row['part'], row['contestant']]}"), row
        assert {row[name] for name in contest.COLUMNS[5:]} == {"-"}


def test_tiny_run_names_the_machine(tiny):
    facts = dict(line.split(maxsplit=1) for line in tiny[0].partition("\n#")[0].splitlines())
    assert facts["command"].startswith("python -m benchmarks.gpu --tiny --trace=")
    assert facts["device"] == "cpu, cpu"
    assert f"jax {jax.__version__}" in facts["packages"]
    assert facts["torch"].startswith(torch.__version__)
    assert "1 repeats" in facts["sizes"]
    assert facts["commit"]


def test_window_kernel_that_forgets_the_shift_is_refused(monkeypatch):
    right = gpu_kernels.kernel_window
    monkeypatch.setattr(gpu_kernels, "_TINY_WINDOW_CASES", ((1, True),))
    monkeypatch.setattr(gpu_kernels, "kernel_window", lambda *args, **how: right(*args, **how | dict(shifted=False)))
    code, text = _run("--parts=window")
    assert code == 1
    rows = [row for row in _rows(text) if row["part"] == "window"]
    assert {row["ms"].partition(":")[0] for row in rows if row["contestant"] == "triton interpreted"} == {
        "REFUSED, wrong numbers"
    }
    assert all(float(row["ms"]) > 0 for row in rows if row["contestant"] in ("xla", "torch sdpa", "torch sdpa alone"))
    assert "2 failed\nFAILED window, stage 1" in text


def test_torch_that_is_missing_or_wrong_has_rows_that_say_so(monkeypatch):
    monkeypatch.setattr(gpu_torch, "rotate", lambda x, cos, sin: x)
    code, text = _run("--parts=global")
    told = [row["ms"] for row in _rows(text) if (row["part"], row["contestant"]) == ("global", "torch sdpa")]
    assert code == 1
    assert len(told) == 4
    assert all(ms.startswith("REFUSED, wrong numbers: ") for ms in told)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else real(name, *rest))
    code, text = _run("--parts=global")
    rows = [row for row in _rows(text) if row["contestant"].startswith("torch")]
    assert code == 0
    assert {row["part"] for row in rows} == {"matmul", "global"}
    assert {row["ms"] for row in rows} == {"not here: torch is not installed"}


# ---- the contest


def _contest(capsys, contestants, **how):
    report = Report(repeats=3, seconds=1e-4)
    results = report.contest("work", "case", "forward", contestants, flops=1e6, **how)
    return report, results, {row["contestant"]: row for row in _rows(capsys.readouterr().out)}


def _gives(name, x):
    return Contestant(name, lambda: Prepared(lambda: {"out": x}))


WANTED = np.random.default_rng(0).normal(size=(40, 50)).astype(np.float32)


def test_contestant_that_fails_is_told_in_a_short_row_and_the_rest_go_on(capsys):
    def fails():
        raise RuntimeError("INTERNAL: no | such kernel " + "x" * 200 + "\nsecond line")

    def runs_out():
        started.append(None)
        if len(started) > 2:
            raise RuntimeError("RESOURCE_EXHAUSTED: while it is timed")
        return {"out": WANTED}

    started = []
    contestants = [
        _gives("plain", WANTED),
        Contestant("broken", fails),
        Contestant("late", lambda: Prepared(runs_out)),
        _gives("good", WANTED),
    ]
    report, results, rows = _contest(capsys, contestants, reference=lambda: {"out": WANTED})
    assert rows["broken"]["ms"].startswith("failed: RuntimeError: INTERNAL: no / such kernel xxx")
    assert len(rows["broken"]["ms"]) == len("failed: ") + 120
    assert rows["late"]["ms"] == "failed: RuntimeError: RESOURCE_EXHAUSTED: while it is timed"
    assert [len(report.failures), math.isnan(results["late"].seconds)] == [2, True]
    assert results["good"].seconds > 0
    assert float(rows["good"]["speed / first"]) == pytest.approx(
        results["plain"].seconds / results["good"].seconds, rel=1e-3
    )


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        (lambda x: x + 0.005 * np.abs(x).max(), False),
        (lambda x: x + 0.02 * np.abs(x).max(), True),
        (lambda x: np.where(np.arange(x.size).reshape(x.shape) % 20 == 0, -x, x), True),  # one number in twenty
        (lambda x: np.where(np.arange(x.size).reshape(x.shape) == 7, np.nan, x), True),
        (lambda x: x[:-1], True),
    ],
)
def test_results_that_rounding_does_not_explain_are_refused(capsys, change, refused):
    contestants = [_gives("plain", WANTED), _gives("other", change(WANTED).astype(np.float32))]
    report, results, rows = _contest(capsys, contestants, reference=lambda: {"out": WANTED})
    assert bool(report.failures) == refused == rows["other"]["ms"].startswith("REFUSED, wrong numbers: ")
    assert math.isnan(results["other"].seconds) == refused


def test_without_a_reference_that_works_nothing_is_timed(capsys):
    def broken():
        raise ValueError("no memory for it")

    report, results, rows = _contest(capsys, [_gives("plain", WANTED)], reference=broken)
    assert rows["plain"]["ms"] == "failed: fp32 reference: ValueError: no memory for it"
    assert len(report.failures) == 1
    report, results, rows = _contest(capsys, [_gives("plain", WANTED)], reference=lambda: {"another": WANTED})
    assert "results ['out']; wanted some of ['another']" in rows["plain"]["ms"]
    assert math.isnan(results["plain"].seconds)


def test_batch_that_does_not_fit_is_no_failure_where_a_smaller_one_is_tried(capsys):
    def full():
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    for may, wanted in ((True, "does not fit"), (False, "failed")):
        report, results, _ = _contest(capsys, [Contestant("step", full)], may_not_fit=may)
        assert results["step"].told == f"{wanted}: RuntimeError: RESOURCE_EXHAUSTED: Out of memory"
        assert len(report.failures) == (not may)


def test_lines_are_there_as_they_are_printed(monkeypatch):
    class Watched(io.StringIO):
        def flush(self):
            flushed.append(self.getvalue())

    flushed = []
    monkeypatch.setattr(sys, "stdout", Watched())
    Report(repeats=1, seconds=1.0).say("a line")
    assert flushed == ["a line\n"]


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--parts=window,wrong"], "--parts: got wrong; wanted some of window,global,backbone,step"),
        (["--pixels=100"], "--pixels: got 100; wanted a multiple of 128"),
        (["--repeats=0"], "--repeats: got 0; wanted more than 0"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(capsys, argv, told):
    with pytest.raises(SystemExit):
        gpu.main(argv)
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("shifted", [False, True])
def test_plain_windows_are_those_of_the_network(shifted):
    rng = np.random.default_rng(1)
    maps = jnp.asarray(rng.normal(size=(2, 3, 8, 12, 32)), jnp.float32)
    seen = jnp.asarray(rng.random(maps.shape[:-1]) < 0.8)
    block, how = swin.WindowAttention(head_width=16), dict(seen=seen, window=4, shifted=shifted)
    params = unbox(block.init(jax.random.key(0), maps, **how))["params"]
    for name in ("query", "key", "value", "output"):
        params[name]["kernel"] = jnp.eye(32)
    bias = swin.PositionBias(2).apply({"params": params["position_bias"]}, 4)
    inputs = dict(query=maps, key=maps, value=maps, bias=bias, scale=jnp.exp(params["logit_scale"]))
    got = gpu_kernels.plain_window(inputs, {"seen": seen}, shifted=shifted, head_width=16, window=4)
    some = seen[..., None]  # a token that may look at none gets anything
    np.testing.assert_allclose(got * some, block.apply({"params": params}, maps, **how) * some, atol=1e-5)
