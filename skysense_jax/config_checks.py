"""What a config may hold: each field's type and range (``_RULES``), and what fields owe each other (``validate``).

Every field stands in ``configs/base.py``; all that is wrong is said at once, before anything is compiled.
A part of the room ``config.py``, which is what entry points import; config_eval.py, config_layout.py and
config_objective.py are others.
"""

import dataclasses
import difflib
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from configs import base
from skysense_jax import modalities
from skysense_jax.config_eval import eval_problems
from skysense_jax.config_layout import layout_problems
from skysense_jax.config_objective import objective_problems
from skysense_jax.data import codecs
from skysense_jax.data.scenes_layout import MAX_EXTENT_CELLS

# A section is handed to functions that ask for a Mapping; it behaves as one and does not say so.
Mapping.register(ConfigDict)

ROOT = pathlib.Path(__file__).resolve().parents[1]
MAX_STRENGTH = 2.5  # of photometric changes: brightness takes up to 0.4 times this away
# Subtrees whose keys are not fixed: dates per modality.
_FREE_KEYS = ("data.num_dates",)


# ---- what one value may be


@dataclasses.dataclass(frozen=True)
class _Rule:
    accepts: Callable[[Any], bool]
    wanted: str


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_int(value) or isinstance(value, float)) and math.isfinite(value)


def _whole(low: int, high: int | None = None) -> _Rule:
    wanted = f"an integer of {low} or more" if high is None else f"an integer of {low} to {high}"
    return _Rule(lambda value: _is_int(value) and value >= low and (high is None or value <= high), wanted)


def _is_labelled(value: Any) -> bool:
    texts = isinstance(value, tuple | list) and len(value) == 3 and all(isinstance(text, str) for text in value)
    return texts and bool(value[0]) and "/" not in value[0] and bool(value[1])


def _share(*, below_one: bool = False) -> _Rule:
    wanted = "a number from 0 to below 1" if below_one else "a number from 0 to 1"
    return _Rule(lambda value: _is_number(value) and value >= 0 and (value < 1 if below_one else value <= 1), wanted)


def _one_of(*names: str) -> _Rule:
    return _Rule(lambda value: value in names, f"one of {', '.join(map(repr, names))}")


def _integers(count: int) -> _Rule:
    test = lambda v: isinstance(v, tuple | list) and len(v) == count and all(_is_int(i) and i > 0 for i in v)  # noqa: E731
    return _Rule(test, f"{count} integers of 1 or more")


def _is_source(value: Any) -> bool:
    pair = isinstance(value, tuple | list) and len(value) == 2
    return pair and isinstance(value[0], str) and _is_number(value[1]) and value[1] > 0


_POSITIVE = _Rule(lambda value: _is_number(value) and value > 0, "a number above 0")
_STRENGTH = _Rule(
    lambda value: _is_number(value) and 0 <= value <= MAX_STRENGTH,
    f"a number from 0 to {MAX_STRENGTH}, above which an image may lose all its brightness",
)
_NOT_NEGATIVE = _Rule(lambda value: _is_number(value) and value >= 0, "a number of 0 or more")
_TEXT = _Rule(lambda value: isinstance(value, str), "a string")
_SWITCH = _Rule(lambda value: isinstance(value, bool), "True or False")
_ROWS = _Rule(
    lambda value: isinstance(value, tuple | list) and all(isinstance(row, Mapping) for row in value),
    "a tuple of dicts, the arguments of modalities.Modality",
)
_NAMES = _Rule(
    lambda value: isinstance(value, tuple | list) and bool(value) and all(isinstance(name, str) for name in value),
    "a tuple of one or more modality names",
)
_SOURCES = _Rule(
    lambda value: isinstance(value, tuple | list) and bool(value) and all(map(_is_source, value)),
    'one or more pairs (glob of .array_record files or "scenes", share above 0)',
)
_LABELLED = _Rule(
    lambda value: isinstance(value, tuple | list) and all(map(_is_labelled, value)),
    "a tuple of (name, dataset, task) in letters, the name without /; task may be empty",
)
_MESH_SIZE = _Rule(lambda value: _is_int(value) and (value >= 1 or value == -1), "1 or more, or -1: what is left")

# Field, or a pattern of fields where `*` stands for one key. The first match counts.
_RULES: Mapping[str, _Rule] = {
    "name": _TEXT,
    "run.log_every_steps": _whole(1),
    "run.checkpoint_every_steps": _whole(1),
    "run.keep_last": _whole(2),  # the older goes before the newer has its manifest
    "run.keep_every_steps": _whole(1),
    "run.keep_every_hours": _NOT_NEGATIVE,
    "run.keep_best": _SWITCH,
    "run.pictures_every_steps": _whole(0),
    "run.norms_every_steps": _whole(0),
    "run.max_nonfinite_in_row": _whole(1),
    "run.max_bad_record_share": _share(),
    "run.watch.spike_deviations": _NOT_NEGATIVE,
    "run.watch.spike_window": _whole(20),
    "run.watch.spike_in_row": _whole(1),
    "run.watch.spike_rewinds": _whole(0),
    "run.watch.collapse_in_row": _whole(0),
    "run.watch.collapse_stops": _SWITCH,
    "run.input_threads": _whole(1),
    "run.input_workers": _whole(0),
    "run.prefetch_batches": _whole(1),
    "run.tensorboard": _SWITCH,
    "run.wandb_project": _TEXT,
    "mesh.*": _MESH_SIZE,
    "efficiency.remat": _one_of("none", "matmuls", "blocks"),
    "efficiency.scan_unroll": _whole(1),
    "efficiency.attention": _one_of("auto", "xla", "mosaic", "cudnn", "cudnn+triton"),
    "parts.*": _whole(1),
    "data.modalities": _NAMES,
    "data.new_modalities": _ROWS,
    "data.label_classes": _Rule(lambda value: isinstance(value, tuple | list), "a tuple of names, or ()"),
    "data.sources": _SOURCES,
    "data.batch_size": _whole(1),
    "data.seed": _whole(0),
    "data.num_dates.*": _whole(1),
    "data.photometric_strength": _STRENGTH,
    "data.day_jitter": _whole(0),
    "data.views.global_box_cells": _integers(2),
    "data.views.local_box_cells": _integers(2),
    "data.views.*": _whole(1),
    "data.scenes.num_scenes": _whole(1),
    "data.scenes.extent_cells": _whole(1, MAX_EXTENT_CELLS),
    "data.scenes.*": _whole(0),
    "model.compute_dtype": _one_of("bfloat16", "float32"),
    "model.backbone.depths": _integers(4),
    "model.backbone.mlp_ratio": _POSITIVE,
    "model.backbone.num_prompts": _whole(0),
    "model.backbone.merging": _one_of("averaged", "separate"),
    "model.backbone.shared": _SWITCH,
    "model.backbone.moe_from": _one_of("end", "start"),
    "model.*.drop_path": _share(below_one=True),
    "model.backbone.layer_scale_init": _POSITIVE,
    "model.backbone.num_moe_blocks": _whole(0),
    "model.backbone.capacity_factor": _POSITIVE,
    "model.*.mlp_ratio": _POSITIVE,
    "model.backbone.*": _whole(1),
    "model.fusion.*": _whole(1),
    "model.queries.*": _whole(1),
    "model.heads.*": _whole(1),
    "model.text_dim": _whole(1),
    "objective.weights.*": _NOT_NEGATIVE,
    "objective.mgcl.num_positions": _whole(1),
    "objective.mgcl.num_clusters": _whole(1),
    "objective.mgcl.cluster_iterations": _whole(1),
    "objective.mgcl.*": _NOT_NEGATIVE,
    "objective.distil.teacher": _TEXT,
    "objective.distil.step": _whole(0),
    "objective.distil.distance": _one_of("cosine", "smooth_l1"),
    "objective.distil.*": _NOT_NEGATIVE,
    "objective.teacher_temperature_warmup_steps": _whole(0),
    "objective.student_temperature": _POSITIVE,
    "objective.teacher_temperature": _POSITIVE,
    "objective.teacher_temperature_start": _POSITIVE,
    "objective.sinkhorn_iterations": _whole(1),
    "objective.prototype_freeze_steps": _whole(0),
    "objective.text_table": _TEXT,
    "optim.num_steps": _whole(1),
    "optim.seed": _whole(0),
    "optim.learning_rate": _POSITIVE,
    "optim.final_learning_rate": _NOT_NEGATIVE,
    "optim.warmup_steps": _whole(0),
    "optim.weight_decay": _NOT_NEGATIVE,
    "optim.beta1": _share(below_one=True),
    "optim.beta2": _share(below_one=True),
    "optim.clip_norm": _POSITIVE,
    "optim.ema_momentum": _share(),
    "eval.probe_every_steps": _whole(0),
    "eval.first_index": _whole(0),
    "eval.probe_untrained": _SWITCH,
    "eval.datasets": _LABELLED,
    "eval.num_train_scenes": _whole(0),
    "eval.num_test_scenes": _whole(0),
    "eval.*": _whole(1),
}


def rule_for(field: str) -> _Rule:
    """What the field called ``field`` (dotted) may be. A field of configs/base.py without a rule is our own mistake."""
    for pattern, rule in _RULES.items():
        if re.fullmatch(re.escape(pattern).replace(r"\*", "[^.]+"), field):
            return rule
    raise AssertionError(f"config.{field} has no row in skysense_jax/config_checks.py: _RULES")


# ---- walking


def resolve_path(path: str) -> pathlib.Path:
    """``path`` as it stands if it exists from here, else from the project's root."""
    given = pathlib.Path(path).expanduser()
    return given if given.exists() or given.is_absolute() else ROOT / given


def is_section(value: Any) -> bool:
    return isinstance(value, Mapping)


def nodes(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every section and every field, parents first."""
    for key in sorted(config):
        yield prefix + key, config[key]
        if is_section(config[key]):
            yield from nodes(config[key], f"{prefix}{key}.")


def fields_of(config: Any) -> dict[str, Any]:
    return {path: value for path, value in nodes(config) if not is_section(value)}


def hint(field: str, known: Mapping[str, Any]) -> str:
    """ "; did you mean config.x.y?" with the nearest of ``known``: first among its siblings, then anywhere; or ""."""
    parent, _, name = field.rpartition(".")
    siblings = [path for path in known if path.rpartition(".")[0] == parent]
    for candidates in (siblings, list(known)):
        last_words = {path.rpartition(".")[2]: path for path in reversed(candidates)}
        near = difflib.get_close_matches(name, last_words, n=1)
        if near:
            return f"; did you mean config.{last_words[near[0]]}?"
    near = difflib.get_close_matches(field, list(known), n=1)
    return f"; did you mean config.{near[0]}?" if near else f"; known here: {sorted(siblings) or sorted(known)}"


# ---- checking


def validate(config: ConfigDict, *, num_devices: int | None = None) -> None:
    """Nothing, if every field is known, present, of its type and range, and fits the others.

    ``num_devices``: of the whole run, to check the batch against a mesh with a -1.

    Raises:
      ValueError: all that is wrong, a line each: field, what it is, what was wanted.
    """
    problems = _key_problems(config)
    if not problems:
        problems = [
            f"config.{field}: got {value!r}; wanted {rule.wanted}"
            for field, value in fields_of(config).items()
            if not (rule := rule_for(field)).accepts(value)
        ]
    if not problems:
        checks = (
            _data_problems,
            _view_problems,
            _model_problems,
            _optim_problems,
            eval_problems,
        )
        problems = [problem for check in checks for problem in check(config)]
        problems += objective_problems(config, text_table=resolve_path(config.objective.text_table))
        problems += layout_problems(config, num_devices)
    if problems:
        raise ValueError("\n".join(problems))


def _key_problems(config: ConfigDict) -> list[str]:
    wanted, got, problems = dict(nodes(base.get_config())), dict(nodes(config)), []
    free = lambda path: any(path.startswith(f"{section}.") for section in _FREE_KEYS)  # noqa: E731
    inside = lambda path, roots: any(path.startswith(f"{root}.") for root in roots)  # noqa: E731
    unknown, missing = [], []
    for path in got:
        if path not in wanted and not free(path) and not inside(path, unknown):
            unknown.append(path)
            problems.append(f"config.{path}: no such key{hint(path, wanted)}")
    for path, value in wanted.items():
        if free(path) or inside(path, missing):
            continue
        if path not in got:
            missing.append(path)
            wanted_text = "this section" if is_section(value) else f"a value such as {value!r}"
            problems.append(f"config.{path}: missing; wanted {wanted_text} (see configs/base.py)")
        elif is_section(got[path]) != is_section(value):
            problems.append(f"config.{path}: got {got[path]!r}; wanted a {'section' if is_section(value) else 'value'}")
            missing.append(path)
    return problems


def _data_problems(config: ConfigDict) -> Iterator[str]:
    data = config.data
    try:
        rows = modalities.select(data.modalities, data.new_modalities)
    except (ValueError, TypeError) as error:  # TypeError: a row with an unknown or a missing argument
        told = str(error)
        yield told if told.startswith("config.") else f"config.data.new_modalities: {told}"
        return
    for row in (modalities.Modality(**row) for row in data.new_modalities):
        if problem := codecs.codec_problem(row.codec, num_bands=row.num_bands, dtype=np.dtype(row.dtype)):
            yield f"config.data.new_modalities: modality {row.name!r}: {problem}"
    for row in rows:
        if row.name not in data.num_dates:
            yield f"config.data.num_dates.{row.name}: missing; wanted the dates to draw of a modality that is used"
    known = {*modalities.MODALITIES, *(row["name"] for row in data.new_modalities)}
    for name in data.num_dates:
        if name not in known:
            yield f"config.data.num_dates.{name}: no such modality; wanted one of {sorted(known)}"
    try:
        modalities.label_map(data.label_classes)
    except ValueError as error:
        yield f"config.data.label_classes: got {error}"
    if any(name == "scenes" for name, _ in data.sources):
        if data.label_classes:
            told = "with scenes among config.data.sources; wanted (), the classes of scenes"
            yield f"config.data.label_classes: got {tuple(data.label_classes)} {told}"
        first, held_out = data.scenes.first_index, config.eval.first_index
        end = first + data.scenes.num_scenes
        held_out_end = held_out + config.eval.num_train_scenes + config.eval.num_test_scenes
        if max(first, held_out) < min(end, held_out_end):
            yield (
                f"config.eval.first_index: got {held_out}, so scenes {held_out} to {held_out_end - 1} for the probe; "
                f"wanted none of those trained on, {first} to {end - 1} (config.data.scenes)"
            )


def _view_problems(config: ConfigDict) -> Iterator[str]:
    views = config.data.views
    for kind in ("global", "local"):
        (low, high), cells = views[f"{kind}_box_cells"], views[f"{kind}_cells"]
        field = f"config.data.views.{kind}_box_cells"
        if low > high:
            yield f"{field}: got ({low}, {high}); wanted the smallest side first"
        if not (high < 2 * cells and cells < 2 * low):
            yield (
                f"{field}: got ({low}, {high}) resized to {kind}_cells {cells}; wanted sides above {cells / 2:g} and "
                f"below {2 * cells}, so that no pixel's ground size changes by 2x"
            )
        if high > views.anchor_cells:
            yield f"config.data.views.anchor_cells: got {views.anchor_cells}; wanted {field}'s largest, {high}, or more"
    if views.anchor_cells % views.tile_cells:
        yield (
            f"config.data.views.anchor_cells: got {views.anchor_cells}; wanted a multiple of tile_cells, "
            f"{views.tile_cells}, so that an anchor is made of whole tiles"
        )


def _model_problems(config: ConfigDict) -> Iterator[str]:
    backbone, fusion = config.model.backbone, config.model.fusion
    for name, section in (("backbone", backbone), ("fusion", fusion)):
        if section.width % section.head_width:
            yield (
                f"config.model.{name}.width: got {section.width}; wanted a multiple of head_width, {section.head_width}"
            )
    global_blocks = sum(backbone.depths[2:])
    if backbone.num_moe_blocks > global_blocks:
        yield (
            f"config.model.backbone.num_moe_blocks: got {backbone.num_moe_blocks}; wanted at most {global_blocks}, the "
            f"blocks of stages 3 and 4 (depths {tuple(backbone.depths)}): mixtures of experts are counted from the end"
        )
    if backbone.experts_per_token > backbone.num_experts:
        yield (
            f"config.model.backbone.experts_per_token: got {backbone.experts_per_token}; wanted at most num_experts, "
            f"{backbone.num_experts}"
        )
    if backbone.head_width % 4:
        yield (
            f"config.model.backbone.head_width: got {backbone.head_width}; wanted a multiple of 4: the rotary "
            "embedding turns pairs of channels along two axes"
        )


def _optim_problems(config: ConfigDict) -> Iterator[str]:
    optim = config.optim
    if optim.warmup_steps > optim.num_steps:
        yield f"config.optim.warmup_steps: got {optim.warmup_steps}; wanted at most num_steps, {optim.num_steps}"
    if optim.final_learning_rate > optim.learning_rate:
        yield (
            f"config.optim.final_learning_rate: got {optim.final_learning_rate}; wanted at most learning_rate, "
            f"{optim.learning_rate}"
        )
