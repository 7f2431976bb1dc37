"""What pictures show, where it can be computed; and that each is drawn whatever a sample lacks."""

import jax
import matplotlib.image
import numpy as np
import optax
import pytest
from einops import rearrange

from skysense_jax import drawing, modalities, sharding
from skysense_jax.batch import Batch
from skysense_jax.data import geometry
from skysense_jax.data.views import MultiView
from skysense_jax.eval import pictures
from skysense_jax.eval.features import SampleFeatures, read_whole
from skysense_jax.models import skysense
from skysense_jax.train_state import boxed_state

ROWS = modalities.select(("hr", "s2", "s1"))
NUM_DATES = dict(hr=1, s2=3, s1=2)
CLASSES = modalities.OSM.classes


def _batch(sample, rows=ROWS):
    views = MultiView(
        modalities=rows,
        num_dates=NUM_DATES,
        day_jitter=0,
        anchor_cells=8,
        tile_cells=8,
        num_global=2,
        global_box_cells=(4, 6),
        global_cells=5,
        num_local=2,
        local_box_cells=(2, 3),
        local_cells=3,
    )
    element = views(sample, np.random.default_rng(1))
    return Batch.from_dict(jax.tree.map(lambda x: np.asarray(x)[None], element))


def _features(sample, seed):
    rng = np.random.default_rng(seed)
    side = sample.extent_cells
    whole = read_whole(sample, ROWS, num_dates=NUM_DATES)
    fused = rng.normal(size=(side, side, 7)).astype(np.float32)
    modality = {m.name: rng.normal(size=(side, side, 5)).astype(np.float32) for m in ROWS}
    usable = {m.name: whole.cell_usable[m.name].any(0) for m in ROWS}
    return SampleFeatures(fused, usable["s2"], modality, usable, whole)


def test_to_rgb_shows_natural_colours_and_greys_out_what_is_invalid():
    hr, s2, s1 = ROWS
    x = np.random.default_rng(0).integers(0, 255, (2, 4, 5, 3)).astype(np.uint8)
    valid = np.ones((2, 4, 5), bool)
    valid[1, 2] = False
    shown = drawing.to_rgb(x, hr, valid=valid)
    np.testing.assert_allclose(shown[valid], x[valid] / 255.0, atol=1e-6)
    assert (shown[1, 2] == drawing.NOTHING).all()
    bands = np.zeros((3, 3, 10), np.uint16)
    bands[1, 1, s2.bands.index("B4")] = 3000
    assert drawing.to_rgb(bands, s2)[1, 1].tolist() == [1, 0, 0]
    assert drawing.shown_bands(s1) == ("VV", "VH", "VV-VH")
    assert drawing.to_rgb(np.zeros((3, 3, 2), np.float16), s1, valid=np.zeros((3, 3), bool)).shape == (3, 3, 3)


def test_to_rgb_stretches_by_clear_pixels_and_shows_the_others_too():
    s2 = ROWS[1]
    bands = np.random.default_rng(0).integers(200, 1200, (2, 9, 9, 10)).astype(np.uint16)
    clear = np.ones((2, 9, 9), bool)
    clear[1, :4] = False
    ground = drawing.to_rgb(bands[:1], s2)
    bands[1, :4] = 9000  # a cloud
    bands[1, 4:] = bands[0, 4:]
    shown = drawing.to_rgb(bands, s2, clear=clear)
    assert (shown[1, :4] == 1).all()
    assert np.abs(shown[0] - ground[0]).max() < 0.05
    assert drawing.to_rgb(bands, s2)[0].mean() < 0.3 < ground.mean()
    np.testing.assert_array_equal(drawing.to_rgb(bands, s2, clear=clear & False), drawing.to_rgb(bands, s2))


def test_ground_transform_of_a_view_puts_its_tokens_where_the_affine_says():
    for mirrored in (False, True):
        for turns in range(4):
            affine = geometry.view_affine(geometry.Box(3, 7, 6), geometry.Orientation(mirrored, turns), view_cells=4)
            offset = np.array([-1.5, 0.5])  # row, column
            row, column = affine[:, :2] @ offset + affine[:, 2]
            got = pictures._ground_transform(affine).transform((offset[1], offset[0]))
            np.testing.assert_allclose(got, (column, row), atol=1e-5)


def test_fit_colours_of_three_independent_directions_holds_all_variance():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(9, 3)))[0].T
    weights = rng.normal(size=(400, 3)) * (5.0, 2.0, 1.0)
    colours, share = drawing.fit_colours(weights @ basis)
    assert share == pytest.approx(1.0)
    shown = colours(weights @ basis)
    assert shown.min() == 0
    assert shown.max() == 1
    for i in range(3):
        assert abs(np.corrcoef(shown[:, i], weights[:, i])[0, 1]) > 0.95


def test_views_picture_of_a_sample_without_a_modality_and_labels_is_drawn(make_sample, tmp_path):
    path = pictures.views_picture(tmp_path / "sub" / "views.png", _batch(make_sample(8, without=("hr", "s1"))), ROWS)
    image = matplotlib.image.imread(path)
    assert image.std() > 0.05


def test_features_picture_with_an_absent_modality_and_labels_is_drawn(make_sample, tmp_path):
    samples = [make_sample(5), make_sample(6, without=("hr", "s1"))]
    found = [_features(sample, seed) for seed, sample in enumerate(samples)]
    labels = [np.random.default_rng(0).integers(0, 5, (20, 20)).astype(np.uint8), None]
    path = pictures.features_picture(tmp_path / "f.png", found, ROWS, labels=labels, names=["a", "b"])
    assert matplotlib.image.imread(path).std() > 0.05


def test_attention_picture_ranks_queries_by_the_cells_they_own(tmp_path, monkeypatch):
    attention = np.full((5, 2, 3), 0.1, np.float32)
    attention[3, :, :2] = 0.3
    attention[1, :, 2] = 0.2
    usable = np.ones((2, 3), bool)
    usable[0, 0] = False
    figures = []
    monkeypatch.setattr(pictures, "save", lambda figure, path: figures.append(figure) or path)
    pictures.attention_picture(tmp_path / "q.png", attention, usable, np.zeros((4, 6, 3)), num_shown=2)
    titles = [axes.get_title() for axes in figures[0].axes]
    assert titles[:4] == ["view", "cells by owner", "query 3: 3 cells", "query 1: 2 cells"]
    overlay = figures[0].axes[2].images[-1].get_array()
    # Query 3 looks at the first two columns more than evenly (orange), at the last less (purple).
    assert (overlay[:, 0, 0] > overlay[:, 0, 2]).all()
    assert (overlay[:, 2, 2] > overlay[:, 2, 1]).all()
    assert (overlay[..., 3] > 0.2).all()


def test_label_colours_differ_between_the_classes_of_the_label_map():
    colours = drawing.label_colours(CLASSES)
    distances = np.abs(rearrange(colours, "l c -> l 1 c") - rearrange(colours, "k c -> 1 k c")).sum(-1)
    assert (distances + np.eye(len(CLASSES)) > 0.1).all()


def test_write_all_of_a_real_network_draws_every_picture(make_sample, tmp_path):
    rows = modalities.select(("s2",))
    model = skysense.build(
        rows,
        compute_dtype="float32",
        backbone=dict(width=32, depths=(1, 1, 1, 1), head_width=32, window=4, num_prompts=1),
        fusion=dict(width=32, depth=1, head_width=32),
        queries=dict(num_queries=3),
        heads=dict(hidden_dim=8, bottleneck_dim=4, num_prototypes=5),
        text_dim=6,
    )
    sample = make_sample(6)
    batch = _batch(sample, rows)
    metrics_path = tmp_path / "metrics.jsonl"
    metrics_path.write_text('{"step": 1, "loss": 2.0, "experts/load_block0_expert1": 0.5}\n')
    rng = np.random.default_rng(0)
    shapes = sharding.unbox(boxed_state(model, optax.identity(), batch)).teacher
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(leaf.dtype), shapes)
    with jax.set_mesh(sharding.make_mesh(data=2, fsdp=1, tensor=1, expert=1, devices=jax.devices()[:2])):
        paths = pictures.write_all(
            tmp_path / "pictures",
            model=model,
            params=params,
            modalities=rows,
            samples=[sample],
            batch=batch,
            metrics_path=metrics_path,
            cells=4,
            num_dates=NUM_DATES,
            batch_size=2,
        )
        usable = np.ones((4, 4), bool)
        usable[1, 2] = False
        fused = rng.normal(size=(4, 4, 32)).astype(np.float32)
        attention = pictures.query_attention(model, params, fused, usable)
    assert [path.name for path in paths] == ["views.png", "features.png", "queries.png", "curves.png", "experts.png"]
    assert all(path.stat().st_size > 5000 for path in paths)
    assert attention.shape == (3, 4, 4)
    np.testing.assert_allclose(attention.sum((1, 2)), 1, rtol=1e-5)
    assert (attention[:, 1, 2] == 0).all()
