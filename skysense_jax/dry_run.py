"""What a config would run, without running it: shapes of a batch, parameters, FLOPs, memory, one real sample.

Nothing is allocated on a device. The memory estimate holds what is exact (parameters, moments, teacher, gradients,
batch); what activations take depends on the compiler and is left to an ahead-of-time compile.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from skysense_jax import cost
from skysense_jax.batch import Batch, Views
from skysense_jax.modalities import OSM, Modality, label_map


def batch_shapes(
    modalities: Sequence[Modality],
    *,
    batch_size: int,
    num_dates: Mapping[str, int],
    views: Mapping[str, Any],
    label_classes: Sequence[str] = (),
) -> Batch:
    """A global batch as shapes and dtypes."""
    num_classes = label_map(label_classes).num_classes
    shape = lambda dtype, *sizes: jax.ShapeDtypeStruct((batch_size, *sizes), dtype)  # noqa: E731

    def of_views(count: int, cells: int) -> Views:
        per_modality = lambda make: {m.name: make(m, num_dates[m.name]) for m in modalities}  # noqa: E731

        def image(m, dates):
            side = cells * m.pixels_per_cell
            return shape(m.dtype, count, dates, side, side, m.num_bands)

        def token(m, dates):
            side = cells * m.tokens_per_cell
            return shape(np.bool_, count, dates, side, side)

        return Views(
            images=per_modality(image),
            token_valid=per_modality(token),
            cell_usable=per_modality(lambda _, dates: shape(np.bool_, count, dates, cells, cells)),
            labels=shape(np.float16, count, cells, cells, num_classes),
            affine=shape(np.float32, count, 2, 3),
        )

    return Batch(
        global_views=of_views(views["num_global"], views["global_cells"]),
        local_views=of_views(views["num_local"], views["local_cells"]),
        present={m.name: shape(np.bool_, num_dates[m.name]) for m in modalities},
        day_of_year={m.name: shape(np.int32, num_dates[m.name]) for m in modalities},
        record=shape(np.int32),
        bad_record=shape(np.int32),
    )


def check_element(element: Mapping[str, Any], shapes: Batch, *, num_samples: int) -> None:
    """Hold the samples of a batch that this process reads against the shapes that the step is compiled for.

    Raises:
      ValueError: naming the array, what was got and what was wanted.
    """
    wanted = jax.tree_util.tree_leaves_with_path(shapes)
    got = jax.tree.leaves(Batch.from_dict(element))
    if len(wanted) != len(got):
        raise ValueError(f"input batch: {len(got)} arrays; wanted {len(wanted)}")
    for (path, shape), array in zip(wanted, got):
        local = (num_samples, *shape.shape[1:])
        if array.shape != local or array.dtype != shape.dtype:
            raise ValueError(
                f"input batch{jax.tree_util.keystr(path)}: got {array.dtype}{array.shape}; wanted {shape.dtype}{local}"
            )


def size_text(
    modalities: Sequence[Modality], *, data: Mapping[str, Any], model: Mapping[str, Any], teacher_local: bool
) -> str:
    """Tokens and FLOPs of a sample by formula; ``teacher_local``: whether the teacher sees local views (L_QSACL)."""
    views, num_dates = data["views"], data["num_dates"]
    costs = cost.view_costs(modalities, data=data, model=model)
    lines = ["tokens and FLOPs per sample, forward (a multiply-add is two)"]
    for kind, view in costs.items():
        for m in modalities:
            lines.append(
                f"  {views[f'num_{kind}']} {kind} views x {num_dates[m.name]} dates of {m.name}: "
                f"{view.tokens[m.name]} tokens, {view.image_flops[m.name] / 1e9:.3g} GFLOP each"
            )
        lines.append(f"  fusion per {kind} view: {view.fusion_flops / 1e9:.3g} GFLOP")
    step = cost.step_flops(
        costs["global"], costs["local"], views=views, num_dates=num_dates, teacher_local=teacher_local
    )
    lines.append(f"  a training step, student and teacher: {step / 1e9:.4g} GFLOP per sample")
    lines.append(
        f"  a training step, whole batch of {data['batch_size']}: {step * data['batch_size'] / 1e12:.4g} TFLOP"
    )
    return "\n".join(lines)


def parameter_text(parts: Mapping[str, int]) -> str:
    """Parameters per part, and the bytes of the training state."""
    total = sum(parts.values())
    rows = [f"  {name:<28}{count:>16,}" for name, count in sorted(parts.items())]
    return "\n".join(
        [
            "parameters (student; the teacher has as many)",
            *rows,
            f"  {'total':<28}{total:>16,}",
            f"state: {cost.state_bytes(total) / 2**30:.3g} GiB in fp32 over all devices (student, teacher, moments)",
            f"gradients in a step: {cost.gradient_bytes(total) / 2**30:.3g} GiB; activations are not counted here",
        ]
    )


def batch_text(element: Mapping[str, Any], modalities: Sequence[Modality]) -> str:
    """What one sample holds: bytes, and per modality the share of dates present and the range of its numbers."""
    arrays = jax.tree.leaves(element)
    num_bytes = sum(array.nbytes for array in arrays)
    lines = [f"one sample of this process: {num_bytes / 2**20:.1f} MiB in {len(arrays)} arrays, checked"]
    for m in modalities:
        images = element["global_views"]["images"][m.name]
        usable = element["global_views"]["cell_usable"][m.name]
        lines.append(
            f"  {m.name}: {'x'.join(map(str, images.shape))} {images.dtype}, numbers {images.min()} to {images.max()} "
            f"({m.unit}); dates present {element['present'][m.name].mean():.0%}, cells usable {usable.mean():.0%}"
        )
    labels = element["global_views"]["labels"]
    lines.append(f"  {OSM.name}: {float(np.mean(labels.sum(-1) > 0)):.0%} of the cells have a label")
    return "\n".join(lines)


def batch_bytes(shapes: Batch) -> int:
    """Bytes of a global batch on the devices."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
