"""Published Swin V2 weights: from the names of transformers and mmpretrain to ours, and back for transformers.

The two differ in more than names: transformers keeps query, key and value apart, and the original's order of neighbours
(column, row, channel) in the merging layer; mmpretrain has nn.Unfold's (channel, row, column), as the exported network.
Numpy only. Next: from_torch.py.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from skysense_jax.export.names import Weight

TOKENIZER = "patch_embed.hr"  # the modality whose tokens published weights know: RGB in patches of 4
_MMPRETRAIN_MARK = "stages.0.blocks.0.attn.w_msa.logit_scale"
_TRANSFORMERS_MARK = "encoder.layers.0.blocks.0.attention.self.logit_scale"


def _neighbours(weight: np.ndarray) -> np.ndarray:
    """Columns in the original's order of neighbours to nn.Unfold's."""
    return weight.reshape(len(weight), 2, 2, -1).transpose(0, 3, 2, 1).reshape(weight.shape)


def _neighbours_back(weight: np.ndarray) -> np.ndarray:
    return weight.reshape(len(weight), -1, 2, 2).transpose(0, 3, 2, 1).reshape(weight.shape)


def _same(ours: str, theirs: str, kinds: Sequence[str] = ("weight", "bias")) -> Iterator[Weight]:
    for kind in kinds:
        yield Weight(f"{ours}.{kind}", (f"{theirs}.{kind}",), (), lambda arrays: arrays[0], lambda weight: [weight])


def transformers_names(depths: Sequence[int]) -> Iterator[Weight]:
    """Weights of stages of these depths, each with the merging after it; ``paths`` are transformers' names."""
    yield from _same(f"{TOKENIZER}.projection", "embeddings.patch_embeddings.projection")
    yield from _same(f"{TOKENIZER}.norm", "embeddings.norm")
    for stage, depth in enumerate(depths):
        for i in range(depth):
            ours, theirs = f"stages.{stage}.blocks.{i}", f"encoder.layers.{stage}.blocks.{i}"
            w_msa, attention = f"{ours}.attn.w_msa", f"{theirs}.attention.self"
            parts = tuple(f"{attention}.{part}.weight" for part in ("query", "key", "value"))
            yield Weight(f"{w_msa}.qkv.weight", parts, (), np.concatenate, lambda weight: np.split(weight, 3))
            for bias, part in (("q_bias", "query.bias"), ("v_bias", "value.bias"), ("logit_scale", "logit_scale")):
                path = (f"{attention}.{part}",)
                yield Weight(f"{w_msa}.{bias}", path, (), lambda arrays: arrays[0], lambda weight: [weight])
            position = f"{attention}.continuous_position_bias_mlp"
            yield from _same(f"{w_msa}.cpb_mlp.0", f"{position}.0")
            yield from _same(f"{w_msa}.cpb_mlp.2", f"{position}.2", ("weight",))
            yield from _same(f"{w_msa}.proj", f"{theirs}.attention.output.dense")
            yield from _same(f"{ours}.norm1", f"{theirs}.layernorm_before")  # after the attention all the same
            yield from _same(f"{ours}.norm2", f"{theirs}.layernorm_after")
            yield from _same(f"{ours}.ffn.layers.0.0", f"{theirs}.intermediate.dense")
            yield from _same(f"{ours}.ffn.layers.1", f"{theirs}.output.dense")
        ours, theirs = f"stages.{stage + 1}.downsample", f"encoder.layers.{stage}.downsample"
        yield Weight(
            f"{ours}.reduction.weight",
            (f"{theirs}.reduction.weight",),
            (),
            lambda arrays: _neighbours(arrays[0]),
            lambda weight: [_neighbours_back(weight)],
        )
        yield from _same(f"{ours}.norm", f"{theirs}.norm")


def from_published(state: Mapping[str, np.ndarray], depths: Sequence[int]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Under our PyTorch names what ``state`` holds of stages of these depths; and its names that were not used.

    Blocks that only one side has are not taken.

    Raises:
      ValueError: the names are neither transformers' nor mmpretrain's.
    """
    for mark in (_MMPRETRAIN_MARK, _TRANSFORMERS_MARK):
        marked = [name for name in state if name.endswith(mark)]
        if marked:
            prefix = marked[0].removesuffix(mark)
            break
    else:
        raise ValueError(
            f"none of {len(state)} weights ends with {_TRANSFORMERS_MARK!r} or {_MMPRETRAIN_MARK!r}; wanted Swin V2 "
            f"weights of transformers or mmpretrain, got names such as {', '.join(sorted(state)[:3])}"
        )
    found, used = {}, set()
    for weight in transformers_names(depths):
        paths = weight.paths if mark == _TRANSFORMERS_MARK else (weight.name.replace(TOKENIZER, "patch_embed"),)
        paths = tuple(prefix + path for path in paths)
        if all(path in state for path in paths):
            arrays = [state[path] for path in paths]
            found[weight.name] = weight.join(arrays) if mark == _TRANSFORMERS_MARK else arrays[0]
            used.update(paths)
    return found, sorted(set(state) - used)
