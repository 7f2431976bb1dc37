"""Stages 1 and 2: Swin V2 blocks (arXiv 2111.09883), equal to the published ones with the same weights.

Scaled cosine attention in windows, log-spaced continuous position bias, norms at the end of each residual branch.
A grid that the window does not divide is padded right and below with zeros that are attended, as ``transformers`` does;
what the imagery lacks (``valid`` False) is not attended. Next: merging.py, backbone.py.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from skysense_jax.kernels import window as window_kernel
from skysense_jax.models.attention import attend, fall_back, tensor_devices
from skysense_jax.models.layers import Dense, DropPath, LayerNorm, Mlp, constant, partitioned, product
from skysense_jax.sharding import BATCH, EMBED, HEADS, LOGICAL_AXIS_RULES, UNSHARDED, constrain_batch

MAX_LOGIT_SCALE = math.log(100.0)
POSITION_HIDDEN_DIM = 512
_MLP_PARTS = 16  # at most, that the rows of a map go through an MLP in, beside a GPU's kernel


def relative_coordinates(window: int) -> Float[np.ndarray, "N 2"]:
    """Every offset between two tokens of a window, log-spaced as published: ``sign(c) log2(1 + |c|) / log2(8)``.

    c is the offset scaled to -8..8; offsets are row-major over (2 window - 1)^2.
    """
    steps = np.arange(1 - window, window) / max(window - 1, 1) * 8
    steps = np.sign(steps) * np.log2(np.abs(steps) + 1) / np.log2(8)
    return np.stack(np.meshgrid(steps, steps, indexing="ij"), axis=-1).reshape(-1, 2)


def relative_index(window: int) -> Int[np.ndarray, "M M"]:
    """For each pair (query, key) of a window's tokens the row of its offset in ``relative_coordinates``."""
    rows, columns = (a.reshape(-1) for a in np.indices((window, window)))
    difference = lambda a: a[:, None] - a[None, :] + window - 1  # noqa: E731
    return difference(rows) * (2 * window - 1) + difference(columns)


def shift_regions(rows: int, columns: int, *, window: int, shift: int) -> Bool[np.ndarray, "N M M"]:
    """For each window of a rolled grid, which pairs of its tokens were neighbours before the roll."""

    def axis_region(size):
        index = np.arange(size)
        return (index >= size - window).astype(int) + (index >= size - shift)

    region = axis_region(rows)[:, None] * 3 + axis_region(columns)[None, :]
    region = rearrange(region, "(P h) (Q w) -> (P Q) (h w)", h=window, w=window)
    return region[:, :, None] == region[:, None, :]


def unit(x: Float[Array, "*rows D"], *, head_width: int) -> Float[Array, "*rows D"]:
    """``x`` with each head's channels scaled to length 1, in fp32; zeros (padding) stay zeros.

    The published form divides by max(length, 1e-12). Its value is the same; its gradient at zero is 1e12 times larger.
    """
    heads = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, head_width)
    square = jnp.square(heads).sum(-1, keepdims=True)
    return (heads * jax.lax.rsqrt(jnp.where(square > 1e-24, square, 1.0))).reshape(x.shape)


class PositionBias(nn.Module):
    """The continuous position bias: an MLP from log-spaced offsets to 16 sigmoid(.) per head."""

    num_heads: int

    @nn.compact
    def __call__(self, window: int) -> Float[Array, "A M M"]:
        """The bias of each (query, key) pair of a window, fp32, 0 to 16."""
        hidden = Dense(POSITION_HIDDEN_DIM, axes=(UNSHARDED, UNSHARDED), name="hidden")
        output = Dense(self.num_heads, axes=(UNSHARDED, UNSHARDED), use_bias=False, name="output")
        table = output(nn.relu(hidden(jnp.asarray(relative_coordinates(window), jnp.float32))))
        return 16 * nn.sigmoid(rearrange(table[relative_index(window)], "N M A -> A N M"))


class WindowAttention(nn.Module):
    """Scaled cosine attention among the tokens of a window: biases on query, value and output, none on key.

    ``implementation``: "xla", or a kernel of kernels/window.py that takes such windows.
    """

    head_width: int
    implementation: str = "xla"
    compute_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B I P Q D"], *, seen: Bool[Array, "B I P Q"], window: int, shifted: bool
    ) -> Float[Array, "B I P Q D"]:
        """What each token of a map of whole windows gathers from the tokens of its window that are ``seen``.

        ``shifted``: windows lie half their side further down and right, those of the last row and column around the
        map's edge, where tokens do not look at what is no neighbour.
        """
        width, num_heads = x.shape[-1], x.shape[-1] // self.head_width
        fused = self.implementation != "xla"
        images, (rows, columns) = x.shape[1], (side // window for side in x.shape[2:4])
        shift = window // 2 if shifted else 0
        if not fused:
            if shifted:
                x, seen = (jnp.roll(array, (-shift, -shift), axis=(2, 3)) for array in (x, seen))
            split = "B I (P h) (Q w) ... -> B (I P Q) (h w) ..."
            x, seen = (rearrange(array, split, h=window, w=window) for array in (x, seen))
        project = lambda name, use_bias=True: Dense(  # noqa: E731
            width, axes=(EMBED, HEADS), use_bias=use_bias, compute_dtype=self.compute_dtype, name=name
        )(x)
        query, key, value = project("query"), project("key", use_bias=False), project("value")
        logit_scale = self.param("logit_scale", partitioned(constant(math.log(10.0)), UNSHARDED), (num_heads,))
        logit_scale = jnp.exp(jnp.minimum(logit_scale, MAX_LOGIT_SCALE))
        bias = PositionBias(num_heads, name="position_bias")(window)
        output = Dense(width, axes=(HEADS, EMBED), compute_dtype=self.compute_dtype, name="output")
        if fused:
            mixed = window_kernel.window_attention(
                query,
                key,
                value,
                bias,
                logit_scale,
                seen,
                shifted=shifted,
                head_width=self.head_width,
                implementation=self.implementation,
                batch_axes=dict(LOGICAL_AXIS_RULES)[BATCH],
            )
            return output(product(mixed))
        mask = seen[:, :, None, :]
        if shifted:
            regions = shift_regions(rows * window, columns * window, window=window, shift=shift)
            mask = mask & np.tile(regions, (images, 1, 1))
        query = unit(query, head_width=self.head_width) * jnp.repeat(logit_scale, self.head_width)
        key = unit(key, head_width=self.head_width)
        mixed = attend(
            query.astype(self.compute_dtype),
            key.astype(self.compute_dtype),
            value,
            head_width=self.head_width,
            bias=bias,
            mask=mask,
            scale=1.0,
        )
        join = "B (I P Q) (h w) D -> B I (P h) (Q w) D"
        mixed = rearrange(output(product(mixed)), join, h=window, w=window, P=rows, Q=columns)
        return jnp.roll(mixed, (shift, shift), axis=(2, 3)) if shifted else mixed


class SwinBlock(nn.Module):
    """Window attention, then an MLP, each normed before it is added.

    Attributes:
      window: tokens along a window's side; a smaller grid is one window (for a grid with unequal sides of which one is
        at or below the window, ``transformers`` looks at the rows alone, this at the shorter side).
      shifted: whether windows are moved by half their side; not on a grid that is one window.
    """

    head_width: int
    window: int = 8
    shifted: bool = False
    mlp_ratio: int | float = 4
    window_attention: str = "xla"
    compute_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B I P Q D"], *, valid: Bool[Array, "B I P Q"], drop: DropPath | None = None
    ) -> Float[Array, "B I P Q D"]:
        """The tokens after the block; what comes out in place of invalid tokens is arbitrary."""

        def residual(branch, name, y):
            y = LayerNorm(compute_dtype=self.compute_dtype, name=f"{name}_norm")(y)
            return y if drop is None else drop(branch, y)

        rows, columns = x.shape[2:4]
        window = min(self.window, rows, columns)
        shifted = self.shifted and min(rows, columns) > self.window
        pad = ((0, 0), (0, 0), (0, -rows % window), (0, -columns % window))
        valid = jnp.pad(valid, pad, constant_values=True)  # zeros beyond the edge are attended
        x = jnp.pad(constrain_batch(x), (*pad, (0, 0)))
        kernel = self._kernel(x, window=window, shifted=shifted)
        attention = WindowAttention(self.head_width, kernel, self.compute_dtype, name="attention")
        x = x + residual(0, "attention", attention(x, seen=valid, window=window, shifted=shifted))
        # Beside a GPU's kernel the hidden width would take most of a block's memory (docs/ledger/huge_h200.txt).
        parts = math.gcd(_MLP_PARTS, x.shape[2]) if kernel.startswith("triton") else 1
        y = Mlp(round(self.mlp_ratio * x.shape[-1]), self.compute_dtype, parts, name="mlp")(x)
        x = x + residual(1, "mlp", y)
        return x[:, :, :rows, :columns]

    def _kernel(self, x: Float[Array, "B I P Q D"], *, window: int, shifted: bool) -> str:
        """The kernel if it takes these sizes, else "xla", which is said once."""
        if self.window_attention == "xla":
            return "xla"
        columns, width = x.shape[3:]
        sizes = dict(window=window, width=width, head_width=self.head_width, columns=columns, shifted=shifted)
        sizes |= dict(itemsize=jnp.dtype(self.compute_dtype).itemsize)
        told = window_kernel.problem(self.window_attention, **sizes, tensor_devices=tensor_devices())
        if told:
            fall_back("window attention", self.window_attention, told)
        return "xla" if told else self.window_attention
