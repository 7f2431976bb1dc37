"""What stands on the backbone when it is fine-tuned: a linear head, UPerNet, a small decoder of cells.

Parameters are fp32 and whole on every device: a decoder is small beside the backbone. Batch norms see the whole batch,
also on a mesh, and keep running statistics for evaluation. Next: finetune.py.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float

POOL_SCALES = (1, 2, 3, 6)  # arXiv 1612.01105


def resize(x: Float[Array, "B P Q D"], rows: int, columns: int) -> Float[Array, "B {rows} {columns} D"]:
    """``x`` on another grid of the same ground, bilinear between the centres of cells, edges repeated; fp32."""
    shape = (x.shape[0], rows, columns, x.shape[3])
    return jax.image.resize(x.astype(jnp.float32), shape, method="linear", antialias=False)


def pooling_matrix(size: int, parts: int) -> Float[np.ndarray, "{parts} {size}"]:
    """Means over ``parts`` parts of a row of ``size``, which overlap where it does not divide evenly.

    Part i is [floor(i size / parts), ceil((i + 1) size / parts)), as PyTorch's adaptive pooling has it.
    """
    matrix = np.zeros((parts, size), np.float32)
    for part in range(parts):
        first, end = part * size // parts, -(-(part + 1) * size // parts)
        matrix[part, first:end] = 1 / (end - first)
    return matrix


class ConvNorm(nn.Module):
    """A convolution without bias, a batch norm, a ReLU.

    Attributes:
      kernel: side of the kernel; the grid stays.
    """

    width: int
    kernel: int
    compute_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B P Q D"], *, train: bool) -> Float[Array, "B P Q F"]:
        """``train`` takes the batch's statistics, and moves the running ones a tenth of the way to them."""
        side = (self.kernel, self.kernel)
        x = nn.Conv(self.width, side, use_bias=False, dtype=self.compute_dtype, name="conv")(x)
        norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=x.dtype, name="norm")
        return nn.relu(norm(x))


class UPerNet(nn.Module):
    """Pyramid pooling of the coarsest map, a feature pyramid over all, and a class for every place of the finest.

    As published (Xiao et al. 2018, arXiv 1807.10221) for one task, and without the auxiliary head that some
    implementations train beside it. Differs: a layer norm of each map comes first, as the maps carry none.

    Attributes:
      num_logits: numbers for each place.
      width: of every layer; 512 as published.
      norm_maps: whether the layer norms are there.
    """

    num_logits: int
    width: int = 512
    norm_maps: bool = True
    compute_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, maps: Sequence[Float[Array, "B _P _Q _D"]], *, train: bool) -> Float[Array, "B P Q L"]:
        """Logits on the grid of the first map; ``maps`` from the finest to the coarsest, all of the same ground."""
        block = functools.partial(ConvNorm, self.width, compute_dtype=self.compute_dtype)
        if self.norm_maps:
            maps = [nn.LayerNorm(epsilon=1e-5, name=f"norm_{i}")(x) for i, x in enumerate(maps)]
        *finer, coarsest = maps
        rows, columns = coarsest.shape[1:3]
        pyramid = [coarsest.astype(jnp.float32)]
        for i, parts in enumerate(POOL_SCALES):
            by_row, by_column = pooling_matrix(rows, parts), pooling_matrix(columns, parts)
            pooled = jnp.einsum("ip,jq,bpqd->bijd", by_row, by_column, coarsest.astype(jnp.float32))
            pyramid.append(resize(block(1, name=f"pool_{i}")(pooled, train=train), rows, columns))
        top = block(3, name="bottleneck")(jnp.concatenate(pyramid, axis=-1), train=train)

        levels = [block(1, name=f"lateral_{i}")(x, train=train) for i, x in enumerate(finer)] + [top]
        for i in reversed(range(len(finer))):
            levels[i] = levels[i] + resize(levels[i + 1], *levels[i].shape[1:3])
        levels = [block(3, name=f"smooth_{i}")(x, train=train) for i, x in enumerate(levels[:-1])] + [top]
        together = jnp.concatenate([resize(x, *levels[0].shape[1:3]) for x in levels], axis=-1)
        fused = block(3, name="fuse")(together, train=train)
        return nn.Conv(self.num_logits, (1, 1), name="classify")(fused.astype(jnp.float32))


class CellDecoder(nn.Module):
    """Two 3x3 convolutions over the cells of the last map and a class for each cell [our choice].

    Attributes: as of ``UPerNet``.
    """

    num_logits: int
    width: int = 512
    compute_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, maps: Sequence[Float[Array, "B _P _Q _D"]], *, train: bool) -> Float[Array, "B P Q L"]:
        """Logits on the grid of the last map."""
        x = nn.LayerNorm(epsilon=1e-5, name="norm")(maps[-1])
        for i in range(2):
            x = ConvNorm(self.width, 3, self.compute_dtype, name=f"mix_{i}")(x, train=train)
        return nn.Conv(self.num_logits, (1, 1), name="classify")(x.astype(jnp.float32))


class LinearHead(nn.Module):
    """A layer norm and a linear layer of the mean over usable cells, as BEiT's (arXiv 2106.08254).

    Attributes:
      num_logits: numbers for each sample.
    """

    num_logits: int

    @nn.compact
    def __call__(self, cells: Float[Array, "B P Q D"], usable: Bool[Array, "B P Q"]) -> Float[Array, "B L"]:
        """Logits; of a sample without a usable cell those of a zero feature."""
        total = jnp.where(usable[..., None], cells.astype(jnp.float32), 0.0).sum((1, 2))
        mean = total / jnp.maximum(usable.sum((1, 2)), 1)[:, None]
        return nn.Dense(self.num_logits, name="classify")(nn.LayerNorm(epsilon=1e-5, name="norm")(mean))
