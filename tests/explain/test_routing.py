"""Whose expert is whose: the choices are those that the router counts, and lie where their tokens lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from micro import micro_config

from skysense_jax import assembly, photometric, sharding
from skysense_jax.data import scenes
from skysense_jax.data.sample import Sample
from skysense_jax.eval.features import cut_window, read_whole
from skysense_jax.explain import routing
from skysense_jax.modalities import select
from skysense_jax.models import skysense

ROWS = select(("hr", "s1"))
NUM_DATES, CELLS, EXPERTS = dict(hr=1, s1=2), 3, 5


@pytest.fixture(scope="module")
def config():
    """With two mixtures: a block of stage 3, where hr has four tokens a cell, and one of stage 4."""
    config = micro_config()
    config.model.backbone.update(num_moe_blocks=2, num_experts=EXPERTS)
    return config


@pytest.fixture(scope="module")
def network(config):
    return skysense.build(ROWS, **config.model)


def _whole(row, odd=None, seed=0):
    """A place of 4 x 4 cells, all alike but for the pixels of the cell ``odd`` at the last date."""
    count, side = NUM_DATES[row.name], 4 * row.pixels_per_cell
    images = np.full((count, side, side, row.num_bands), np.array(row.mean) + np.array(row.std), row.dtype)
    if odd is not None:
        place = tuple(slice(i * row.pixels_per_cell, (i + 1) * row.pixels_per_cell) for i in odd)
        other = row.mean + np.random.default_rng(seed).normal(0, 2, row.num_bands) * row.std
        images[(-1, *place)] = np.clip(other, *row.value_range)
    series = scenes._series(images, days=np.arange(count, dtype=np.int32), gsd_m=10.0)
    return read_whole(Sample("one", 4, {row.name: series}), (row,), num_dates=NUM_DATES)


@pytest.fixture(scope="module")
def params(config, network):
    """Drawn, but for attention: without it a token knows of nothing but its own pixels."""
    shapes = assembly.batch_shapes(config, ROWS)
    boxed = jax.eval_shape(lambda batch: network.init(jax.random.key(0), batch, train=False), shapes)["params"]
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        fan_in = leaf.shape[-2] if leaf.ndim > 1 else 1
        quiet = "attention" in name or "bias" in name  # biases would drown what a pixel says
        array = np.zeros(leaf.shape) if quiet else rng.normal(0, fan_in**-0.5, leaf.shape)
        return jnp.asarray(array + ("scale" in name), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, sharding.unbox(boxed))


def test_chosen_experts_are_as_many_as_the_router_counts(network, params):
    sample = scenes.render(3, seed=1, extent_cells=4, modalities=("hr", "s1"), complete=True).sample
    for row in ROWS:
        whole = read_whole(sample, (row,), num_dates=NUM_DATES)
        window = jax.tree.map(lambda x: jnp.asarray(x)[None], cut_window(whole, (row,), 1, 0, CELLS))
        load = jax.jit(
            lambda window, row=row: (
                network.apply(
                    {"params": params},
                    photometric.prepare(window["views"], (row,), key=None),
                    window["views"],
                    present=window["present"],
                    day_of_year=window["day_of_year"],
                    train=False,
                    method="encode",
                ).router.load
            )
        )(window)
        chosen = [block for stage in routing._jit_chosen(network, row, params, window) for block in stage]
        counts = [np.bincount(np.asarray(block).ravel(), minlength=EXPERTS) for block in chosen]
        np.testing.assert_array_equal(counts, np.asarray(load))
        assert (np.stack(counts) > 0).sum() > 2


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_token_of_another_ground_takes_another_expert_where_it_lies(network, params, row):
    route = lambda whole: routing.routes(network, params, row, whole, extent=4, cells=CELLS, batch_size=3)  # noqa: E731
    alike = route(_whole(row))
    per_cell = 2 if row.name == "hr" else 1  # in stage 3
    assert [block.shape for block in alike] == [(NUM_DATES[row.name], 4 * n, 4 * n) for n in (per_cell, 1)]
    assert all(len(np.unique(block)) == 1 for block in alike)
    for block, n in enumerate((per_cell, 1)):
        moved = None
        for seed in range(12):  # until the ground is other enough
            got = route(_whole(row, odd=(3, 1), seed=seed))[block]
            if (got != alike[block]).any():
                moved = np.argwhere(got != alike[block])
                break
        assert moved is not None
        assert (moved[:, 0] == NUM_DATES[row.name] - 1).all()
        assert (moved[:, 1:] // n == (3, 1)).all()


def test_cells_that_are_hidden_or_absent_have_no_expert(network, params):
    row = ROWS[1]
    whole = _whole(row)
    whole.cell_usable["s1"][0, 2, 1] = False
    whole.present["s1"][1] = False
    for block in routing.routes(network, params, row, whole, extent=4, cells=CELLS, batch_size=3):
        assert (block[1] == -1).all()
        assert np.argwhere(block[0] == -1).tolist() == [[2, 1]]
