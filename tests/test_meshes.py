"""However a batch lies on devices, however it is cut, and whatever kernels attend: the same loss and gradients."""

import jax
import numpy as np
import pytest
from micro import Compiled, mesh_config

from skysense_jax import sharding, train

# (data, fsdp, tensor, expert), then (microbatches, logits)
LAYOUTS = [
    ((8, 1, 1, 1), (1, 1)),
    ((2, 4, 1, 1), (2, 2)),
    ((1, 1, 2, 4), (2, 1)),
    ((1, 2, 2, 2), (1, 2)),
]


def _step(layout, parts, element, config=None, **kernels):
    """Metrics and Adam's first moments after one step: from zero, the clipped gradient times 1 - beta1."""
    config = config or mesh_config()
    config.mesh.update(dict(zip(sharding.MESH_AXES, layout)))
    config.parts.update(microbatches=parts[0], logits=parts[1])
    step = Compiled(config, jax.devices()[: np.prod(layout)], **kernels)
    state, metrics = step(step.fresh, element)
    adam = next(part for part in state.optimizer if hasattr(part, "mu"))
    return metrics, dict(jax.tree_util.tree_leaves_with_path(adam.mu))


@pytest.fixture(scope="module")
def element():
    return next(iter(train.make_pipeline(mesh_config())))


@pytest.fixture(scope="module")
def alone(element):
    return _step((1, 1, 1, 1), (1, 1), element)


@pytest.mark.parametrize(("layout", "parts"), LAYOUTS)
def test_layout_equals_one_device_in_every_number_and_gradient(layout, parts, alone, element):
    _assert_same(_step(layout, parts, element), alone)


def _assert_same(found, wanted):
    (metrics, moments), (wanted_metrics, wanted_moments) = found, wanted
    assert metrics.keys() == wanted_metrics.keys()
    for name, value in wanted_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    assert moments.keys() == wanted_moments.keys()
    for path, value in wanted_moments.items():
        largest = float(np.abs(value).max())
        np.testing.assert_allclose(
            moments[path], value, rtol=0, atol=1e-5 * largest + 1e-7, err_msg=jax.tree_util.keystr(path)
        )


def test_step_with_kernels_in_and_outside_windows_equals_the_plain_one():
    """Eight devices, of which the kernels know; aerial views of 32 x 32 stage-1 tokens."""
    config = mesh_config()
    config.data.update(modalities=("hr",), num_dates=dict(hr=1))
    element = next(iter(train.make_pipeline(config)))
    plain = _step((1, 1, 1, 1), (1, 1), element, config.copy_and_resolve_references())
    kernels = dict.fromkeys(("attention", "window_attention"), "mosaic interpreted")
    _assert_same(_step((2, 2, 1, 2), (1, 1), element, config, **kernels), plain)
