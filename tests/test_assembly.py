"""What a config means on the devices that its step is for."""

import logging
import re
import types

import pytest

from configs import base
from skysense_jax import assembly


@pytest.fixture
def config():
    return base.get_config()


@pytest.mark.parametrize(
    ("platform", "asked", "outside", "inside"),
    [
        ("cpu", "auto", "xla", "xla"),
        ("tpu", "auto", "mosaic", "mosaic"),
        ("gpu", "auto", "cudnn", "xla"),
        ("gpu", "cudnn+triton", "cudnn", "triton"),
        ("tpu", "xla", "xla", "xla"),
    ],
)
def test_efficiency_attention_follows_the_target_and_what_is_asked(config, platform, asked, outside, inside):
    config.efficiency.attention = asked
    of_attention = dict(attention=outside, window_attention=inside)
    assert assembly.efficiency(config, platform) == {**config.efficiency, **of_attention}


def test_efficiency_shapes_that_cudnn_cannot_train_on_fall_back_with_one_line(config, caplog):
    config.data.num_dates.s2 = 7
    with caplog.at_level(logging.INFO, logger="absl"):
        assert assembly.efficiency(config, "gpu")["attention"] == "xla"
    assert "num_dates: got 12" in caplog.text


@pytest.mark.parametrize(("capability", "chosen"), [("9.0", "cudnn"), ("7.5", "xla"), ("gfx942", "xla")])
def test_efficiency_attention_asks_the_gpu_that_is_here(config, capability, chosen, monkeypatch):
    here = types.SimpleNamespace(platform="gpu", compute_capability=capability)
    monkeypatch.setattr(assembly.jax, "devices", lambda: [here])
    assert assembly.efficiency(config, "gpu")["attention"] == chosen


@pytest.mark.parametrize(
    ("platform", "asked", "wanted"),
    [
        ("tpu", "cudnn", "'auto' or 'xla' or 'mosaic'"),
        ("cpu", "mosaic", "'auto' or 'xla'"),
        ("gpu", "mosaic", "'auto' or 'xla' or 'cudnn' or 'cudnn\\+triton'"),
        ("cpu", "cudnn+triton", "'auto' or 'xla'"),
    ],
)
def test_efficiency_kernel_of_another_target_is_refused(config, platform, asked, wanted):
    config.efficiency.attention = asked
    with pytest.raises(
        ValueError, match=f"attention: got {re.escape(repr(asked))} on {platform}; wanted {wanted} there"
    ):
        assembly.assemble(config, platform)
