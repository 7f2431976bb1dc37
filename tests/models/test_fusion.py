"""Fusion against PyTorch's pre-norm encoder, its size, and what absent modalities, dates and cells do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from skysense_jax import sharding
from skysense_jax.models.fusion import Fusion

RNG = np.random.default_rng(0)
B, V, P, Q, D = 2, 2, 2, 3, 6
WIDTH = 16  # a layer norm over 8 channels met a variance near zero, where rounding counts
NUM_DATES = {"hr": 1, "s2": 3, "s1": 2}
FEATURES = {m: RNG.normal(size=(B, V, t, P, Q, D)).astype(np.float32) for m, t in NUM_DATES.items()}
USABLE = {m: RNG.random((B, V, t, P, Q)) < 0.7 for m, t in NUM_DATES.items()}
for _mask in USABLE.values():
    _mask[0, 1, :, 1, 2] = False  # a cell that nobody sees
DAYS = {m: RNG.integers(0, 367, (B, t)).astype(np.int32) for m, t in NUM_DATES.items()}
INPUTS = (FEATURES, USABLE, DAYS)
FUSION = Fusion(modalities=("hr", "s2", "s1"), width=WIDTH, depth=2, head_width=WIDTH // 2, mlp_ratio=3)
apply = jax.jit(functools.partial(FUSION.apply, train=False))


@pytest.fixture(scope="module")
def params():
    init = jax.jit(functools.partial(FUSION.init, train=False))
    params = sharding.unbox(init(jax.random.key(0), *INPUTS))["params"]
    return jax.tree.map(lambda p: p + 0.1 * RNG.normal(size=p.shape).astype(np.float32), params)


def torch_fusion(params, features):
    """Loops over samples, views and cells; a PyTorch encoder on each cell's usable tokens alone."""
    params = jax.tree.map(lambda x: torch.tensor(np.asarray(x), dtype=torch.float64), params)
    layers = []
    for i in range(2):
        block = jax.tree.map(lambda x: x[i], params["blocks"])
        attention, mlp = block["attention"], block["mlp"]
        own = [attention[name] for name in ("query", "key", "value")]
        state = {
            "self_attn.in_proj_weight": torch.cat([x["kernel"].T for x in own]),
            "self_attn.in_proj_bias": torch.cat([x["bias"] for x in own]),
            "self_attn.out_proj.weight": attention["output"]["kernel"].T,
            "self_attn.out_proj.bias": attention["output"]["bias"],
            "linear1.weight": mlp["hidden"]["kernel"].T,
            "linear1.bias": mlp["hidden"]["bias"],
            "linear2.weight": mlp["output"]["kernel"].T,
            "linear2.bias": mlp["output"]["bias"],
            "norm1.weight": block["attention_norm"]["scale"],
            "norm1.bias": block["attention_norm"]["bias"],
            "norm2.weight": block["mlp_norm"]["scale"],
            "norm2.bias": block["mlp_norm"]["bias"],
        }
        layer = torch.nn.TransformerEncoderLayer(WIDTH, 2, 3 * WIDTH, 0.0, "gelu", norm_first=True, batch_first=True)
        layer.double().load_state_dict(state)
        layers.append(layer)
    out = torch.zeros(B, V, P, Q, WIDTH, dtype=torch.float64)
    for b, v, p, q in np.ndindex(B, V, P, Q):
        tokens = [params["class_token"]]
        for kind, name in enumerate(("hr", "s2", "s1")):
            for t in range(NUM_DATES[name]):
                if USABLE[name][b, v, t, p, q]:
                    x = features[name][b, v, t, p, q] @ params["project"]["kernel"] + params["project"]["bias"]
                    day = params["day_embedding"][DAYS[name][b, t]]
                    tokens.append(x + day + params["modality_embedding"][kind])
        x = torch.stack(tokens)[None]
        for layer in layers:
            x = layer(x)
        norm = params["norm"]
        out[b, v, p, q] = torch.nn.functional.layer_norm(x[0, 0], (WIDTH,), norm["scale"], norm["bias"])
    return out


def test_fusion_equals_torch_cell_by_cell_in_value_and_gradient(params):
    weight = RNG.normal(size=(B, V, P, Q, WIDTH)).astype(np.float32)
    inputs = {name: torch.tensor(x, dtype=torch.float64, requires_grad=True) for name, x in FEATURES.items()}
    wanted = torch_fusion(params, inputs)
    (wanted * torch.tensor(weight)).sum().backward()
    fused, usable = apply({"params": params}, *INPUTS)
    np.testing.assert_allclose(fused, wanted.detach(), atol=1e-5)
    np.testing.assert_array_equal(usable, np.any([x.any(2) for x in USABLE.values()], axis=0))
    assert not usable[0, 1, 1, 2]
    loss = lambda *tree: (FUSION.apply({"params": params}, *tree, train=False)[0] * weight).sum()  # noqa: E731
    for name, grad in jax.jit(jax.grad(loss))(*INPUTS).items():
        np.testing.assert_allclose(grad, inputs[name].grad, atol=1e-5)


def test_fusion_absent_modality_is_a_masked_one(params):
    masked = {**USABLE, "s2": USABLE["s2"] & False}
    subset = lambda tree: {name: tree[name] for name in ("s1", "hr")}  # noqa: E731
    with jax.enable_x64(True):  # in fp32, products of other lengths round apart by up to 1.2e-6
        double = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)  # noqa: E731
        apply = jax.jit(functools.partial(FUSION.clone(compute_dtype=jnp.float64).apply, train=False))
        variables = {"params": double(params)}
        with_mask = apply(variables, double(FEATURES), masked, DAYS)
        without = apply(variables, double(subset(FEATURES)), subset(USABLE), subset(DAYS))
    np.testing.assert_allclose(with_mask[0], without[0], atol=1e-6)
    np.testing.assert_array_equal(with_mask[1], without[1])


def test_fusion_order_of_dates_does_not_matter(params):
    order = np.array([2, 0, 1])
    moved = [{**tree, "s2": np.take(tree["s2"], order, axis)} for tree, axis in ((FEATURES, 2), (USABLE, 2), (DAYS, 1))]
    got, wanted = apply({"params": params}, *moved), apply({"params": params}, *INPUTS)
    np.testing.assert_allclose(got[0], wanted[0], atol=1e-5)


def test_fusion_day_outside_the_table_is_not_another_day(params):
    days = {**DAYS, "hr": np.full((B, 1), 367, np.int32)}
    assert np.isnan(apply({"params": params}, FEATURES, {**USABLE, "hr": USABLE["hr"] | True}, days)[0]).any()


def test_fusion_drop_path_in_training_only(params):
    module = FUSION.clone(drop_path=0.5, remat="blocks")
    train = jax.jit(functools.partial(module.apply, train=True))
    shape = (B, FEATURES["hr"].shape[1] * FEATURES["hr"].shape[3] * FEATURES["hr"].shape[4], 2 * module.depth)
    draws = lambda seed: jax.random.uniform(jax.random.key(seed), shape)  # noqa: E731
    run = lambda seed: train({"params": params}, *INPUTS, drop_draws=draws(seed))[0]  # noqa: E731
    evaluate = jax.jit(functools.partial(module.apply, train=False))
    plain = apply({"params": params}, *INPUTS)[0]
    np.testing.assert_allclose(evaluate({"params": params}, *INPUTS)[0], plain, atol=1e-6)
    first, second = run(0), run(1)
    assert np.abs(first - second).max() > 0.1
    np.testing.assert_array_equal(first, run(0))


def test_fusion_huge_has_the_papers_number_of_parameters():
    module = Fusion(modalities=("hr", "s2", "s1"), width=1024, depth=24, head_width=64)
    features = {"s2": jnp.zeros((1, 1, 1, 1, 1, 2816))}
    usable, days = {"s2": jnp.ones((1, 1, 1, 1, 1), bool)}, {"s2": jnp.zeros((1, 1), jnp.int32)}
    boxed = jax.eval_shape(lambda: module.init(jax.random.key(0), features, usable, days, train=False))
    sizes = jax.tree.map(lambda x: x.size, sharding.unbox(boxed))
    extra = 3 * 1024 + 1024 + 2 * 1024  # modality embeddings, class token, final norm
    assert sum(jax.tree.leaves(sizes)) == 305_569_792 + extra
    sharding.tree_shardings(boxed, sharding.make_mesh(1, 4, 2, 1))


def test_fusion_unknown_modality_is_refused():
    init = functools.partial(FUSION.clone(modalities=("hr",)).init, train=False)
    with pytest.raises(ValueError, match=r"config.data.modalities: got features of \['hr', 's1', 's2'\]; wanted"):
        jax.eval_shape(init, jax.random.key(0), *INPUTS)
