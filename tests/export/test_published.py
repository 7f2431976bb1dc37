"""Stages 1 and 2 against ``transformers``' own Swin V2, both ways, and the names and orders of mmpretrain."""

import json

import numpy as np
import pytest
import torch
from transformers import Swinv2Backbone, Swinv2Config

from configs import tiny
from skysense_jax.export import names, published, write
from skysense_jax.export.modeling_skysensev2 import SkySenseV2
from skysense_jax.modalities import select

WIDTH, SIDE = 64, 128


@pytest.fixture(scope="module")
def network():
    model = tiny.get_config().model
    model.backbone.update(width=WIDTH, depths=(2, 2, 1, 1))
    description = write.describe(select(("hr", "s2")), backbone=model.backbone, fusion=None, training={})
    torch.manual_seed(0)
    network = SkySenseV2(json.loads(json.dumps(description)), normalise=False).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return network


def oracle(**changes):
    fields = dict(embed_dim=WIDTH, depths=[2, 2], num_heads=[2, 4], window_size=8, image_size=SIDE, drop_path_rate=0.0)
    config = Swinv2Config(**{**fields, **changes}, out_features=["stage1", "stage2"])
    return Swinv2Backbone(config).eval()


def arrays(module):
    return {name: parameter.detach().numpy() for name, parameter in module.state_dict().items()}


def test_exported_stages_give_the_same_numbers_in_transformers(network):
    theirs = names.split(list(published.transformers_names((2, 2))), arrays(network))
    model = oracle()
    loaded = model.load_state_dict(
        {name: torch.from_numpy(array.copy()) for name, array in theirs.items()}, strict=False
    )
    assert not [name for name in loaded.missing_keys if "relative" not in name]
    assert set(loaded.unexpected_keys) == {  # stage 2's merging: their last stage has none
        f"encoder.layers.1.downsample.{name}" for name in ("reduction.weight", "norm.weight", "norm.bias")
    }
    x = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        wanted, got = model(x).feature_maps, network({"hr": x}).stages["hr"]
    for ours, oracles in zip(got, wanted):
        torch.testing.assert_close(ours, oracles, rtol=0, atol=2e-5)


def test_published_weights_of_transformers_come_in_under_our_names_and_compute_the_same(network):
    model = oracle()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    state = {f"swinv2.{name}": array for name, array in arrays(model).items()}
    found, unused = published.from_published({**state, "classifier.weight": np.zeros((2, 2))}, (2, 2))
    assert {name.removeprefix("swinv2.") for name in unused} >= {"classifier.weight"}
    assert not [name for name in unused if not name.startswith(("classifier", "swinv2.hidden_states_norms"))], unused
    ours = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in found.items()}
    loaded = network.load_state_dict(ours, strict=False)
    assert not loaded.unexpected_keys
    x = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        for ours, oracles in zip(network({"hr": x}).stages["hr"], model(x).feature_maps):
            torch.testing.assert_close(ours, oracles, rtol=0, atol=2e-5)


def test_mmpretrain_names_are_ours_with_its_order_of_neighbours(network):
    state = arrays(network)
    theirs = {f"backbone.{name.replace(published.TOKENIZER, 'patch_embed')}": array for name, array in state.items()}
    theirs["backbone.stages.0.blocks.0.attn.w_msa.relative_position_index"] = np.zeros((64, 64))
    found, unused = published.from_published(theirs, (2, 2))
    assert {"backbone.stages.2.blocks.0.ln1.weight"} <= set(unused)
    for name, array in found.items():
        np.testing.assert_array_equal(array, state[name])
    # nn.Unfold is what mmpretrain's merging applies before its linear layer
    x = torch.randn(1, WIDTH, 6, 4)
    unfolded = torch.nn.Unfold(2, stride=2)(x).transpose(1, 2) @ network.stages[1].downsample.reduction.weight.T
    merging = network.stages[1].downsample
    got = merging(x.permute(0, 2, 3, 1), "hr", True)
    torch.testing.assert_close(got.flatten(1, 2), merging.norm(unfolded), rtol=0, atol=1e-5)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"none of 1 weights ends with .*got names such as layers\.0\.weight"):
        published.from_published({"layers.0.weight": np.zeros(1)}, (2, 2))
