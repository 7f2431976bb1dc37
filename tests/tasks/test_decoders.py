"""UPerNet against transformers' head with the same weights; pooling, resizing and pooled features against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetHead

from skysense_jax.tasks import decoders

GRIDS = ((20, 12), (10, 6), (5, 3), (5, 3))  # the last stage keeps its grid
CHANNELS = (6, 9, 13, 17)


def init(module, *inputs, **how):
    return jax.jit(lambda: module.init(jax.random.key(0), *inputs, **how))()


def apply(module, variables, *inputs, **how):
    return jax.jit(lambda variables: module.apply(variables, *inputs, **how))(variables)


def to_torch(x):
    return torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy())


@pytest.fixture(scope="module")
def maps():
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(3, *grid, c)), jnp.float32) for grid, c in zip(GRIDS, CHANNELS)]


@pytest.fixture
def theirs():
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        head = UperNetHead(UperNetConfig(hidden_size=8, num_labels=5), in_channels=CHANNELS)
        for name, x in head.state_dict().items():
            if "batch_norm" in name and x.is_floating_point():  # fresh ones would hide a wrong place
                x.copy_(0.5 + torch.rand_like(x))
    return head


def ours_of(state):
    """Variables of our decoder with the weights of theirs."""
    blocks = {"bottleneck": "bottleneck", "fuse": "fpn_bottleneck"}
    blocks |= {f"pool_{i}": f"psp_modules.{i}.1" for i in range(4)}
    blocks |= {f"lateral_{i}": f"lateral_convs.{i}" for i in range(3)}
    blocks |= {f"smooth_{i}": f"fpn_convs.{i}" for i in range(3)}
    state = {key: x.numpy() for key, x in state.items()}
    kernel = lambda name: np.moveaxis(state[name], (2, 3, 1, 0), (0, 1, 2, 3))  # noqa: E731
    params, statistics = {}, {}
    for ours, name in blocks.items():
        norm = {"scale": state[f"{name}.batch_norm.weight"], "bias": state[f"{name}.batch_norm.bias"]}
        params[ours] = {"conv": {"kernel": kernel(f"{name}.conv.weight")}, "norm": norm}
        moments = {key: state[f"{name}.batch_norm.running_{key}"] for key in ("mean", "var")}
        statistics[ours] = {"norm": moments}
    params["classify"] = {"kernel": kernel("classifier.weight"), "bias": state["classifier.bias"]}
    return {"params": params, "batch_stats": statistics}


def test_upernet_equals_that_of_transformers_in_evaluation_and_in_training(maps, theirs):
    ours, variables = decoders.UPerNet(5, 8, norm_maps=False), ours_of(theirs.state_dict())
    fresh = init(ours, maps, train=False)
    assert jax.tree.map(np.shape, dict(fresh)) == jax.tree.map(np.shape, variables)
    with torch.no_grad():
        wanted = theirs.eval()([to_torch(x) for x in maps])
        np.testing.assert_allclose(to_torch(apply(ours, variables, maps, train=False)), wanted, atol=1e-4)
        before = ours_of({key: x.clone() for key, x in theirs.state_dict().items()})
        wanted = theirs.train()([to_torch(x) for x in maps])
    got, moved = apply(ours, before, maps, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(to_torch(got), wanted, atol=1e-4)
    means = lambda tree: {name: x["norm"]["mean"] for name, x in tree["batch_stats"].items()}  # noqa: E731
    for name, mean in means(ours_of(theirs.state_dict())).items():
        np.testing.assert_allclose(means(moved)[name], mean, atol=1e-5)
        assert np.abs(mean - means(before)[name]).max() > 1e-3


def test_upernet_norms_each_map_first(maps):
    ours = decoders.UPerNet(5, 8)
    variables = init(ours, maps, train=False)
    scaled = [7 * x - 3 for x in maps]
    got, wanted = (apply(ours, variables, x, train=False) for x in (scaled, maps))
    np.testing.assert_allclose(got, wanted, atol=1e-3)


@pytest.mark.parametrize("size", [1, 2, 5, 6, 7, 13])
@pytest.mark.parametrize("parts", decoders.POOL_SCALES)
def test_pooling_matrix_equals_adaptive_pooling(size, parts):
    x = np.random.default_rng(size).normal(size=(2, size)).astype(np.float32)
    wanted = torch.nn.functional.adaptive_avg_pool1d(torch.from_numpy(x), parts)
    np.testing.assert_allclose(x @ decoders.pooling_matrix(size, parts).T, wanted, atol=1e-6)


@pytest.mark.parametrize(("grid", "to"), [((3, 5), (12, 10)), ((1, 2), (5, 7)), ((6, 6), (4, 3)), ((4, 5), (4, 5))])
def test_resize_equals_interpolation_of_torch(grid, to):
    x = np.random.default_rng(0).normal(size=(2, *grid, 3)).astype(np.float32)
    wanted = torch.nn.functional.interpolate(to_torch(x), size=to, mode="bilinear", align_corners=False)
    np.testing.assert_allclose(to_torch(decoders.resize(jnp.asarray(x), *to)), wanted, atol=1e-5)


def test_linear_head_reads_the_mean_of_usable_cells():
    rng = np.random.default_rng(0)
    cells, usable = rng.normal(size=(3, 2, 5, 6)).astype(np.float32), rng.random((3, 2, 5)) < 0.5
    usable[2] = False
    head = decoders.LinearHead(4)
    variables = init(head, jnp.asarray(cells), jnp.asarray(usable))
    means = [[cells[i][usable[i]].mean(0) if usable[i].any() else np.zeros(6)] for i in range(3)]
    normed = torch.nn.functional.layer_norm(torch.tensor(np.concatenate(means), dtype=torch.float32), (6,))
    kernel = np.asarray(variables["params"]["classify"]["kernel"])
    cells[~usable] = np.nan
    got = apply(head, variables, jnp.asarray(cells), jnp.asarray(usable))
    np.testing.assert_allclose(got, normed.numpy() @ kernel, atol=1e-5)
