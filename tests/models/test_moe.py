"""Mixture of experts against loops, the dense MLP, and itself with tokens masked."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skysense_jax.models.layers import Mlp
from skysense_jax.models.moe import ExpertMlp, places
from skysense_jax.sharding import unbox

WIDTH, HIDDEN, EXPERTS = 6, 10, 4
SHAPE = (2, 3, 5, WIDTH)  # B I N D: two groups of 15 tokens


def _setup(experts_per_token=1, capacity_factor=1.25, seed=0):
    layer = ExpertMlp(HIDDEN, EXPERTS, experts_per_token, capacity_factor)
    x = jax.random.normal(jax.random.key(seed), SHAPE)
    valid = jax.random.bernoulli(jax.random.key(seed + 1), 0.7, SHAPE[:3])
    params = unbox(layer.init(jax.random.key(0), x, valid=valid, train=False))["params"]
    noise = lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape)  # noqa: E731
    return layer, jax.tree.map(noise, params), x, valid


@functools.partial(jax.jit, static_argnames=("layer", "train"))
def _run(layer, params, x, valid, *, train):
    return layer.apply({"params": params}, x, valid=valid, train=train)


def _expert(params, i):
    return {
        "hidden": {"kernel": params["hidden_kernel"][i], "bias": params["hidden_bias"][i]},
        "output": {"kernel": params["output_kernel"][i], "bias": params["output_bias"][i]},
    }


def _identical(params):
    same = lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape)  # noqa: E731
    return {name: leaf if name == "router" else same(leaf) for name, leaf in params.items()}


@pytest.mark.parametrize("train", [False, True], ids=["dropless", "capacity"])
def test_identical_experts_all_chosen_equal_dense_mlp(train):
    layer, params, x, valid = _setup(experts_per_token=EXPERTS, capacity_factor=1.0)
    params = _identical(params)
    y, stats = _run(layer, params, x, valid, train=train)
    dense = Mlp(HIDDEN).apply({"params": _expert(params, 0)}, x)
    np.testing.assert_allclose(y, jnp.where(valid[..., None], dense, 0), atol=2e-5)
    assert stats.dropped[0] == 0


@pytest.mark.parametrize("train", [False, True], ids=["dropless", "capacity"])
def test_identical_experts_one_chosen_equal_gate_times_dense_mlp(train):
    layer, params, x, valid = _setup(capacity_factor=EXPERTS)
    params = _identical(params)
    y, _ = _run(layer, params, x, valid, train=train)
    gate = jax.nn.softmax(x @ params["router"]).max(-1, keepdims=True) * valid[..., None]
    np.testing.assert_allclose(y, gate * Mlp(HIDDEN).apply({"params": _expert(params, 0)}, x), atol=2e-5)


def _loop(params, x, valid, *, experts_per_token, capacity):
    """Token by token: output, load, dropped choices, per-group balance and per-token z, from the definitions."""
    y, load, dropped, balance, z = np.zeros(x.shape), np.zeros(EXPERTS), 0, [], []
    apply = jax.jit(lambda p, x: Mlp(HIDDEN).apply({"params": p}, x))
    outputs = np.stack([apply(_expert(params, i), x) for i in range(EXPERTS)])
    for b in range(x.shape[0]):
        tokens = [(i, n) for i in range(x.shape[1]) for n in range(x.shape[2]) if valid[b, i, n]]
        logits = {t: np.asarray(x[(b, *t)], np.float64) @ np.asarray(params["router"], np.float64) for t in tokens}
        gates = {t: np.exp(v) / np.exp(v).sum() for t, v in logits.items()}
        taken, group_load = np.zeros(EXPERTS), np.zeros(EXPERTS)
        for choice in range(experts_per_token):
            for t in tokens:
                e = np.argsort(-gates[t])[choice]
                group_load[e] += 1
                if taken[e] < capacity:
                    y[(b, *t)] += gates[t][e] * outputs[(e, b, *t)]
                    taken[e] += 1
                else:
                    dropped += 1
        load += group_load
        balance.append(EXPERTS * (group_load / group_load.sum() * np.mean([*gates.values()], axis=0)).sum())
        z += [np.log(np.exp(v).sum()) ** 2 for v in logits.values()]
    return y, load, dropped, balance, z


@pytest.mark.parametrize("experts_per_token", [1, 2])
@pytest.mark.parametrize("train", [False, True], ids=["dropless", "capacity"])
def test_mixture_equals_loop_over_tokens(experts_per_token, train):
    factor = 0.5
    layer, params, x, valid = _setup(experts_per_token, capacity_factor=factor)
    y, stats = _run(layer, params, x, valid, train=train)
    capacity = math.ceil(factor * experts_per_token * 15 / EXPERTS) if train else 10**9
    wanted, load, dropped, balance, z = _loop(
        params, x, np.asarray(valid), experts_per_token=experts_per_token, capacity=capacity
    )
    assert (dropped > 0) == train  # else the case shows nothing
    np.testing.assert_allclose(y, wanted, atol=2e-5)
    np.testing.assert_array_equal(stats.load, load)
    assert stats.dropped == (dropped, load.sum())
    np.testing.assert_allclose(stats.balance, (np.sum(balance), 2), rtol=1e-5)
    np.testing.assert_allclose(stats.z, (np.sum(z), valid.sum()), rtol=1e-5)


def test_capacity_path_equals_dropless_path_in_gradients_when_nothing_is_dropped():
    layer, params, x, valid = _setup(experts_per_token=2, capacity_factor=EXPERTS)

    @functools.partial(jax.jit, static_argnames="train")
    def gradient(params, x, *, train):
        loss = lambda params, x: jnp.sin(layer.apply({"params": params}, x, valid=valid, train=train)[0]).sum()  # noqa: E731
        return jax.grad(loss, (0, 1))(params, x)

    capacity, dropless = (gradient(params, x, train=train) for train in (True, False))
    assert jnp.abs(dropless[0]["router"]).max() > 1e-3  # the router learns from the task
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), capacity, dropless)


@pytest.mark.parametrize("train", [False, True], ids=["dropless", "capacity"])
def test_masked_tokens_change_nothing(train):
    layer, params, x, valid = _setup(capacity_factor=0.75)
    y, stats = _run(layer, params, x, valid, train=train)
    other = jnp.where(valid[..., None], x, 100.0)  # all of them crowd to one expert
    changed, changed_stats = _run(layer, params, other, valid, train=train)
    np.testing.assert_array_equal(y, changed)
    np.testing.assert_array_equal(jnp.where(valid[..., None], 0, y), 0)
    jax.tree.map(np.testing.assert_array_equal, stats, changed_stats)


def test_all_masked_group_gives_zero_counts_and_finite_gradient():
    layer, params, x, valid = _setup()
    valid = valid.at[0].set(False)

    def loss(params, valid):
        y, stats = layer.apply({"params": params}, x, valid=valid, train=True)
        return y.sum() + stats.balance[0] + stats.z[0], stats

    grad = jax.jit(jax.grad(loss, has_aux=True))
    _, stats = grad(params, valid)
    assert stats.balance[1] == 1  # the other group
    gradient, stats = grad(params, jnp.zeros_like(valid))
    assert stats.balance == stats.z == stats.dropped == (0, 0)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_places_first_choices_before_second_ones():
    experts = jnp.array([[[0, 1], [1, 0], [0, 1], [0, 2]]])  # one group, four tokens, two choices
    valid = jnp.array([[True, True, False, True]])
    slots = places(experts, valid, num_experts=3, capacity=2)
    np.testing.assert_array_equal(
        slots[0], [[0, 1], [0, 2], [2, 2], [1, 0]]
    )  # expert 0 is full after the first choices
