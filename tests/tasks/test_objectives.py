"""Losses of fine-tuning against PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from skysense_jax.tasks import objectives
from skysense_jax.tasks.examples import IGNORED


def _case(*shape):
    rng = np.random.default_rng(0)
    return rng, rng.normal(0, 5, shape).astype(np.float32)


def _compare(ours, theirs, logits):
    value, gradient = jax.value_and_grad(ours)(jnp.asarray(logits))
    leaf = torch.from_numpy(logits.copy()).requires_grad_()
    wanted = theirs(leaf)
    wanted.backward()
    np.testing.assert_allclose(value, wanted.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, leaf.grad.numpy(), atol=1e-6)


def test_cross_entropy_equals_torch_with_ignored_pixels():
    rng, logits = _case(2, 3, 5, 4)
    targets = rng.integers(0, 4, (2, 3, 5)).astype(np.uint8)
    targets[0, :2] = IGNORED
    _compare(
        lambda x: objectives.cross_entropy(x, jnp.asarray(targets)),
        lambda x: torch.nn.functional.cross_entropy(
            x.movedim(-1, 1), torch.from_numpy(targets).long(), ignore_index=IGNORED
        ),
        logits,
    )


def test_binary_cross_entropy_equals_torch_for_labels_and_for_change_with_ignored_pixels():
    rng, logits = _case(4, 7)
    labels = rng.random((4, 7)) < 0.3
    loss = torch.nn.functional.binary_cross_entropy_with_logits
    _compare(
        lambda x: objectives.binary_cross_entropy(x, jnp.asarray(labels)),
        lambda x: loss(x, torch.from_numpy(labels).float()),
        logits,
    )
    change, known = labels.astype(np.uint8), rng.random((4, 7)) < 0.6
    change[~known] = IGNORED
    _compare(
        lambda x: objectives.binary_cross_entropy(x, jnp.asarray(change)),
        lambda x: loss(x[torch.from_numpy(known)], torch.from_numpy(labels).float()[torch.from_numpy(known)]),
        logits,
    )


def test_without_a_label_losses_are_zero_and_their_gradients_too():
    _, logits = _case(3, 4)
    nothing = jnp.full(3, IGNORED, jnp.uint8)
    value, gradient = jax.value_and_grad(objectives.cross_entropy)(jnp.asarray(logits), nothing)
    assert value == 0
    assert not gradient.any()
    assert objectives.binary_cross_entropy(jnp.asarray(logits[:, 0]), nothing) == 0
