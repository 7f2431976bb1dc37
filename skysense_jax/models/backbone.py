"""The unified backbone (SkySense V2 sec. 3.1-3.2): four stages whose parameters all modalities share.

Stages 1 and 2 are Swin V2 blocks, stages 3 and 4 global blocks with prompts, the last of them mixtures of experts.
Modalities of one token grid and one way of merging share a call (``group_modalities``), so a step holds one graph per
view shape and group. Parameter paths: tokenizer_{m}, stage1_{i}, stage2_{i}, merging_{2,3,4}, stage{3,4}_{m}_prompts,
and stage3, stage3_experts, stage4, stage4_experts, whose blocks are stacked on a first axis for the scan.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float

from skysense_jax.modalities import Modality
from skysense_jax.models.attention import Rotation, rotation, token_offsets
from skysense_jax.models.layers import VECTOR_INIT, DropPath, drop_rates, partitioned, recomputed
from skysense_jax.models.merging import PatchMerging, merged_validity
from skysense_jax.models.moe import RouterStats
from skysense_jax.models.swin import SwinBlock
from skysense_jax.models.tokenizers import Tokenizer
from skysense_jax.models.vit import GlobalBlock
from skysense_jax.sharding import EMBED, LAYERS, UNSHARDED, constrain_batch


@struct.dataclass
class BackboneOutput:
    """Features of a call's images, per modality.

    Attributes:
      features: one stage-4 token a cell, no norm; zero where not ``valid``.
      valid: validity carried through the merges: any of the four neighbours.
      router: summed over groups, None without a mixture of experts.
      stages: if asked for, the tokens after each stage, before merging.
    """

    features: Mapping[str, Any]  # {m: B I P Q D}
    valid: Mapping[str, Any]  # {m: B I P Q} bool
    router: RouterStats | None
    stages: Mapping[str, tuple[Any, ...]] | None = None


def group_modalities(
    modalities: Sequence[Modality], grids: Mapping[str, tuple[int, int]]
) -> tuple[tuple[Modality, ...], ...]:
    """The modalities that ``grids`` (stage-1 token rows and columns) names, those that share a run together."""
    groups: dict[Any, list[Modality]] = {}
    for modality in modalities:
        if modality.name in grids:
            groups.setdefault((grids[modality.name], modality.merges_at), []).append(modality)
    return tuple(map(tuple, groups.values()))


class Backbone(nn.Module):
    """Tokenizers, four stages, adaptive patch merging, prompts.

    Attributes: fields of ``config.model.backbone`` and ``config.efficiency`` (configs/base.py), where each is
    explained, the modalities whose parameters exist, and the dtype of matrix products and activations.
    """

    modalities: tuple[Modality, ...]
    width: int
    depths: tuple[int, int, int, int]
    head_width: int = 32
    window: int = 8
    mlp_ratio: int | float = 4
    num_prompts: int = 4
    merging: str = "averaged"
    drop_path: int | float = 0.0
    layer_scale_init: int | float = 1e-5
    num_moe_blocks: int = 0
    moe_from: str = "end"
    num_experts: int = 8
    experts_per_token: int = 1
    capacity_factor: int | float = 1.25
    remat: str = "none"
    scan_unroll: int = 1
    attention: str = "xla"
    window_attention: str = "xla"
    compute_dtype: Any = jnp.float32

    def setup(self):
        assert self.merging in ("averaged", "separate"), self.merging  # what a person may ask for: config_checks.py
        assert self.remat in ("none", "matmuls", "blocks"), self.remat
        assert self.width % self.head_width == self.head_width % 4 == 0, (self.width, self.head_width)
        assert self.moe_from in ("end", "start"), self.moe_from
        assert self.num_moe_blocks <= sum(self.depths[2:]), (self.num_moe_blocks, self.depths)
        dtype, widths = self.compute_dtype, [self.width * 2**stage for stage in range(4)]
        self.tokenizer = {m.name: Tokenizer(m.patch, self.width, dtype) for m in self.modalities}
        for stage in (1, 2):
            blocks = [
                SwinBlock(self.head_width, self.window, bool(i % 2), self.mlp_ratio, self.window_attention, dtype)
                for i in range(self.depths[stage - 1])
            ]
            setattr(self, f"stage{stage}", blocks)
        for stage in (2, 3, 4):
            keeping = [m.name for m in self.modalities if not m.merges_at[stage - 2]]
            separate = tuple(keeping) if self.merging == "separate" else ()
            setattr(self, f"merging_{stage}", PatchMerging(widths[stage - 2], separate, dtype))
        for stage in (3, 4):
            setattr(self, f"prompts{stage}", self._prompts(stage, widths[stage - 1]))
            self._add_segments(stage)

    def _prompts(self, stage: int, width: int) -> dict[str, Any]:
        shape, init = (self.num_prompts, width), partitioned(VECTOR_INIT, UNSHARDED, EMBED)
        if not self.num_prompts:
            return {m.name: jnp.zeros(shape) for m in self.modalities}  # checkpoints take no empty parameter
        return {m.name: self.param(f"stage{stage}_{m.name}_prompts", init, shape) for m in self.modalities}

    def _add_segments(self, stage: int):
        """The dense and the mixture blocks of stage 3 or 4, each one block whose parameters the scan stacks."""
        common = dict(
            head_width=self.head_width,
            mlp_ratio=self.mlp_ratio,
            layer_scale_init=self.layer_scale_init,
            attention=self.attention,
            compute_dtype=self.compute_dtype,
        )
        experts = dict(
            num_experts=self.num_experts,
            experts_per_token=self.experts_per_token,
            capacity_factor=self.capacity_factor,
        )
        dense_depth, moe_depth = self._segment_depths(stage)
        if dense_depth:
            setattr(self, f"stage{stage}", GlobalBlock(**common))
        if moe_depth:
            setattr(self, f"stage{stage}_experts", GlobalBlock(**common, **experts))

    def _segment_depths(self, stage: int) -> tuple[int, int]:
        others = sum(self.depths[stage:] if self.moe_from == "end" else self.depths[2 : stage - 1])  # that come first
        moe_depth = min(max(self.num_moe_blocks - others, 0), self.depths[stage - 1])
        return self.depths[stage - 1] - moe_depth, moe_depth

    def __call__(
        self,
        images: Mapping[str, Float[Array, "B _I _H _W _C"]],
        token_valid: Mapping[str, Bool[Array, "B _I _P _Q"]],
        *,
        train: bool,
        drop_draws: Mapping[str, Float[Array, "B _I branches"]] | None = None,
        return_stages: bool = False,
    ) -> BackboneOutput:
        """Features of normalised images, of any subset of the modalities; ``token_valid`` is on the stage-1 grid.

        What lies in invalid tokens changes nothing. ``train`` turns on capacity routing; ``drop_draws``, uniform
        numbers, two a block for each image, turn on drop path.

        Raises:
          ValueError: an unknown modality, a wrong band count, or an image size that does not fit its token grid.
        """
        self._check_images(images, token_valid)
        grids = {name: valid.shape[2:] for name, valid in token_valid.items()}
        features, validity, stages, router = {}, {}, {}, None
        for group in group_modalities(self.modalities, grids):
            tokens = [self.tokenizer[m.name](images[m.name]) for m in group]
            valid = jnp.concatenate([token_valid[m.name] for m in group], axis=1)
            draws = None
            if drop_draws is not None and self.drop_path:
                draws = jnp.concatenate([drop_draws[m.name] for m in group], axis=1)
            after_stage, valid, stats = self._run(group, tokens, valid, draws, train=train)
            ends = np.cumsum([x.shape[1] for x in tokens])[:-1]
            per_modality = zip(*(jnp.split(x, ends, axis=1) for x in after_stage))
            for m, of_stages, m_valid in zip(group, per_modality, jnp.split(valid, ends, axis=1)):
                features[m.name], validity[m.name], stages[m.name] = of_stages[-1], m_valid, of_stages
            router = stats if router is None else router + stats
        return BackboneOutput(features, validity, router, stages if return_stages else None)

    def _check_images(self, images, token_valid):
        rows = {m.name: m for m in self.modalities}
        _check_names(images, token_valid, self.modalities)
        for name, x in images.items():
            grid = token_valid[name].shape[2:]
            wanted = (*(side * rows[name].patch for side in grid), rows[name].num_bands)
            if x.shape[2:] != wanted or x.shape[:2] != token_valid[name].shape[:2]:
                raise ValueError(
                    f"images of {name!r}: got shape {x.shape} with token grid {token_valid[name].shape}; wanted "
                    f"(rows, columns, bands) {wanted}: patch {rows[name].patch}, bands {rows[name].bands}"
                )

    def _run(self, group, tokens, valid, draws, *, train):
        """The four stages over the images of a group: tokens after each, final validity, router statistics."""
        owners = tuple(m.name for m, x in zip(group, tokens) for _ in range(x.shape[1]))
        x = jnp.where(valid[..., None], jnp.concatenate(tokens, axis=1), 0)
        drop = None
        if draws is not None:
            draws = rearrange(draws, "B I (depth branch) -> depth B I branch", depth=sum(self.depths))
            drop = DropPath(jnp.asarray(drop_rates(self.drop_path, sum(self.depths))), draws)
        ends = np.cumsum(self.depths)
        cells = valid.shape[2:]
        for merges in group[0].merges_at:
            cells = tuple(-(-side // 2) for side in cells) if merges else cells
        after_stage, router = [], None
        for stage in (1, 2, 3, 4):
            of_stage = _blocks(drop, slice(ends[stage - 1] - self.depths[stage - 1], ends[stage - 1]))
            if stage > 1:
                x, valid = self._transition(stage, group, tokens, x, valid)
            if stage < 3:
                x = self._swin_stage(stage, x, valid, of_stage)
            else:
                x, stats = self._global_stage(stage, owners, cells, x, valid, of_stage, train)
                router = _then(router, stats)
            x = jnp.where(valid[..., None], x, 0)  # so a merge adds nothing of what lies in invalid tokens
            after_stage.append(x)
        return after_stage, valid, router

    def _transition(self, stage, group, tokens, x, valid):
        merging = getattr(self, f"merging_{stage}")
        if group[0].merges_at[stage - 2]:
            return merging(x), merged_validity(valid)
        if self.merging == "averaged":
            return merging.keep(x, group[0].name), valid
        parts = jnp.split(x, np.cumsum([t.shape[1] for t in tokens])[:-1], axis=1)
        return jnp.concatenate([merging.keep(part, m.name) for m, part in zip(group, parts)], axis=1), valid

    def _swin_stage(self, stage, x, valid, drop):
        def body(block, x, valid, drop):
            return block(x, valid=valid, drop=drop)

        for i, block in enumerate(getattr(self, f"stage{stage}")):
            x = recomputed(body, self.remat, scanned=False)(block, x, valid, _blocks(drop, i))
        return x

    def _global_stage(self, stage, owners, cells, x, valid, drop, train):
        """Tokens and prompts through the blocks of stage 3 or 4; prompts are dropped again.

        Prompts are tokens like the others, in mixtures too; those of an image without a valid token are invalid, so
        that an absent date takes no place with an expert.
        """
        batch, _, rows, columns, _ = x.shape
        prompts = jnp.stack([getattr(self, f"prompts{stage}")[name] for name in owners]).astype(x.dtype)
        prompts = jnp.broadcast_to(prompts, (batch, *prompts.shape))
        seen = jnp.broadcast_to(valid.any((2, 3))[:, :, None], prompts.shape[:3])
        tokens = constrain_batch(jnp.concatenate((rearrange(x, "B I P Q D -> B I (P Q) D"), prompts), axis=2))
        token_valid = jnp.concatenate((rearrange(valid, "B I P Q -> B I (P Q)"), seen), axis=2)
        offsets = np.concatenate((token_offsets((rows, columns), cells), np.zeros((self.num_prompts, 2))))
        turn = rotation(offsets, head_width=self.head_width)
        dense_depth, moe_depth = self._segment_depths(stage)
        segments = ((f"stage{stage}", dense_depth), (f"stage{stage}_experts", moe_depth))
        start, stats = 0, None
        for name, depth in segments if self.moe_from == "end" else reversed(segments):
            if depth:
                of_blocks, block = _blocks(drop, slice(start, start + depth)), getattr(self, name)
                tokens, found = self._scan(block, depth, tokens, token_valid, turn, of_blocks, train)
                start, stats = start + depth, found if name.endswith("experts") else stats
        if stats is not None:
            sums = jax.tree.map(lambda leaf: leaf.sum(0), stats)
            stats = sums.replace(load=stats.load)
        return tokens[:, :, : rows * columns].reshape(x.shape), stats

    def _scan(self, block, depth, x, valid, turn: Rotation, drop, train):
        """``depth`` blocks of stacked parameters, one after the other; also their statistics, stacked."""

        def body(block, x, drop):
            return block(x, valid=valid, turn=turn, drop=drop, train=train)

        scanned = nn.scan(
            recomputed(body, self.remat, scanned=True),
            variable_axes={"params": 0, "intermediates": 0},  # the second: moe.CHOSEN, if asked for
            split_rngs={"params": True},
            length=depth,
            unroll=self.scan_unroll,
            metadata_params={nn.PARTITION_NAME: LAYERS},
        )
        return scanned(block, x, drop)


def _blocks(drop: DropPath | None, which: int | slice) -> DropPath | None:
    """The drop path of one block or of some blocks of those that it is stacked for."""
    return jax.tree.map(lambda leaf: leaf[which], drop)


def _then(first: RouterStats | None, second: RouterStats | None) -> RouterStats | None:
    """The statistics of some mixtures and then of others: loads in a row, the rest summed; None: there are none."""
    if first is None or second is None:
        return second if first is None else first
    load = jnp.concatenate((first.load, second.load))
    return (first.replace(load=0.0) + second.replace(load=0.0)).replace(load=load)


class SeparateBackbones(nn.Module):
    """A backbone of its own for each modality: what the shared one is compared with. Paths: modality_{m}/...

    Attributes:
      modalities: as of ``Backbone``.
      fields: names and values of all other arguments of each ``Backbone``; pairs, since jit hashes a network.
    """

    modalities: tuple[Modality, ...]
    fields: tuple[tuple[str, Any], ...]

    def setup(self):
        self.modality = {m.name: Backbone(modalities=(m,), **dict(self.fields)) for m in self.modalities}

    @property
    def drop_path(self) -> int | float:
        return dict(self.fields)["drop_path"]

    @property
    def depths(self) -> tuple[int, int, int, int]:
        return dict(self.fields)["depths"]

    def __call__(
        self,
        images: Mapping[str, Float[Array, "B _I _H _W _C"]],
        token_valid: Mapping[str, Bool[Array, "B _I _P _Q"]],
        *,
        train: bool,
        drop_draws: Mapping[str, Float[Array, "B _I branches"]] | None = None,
        return_stages: bool = False,
    ) -> BackboneOutput:
        """As ``Backbone``; the loads of a modality's experts stand behind those of the one before it."""
        _check_names(images, token_valid, self.modalities)
        outs, router = [], None
        for m in self.modalities:
            if m.name in images:
                draws = None if drop_draws is None else {m.name: drop_draws[m.name]}
                given = dict(train=train, drop_draws=draws, return_stages=return_stages)
                outs.append(self.modality[m.name]({m.name: images[m.name]}, {m.name: token_valid[m.name]}, **given))
                router = _then(router, outs[-1].router)
        joined = lambda parts: {name: x for part in parts for name, x in part.items()}  # noqa: E731
        features, valid = joined(out.features for out in outs), joined(out.valid for out in outs)
        return BackboneOutput(features, valid, router, joined(out.stages for out in outs) if return_stages else None)


def _check_names(images: Mapping[str, Any], token_valid: Mapping[str, Any], modalities: Sequence[Modality]) -> None:
    known = [m.name for m in modalities]
    if not images or set(images) != set(token_valid) or not set(images) <= set(known):
        raise ValueError(
            f"config.data.modalities: got images of {sorted(images)} and validity of {sorted(token_valid)}; "
            f"wanted both of the same, one or more of {sorted(known)}"
        )
