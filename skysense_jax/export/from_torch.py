"""From PyTorch to a checkpoint: ``python -m skysense_jax.export.from_torch --config=FILE --workdir=RUN --model=DIR``.

The checkpoint stands at step 0 of a run with that config: student and teacher hold what was taken, the rest is as a
fresh run has it, and ``skysense_jax.train`` with the same config and workdir goes on from there. ``--model`` is an
exported directory; ``--swin`` a file or directory of published Swin V2 weights for stages 1 and 2.
"""

import dataclasses
import json
import math
import os
import pathlib
import shutil
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict

from skysense_jax import assembly, checkpoint, sharding, storage
from skysense_jax import config as config_lib
from skysense_jax.data.pipeline import FIRST_STATE
from skysense_jax.export import names, published, write
from skysense_jax.modalities import Modality
from skysense_jax.train_state import boxed_state, create_state
from skysense_jax.trees import named_leaves

_REPORT = "initialised_from.txt"
_ROW = ("bands", "unit", "pixels_per_cell", "patch", "mean", "std")  # what a tokenizer's weights depend on


@dataclasses.dataclass(frozen=True)
class Taken:
    """What was found for a run.

    Attributes:
      params: new values by parameter path; of another first axis where only some rows are given (``rows``).
      rows: for such a path, the rows that the values are for.
      unused: names in the source that were not taken, and why where that can be said.
      notes: what a person should know beside.
    """

    params: dict[str, np.ndarray]
    rows: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    unused: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


def from_directory(
    directory: pathlib.Path, *, config: ConfigDict, rows: tuple[Modality, ...], verify: bool = True
) -> Taken:
    """What an exported directory gives to a run of this config; ``verify`` compares it with its checksums first.

    Raises:
      ValueError: the directory is damaged, of another architecture, or of another table of modalities.
    """
    exported = write.read_config(directory, verify=verify)
    their_rows = {row["name"]: row for row in exported["modalities"]}
    shared = [row for row in rows if row.name in their_rows]
    differing = _differing("config.model.backbone", exported["backbone"], config.model.backbone, write.BACKBONE)
    if exported["fusion"] is not None:
        differing += _differing("config.model.fusion", exported["fusion"], config.model.fusion, write.FUSION)
    for row in shared:
        ours = {key: write.plain(getattr(row, key)) for key in _ROW}
        differing += _differing(f"modality {row.name!r}", their_rows[row.name], ours, _ROW)
    if differing or not shared:
        raise ValueError(
            f"--model: {directory} is not of this config's network: "
            + ("; ".join(differing) or f"it has the modalities {', '.join(their_rows)} and none of the config's")
        )
    modalities = write.rows_of(exported)
    table = list(names.weights(modalities, backbone=exported["backbone"], fusion=exported["fusion"]))
    state = write.load_arrays(directory / write.WEIGHTS)
    wrong = sorted({weight.name for weight in table} ^ set(state))
    if wrong:
        raise ValueError(f"--model: {directory}: weights that do not fit its config.json: {', '.join(wrong[:5])}")
    params = names.split(table, state)
    if (directory / write.HEADS).is_file():
        params |= write.load_arrays(directory / write.HEADS)
    taken_rows = {}
    if exported["fusion"] is not None:  # a row per modality, in an order of their own
        theirs = list(their_rows)
        path = "fusion/modality_embedding"
        params[path] = params[path][[theirs.index(row.name) for row in shared]]
        taken_rows[path] = [rows.index(row) for row in shared]
    return Taken(params, taken_rows)


def _differing(where: str, theirs: Mapping[str, Any], ours: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """ "where.key: theirs, the config has ours" for what differs."""
    return [
        f"{where}.{key}: {theirs.get(key)}, the config has {write.plain(ours[key])}"
        for key in keys
        if theirs.get(key) != write.plain(ours[key])
    ]


def from_swin(source: pathlib.Path, *, config: ConfigDict, rows: tuple[Modality, ...]) -> Taken:
    """What published Swin V2 weights give to a run of this config: stages 1 and 2, mergings, the tokenizer of ``hr``.

    Raises:
      ValueError: there are none, their names are unknown, or their widths are not the config's.
    """
    net, state = config.model.backbone, _read_weights(source)
    found, unused = published.from_published(state, net.depths[:2])
    shape_of = lambda name: found[name].shape if name in found else ()  # noqa: E731
    theirs = shape_of("stages.0.blocks.0.norm1.bias") + shape_of("stages.0.blocks.0.attn.w_msa.logit_scale")[:1]
    if theirs != (net.width, net.width // net.head_width):
        raise ValueError(
            f"config.model.backbone: width {net.width} with {net.width // net.head_width} heads; the first stage of "
            f"{source} has (width, heads) {theirs}"
        )
    wanted = {row.name: (net.width, row.num_bands, row.patch, row.patch) for row in rows}.get("hr")
    if shape_of(f"{published.TOKENIZER}.projection.weight") != wanted:
        unused += [f"{name}: the config's hr has {wanted}" for name in found if name.startswith(published.TOKENIZER)]
        found = {name: array for name, array in found.items() if not name.startswith(published.TOKENIZER)}
    table = [weight for weight in names.weights(rows, backbone=net, fusion=None) if weight.name in found]
    window, notes = _window_of(state, source), []
    if window != net.window:
        notes.append(
            f"position bias: learned in windows of {window or 'a side that the source does not tell'}, the config's "
            f"have {net.window}; offsets count in shares of a window, so the bias is stretched"
        )
    return Taken(names.split(table, found), unused=unused, notes=notes)


def _window_of(state: Mapping[str, np.ndarray], source: pathlib.Path) -> int | None:
    """Side of the windows that published weights were trained in last, as far as the source tells."""
    described = source / write.CONFIG if source.is_dir() else source.parent / write.CONFIG
    if described.is_file():
        return json.loads(described.read_text()).get("window_size")
    index = next((array for name, array in state.items() if name.endswith("w_msa.relative_position_index")), None)
    return None if index is None else math.isqrt(len(index))


def _read_weights(source: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a file, or of the weight file in a directory, fp32; nothing in them is run."""
    if source.is_dir():
        found = [source / name for name in ("model.safetensors", "pytorch_model.bin") if (source / name).is_file()]
        if not found:
            raise ValueError(f"--swin: {source} holds neither model.safetensors nor pytorch_model.bin")
        source = found[0]
    if not source.is_file():
        raise ValueError(f"--swin: there is no {source}")
    if source.suffix == ".safetensors":
        return write.load_arrays(source)
    try:
        import torch
    except ImportError as error:
        raise ValueError(f"--swin: {source} needs PyTorch to be read; a .safetensors file does not") from error
    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch says of a file that is none of its own, or that holds more than arrays
        raise ValueError(f"--swin: {source} cannot be read as plain arrays: {error}".split("\n")[0]) from error
    for key in ("state_dict", "model"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    if not isinstance(state, dict):
        raise ValueError(f"--swin: {source} cannot be read as plain arrays: it holds {type(state).__name__}")
    arrays = {name: array.detach() for name, array in state.items() if isinstance(array, torch.Tensor)}
    return {name: (x.float() if x.is_floating_point() else x).numpy() for name, x in arrays.items()}


def fitting(shapes: Mapping[str, Any], taken: Taken) -> Taken:
    """``taken`` without what a run of these parameter shapes has no place for: a modality's own, heads of another size.

    Raises:
      ValueError: an array of the backbone or the fusion is of another shape.
    """
    params, unused, wrong = {}, list(taken.unused), []
    for path, array in taken.params.items():
        wanted = tuple(shapes[path].shape) if path in shapes else None
        if path in taken.rows:
            wanted = (len(taken.rows[path]), *wanted[1:])
        if array.shape == wanted and np.issubdtype(array.dtype, np.floating):
            params[path] = array.astype(shapes[path].dtype)
        elif wanted is None or path.split("/")[0] not in ("backbone", "fusion"):
            unused.append(f"{path}: {array.shape}, the config has {wanted or 'none'}")
        else:
            wrong.append(f"{path}: {array.shape} {array.dtype}, the config has {wanted}")
    if wrong:
        raise ValueError(f"config.model: {len(wrong)} arrays do not fit: {'; '.join(wrong[:5])}")
    return dataclasses.replace(taken, params=params, unused=unused)


def fill(params: Any, taken: Taken) -> Any:
    """``params`` with the arrays of ``taken``, which fit, in their places."""
    leaves = named_leaves(params)
    for path, array in taken.params.items():
        if path in taken.rows:
            array = leaves[path].at[np.asarray(taken.rows[path])].set(array)
        leaves[path] = jax.device_put(np.asarray(array, order="C"), leaves[path].sharding)
    return jax.tree.unflatten(jax.tree.structure(params), list(leaves.values()))


def report(params: Any, taken: Taken, source: pathlib.Path) -> str:
    """What was taken, what keeps its initial value, and what the source had besides: every name."""
    leaves = named_leaves(params)
    kept = [path for path in leaves if path not in taken.params]
    count = lambda paths: sum(leaves[path].size for path in paths)  # noqa: E731
    partly = [f"{path} (rows {taken.rows[path]} of {len(leaves[path])})" for path in taken.rows]
    sections = (
        (f"taken from {source}: {count(taken.params):,} parameters", [*(taken.params.keys() - taken.rows), *partly]),
        (f"at their initial values: {count(kept):,} parameters", kept),
        ("in the source and not taken", taken.unused),
    )
    lists = [
        f"{title} in {len(listed)} arrays\n" + "".join(f"  {name}\n" for name in sorted(listed))
        for title, listed in sections
    ]
    return "\n".join(lists + [f"{note}\n" for note in taken.notes])


def initialise(
    config: ConfigDict,
    workdir: pathlib.Path,
    *,
    model: pathlib.Path | None = None,
    swin: pathlib.Path | None = None,
    verify: bool = True,
) -> str:
    """Writes a workdir with the checkpoint of step 0 and the report, whole or not at all; returns the report.

    Raises:
      ValueError: see ``from_directory`` and ``from_swin``; or there is something in ``workdir`` already.
    """
    if (model is None) == (swin is None):
        raise ValueError("--model, --swin: wanted one of them")
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise ValueError(f"--workdir: {workdir} exists; wanted one that is not there yet, or an empty folder")
    config_lib.validate(config, num_devices=1)
    run = assembly.assemble(config)
    if model is not None:
        taken = from_directory(model, config=config, rows=run.modalities, verify=verify)
    else:
        taken = from_swin(swin, config=config, rows=run.modalities)
    mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, expert=1, devices=jax.devices()[:1])
    shapes = assembly.batch_shapes(config, run.modalities)
    boxed = boxed_state(run.network, run.optimizer, shapes)
    taken = fitting(named_leaves(sharding.unbox(boxed.student)), taken)
    hidden = workdir.parent / f".{workdir.name}.incomplete"
    shutil.rmtree(hidden, ignore_errors=True)  # of one that was killed
    hidden.mkdir(parents=True)
    with jax.set_mesh(mesh):
        state = create_state(run.network, run.optimizer, shapes, seed=config.optim.seed, mesh=mesh)
        filled = fill(state.student, taken)
        checkpoints = checkpoint.Checkpoints(hidden, every_steps=1, keep_last=1, keep_every_steps=1)
        state = state.replace(student=filled, teacher=filled)
        checkpoints.save(0, state, data_state=FIRST_STATE, meta={"config": config_lib.flat_text(config)})
        checkpoints.close()
    text = report(filled, taken, model or swin)
    (hidden / _REPORT).write_text(text)
    os.replace(hidden, workdir)
    return text


def main(argv: list[str]) -> None:
    """Initialises a run, and says what was taken."""
    if len(argv) > 1:
        raise app.UsageError(f"got {argv[1:]}; wanted --config=FILE --workdir=RUN --model=DIR")
    jax.config.update("jax_platforms", "cpu")  # a checkpoint of any size fits a host, not always a device
    logging.set_verbosity(logging.ERROR)
    if storage.is_url(_WORKDIR.value):
        sys.exit(f"error: --workdir: got {_WORKDIR.value}; wanted a directory, which may be copied into a bucket then")
    given = [None if flag.value is None else pathlib.Path(flag.value).absolute() for flag in (_WORKDIR, _MODEL, _SWIN)]
    try:
        print(initialise(_CONFIG.value, given[0], model=given[1], swin=given[2], verify=_VERIFY.value))
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"step 0 of a new run: {given[0]}; the same list stands in its {_REPORT}")


if __name__ == "__main__":
    _CONFIG = config_lib.define_flag()
    _WORKDIR = flags.DEFINE_string("workdir", None, "Of the run to begin.", required=True)
    _MODEL = flags.DEFINE_string("model", None, "An exported directory.")
    _SWIN = flags.DEFINE_string("swin", None, "Published Swin V2 weights, a file or a directory.")
    _VERIFY = flags.DEFINE_bool("verify", True, "Compare --model with its checksums.")
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=config_lib.parse_flags)
