"""An exported directory: weights, config.json, the files that read them, a model card, checksums; whole or not at all.

Numpy and safetensors only: neither jax nor torch. Next: card.py (the model card), __main__.py (the command).
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from skysense_jax.modalities import METRES_PER_CELL, Modality

FORMAT_VERSION = 1
WEIGHTS, CONFIG, CHECKSUMS, CARD = "model.safetensors", "config.json", "SHA256SUMS", "README.md"
HEADS = "pretraining.safetensors"  # queries and heads, under their names here: nothing reads them but from_torch.py
COPIED = ("modeling_skysensev2.py", "hf_skysensev2.py")
# Of config.model.backbone and config.model.fusion, what decides which weights there are and what they compute.
BACKBONE = ("width", "depths", "head_width", "window", "mlp_ratio", "num_prompts", "merging")
BACKBONE += ("num_moe_blocks", "num_experts", "experts_per_token")
FUSION = ("width", "depth", "head_width", "mlp_ratio")
_OF_TRAINING = ("photometric", "codec")  # fields of a row that say nothing to a user of the weights


def describe(
    modalities: Sequence[Modality],
    *,
    backbone: Mapping[str, Any],
    fusion: Mapping[str, Any] | None,
    training: Mapping[str, Any],
) -> dict[str, Any]:
    """What ``config.json`` holds: architecture, the table of modalities, and where the weights come from.

    ``backbone`` and ``fusion`` are the sections of ``config.model``; ``fusion`` is None for the backbone alone.
    """
    rows = []  # in order: an object's keys may be sorted by whoever writes the file again
    for m in modalities:
        row = {key: value for key, value in dataclasses.asdict(m).items() if key not in _OF_TRAINING}
        rows.append({**row, "gsd_m": METRES_PER_CELL / m.pixels_per_cell})
    return {
        "model_type": "skysense_v2",
        "architectures": ["SkySenseV2Model"],
        "auto_map": {
            "AutoConfig": "hf_skysensev2.SkySenseV2Config",
            "AutoModel": "hf_skysensev2.SkySenseV2Model",
        },
        "format_version": FORMAT_VERSION,
        "date": "day of the year, 1-366; 0: undated",
        "cell_m": METRES_PER_CELL,
        "modalities": rows,
        "backbone": {key: plain(backbone[key]) for key in BACKBONE},
        "fusion": None if fusion is None else {key: fusion[key] for key in FUSION},
        "training": dict(training),
    }


def plain(value: Any) -> Any:
    """``value`` as JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value


def check_out(out: pathlib.Path) -> None:
    """Nothing, or a ValueError: there is something at ``out`` already, or no place for it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out: {out} exists; wanted a directory that is not there yet, or an empty one")
    nearest = _nearest(out)
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"--out: {nearest} is no folder that may be written")


def _nearest(out: pathlib.Path) -> pathlib.Path:
    """The nearest thing above ``out`` that is there."""
    return next(parent for parent in out.absolute().parents if parent.exists())


def write_directory(
    out: pathlib.Path,
    *,
    state: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    card: str,
    heads: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Writes the directory ``out`` beside its place, under a hidden name, and renames it when it is whole.

    ``state`` is the network's, by PyTorch name; ``heads`` (None: not written) what only pre-training needs, by path.

    Raises:
      ValueError: ``out`` exists and is not empty, or the disk has no room for it.
    """
    check_out(out)
    out = out.absolute()
    needed = sum(array.nbytes for array in (*state.values(), *(heads or {}).values()))
    free = shutil.disk_usage(_nearest(out)).free
    if needed > free:
        raise ValueError(f"--out: {needed / 2**30:.1f} GiB are needed at {out.parent}, {free / 2**30:.1f} are free")
    hidden = out.parent / f".{out.name}.incomplete"
    if hidden.exists():  # of an export that was killed
        shutil.rmtree(hidden)
    hidden.mkdir(parents=True)
    try:
        (hidden / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        for name, arrays in ((WEIGHTS, state), (HEADS, heads)):
            if arrays is not None:
                save_file(dict(arrays), hidden / name, metadata={"format": "pt"})
                shutil.copymode(hidden / CONFIG, hidden / name)  # it is made for its owner's eyes only
        (hidden / CARD).write_text(card)
        for name in COPIED:
            shutil.copyfile(pathlib.Path(__file__).parent / name, hidden / name)
        names = sorted(path.name for path in hidden.iterdir())
        (hidden / CHECKSUMS).write_text("".join(f"{_sha256(hidden / name)}  {name}\n" for name in names))
        os.replace(hidden, out)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- reading (without torch, which modeling_skysensev2.py needs for the same)


def read_config(directory: pathlib.Path, *, verify: bool = True) -> dict[str, Any]:
    """What ``config.json`` of an exported directory holds; ``verify`` compares it and the weights with SHA256SUMS.

    Raises:
      ValueError: a file is missing or is not what was exported, or another version wrote it.
    """
    missing = [name for name in (CONFIG, WEIGHTS, CHECKSUMS)[: 3 if verify else 2] if not (directory / name).is_file()]
    if missing:
        raise ValueError(f"{directory}: no {', '.join(missing)}; wanted a directory that skysense_jax.export wrote")
    if verify:
        lines = (line.split(maxsplit=1) for line in (directory / CHECKSUMS).read_text().splitlines())
        sums = {line[1]: line[0] for line in lines if len(line) == 2}
        for name in (CONFIG, WEIGHTS, *((HEADS,) if (directory / HEADS).exists() else ())):
            if (got := _sha256(directory / name)) != sums.get(name):
                raise ValueError(
                    f"{directory / name}: SHA-256 {got}; {CHECKSUMS} says {sums.get(name)}. Copy it again, or pass "
                    "--noverify if the change is yours"
                )
    try:
        description = json.loads((directory / CONFIG).read_text())
        version = description["format_version"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{directory / CONFIG}: not what skysense_jax.export writes: {error!r}") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{directory / CONFIG}: format_version {version}; wanted {FORMAT_VERSION}")
    return description


def rows_of(description: Mapping[str, Any]) -> list[Modality]:
    """The modalities of what ``describe`` returned, after JSON; what only training knows is at its default."""
    fields = {field.name for field in dataclasses.fields(Modality)}
    as_tuple = lambda value: tuple(value) if isinstance(value, list) else value  # noqa: E731
    return [
        Modality(**{key: as_tuple(value) for key, value in row.items() if key in fields})
        for row in description["modalities"]
    ]


def load_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file; raises ValueError if it is none."""
    try:
        return load_file(path)
    except Exception as error:  # SafetensorError, and TypeError for types that numpy lacks
        raise ValueError(f"{path} cannot be read as safetensors: {error!r}") from error
