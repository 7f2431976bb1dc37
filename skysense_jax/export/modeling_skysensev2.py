"""SkySense V2 in plain PyTorch: the network that skysense-jax pre-trains, to infer with and to fine-tune.

This file needs torch and safetensors and nothing else; copy it wherever the weights go.

    model = SkySenseV2.from_pretrained("DIR")
    out = model({"hr": rgb, "s2": series}, day_of_year={"s2": days})  # raw 8-bit numbers, reflectance x 10000, dB
    out.stages["hr"][3], out.fused

Letters: B samples, T dates, C bands in table order, H W pixel rows (north to south) and columns, P Q token rows and
columns, N tokens, M tokens of a window, D width, A heads, K width of a head. Geometry is in cells of 10 m: the last
stage and the fused map have one token a cell. Weights are named as Swin V2's are in mmpretrain and ViT's in mmseg.
Sources: SkySense V2 (arXiv 2507.13812), Swin V2 (2111.09883), SkySense (2312.10115).
"""

import dataclasses
import hashlib
import json
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

WEIGHTS, CONFIG, CHECKSUMS = "model.safetensors", "config.json", "SHA256SUMS"
FORMAT_VERSION = 1
TRANSITION_TARGET_CELLS = (0.25, 0.5, 1.0)  # ground size of a token that stages 2, 3 and 4 aim at
SHORTEST_WAVELENGTH_CELLS, LONGEST_WAVELENGTH_CELLS = 1.0, 128.0  # of the rotary position embedding
DAYS = 367  # day of the year 1-366, and 0 for undated


@dataclasses.dataclass(frozen=True)
class Modality:
    """A sensor: bands in order, the unit of raw numbers, and how pixels become tokens. A row of ``config.json``."""

    name: str
    bands: tuple[str, ...]
    unit: str
    value_range: tuple[int | float, int | float]
    typical_range: tuple[int | float, int | float]
    wrong_unit_hint: str
    pixels_per_cell: int
    patch: int
    mean: tuple[int | float, ...]
    std: tuple[int | float, ...]

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Modality":
        """The sensor of a row of ``config.json``; what the row says beyond the fields is for people."""
        fields = {field.name: row[field.name] for field in dataclasses.fields(cls)}
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()})

    @property
    def merges_at(self) -> tuple[bool, ...]:
        """For the transitions into stages 2, 3 and 4: whether the grid is merged 2x2 (else kept)."""
        cells, merges = self.patch / self.pixels_per_cell, []
        for target in TRANSITION_TARGET_CELLS:
            merges.append(cells < target)
            cells *= 2 if merges[-1] else 1
        return tuple(merges)

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels along a side of a token of each stage."""
        strides = [self.patch]
        for merges in self.merges_at:
            strides.append(strides[-1] * (2 if merges else 1))
        return tuple(strides)


class Features(NamedTuple):
    """What the network sees. A modality given without dates ([B C H W]) has no T here either.

    Attributes:
      stages: per modality, maps [B T D P Q] of the stages in ``out_indices``; zero where there is no data.
      valid: per modality, [B T P Q] of the last stage: where there is data, clouds included.
      fused: [B D P Q], one feature a cell over all modalities and dates; None without fusion.
      fused_valid: [B P Q], where at least one modality and date is valid and clear; None without fusion.
    """

    stages: dict[str, tuple[Tensor, ...]]
    valid: dict[str, Tensor]
    fused: Tensor | None
    fused_valid: Tensor | None


# ---- layers


def small_normal(*shape: int) -> nn.Parameter:
    """Initial values of learned tokens and embeddings."""
    return nn.Parameter(0.02 * torch.randn(shape))


def drop_path(x: Tensor, rate: int | float, training: bool) -> Tensor:
    """``x``, zero with probability ``rate`` for each image on its own and else divided by ``1 - rate``."""
    if not (training and rate):
        return x
    keep = torch.rand(x.shape[0], *(1,) * (x.ndim - 1), device=x.device) >= rate
    return x * keep.to(x.dtype) / (1 - rate)


def unit(x: Tensor, length: Tensor) -> Tensor:
    """``x`` with its last axis scaled in fp32 to ``length``; zeros (padding) stay zeros and have a finite gradient.

    In place if no gradient is recorded: on a CPU the time is in fresh memory.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = length / torch.where(norm > 1e-12, norm, 1.0)
    return x * scale if torch.is_grad_enabled() else x.mul_(scale)


def pad(x: Tensor, sides: Sequence[int], value: bool | float = 0.0) -> Tensor:
    """``F.pad``, which copies even if there is nothing to add."""
    return F.pad(x, sides, value=value) if any(sides) else x


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    seen: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of [N A M K]; ``seen`` [N M M] is True where a query may look at a key, ``bias`` is [A M M].

    In 16-bit types scores and bias are rounded (a position bias of 16 in bfloat16 by up to 0.03); JAX keeps them fp32.
    A query that may look at nothing gets a finite result, which its caller must not use.
    """
    mask = None if bias is None else bias[None].to(value.dtype)
    if seen is not None:
        hidden = torch.where(seen[:, None], value.new_zeros(()), torch.finfo(value.dtype).min / 2)
        mask = hidden if mask is None else mask + hidden
    query, key = query.to(value.dtype), key.to(value.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def run(blocks: nn.ModuleList, x: Tensor, *masks: Any, checkpointing: bool) -> Tensor:
    """``x`` after all blocks; with ``checkpointing`` what is inside them is computed again for the gradient."""
    for block in blocks:
        if checkpointing and torch.is_grad_enabled():
            x = checkpoint(block, x, *masks, use_reentrant=False)
        else:
            x = block(x, *masks)
    return x


class GELU(nn.Module):
    """The exact one, in place if no gradient is recorded: the hidden layer is the largest tensor of a block."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x) if torch.is_grad_enabled() else torch.ops.aten.gelu_(x)


class FFN(nn.Module):
    """Two linear layers with GELU between."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Sequential(nn.Linear(dim, hidden_dim), GELU()), nn.Linear(hidden_dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class MixtureOfExperts(nn.Module):
    """Each token's ``k`` best experts, weighted by their softmax gates (not renormalised); no token is dropped."""

    def __init__(self, dim: int, hidden_dim: int, num_experts: int, k: int):
        super().__init__()
        self.k = k
        self.router = nn.Linear(dim, num_experts, bias=False)
        self.experts = nn.ModuleList(FFN(dim, hidden_dim) for _ in range(num_experts))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):  # the choice between experts is a discontinuity
            logits = F.linear(tokens.float(), self.router.weight.float())
        gates, chosen = logits.softmax(-1).topk(self.k, dim=-1)  # N k
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            rows, choice = torch.where(chosen == index)
            share = gates[rows, choice].unsqueeze(-1) * expert(tokens[rows])
            out = out.index_add(0, rows, share.to(out.dtype))
        return out.view(x.shape)


class WindowAttention(nn.Module):
    """Scaled cosine attention among the tokens of a window, with the log-spaced continuous position bias."""

    def __init__(self, dim: int, head_width: int):
        super().__init__()
        self.num_heads = dim // head_width
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(dim)) for _ in range(2))  # keys have none
        self.logit_scale = nn.Parameter(torch.full((self.num_heads, 1, 1), math.log(10.0)))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, self.num_heads, bias=False))
        self.proj = nn.Linear(dim, dim)

    def position_bias(self, window: int) -> Tensor:
        """[A M M], 0 to 16: an MLP of the offset between two tokens (Swin V2 sec. 3.3)."""
        steps = torch.arange(1 - window, window, device=self.q_bias.device) / max(window - 1, 1) * 8
        steps = steps.sign() * torch.log2(steps.abs() + 1) / math.log2(8)
        offsets = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), dim=-1)
        table = self.cpb_mlp(offsets.to(self.cpb_mlp[0].weight.dtype)).permute(2, 0, 1)  # A, row and column offset
        table = 16 * table.float().sigmoid()
        pairs = table.unfold(1, window, 1).unfold(2, window, 1)  # A, row and column of the query, of the last key - it
        return pairs.flip(3, 4).reshape(-1, window * window, window * window)

    def forward(self, x: Tensor, window: int, seen: Tensor | None) -> Tensor:
        """Of the tokens [N M D] of N windows; ``seen`` [N M M] is True where a query may look at a key."""
        biases = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, biases).view(*x.shape[:2], 3, self.num_heads, -1)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # 3 N A M K
        scale = self.logit_scale.float().clamp(max=math.log(100.0)).exp()
        query, key = unit(qkv[:2], torch.stack((scale, torch.ones_like(scale)))[:, None])
        y = attend(query, key, qkv[2], seen=seen, bias=self.position_bias(window), scale=1.0)
        return self.proj(y.transpose(1, 2).reshape(x.shape))


class ShiftedWindows(nn.Module):
    """Attention of a map in windows. A map that the window does not divide is padded with zeros that are attended."""

    def __init__(self, dim: int, head_width: int, window: int, shifted: bool):
        super().__init__()
        self.window, self.shifted = window, shifted
        self.w_msa = WindowAttention(dim, head_width)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """Of the map [N P Q D], what its tokens gather from those of their window that are ``valid`` [N P Q]."""
        rows, columns = x.shape[1:3]
        window = min(self.window, rows, columns)
        shift = self.window // 2 if self.shifted and min(rows, columns) > self.window else 0
        sides = (0, -columns % window, 0, -rows % window)
        x = pad(x, (0, 0, *sides))
        seen = None if valid is None else pad(valid, sides, value=True)
        if shift:
            x = x.roll((-shift, -shift), dims=(1, 2))
            seen = None if seen is None else seen.roll((-shift, -shift), dims=(1, 2))
        seen = None if seen is None else windows(seen[..., None], window).transpose(1, 2)  # N 1 M
        if shift:
            near = self.neighbours(*x.shape[1:3], window, shift, x.device).repeat(x.shape[0], 1, 1)
            seen = near if seen is None else near & seen
        y = self.w_msa(windows(x, window), window, seen)
        y = y.view(x.shape[0], x.shape[1] // window, x.shape[2] // window, window, window, -1)
        y = y.transpose(2, 3).reshape(x.shape)
        if shift:
            y = y.roll((shift, shift), dims=(1, 2))
        return y[:, :rows, :columns]

    @staticmethod
    def neighbours(rows: int, columns: int, window: int, shift: int, device: torch.device) -> Tensor:
        """[N M M]: for each window of the rolled map, which pairs of tokens were neighbours before the roll."""
        rows, columns = (torch.arange(n, device=device) for n in (rows, columns))
        side = lambda place: (place >= len(place) - window).int() + (place >= len(place) - shift).int()  # noqa: E731
        region = windows((side(rows)[:, None] * 3 + side(columns)[None, :])[None, :, :, None], window)[..., 0]
        return region[:, :, None] == region[:, None, :]


def windows(x: Tensor, window: int) -> Tensor:
    """The map [N P Q D] as its windows [N' M D], image after image, row after row."""
    x = x.view(x.shape[0], x.shape[1] // window, window, x.shape[2] // window, window, x.shape[3])
    return x.transpose(2, 3).reshape(-1, window * window, x.shape[-1])


class SwinBlock(nn.Module):
    """Window attention, then an MLP, each normed before it is added (Swin V2)."""

    def __init__(
        self, dim: int, drop_path: int | float, *, head_width: int, window: int, shifted: bool, mlp_ratio: int | float
    ):
        super().__init__()
        self.drop_path = drop_path
        self.attn = ShiftedWindows(dim, head_width, window, shifted)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.ffn = FFN(dim, round(mlp_ratio * dim))

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        x = x + drop_path(self.norm1(self.attn(x, valid)), self.drop_path, self.training)
        return x + drop_path(self.norm2(self.ffn(x)), self.drop_path, self.training)


class SelfAttention(nn.Module):
    """Attention of all tokens to each other, turned by their places; the weights are those of torch's own module."""

    def __init__(self, dim: int, head_width: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(dim, dim // head_width)

    def forward(self, x: Tensor, seen: Tensor | None, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        """Of tokens [N M D]; ``seen`` [N M] is True for tokens that may be looked at, ``turn`` is ``rotation``'s."""
        qkv = F.linear(x, self.attn.in_proj_weight, self.attn.in_proj_bias)
        qkv = qkv.view(*x.shape[:2], 3, self.attn.num_heads, -1)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # 3 N A M K
        query, key = qkv[:2] if turn is None else rotate(qkv[:2], *turn)
        y = attend(query, key, qkv[2], seen=None if seen is None else seen[:, None, :])
        return self.attn.out_proj(y.transpose(1, 2).reshape(x.shape))


class LayerScale(nn.Module):
    """``x`` plus the channels of ``y`` times a learned vector."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 1e-5))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.addcmul(x, y, self.gamma)


class GlobalBlock(nn.Module):
    """Pre-norm attention over all tokens, then an MLP or a mixture of experts; ``layer_scale`` learns their shares."""

    def __init__(
        self,
        dim: int,
        drop_path: int | float,
        *,
        head_width: int,
        mlp_ratio: int | float,
        layer_scale: bool = False,
        num_experts: int = 0,
        experts_per_token: int = 1,
    ):
        super().__init__()
        self.drop_path, hidden_dim = drop_path, round(mlp_ratio * dim)
        scale = lambda: LayerScale(dim) if layer_scale else None  # noqa: E731
        self.ln1, self.attn, self.ls1 = nn.LayerNorm(dim), SelfAttention(dim, head_width), scale()
        self.ln2, self.ls2 = nn.LayerNorm(dim), scale()
        mixture = lambda: MixtureOfExperts(dim, hidden_dim, num_experts, experts_per_token)  # noqa: E731
        self.ffn = mixture() if num_experts else FFN(dim, hidden_dim)

    def forward(self, x: Tensor, seen: Tensor | None, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        y = drop_path(self.attn(self.ln1(x), seen, turn), self.drop_path, self.training)
        x = self.ls1(x, y) if self.ls1 else x + y
        y = drop_path(self.ffn(self.ln2(x)), self.drop_path, self.training)
        return self.ls2(x, y) if self.ls2 else x + y


def rotation(
    grid: tuple[int, int], cells: tuple[int, int], num_prompts: int, head_width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine [M K] of the tokens' angles: rows turn the first half of the pairs, columns the second.

    The angle is the token's offset from the centre of the image, in cells, over wavelengths of 1 to 128 cells; prompts,
    after the tokens, sit at the centre.
    """
    exact = torch.float32 if device.type == "mps" else torch.float64  # 200 turns in fp32 would be off by 1e-5
    place = lambda n, side: (torch.arange(n, dtype=exact, device=device) + 0.5) / n * side - side / 2  # noqa: E731
    rows, columns = (place(n, side) for n, side in zip(grid, cells))
    offsets = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).view(-1, 2, 1)
    offsets = F.pad(offsets, (0, 0, 0, 0, 0, num_prompts))
    steps = torch.linspace(0, 1, head_width // 4, dtype=exact, device=device)
    wavelengths = SHORTEST_WAVELENGTH_CELLS * (LONGEST_WAVELENGTH_CELLS / SHORTEST_WAVELENGTH_CELLS) ** steps
    angles = (2 * math.pi * offsets / wavelengths).flatten(1)
    cos, sin = angles.cos().float(), angles.sin().float()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[... M K] with the channels j and j + K/2 of each head turned by the token's angle j, in fp32.

    In place on a copy, which autograd allows: on a CPU the time is in fresh memory.
    """
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((second, first), dim=-1).mul_(sin).addcmul_(x, cos).to(x.dtype)


# ---- stages


class PatchEmbed(nn.Module):
    """Patches of one modality as tokens: a convolution and a norm, of normalised pixels."""

    def __init__(self, modality: Modality, dim: int):
        super().__init__()
        self.projection = nn.Conv2d(len(modality.bands), dim, modality.patch, stride=modality.patch)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.projection(x.to(self.projection.weight.dtype)).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Adaptive patch merging: twice as wide, and half as many rows and columns unless the modality keeps its grid.

    One that keeps it uses the same weight averaged over the four neighbours, or its own if ``keeping`` names it. The
    weight's input is ordered channel first, as ``nn.Unfold`` and mmpretrain have it, not as the original Swin V2.
    """

    def __init__(self, dim: int, keeping: Sequence[str]):
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.keep = nn.ModuleDict({name: nn.Linear(dim, 2 * dim, bias=False) for name in keeping})
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor, name: str, merges: bool) -> Tensor:
        rows, columns, dim = x.shape[1:]
        weight = self.reduction.weight.view(2 * dim, dim, 2, 2)
        if not merges:
            return self.norm(self.keep[name](x) if name in self.keep else F.linear(x, weight.mean((2, 3))))
        x = pad(x, (0, 0, 0, columns % 2, 0, rows % 2))
        x = x.view(x.shape[0], x.shape[1] // 2, 2, x.shape[2] // 2, 2, dim).transpose(2, 3).flatten(3)
        return self.norm(F.linear(x, weight.permute(0, 2, 3, 1).flatten(1)))


class Stage(nn.Module):
    """The transition into a stage, its blocks, and the prompts that tell global blocks which sensor they look at."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None, prompts: Mapping[str, Tensor] | None):
        super().__init__()
        self.gradient_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.is_global, self.prompts = prompts is not None, nn.ParameterDict(prompts or {})

    def forward(self, x: Tensor, valid: Tensor | None, modality: Modality, cells: tuple[int, int]) -> Tensor:
        """The map [N P Q D] after the blocks, among its ``valid`` tokens [N P Q]; ``cells`` as in ``rotation``."""
        if not self.is_global:
            return run(self.blocks, x, valid, checkpointing=self.gradient_checkpointing)
        prompts = self.prompts[modality.name] if self.prompts else x.new_zeros(0, x.shape[-1])
        turn = rotation(x.shape[1:3], cells, len(prompts), self.blocks[0].attn.attn.head_dim, x.device)
        tokens = torch.cat((x.flatten(1, 2), prompts.to(x.dtype).expand(x.shape[0], -1, -1)), dim=1)
        seen = None
        if valid is not None:  # prompts of an image without data are without data
            seen = torch.cat((valid.flatten(1), valid.flatten(1).any(1, keepdim=True).expand(-1, len(prompts))), dim=1)
        tokens = run(self.blocks, tokens, seen, turn, checkpointing=self.gradient_checkpointing)
        return tokens[:, : x.shape[1] * x.shape[2]].view(x.shape)


class Fusion(nn.Module):
    """Per cell, a class token and the features of all modalities and dates; what the class token becomes is fused."""

    def __init__(
        self, in_dim: int, modalities: Sequence[str], *, width: int, depth: int, drop_path: int | float, **block
    ):
        super().__init__()
        self.gradient_checkpointing = False
        self.modalities = tuple(modalities)
        self.projection = nn.Linear(in_dim, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.day_embedding, self.modality_embedding = (
            nn.Embedding.from_pretrained(small_normal(rows, width), freeze=False) for rows in (DAYS, len(modalities))
        )
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.layers = nn.ModuleList(GlobalBlock(width, rate, **block) for rate in rates)
        self.norm = nn.LayerNorm(width)

    def forward(
        self, features: Mapping[str, Tensor], usable: Mapping[str, Tensor | None], days: Mapping[str, Tensor]
    ) -> Tensor:
        """[B P Q D'] of features [B T P Q D], where they are usable [B T P Q] (None: everywhere), and days [B T]."""
        shape = next(iter(features.values())).shape
        per_cell = lambda x: x.permute(0, 2, 3, 1, *range(4, x.ndim)).flatten(0, 2)  # noqa: E731  (B P Q) T ...
        tokens, seen = [self.cls_token.expand(shape[0] * shape[2] * shape[3], -1, -1)], None
        for name, x in features.items():
            place = self.day_embedding(days[name]) + self.modality_embedding.weight[self.modalities.index(name)]
            tokens.append(per_cell(self.projection(x) + place[:, :, None, None]))
        if any(x is not None for x in usable.values()):
            ones = [torch.ones_like(features[name][..., 0], dtype=torch.bool) for name in features]
            seen = [per_cell(one if usable[name] is None else usable[name]) for name, one in zip(features, ones)]
            seen = torch.cat((torch.ones_like(seen[0][:, :1]), *seen), dim=1)
        x = torch.cat([token.to(tokens[-1].dtype) for token in tokens], dim=1)
        x = run(self.layers, x, seen, None, checkpointing=self.gradient_checkpointing)
        return self.norm(x[:, 0]).view(shape[0], *shape[2:4], -1)


# ---- the network


class SkySenseV2(nn.Module):
    """The unified backbone and, if the weights have it, the fusion over modalities and dates.

    Args:
      config: what ``config.json`` holds.
      normalise: whether raw numbers come in, to be normalised with the statistics of the table; False: normalised ones.
      check_inputs: whether the unit of raw numbers is checked (it reads one number a band back from the device).
      drop_path: of the last block, linear from 0, in training mode.
      out_indices: stages (0 to 3) whose maps are returned.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        normalise: bool = True,
        check_inputs: bool = True,
        drop_path: int | float = 0.0,
        out_indices: Sequence[int] = (0, 1, 2, 3),
    ):
        super().__init__()
        version = dict(config).get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(f"{CONFIG}: format_version {version}; this file reads {FORMAT_VERSION}")
        if not out_indices or not set(out_indices) <= {0, 1, 2, 3}:
            raise ValueError(f"out_indices: got {tuple(out_indices)}; wanted some of 0, 1, 2, 3")
        self.normalise, self.check_inputs, self.out_indices = normalise, check_inputs, tuple(out_indices)
        self.modalities = {row["name"]: Modality.from_row(row) for row in config["modalities"]}
        net = config["backbone"]
        widths, num_blocks = [net["width"] * 2**stage for stage in range(4)], sum(net["depths"])
        self.patch_embed = nn.ModuleDict({name: PatchEmbed(m, widths[0]) for name, m in self.modalities.items()})
        self.stages, index = nn.ModuleList(), 0
        common, prompts = dict(head_width=net["head_width"], mlp_ratio=net["mlp_ratio"]), net["num_prompts"]
        mixture = dict(num_experts=net["num_experts"], experts_per_token=net["experts_per_token"])
        for stage, (dim, depth) in enumerate(zip(widths, net["depths"])):
            blocks = []
            for i in range(depth):
                rate = drop_path * index / max(num_blocks - 1, 1)
                if stage < 2:
                    blocks.append(SwinBlock(dim, rate, window=net["window"], shifted=bool(i % 2), **common))
                else:
                    experts = mixture if index >= num_blocks - net["num_moe_blocks"] else {}
                    blocks.append(GlobalBlock(dim, rate, layer_scale=True, **common, **experts))
                index += 1
            separate = stage and net["merging"] == "separate"
            keeping = [m.name for m in self.modalities.values() if separate and not m.merges_at[stage - 1]]
            self.stages.append(
                Stage(
                    blocks,
                    PatchMerging(widths[stage - 1], keeping) if stage else None,
                    {name: small_normal(prompts, dim) for name in self.modalities if prompts} if stage > 1 else None,
                )
            )
        fusion = config["fusion"]
        self.fusion = Fusion(widths[3], tuple(self.modalities), drop_path=drop_path, **fusion) if fusion else None
        self.num_features = widths  # of the stages
        self.fused_dim = fusion["width"] if fusion else None

    @classmethod
    def from_pretrained(cls, directory: str | pathlib.Path, *, verify: bool = True, **options: Any) -> "SkySenseV2":
        """The network of an exported directory, in evaluation mode on the CPU; ``options`` are those of the class.

        ``verify`` compares weights and config with the directory's checksums first.

        Raises:
          ValueError: a file is missing or is not what was exported, or weights and config do not fit each other.
        """
        config, weights = read_config(directory, verify=verify), pathlib.Path(directory) / WEIGHTS
        try:
            with torch.device("meta"):  # nothing is initialised only to be overwritten
                model = cls(config, **options)
        except KeyError as error:
            raise ValueError(f"{pathlib.Path(directory) / CONFIG}: field {error} is missing") from error
        try:
            state = load_file(weights)
        except Exception as error:  # whatever safetensors says of damaged bytes
            raise ValueError(f"{weights}: cannot be read: {error!r}") from error
        wanted = model.state_dict()
        wrong = sorted(set(state) ^ set(wanted)) + [
            f"{name}: {tuple(state[name].shape)}, wanted {tuple(wanted[name].shape)}"
            for name in wanted
            if name in state and state[name].shape != wanted[name].shape
        ]
        if wrong:
            raise ValueError(f"{weights}: {len(wrong)} weights do not fit {CONFIG}: {'; '.join(wrong[:5])}")
        model.load_state_dict(state, assign=True)
        return model.eval()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks are computed again for the gradient instead of keeping what is inside them."""
        for module in self.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = enable

    def band_order(self, name: str, bands: Sequence[str]) -> list[int]:
        """Where in ``bands``, the names of an image's bands, those of modality ``name`` stand: ``x[:, order]``.

        Case and leading zeros do not count: B02 is B2, b8a is B8A.

        Raises:
          ValueError: an unknown modality, or a band that is missing or stands twice.
        """
        if name not in self.modalities:
            raise ValueError(f"modality {name!r}; wanted one of {' '.join(self.modalities)}")
        given, wanted = [plain_band(band) for band in bands], self.modalities[name].bands
        if any(given.count(plain_band(band)) != 1 for band in wanted):
            raise ValueError(f"{name}: got the bands {' '.join(bands)}; wanted each once of {' '.join(wanted)}")
        return [given.index(plain_band(band)) for band in wanted]

    def forward(
        self,
        images: Mapping[str, Tensor],
        *,
        valid: Mapping[str, Tensor] | None = None,
        clear: Mapping[str, Tensor] | None = None,
        present: Mapping[str, Tensor] | None = None,
        day_of_year: Mapping[str, Tensor] | None = None,
        fuse: bool = True,
    ) -> Features:
        """Features of any subset of the modalities. All maps of one call show the same ground at the same cells.

        Args:
          images: [B T C H W], or [B C H W] of one date; raw numbers in the table's unit, any dtype.
          valid: [B T H W] or [B H W] bool, the sensor has data here; all by default. What the rest holds is not read.
          clear: the same shape, the ground is not hidden by clouds; all by default. Only fusion reads it.
          present: [B T] bool, the date exists (a series may be padded); all by default.
          day_of_year: [B T] integers 1-366, 0 for undated; undated by default.
          fuse: False: without the fused map, which then is None.

        Raises:
          ValueError: an unknown modality, a wrong number of bands, another unit, or maps that do not fit each other.
        """
        if not isinstance(images, Mapping):
            raise ValueError(
                f"images: got {type(images).__name__}; wanted a dict, e.g. {{'{next(iter(self.modalities))}': x}}"
            )
        valid, clear, present, days = ({} if x is None else dict(x) for x in (valid, clear, present, day_of_year))
        unknown = sorted(set(images) - set(self.modalities))
        if unknown or not images:
            raise ValueError(f"modalities {unknown or 'none'}; wanted one or more of {' '.join(self.modalities)}")
        alone = sorted({*valid, *clear, *present, *days} - set(images))
        if alone:
            raise ValueError(f"masks or days of {' '.join(alone)}, of which there are no images")
        stages, validity, last, usable = {}, {}, {}, {}
        for name in (name for name in self.modalities if name in images):
            x, one_date = images[name], images[name].ndim == 4
            masks = [valid.get(name), clear.get(name)]
            self._check(name, x, masks, present.get(name), days.get(name))
            on = lambda y, device=x.device: None if y is None else y.to(device)  # noqa: E731
            masks, there = [on(mask) for mask in masks], on(present.get(name))
            if one_date:
                x, masks = x[:, None], [None if mask is None else mask[:, None] for mask in masks]
            self._check_unit(name, x, masks[0], there)
            maps, seen, usable[name] = self._backbone(self.modalities[name], x, *masks, there)
            last[name] = maps[-1]
            undated = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
            days[name] = on(days[name]).long() if name in days else undated
            chosen = tuple(maps[index].movedim(-1, 2) for index in self.out_indices)
            stages[name] = tuple(y[:, 0] for y in chosen) if one_date else chosen
            validity[name] = seen[:, 0] if one_date else seen
        if self.fusion is None or not fuse:
            return Features(stages, validity, None, None)
        shapes = [(x.shape[0], *x.shape[2:4]) for x in last.values()]
        if any(shape != shapes[0] for shape in shapes):  # a set would fix the batch in torch.export
            raise ValueError(
                f"the modalities' samples and cells differ, {dict(zip(last, shapes))}; wanted the same ground in all, "
                "or fuse=False"
            )
        fused = self.fusion(last, usable, days).movedim(-1, 1)
        every = [
            torch.ones_like(last[name][..., 0], dtype=torch.bool) if mask is None else mask
            for name, mask in usable.items()
        ]
        return Features(stages, validity, fused, torch.cat(every, dim=1).any(1))

    def _check(
        self, name: str, x: Tensor, masks: Sequence[Tensor | None], present: Tensor | None, days: Tensor | None
    ) -> None:
        """Nothing, or a ValueError that says what is wrong with a modality's images or what belongs to them."""
        bands = self.modalities[name].bands
        if x.ndim not in (4, 5) or x.shape[-3] != len(bands) or not all(x.shape):
            raise ValueError(
                f"{name}: images of shape {tuple(x.shape)}; wanted [B T C H W] or [B C H W], none of them 0, with the "
                f"{len(bands)} bands {' '.join(bands)}, in this order"
            )
        pixels, dates = (*x.shape[:-3], *x.shape[-2:]), (x.shape[0], x.shape[1] if x.ndim == 5 else 1)
        for what, mask, shape in (*(("mask", mask, pixels) for mask in masks), ("present", present, dates)):
            if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != shape):
                raise ValueError(f"{name}: {what} {mask.dtype} of shape {tuple(mask.shape)}; wanted bool of {shape}")
        if days is None:
            return
        if days.is_floating_point() or days.dtype == torch.bool or tuple(days.shape) != dates:
            raise ValueError(f"{name}: days {days.dtype} of shape {tuple(days.shape)}; wanted integers of {dates}")
        if self.check_inputs and not _is_traced() and not bool(((days >= 0) & (days < DAYS)).all()):
            raise ValueError(f"{name}: days of the year {days.tolist()}; wanted 1-366, 0 for undated")

    def _check_unit(self, name: str, x: Tensor, valid: Tensor | None, present: Tensor | None) -> None:
        """Nothing, or a ValueError if the mean of a band of a sample cannot be in the modality's unit."""
        if not (self.normalise and self.check_inputs) or _is_traced():
            return
        m = self.modalities[name]
        used = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if present is None else present
        used = used[:, :, None, None, None].expand(-1, -1, 1, *x.shape[3:])
        used = used if valid is None else used & valid[:, :, None]
        count = used.sum((1, 2, 3, 4))
        means = torch.where(used, x.float(), 0.0).sum((1, 3, 4)) / count.clamp(min=1)[:, None]  # B C
        low, high = m.typical_range
        wrong = ~((means >= low) & (means <= high)) & (count > 0)[:, None]  # a NaN compares False
        if bool(wrong.any()):
            sample, band = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"{name}, band {m.bands[band]}, sample {sample}: mean {means[sample, band].item():.4g} over valid "
                f"pixels; wanted {low} to {high} ({m.unit}); it looks like {m.wrong_unit_hint}, or nodata (NaN too) "
                "that valid={...} does not mask. from_pretrained(..., check_inputs=False) lets it pass"
            )

    def _backbone(
        self, m: Modality, x: Tensor, valid: Tensor | None, clear: Tensor | None, present: Tensor | None
    ) -> tuple[list[Tensor], Tensor, Tensor | None]:
        """Maps [B T P Q D] after each stage, where the last is valid, where fusion may use it (None: everywhere)."""
        dates, height, width = x.shape[:2], *x.shape[3:]
        x = x.flatten(0, 1).float()
        if self.normalise:
            mean, std = (torch.tensor(y, dtype=x.dtype, device=x.device).view(-1, 1, 1) for y in (m.mean, m.std))
            x = (x - mean).div_(std)
        usable = clear if valid is None else valid if clear is None else valid & clear
        if valid is not None:
            x = torch.where(valid.flatten(0, 1)[:, None], x, 0.0)
        x = pad(x, (0, -width % m.patch, 0, -height % m.patch))
        everywhere = x.new_ones(*dates, height, width, dtype=torch.bool)
        if valid is None and (present is not None or x.shape[2:] != (height, width)):
            valid = everywhere
        if usable is None and (present is not None or height % m.pixels_per_cell or width % m.pixels_per_cell):
            usable = everywhere

        def half(mask: Tensor, side: int) -> Tensor:
            """Where at least half of the pixels of a square of ``side`` are there, on a date that is present."""
            mask = pad(mask.flatten(0, 1)[:, None].float(), (0, -width % side, 0, -height % side))
            mask = F.avg_pool2d(mask, side)[:, 0] >= 0.5
            return mask if present is None else mask & present.flatten()[:, None, None]

        seen = None if valid is None else half(valid, m.patch)
        usable = None if usable is None else half(usable, m.pixels_per_cell).unflatten(0, dates)
        x = self.patch_embed[m.name](x)
        x = x if seen is None else torch.where(seen[..., None], x, 0.0)
        cells = (-(-height // m.pixels_per_cell), -(-width // m.pixels_per_cell))
        maps = []
        for index, stage in enumerate(self.stages):
            if index:
                merges = m.merges_at[index - 1]
                x = stage.downsample(x, m.name, merges)
                if merges and seen is not None:
                    seen = F.max_pool2d(seen[:, None].float(), 2, ceil_mode=True)[:, 0] > 0
            x = stage(x, seen, m, cells)
            x = x if seen is None else torch.where(seen[..., None], x, 0.0)
            maps.append(x.unflatten(0, dates))
        seen = x.new_ones(x.shape[:3], dtype=torch.bool) if seen is None else seen
        return maps, seen.unflatten(0, dates), usable


def _is_traced() -> bool:
    """Whether a compiler or an exporter looks at shapes only, so that no number can be asked for."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


class FeaturesOnly(nn.Module):
    """One modality of a network as the backbone of a segmenter or detector: images in, a list of maps out.

    What timm, TorchGeo and segmentation_models_pytorch expect of ``features_only``, TerraTorch of its registry and
    mmsegmentation and mmdetection of ``out_indices``. A series [B T C H W] gives the mean over its dates.

    Attributes:
      out_channels, strides: of each map; a stride is in pixels of the modality.
    """

    def __init__(self, model: SkySenseV2, modality: str):
        super().__init__()
        if modality not in model.modalities:
            raise ValueError(f"modality {modality!r}; wanted one of {' '.join(model.modalities)}")
        self.model, self.modality = model, modality
        self.out_channels = [model.num_features[index] for index in model.out_indices]
        self.strides = [model.modalities[modality].strides[index] for index in model.out_indices]

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.model({self.modality: images}, fuse=False).stages[self.modality]
        return [x.mean(1) if x.ndim == 5 else x for x in maps]


def plain_band(band: str) -> str:
    """A band's name without what products spell differently: case, spaces around, leading zeros (B02 is B2)."""
    return re.sub(r"(?<=[A-Z])0+(?=\d)", "", band.strip().upper())


# ---- an exported directory


def read_config(directory: str | pathlib.Path, *, verify: bool = True) -> dict[str, Any]:
    """What ``config.json`` of an exported directory holds; ``verify`` compares it and the weights with SHA256SUMS.

    Raises:
      ValueError: a file is missing, or is not what was exported.
    """
    directory = pathlib.Path(directory)
    missing = [name for name in (CONFIG, WEIGHTS, CHECKSUMS)[: 3 if verify else 2] if not (directory / name).is_file()]
    if missing:
        raise ValueError(f"{directory}: no {', '.join(missing)}; wanted a directory that skysense_jax.export wrote")
    if verify:
        lines = (line.split(maxsplit=1) for line in (directory / CHECKSUMS).read_text().splitlines())
        wanted = {line[1]: line[0] for line in lines if len(line) == 2}
        for name in (CONFIG, WEIGHTS):
            with (directory / name).open("rb") as file:
                got = hashlib.file_digest(file, "sha256").hexdigest()
            if got != wanted.get(name):
                raise ValueError(
                    f"{directory / name}: SHA-256 {got}; {CHECKSUMS} says {wanted.get(name)}. The file is damaged or "
                    "was changed: copy it again, or pass verify=False if the change is yours"
                )
    try:
        config = json.loads((directory / CONFIG).read_text())
        dict(config)["format_version"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{directory / CONFIG}: not what skysense_jax.export writes: {error!r}") from error
    return config
