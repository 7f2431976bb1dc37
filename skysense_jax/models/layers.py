"""The small layers that every network here is made of: linear, layer norm, MLP, drop path.

Parameters are fp32 and carry logical axes (sharding.py); matrix products run in ``compute_dtype``, statistics in fp32.
A vector along the residual stream is replicated: to shard it would cost a collective per use and save nothing.
Next: attention.py, then swin.py (stages 1 and 2) and vit.py (stages 3 and 4).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from skysense_jax.kernels.devices import by_samples
from skysense_jax.sharding import BATCH, EMBED, LOGICAL_AXIS_RULES, MLP, UNSHARDED, gathered


def named(name: str, init: Callable) -> Callable:
    """The initialiser ``init`` under the name that the parameter table shows."""

    def call(*args):
        return init(*args)

    call.__name__ = name
    return call


def constant(value: int | float) -> Callable:
    """The initialiser of arrays that hold ``value``."""
    return named(f"constant_{value:.4g}", nn.initializers.constant(value))


# Of matrices: the scale follows their width, which a fixed deviation does only near the widths it was made for (0.02 is
# that of an input of 2500). Measured on `tiny` with 0.02: each layer passes on a fifth of its input, GELUs stay linear.
KERNEL_INIT = named("xavier_uniform", nn.initializers.xavier_uniform())
# Of learned tokens, embeddings and prototypes, as ViT.
VECTOR_INIT = named("truncated_normal_0.02", nn.initializers.truncated_normal(0.02))


@struct.dataclass
class Parameter(nn.LogicallyPartitioned):
    """A parameter with the logical names of its axes and the name of its initialiser."""

    init: str = struct.field(default="", pytree_node=False)


def partitioned(init: Callable, *axes: str) -> Callable:
    """The initialiser ``init`` whose result carries the logical names of its axes, and its name."""
    assert set(axes) <= set(dict(LOGICAL_AXIS_RULES)), axes
    assert init.__name__ != "init", "what flax makes has no name of its own: wrap it in named()"
    names = tuple(None if axis == UNSHARDED else axis for axis in axes)  # flax refuses a name that stands twice
    return lambda *args: Parameter(init(*args), names, rules=LOGICAL_AXIS_RULES, init=init.__name__)


_PRODUCT = "product"


def product(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """``x``, one of what ``recomputed`` keeps of a block with "matmuls"."""
    return checkpoint_name(x, _PRODUCT)


@jax.custom_vjp
def gelu(x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
    """The exact GELU, ``x Phi(x)``; by erf, which compiles to a third of the code of ``jax.nn.gelu``'s erfc.

    Its backward pass starts from ``x`` alone: two arrays of an MLP's hidden width would be written and read otherwise.
    """
    return 0.5 * x * (1 + jax.lax.erf(x * (1 / math.sqrt(2))))


def _gelu_backward(x, upstream):
    exact = x.astype(jnp.float32)
    normal = jnp.exp(-0.5 * jnp.square(exact)) * (1 / math.sqrt(2 * math.pi))
    slope = 0.5 * (1 + jax.lax.erf(exact * (1 / math.sqrt(2)))) + exact * normal
    return ((upstream * slope).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


class Dense(nn.Module):
    """A linear layer over the last axis.

    Attributes:
      features: output width.
      axes: logical names of the kernel's input and output axis; the two must lie on different mesh axes.
    """

    features: int
    axes: tuple[str, str] = (EMBED, UNSHARDED)
    use_bias: bool = True
    kernel_init: Callable = KERNEL_INIT
    bias_init: Callable = nn.initializers.zeros
    compute_dtype: Any = jnp.float32

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows F"]:
        """``x`` times the kernel, plus the bias, in ``compute_dtype``."""
        kernel, bias = self.weights(x.shape[-1])
        y = x.astype(self.compute_dtype) @ kernel
        return product(y if bias is None else y + bias)

    @nn.compact
    def weights(self, width: int) -> tuple[Float[Array, "D F"], Float[Array, " F"] | None]:
        """Kernel, whole along ``EMBED``, and bias for inputs of this width, in ``compute_dtype``."""
        kernel = self.param("kernel", partitioned(self.kernel_init, *self.axes), (width, self.features))
        kernel = gathered(kernel.astype(self.compute_dtype), *self.axes)
        if not self.use_bias:
            return kernel, None
        axis = UNSHARDED if self.axes[1] == EMBED else self.axes[1]
        bias = self.param("bias", partitioned(self.bias_init, axis), (self.features,))
        return kernel, jnp.asarray(bias, self.compute_dtype)


class LayerNorm(nn.Module):
    """Layer norm over the last axis with scale and bias, computed in fp32, returned in ``compute_dtype``."""

    epsilon: float = 1e-5
    compute_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """``x`` with mean 0 and variance 1 over the last axis, then scaled and shifted."""
        scale = self.param("scale", partitioned(nn.initializers.ones, UNSHARDED), x.shape[-1:])
        bias = self.param("bias", partitioned(nn.initializers.zeros, UNSHARDED), x.shape[-1:])
        x = x.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + self.epsilon) * scale + bias).astype(self.compute_dtype)


class Mlp(nn.Module):
    """Two linear layers with the exact (erf) GELU between, from and to the width of the input.

    Attributes:
      parts: of each map's rows (the input is B I P Q D), which go through the layers one after the other, so that the
        hidden width stands in memory for one of them; 1: of any input.
    """

    hidden_dim: int
    compute_dtype: Any = jnp.float32
    parts: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """The MLP of every token."""
        dense = functools.partial(Dense, compute_dtype=self.compute_dtype)
        hidden = dense(self.hidden_dim, axes=(EMBED, MLP), name="hidden")
        output = dense(x.shape[-1], axes=(MLP, EMBED), name="output")
        if self.parts == 1:
            return output(gelu(hidden(x)))
        assert x.ndim == 5, x.shape
        assert x.shape[2] % self.parts == 0, (x.shape, self.parts)
        weights = hidden.weights(x.shape[-1]), output.weights(self.hidden_dim)
        in_turn = functools.partial(_in_turn, self.parts)
        x = x.astype(self.compute_dtype)
        return product(by_samples(in_turn, (x,), (weights,), batch_axes=dict(LOGICAL_AXIS_RULES)[BATCH]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_turn(parts, x, weights):
    # What it begins with is written over. It is made of x, as a constant would stand in memory long before it is used.
    first = jnp.broadcast_to(x[(0,) * x.ndim], x.shape)
    return jax.lax.fori_loop(0, parts, lambda i, y: _put(y, _mlp(_rows(x, i, parts), weights), i), first)


def _in_turn_backward(parts, kept, upstream):
    """Computes each part again, and writes its input's gradient over its output's."""
    x, weights = kept

    # Weights' gradients are rounded as products of the compute dtype are, for each part, and added up in fp32.
    def of_part(i, so_far):
        gradient, of_weights = so_far
        _, backward = jax.vjp(_mlp, _rows(x, i, parts), weights)
        of_rows, more = backward(_rows(gradient, i, parts))
        return _put(gradient, of_rows, i), jax.tree.map(lambda total, part: total + part, of_weights, more)

    zeros = jax.tree.map(lambda weight: jnp.zeros(weight.shape, jnp.float32), weights)
    gradient, of_weights = jax.lax.fori_loop(0, parts, of_part, (upstream, zeros))
    return gradient, jax.tree.map(lambda total, weight: total.astype(weight.dtype), of_weights, weights)


_in_turn.defvjp(lambda parts, x, weights: (_in_turn(parts, x, weights), (x, weights)), _in_turn_backward)


def _mlp(x, weights):
    (hidden, hidden_bias), (output, output_bias) = weights
    return gelu(x @ hidden + hidden_bias) @ output + output_bias


def _rows(x, part, parts):
    rows = x.shape[2] // parts
    return jax.lax.dynamic_slice_in_dim(x, part * rows, rows, 2)


def _put(x, rows, part):
    return jax.lax.dynamic_update_slice_in_dim(x, rows, part * rows.shape[2], 2)


def recomputed(body: Callable, remat: str, *, scanned: bool) -> Callable:
    """``body``, of a module's block, with what ``config.efficiency.remat`` keeps of it for the backward pass.

    "none": all of it; "matmuls": what linear layers, attention and experts give and what they send, not norms and GELUs
    (attention in XLA makes its scores again); "blocks": nothing but what comes in. An MLP that works in parts makes its
    hidden layer again in any case. ``scanned``: a scan around it keeps
    the two passes apart, so that nothing else need.
    """
    if remat == "none":
        return body
    policy = {"matmuls": _products, "blocks": None}[remat]
    return nn.remat(body, policy=policy, prevent_cse=not scanned)


def _products(primitive, *inputs, **params):
    """Whether a result is kept: one that is named, and what cuDNN's attention gives, its statistics included."""
    named_so = jax.checkpoint_policies.save_only_these_names(_PRODUCT)
    return named_so(primitive, *inputs, **params) or primitive.name.startswith("dot_product_attention_fwd")


@struct.dataclass
class DropPath:
    """Which residual branches of a block are left out (stochastic depth, arXiv 1603.09382), image by image.

    The numbers come with the batch and not from a generator in here: so a sample's do not depend on how a batch is cut.

    Attributes:
      rate: probability of leaving a branch out.
      draws: uniform in [0, 1), one for each image and branch.
    """

    rate: Any  # scalar; a scan stacks it
    draws: Any  # B I branches

    def __call__(self, branch: int, x: Float[Array, "B I *rest"]) -> Float[Array, "B I *rest"]:
        """``x``, zero with probability ``rate`` for each image on its own and else divided by ``1 - rate``."""
        keep = (self.draws[:, :, branch] >= self.rate) / (1.0 - self.rate)
        return x * keep.reshape(*x.shape[:2], *(1,) * (x.ndim - 2)).astype(x.dtype)


def drop_rates(last: int | float, depth: int) -> Float[np.ndarray, " depth"]:
    """Linear from 0 at the first block to ``last``."""
    return np.linspace(0.0, last, depth, dtype=np.float32)
