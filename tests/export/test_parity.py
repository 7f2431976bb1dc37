"""JAX and PyTorch compute the same, in values and gradients: some small cases of benchmarks/parity.py."""

import math

import pytest

from benchmarks import parity

BY_NAME = {" ".join(str(case).split()): case for case in parity.SMALL_CASES}
RUN = (
    "tiny hr 3x4 cells, 3 tokens off, masks",
    "tiny_moe hr+s2+s1 4x5 cells, masks",
    "tiny_moe s2+s1 13x11 cells, masks",
    "tiny hr+s2+s1 4x5 cells, separate",
    "tiny s2+s1 4x5 cells, masks, 0 prompts",
)


@pytest.mark.parametrize("name", RUN)
def test_exported_network_equals_jax_in_values_and_gradients(name):
    difference = parity.run_case(BY_NAME[name], seed=1)
    assert difference.features < 2e-5  # the goal of the table is 1e-4
    assert difference.gradients < 2e-5  # 1e-3


def test_table_has_every_size_and_tells_a_miss(monkeypatch, capsys):
    sizes = {case.config for case in parity.CASES}
    assert {"tiny", "tiny_moe", "small", "small_moe", "base", "base_moe", "huge"} <= sizes
    assert any(case.cells == (64, 64) for case in parity.CASES)
    for found, code in (((1e-6, math.nan), 0), ((1e-6, 1e-2), 1), ((math.nan, 1e-6), 1)):
        monkeypatch.setattr(parity, "run_case", lambda case, found=found: parity.Difference(*found))
        assert parity.main(["huge"]) == code
        assert ("MISSED" in capsys.readouterr().out) == bool(code)
