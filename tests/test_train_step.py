"""The whole step on the micro config: meshes agree, masks hold, numbers that are not finite do no harm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from micro import Compiled, micro_config, mono_config

from skysense_jax import feed, sharding, train, train_state
from skysense_jax.batch import Batch


@pytest.fixture(scope="module")
def element():
    return next(iter(train.make_pipeline(micro_config())))


@pytest.fixture(scope="module")
def sharded():
    config = micro_config()
    config.mesh.update(data=2, fsdp=2, expert=2)
    return Compiled(config, jax.devices())


@pytest.fixture(scope="module")
def first(sharded, element):
    """State and metrics after one step on 8 devices."""
    return sharded(sharded.fresh, element)


def _moments(state):
    """Adam's first moments by path."""
    adam = next(part for part in state.optimizer if hasattr(part, "mu"))
    return _leaves(adam.mu)


def _leaves(tree):
    return dict(jax.tree_util.tree_leaves_with_path(jax.device_get(tree)))


def test_one_device_other_remat_and_unroll_equal_eight_devices(first, element):
    config = micro_config()
    config.mesh.update(data=1, fsdp=1)
    config.efficiency.update(remat="blocks", scan_unroll=2)
    alone = Compiled(config, jax.devices()[:1])
    state, metrics = alone(alone.fresh, element)
    for name, value in first[1].items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    # After one step from zero, Adam's first moment is the clipped gradient times 1 - beta1.
    ours, theirs = _moments(state), _moments(first[0])
    assert ours.keys() == theirs.keys()
    for path, value in theirs.items():
        largest = float(np.abs(value).max())
        np.testing.assert_allclose(
            ours[path], value, rtol=0, atol=1e-5 * largest + 1e-7, err_msg=jax.tree_util.keystr(path)
        )


def test_step_reports_every_term_and_updates_both_sides(first, sharded):
    state, metrics = first
    config = sharded.config
    total = sum(weight * metrics[f"loss/{term}"] for term, weight in config.objective.weights.items() if weight)
    assert metrics["loss"] == pytest.approx(total, rel=1e-5)
    assert all(np.isfinite(value) for value in metrics.values())
    before, after, teacher = (_leaves(t) for t in (sharded.fresh.student, state.student, state.teacher))
    frozen = [path for path in before if "prototypes" in jax.tree_util.keystr(path)]
    assert len(frozen) == 7
    assert sum(metrics[f"experts/load_block0_expert{e}"] for e in range(2)) == pytest.approx(1)
    largest = max(metrics[f"experts/load_block0_expert{e}"] for e in range(2))
    assert metrics["experts/skew_block0"] == pytest.approx(2 * largest, rel=1e-6)
    assert 0 <= metrics["experts/dropped"] < 1
    momentum = metrics["ema_momentum"]
    for path, old in before.items():
        new = after[path]
        if path in frozen:
            np.testing.assert_array_equal(new, old)
        np.testing.assert_allclose(teacher[path], momentum * old + (1 - momentum) * new, rtol=1e-6, atol=1e-7)
    moved = [path for path in before if not np.array_equal(before[path], after[path])]
    assert len(moved) >= len(before) - len(frozen) - 2  # a day or modality that no sample has may stand still


def test_step_is_compiled_once_for_every_seed(first, sharded, element):
    # a first step was made: now from a fresh state, from a state as the step leaves it, and with another seed
    before, state = sharded.step._cache_size(), sharded.fresh
    with jax.set_mesh(sharded.mesh):
        batch = feed.to_device(element, sharded.mesh)
        state, again = sharded.step(state, batch, sharded.run.seed, None)
        sharded.step(state, batch, sharded.run.seed, None)
        _, metrics = sharded.step(sharded.fresh, batch, train_state.as_argument(2**32 + 1), None)
    assert sharded.step._cache_size() == before == 1
    assert float(again["loss"]) == first[1]["loss"]
    assert float(metrics["loss"]) != first[1]["loss"]  # other photometric changes, drop path and positions


def test_bfloat16_step_is_near_fp32_and_keeps_fp32_state(first, element):
    config = micro_config()
    config.mesh.update(data=1, fsdp=1)
    config.model.compute_dtype = "bfloat16"
    half = Compiled(config, jax.devices()[:1])
    state, metrics = half(half.fresh, element)
    for name in ("loss", *(f"loss/{term}" for term in ("mgcl", "qsacl", "text_alignment", "koleo"))):
        assert metrics[name] == pytest.approx(first[1][name], rel=0.03, abs=0.03), name
    assert metrics["nonfinite_total"] == 0
    assert all(x.dtype in (np.float32, np.int32) for x in _leaves(state).values())
    assert any(not np.array_equal(x, _leaves(first[0])[path]) for path, x in _leaves(state).items())


@pytest.mark.parametrize(
    ("fields", "gone"),
    [
        ({"weights.mgcl": 0.0}, "loss/mgcl"),
        ({"weights.qsacl": 0.0}, "loss/qsacl"),
        ({"weights.text_alignment": 0.0}, "loss/text_alignment"),
        ({"mgcl.pixel_weight": 0.0, "mgcl.image_weight": 0.0}, "mgcl/fused_pixel"),
    ],
)
def test_step_without_a_term_does_not_report_it(fields, gone):
    config = mono_config()
    config.mesh.update(data=1, fsdp=1)
    for field, value in fields.items():
        section, name = field.split(".")
        config.objective[section][name] = value
    without = Compiled(config, jax.devices()[:1])
    with jax.set_mesh(without.mesh):
        state = train_state.boxed_state(without.run.network, without.run.optimizer, without.shapes)
        _, metrics = jax.eval_shape(without.run.step, sharding.unbox(state), without.shapes, without.run.seed)
    assert "loss" in metrics
    assert gone not in metrics


def test_parameters_lie_sharded_over_the_mesh(sharded):
    whole = sharded.fresh
    dense = whole.student["backbone"]["stage3"]["mlp"]["hidden"]["kernel"]
    experts = whole.student["backbone"]["stage4_experts"]["experts"]["hidden_kernel"]
    assert dense.addressable_shards[0].data.size * 2 == dense.size
    assert experts.addressable_shards[0].data.size * 4 == experts.size
    assert whole.teacher["backbone"]["stage4_experts"]["experts"]["hidden_kernel"].sharding == experts.sharding


def test_lowered_step_contains_sharding_constraints(sharded, element):
    assert sharded.lowered_text(element).count("sharding_constraint") > 20


def _changed(element, change):
    """A copy of a host batch, every view group passed through ``change``."""
    views = {name: change(dict(element[name])) for name in ("global_views", "local_views")}
    return {**element, **views}


def test_all_masked_batch_gives_zero_losses(sharded, element):
    def mask(views):
        blank = lambda tree: {name: np.zeros_like(x) for name, x in tree.items()}  # noqa: E731
        return views | dict(token_valid=blank(views["token_valid"]), cell_usable=blank(views["cell_usable"]))

    state, metrics = sharded(sharded.fresh, _changed(element, mask))
    assert metrics["loss"] == 0
    assert metrics["gradient_norm"] == 0
    assert metrics["nonfinite_total"] == 0
    assert all(np.isfinite(x).all() for x in _leaves(state).values())


def test_masked_values_change_nothing(sharded, element, first):
    """What lies in invalid tokens and in absent dates, days included, must not reach the loss."""
    rng = np.random.default_rng(0)
    element = jax.tree.map(np.copy, element)
    for name, present in element["present"].items():
        present[::2, -1] = False  # s1 has a date left, hr none
        for views in (element["global_views"], element["local_views"]):
            tokens = views["token_valid"][name].shape[-1] // views["cell_usable"][name].shape[-1]
            views["token_valid"][name][:, ::2, :, :tokens] = False  # the first row of cells of every other view
            views["cell_usable"][name][:, ::2, :, :1] = False

    def noise(views):
        images = {}
        for name, image in views["images"].items():
            shown = views["token_valid"][name] & element["present"][name][:, None, :, None, None]
            patch = image.shape[3] // shown.shape[3]
            shown = shown.repeat(patch, axis=3).repeat(patch, axis=4)[..., None]
            rubbish = rng.integers(0, 256, image.shape) if name == "hr" else rng.normal(-12, 5, image.shape)
            images[name] = np.where(shown, image, rubbish.astype(image.dtype))
        return views | dict(images=images)

    days = {
        name: np.where(element["present"][name], day, rng.integers(1, 366, day.shape, np.int32))
        for name, day in element["day_of_year"].items()
    }
    _, plain = sharded(sharded.fresh, element)
    _, noisy = sharded(sharded.fresh, _changed(element, noise) | dict(day_of_year=days))
    for name, value in plain.items():
        np.testing.assert_allclose(noisy[name], value, rtol=1e-6, atol=1e-7, err_msg=name)
    assert plain["loss"] != first[1]["loss"]  # what was hidden does matter where it is there


def test_nonfinite_gradient_skips_the_update_and_counts(sharded, element):
    def poison(views):
        images = dict(views["images"])
        images["s1"] = np.full_like(images["s1"], np.nan)
        return views | dict(images=images)

    start = sharded.fresh
    state, metrics = sharded(start, _changed(element, poison))
    assert not np.isfinite(metrics["gradient_norm"])
    assert (metrics["nonfinite_in_row"], metrics["nonfinite_total"]) == (1, 1)
    for part in ("student", "teacher", "optimizer"):
        before, after = _leaves(getattr(start, part)), _leaves(getattr(state, part))
        for path, value in before.items():
            np.testing.assert_array_equal(after[path], value)
    assert state.step == 1
    state, metrics = sharded(jax.device_put(state, jax.tree.map(lambda x: x.sharding, start)), element)
    assert (metrics["nonfinite_in_row"], metrics["nonfinite_total"]) == (0, 1)


def test_absent_modality_equals_one_that_was_never_there(sharded, element):
    run, params = sharded.run, jax.tree.map(jnp.asarray, jax.device_get(sharded.fresh.student))
    batch = Batch.from_dict(jax.tree.map(jnp.asarray, element))
    views = batch.global_views

    def fused(images, present):
        return run.network.apply(
            {"params": params},
            images,
            views,
            present=present,
            day_of_year=batch.day_of_year,
            train=False,
            method="encode",
        ).fused

    images = {name: x.astype(jnp.float32) / 100 for name, x in views.images.items()}
    absent = {**batch.present, "s1": jnp.zeros_like(batch.present["s1"])}
    masked = jax.jit(fused)(images, absent)
    never = jax.jit(fused)({"hr": images["hr"]}, absent)
    with_it = jax.jit(fused)(images, batch.present)
    np.testing.assert_allclose(masked, never, atol=1e-5)
    assert float(jnp.abs(with_it - never).max()) > 1e-2
