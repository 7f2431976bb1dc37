"""The cost formulas against the compiler's count of a small unrolled network and against the spec's figures."""

import jax
import jax.numpy as jnp
import pytest

from configs import huge, tiny
from skysense_jax import cost, modalities
from skysense_jax.models.skysense import make_backbone

ROWS = modalities.select(("hr", "s2", "s1"))


def test_huge_costs_what_the_method_states():
    config = huge.get_config().to_dict()
    parts = {part: config["model"][part] for part in ("backbone", "fusion", "queries")}
    view = cost.view_cost(ROWS, 16, num_dates=config["data"]["num_dates"], **parts)
    local = cost.view_cost(ROWS, 8, num_dates=config["data"]["num_dates"], **parts)
    assert view.image_flops["hr"] == pytest.approx(1.28e12, rel=0.04)
    assert view.image_flops["s2"] == pytest.approx(0.32e12, rel=0.07)
    assert view.fusion_flops == pytest.approx(2.2e12, rel=0.02)
    step = cost.step_flops(
        view, local, views=config["data"]["views"], num_dates=config["data"]["num_dates"], teacher_local=True
    )
    assert step == pytest.approx(88e12, rel=0.05)


def test_batch_costs_its_samples_and_more_where_the_teacher_sees_local_views():
    config = tiny.get_config().to_dict()
    sections = dict(data=config["data"], model=config["model"])
    whole = cost.batch_flops(ROWS, **sections, teacher_local=True)
    assert whole == pytest.approx(4 * 4.3e9, rel=0.02)  # of batch 4; configs/tiny.py states 4.3 GFLOP a sample
    assert cost.batch_flops(ROWS, **sections, teacher_local=False) < whole
    config["data"]["batch_size"] = 12
    assert cost.batch_flops(ROWS, **sections, teacher_local=True) == 3 * whole


@pytest.mark.parametrize("name", ["hr", "s2"])
def test_backbone_formula_matches_the_compiler(name):
    fields = dict(tiny.get_config().model.backbone)
    row = modalities.MODALITIES[name]
    network = make_backbone((row,), **fields, scan_unroll=2)  # unrolled: a scan body would be counted once
    side, cells = 8 * row.tokens_per_cell, 8
    images = {
        name: jax.ShapeDtypeStruct(
            (1, 1, cells * row.pixels_per_cell, cells * row.pixels_per_cell, row.num_bands), jnp.float32
        )
    }
    valid = {name: jax.ShapeDtypeStruct((1, 1, side, side), bool)}
    params = jax.eval_shape(lambda i, v: network.init(jax.random.key(0), i, v, train=False), images, valid)
    lowered = jax.jit(lambda p, i, v: network.apply(p, i, v, train=False).features).lower(params, images, valid)
    counted = lowered.cost_analysis()["flops"]
    formula = cost.backbone_flops(row, cells, **{name: fields[name] for name in cost.COSTLY})
    assert formula < counted < 1.35 * formula  # the compiler also counts norms, softmax and GELU


def test_moe_depths_are_the_last_blocks():
    assert cost.moe_depths((2, 2, 18, 2), 6) == (0, 0, 4, 2)
    assert cost.moe_depths((1, 1, 2, 1), 2) == (0, 0, 1, 1)


def test_top_k_adds_active_experts_only():
    fields = dict(width=32, depths=(1, 1, 1, 1), window=8, mlp_ratio=4, num_prompts=0, num_moe_blocks=1)
    one, two = (cost.backbone_flops(ROWS[1], 4, **fields, experts_per_token=k) for k in (1, 2))
    assert two - one == 16 * 4 * 4 * 256**2  # tokens x (two matrices of ratio 4) x width squared
