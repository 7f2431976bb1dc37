"""Mixture of experts: an MLP per expert, a router that sends each token to its best k, and what the router did.

Training routes with a capacity in groups of one sample (never of a device or a microbatch), so that a sample's result
depends on no other; evaluation runs a plain path that drops nothing and is also the tests' reference.
Dispatch scatters rows to slots and gathers them back: one-hot einsums would cost a fifth more and much memory.
Sources: SkySense V2 sec. 3.2 (experts, k), Switch (arXiv 2101.03961) balance, ST-MoE (2202.08906) z-loss.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from skysense_jax.models.layers import KERNEL_INIT, gelu, named, partitioned, product
from skysense_jax.sharding import (
    ACTIVATION,
    EMBED,
    EXPERT,
    GROUPS,
    MLP,
    UNSHARDED,
    constrain,
    constrain_batch,
    gathered,
)

CHOSEN = "chosen"  # among the intermediates: [B (I N) k], the experts of each token, best first


@struct.dataclass
class RouterStats:
    """Sums over routing groups and blocks, fp32, so that those of two calls may be added.

    Attributes:
      balance: (sum, count) over blocks and groups with a valid token of ``E sum_e f_e P_e``, 1 when balanced.
      z: (sum, count) over blocks and valid tokens of the squared log-sum-exp of the router's logits.
      load: choices that fell on each expert, per block (within a block: E), before any were dropped.
      dropped: (sum, count) of choices that found no place, of all choices.
    """

    balance: tuple[Any, Any]
    z: tuple[Any, Any]
    load: Any  # L E, L the mixture blocks in order
    dropped: tuple[Any, Any]

    def __add__(self, other: "RouterStats") -> "RouterStats":
        return jax.tree.map(jnp.add, self, other)


def choose(
    logits: Float[Array, "G N E"], *, experts_per_token: int
) -> tuple[Float[Array, "G N k"], Int[Array, "G N k"]]:
    """The gates and indices of each token's k best experts, best first.

    Gates are the softmax over all experts, not renormalised over the chosen: else k = 1 would give no gradient.
    """
    gates, experts = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), experts_per_token)
    return gates, experts


def places(
    experts: Int[Array, "G N k"], valid: Bool[Array, "G N"], *, num_experts: int, capacity: int
) -> Int[Array, "G N k"]:
    """The slot of each choice with its expert; ``capacity`` where there is none left, and for invalid tokens.

    All first choices are placed before any second one, tokens in order. Invalid tokens take no slot.
    """
    num_choices = experts.shape[-1]
    ordered = rearrange(experts, "G N k -> G (k N)")
    takes = jax.nn.one_hot(ordered, num_experts, dtype=jnp.int32) * jnp.tile(valid, (1, num_choices))[..., None]
    before = jnp.cumsum(takes, axis=1) - takes  # G (k N) E
    slot = jnp.take_along_axis(before, ordered[..., None], axis=-1)[..., 0]
    slot = rearrange(slot, "G (k N) -> G N k", k=num_choices)
    return jnp.where(valid[..., None] & (slot < capacity), slot, capacity)


def router_stats(
    logits: Float[Array, "G N E"], experts: Int[Array, "G N k"], valid: Bool[Array, "G N"], kept: Bool[Array, "G N k"]
) -> RouterStats:
    """What one block's router did, masked tokens left out; ``kept`` is True for choices that an expert computed."""
    weight = valid.astype(jnp.float32)
    tokens = weight.sum(1)  # G
    load = jnp.einsum("gnke,gn->ge", jax.nn.one_hot(experts, logits.shape[-1]), weight)
    share = load / jnp.maximum(tokens * experts.shape[-1], 1)[:, None]
    probability = jnp.einsum("gne,gn->ge", jax.nn.softmax(logits), weight) / jnp.maximum(tokens, 1)[:, None]
    balance = logits.shape[-1] * (share * probability).sum(-1)  # G; zero in a group without a valid token
    z = jnp.square(jax.nn.logsumexp(logits, axis=-1)) * weight
    num_choices = tokens.sum() * experts.shape[-1]
    num_kept = (kept & valid[..., None]).sum().astype(jnp.float32)
    return RouterStats(
        balance=(balance.sum(), (tokens > 0).sum().astype(jnp.float32)),
        z=(z.sum(), tokens.sum()),
        load=load.sum(0),
        dropped=(num_choices - num_kept, num_choices),
    )


class ExpertMlp(nn.Module):
    """The mixture ``y = sum over the k chosen experts i of gate_i(x) expert_i(x)``.

    Attributes:
      hidden_dim: of each expert, an MLP with the exact GELU and biases.
      capacity_factor: an expert has ``ceil(capacity_factor * k * N / E)`` slots per sample of N tokens in training.
    """

    hidden_dim: int
    num_experts: int
    experts_per_token: int = 1
    capacity_factor: int | float = 1.25
    compute_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B I N D"], *, valid: Bool[Array, "B I N"], train: bool
    ) -> tuple[Float[Array, "B I N D"], RouterStats]:
        """The mixture's output, zero for choices that found no slot and for invalid tokens, and the statistics."""
        width, shape = x.shape[-1], x.shape
        x, valid = rearrange(x, "B I N D -> B (I N) D"), rearrange(valid, "B I N -> B (I N)")
        router = self.param("router", partitioned(KERNEL_INIT, EMBED, UNSHARDED), (width, self.num_experts))
        weights = self._weights(width)
        # fp32 in full: the choice between experts is a discontinuity
        logits = product(jnp.einsum("gnd,de->gne", x.astype(jnp.float32), router, precision=jax.lax.Precision.HIGHEST))
        gates, experts = choose(logits, experts_per_token=self.experts_per_token)
        self.sow("intermediates", CHOSEN, experts)  # kept only where asked for: explain/routing.py
        gates = gates * valid[..., None]
        if train:
            y, kept = self._with_capacity(x, weights, gates, experts, valid)
        else:
            y, kept = self._dropless(x, weights, gates, experts), jnp.ones(experts.shape, bool)
        return y.reshape(shape), router_stats(logits, experts, valid, kept)

    def _weights(self, width):
        num, hidden, zeros = self.num_experts, self.hidden_dim, nn.initializers.zeros
        init = named("xavier_uniform", nn.initializers.xavier_uniform(batch_axis=0))  # each expert's as a dense MLP's

        def weight(name, init, shape, *axes):
            return gathered(self.param(name, partitioned(init, *axes), shape).astype(self.compute_dtype), *axes)

        return (
            weight("hidden_kernel", init, (num, width, hidden), EXPERT, EMBED, MLP),
            weight("hidden_bias", zeros, (num, hidden), EXPERT, MLP),
            weight("output_kernel", init, (num, hidden, width), EXPERT, MLP, EMBED),
            weight("output_bias", zeros, (num, width), EXPERT, UNSHARDED),
        )

    def _with_capacity(self, x, weights, gates, experts, valid):
        num_tokens = x.shape[1]
        capacity = math.ceil(self.capacity_factor * self.experts_per_token * num_tokens / self.num_experts)
        slots = places(experts, valid, num_experts=self.num_experts, capacity=capacity)

        def scatter(x, experts, slots):  # of one group; slot == capacity lies outside and is dropped
            empty = jnp.zeros((self.num_experts, capacity, x.shape[-1]), x.dtype)
            return empty.at[experts, slots].add(x[:, None, :], mode="drop")

        gather = lambda y, experts, slots: y.at[experts, slots].get(mode="fill", fill_value=0)  # noqa: E731
        spread = constrain_batch(jax.vmap(scatter)(x, experts, slots))  # G E S D, with its sample
        y = self._at_experts(spread, weights)
        y = product(jax.vmap(gather)(constrain_batch(y), experts, slots))  # G N k D
        return jnp.einsum("gnkd,gnk->gnd", y, gates.astype(y.dtype)), slots < capacity

    def _at_experts(self, x, weights):
        hidden_kernel, hidden_bias, output_kernel, output_bias = weights
        at_experts = lambda x: constrain(x, GROUPS, EXPERT, ACTIVATION, ACTIVATION)  # noqa: E731
        x = product(at_experts(x))  # an all-to-all over the expert axis of the mesh
        hidden = product(jnp.einsum("gesd,edf->gesf", x, hidden_kernel) + hidden_bias[:, None])
        return at_experts(jnp.einsum("gesf,efd->gesd", gelu(hidden), output_kernel) + output_bias[:, None])

    def _dropless(self, x, weights, gates, experts):
        """Every expert on every token, weighted by its gate or zero: plain, E times the work, memory of one expert."""
        gate_of = jnp.einsum("gnke,gnk->egn", jax.nn.one_hot(experts, self.num_experts), gates).astype(x.dtype)

        def add_expert(total, expert):
            gate, hidden_kernel, hidden_bias, output_kernel, output_bias = expert
            y = gelu(x @ hidden_kernel + hidden_bias) @ output_kernel + output_bias
            return total + gate[..., None] * y, None

        return jax.lax.scan(add_expert, jnp.zeros_like(x), (gate_of, *weights))[0]
