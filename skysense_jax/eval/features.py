"""Frozen features of whole samples: no crops, no photometric changes, no drawn dates; what probes and pictures read.

A sample is cut into windows of the size that training saw, at native scale; each is encoded in evaluation mode and its
cells are put back in place. Masks follow the same rules as in training (batch.Views).
Next: probes.py, pictures.py.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Int, Num

from skysense_jax import photometric
from skysense_jax.batch import Views
from skysense_jax.data import geometry
from skysense_jax.data.sample import UNDATED, SampleReader
from skysense_jax.data.views import band_means, day_of_year
from skysense_jax.eval.ahead import ahead
from skysense_jax.modalities import Modality
from skysense_jax.sharding import BATCH, LOGICAL_AXIS_RULES


@dataclasses.dataclass(frozen=True)
class WholeSample:
    """Evenly spaced dates of a sample over its whole extent; fields of batch.Views and batch.Batch without B and V.

    Attributes:
      images: per modality, raw numbers; invalid pixels hold the band mean, as in training.
      token_valid, cell_usable: per modality on the stage-1 token grid and on the cell grid, as in batch.Views.
      present, day_of_year: per modality, as in batch.Batch.
    """

    images: Mapping[str, Num[np.ndarray, "T H W C"]]
    token_valid: Mapping[str, Bool[np.ndarray, "T _ _"]]
    cell_usable: Mapping[str, Bool[np.ndarray, "T _ _"]]
    present: Mapping[str, Bool[np.ndarray, " T"]]
    day_of_year: Mapping[str, Int[np.ndarray, " T"]]


@dataclasses.dataclass(frozen=True)
class SampleFeatures:
    """Features of every cell of a sample.

    Attributes:
      fused: over all modalities and dates.
      fused_usable: where at least one modality and date was usable.
      modality, modality_usable: per modality, mean over its usable dates; zero where there is none. Empty if they were
        not asked for.
      whole: what was encoded.
    """

    fused: Float[np.ndarray, "P Q D"]
    fused_usable: Bool[np.ndarray, "P Q"]
    modality: Mapping[str, Float[np.ndarray, "P Q _"]]
    modality_usable: Mapping[str, Bool[np.ndarray, "P Q"]]
    whole: WholeSample


def spread_dates(num_available: int, num_dates: int) -> Int[np.ndarray, " T"]:
    """At most ``num_dates`` indices, evenly spaced over those there are: the middles of equal parts."""
    count = min(num_available, num_dates)
    return ((np.arange(count) + 0.5) * num_available / max(count, 1)).astype(np.int32)


def window_starts(extent_cells: int, cells: int) -> tuple[int, ...]:
    """First cells of windows of ``cells`` that cover the extent; the last one ends with it and may overlap."""
    last = max(extent_cells - cells, 0)
    return tuple(sorted({*range(0, last, cells), last}))


def read_whole(
    sample: SampleReader, modalities: Sequence[Modality], *, num_dates: Mapping[str, int], min_cells: int = 1
) -> WholeSample:
    """The whole extent of a sample, padded with invalid pixels in the south and east to at least ``min_cells``."""
    side = max(sample.extent_cells, min_cells)
    whole = WholeSample({}, {}, {}, {}, {})
    for modality in modalities:
        name, count, pixels = modality.name, num_dates[modality.name], side * modality.pixels_per_cell
        days = sample.days(name)
        dates = spread_dates(len(days), count)
        fill = band_means(modality)
        images = np.broadcast_to(fill, (count, pixels, pixels, modality.num_bands)).copy()
        seen, clear = np.zeros((2, count, pixels, pixels), bool)
        for t, date in enumerate(dates):
            window = sample.window(name, int(date), 0, 0, sample.extent_cells)
            place = (t, *(slice(0, n) for n in window.valid.shape))
            images[place] = np.where(window.valid[..., None], window.pixels, fill)
            seen[place] = window.valid
            clear[place] = window.valid & ~window.cloud
        whole.images[name] = images
        whole.token_valid[name] = geometry.share_true(seen, block=modality.patch) >= 0.5
        whole.cell_usable[name] = geometry.share_true(clear, block=modality.pixels_per_cell) >= 0.5
        whole.present[name] = np.arange(count) < len(dates)
        whole.day_of_year[name] = np.zeros(count, np.int32)
        for t, date in enumerate(dates):
            whole.day_of_year[name][t] = 0 if days[date] == UNDATED else day_of_year(int(days[date]))
    return whole


def clearest_date(whole: WholeSample, modality: str) -> int | None:
    """The date with most usable cells; None if the sample lacks the modality."""
    if not whole.present[modality].any():
        return None
    return int((whole.cell_usable[modality].sum((1, 2)) - ~whole.present[modality]).argmax())


def cut_window(whole: WholeSample, modalities: Sequence[Modality], row: int, column: int, cells: int) -> dict[str, Any]:
    """``views``, ``present`` and ``day_of_year`` of one window, as one view (V = 1) without B."""

    box = geometry.Box(row, column, cells)

    def part(x: np.ndarray, per_cell: int) -> np.ndarray:
        rows, columns = (slice(i * per_cell, (i + cells) * per_cell) for i in (row, column))
        return x[None, :, rows, columns]

    return dict(
        views=Views(
            images={m.name: part(whole.images[m.name], m.pixels_per_cell) for m in modalities},
            token_valid={m.name: part(whole.token_valid[m.name], m.tokens_per_cell) for m in modalities},
            cell_usable={m.name: part(whole.cell_usable[m.name], 1) for m in modalities},
            labels=None,
            affine=geometry.view_affine(box, geometry.Orientation(False, 0), view_cells=cells)[None],
        ),
        present=dict(whole.present),
        day_of_year=dict(whole.day_of_year),
    )


def num_batch_shards() -> int:
    """What the mesh that is set divides a batch into; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in dict(LOGICAL_AXIS_RULES)[BATCH])


def replicated(tree: Any) -> Any:
    """Inside jit: the tree, whole on every device of the mesh, so that every process can read it."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, PartitionSpec())


def placed(tree: Any) -> Any:
    """Outside of jit: a tree that every process has, whole on every device of the mesh that is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return jax.tree.map(jnp.asarray, tree)
    everywhere = NamedSharding(jax.sharding.get_mesh(), PartitionSpec())
    place = lambda x: jax.make_array_from_callback(x.shape, everywhere, lambda index: x[index])  # noqa: E731
    return jax.tree.map(place, tree)


def _encode(
    model: nn.Module, modalities: tuple[Modality, ...], fused_only: bool, params: Any, window: Any
) -> dict[str, Any]:
    """Fused features, and per modality the mean over usable dates, of windows [B 1 ...]; whole on every device."""
    features = model.apply(
        {"params": params},
        photometric.prepare(window["views"], modalities, key=None),
        window["views"],
        present=window["present"],
        day_of_year=window["day_of_year"],
        train=False,
        method="encode",
    )
    out = dict(fused=features.fused[:, 0].astype(jnp.float32), fused_usable=features.fused_usable[:, 0])
    for name, x in () if fused_only else features.modality.items():
        usable = features.usable[name][:, 0]
        total = jnp.where(usable[..., None], x[:, 0].astype(jnp.float32), 0.0).sum(axis=1)
        out[f"modality/{name}"] = total / jnp.maximum(usable.sum(axis=1), 1)[..., None]
        out[f"modality_usable/{name}"] = usable.any(axis=1)
    return replicated(out)


# The network is a static argument: an equal one is compiled once, whoever asks.
_jit_encode = jax.jit(_encode, static_argnums=(0, 1, 2))


def sample_features(
    model: nn.Module,
    params: Any,
    modalities: Sequence[Modality],
    samples: Iterable[SampleReader],
    *,
    cells: int,
    num_dates: Mapping[str, int],
    batch_size: int,
    fused_only: bool = False,
) -> Iterator[SampleFeatures]:
    """Features of each sample, in order, on the host; ``fused_only``: those of each modality are left out.

    ``model`` is a SkySense. Runs under the mesh that is set, or without one. ``cells`` is the side of a window (that
    of the run's global views),
    ``batch_size`` how many windows are encoded at once, rounded up to what the mesh divides.
    """
    modalities = tuple(modalities)
    batch_size = -(-batch_size // num_batch_shards()) * num_batch_shards()
    whole_of = functools.partial(read_whole, modalities=modalities, num_dates=num_dates, min_cells=cells)
    pairs = ahead(lambda sample: (sample, whole_of(sample)), samples)
    while read := list(itertools.islice(pairs, batch_size)):
        chunk, wholes = zip(*read)
        places = []
        for i, sample in enumerate(chunk):
            starts = window_starts(sample.extent_cells, cells)
            places += [(i, row, column) for row in starts for column in starts]
        stitched: list[dict[str, np.ndarray]] = [{} for _ in chunk]
        for first in range(0, len(places), batch_size):
            part = places[first : first + batch_size]
            filled = part + part[-1:] * (batch_size - len(part))  # one shape, one compilation
            windows = [cut_window(wholes[i], modalities, row, column, cells) for i, row, column in filled]
            window = jax.tree.map(lambda *leaves: np.stack(leaves), *windows)
            encoded = _jit_encode(model, modalities, fused_only, params, window)
            for key, values in jax.device_get(encoded).items():
                for (i, row, column), value in zip(part, values):
                    side = max(chunk[i].extent_cells, cells)
                    canvas = stitched[i].setdefault(key, np.zeros((side, side, *value.shape[2:]), value.dtype))
                    canvas[row : row + cells, column : column + cells] = value
        for sample, whole, canvases in zip(chunk, wholes, stitched):
            found = {key: canvas[: sample.extent_cells, : sample.extent_cells] for key, canvas in canvases.items()}
            yield SampleFeatures(
                fused=found["fused"],
                fused_usable=found["fused_usable"],
                modality={m.name: found[f"modality/{m.name}"] for m in modalities if not fused_only},
                modality_usable={m.name: found[f"modality_usable/{m.name}"] for m in modalities if not fused_only},
                whole=whole,
            )
