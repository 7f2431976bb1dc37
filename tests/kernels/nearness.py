"""How near a kernel must be to the plain way, over results by name."""

import jax.numpy as jnp
import numpy as np


def assert_near(found, wanted) -> None:
    """fp32: no number further off than 1e-5 of the largest of its array."""
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        largest = float(jnp.abs(array).max())
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-5 * largest + 1e-7, err_msg=str(name))


def assert_as_near(fused, plain, exact) -> None:
    """bf16: the median and the tenth largest of the errors are those of the plain way, within half and a hundredth."""
    for name, wanted in exact.items():
        wanted = np.asarray(wanted, np.float32)
        errors = [np.abs(np.asarray(found[name], np.float32) - wanted) for found in (plain, fused)]
        for share in (50, 90):
            allowed, got = (np.percentile(error, share) for error in errors)
            assert got <= 1.5 * allowed + 0.01 * np.abs(wanted).max(), (name, share)
