"""The export command: what it writes, what it refuses, and that nothing half-written is left."""

import hashlib
import json
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from loading import module_from_file
from safetensors.numpy import load_file
from saved import export_config

from skysense_jax import checkpoint
from skysense_jax.export import __main__ as command
from skysense_jax.export import card, write

MODELLING = "modeling_skysensev2.py"

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def exported(run_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "model"
    command.main([f"--workdir={run_dir}", f"--out={out}", "--part=all", "--licence=CC-BY-4.0"])
    return out


def images(batch=1):
    rng = np.random.default_rng(0)
    draw = lambda low, high, *shape: torch.tensor(rng.uniform(low, high, (batch, *shape)), dtype=torch.float32)  # noqa: E731
    return {"hr": draw(0, 255, 3, 64, 96), "s2": draw(100, 3000, 2, 10, 2, 3), "s1": draw(-25, -5, 2, 2, 3)}


def test_directory_is_complete_and_its_checksums_hold(exported):
    sums = dict(reversed(line.split()) for line in (exported / "SHA256SUMS").read_text().splitlines())
    names = {path.name for path in exported.iterdir()} - {"SHA256SUMS"}
    assert set(sums) == names == {*write.COPIED, write.WEIGHTS, write.CONFIG, write.CARD, write.HEADS}
    for name, digest in sums.items():
        assert hashlib.sha256((exported / name).read_bytes()).hexdigest() == digest
        assert (exported / name).stat().st_mode & 0o777 == (exported / write.CONFIG).stat().st_mode & 0o777


def test_config_holds_architecture_table_and_training(exported):
    config = json.loads((exported / write.CONFIG).read_text())
    assert config["backbone"]["depths"] == [1, 1, 1, 1]
    assert config["backbone"]["num_moe_blocks"] == 1
    s2 = config["modalities"][1]
    assert s2["name"] == "s2"
    assert s2["bands"] == ["B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B11", "B12"]
    assert s2["gsd_m"] == 10
    assert len(s2["mean"]) == len(s2["std"]) == 10
    assert "x 10000" in s2["unit"]
    assert "1-366" in config["date"]
    assert config["training"]["step"] == 10
    assert config["training"]["config"]["optim.num_steps"] == 10


def test_card_says_step_losses_probe_licence_and_commands(exported):
    text_of_card = (exported / write.CARD).read_text()
    for text in (
        "after step 10",
        "| loss | 1 |",
        "| loss/mgcl | 2.5 |",
        "| osm/miou | 0.25 |",
        "| forest_type/miou | not scored |",
        "| loss/koleo | nan |",
        "license: cc-by-4.0",
        "--config=configs/micro.py",
        "--config.model.backbone.num_moe_blocks=1",
        "--licence=CC-BY-4.0",
        "sha256sum --check",
    ):
        assert text in text_of_card, text
    assert "learning_rate |" not in text_of_card
    assert "{" not in text_of_card.replace("{name}", "").split("## Use")[0], "a field of the template was left unfilled"


def test_card_keeps_scores_on_labelled_data_of_the_user_to_itself(tmp_path):
    scores = {"osm/miou": 0.25, "osm/knn_miou": 0.2, "fields/miou": 0.5, "fields/knn_miou": 0.4, "roof/accuracy": 0.75}
    (tmp_path / "probe.json").write_text(json.dumps({"step": 10, "teacher": scores}))
    assert card.probe_scores(tmp_path, 10, labelled=["fields"]) == {"osm/miou": 0.25, "roof/accuracy": 0.75}
    assert card.probe_scores(tmp_path, 9, labelled=["fields"]) == {}


@pytest.mark.parametrize(("weights", "step"), [("teacher", 3), ("student", 3), ("student", 10)])
def test_weights_and_step_are_those_asked_for(run_dir, tmp_path, monkeypatch, weights, step):
    out = tmp_path / "model"
    monkeypatch.chdir(run_dir.parent)
    command.main(
        [f"--workdir={run_dir.name}", f"--out={out}", f"--weights={weights}", f"--step={step}", "--part=backbone"]
    )
    state = load_file(out / write.WEIGHTS)
    with checkpoint.ocp.CheckpointManager(run_dir / "checkpoints") as manager:  # read by Orbax alone
        arguments = checkpoint.ocp.args.Composite(state=checkpoint.ocp.args.StandardRestore())
        saved = manager.restore(step, args=arguments)["state"][weights]["backbone"]
    wanted = np.asarray(saved["stage2_0"]["mlp"]["hidden"]["kernel"]).T
    np.testing.assert_array_equal(state["stages.1.blocks.0.ffn.layers.0.0.weight"], wanted)
    assert not [name for name in state if name.startswith("fusion")]
    model = module_from_file(out / MODELLING).SkySenseV2.from_pretrained(out)
    assert model(images()).fused is None


def test_network_runs_on_raw_numbers_and_checks_their_unit(exported):
    module = module_from_file(exported / MODELLING)
    model = module.SkySenseV2.from_pretrained(exported)
    x = images()
    out = model({**x, "hr": x["hr"].to(torch.uint8)})
    assert [tuple(y.shape) for y in out.stages["hr"]] == [
        (1, 32, 16, 24),
        (1, 64, 8, 12),
        (1, 128, 4, 6),
        (1, 256, 2, 3),
    ]
    assert out.stages["s2"][3].shape == (1, 2, 256, 2, 3)
    assert out.fused.shape == (1, 32, 2, 3)
    assert out.fused_valid.all()
    normalised = module.SkySenseV2.from_pretrained(exported, normalise=False)
    row = model.modalities["s1"]
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (row.mean, row.std))
    got = normalised({"s1": (x["s1"] - mean) / std}).stages["s1"][3]
    torch.testing.assert_close(got, model({"s1": x["s1"]}).stages["s1"][3])
    with pytest.raises(ValueError, match=r"s1, band VV, sample 0: mean .* wanted -40 to -0\.5 .*linear power"):
        model({"s1": 10 ** (x["s1"] / 10)})
    with pytest.raises(ValueError, match=r"s2, band B2, sample 0: mean .*reflectance 0-1"):
        model({"s2": x["s2"] / 10000})
    with pytest.raises(ValueError, match=r"s2: images of shape .*10 bands B2 B3"):
        model({"s2": x["s2"][:, :, :9]})
    with pytest.raises(ValueError, match="lidar"):
        model({"lidar": x["s1"]})
    with pytest.raises(ValueError, match="cells differ"):
        model({"s2": x["s2"], "s1": x["s1"][..., :2]})
    with pytest.raises(ValueError, match=r"masks or days of s2, of which there are no images"):
        model({"s1": x["s1"]}, present={"s2": torch.ones(1, 2, dtype=torch.bool)})
    two = torch.cat((x["s1"], x["s1"]))
    two[1, 1] = 60
    with pytest.raises(ValueError, match=r"s1, band VH, sample 1: mean 60"):
        model({"s1": two})
    with pytest.raises(ValueError, match="none of them 0"):
        model({"s1": x["s1"][:0]})
    with pytest.raises(ValueError, match=r"days torch\.bool"):
        model({"s1": x["s1"]}, day_of_year={"s1": torch.ones(1, 1, dtype=torch.bool)})
    with pytest.raises(ValueError, match="out_indices"):
        module.SkySenseV2.from_pretrained(exported, out_indices=(4,))
    with pytest.raises(ValueError, match="modality 's3'"):
        module.FeaturesOnly(model, "s3")
    short = model({"s1": x["s1"]}, day_of_year={"s1": torch.full((1, 1), 200, dtype=torch.int16)})
    assert not torch.equal(short.fused, model({"s1": x["s1"]}).fused)
    with pytest.raises(ValueError, match="wanted 1-366"):
        model({"s1": x["s1"]}, day_of_year={"s1": torch.tensor([[367]])})
    with pytest.raises(ValueError, match="wanted bool of"):
        model({"s1": x["s1"]}, valid={"s1": torch.ones(1, 2, 2, dtype=torch.bool)})
    with pytest.raises(ValueError, match="VV VH"):
        model.band_order("s1", ["VH", "HH"])
    assert model.band_order("s1", ["VH", "angle", "vv"]) == [2, 0]
    product = ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12"]
    assert model.band_order("s2", product) == [1, 2, 3, 4, 5, 6, 7, 8, 10, 11]
    with pytest.raises(ValueError, match="modality 'l8'"):
        model.band_order("l8", product)
    with pytest.raises(ValueError, match="images: got Tensor; wanted a dict"):
        model(x["s1"])


def test_features_do_not_depend_on_what_is_masked_or_absent(exported):
    model = module_from_file(exported / MODELLING).SkySenseV2.from_pretrained(exported)
    x = images(2)
    valid = {"hr": torch.ones(2, 64, 96, dtype=torch.bool), "s1": torch.ones(2, 2, 3, dtype=torch.bool)}
    valid["hr"][:, :32, 32:64] = False
    valid["s1"][0, 1, 2] = False
    present = {"s2": torch.tensor([[True, False], [False, False]])}
    scrambled = {**x, "s2": x["s2"].clone()}
    scrambled["s2"][~present["s2"]] = float("nan")
    for name in ("hr", "s1"):
        scrambled[name] = torch.where(valid[name][:, None], x[name], float("nan"))
    wanted, got = (model(y, valid=valid, present=present) for y in (x, scrambled))
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=False)
    assert not got.valid["hr"][:, 0, 1].any()
    assert (got.stages["hr"][3][:, :, 0, 1] == 0).all()
    alone = model({"hr": x["hr"][1:], "s1": x["s1"][1:]}, valid={name: mask[1:] for name, mask in valid.items()})
    torch.testing.assert_close(alone.fused, got.fused[1:], rtol=0, atol=1e-5)
    cloudy = model(x, valid=valid, present=present, clear={"hr": torch.zeros(2, 64, 96, dtype=torch.bool)})
    torch.testing.assert_close(cloudy.stages["hr"], got.stages["hr"])
    without = model({"s2": x["s2"], "s1": x["s1"]}, valid={"s1": valid["s1"]}, present=present)
    torch.testing.assert_close(cloudy.fused, without.fused, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (write.WEIGHTS, lambda path: path.unlink(), "no model.safetensors"),
        (write.CHECKSUMS, lambda path: path.unlink(), "no SHA256SUMS"),
        (write.CONFIG, lambda path: path.write_text(path.read_text() + " "), "config.json: SHA-256 .*damaged"),
        (
            write.WEIGHTS,
            lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
            "model.safetensors: SHA-256",
        ),
    ],
)
def test_damaged_directory_is_refused(exported, tmp_path, name, damage, message):
    copy = tmp_path / "model"
    shutil.copytree(exported, copy)
    damage(copy / name)
    with pytest.raises(ValueError, match=message):
        module_from_file(exported / MODELLING).SkySenseV2.from_pretrained(copy)
    with pytest.raises(ValueError, match=message.removesuffix(".*damaged")):
        write.read_config(copy)


@pytest.mark.parametrize("text", ["[1]", "5", "{", '{"format_version": 1}'])
def test_config_that_is_none_is_refused(exported, tmp_path, text):
    copy = tmp_path / "model"
    shutil.copytree(exported, copy)
    (copy / write.CONFIG).write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: (not what|field 'modalities' is missing)"):
        module_from_file(exported / MODELLING).SkySenseV2.from_pretrained(copy, verify=False)
    if "format_version" not in text:
        with pytest.raises(ValueError, match=r"config\.json: not what"):
            write.read_config(copy, verify=False)


def test_weights_of_another_architecture_are_refused(exported, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(exported, copy)
    config = json.loads((copy / write.CONFIG).read_text())
    config["backbone"]["width"] = 64
    (copy / write.CONFIG).write_text(json.dumps(config))
    module = module_from_file(exported / MODELLING)
    with pytest.raises(ValueError, match=r"weights do not fit config.json: .*\(32,\), wanted \(64,\)"):
        module.SkySenseV2.from_pretrained(copy, verify=False)
    (copy / write.CONFIG).write_text(json.dumps({**config, "format_version": 7}))
    with pytest.raises(ValueError, match="format_version 7"):
        module.SkySenseV2.from_pretrained(copy, verify=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--step": "4"}, r"steps \[3, 10\]; wanted step 4"),
        ({"--workdir": "nowhere"}, "there is no .*nowhere/checkpoints"),
        ({"--out": "."}, "--out: . exists"),
    ],
)
def test_wrong_arguments_end_in_one_line_and_write_nothing(run_dir, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept").write_text("")
    flags = {"--workdir": str(run_dir), "--out": "model", **changes}
    with pytest.raises(SystemExit, match=message) as error:
        command.main([f"{flag}={value}" for flag, value in flags.items()])
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_checkpoint_of_another_version_is_refused(tmp_path, monkeypatch):
    config = export_config().unlock()
    config.model.backbone.spiral = True
    text = command.config_lib.flat_text(config)
    monkeypatch.setattr(checkpoint, "read_meta", lambda workdir, step: {"config": text})
    with pytest.raises(SystemExit, match=r"not that of skysense_jax .*spiral"):
        command.main([f"--workdir={tmp_path}", f"--out={tmp_path / 'model'}"])


def test_failed_and_killed_exports_leave_no_directory(run_dir, tmp_path, monkeypatch):
    out = tmp_path / "model"
    arguments = [f"--workdir={run_dir}", f"--out={out}", "--part=backbone"]

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(write, "save_file", fail)
    with pytest.raises(SystemExit, match="error: no space left"):
        command.main(arguments)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    code = (
        "import os, signal, sys\nfrom skysense_jax.export import __main__, write\n"
        "write.shutil.copyfile = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n__main__.main(sys.argv[1:])"
    )
    killed = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, timeout=300, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".model.incomplete"]
    command.main(arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_full_disk_is_told_before_anything_is_written(run_dir, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(write.shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(SystemExit, match=r"--out: .* GiB are needed"):
        command.main([f"--workdir={run_dir}", f"--out={tmp_path / 'model'}"])
    assert not list(tmp_path.iterdir())


def test_directory_needs_torch_and_safetensors_only(exported):
    code = """
import sys
not_there = "jax jaxlib flax optax orbax grain transformers huggingface_hub timm einops jaxtyping beartype absl"
not_there += " ml_collections msgpack rasterio h5py sklearn scipy PIL matplotlib tensorboardX skysense_jax"
sys.modules |= dict.fromkeys(not_there.split())
sys.path.insert(0, sys.argv[1])
import torch
from modeling_skysensev2 import SkySenseV2
model = SkySenseV2.from_pretrained(sys.argv[1])
print(tuple(model({"s1": torch.full((1, 2, 3, 4), -12.0)}).fused.shape))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(exported)], capture_output=True, text=True, timeout=300, check=False, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 32, 3, 4)"


def test_hugging_face_loads_saves_and_checkpoints(exported, tmp_path, monkeypatch):
    import transformers
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    module = module_from_file(exported / MODELLING)
    wanted = module.SkySenseV2.from_pretrained(exported)(images()).fused
    model = transformers.AutoModel.from_pretrained(exported, trust_remote_code=True)
    assert not model.training
    torch.testing.assert_close(model(images()).fused, wanted, rtol=0, atol=0)
    model.gradient_checkpointing_enable()
    flags = [part.gradient_checkpointing for part in model.modules() if hasattr(part, "gradient_checkpointing")]
    assert flags == [True] * 5
    model.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModel.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    torch.testing.assert_close(again(images()).fused, wanted, rtol=0, atol=0)
    plain = module.SkySenseV2.from_pretrained(tmp_path / "saved", verify=False)
    torch.testing.assert_close(plain(images()).fused, wanted, rtol=0, atol=0)
    model.save_pretrained(tmp_path / "trained", state_dict=model.state_dict())  # as its Trainer does
    assert set(load_file(tmp_path / "trained" / write.WEIGHTS)) == set(load_file(exported / write.WEIGHTS))
    other = transformers.AutoModel.from_pretrained(exported, trust_remote_code=True, normalise=False, drop_path=0.3)
    assert not other.network.normalise
    assert other.network.fusion.layers[-1].drop_path == 0.3


def test_hugging_face_refuses_missing_weights_and_changed_bytes(exported, tmp_path, monkeypatch):
    import transformers
    from safetensors.numpy import save_file
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    copy = tmp_path / "model"
    shutil.copytree(exported, copy)
    state = load_file(copy / write.WEIGHTS)
    del state["fusion.cls_token"]
    save_file(state, copy / write.WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="SHA-256"):
        transformers.AutoModel.from_pretrained(copy, trust_remote_code=True)
    with pytest.raises(ValueError, match=r"1 weights do not fit config\.json: .*cls_token"):
        transformers.AutoModel.from_pretrained(copy, trust_remote_code=True, verify=False)


def test_features_only_gives_maps_channels_and_strides(exported):
    module = module_from_file(exported / MODELLING)
    model = module.SkySenseV2.from_pretrained(exported, out_indices=(1, 3))
    backbone = module.FeaturesOnly(model, "hr")
    assert (backbone.out_channels, backbone.strides) == ([64, 256], [8, 32])
    assert [tuple(x.shape) for x in backbone(images()["hr"])] == [(1, 64, 8, 12), (1, 256, 2, 3)]
    series = module.FeaturesOnly(model, "s2")
    assert series.strides == [1, 1]
    x = images()["s2"]
    torch.testing.assert_close(series(x)[1], model({"s2": x}).stages["s2"][1].mean(1))


def test_gradient_reaches_every_weight(exported):
    model = module_from_file(exported / MODELLING).SkySenseV2.from_pretrained(exported, check_inputs=False)
    out = model(images(4))
    (out.fused.square().mean() + sum(y.square().mean() for maps in out.stages.values() for y in maps)).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not [name for name in without if ".experts." not in name], without  # an expert may get no token
