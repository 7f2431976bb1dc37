"""KoLeo against a loop."""

import jax
import jax.numpy as jnp
import numpy as np
from oracles import unit

from skysense_jax.losses import koleo as koleo_lib

koleo = jax.jit(koleo_lib.koleo)
RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(6, 2, 4)).astype(np.float32)
VALID = np.array([[1, 1], [1, 0], [0, 1], [1, 0], [1, 1], [1, 0]], bool)


def loop(features, valid):
    total, x = 0.0, unit(features.astype(np.float64))
    for v in range(x.shape[1]):
        for i in range(len(x)):
            distances = [np.linalg.norm(x[i, v] - x[j, v]) for j in range(len(x)) if j != i and valid[j, v]]
            if valid[i, v] and distances:
                total -= np.log(min(distances))
    return total


def test_koleo_equals_the_loop_in_value_and_gradient():
    term, grad = koleo(FEATURES, VALID), jax.grad(lambda x: koleo(x, VALID).sum)(FEATURES)
    np.testing.assert_allclose(term.sum, loop(FEATURES, VALID), rtol=1e-5)
    assert term.count == 8
    direction = RNG.normal(size=FEATURES.shape)
    slope = (loop(FEATURES + 1e-5 * direction, VALID) - loop(FEATURES - 1e-5 * direction, VALID)) / 2e-5
    np.testing.assert_allclose((np.asarray(grad) * direction).sum(), slope, rtol=1e-4)
    np.testing.assert_array_equal(np.asarray(grad)[~VALID], 0)


def test_koleo_fewer_than_two_valid_or_equal_features_are_finite():
    alone = np.zeros((6, 2), bool)
    alone[2, 0] = True
    term, grad = koleo(FEATURES, alone), jax.grad(lambda x: koleo(x, alone).sum)(FEATURES)
    assert (float(term.sum), float(term.count)) == (0, 0)
    np.testing.assert_array_equal(grad, 0)
    equal = jnp.ones((6, 2, 4))
    assert np.isfinite(koleo(equal, VALID).sum)
    assert np.isfinite(jax.grad(lambda x: koleo(x, VALID).sum)(equal)).all()
