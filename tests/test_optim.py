"""The update against PyTorch's AdamW and the published equations, schedules by hand, decay by name."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import linen as nn

from skysense_jax import optim

STEPS = 7


def parameters(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return {
        "block": {"kernel": draw(3, 5), "bias": draw(5), "scale": draw(5)},
        "head": {"prototypes": draw(4, 3)},
    }


def gradients():
    return [jax.tree.map(lambda x: 2 * x, parameters(seed)) for seed in range(1, STEPS + 1)]


def make(**changes):
    settings = dict(
        learning_rate=lambda step: 0.01 * (step + 1),
        weight_decay=0.1,
        beta1=0.9,
        beta2=0.99,
        clip_norm=3.0,
        prototype_freeze_steps=0,
    )
    return optim.make_optimizer(**{**settings, **changes})


def run(optimizer, params, grads):
    """All parameters after each update."""
    state, history = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for grad in grads:
        updates, state = update(grad, state, params)
        params = optax.apply_updates(params, updates)
        history.append(jax.tree.map(np.asarray, params))
    return history


def assert_trees_close(got, want, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), got, want)


def adamw_by_hand(params, grads, *, rate, decay, beta1, beta2, clip, frozen_steps=0):
    """Loshchilov & Hutter's algorithm 2 in float64 with global-norm clipping, a leaf at a time."""
    names = {"block/kernel": True, "block/bias": False, "block/scale": False, "head/prototypes": True}
    flat = lambda tree: {n: np.float64(tree[n.split("/")[0]][n.split("/")[1]]) for n in names}  # noqa: E731
    values, history = flat(params), []
    first, second = ({n: np.zeros_like(v) for n, v in values.items()} for _ in range(2))
    for t, grad in enumerate(map(flat, grads), start=1):
        norm = math.sqrt(sum((g**2).sum() for g in grad.values()))
        for name, g in grad.items():
            g = g * min(1.0, clip / norm)
            first[name] = beta1 * first[name] + (1 - beta1) * g
            second[name] = beta2 * second[name] + (1 - beta2) * g**2
            m, v = first[name] / (1 - beta1**t), second[name] / (1 - beta2**t)
            step = m / (np.sqrt(v) + 1e-8) + decay * names[name] * values[name]
            if not (name == "head/prototypes" and t <= frozen_steps):
                values[name] = values[name] - rate(t - 1) * step
        history.append({"block": {k: values[f"block/{k}"] for k in ("kernel", "bias", "scale")}})
        history[-1]["head"] = {"prototypes": values["head/prototypes"]}
    return history


@pytest.mark.parametrize("frozen_steps", [0, 3])
def test_update_equals_the_published_equations(frozen_steps):
    rate = lambda step: 0.01 * (step + 1)  # noqa: E731
    got = run(make(prototype_freeze_steps=frozen_steps), parameters(), gradients())
    want = adamw_by_hand(
        parameters(), gradients(), rate=rate, decay=0.1, beta1=0.9, beta2=0.99, clip=3.0, frozen_steps=frozen_steps
    )
    for a, b in zip(got, want, strict=True):
        assert_trees_close(a, b, rtol=2e-5, atol=2e-6)


def test_update_without_mask_equals_torch():
    params, grads = {"kernel": parameters()["block"]["kernel"]}, [{"kernel": g["block"]["kernel"]} for g in gradients()]
    got = run(make(learning_rate=lambda step: 0.02, clip_norm=2.0), params, grads)
    leaf = torch.nn.Parameter(torch.tensor(params["kernel"]))
    adamw = torch.optim.AdamW([leaf], lr=0.02, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    for grad, ours in zip(grads, got, strict=True):
        leaf.grad = torch.tensor(grad["kernel"])
        torch.nn.utils.clip_grad_norm_([leaf], 2.0)
        adamw.step()
        np.testing.assert_allclose(ours["kernel"], leaf.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_clip_small_gradient_is_left_as_it_is():
    small = [jax.tree.map(lambda x: 1e-3 * x, g) for g in gradients()]
    got, want = (run(make(clip_norm=norm), parameters(), small)[-1] for norm in (3.0, 1e6))
    assert_trees_close(got, want, rtol=1e-6)


def test_weight_decay_zero_gradient_shrinks_kernels_only():
    zero = [jax.tree.map(np.zeros_like, parameters())]
    start, after = parameters(), run(make(), parameters(), zero)[0]
    np.testing.assert_allclose(after["block"]["kernel"], start["block"]["kernel"] * (1 - 0.01 * 0.1), rtol=1e-6)
    for name in ("bias", "scale"):
        np.testing.assert_array_equal(after["block"][name], start["block"][name])


def test_prototypes_frozen_stay_to_the_bit_and_then_move_no_faster_than_ever():
    rate = 0.01
    optimizer = make(prototype_freeze_steps=5, weight_decay=0.0, learning_rate=lambda step: rate, clip_norm=1e9)
    constant = [jax.tree.map(np.ones_like, parameters())] * STEPS
    history = [h["head"]["prototypes"] for h in run(optimizer, parameters(), constant)]
    for value in history[:5]:
        np.testing.assert_array_equal(value, parameters()["head"]["prototypes"])
    np.testing.assert_allclose(history[4] - history[5], rate, rtol=1e-4)  # Adam's step for a constant gradient


def test_optimizer_boxed_parameters_give_moments_with_axes():
    boxed = jax.tree.map(lambda x: nn.Partitioned(x, names=("embed",) * x.ndim), parameters())
    state = jax.eval_shape(lambda: make().init(boxed))
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nn.Partitioned))
    moments = [leaf for leaf in leaves if isinstance(leaf, nn.Partitioned)]
    assert len(moments) == 8  # two of each parameter
    assert {leaf.value.shape for leaf in moments} == {(3, 5), (5,), (4, 3)}
    assert {leaf.shape for leaf in leaves if not isinstance(leaf, nn.Partitioned)} == {()}  # counters


# ---- decay by name


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("backbone/stage1/blocks/mlp/up/kernel", True),
        ("head_query/prototypes", True),
        ("backbone/stage1/blocks/norm1/scale", False),
        ("backbone/stage1/blocks/attention/query/bias", False),
        ("backbone/stage3/blocks/attention_layer_scale", False),
        ("backbone/stage3_s2_prompts", False),
        ("backbone/merge2/keep_s1_kernel", True),
        ("backbone/stage4/experts/router", True),
        ("backbone/stage4/experts/hidden_kernel", True),
        ("backbone/stage4/experts/hidden_bias", False),
        ("queries/queries", False),
        ("fusion/class_token", False),
        ("fusion/day_embedding", False),
        ("fusion/modality_embedding", False),
        ("backbone/stage1/blocks/attention/logit_scale", False),
        ("backbone/stage1/blocks/attention/position_bias/hidden/kernel", False),
        ("text/log_temperature", False),
    ],
)
def test_decays_known_names(path, expected):
    assert optim.decays(path) is expected


@pytest.mark.parametrize("path", ["backbone/stage1/surprise", "kernel/weights", "head/prototypes2"])
def test_decays_unknown_name_is_an_error(path):
    with pytest.raises(ValueError, match="no rule says whether it decays"):
        optim.decays(path)


def test_optimizer_unknown_parameter_is_an_error_before_the_first_update():
    with pytest.raises(ValueError, match="'new/thing'"):
        jax.eval_shape(make().init, {"new": {"thing": jnp.ones(3)}})


# ---- schedules


def test_learning_rate_schedule_matches_the_formula():
    schedule = optim.learning_rate_schedule(learning_rate=0.2, final_learning_rate=0.02, warmup_steps=4, num_steps=14)
    want = [0.05, 0.1, 0.15, 0.2]
    want += [0.02 + 0.18 * 0.5 * (1 + math.cos(math.pi * k / 10)) for k in range(1, 11)]
    want += [0.02, 0.02]
    np.testing.assert_allclose([schedule(step) for step in range(16)], want, rtol=1e-5)


@pytest.mark.parametrize(("warmup", "steps"), [(0, 3), (3, 3), (1, 1)])
def test_learning_rate_schedule_edges_are_finite_and_bounded(warmup, steps):
    schedule = optim.learning_rate_schedule(
        learning_rate=0.2, final_learning_rate=0.02, warmup_steps=warmup, num_steps=steps
    )
    values = np.array([schedule(step) for step in range(steps + 2)])
    assert np.isfinite(values).all()
    assert values.min() >= 0.02 - 1e-6
    assert values.max() <= 0.2 + 1e-6


def test_ema_momentum_schedule_is_half_a_cosine_to_one():
    schedule = optim.ema_momentum_schedule(ema_momentum=0.9, num_steps=8)
    want = [1 - 0.1 * (math.cos(math.pi * k / 8) + 1) / 2 for k in range(9)]
    np.testing.assert_allclose([schedule(step) for step in range(9)], want, rtol=1e-6)
    assert float(schedule(0)) == pytest.approx(0.9)
    assert float(schedule(8)) == float(schedule(20)) == 1.0


def test_teacher_temperature_schedule_is_linear_then_constant():
    schedule = optim.teacher_temperature_schedule(start=0.04, end=0.07, warmup_steps=3)
    np.testing.assert_allclose([schedule(step) for step in range(5)], [0.04, 0.05, 0.06, 0.07, 0.07], rtol=1e-6)
    assert float(optim.teacher_temperature_schedule(start=0.04, end=0.07, warmup_steps=0)(0)) == pytest.approx(0.07)
