"""Fine-tuning end to end on a small network and procedural scenes: it learns, it repeats, it keeps what is frozen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from micro import mono_config

from skysense_jax import assembly, sharding
from skysense_jax.data import scenes
from skysense_jax.eval import scores
from skysense_jax.eval.features import placed
from skysense_jax.tasks import finetune, forward, frozen, windows
from skysense_jax.tasks.decoders import LinearHead
from skysense_jax.tasks.examples import CHANGE, IGNORED, MULTI_LABEL, SCENE, SEGMENTATION, Example, Examples, Lazy
from skysense_jax.tasks.finetune import Options
from skysense_jax.tasks.loading import Model
from skysense_jax.trees import named_leaves, path_string

QUICK = Options(
    num_steps=2, batch_size=2, warmup_steps=1, learning_rate=3e-3, decoder_width=8, layer_decay=0.8, drop_path=0.0
)


@pytest.fixture(scope="module")
def model():
    """Fresh weights; one modality of two dates, windows of 4 cells."""
    config = mono_config()
    config.model.backbone.num_moe_blocks = 0  # compiles faster; the way of experts is that of evaluation
    run = assembly.assemble(config)
    shapes = assembly.batch_shapes(config, run.modalities)
    boxed = jax.eval_shape(lambda batch: run.network.init(jax.random.key(0), batch, train=False), shapes)["params"]
    rng = np.random.default_rng(0)

    def draw(path, leaf):  # as wide as an initialiser draws, which would have to be compiled
        name = path_string(path).split("/")[-1]
        if name in ("scale", "logit_scale"):
            return jnp.ones(leaf.shape)
        width = leaf.shape[-2] ** -0.5 if name == "kernel" else 0.1
        return jnp.asarray(width * rng.standard_normal(leaf.shape), jnp.float32)

    params = jax.tree_util.tree_map_with_path(draw, sharding.unbox(boxed))
    return Model(
        network=run.network,
        params={part: params[part] for part in ("backbone", "fusion")},
        rows=run.modalities,
        labels=run.labels,
        cells=4,
        num_dates=dict(config.data.num_dates),
        config=config,
        name="fresh",
    )


def _scene(index, extent):
    return scenes.render(index, seed=5, extent_cells=extent, modalities=("s1",), complete=True).sample


def _brighter(sample, where):
    """The sample, radar bright where a mask of its cells says so."""
    series = sample.series["s1"]
    images = np.where(where[None, :, :, None], np.float32(5), series.images).astype(series.images.dtype)
    return dataclasses.replace(sample, series={"s1": dataclasses.replace(series, images=images)})


def _examples(kind, count=4, extent=6):
    """Of a bright part of each scene: where it is, whether there is any, that it was not there before."""
    made = []
    for i in range(count):
        rng, plain = np.random.default_rng(i), _scene(i, extent)
        where = np.zeros((extent, extent), bool)
        if kind in (SEGMENTATION, CHANGE) or i % 2:
            row, column = rng.integers(0, 3, 2)
            where[row : row + 3, column : column + 4] = True
        target = where.repeat(2, 0).repeat(2, 1).astype(np.uint8)
        target[0, :3] = IGNORED
        bright = _brighter(plain, where)
        made.append(
            {
                SEGMENTATION: lambda: Example(f"e{i}", bright, None, target),
                CHANGE: lambda: Example(f"e{i}", plain, bright, target),
                SCENE: lambda: Example(f"e{i}", bright, None, np.array(i % 2)),
                MULTI_LABEL: lambda: Example(f"e{i}", bright, None, np.array([i % 2, 1, 1 - i % 2], bool)),
            }[kind]()
        )
    return Examples(made, ("bright", "any", "dark") if kind == MULTI_LABEL else ("dark", "bright"), kind)


def _leaves(tree):
    return named_leaves(jax.device_get(tree))


@pytest.fixture(scope="module")
def segmented(model):
    examples = _examples(SEGMENTATION)
    before = _leaves(model.params)
    options = dataclasses.replace(QUICK, num_steps=60, batch_size=4, warmup_steps=5)
    result = finetune.tune(model, examples, examples, task=SEGMENTATION, options=options)
    for path, leaf in _leaves(model.params).items():
        np.testing.assert_array_equal(leaf, before[path], err_msg=path)
    return examples, result


def test_segmentation_learns_a_handful_of_scenes(segmented):
    examples, result = segmented
    assert result.losses.shape == (60,)
    assert result.losses[-6:].mean() < 0.4 * result.losses[0]
    found, constant = finetune.evaluate(result, examples), []
    for said in (0, 1):
        confusion = scores.Confusion(2)
        for example in examples:
            confusion.add(example.target, np.full(example.target.shape, said))
        constant.append(confusion.scores().miou)
    assert found["miou"] > max(constant) + 0.2
    assert set(found) == {"miou", "mf1", "accuracy", "iou/dark", "iou/bright"}


def test_map_logits_of_one_window_are_the_networks(segmented, model):
    examples, result = segmented
    small = Examples([Example("small", _scene(9, 4), None, np.zeros((8, 8), np.uint8))], examples.classes, SEGMENTATION)
    ((first, strip),) = finetune.map_logits(result, small[0], kind=SEGMENTATION)
    element = windows.read_window(small[0], result.tuned.rows, kind=SEGMENTATION, place=(0, 0), **result.window)
    batch = windows.stack([element])
    wanted = finetune._jit_logits(result.tuned, result.params, result.statistics, batch)
    assert first == 0
    assert strip.shape == (8, 8, 2)
    np.testing.assert_allclose(strip, wanted[0], atol=1e-5)
    strips = [strip for _, strip in finetune.map_logits(result, examples[1], kind=SEGMENTATION)]
    assert np.concatenate(strips).shape == (12, 12, 2)


def test_change_is_found_between_two_dates(model):
    examples = _examples(CHANGE)
    options = Options(num_steps=40, batch_size=4, freeze=True, learning_rate=1e-2, warmup_steps=1, decoder_width=8)
    found = finetune.finetune(model, examples, examples, task=CHANGE, options=options)
    assert set(found) == {"f1", "iou", "precision", "recall", "accuracy"}
    assert found["f1"] > 0.8


@pytest.mark.parametrize("kind", [SCENE, MULTI_LABEL])
def test_labels_are_learned_and_a_frozen_backbone_is_left_to_the_bit(model, kind):
    examples = _examples(kind)
    options = dataclasses.replace(QUICK, num_steps=40, batch_size=4, freeze=True, drop_path=0.1, learning_rate=3e-2)
    result = finetune.tune(model, examples, examples, task=kind, options=options)
    assert result.losses[-4:].mean() < 0.3 * result.losses[0]
    found = finetune.evaluate(result, examples)
    assert found == ({"accuracy": 1.0} if kind == SCENE else {"map_micro": 1.0, "map_macro": 1.0})
    before = _leaves(model.params["backbone"])
    for path, leaf in _leaves(result.params["backbone"]).items():
        np.testing.assert_array_equal(leaf, before[path], err_msg=path)
    if kind == SCENE:
        again = finetune.tune(model, examples, examples, task=kind, options=options)
        np.testing.assert_array_equal(result.losses, again.losses)
        with jax.set_mesh(sharding.make_mesh(4, 2, 1, 1)):  # four samples on eight devices
            divided = dataclasses.replace(result, params=placed(jax.device_get(result.params)))
            assert finetune.evaluate(divided, examples) == found


def test_windows_of_scenes_are_the_largest_ones_up_to_twice_a_view(model):
    side_of = lambda *sides, **how: finetune._prepare(  # noqa: E731
        model,
        Examples([_examples(SCENE, 1, side)[0] for side in sides], ("dark", "bright"), SCENE),
        dataclasses.replace(QUICK, **how),
    )[1]["cells"]
    assert model.cells == 4
    assert [side_of(5), side_of(5, 7), side_of(9, 3), side_of(9, cells=3)] == [5, 7, 8, 3]
    opened = Lazy(3, lambda i: _examples(SCENE, 1, 8)[0] if i == 0 else pytest.fail("not needed"), str)
    assert finetune._largest(Examples(opened, ("dark", "bright"), SCENE), most=8) == 8


def test_fused_features_are_tuned_alike_on_one_device_and_on_eight(model):
    examples = _examples(SEGMENTATION)
    options = dataclasses.replace(QUICK, features="fused", batch_size=8, drop_path=0.2, cells=2, learning_rate=1e-4)
    run = lambda: finetune.tune(model, examples, examples, task=SEGMENTATION, options=options)  # noqa: E731
    one = run()
    with jax.set_mesh(sharding.make_mesh(4, 2, 1, 1)):
        eight = run()
    assert len(eight.params["head"]["classify"]["kernel"].sharding.device_set) == 8
    np.testing.assert_allclose(one.losses, eight.losses, rtol=1e-5)
    before, theirs = _leaves(model.params), _leaves(eight.params)
    for path, leaf in _leaves(one.params).items():
        # Adam divides by the gradient's size: what is nothing but rounding moves as far as the rest
        np.testing.assert_allclose(leaf, theirs[path], atol=4e-4, err_msg=path)
    moved = [not np.array_equal(theirs[path], leaf) for path, leaf in before.items()]
    assert sum(moved) > 0.9 * len(moved)


def test_class_of_a_scene_may_have_the_number_that_maps_have_for_none(model, monkeypatch):
    logits = np.random.default_rng(0).standard_normal((3, 300)).astype(np.float32)
    targets = np.array([255, 7, 299])
    monkeypatch.setattr(forward, "logits", lambda *_, **__: (jnp.asarray(logits), {}))
    tuned = forward.Tuned(model.network, model.rows, True, LinearHead(300), SCENE, 1)
    loss, _ = forward.loss(tuned, {}, {}, {"target": jnp.asarray(targets)}, drop_key=None)
    wanted = torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(targets))
    np.testing.assert_allclose(loss, wanted.item(), rtol=1e-5)


def test_what_does_not_fit_is_told_before_anything_is_compiled(model):
    maps, labels = _examples(SEGMENTATION, 2), _examples(SCENE, 2)
    tune = lambda train=maps, test=maps, task=SEGMENTATION, model=model, **options: finetune.tune(  # noqa: E731
        model, train, test, task=task, options=dataclasses.replace(QUICK, **options)
    )
    forms = []
    for form in (dict(shared=False), dict(moe_from="start")):
        config = model.config.copy_and_resolve_references()
        config.model.backbone.update(form)
        forms.append(dataclasses.replace(model, config=config))
    same = [dataclasses.replace(labels[i], target=np.array(1)) for i in range(len(labels))]
    flat = [dataclasses.replace(maps[i], target=np.zeros_like(maps[i].target)) for i in range(len(maps))]
    two = dataclasses.replace(model, rows=(*model.rows, dataclasses.replace(model.rows[0], name="other")))
    small = np.zeros_like(maps[0].target)
    small[1, 1] = 1  # no cell's commonest class: nothing to tell apart for a probe, but for a decoder
    train = dataclasses.replace(maps, examples=[dataclasses.replace(maps[0], target=small)])
    with pytest.raises(ValueError, match="all that is trained on has class 'dark'"):
        frozen.check_classes(train)
    finetune._check(model, train, maps, SEGMENTATION, QUICK)
    for wrong, message in (
        (dict(task="detection"), r"task: got 'detection' with examples 'segmentation' to train on"),
        (dict(test=labels), r"task: got 'segmentation' with examples 'segmentation' to train on, 'scene' to test"),
        (dict(test=dataclasses.replace(maps, classes=("a", "b"))), r"classes \('dark', 'bright'\) to train on"),
        (dict(modality="hr"), r"options.modality: got 'hr' with features 'auto'; wanted one of \['s1'\]"),
        (dict(model=two, features="stages"), r"options.modality: got none for stages; wanted one of \['s1', 'other'\]"),
        (dict(features="all"), r"options.features: got 'all'; wanted one of"),
        (dict(train=dataclasses.replace(maps, examples=flat)), "all that is trained on has class 'dark'"),
        (
            dict(train=dataclasses.replace(labels, examples=same), test=labels, task=SCENE),
            "all that is trained on has class 'b",
        ),
        (dict(batch_size=1), r"options.batch_size: got 1; wanted 2 or more"),
        (dict(warmup_steps=3), r"options.warmup_steps: got 3; wanted 0 to num_steps \(2\)"),
        (dict(final_learning_rate=1.0), r"options.final_learning_rate: got 1.0; wanted 0 to learning_rate"),
        (dict(layer_decay=0.0), r"options.layer_decay: got 0.0; wanted above 0"),
        (dict(overlap=1.0), r"options.overlap: got 1.0; wanted 0 to below 1"),
        (dict(weighting="flat"), r"options.weighting: got 'flat'; wanted one of"),
        (dict(model=forms[0]), r"config.model.backbone.shared: got False; wanted True: fine-tuning"),
        (dict(model=forms[1]), r"config.model.backbone.moe_from: got 'start'; wanted 'end': fine-tuning"),
    ):
        with pytest.raises(ValueError, match=message):
            tune(**wrong)
    with (
        jax.set_mesh(sharding.make_mesh(8, 1, 1, 1)),
        pytest.raises(ValueError, match=r"options.batch_size: got 2; wanted a multiple of the 8 devices"),
    ):
        tune()
    with pytest.raises(ValueError, match=r"options.learning_rate: 1e\+30 gave a loss that is not finite by update"):
        tune(train=labels, test=labels, task=SCENE, learning_rate=1e30, num_steps=3, freeze=True)
