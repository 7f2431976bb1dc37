"""L_ITA against a loop."""

import jax
import numpy as np
from oracles import cross_entropy, unit

from skysense_jax.losses.text_alignment import text_alignment

RNG = np.random.default_rng(0)
CELLS, TABLE = (unit(RNG.normal(size=shape)).astype(np.float32) for shape in ((3, 2, 6), (5, 6)))
LABELS = (RNG.dirichlet(np.ones(5) * 0.3, (3, 2)) * RNG.uniform(0.2, 1, (3, 2, 1))).astype(np.float32)
LABELS[0, 1] = 0
USABLE = np.array([[1, 1], [0, 1], [1, 1]], bool)
LOSS = jax.jit(text_alignment)


def loop(cells):
    total = 0.0
    for i in range(3):
        for j in range(2):
            if USABLE[i, j] and LABELS[i, j].sum() > 0:
                target = LABELS[i, j].astype(np.float64) / LABELS[i, j].sum()
                total += cross_entropy(TABLE @ cells[i, j], target, 1 / 14.0)
    return total


def test_text_alignment_equals_the_loop_in_value_and_gradient():
    term = LOSS(CELLS, LABELS, USABLE, table=TABLE, scale=14.0)
    np.testing.assert_allclose(term.sum, loop(CELLS), rtol=1e-5)
    assert term.count == 4
    grad = np.asarray(jax.grad(lambda x: LOSS(x, LABELS, USABLE, table=TABLE, scale=14.0).sum)(CELLS))
    direction = RNG.normal(size=CELLS.shape)
    slope = (loop(CELLS + 1e-5 * direction) - loop(CELLS - 1e-5 * direction)) / 2e-5
    np.testing.assert_allclose((grad * direction).sum(), slope, rtol=1e-4)
    np.testing.assert_array_equal(grad[0, 1], 0)
    np.testing.assert_array_equal(grad[1, 0], 0)


def test_text_alignment_scale_has_a_gradient_and_nothing_labelled_is_zero():
    slope = jax.grad(lambda scale: LOSS(CELLS, LABELS, USABLE, table=TABLE, scale=scale).sum)(14.0)
    assert abs(slope) > 1e-3
    value, grad = jax.value_and_grad(lambda x: LOSS(x, LABELS * 0, USABLE, table=TABLE, scale=14.0).mean())(CELLS)
    assert value == 0
    np.testing.assert_array_equal(grad, 0)
