"""The rate that every parameter really moves at, read from the optimizer's first update, name by name."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from micro import mono_config

from skysense_jax import assembly, sharding
from skysense_jax.tasks import layer_rates
from skysense_jax.trees import named_leaves

DEPTHS, FUSION_DEPTH, DECAY = (1, 2, 3, 2), 2, 0.5


@pytest.fixture(scope="module")
def params():
    """Backbone with a mixture in the last block of stage 3 and both of stage 4, fusion, a head of two parameters."""
    config = mono_config()
    config.model.backbone.update(depths=DEPTHS, num_moe_blocks=3)
    run = assembly.assemble(config)
    shapes = assembly.batch_shapes(config, run.modalities)
    boxed = jax.eval_shape(lambda batch: run.network.init(jax.random.key(0), batch, train=False), shapes)["params"]
    shapes = {part: sharding.unbox(boxed)[part] for part in ("backbone", "fusion")}
    shapes["head"] = {"fuse": {"conv": {"kernel": jnp.zeros((3, 3, 2, 2))}, "norm": {"scale": jnp.zeros(2)}}}
    return jax.tree.map(lambda s: np.full(s.shape, 2.0, np.float32), shapes)


@pytest.fixture(scope="module")
def updates(params):
    """By weight decay, the first update of gradients of one, by name; in one program, as eager ones take minutes."""

    def first(params, weight_decay):
        optimizer = layer_rates.make_optimizer(
            params,
            learning_rate=lambda step: 0.1,
            weight_decay=weight_decay,
            clip_norm=1e9,
            depths=DEPTHS,
            fusion_depth=FUSION_DEPTH,
            layer_decay=DECAY,
        )
        ones = jax.tree.map(jnp.ones_like, params)
        return named_leaves(optimizer.update(ones, optimizer.init(params), params)[0])

    return jax.device_get(jax.jit(lambda params: {decay: first(params, decay) for decay in (0.0, 0.3)})(params))


# (pattern, layer of each block along the first axis, or of all): written down by hand for DEPTHS
LAYERS = (
    (r"backbone/tokenizer_", [0]),
    (r"backbone/stage[34]_\w+_prompts", [0]),
    (r"backbone/stage1_0/", [1]),
    (r"backbone/merging_2/", [1]),
    (r"backbone/stage2_0/", [2]),
    (r"backbone/stage2_1/", [3]),
    (r"backbone/merging_3/", [3]),
    (r"backbone/stage3/", [4, 5]),
    (r"backbone/stage3_experts/", [6]),
    (r"backbone/merging_4/", [6]),
    (r"backbone/stage4_experts/", [7, 8]),
    (r"fusion/(project|class_token|day_embedding|modality_embedding)", [8]),
    (r"fusion/blocks/", [9, 10]),
    (r"fusion/norm/", [10]),
    (r"head/", [11]),
)


def test_every_parameter_moves_at_the_rate_of_its_layer(updates):
    used = set()
    for path, update in updates[0.0].items():
        ((pattern, layers),) = ((p, layers) for p, layers in LAYERS if re.match(p, path))
        used.add(pattern)
        rates = -np.asarray(update).reshape(len(layers) if len(layers) > 1 else 1, -1)
        for rate, layer in zip(rates, layers):
            np.testing.assert_allclose(rate, 0.1 * DECAY ** (11 - layer), rtol=1e-5, err_msg=path)
    assert used == {pattern for pattern, _ in LAYERS}


def test_without_fusion_the_head_is_one_above_the_last_stage(params):
    used = {part: params[part] for part in ("backbone", "head")}
    found = layer_rates.layer_scales(used, depths=DEPTHS, fusion_depth=0, decay=DECAY)
    last = next(path for path in found if path.startswith("backbone/stage4_experts"))
    assert found[last].ravel().tolist() == [DECAY**2, DECAY]
    assert found["head/fuse/conv/kernel"] == 1


def test_decay_goes_by_name_and_by_the_layers_rate(updates):
    plain, decayed = updates.values()
    for path, update in decayed.items():
        of_matrix = path.endswith(("kernel", "router")) and "position_bias" not in path
        wanted = np.asarray(plain[path]) * (1 + 0.3 * 2.0 if of_matrix else 1)
        np.testing.assert_allclose(update, wanted, rtol=1e-5, err_msg=path)


def test_an_unknown_parameter_is_an_error():
    with pytest.raises(ValueError, match=r"'backbone/new/kernel': no rule says which layer"):
        layer_rates.layer_scales(
            {"backbone": {"new": {"kernel": jnp.zeros((2, 2))}}}, depths=DEPTHS, fusion_depth=0, decay=0.9
        )
