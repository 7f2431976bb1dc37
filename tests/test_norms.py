"""Norms by layer against numpy, against the step's own gradient, and against what a weight does to a term."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from micro import Compiled
from nano import get_config

from skysense_jax import assembly, feed, norms, sharding, train, train_state
from skysense_jax.sharding import LAYERS


def test_layers_are_told_apart_also_where_a_scan_stacks_them():
    rng = np.random.default_rng(0)
    stacked, other, alone = (rng.normal(size=shape) for shape in ((3, 4, 5), (3, 7), (6,)))
    tree = {"net": {"stage3": {"a": {"kernel": stacked}, "bias": other}, "norm": {"scale": alone}}}
    boxes = {"net": {"stage3": {"a": {"kernel": _box(LAYERS, None, None)}, "bias": _box(LAYERS, None)}}}
    boxes["net"]["norm"] = {"scale": jax.ShapeDtypeStruct((6,), jnp.float32)}
    found = norms.layer_norms(tree, boxes)
    wanted = {f"net/stage3/{i}": np.sqrt((stacked[i] ** 2).sum() + (other[i] ** 2).sum()) for i in range(3)} | {
        "net/norm": np.linalg.norm(alone)
    }
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name


def _box(*names):
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct((1,) * len(names), jnp.float32), names)


def test_norms_of_a_step_are_those_of_its_gradient_and_of_its_terms():
    config = get_config()
    config.model.backbone.update(num_moe_blocks=1, num_experts=2)
    config.objective.weights.update(text_alignment=0.5, balance=1.0, router_z=1.0)
    config.parts.microbatches = 2
    compiled = Compiled(config, jax.devices())
    element, state = next(iter(train.make_pipeline(config))), compiled.fresh
    _, metrics = compiled(state, element)
    with jax.set_mesh(compiled.mesh):
        boxed = train_state.boxed_state(compiled.run.network, compiled.run.optimizer, compiled.shapes).student
        looked = jax.jit(lambda *of: compiled.run.norms(boxed, *of))(
            state, feed.to_device(element, compiled.mesh), compiled.run.seed
        )
    norms_of = looked["gradient"]
    assert set(norms_of) == {"mgcl", "text_alignment", "balance", "router_z", "loss"}
    total = {term: np.sqrt(sum(float(x) ** 2 for x in of.values())) for term, of in norms_of.items()}
    assert total["loss"] == pytest.approx(metrics["gradient_norm"], rel=1e-5)
    alone = sum(norm for term, norm in total.items() if term != "loss")
    assert 2 * max(norm for term, norm in total.items() if term != "loss") - alone < total["loss"] < alone
    text = norms_of["text_alignment"]
    assert text["backbone/stage1_0"] > 0
    heads = [layer for layer in text if layer.startswith("heads_")]
    assert len(heads) > 2
    assert not any(text[layer] for layer in heads)  # prototypes are MGCL's
    for term in ("balance", "router_z"):  # a router is asked behind the first three stages, and before all else
        found = {layer for layer, norm in norms_of[term].items() if norm > 0}
        assert {"backbone/stage1_0", "backbone/stage3/0"} <= found
        assert all(layer.startswith("backbone/") for layer in found)
    students = state.student["backbone"]["stage3"]
    of_first = np.sqrt(sum(float(np.square(np.asarray(leaf)[0]).sum()) for leaf in jax.tree.leaves(students)))
    assert looked["parameters"]["backbone/stage3/0"] == pytest.approx(of_first, rel=1e-5)


def test_network_without_experts_has_no_term_of_routers():
    config = get_config()
    assert config.objective.weights.balance > 0
    run = assembly.assemble(config)
    shapes = assembly.batch_shapes(config, run.modalities)
    with jax.set_mesh(sharding.make_mesh(**config.mesh)):
        boxed = train_state.boxed_state(run.network, run.optimizer, shapes)
        looked = jax.eval_shape(functools.partial(run.norms, boxed.student), sharding.unbox(boxed), shapes, run.seed)
    assert set(looked["gradient"]) == {"mgcl", "loss"}
