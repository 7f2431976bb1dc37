"""However a batch lies on devices and however it is cut, the loss and its gradients are those of one device."""

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


def _step(layout, parts, element):
    """Metrics and Adam's first moments after one step: from zero, the clipped gradient times 1 - beta1."""
    config = mesh_config()
    config.mesh.update(dict(zip(sharding.MESH_AXES, layout)))
    config.parts.update(microbatches=parts[0], logits=parts[1])
    step = Compiled(config, jax.devices()[: np.prod(layout)])
    state, metrics = step(step.state(), element)
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
    metrics, moments = _step(layout, parts, element)
    assert metrics.keys() == alone[0].keys()
    for name, value in alone[0].items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    assert moments.keys() == alone[1].keys()
    for path, value in alone[1].items():
        largest = float(np.abs(value).max())
        np.testing.assert_allclose(
            moments[path], value, rtol=0, atol=1e-5 * largest + 1e-7, err_msg=jax.tree_util.keystr(path)
        )
