"""From a batch of windows to logits and a loss, inside jit: the pre-trained network, and a decoder on it.

Everything here runs on the mesh that is set, windows over its batch axes, or without one. Mixtures of experts go the
way of evaluation, which drops no token: a batch of fine-tuning is small. Next: finetune.py.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from skysense_jax import photometric
from skysense_jax.batch import Views
from skysense_jax.eval.scores import IGNORED
from skysense_jax.modalities import Modality
from skysense_jax.models.skysense import SkySense, draw_drops
from skysense_jax.sharding import constrain_batch
from skysense_jax.tasks import objectives
from skysense_jax.tasks.decoders import LinearHead, resize
from skysense_jax.tasks.examples import CHANGE, MAPS, MULTI_LABEL


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What is computed; a static argument of jit.

    Attributes:
      network: its backbone, and its fusion where ``fused``, are used.
      rows: the modalities that are read; of stages a single one.
      fused: whether the head reads fused features; else the maps of the four stages.
      head: a module of decoders.py.
      kind: of examples.KINDS.
      per_cell: logits along the side of a cell, for maps.
    """

    network: SkySense
    rows: tuple[Modality, ...]
    fused: bool
    head: nn.Module
    kind: str
    per_cell: int

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the network's parameters that are used."""
        return ("backbone", "fusion") if self.fused else ("backbone",)


def _backbone(network: SkySense, images: Any, token_valid: Any, drop_draws: Any) -> Any:
    return network.backbone(images, token_valid, train=False, drop_draws=drop_draws, return_stages=True)


def _on_grid(mask: Bool[Array, "B T P Q"], rows: int, columns: int) -> Bool[Array, "B T {rows} {columns}"]:
    """The mask on a grid that divides its own, any of a block; or that it divides, repeated."""
    batch, dates, p, q = mask.shape
    if p > rows:
        return mask.reshape(batch, dates, rows, p // rows, columns, q // columns).any((3, 5))
    return mask.repeat(rows // p, axis=2).repeat(columns // q, axis=3)


def mean_over_dates(
    x: Float[Array, "B T P Q D"], valid: Bool[Array, "B T _ _"], usable: Bool[Array, "B T _ _"]
) -> Float[Array, "B P Q D"]:
    """For every place the mean over the dates that saw clear ground there, or else over those that saw anything."""
    valid, usable = _on_grid(valid, *x.shape[2:4]), _on_grid(usable, *x.shape[2:4])
    clear = valid & usable
    counted = jnp.where(clear.any(1, keepdims=True), clear, valid)
    total = jnp.where(counted[..., None], x.astype(jnp.float32), 0.0).sum(1)
    return total / jnp.maximum(counted.sum(1), 1)[..., None]


def encode(
    tuned: Tuned, params: Any, batch: Any, drop_key: PRNGKeyArray | None
) -> tuple[list[Float[Array, "B _P _Q _D"]], Bool[Array, "B P Q"]]:
    """Maps from the finest to the coarsest, and usable cells, of all images of a batch, dates of a change in a row."""
    flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
    batch = jax.tree.map(lambda x: flat(constrain_batch(x)), {k: x for k, x in batch.items() if k != "target"})
    views = Views(
        **{key: {m: x[:, None] for m, x in batch[key].items()} for key in ("images", "token_valid", "cell_usable")},
        labels=None,
        affine=jnp.zeros((len(next(iter(batch["present"].values()))), 1, 2, 3)),
    )
    images = photometric.prepare(views, tuned.rows, key=None)
    draws = None if drop_key is None else draw_drops(tuned.network, views, key=drop_key)
    if tuned.fused:
        found = tuned.network.apply(
            {"params": params},
            images,
            views,
            present=batch["present"],
            day_of_year=batch["day_of_year"],
            train=False,
            drop_draws=draws,
            method="encode",
        )
        return [found.fused[:, 0]], found.fused_usable[:, 0]
    (name,) = images
    present = batch["present"][name][:, :, None, None]
    valid, usable = batch["token_valid"][name] & present, batch["cell_usable"][name] & present
    found = tuned.network.apply({"params": params}, {name: images[name][:, 0]}, {name: valid}, draws, method=_backbone)
    return [mean_over_dates(x, valid, usable) for x in found.stages[name]], usable.any(1)


def logits(
    tuned: Tuned, params: Any, statistics: Any, batch: Any, *, train: bool, drop_key: PRNGKeyArray | None = None
) -> tuple[Float[Array, "B *rest"], Any]:
    """Logits [B L], or of maps [B H W L], fp32, and the head's running statistics.

    ``params``: {"backbone", "fusion" where it is used, "head"}. ``drop_key`` turns on drop path. Change is read from
    the absolute difference of the two dates' maps (arXiv 1810.08462); it has one logit, of the changed class.
    """
    maps, usable = encode(tuned, {part: params[part] for part in tuned.parts}, batch, drop_key)
    if tuned.kind == CHANGE:
        maps = [jnp.abs(x[:, 0] - x[:, 1]) for x in (x.reshape(-1, 2, *x.shape[1:]) for x in maps)]
    variables = {"params": params["head"], **statistics}
    if isinstance(tuned.head, LinearHead):
        return tuned.head.apply(variables, maps[-1], usable), statistics
    out = tuned.head.apply(variables, maps, train=train, mutable=["batch_stats"] if train else False)
    out, statistics = out if train else (out, statistics)
    return resize(out, *(side * tuned.per_cell for side in usable.shape[1:])), statistics


def loss(
    tuned: Tuned, params: Any, statistics: Any, batch: Any, *, drop_key: PRNGKeyArray | None
) -> tuple[Float[Array, ""], Any]:
    """What fine-tuning minimises on a batch, and the head's new statistics."""
    found, statistics = logits(tuned, params, statistics, batch, train=True, drop_key=drop_key)
    if tuned.kind == MULTI_LABEL:
        return objectives.binary_cross_entropy(found, batch["target"]), statistics
    if tuned.kind == CHANGE:
        return objectives.binary_cross_entropy(found[..., 0], batch["target"]), statistics
    ignored = IGNORED if tuned.kind in MAPS else -1  # 255 may be a scene's class
    return objectives.cross_entropy(found, batch["target"], ignored=ignored), statistics


def init_head(tuned: Tuned, shapes: tuple[Sequence[Any], Any], *, seed: int) -> tuple[Any, Any]:
    """Parameters and running statistics of a fresh head; ``shapes`` are those of what ``encode`` gives."""

    def init():
        maps, usable = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        key = jax.random.key(seed)
        if isinstance(tuned.head, LinearHead):
            return tuned.head.init(key, maps[-1], usable)
        return tuned.head.init(key, maps, train=False)

    variables = dict(jax.jit(init)())
    return variables.pop("params"), variables
