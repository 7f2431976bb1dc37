"""Names of targets, the clouds' own among them, and the topologies that compilers know."""

import pytest

from skysense_jax import targets


@pytest.mark.parametrize(
    ("text", "kind", "chips", "slices", "topology"),
    [
        ("v5p:64", "v5p", 64, 1, "v5p:4x4x4"),
        ("v5p-128", "v5p", 64, 1, "v5p:4x4x4"),
        ("v5p:4", "v5p", 4, 1, "v5p:2x2x1"),
        ("V5P:1024", "v5p", 1024, 1, "v5p:8x8x16"),
        ("v5litepod-256", "v5e", 256, 1, "v5e:16x16"),
        ("v5e:8", "v5e", 8, 1, "v5e:2x4"),
        ("v6e:1024", "v6e", 1024, 4, "v6e:16x16"),
        ("h200:64", "h200", 64, 1, "1x8x8"),
        ("h20:128", "h20", 128, 1, "1x16x8"),
        ("h100:1", "h100", 1, 1, "1x1x1"),
    ],
)
def test_parse_knows_chips_slices_and_topology(text, kind, chips, slices, topology):
    target = targets.parse(text)
    assert (target.chip.name, target.num_chips, target.num_slices) == (kind, chips, slices)
    assert target.topology == topology


def test_parse_explains_what_a_clouds_name_counts():
    assert targets.parse("v5p-128").remark == "v5p-128 is the cloud's own name and counts cores: 64 chips"
    assert "counts chips: 16 chips" in targets.parse("v6e-16").remark
    assert targets.parse("v5p:128").remark == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5p", "wanted KIND:CHIPS"),
        ("h300:8", r"unknown chip 'h300' \(nearest: h\d+\); wanted one of v5e v5p v6e h20 h100 h200"),
        ("tpu:8", "unknown chip 'tpu'.*wanted one of"),
        ("h200:12", "whole hosts"),
        ("v5p:0", "wanted 1, 2, 4, 8"),
        ("v5p:48", "wanted 1, 2, 4, 8"),
        ("v5e:384", "whole slices"),
        ("v5p-63", "no whole chip"),
    ],
)
def test_parse_wrong_target_is_refused(text, message):
    with pytest.raises(ValueError, match=rf"target: .*{message}"):
        targets.parse(text)
