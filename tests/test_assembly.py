"""What a config means on the devices that its step is for."""

import logging
import types

import pytest

from configs import base
from skysense_jax import assembly


@pytest.fixture
def config():
    return base.get_config()


@pytest.mark.parametrize(("platform", "chosen"), [("cpu", "xla"), ("tpu", "xla"), ("gpu", "cudnn")])
def test_efficiency_attention_follows_the_target(config, platform, chosen):
    assert assembly.efficiency(config, platform) == {
        **config.efficiency,
        "attention": chosen,
        "window_attention": "mosaic" if platform == "tpu" else "xla",
    }
    config.efficiency.attention = "xla"
    assert assembly.efficiency(config, platform)["attention"] == "xla"


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


def test_efficiency_cudnn_elsewhere_is_refused(config):
    config.efficiency.attention = "cudnn"
    with pytest.raises(ValueError, match="attention: got 'cudnn' on tpu; wanted 'auto' or 'xla'"):
        assembly.assemble(config, "tpu")
