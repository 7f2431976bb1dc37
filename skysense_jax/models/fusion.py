"""Fusion over dates and modalities: one feature a cell (SkySense, arXiv 2312.10115 sec. 3.2; kept by SkySense V2).

Per cell, a class token and the features of all modalities and dates of that cell are a short sequence for a Transformer
encoder; what the class token becomes is the fused feature. Cells do not see each other here: the backbone did that.
Next: queries.py, which reads the fused features.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from skysense_jax.models.layers import VECTOR_INIT, Dense, DropPath, LayerNorm, drop_rates, partitioned, recomputed
from skysense_jax.models.vit import GlobalBlock
from skysense_jax.sharding import EMBED, LAYERS, UNSHARDED, constrain_batch

DAYS = 367  # 1-366, and 0 for undated


class Fusion(nn.Module):
    """The encoder: linear layer to ``width``, embeddings of day and modality, blocks without LayerScale, final norm.

    Attributes: fields of ``config.model.fusion`` and ``config.efficiency`` (configs/base.py), where each is explained,
    and the names of the modalities whose embeddings exist.
    """

    modalities: tuple[str, ...]
    width: int
    depth: int
    head_width: int
    mlp_ratio: int | float = 4
    drop_path: int | float = 0.0
    remat: str = "none"
    scan_unroll: int = 1
    attention: str = "xla"
    compute_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        features: Mapping[str, Float[Array, "B V _T P Q D"]],
        usable: Mapping[str, Bool[Array, "B V _T P Q"]],
        day_of_year: Mapping[str, Int[Array, "B _T"]],
        *,
        train: bool,
        drop_draws: Float[Array, "B I branches"] | None = None,
    ) -> tuple[Float[Array, "B V P Q F"], Bool[Array, "B V P Q"]]:
        """The fused feature of each cell, and where at least one modality and date was usable.

        Any subset of the modalities may be there; what is not usable changes nothing. Days are 1-366, 0 for undated.
        ``drop_draws``: uniform numbers that turn on drop path, two a block for each of the I = V P Q cells.

        Raises:
          ValueError: an unknown modality.
        """
        assert self.width % self.head_width == 0, (self.width, self.head_width)
        if not features or not set(features) <= set(self.modalities):
            raise ValueError(
                f"config.data.modalities: got features of {sorted(features)}; wanted one or more of {self.modalities}"
            )
        dtype = self.compute_dtype
        project = Dense(self.width, axes=(EMBED, UNSHARDED), compute_dtype=dtype, name="project")
        table = lambda name, shape, *axes: self.param(name, partitioned(VECTOR_INIT, *axes), shape)  # noqa: E731
        days = table("day_embedding", (DAYS, self.width), UNSHARDED, EMBED)  # above 1 MiB in huge
        kinds = table("modality_embedding", (len(self.modalities), self.width), UNSHARDED, UNSHARDED)
        class_token = table("class_token", (self.width,), UNSHARDED)

        names = [name for name in self.modalities if name in features]
        batch, views, _, rows, columns, _ = features[names[0]].shape
        tokens, valid = (
            [jnp.broadcast_to(class_token, (batch, views * rows * columns, 1, self.width)).astype(dtype)],
            [],
        )
        for name in names:
            # a day outside the table becomes NaN, not another day
            day = jnp.take(days, day_of_year[name], axis=0, mode="fill") + kinds[self.modalities.index(name)]
            x = rearrange(project(features[name]), "B V T P Q D -> B (V P Q) T D")
            tokens.append(x + day[:, None].astype(dtype))
            valid.append(rearrange(usable[name], "B V T P Q -> B (V P Q) T"))
        any_usable = jnp.concatenate(valid, axis=2).any(2)
        valid = jnp.concatenate([jnp.ones((*any_usable.shape, 1), bool), *valid], axis=2)
        x = self._scan(constrain_batch(jnp.concatenate(tokens, axis=2)), valid, train, drop_draws)
        fused = LayerNorm(compute_dtype=dtype, name="norm")(x[:, :, 0])
        to_grid = lambda x: x.reshape(batch, views, rows, columns, *x.shape[2:])  # noqa: E731
        return to_grid(fused), to_grid(any_usable)

    def _scan(self, x, valid, train, drop_draws):
        """All blocks, one after the other; their parameters are stacked under "blocks"."""
        block = GlobalBlock(
            head_width=self.head_width,
            mlp_ratio=self.mlp_ratio,
            layer_scale_init=None,
            attention=self.attention,
            compute_dtype=self.compute_dtype,
            name="blocks",
        )

        def body(block, x, drop):
            return block(x, valid=valid, drop=drop, train=train)

        scanned = nn.scan(
            recomputed(body, self.remat, scanned=True),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth,
            unroll=self.scan_unroll,
            metadata_params={nn.PARTITION_NAME: LAYERS},
        )
        drop = None
        if drop_draws is not None and self.drop_path:
            draws = rearrange(drop_draws, "B I (depth branch) -> depth B I branch", depth=self.depth)
            drop = DropPath(jnp.asarray(drop_rates(self.drop_path, self.depth)), draws)
        return scanned(block, x, drop)[0]
