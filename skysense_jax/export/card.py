"""The model card of an exported directory: what the weights are, how they were made, how they are used. Text only."""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from skysense_jax.metrics import FILE_NAME, read_json_lines
from skysense_jax.modalities import Modality
from skysense_jax.storage import Directory

_CARD = """\
---
library_name: pytorch
license: {licence_tag}
tags: [remote-sensing, earth-observation, feature-extraction, skysense-v2]
---

# SkySense V2 `{name}`: {what}

{parameters:,} parameters of the {weights} after step {step}, fp32.
Network: SkySense V2 (ICCV 2025, arXiv 2507.13812), pre-trained with skysense-jax {version}; the paper's own weights
were not published.

## Input

Raw numbers go in; the network normalises them with the statistics of `config.json`. Bands in this order:

{table}

A date is the day of the year, 1-366, or 0 for undated. One cell is 10 m x 10 m of ground, and so is a token of the last
stage. Any subset of the modalities, any number of dates, masked pixels and sizes that nothing divides are valid input.

## Use

With torch and safetensors only, `modeling_skysensev2.py` copied to where Python finds it:

```python
from modeling_skysensev2 import SkySenseV2

model = SkySenseV2.from_pretrained("DIR")
out = model({{{example}}})
out.stages["{first}"]  # maps [B D P Q] of the four stages
{fused}
```

With transformers: `AutoModel.from_pretrained("DIR", trust_remote_code=True)`. As the backbone of a segmenter or
detector: `FeaturesOnly(model, "{first}")` of the same file.

## Training

Config `{name}`, {num_steps} steps planned, batch {batch_size}, data: {sources}.

```bash
{command}
```

{losses}

{probe}

## Licence

{licence}

## Made with

```bash
{export_command}
```

Every file's SHA-256 stands in `SHA256SUMS` (`sha256sum --check SHA256SUMS`). The whole training config is in
`config.json` under `training`.
"""


_PARTS = {
    "backbone": "backbone",
    "fused": "backbone, and fusion over modalities and dates",
    "all": "backbone, fusion over modalities and dates, heads of pre-training (in `pretraining.safetensors`)",
}


def write_card(
    modalities: Sequence[Modality],
    *,
    num_parameters: int,
    weights: str,
    part: str,
    step: int,
    settings: Mapping[str, Any],
    overrides: Mapping[str, Any],
    losses: Mapping[str, float | str],
    probe: Mapping[str, float | None],
    licence: str,
    export_arguments: Sequence[str],
    version: str,
) -> str:
    """The card's Markdown.

    ``settings`` is the run's config by dotted field, ``overrides`` what of it differs from the config of that name,
    ``losses`` the last ones logged up to ``step``, ``probe`` the scores of the network by metric; both may be empty.
    """
    first, name = modalities[0], settings["name"]
    sources = ", ".join(f"{source!r} ({share:g})" for source, share in settings["data.sources"])
    command = ["python -m skysense_jax.train", f"--config=configs/{name}.py", "--workdir=RUN"]
    command += [f"--config.{field}={shlex.quote(str(value))}" for field, value in overrides.items()]
    export_command = ["python -m skysense_jax.export", *(shlex.quote(argument) for argument in export_arguments)]
    return _CARD.format(
        licence_tag=licence.lower() if licence else "other",
        name=name,
        what=_PARTS[part],
        parameters=num_parameters,
        weights="teacher (the moving average of the student)" if weights == "teacher" else "student",
        step=step,
        version=version,
        table=_table(modalities),
        example=f'"{first.name}": images',
        first=first.name,
        fused="out.fused  # [B D P Q], over all modalities and dates given" if part != "backbone" else "",
        num_steps=settings["optim.num_steps"],
        batch_size=settings["data.batch_size"],
        sources=sources,
        command=" \\\n    ".join(command),
        losses=_numbers("Losses last logged up to this step", losses),
        probe=_numbers("Linear probe of the teacher on held-out procedural scenes, a first look (0-1)", probe),
        licence=f"The weights: {licence}. The code files: Apache-2.0."
        if licence
        else "The weights: not stated; it follows from the imagery they were trained on. The code files: Apache-2.0.",
        export_command=" \\\n    ".join(export_command),
    )


def _table(modalities: Sequence[Modality]) -> str:
    lines = ["| modality | bands | unit | pixel | token | statistics |", "|---|---|---|---|---|---|"]
    for m in modalities:
        size = 10 / m.pixels_per_cell
        lines.append(
            f"| `{m.name}` | {' '.join(m.bands)} | {m.unit} | {size:g} m | {m.patch} x {m.patch} px | "
            f"{m.statistics_source} |"
        )
    return "\n".join(lines)


def _numbers(title: str, numbers: Mapping[str, float | str | None]) -> str:
    if not numbers:
        return f"{title}: none on record."
    text = lambda value: "not scored" if value is None else value if isinstance(value, str) else f"{value:.4g}"  # noqa: E731
    lines = [f"{title}:", "", "| metric | value |", "|---|---|"]
    return "\n".join(lines + [f"| {key} | {text(value)} |" for key, value in numbers.items()])


def last_losses(workdir: Directory, step: int) -> dict[str, float | str]:
    """The losses that a run logged last, not after ``step``; "nan" or "inf" where one was no number. Empty without."""
    path = workdir / FILE_NAME
    lines = [line for line in read_json_lines(path) if line["step"] <= step] if path.is_file() else []
    if not lines:
        return {}
    losses = {key: value for key, value in lines[-1].items() if key == "loss" or key.startswith("loss/")}
    return {key: lines[-1]["nonfinite"][key] if value is None else value for key, value in losses.items()}


def probe_scores(workdir: Directory, step: int, *, labelled: Sequence[str]) -> dict[str, float | None]:
    """What the linear probe of scenes said of the teacher at the end of a run; empty without one, or of another step.

    Scores on ``labelled`` datasets of its user (config.eval.datasets) stay with the run.
    """
    path = workdir / "probe.json"
    scores = json.loads(path.read_text()) if path.is_file() else {}
    if scores.get("step") != step:
        return {}
    told = ((name, *name.split("/", 1)) for name in scores["teacher"])
    return {name: scores["teacher"][name] for name, of, score in told if of not in labelled and "knn_" not in score}
