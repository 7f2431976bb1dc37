"""Configs with a target behind their name."""

import math

import pytest

from skysense_jax import config as config_lib
from skysense_jax import config_checks


@pytest.mark.parametrize(
    ("name", "mesh", "logits"),
    [
        ("huge.py:v5p:64", (8, 8, 1, 1), 16),
        ("huge.py:v5p-128", (8, 8, 1, 1), 16),  # the cloud's name counts cores
        ("huge.py:h20:128", (16, 8, 1, 1), 8),
        ("huge_moe.py:h200:64", (8, 1, 1, 8), 16),
        ("huge_moe.py:v5p:64", (1, 8, 1, 8), 16),
        ("huge_moe.py:v5e:512", (8, 8, 1, 8), 2),
        ("tiny.py:v5e:4", (1, 4, 1, 1), 1),
    ],
)
def test_config_on_a_target_is_laid_out_for_its_chips(name, mesh, logits):
    placed = config_lib.load(config_checks.ROOT / "configs" / name)
    assert tuple(placed.mesh[axis] for axis in ("data", "fsdp", "tensor", "expert")) == mesh
    assert placed.parts.logits == logits
    config_lib.validate(placed, num_devices=math.prod(mesh))
    plain = config_lib.load(config_checks.ROOT / "configs" / name.partition(":")[0])
    for section in ("run", "efficiency", "data", "model", "objective", "optim"):
        assert placed[section] == plain[section]


def test_config_on_a_target_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"target: unknown chip 'v99'; wanted one of v5e v5p"):
        config_lib.load(config_checks.ROOT / "configs" / "huge.py:v99:3")
