"""The way back: a checkpoint from an exported directory or from published Swin V2 weights, and a run that goes on."""

import json
import shutil

import numpy as np
import pytest
import torch
from micro import mono_config
from safetensors.numpy import load_file, save_file
from saved import export_config
from transformers import Swinv2Config, Swinv2Model

from skysense_jax import checkpoint, train
from skysense_jax.config_checks import fields_of
from skysense_jax.export import __main__ as export
from skysense_jax.export import from_torch, write
from skysense_jax.trees import named_leaves

SMALL_RGB = dict(
    name="drone",
    bands=("R", "G", "B"),
    dtype="uint8",
    unit="8-bit digital number",
    value_range=(0, 255),
    typical_range=(2, 254),
    wrong_unit_hint="values 0-1",
    pixels_per_cell=8,
    patch=2,
    mean=(100, 100, 100),
    std=(50, 50, 50),
    statistics_source="none",
)


@pytest.fixture(scope="module")
def exported(run_dir, tmp_path_factory):
    """A folder with the same step exported as "fused" and as "all"."""
    folder = tmp_path_factory.mktemp("from_torch")
    for part in ("fused", "all"):
        export.main([f"--workdir={run_dir}", f"--out={folder / part}", f"--part={part}"])
    return folder


def restored(workdir):
    """The state of step 0 as saved, without a target."""
    with checkpoint.ocp.CheckpointManager(workdir / "checkpoints") as manager:
        assert manager.all_steps() == [0]
        arguments = checkpoint.ocp.args.Composite(state=checkpoint.ocp.args.StandardRestore())
        return manager.restore(0, args=arguments)["state"]


def test_exported_directory_comes_back_to_the_last_bit(exported, tmp_path):
    text = from_torch.initialise(export_config(), tmp_path / "run", model=exported / "all")
    assert "at their initial values: 0 parameters in 0 arrays" in text
    assert "in the source and not taken in 0 arrays" in text
    assert (tmp_path / "run" / "initialised_from.txt").read_text() == text
    export.main([f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'again'}", "--part=all"])
    for name in (write.WEIGHTS, write.HEADS):
        assert (tmp_path / "again" / name).read_bytes() == (exported / "all" / name).read_bytes()
    state = restored(tmp_path / "run")
    for path, leaf in named_leaves(state["student"]).items():
        np.testing.assert_array_equal(leaf, named_leaves(state["teacher"])[path])
    moments = named_leaves(state["optimizer"])
    assert all((np.asarray(leaf) == 0).all() for path, leaf in moments.items() if "/mu/" in path or "/nu/" in path)


def test_run_goes_on_from_the_checkpoint(exported, tmp_path):
    config = mono_config()  # s1 only
    from_torch.initialise(config, tmp_path, model=exported / "fused")
    before = named_leaves(restored(tmp_path)["teacher"])
    after = named_leaves(train.train(config, tmp_path).teacher)
    moved = [float(np.abs(np.asarray(after[path]) - before[path]).max()) for path in before]
    assert 0 < max(moved) < 0.01  # a fresh start would be elsewhere altogether
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, config.optim.num_steps + 1))


def test_other_modalities_keep_their_initial_values_and_rows_find_their_names(exported, tmp_path):
    config = export_config()
    config.data.update(
        modalities=("s1", "drone", "hr"), new_modalities=(SMALL_RGB,), num_dates=dict(s1=1, drone=1, hr=1)
    )
    text = from_torch.initialise(config, tmp_path, model=exported / "all")
    taken, kept, unused = (
        text.split("parameters in")[1:2][0],
        text.split("initial values")[1],
        text.split("not taken")[1],
    )
    assert "tokenizer_drone" not in taken
    assert "backbone/tokenizer_drone/projection/kernel" in kept
    assert "backbone/tokenizer_s2/projection/kernel" in unused
    assert "fusion/modality_embedding (rows [0, 2] of 3)" in taken
    ours = restored(tmp_path)["student"]["fusion"]["modality_embedding"]
    state = load_file(exported / "all" / write.WEIGHTS)
    np.testing.assert_array_equal(ours[0], state["fusion.modality_embedding.weight"][2])  # s1
    np.testing.assert_array_equal(ours[2], state["fusion.modality_embedding.weight"][0])  # hr
    assert np.abs(ours[1]).max() < 0.1


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model.backbone.width", 64, r"config\.model\.backbone\.width: 32, the config has 64"),
        ("model.fusion.depth", 3, r"config\.model\.fusion\.depth: 2, the config has 3"),
        ("data.modalities", ("drone",), "has the modalities hr, s2, s1 and none of the config's"),
    ],
)
def test_directory_of_another_network_is_refused_and_nothing_written(exported, tmp_path, field, value, message):
    config = export_config()
    config.data.update(new_modalities=(SMALL_RGB,), num_dates=dict(hr=1, s2=2, s1=2, drone=1))
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=message):
        from_torch.initialise(config, tmp_path / "run", model=exported / "fused")
    assert not (tmp_path / "run").exists()


def test_another_table_and_a_used_workdir_are_refused(exported, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(exported / "fused", copy)
    description = json.loads((copy / write.CONFIG).read_text())
    description["modalities"][2]["mean"][0] = 0.2
    (copy / write.CONFIG).write_text(json.dumps(description))
    sums = (copy / write.CHECKSUMS).read_text().splitlines()
    sums = [line for line in sums if write.CONFIG not in line] + [
        f"{write._sha256(copy / write.CONFIG)}  {write.CONFIG}"
    ]
    (copy / write.CHECKSUMS).write_text("\n".join(sums))
    with pytest.raises(ValueError, match=r"modality 's1'\.mean: \[0\.2, .*the config has \[-12"):
        from_torch.initialise(export_config(), tmp_path / "run", model=copy)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"--workdir: .* exists"):
        from_torch.initialise(export_config(), tmp_path / "run", model=exported / "fused")
    with pytest.raises(ValueError, match="--model, --swin: wanted one of them"):
        from_torch.initialise(export_config(), tmp_path / "other")


@pytest.fixture(scope="module")
def swin_dir(tmp_path_factory):
    torch.manual_seed(1)
    config = Swinv2Config(embed_dim=32, depths=[2, 1], num_heads=[1, 2], window_size=8, image_size=64)
    directory = tmp_path_factory.mktemp("swin")
    Swinv2Model(config).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("form", ["directory", "pth"])
def test_published_weights_initialise_stages_1_and_2_and_say_so(swin_dir, tmp_path, form):
    source = swin_dir
    theirs = Swinv2Model.from_pretrained(swin_dir).state_dict()
    if form == "pth":
        source = tmp_path / "swin.pth"
        torch.save({"state_dict": theirs}, source)
    text = from_torch.initialise(export_config(), tmp_path / "run", swin=source)
    taken, rest = text.split("at their initial values")
    kept, unused = rest.split("in the source and not taken")
    for path in ("backbone/stage1_0/attention/key/kernel", "backbone/tokenizer_hr/projection/kernel"):
        assert path in taken
    assert "backbone/merging_2/kernel" in taken
    assert "backbone/tokenizer_s2/projection/kernel" in kept
    assert "backbone/stage3/" in kept or "backbone/stage3_experts/" in kept
    assert "encoder.layers.0.blocks.1.attention.self.query.weight" in unused  # the run's stage 1 has one block
    student = restored(tmp_path / "run")["student"]["backbone"]
    kernel = np.asarray(student["stage2_0"]["attention"]["key"]["kernel"])
    np.testing.assert_array_equal(kernel.T, theirs["encoder.layers.1.blocks.0.attention.self.key.weight"])
    assert ("position bias: learned in windows of" in text) == (form == "pth")  # only the folder tells its window
    # neighbours lie column by column on both sides
    merging = theirs["encoder.layers.0.downsample.reduction.weight"]
    np.testing.assert_array_equal(np.asarray(student["merging_2"]["kernel"]).T, merging)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "--swin: there is no"),
        (lambda path: path.mkdir(), "holds neither model.safetensors nor pytorch_model.bin"),
        (lambda path: path.write_bytes(b"not a checkpoint"), "cannot be read as plain arrays"),
        (lambda path: torch.save({"weights": print}, path), "cannot be read as plain arrays"),
        (lambda path: torch.save([torch.zeros(1)], path), "cannot be read as plain arrays: it holds list"),
        (lambda path: torch.save({"model": "swin"}, path), "none of 0 weights ends with"),
    ],
)
def test_bad_weight_files_are_refused_without_running_them(tmp_path, make, message):
    path = tmp_path / "swin.pth"
    make(path)
    with pytest.raises(ValueError, match=message):
        from_torch.initialise(export_config(), tmp_path / "run", swin=path)
    assert not (tmp_path / "run").exists()


def test_weights_of_another_width_are_refused(swin_dir, tmp_path):
    config = export_config()
    config.model.backbone.width = 64
    with pytest.raises(ValueError, match=r"width 64 with 2 heads; .*\(width, heads\) \(32, 1\)"):
        from_torch.initialise(config, tmp_path / "run", swin=swin_dir)
    assert not (tmp_path / "run").exists()


def test_every_field_of_the_config_is_in_the_exported_directory(exported):
    training = json.loads((exported / "fused" / write.CONFIG).read_text())["training"]
    assert set(training["config"]) == set(fields_of(export_config()))


def test_half_precision_source_becomes_a_run_in_fp32(exported, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(exported / "fused", copy)
    state = {name: array.astype(np.float16) for name, array in load_file(copy / write.WEIGHTS).items()}
    save_file(state, copy / write.WEIGHTS)
    with pytest.raises(ValueError, match=r"model\.safetensors: SHA-256 .*--noverify"):
        from_torch.initialise(export_config(), tmp_path / "run", model=copy)
    from_torch.initialise(export_config(), tmp_path / "run", model=copy, verify=False)
    kernel = np.asarray(restored(tmp_path / "run")["student"]["backbone"]["stage1_0"]["mlp"]["hidden"]["kernel"])
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel.T, state["stages.0.blocks.0.ffn.layers.0.0.weight"].astype(np.float32))


def test_killed_initialisation_leaves_no_workdir(exported, tmp_path, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(from_torch, "report", killed)
    with pytest.raises(KeyboardInterrupt):
        from_torch.initialise(export_config(), tmp_path / "run", model=exported / "fused")
    assert [path.name for path in tmp_path.iterdir()] == [".run.incomplete"]
    monkeypatch.undo()
    from_torch.initialise(export_config(), tmp_path / "run", model=exported / "fused")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
