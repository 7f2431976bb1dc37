"""The backbone as a whole: size, grouping, masks, remat and scan, sharding, and what it refuses."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from skysense_jax import sharding
from skysense_jax.modalities import MODALITIES, Modality
from skysense_jax.models.backbone import Backbone, SeparateBackbones, group_modalities
from skysense_jax.models.layers import DropPath
from skysense_jax.models.skysense import make_backbone

ALL = tuple(MODALITIES.values())
CELLS = (2, 3)
IMAGES = {"hr": 1, "s2": 2, "s1": 1}
FIELDS = dict(width=16, depths=(1, 1, 3, 1), head_width=8, window=4, layer_scale_init=0.5, num_prompts=2)
MOE = dict(num_moe_blocks=3, num_experts=4, experts_per_token=2)  # stage 3: dense, mixture, mixture; stage 4: mixture
SENTINEL = ("s2", "s1")  # one graph, which compiles faster than two


def _shapes(modalities=ALL, cells=CELLS, batch=1, images=IMAGES):
    pixels, valid = {}, {}
    for m in modalities:
        lead, grid = (batch, images.get(m.name, 1)), tuple(side * m.tokens_per_cell for side in cells)
        pixels[m.name] = jax.ShapeDtypeStruct((*lead, *(side * m.patch for side in grid), m.num_bands), jnp.float32)
        valid[m.name] = jax.ShapeDtypeStruct((*lead, *grid), bool)
    return pixels, valid


def _inputs(names=SENTINEL, seed=0, batch=2):
    rng = np.random.default_rng(seed)
    pixels, valid = _shapes([MODALITIES[name] for name in names], batch=batch)
    pixels = {name: jnp.asarray(rng.normal(size=s.shape), jnp.float32) for name, s in pixels.items()}
    return pixels, {name: jnp.asarray(rng.random(s.shape) < 0.8) for name, s in valid.items()}


def _boxed(**fields):
    model = Backbone(ALL, **{**FIELDS, **fields})
    return jax.eval_shape(lambda i, v: model.init(jax.random.key(0), i, v, train=False), *_shapes())


@functools.cache
def _params(moe=True, merging="averaged"):
    """Parameters of all modalities, away from their small initial values."""
    rng = np.random.default_rng(0)
    draw = lambda s: jnp.asarray(rng.normal(size=s.shape, scale=0.2), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, sharding.unbox(_boxed(merging=merging, **(MOE if moe else {}))))


FAST_COMPILE = {"xla_backend_optimization_level": 0}  # here a graph compiles for longer than it runs


@functools.partial(jax.jit, static_argnames=("model", "train"), compiler_options=FAST_COMPILE)
def _apply(model, params, images, valid, train=False):
    return model.apply(params, images, valid, train=train, return_stages=True)


def _draws(valid):
    """Two uniform numbers a block for each image."""
    key, branches = jax.random.key(1), 2 * sum(FIELDS["depths"])
    return {name: jax.random.uniform(key, (*x.shape[:2], branches)) for name, x in valid.items()}


@functools.partial(jax.jit, static_argnames="model", compiler_options=FAST_COMPILE)
def _loss_and_gradient(model, params, images, valid):
    def loss(params):
        out = model.apply(params, images, valid, train=True, drop_draws=_draws(valid))
        total = sum(jnp.sin(3 * x).mean() for x in out.features.values())
        return total + 0.01 * (out.router.balance[0] + out.router.z[0])

    return jax.value_and_grad(loss)(params)


def _assert_trees_close(got, wanted, atol):
    jax.tree_util.tree_map_with_path(
        lambda path, a, b: np.testing.assert_allclose(a, b, atol=atol, err_msg=jax.tree_util.keystr(path)), got, wanted
    )


@pytest.mark.parametrize(
    ("name", "changes", "wanted"),
    [
        ("huge", {}, 654_827_938),
        ("huge", {"merging": "separate"}, 665_235_874),
        ("huge_moe", {}, 1_987_528_098),
    ],
)
def test_parameter_count_of_named_size_without_allocating(name, changes, wanted):
    fields = {**importlib.import_module(f"configs.{name}").get_config().model.backbone, **changes}
    model = make_backbone(ALL, **fields)
    boxed = jax.eval_shape(lambda i, v: model.init(jax.random.key(0), i, v, train=False), *_shapes())
    assert sum(leaf.size for leaf in jax.tree.leaves(sharding.unbox(boxed))) == wanted
    for leaf in jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned)):
        assert isinstance(leaf, nn.Partitioned)
        assert len(leaf.names) == leaf.value.ndim
        assert set(leaf.names) <= {*dict(sharding.LOGICAL_AXIS_RULES), None}


def test_backbone_without_prompts_has_no_empty_parameter():
    """Which no checkpoint would take."""
    leaves = jax.tree.leaves_with_path(sharding.unbox(_boxed(num_prompts=0)))
    assert all(leaf.size for _, leaf in leaves)
    assert not any("prompts" in jax.tree_util.keystr(path) for path, _ in leaves)


def test_group_modalities_by_grid_and_merging():
    grids = {"s1": (8, 8), "hr": (64, 64), "s2": (8, 8)}
    assert [[m.name for m in group] for group in group_modalities(ALL, grids)] == [["hr"], ["s2", "s1"]]
    apart = group_modalities(ALL, {"s1": (8, 8), "s2": (16, 16)})
    assert [[m.name for m in group] for group in apart] == [["s2"], ["s1"]]


def test_grouped_and_reordered_images_give_the_same_features_as_alone():
    model = Backbone(ALL, **FIELDS, **MOE, merging="separate")
    images, valid = _inputs()
    params = _params(merging="separate")
    together = _apply(model, params, images, valid)
    alone = _apply(model, params, {"s1": images["s1"]}, {"s1": valid["s1"]})
    np.testing.assert_allclose(alone.features["s1"], together.features["s1"], atol=1e-5)
    np.testing.assert_array_equal(alone.valid["s1"], together.valid["s1"])
    swap = lambda tree: {**tree, "s2": tree["s2"][:, ::-1]}  # noqa: E731
    swapped = _apply(model, params, swap(images), swap(valid))
    np.testing.assert_allclose(swapped.features["s2"][:, ::-1], together.features["s2"], atol=1e-5)
    np.testing.assert_allclose(swapped.features["s1"], together.features["s1"], atol=1e-5)


@pytest.mark.parametrize("train", [False, True])
def test_masked_tokens_and_absent_images_change_nothing(train):
    model = Backbone(ALL, **FIELDS, **MOE)
    images, valid = _inputs()
    valid["s1"] = jnp.zeros_like(valid["s1"])  # the whole modality is absent
    scrambled = {name: jnp.where(valid[name][..., None], x, jnp.nan) for name, x in images.items()}
    out = _apply(model, _params(), images, valid, train=train)
    changed = _apply(model, _params(), scrambled, valid, train=train)
    jax.tree.map(np.testing.assert_array_equal, out, changed)
    assert not out.valid["s1"].any()
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(out))
    if not train:  # in training the capacity counts the tokens of the shape
        without = _apply(model, _params(), {"s2": images["s2"]}, {"s2": valid["s2"]})
        np.testing.assert_allclose(without.features["s2"], out.features["s2"], atol=1e-5)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), without.router, out.router)


def test_merged_grid_is_valid_where_any_of_the_cell_is_and_masked_pixels_change_nothing():
    model = Backbone(ALL, **FIELDS)
    images, valid = _inputs(("hr",))
    per_cell, patch = ALL[0].tokens_per_cell, ALL[0].patch
    hole = valid["hr"].at[0, 0, :per_cell, per_cell : 2 * per_cell].set(False)
    out = _apply(model, _params(moe=False), images, {"hr": hole})
    wanted = np.asarray(hole).reshape(2, 1, CELLS[0], per_cell, CELLS[1], per_cell).any((3, 5))
    np.testing.assert_array_equal(out.valid["hr"], wanted)
    assert not wanted[0, 0, 0, 1]
    assert out.features["hr"].shape == (2, 1, *CELLS, 8 * FIELDS["width"])
    assert (out.features["hr"][~wanted] == 0).all()
    assert (out.stages["hr"][0][~hole] == 0).all()  # what the first merge reads
    seen = jnp.repeat(jnp.repeat(hole, patch, axis=2), patch, axis=3)[..., None]
    changed = _apply(model, _params(moe=False), {"hr": jnp.where(seen, images["hr"], 99.0)}, {"hr": hole})
    np.testing.assert_array_equal(changed.features["hr"], out.features["hr"])


DROPPING = Backbone(ALL, **FIELDS, **MOE, drop_path=0.5)


def test_remat_and_scan_unroll_do_not_change_values_or_gradients():
    images, valid = _inputs(batch=4)
    value, gradient = _loss_and_gradient(DROPPING, _params(), images, valid)
    for changes in (dict(remat="blocks", scan_unroll=2), dict(remat="matmuls")):
        other = _loss_and_gradient(DROPPING.clone(**changes), _params(), images, valid)
        _assert_trees_close(other, (value, gradient), atol=2e-6)
    assert jax.tree.structure(gradient) == jax.tree.structure(_params())
    assert jnp.abs(gradient["params"]["tokenizer_s2"]["projection"]["kernel"]).max() > 1e-3
    seen = {name: jnp.abs(gradient["params"][f"stage4_{name}_prompts"]).max() > 0 for name in ("hr", "s2", "s1")}
    assert seen == {"hr": False, "s2": True, "s1": True}
    # nothing seen: zero, and finite gradients
    value, gradient = _loss_and_gradient(DROPPING, _params(), images, jax.tree.map(jnp.zeros_like, valid))
    assert value == 0
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("attention", "again"),
    [
        ("mosaic interpreted", (0, 0, 0, 2)),  # stages with mixtures: the sum over a token's experts
        ("xla", (0, 0, 0, 7)),  # the same, and scores of two window blocks and of three stacks of global ones
        ("cudnn", (0, 0, 0, 4)),
    ],
)
def test_remat_matmuls_multiplies_with_no_parameter_again(attention, again, monkeypatch):
    """What stands in the gradient's program more often than without recomputation: kernels, and products of XLA."""
    cudnn = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")  # which looks for the library
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 92000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    inside = "xla" if attention == "cudnn" else attention
    fields = FIELDS | MOE | dict(width=32, head_width=32, window=8, attention=attention, window_attention=inside)
    images, valid = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), _shapes((MODALITIES["s1"],), cells=(16, 16)))
    dtype = jnp.bfloat16 if attention == "cudnn" else jnp.float32

    def count(remat):
        model = Backbone((MODALITIES["s1"],), **fields, remat=remat, compute_dtype=dtype)
        params = jax.eval_shape(lambda: model.init(jax.random.key(0), images, valid, train=True))
        loss = lambda params: model.apply(params, images, valid, train=True).features["s1"].sum()  # noqa: E731
        text = str(jax.make_jaxpr(jax.grad(loss))(params))
        kernels = "full_attention_forward", "window_attention_forward", "dot_product_attention_fwd_wrapper["
        return np.asarray([text.count(name) for name in (*kernels, "dot_general")])

    none, matmuls, blocks = map(count, ("none", "matmuls", "blocks"))
    np.testing.assert_array_equal(matmuls - none, again)
    assert (blocks - none).sum() > 3 * sum(again)


def test_sharded_over_eight_devices_equals_one_and_is_constrained():
    images, valid = _inputs(batch=4)
    wanted = _loss_and_gradient(DROPPING, _params(), images, valid)
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2, expert=2)
    with jax.set_mesh(mesh):
        params = jax.device_put(_params(), sharding.tree_shardings(_boxed(**MOE), mesh))
        batch = jax.device_put((images, valid), sharding.batch_sharding(mesh))
        lowered = _loss_and_gradient.lower(DROPPING, params, *batch)
        got = lowered.compile()(params, *batch)
    assert lowered.as_text().count("sharding_constraint") > 20
    experts = params["params"]["stage4_experts"]["experts"]["hidden_kernel"]
    assert experts.sharding.spec == jax.sharding.PartitionSpec(None, "expert", "fsdp", "tensor")
    _assert_trees_close(jax.device_get(got), jax.device_get(wanted), atol=1e-5)


def test_bfloat16_compute_stays_near_float32_with_float32_router():
    images, valid = _inputs()
    model = Backbone(ALL, **FIELDS, compute_dtype=jnp.bfloat16)
    wanted = _apply(Backbone(ALL, **FIELDS), _params(moe=False), images, valid)
    got = _apply(model, _params(moe=False), images, valid)
    for name, x in got.features.items():
        assert x.dtype == jnp.bfloat16
        difference = np.asarray(x, np.float32) - np.asarray(wanted.features[name])
        assert np.sqrt(np.mean(difference**2) / np.mean(np.asarray(wanted.features[name]) ** 2)) < 0.05
    moe = Backbone(ALL, **FIELDS, **MOE, compute_dtype=jnp.bfloat16)
    router = jax.eval_shape(lambda p: moe.apply(p, images, valid, train=True), _params()).router
    assert {leaf.dtype for leaf in jax.tree.leaves(router)} == {jnp.dtype("float32")}
    assert router.load.shape == (3, 4)


def test_new_sensor_row_runs_and_stages_have_their_grids():
    fields = {field.name: getattr(MODALITIES["hr"], field.name) for field in dataclasses.fields(Modality)}
    changes = dict(
        name="rgbn", bands=("R", "G", "B", "N"), pixels_per_cell=8, mean=(1,) * 4, std=(1,) * 4, codec="zstd"
    )
    rgbn = Modality(**{**fields, **changes})  # 1.25 m: tokens of half a cell, which merge into stage 4 only
    assert rgbn.merges_at == (False, False, True)
    model = Backbone((*ALL, rgbn), **FIELDS)
    run = lambda i, v: model.init_with_output(jax.random.key(0), i, v, train=False, return_stages=True)[0]  # noqa: E731
    out = jax.eval_shape(run, *_shapes((MODALITIES["s1"], rgbn)))
    grids = {name: [x.shape[2:] for x in stages] for name, stages in out.stages.items()}
    assert grids["rgbn"] == [(4, 6, 16), (4, 6, 32), (4, 6, 64), (2, 3, 128)]
    assert grids["s1"] == [(2, 3, 16), (2, 3, 32), (2, 3, 64), (2, 3, 128)]


def test_drop_path_is_per_image_and_keeps_the_mean():
    x = jnp.ones((40, 50, 3))
    y = DropPath(0.25, jax.random.uniform(jax.random.key(0), (40, 50, 2)))(1, x)
    assert (y == y[:, :, :1]).all()
    assert set(np.unique(y).round(4)) == {0.0, np.float32(1.3333)}
    assert abs(y.mean() - 1) < 0.04


def test_bad_images_are_refused():
    model = Backbone(ALL, **FIELDS, **MOE)
    run = lambda i, v: jax.eval_shape(lambda p: model.apply(p, i, v, train=False), _params())  # noqa: E731
    images, valid = _inputs(("hr", "s2", "s1"))
    with pytest.raises(ValueError, match=r"images of 's2'.*'B12'"):
        run({"s2": images["s2"][..., :9]}, {"s2": valid["s2"]})
    with pytest.raises(ValueError, match="images of 'hr'"):
        run({"hr": images["hr"][:, :, :-4]}, {"hr": valid["hr"]})
    with pytest.raises(ValueError, match="lidar"):
        run({"lidar": images["s1"]}, {"lidar": valid["s1"]})


def _drawn(model, images, valid):
    """Random parameters of a network, away from their small initial values."""
    rng = np.random.default_rng(5)
    boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), images, valid, train=False))
    draw = lambda s: jnp.asarray(rng.normal(size=s.shape, scale=0.2), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, sharding.unbox(boxed))


def test_backbones_of_their_own_are_one_backbone_for_each_modality():
    rows = tuple(MODALITIES[name] for name in SENTINEL)
    fields = {**FIELDS, "num_moe_blocks": 2, "num_experts": 2, "drop_path": 0.3}
    apart = SeparateBackbones(rows, tuple(fields.items()))
    images, valid = _inputs()
    params = _drawn(apart, images, valid)
    assert set(params["params"]) == {"modality_s1", "modality_s2"}
    assert (apart.drop_path, apart.depths) == (0.3, FIELDS["depths"])
    draws = _draws(valid)
    run = jax.jit(
        lambda model, params, *of: model.apply(params, *of[:2], train=True, drop_draws=of[2], return_stages=True),
        static_argnums=0,
        compiler_options=FAST_COMPILE,
    )
    together = run(apart, params, images, valid, draws)
    loads = []
    for row in rows:
        one = lambda tree, name=row.name: {name: tree[name]}  # noqa: E731
        of_one = {"params": params["params"][f"modality_{row.name}"]}
        alone = run(Backbone((row,), **fields), of_one, one(images), one(valid), one(draws))
        np.testing.assert_allclose(together.features[row.name], alone.features[row.name], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(together.valid[row.name], alone.valid[row.name])
        np.testing.assert_allclose(together.stages[row.name][2], alone.stages[row.name][2], rtol=1e-4, atol=1e-5)
        loads.append(alone.router.load)
    np.testing.assert_allclose(together.router.load, np.concatenate(loads), rtol=1e-5)
    with pytest.raises(ValueError, match="wanted both of the same, one or more of"):
        apart.apply(params, {"hr": images["s2"]}, {"hr": valid["s2"]}, train=False)


def test_mixtures_from_the_start_stand_before_the_dense_blocks_of_their_stage():
    """Stage 3 of a dense block and a mixture: with the dense one switched off, the order is all the same."""
    depths = (1, 1, 2, 1)
    of = lambda **more: Backbone(ALL, **{**FIELDS, **MOE, "depths": depths, **more})  # noqa: E731
    first, last = of(num_moe_blocks=1, moe_from="start"), of(num_moe_blocks=2)
    images, valid = _inputs()
    ours, theirs = (_drawn(model, images, valid)["params"] for model in (first, last))
    assert {"stage3_experts", "stage3", "stage4"} <= set(ours)
    assert "stage4_experts" not in ours
    theirs = {**theirs, **{name: leaf for name, leaf in ours.items() if name in theirs}}

    def behind_stage3(switched_off):
        outs = []
        for model, params in ((first, ours), (last, theirs)):
            dense = dict(params["stage3"])
            if switched_off:
                dense |= {name: jnp.zeros_like(x) for name, x in dense.items() if name.endswith("layer_scale")}
            out = _apply(model, {"params": {**params, "stage3": dense}}, images, valid)
            outs.append(np.concatenate([np.ravel(out.stages[name][2]) for name in SENTINEL]))
        return outs

    np.testing.assert_allclose(*behind_stage3(True), rtol=1e-5, atol=1e-5)
    ours_on, theirs_on = behind_stage3(False)
    assert np.abs(ours_on - theirs_on).max() > 0.01
