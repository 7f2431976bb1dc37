"""One modality of an exported network as an ONNX graph: ``python -m skysense_jax.export.onnx --model=DIR ...``.

The graph takes ``images`` [B C H W] of one date, raw numbers in the table's unit as float32 whatever the table's dtype
(every runtime has float32; normalisation is inside), any B and a fixed H = W, and gives ``stage1`` to ``stage4``
[B D P Q]. Masks, series and fusion are left out. PyTorch only, no jax; the network: modeling_skysensev2.py.
"""

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

try:
    import onnx
    import onnxruntime
    import onnxscript  # noqa: F401  (torch.onnx asks for it)
    import torch
    from torch import nn
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ImportError as error:  # a user's environment, so one line
    sys.exit(f'error: {error}; pip install --editable ".[onnx]" torch safetensors')

TOLERANCE = 1e-4  # largest difference from PyTorch, in standard deviations of a stage's features
CHECKED_BATCHES = (1, 3)
LARGEST_FILE_BYTES = 2**31 - 2**26  # protobuf ends at 2 GiB; the rest is for the graph. Above: weights in OUT.data


def write(backbone: nn.Module, *, size: int, out: pathlib.Path, properties: Mapping[str, str]) -> float:
    """Writes the graph of a ``FeaturesOnly`` of all four stages; its largest difference from PyTorch, see ``compare``.

    The graph is built and checked in a hidden folder beside ``out`` and then renamed. If the weights are above
    ``LARGEST_FILE_BYTES`` they go to a second file, ``out`` with ``.data`` at the end, which appears just before.

    Raises:
      ValueError: ``out`` cannot be written, or the graph computes something else than PyTorch.
    """
    hidden = _hidden_folder(out)
    try:
        program = _trace(backbone, size)
        program.model.metadata_props.update(properties)
        weights = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
        program.save(str(hidden / out.name), external_data=weights > LARGEST_FILE_BYTES)
        del program
        onnx.checker.check_model(str(hidden / out.name), full_check=True)
        difference = compare(backbone, hidden / out.name, size=size)
        if not difference <= TOLERANCE:  # so a NaN is refused too
            raise ValueError(
                f"--out: ONNX Runtime {onnxruntime.__version__} and PyTorch {torch.__version__} differ by "
                f"{difference:.1e} of the features' standard deviation; wanted at most {TOLERANCE:g}. Nothing was "
                "written"
            )
        for path in sorted(hidden.iterdir(), reverse=True):  # OUT.data before OUT
            os.replace(path, out.with_name(path.name))
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    return difference


def _hidden_folder(out: pathlib.Path) -> pathlib.Path:
    """A new folder beside ``out``, or a ValueError: there is something at ``out``, or no place for it."""
    hidden = out.parent / f".{out.name}.incomplete"
    for path in (out, out.with_name(f"{out.name}.data")):
        if path.exists():
            raise ValueError(f"--out: {path} exists; wanted a file that is not there yet")
    try:
        if hidden.exists():  # of an export that was killed
            shutil.rmtree(hidden)
        hidden.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"--out: {out} may not be written: {error}") from error
    return hidden


def _trace(backbone: nn.Module, size: int) -> Any:
    """The ONNX program of ``backbone`` for images of ``size`` and a batch of any length."""
    first = next(parameter for name, parameter in backbone.named_parameters() if name.endswith("projection.weight"))
    model, name = backbone.model, backbone.modality
    example = torch.zeros(3, len(model.modalities[name].bands), size, size, device=first.device)
    batch = {0: torch.export.Dim("batch")}
    # The fused CPU attention gives another memory layout than what the exporter takes it apart into.
    with contextlib.redirect_stdout(sys.stderr), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(backbone, (example,), dynamic_shapes=(batch,))
        return torch.onnx.export(
            program,
            dynamo=True,
            input_names=["images"],
            output_names=[f"stage{index + 1}" for index in model.out_indices],
            verbose=False,
        )


def compare(backbone: nn.Module, path: pathlib.Path, *, size: int) -> float:
    """The largest difference of a stage between ONNX Runtime and PyTorch, in that stage's standard deviations.

    Both get the same random images: normal with the table's mean and deviation, inside the sensor's range.
    """
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    m, worst = backbone.model.modalities[backbone.modality], 0.0
    for batch in CHECKED_BATCHES:
        noise = np.random.default_rng(batch).standard_normal((batch, len(m.bands), size, size), np.float32)
        mean, std = (np.asarray(row, np.float32)[:, None, None] for row in (m.mean, m.std))
        images = np.clip(mean + std * noise, *m.value_range)
        with torch.inference_mode():
            wanted = [stage.numpy() for stage in backbone(torch.from_numpy(images))]
        for got, stage in zip(session.run(None, {"images": images}), wanted, strict=True):
            assert got.shape == stage.shape, (got.shape, stage.shape)
            worst = max(worst, float(np.abs(got - stage).max() / stage.std()), key=lambda x: (x != x, x))
    return worst


def describe(backbone: nn.Module, *, size: int, step: int | None) -> dict[str, str]:
    """What the file says of itself (``metadata_props``): sensor, order of bands, unit, size, strides, training step."""
    m = backbone.model.modalities[backbone.modality]
    return {
        "modality": m.name,
        "bands": " ".join(m.bands),
        "unit": m.unit,
        "size": str(size),
        "strides": " ".join(map(str, backbone.strides)),
        "model_step": "unknown" if step is None else str(step),
    }


def export(directory: pathlib.Path, out: pathlib.Path, *, modality: str, size: int) -> float:
    """``write`` of one modality of an exported directory, for square images of ``size`` pixels.

    Raises:
      ValueError: the directory, the modality or the size is not what is wanted, or what ``write`` raises.
    """
    from skysense_jax.export.modeling_skysensev2 import CONFIG, FeaturesOnly, SkySenseV2

    if size < 1:
        raise ValueError(f"--size: {size}; wanted pixels along a side, 1 or more")
    model = SkySenseV2.from_pretrained(directory, check_inputs=False)
    if modality not in model.modalities:
        raise ValueError(f"--modality: {modality!r}; {directory} has {', '.join(model.modalities)}")
    model.fusion = None
    backbone = FeaturesOnly(model, modality).eval()
    step = json.loads((directory / CONFIG).read_text())["training"].get("step")
    return write(backbone, size=size, out=out, properties=describe(backbone, size=size, step=step))


def main(arguments: list[str]) -> None:
    """Writes the graph and says how far it is from PyTorch; a wrong argument ends in one line."""
    parser = argparse.ArgumentParser(prog="python -m skysense_jax.export.onnx", description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=pathlib.Path, required=True, help="an exported directory")
    parser.add_argument("--modality", required=True, help="a sensor of the model, such as hr")
    parser.add_argument("--size", type=int, required=True, help="pixels along a side of the images")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="file to write")
    given = parser.parse_args(arguments)
    try:
        difference = export(given.model, given.out, modality=given.modality, size=given.size)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"{given.out}: largest difference from PyTorch {difference:.1e} of the features' standard deviation")


if __name__ == "__main__":
    main(sys.argv[1:])
