"""A run's course in numbers and curves, from what it logged: metrics.jsonl, events.jsonl, probe.json.

Next: report.py; eval/curves.py draws the same numbers as a picture.
"""

import collections
import dataclasses
import datetime
import html
import json
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from skysense_jax.data.scenes import ATTRIBUTES
from skysense_jax.eval.probes import LABELS
from skysense_jax.explain.loading import Run
from skysense_jax.metrics import FILE_NAME, read_json_lines
from skysense_jax.page.charts import Curve, curve_chart
from skysense_jax.page.markup import element, guide, many, table
from skysense_jax.storage import Directory

# Title, unit, which keys (the group is the name), whether the axis begins at 0.
_CHARTS = (
    ("Loss", "weighted sum", r"(loss)", False),
    ("Loss terms", "unweighted", r"loss/(.+)", False),
    ("Linear probe, mean IoU", "0-1", r"probe/(.+)/miou", True),
    ("Nearest neighbours, mean IoU", "0-1", r"probe/(.+)/knn_miou", True),
    ("Linear probe, accuracy", "0-1", r"probe/(.+)/accuracy", True),
    ("Nearest neighbours, accuracy", "0-1", r"probe/(.+)/knn_accuracy", True),
    ("Linear probe, micro mAP, or F1 of change", "0-1", r"probe/(.+)/(?:map_micro|f1)", True),
    ("Nearest neighbours, F1 of change", "0-1", r"probe/(.+)/knn_f1", True),
    ("Learning rate", "", r"(learning_rate)", True),
    ("Spread of features", "0 collapsed, 1 isotropic", r"feature_std/(.+)", True),
    ("Use of the queries", "1: all differ", r"(query_usage)", True),
    ("Targets of the queries: of what they see", "nats", r"(query_content)", True),
    ("Gradient norm", "before clipping", r"(gradient_norm)", True),
    ("Throughput", "samples a second", r"(samples_per_second)", True),
    ("Time a step", "seconds", r"(step|input_wait)_seconds", True),
)
_SCORES = {  # name: in the table, in this order; others follow by their names
    "miou": "mIoU",
    "mf1": "mF1",
    "accuracy": "accuracy",
    "top_5": "top 5",
    "map_micro": "micro mAP",
    "map_macro": "macro mAP",
    "f1": "F1",
    "iou": "IoU",
}
_OF_SCENES = (LABELS, *ATTRIBUTES)  # names that no labelled dataset of a run can have
_EVENTS = {"update skipped": "an update that was skipped", "collapse": "a collapse", "loss spike": "a jump of the loss"}


def read_lines(path: Directory) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, each with its step; none if there is no such file.

    Raises:
      ValueError: it is not one.
    """
    if not path.exists():
        return []
    try:
        lines = read_json_lines(path)
    except ValueError as error:
        raise ValueError(f"RUN: {path} is no file of JSON lines: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise ValueError(f"RUN: {path}, line {number}: wanted an object with a step, as skysense_jax.train writes")
    return lines


@dataclasses.dataclass(frozen=True)
class Probes:
    """What probe.json holds: ``{task/miou, task/accuracy, task/knn_miou, ...}`` per network, behind ``step``.

    Networks are the teacher and, if it was asked for, the untrained one. Tasks are those of procedural scenes and the
    run's labelled datasets.
    """

    step: int
    networks: Mapping[str, Mapping[str, float | None]]

    def along(self, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Logged lines, with a first of the untrained network and a last of the teacher if none is of its step.

        One point alone is no curve: nothing is added to lines without probes if the untrained network was not probed.
        """
        known = {line["step"] for line in lines if any(key.startswith("probe/") for key in line)}
        if not known and "untrained" not in self.networks:
            return lines
        steps = {0: "untrained"} | ({} if self.step in known else {self.step: "teacher"})
        more = [
            {"step": step, **{f"probe/{key}": value for key, value in self.networks[name].items()}}
            for step, name in steps.items()
            if name in self.networks
        ]
        return sorted([*lines, *more], key=lambda line: line["step"])


def read_probes(path: Directory) -> Probes | None:
    """What is in the file; None if there is none.

    Raises:
      ValueError: it is not what train writes.
    """
    if not path.exists():
        return None
    try:
        told = json.loads(path.read_text())
        networks = {name: dict(of) for name, of in told.items() if name != "step"}
        return Probes(int(told["step"]), networks)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"RUN: {path} is not what skysense_jax.train writes: {error!r}") from error


def head(run: Run, lines: list[dict[str, Any]], events: list[dict[str, Any]]) -> str:
    """HTML: what the run is."""
    parts = collections.Counter()
    for name, number in run.parameters.items():
        parts["heads" if name.startswith("heads_") else name] += number
    sizes = ", ".join(f"{name} {number:,}" for name, number in parts.items())
    # Where the files lie is nothing to whom a report is sent.
    short = {name: "/".join(pathlib.PurePosixPath(name).parts[-2:]) for name, _ in run.sources}
    sources = ", ".join(f"{short[name]} (share {share:g})" for name, share in run.sources)
    dates = ", ".join(f"{row.name} ({many(run.model.num_dates[row.name], 'date')})" for row in run.model.rows)
    rows = [
        ["config", html.escape(run.name)],
        ["weights", f"the teacher's behind step {run.model.step:,} of {run.num_steps:,}"],
        ["modalities", html.escape(dates)],
        ["parameters", f"{parts.total():,} ({html.escape(sizes)})"],
        ["batch", f"{many(run.samples_a_step, 'sample')}, views of {run.model.cells} cells of 10 m"],
        ["data", html.escape(sources)],
    ]
    timed = [line["time"] for line in lines if "time" in line]
    if timed:
        begun, ended = (datetime.datetime.fromtimestamp(timed[at], datetime.UTC) for at in (0, -1))
        minutes = (ended - begun).total_seconds() / 60
        lasted = f"{minutes / 60:.1f} hours" if minutes >= 90 else f"{minutes:.0f} minutes"
        rows.append(["logged", f"{begun:%Y-%m-%d %H:%M} to {ended:%Y-%m-%d %H:%M} UTC, {lasted}"])
    hardware = [many(run.num_devices, "device")] if run.num_devices else []
    for key, words in (
        ("samples_per_second", "{:.3g} samples a second (median)"),
        ("model_flops_utilization", "{:.0%} of the devices' rated FLOPs"),
        ("device_memory_peak_gib", "{:.1f} GiB of a device's memory at most"),
    ):
        if (values := _finite(lines, key)).size:
            hardware.append(words.format(float(values.max() if key.endswith("peak_gib") else np.median(values))))
    rows.append(["hardware", ", ".join(hardware) or "nothing was logged of it"])
    code = run.model.code
    rows.append(["code", f"digest {html.escape(code)}" if code else "not known: the checkpoint has no digest"])
    counts = collections.Counter(event.get("event") for event in events)
    told = [f"{words}: {many(counts[name], 'time')}" for name, words in _EVENTS.items() if counts[name]]
    rows.append(["mishaps", "; ".join(told) or "none was logged"])
    return table("The run", ["what", "value"], rows, classes=["", "words"])


def _finite(lines: list[dict[str, Any]], key: str) -> np.ndarray:
    values = np.array([line[key] for line in lines if isinstance(line.get(key), int | float)], float)
    return values[np.isfinite(values)]


def section(lines: list[dict[str, Any]], closing: Probes | None) -> str:
    """HTML: curves over steps, and the closing probes."""
    text = "What was logged on the way. Long runs are drawn as means of neighbouring steps."
    if closing is not None and "untrained" in closing.networks:
        text += " Probes at step 0 are those of the untrained network."
    body = guide(
        text,
        good="every loss term falls, the spread of features stays well above 0, and probes rise.",
        bad="a term that rises for long; a spread or a use of queries near its floor, which is collapse; steps that "
        "wait for input.",
    )
    lines = lines if closing is None else closing.along(lines)
    charts = [chart for chart in (_chart(lines, *of) for of in _CHARTS) if chart]
    if charts:
        body += element("div", "".join(element("figure", chart) for chart in charts), class_="charts")
    if not any("loss" in line for line in lines):
        body += element("p", f"The run has no {FILE_NAME}, or nothing is logged in it.")
    return body + ("" if closing is None else _probe_table(closing))


def _chart(lines: list[dict[str, Any]], title: str, unit: str, pattern: str, from_zero: bool) -> str:
    keys = {key: match[1] for line in lines for key in line if (match := re.fullmatch(pattern, key))}
    curves = []
    for key in sorted(keys):
        there = [line for line in lines if isinstance(line.get(key), int | float)]
        y = np.array([line[key] for line in there], float)
        if key.startswith("loss/"):  # exactly 0: the batch held nothing for the term, or it is off
            y = np.where(y == 0, np.nan, y)
        x = np.array([line["step"] for line in there], float)
        curves.append(Curve(keys[key].replace("_", " "), x, y, marked=len(there) < 12))
    return curve_chart(curves, title=title, axis="step", unit=unit, from_zero=from_zero)


def _probe_table(closing: Probes) -> str:
    told: Callable[[Any], str] = lambda value: f"{100 * value:.1f}" if isinstance(value, int | float) else ""  # noqa: E731
    named = lambda task: html.escape(task.replace("_", " "))  # noqa: E731
    there = {key for of in closing.networks.values() for key, value in of.items() if "/" in key and told(value)}
    known = {key.rpartition("/")[2].removeprefix("knn_") for key in there}
    if not there:
        return ""
    scores = [*(score for score in _SCORES if score in known), *sorted(known - set(_SCORES))]
    tasks = sorted({key.rpartition("/")[0] for key in there})
    rows = []
    for task in tasks:
        for protocol, prefix in (("linear", ""), ("nearest neighbours", "knn_")):
            keys = [f"{task}/{prefix}{score}" for score in scores]
            numbers = [told(of.get(key)) for key in keys for of in closing.networks.values()]
            if any(numbers):
                rows.append([f"{named(task)}, {protocol}", *numbers])
    heads = [html.escape(f"{_SCORES.get(score, score)}, {name}") for score in scores for name in closing.networks]
    asked = [
        f"on {where}: {', '.join(map(named, names))}"
        for where, names in (
            ("held-out procedural scenes", [task for task in tasks if task in _OF_SCENES]),
            ("labelled data", [task for task in tasks if task not in _OF_SCENES]),
        )
        if names
    ]
    caption = f"Closing probes behind step {closing.step}, in points; {'; '.join(asked)}"
    return table(caption, ["task", *heads], rows, classes=["", *["number"] * len(heads)])
