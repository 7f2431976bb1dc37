"""What each weight is called here and in PyTorch, and how one becomes the other: exact both ways, no number changes.

PyTorch names follow Swin V2's in mmpretrain and ViT's in mmseg where they mean the same. Parameters here are paths
("backbone/stage3/attention/query/kernel"), as trees.named_leaves spells them. Numpy only: neither jax nor torch.
Next: write.py (a directory of them), from_torch.py (back again).
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from skysense_jax.modalities import Modality

Arrays = list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Weight:
    """One PyTorch weight and the parameters it is made of.

    Attributes:
      name: in PyTorch's state dict.
      paths: of the parameters here, several where PyTorch joins them.
      index: into their first axes, where blocks (and in them experts) are stacked; empty where they are not.
      join, split: from the parameters, so indexed, to the weight and back; each the other's exact inverse.
    """

    name: str
    paths: tuple[str, ...]
    index: tuple[int, ...]
    join: Callable[[Arrays], np.ndarray]
    split: Callable[[np.ndarray], Arrays]


# ---- one weight


def _transposed(count: int = 1) -> dict[str, Callable]:
    """Kernels [in, out] as the rows of one weight [count x out, in]."""
    return dict(
        join=lambda kernels: np.concatenate([kernel.T for kernel in kernels]),
        split=lambda weight: [part.T for part in np.split(weight, count)],
    )


def _joined(count: int = 1) -> dict[str, Callable]:
    """Arrays one after the other along the first axis."""
    return dict(join=np.concatenate, split=lambda weight: np.split(weight, count))


def _reshaped(here: tuple[int, ...], torch: tuple[int, ...]) -> dict[str, Callable]:
    return dict(join=lambda arrays: arrays[0].reshape(torch), split=lambda weight: [weight.reshape(here)])


def _convolution(patch: int, num_bands: int) -> dict[str, Callable]:
    """A kernel over flattened (row, column, band) as a convolution's [out, band, row, column]."""
    return dict(
        join=lambda arrays: arrays[0].reshape(patch, patch, num_bands, -1).transpose(3, 2, 0, 1),
        split=lambda weight: [weight.transpose(2, 3, 1, 0).reshape(patch * patch * num_bands, -1)],
    )


def _merging(dim: int) -> dict[str, Callable]:
    """Neighbours in the original Swin V2's order (column, row, channel) as nn.Unfold's (channel, row, column)."""
    return dict(
        join=lambda arrays: arrays[0].reshape(2, 2, dim, 2 * dim).transpose(3, 2, 1, 0).reshape(2 * dim, 4 * dim),
        split=lambda weight: [weight.reshape(2 * dim, dim, 2, 2).transpose(3, 2, 1, 0).reshape(4 * dim, 2 * dim)],
    )


# ---- one layer: names below ``name`` in PyTorch, below ``path`` here


def _linear(name: str, path: str, index: tuple[int, ...] = (), bias: bool = True) -> Iterator[Weight]:
    yield Weight(f"{name}.weight", (f"{path}/kernel",), index, **_transposed())
    if bias:
        yield Weight(f"{name}.bias", (f"{path}/bias",), index, **_joined())


def _norm(name: str, path: str, index: tuple[int, ...] = ()) -> Iterator[Weight]:
    yield Weight(f"{name}.weight", (f"{path}/scale",), index, **_joined())
    yield Weight(f"{name}.bias", (f"{path}/bias",), index, **_joined())


def _swin_block(name: str, path: str, num_heads: int) -> Iterator[Weight]:
    attention, w_msa = f"{path}/attention", f"{name}.attn.w_msa"
    paths = tuple(f"{attention}/{part}/kernel" for part in ("query", "key", "value"))
    yield Weight(f"{w_msa}.qkv.weight", paths, (), **_transposed(3))
    yield Weight(f"{w_msa}.q_bias", (f"{attention}/query/bias",), (), **_joined())
    yield Weight(f"{w_msa}.v_bias", (f"{attention}/value/bias",), (), **_joined())
    scale = _reshaped((num_heads,), (num_heads, 1, 1))
    yield Weight(f"{w_msa}.logit_scale", (f"{attention}/logit_scale",), (), **scale)
    yield from _linear(f"{w_msa}.cpb_mlp.0", f"{attention}/position_bias/hidden")
    yield from _linear(f"{w_msa}.cpb_mlp.2", f"{attention}/position_bias/output", bias=False)
    yield from _linear(f"{w_msa}.proj", f"{attention}/output")
    yield from _norm(f"{name}.norm1", f"{path}/attention_norm")
    yield from _norm(f"{name}.norm2", f"{path}/mlp_norm")
    yield from _linear(f"{name}.ffn.layers.0.0", f"{path}/mlp/hidden")
    yield from _linear(f"{name}.ffn.layers.1", f"{path}/mlp/output")


def _global_block(
    name: str, path: str, layer: int, *, layer_scale: bool = True, num_experts: int = 0
) -> Iterator[Weight]:
    index, attention = (layer,), f"{path}/attention"
    yield from _norm(f"{name}.ln1", f"{path}/attention_norm", index)
    kernels, biases = (
        tuple(f"{attention}/{part}/{kind}" for part in ("query", "key", "value")) for kind in ("kernel", "bias")
    )
    yield Weight(f"{name}.attn.attn.in_proj_weight", kernels, index, **_transposed(3))
    yield Weight(f"{name}.attn.attn.in_proj_bias", biases, index, **_joined(3))
    yield from _linear(f"{name}.attn.attn.out_proj", f"{attention}/output", index)
    yield from _norm(f"{name}.ln2", f"{path}/mlp_norm", index)
    if layer_scale:
        yield Weight(f"{name}.ls1.gamma", (f"{path}/attention_layer_scale",), index, **_joined())
        yield Weight(f"{name}.ls2.gamma", (f"{path}/mlp_layer_scale",), index, **_joined())
    if not num_experts:
        yield from _linear(f"{name}.ffn.layers.0.0", f"{path}/mlp/hidden", index)
        yield from _linear(f"{name}.ffn.layers.1", f"{path}/mlp/output", index)
        return
    yield Weight(f"{name}.ffn.router.weight", (f"{path}/experts/router",), index, **_transposed())
    for expert in range(num_experts):
        for layer_name, part in (("layers.0.0", "hidden"), ("layers.1", "output")):
            where, of = f"{name}.ffn.experts.{expert}.{layer_name}", f"{path}/experts/{part}"
            yield Weight(f"{where}.weight", (f"{of}_kernel",), (layer, expert), **_transposed())
            yield Weight(f"{where}.bias", (f"{of}_bias",), (layer, expert), **_joined())


# ---- the network


def check_form(backbone: Mapping[str, Any], *, why: str, **wanted: Any) -> None:
    """Nothing, if the fields of ``config.model.backbone`` are what is ``wanted``; ``why`` says whose form that is.

    Raises:
      ValueError: one is not.
    """
    for field, value in wanted.items():
        if field in backbone and backbone[field] != value:  # a run of before the field was has the form that is wanted
            raise ValueError(f"config.model.backbone.{field}: got {backbone[field]!r}; wanted {value!r}: {why}")


def weights(
    modalities: Sequence[Modality], *, backbone: Mapping[str, Any], fusion: Mapping[str, Any] | None
) -> Iterator[Weight]:
    """Every weight of the PyTorch network, and with that every parameter of the backbone (and the fusion, if given).

    ``backbone`` and ``fusion`` are the sections of ``config.model``.

    Raises:
      ValueError: the PyTorch network has no such form.
    """
    why = "the PyTorch network has no form that is there to compare with (benchmarks/study.py)"
    check_form(backbone, why=why, shared=True, moe_from="end")
    width, depths = backbone["width"], backbone["depths"]
    for m in modalities:
        name, path = f"patch_embed.{m.name}", f"backbone/tokenizer_{m.name}"
        kernel = _convolution(m.patch, m.num_bands)
        yield Weight(f"{name}.projection.weight", (f"{path}/projection/kernel",), (), **kernel)
        yield Weight(f"{name}.projection.bias", (f"{path}/projection/bias",), (), **_joined())
        yield from _norm(f"{name}.norm", f"{path}/norm")
    first_mixture = sum(depths) - backbone["num_moe_blocks"]
    for stage, depth in enumerate(depths):
        name, dim, before = f"stages.{stage}", width * 2**stage, sum(depths[:stage])
        if stage:
            path = f"backbone/merging_{stage + 1}"
            yield Weight(f"{name}.downsample.reduction.weight", (f"{path}/kernel",), (), **_merging(dim // 2))
            if backbone["merging"] == "separate":
                for m in modalities:
                    if not m.merges_at[stage - 1]:
                        kernel = (f"{path}/keep_{m.name}_kernel",)
                        yield Weight(f"{name}.downsample.keep.{m.name}.weight", kernel, (), **_transposed())
            yield from _norm(f"{name}.downsample.norm", f"{path}/norm")
        if stage > 1 and backbone["num_prompts"]:
            for m in modalities:
                prompts = (f"backbone/stage{stage + 1}_{m.name}_prompts",)
                yield Weight(f"{name}.prompts.{m.name}", prompts, (), **_joined())
        for i in range(depth):
            block, dense = f"{name}.blocks.{i}", max(min(first_mixture - before, depth), 0)
            if stage < 2:
                num_heads = dim // backbone["head_width"]
                yield from _swin_block(block, f"backbone/stage{stage + 1}_{i}", num_heads)
            elif i < dense:
                yield from _global_block(block, f"backbone/stage{stage + 1}", i)
            else:
                path = f"backbone/stage{stage + 1}_experts"
                yield from _global_block(block, path, i - dense, num_experts=backbone["num_experts"])
    if fusion is None:
        return
    yield from _linear("fusion.projection", "fusion/project")
    width = fusion["width"]
    yield Weight("fusion.cls_token", ("fusion/class_token",), (), **_reshaped((width,), (1, 1, width)))
    for kind in ("day", "modality"):
        yield Weight(f"fusion.{kind}_embedding.weight", (f"fusion/{kind}_embedding",), (), **_joined())
    for i in range(fusion["depth"]):
        yield from _global_block(f"fusion.layers.{i}", "fusion/blocks", i, layer_scale=False)
    yield from _norm("fusion.norm", "fusion/norm")


def join(table: Sequence[Weight], params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state dict of the parameters; takes each out of ``params`` when it has been used, to hold it only once."""
    uses = collections.Counter(path for weight in table for path in weight.paths)
    state = {}
    for weight in table:
        arrays = [params[path][weight.index] for path in weight.paths]
        state[weight.name] = np.ascontiguousarray(weight.join(arrays))
        for path in weight.paths:
            uses[path] -= 1
            if not uses[path]:
                del params[path]
    return state


def split(table: Sequence[Weight], state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters by path of the state dict: the inverse of ``join``, to the last bit."""
    parts: dict[str, dict[tuple[int, ...], np.ndarray]] = {}
    for weight in table:
        for path, array in zip(weight.paths, weight.split(state[weight.name]), strict=True):
            parts.setdefault(path, {})[weight.index] = array
    params = {}
    for path, found in parts.items():
        stacked = tuple(max(axis) + 1 for axis in zip(*found))
        params[path] = np.empty((*stacked, *next(iter(found.values())).shape), next(iter(found.values())).dtype)
        assert len(found) == math.prod(stacked), path
        for index, array in found.items():
            params[path][index] = array
    return params
