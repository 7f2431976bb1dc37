"""What jax calls a device leads to its row, and to no other board's."""

import pytest

from skysense_jax import chips


@pytest.mark.parametrize(
    ("kind", "name", "teraflops"),
    [
        ("TPU v5 lite", "v5e", 197),
        ("TPU v5", "v5p", 459),
        ("TPU v5p", "v5p", 459),
        ("TPU v6 lite", "v6e", 918),
        ("NVIDIA H100 80GB HBM3", "h100", 989),
        ("NVIDIA H200", "h200", 989),
        ("NVIDIA H20", "h20", 148),
    ],
)
def test_device_kind_leads_to_its_rated_flops(kind, name, teraflops):
    chip = chips.of_device_kind(kind)
    assert chip is chips.CHIPS[name]
    assert chip.flops == teraflops * 1e12


@pytest.mark.parametrize("kind", ["cpu", "TPU v4", "NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA GH200 480GB", ""])
def test_device_kind_rated_otherwise_or_not_known_has_no_row(kind):
    assert chips.of_device_kind(kind) is None


def test_every_chip_is_found_by_a_name_of_its_own():
    kinds = [kind for chip in chips.CHIPS.values() for kind in chip.device_kinds]
    assert len(kinds) == len(set(kinds))
    assert all(chip.device_kinds for chip in chips.CHIPS.values())
