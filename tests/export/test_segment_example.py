"""docs/examples/segment_naip.py runs as its user runs it; its arithmetic; another library's decode head on the maps."""

import json
import os
import pathlib
import pickle
import re
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
from loading import module_from_file
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetHead

from configs import tiny
from skysense_jax.export import write
from skysense_jax.modalities import select

EXAMPLE = pathlib.Path(__file__).parents[2] / "docs" / "examples" / "segment_naip.py"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """An exported directory with random weights."""
    fields, root = tiny.get_config().model, tmp_path_factory.mktemp("segment")
    description = write.describe(
        select(("hr", "s2", "s1")), backbone={**fields.backbone}, fusion=dict(fields.fusion), training={}
    )
    write.write_directory(root / "code", state={}, config=description, card="")
    torch.manual_seed(0)
    model = module_from_file(root / "code" / "modeling_skysensev2.py").SkySenseV2(json.loads(json.dumps(description)))
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    write.write_directory(root / "exported", state=state, config=description, card="")
    return root / "exported"


class Trap:
    """Unpickled, it ends the process."""

    def __reduce__(self):
        return os._exit, (99,)


def write_chip(path, seed, side=64):
    """A chip in GEO-Bench's layout: a lake on the left, a wood on the right, a road, 15 (no data) at the top."""
    rng = np.random.default_rng(seed)
    label = np.full((side, side), 2, np.int64)
    label[:, : side // 3 + 3 * seed] = 1
    label[side // 2 : side // 2 + 6] = 6
    label[:2] = 15
    colours = {1: (0.1, 0.2, 0.4), 2: (0.2, 0.5, 0.2), 6: (0.7, 0.7, 0.7), 15: (0.0, 0.0, 0.0)}
    image = np.array([[colours[x] for x in row] for row in label.tolist()], np.float32)
    image = np.clip(image + rng.normal(0, 0.03, image.shape), 0, 1).astype(np.float32)
    with h5py.File(path, "w") as file:
        for band, name in enumerate(("Red", "Green", "Blue")):
            file[name] = image[..., band]
        file["NearInfrared"] = image[..., 1]
        file["label"] = label
        file.attrs["pickle"] = repr(pickle.dumps(Trap()))  # text, as in the real files


@pytest.fixture(scope="module")
def chips(tmp_path_factory):
    """Real chips if SKYSENSE_REALDATA names a folder of samples, else procedural ones in the same layout."""
    real = os.environ.get("SKYSENSE_REALDATA")
    if real:
        return pathlib.Path(real) / "chesapeake_naip_1m" / "geobench"
    folder = tmp_path_factory.mktemp("chips")
    for index in range(3):
        write_chip(folder / f"id_{index:06d}.hdf5", index)
    return folder


def command(*arguments):
    return subprocess.run(
        [sys.executable, EXAMPLE, *arguments], capture_output=True, text=True, timeout=300, check=False
    )


def assert_trained(printed, out, parts):
    for name in ("raw RGB", "features"):
        (line,) = (line for line in printed.splitlines() if line.startswith(f"{name}: loss"))
        first, last = re.fullmatch(rf"{name}: loss (\S+) at step 1, (\S+) at step .*", line).groups()
        assert float(last) < float(first), line
    assert sum("mIoU" in line and "pixel accuracy" in line for line in printed.splitlines()) == 3
    assert "majority class" in printed
    with safe_open(out, "pt") as file:
        assert {key.split(".")[0] for key in file.keys()} == parts  # noqa: SIM118


def test_example_trains_a_head_prints_scores_and_saves(directory, chips, tmp_path):
    out = tmp_path / "head.safetensors"
    ran = command(f"--model={directory}", f"--data={chips}", f"--out={out}", "--steps=8")
    assert ran.returncode == 0, ran.stderr
    assert_trained(ran.stdout, out, {"head"})


def test_example_trains_the_backbone_on_enlarged_chips(directory, chips, tmp_path, capsys):
    example, out = module_from_file(EXAMPLE), tmp_path / "head.safetensors"
    options = ["--steps=3", "--tune", "--scale=2"]
    example.run(example.parse([f"--model={directory}", f"--data={chips}", f"--out={out}", *options]))
    assert_trained(capsys.readouterr().out, out, {"head", "backbone"})
    before = load_file(directory / "model.safetensors")
    after = {key.removeprefix("backbone."): x for key, x in load_file(out).items()}
    assert not torch.equal(after["patch_embed.hr.projection.weight"], before["patch_embed.hr.projection.weight"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "nowhere"}, "--model: nowhere has no modeling_skysensev2.py"),
        ({"data": "nowhere"}, r"--data: 0 files \*.hdf5 in nowhere; wanted 2 or more chips"),
        ({"validate": "x"}, "--validate: 'x'; .* has id_"),
        ({"steps": 0}, "--steps: 0, "),
    ],
)
def test_wrong_argument_is_said(directory, chips, tmp_path, changed, message):
    example, given = module_from_file(EXAMPLE), {"model": directory, "data": chips, "steps": 1, **changed}
    arguments = [f"--out={tmp_path / 'x'}", *(f"--{key}={value}" for key, value in given.items())]
    with pytest.raises(ValueError, match=message):
        example.run(example.parse(arguments))
    assert not list(tmp_path.iterdir())


def test_wrong_argument_ends_in_one_line(directory, tmp_path):
    ran = command(f"--model={directory}", f"--data={tmp_path}", f"--out={tmp_path / 'x'}")
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (1, "", 1)
    assert ran.stderr.startswith("error: --data: 0 files")


def test_scores_equal_a_loop_over_pixels():
    example = module_from_file(EXAMPLE)
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 3, (7, 5)), rng.integers(0, 4, (7, 5))
    labels[0] = example.IGNORED
    shares, right, known = [], 0, 0
    for c in range(3):
        both = either = 0
        for got, wanted in zip(predicted.ravel(), labels.ravel()):
            if wanted != example.IGNORED:
                both += got == c and wanted == c
                either += c in (got, wanted)
        shares.append(both / either)
    for got, wanted in zip(predicted.ravel(), labels.ravel()):
        known += wanted != example.IGNORED
        right += wanted != example.IGNORED and got == wanted
    found = example.scores(torch.from_numpy(predicted), torch.from_numpy(labels))
    assert found == pytest.approx({"mIoU": 100 * np.mean(shares), "accuracy": 100 * right / known})


def test_chip_is_read_without_its_pickle_and_with_unknown_labels_ignored(tmp_path):
    example = module_from_file(EXAMPLE)
    write_chip(tmp_path / "a.hdf5", seed=1)
    image, label = example.read_chip(tmp_path / "a.hdf5")
    assert image.shape == (3, 64, 64)
    assert 100 < float(image.max()) <= 255
    assert (label[:2] == example.IGNORED).all()
    assert sorted(label[2:].unique().tolist()) == [0, 1, 5]
    with h5py.File(tmp_path / "a.hdf5", "a") as file:
        file["Red"][0, 0] = 1.5
    with pytest.raises(ValueError, match=r"RGB from 0 to 1\.5; wanted 0 to 1"):
        example.read_chip(tmp_path / "a.hdf5")


def test_another_decode_head_takes_the_maps_and_trains_the_backbone(directory):
    modelling = module_from_file(directory / "modeling_skysensev2.py")
    backbone = modelling.FeaturesOnly(modelling.SkySenseV2.from_pretrained(directory), "hr")
    config = UperNetConfig(hidden_size=32, num_labels=6, pool_scales=(1, 2))
    head = UperNetHead(config, in_channels=backbone.out_channels).train()
    maps = backbone(torch.rand(2, 3, 128, 160) * 255)
    assert [tuple(x.shape[1:]) for x in maps] == [
        (channels, 128 // stride, 160 // stride) for channels, stride in zip(backbone.out_channels, backbone.strides)
    ]
    logits = head(maps)
    assert logits.shape == (2, 6, 32, 40)
    assert torch.isfinite(logits).all()
    logits.square().mean().backward()
    gradients = {
        key: x.grad for key, x in backbone.model.named_parameters() if key.startswith(("stages", "patch_embed.hr"))
    }
    without = [key for key, x in gradients.items() if x is None or not x.abs().max() > 0]
    others = [key for key in without if "prompts.s2" not in key and "prompts.s1" not in key]
    assert not others, others
