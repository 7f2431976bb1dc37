"""ONNX graphs compute what PyTorch does; what a file says of itself; errors."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from loading import module_from_file

from configs import tiny
from skysense_jax.export import onnx as onnx_export
from skysense_jax.export import write
from skysense_jax.modalities import select

NETWORKS = {  # depths leave a shifted window in stage 1, and two mixtures
    "dense": dict(depths=(2, 1, 1, 1), window=4),
    "mixture": dict(depths=(2, 1, 1, 1), window=4, num_moe_blocks=2, num_experts=4, experts_per_token=2),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Exported directories with random weights: dense, and with two mixtures of experts."""
    fields, out = tiny.get_config().model, {}
    for name, changed in NETWORKS.items():
        directory = tmp_path_factory.mktemp("onnx") / name
        description = write.describe(
            select(("hr", "s2", "s1")),
            backbone={**fields.backbone, **changed},
            fusion=dict(fields.fusion),
            training={"step": 17},
        )
        description = json.loads(json.dumps(description))
        write.write_directory(directory, state={}, config=description, card="")  # for its modelling file
        torch.manual_seed(len(name))
        model = module_from_file(directory / "modeling_skysensev2.py").SkySenseV2(description)
        with torch.no_grad():
            for weights in model.parameters():  # layer scales and biases far from their first values
                weights.add_(0.1 * torch.randn_like(weights))
        directory = directory.with_name(f"{name}_whole")
        state = {key: value.numpy() for key, value in model.state_dict().items()}
        write.write_directory(directory, state=state, config=description, card="")
        out[name] = directory
    return out


def command(directory, out, *, modality="hr", size="44"):
    arguments = [f"--model={directory}", f"--modality={modality}", f"--size={size}", f"--out={out}"]
    return subprocess.run(
        [sys.executable, "-m", "skysense_jax.export.onnx", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def backbone_of(directory, modality):
    module = module_from_file(directory / "modeling_skysensev2.py")
    return module.FeaturesOnly(module.SkySenseV2.from_pretrained(directory, check_inputs=False), modality).eval()


def assert_equal_to_torch(path, backbone, size):
    session = onnxruntime.InferenceSession(path)
    m = backbone.model.modalities[backbone.modality]
    assert [(x.name, x.type, x.shape[1:]) for x in session.get_inputs()] == [
        ("images", "tensor(float)", [len(m.bands), size, size])
    ]
    assert [x.name for x in session.get_outputs()] == ["stage1", "stage2", "stage3", "stage4"]
    for batch in (2, 5):  # neither the example's nor those that the command checks
        rng = np.random.default_rng(batch)
        images = rng.uniform(*np.clip(m.value_range, *m.typical_range), (batch, len(m.bands), size, size))
        images = images.astype(np.float32)
        with torch.inference_mode():
            wanted = backbone(torch.from_numpy(images))
        for got, stage in zip(session.run(None, {"images": images}), wanted, strict=True):
            np.testing.assert_allclose(got, stage.numpy(), rtol=0, atol=1e-4 * float(stage.std()))


def test_command_writes_a_graph_that_equals_torch(directories, tmp_path):
    out = tmp_path / "graph.onnx"
    ran = command(directories["dense"], out, modality="hr", size="45")  # odd, and no multiple of a patch
    assert ran.returncode == 0, ran.stderr
    assert "largest difference from PyTorch" in ran.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["graph.onnx"]
    backbone = backbone_of(directories["dense"], "hr")
    assert_equal_to_torch(out, backbone, 45)
    m = backbone.model.modalities["hr"]
    assert {x.key: x.value for x in onnx.load(out).metadata_props} == {
        "modality": "hr",
        "bands": " ".join(m.bands),
        "unit": m.unit,
        "size": "45",
        "strides": "4 8 16 32",
        "model_step": "17",
    }


def test_mixture_with_weights_beside_the_graph_equals_torch(directories, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "LARGEST_FILE_BYTES", 2**20)  # as if the weights were above 2 GiB
    backbone, out = backbone_of(directories["mixture"], "s2"), tmp_path / "new" / "graph.onnx"
    properties = onnx_export.describe(backbone, size=7, step=None)
    assert properties["model_step"] == "unknown"
    assert onnx_export.write(backbone, size=7, out=out, properties=properties) <= onnx_export.TOLERANCE
    assert sorted(path.name for path in out.parent.iterdir()) == ["graph.onnx", "graph.onnx.data"]
    assert out.stat().st_size < 2**21
    assert_equal_to_torch(out, backbone, 7)
    with pytest.raises(ValueError, match=r"graph\.onnx exists"):
        onnx_export.write(backbone, size=7, out=out, properties={})


def test_graph_that_differs_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    of_other_network = torch.onnx.export(torch.nn.Linear(3, 2).eval(), (torch.zeros(1, 3),), dynamo=True, verbose=False)
    monkeypatch.setattr(onnx_export, "_trace", lambda backbone, size: of_other_network)
    for difference in (2e-4, float("nan")):
        monkeypatch.setattr(onnx_export, "compare", lambda *args, value=difference, **kwargs: value)
        with pytest.raises(ValueError, match=r"differ by .* standard deviation; wanted at most 0\.0001"):
            onnx_export.write(torch.nn.Identity(), size=3, out=tmp_path / "x.onnx", properties={"size": "3"})
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"modality": "s3"}, "--modality: 's3'; .* has hr, s2, s1"),
        ({"size": 0}, "--size: 0; wanted pixels"),
        ({"directory": "nowhere"}, "nowhere: no config.json"),
        ({"out": "/dev/null/graph.onnx"}, "--out: /dev/null/graph.onnx may not be written"),
    ],
)
def test_wrong_argument_is_said(directories, tmp_path, changed, message):
    given = {"directory": directories["dense"], "out": tmp_path / "graph.onnx", "modality": "hr", "size": 8, **changed}
    directory, out = (pathlib.Path(given[key]) for key in ("directory", "out"))
    with pytest.raises(ValueError, match=message):
        onnx_export.export(directory, out, modality=given["modality"], size=given["size"])
    assert not list(tmp_path.iterdir())


def test_wrong_argument_ends_in_one_line_and_without_jax(directories, tmp_path):
    code = "import sys; from skysense_jax.export import onnx; assert 'jax' not in sys.modules; onnx.main(sys.argv[1:])"
    arguments = [f"--model={directories['dense']}", "--modality=s3", "--size=8", f"--out={tmp_path / 'x.onnx'}"]
    ran = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith("error: --modality: 's3'")
    assert ran.stderr.count("\n") == 1


def test_missing_package_names_the_extra():
    code = "import sys; sys.modules['onnxruntime'] = None; import skysense_jax.export.onnx"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 1
    assert ran.stderr.startswith("error: ")
    assert 'pip install --editable ".[onnx]"' in ran.stderr
    assert ran.stderr.count("\n") == 1
