"""The PyTorch network under PyTorch's own tools: compile, export, autocast, 16 bits, checkpointing, drop path."""

import io
import json

import pytest
import torch
from loading import module_from_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from configs import tiny
from skysense_jax.export import write
from skysense_jax.modalities import select

COMMON = dict(depths=(2, 1, 1, 1), window=4)  # a shifted window in stage 1
NETWORKS = {"dense": {}, "mixture": dict(num_moe_blocks=2, num_experts=3)}
BATCH, ROWS, COLUMNS = 3, 5, 6  # cells


@pytest.fixture(scope="module")
def modelling(tmp_path_factory):
    """The modelling file of an exported directory as its user imports it: not watched by the tests' import hook."""
    directory = tmp_path_factory.mktemp("tools") / "exported"
    write.write_directory(directory, state={}, config={}, card="")
    return module_from_file(directory / "modeling_skysensev2.py")


@pytest.fixture(params=tuple(NETWORKS))
def model(request, modelling):
    return network(modelling, request.param)


def network(modelling, name, **options):
    fields = tiny.get_config().model
    backbone = {**fields.backbone, **COMMON, **NETWORKS[name]}
    description = write.describe(
        select(("hr", "s2", "s1")), backbone=backbone, fusion={**fields.fusion, "depth": 1}, training={}
    )
    torch.manual_seed(0)
    model = modelling.SkySenseV2(json.loads(json.dumps(description)), **options)
    with torch.no_grad():
        for weights in model.parameters():  # layer scales and biases far from their first values
            weights.add_(0.05 * torch.randn_like(weights))
    return model.eval()


def inputs(batch=BATCH, seed=0):
    """Keyword arguments: the same cells in all modalities, masked pixels, clouds, a date that is not there."""
    random = torch.Generator().manual_seed(seed)
    normal = lambda shape, mean, std: mean + std * torch.randn(shape, generator=random)  # noqa: E731
    valid = torch.rand((batch, 32 * ROWS, 32 * COLUMNS), generator=random) < 0.8
    present = torch.ones(batch, 3, dtype=torch.bool)
    present[0, 2] = False
    return {
        "images": {
            "hr": normal((batch, 3, 32 * ROWS, 32 * COLUMNS), 120.0, 50.0).clamp(0, 255),
            "s2": normal((batch, 3, 10, ROWS, COLUMNS), 1800.0, 900.0).clamp(1, 20000),
            "s1": normal((batch, 2, ROWS, COLUMNS), -15.0, 4.0),
        },
        "valid": {"hr": valid},
        "clear": {"s2": torch.rand((batch, 3, ROWS, COLUMNS), generator=random) < 0.7},
        "present": {"s2": present},
        "day_of_year": {"s2": torch.randint(1, 367, (batch, 3), generator=random)},
    }


def of_series(given):
    """Those of ``inputs`` that are not hr's: what traces fast."""
    return {key: {name: x for name, x in tree.items() if name != "hr"} for key, tree in given.items()}


def outputs(features):
    """All maps of a call, in one order."""
    maps = [x for name in sorted(features.stages) for x in features.stages[name]]
    return maps if features.fused is None else [*maps, features.fused]


class Whole(nn.Module):
    """The network with tensors in and a tuple of tensors out, as ``torch.export`` likes it."""

    def __init__(self, model, fuse=True):
        super().__init__()
        self.model, self.fuse = model, fuse

    def forward(self, images, valid, clear, present, day_of_year):
        masks = dict(valid=valid, clear=clear, present=present, day_of_year=day_of_year)
        return tuple(outputs(self.model(images, **masks, fuse=self.fuse)))


def assert_close(got, wanted, *, stds=1e-4):
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=stds * float(y.detach().std()))


def test_compile_with_aot_eager_equals_eager_with_gradients(modelling):
    model, given = network(modelling, "dense"), inputs()
    given = {key: {name: x for name, x in tree.items() if name == "s2"} for key, tree in given.items()}
    compiled = torch.compile(Whole(model), backend="aot_eager")
    results = []
    torch.compiler.reset()
    for run in (Whole(model), compiled):
        model.zero_grad()
        maps = run(**given)
        sum((x * x).sum() for x in maps).backward()
        gradients = {key: x.grad.clone() for key, x in model.named_parameters() if x.grad is not None}
        results.append(([x.detach() for x in maps], gradients))
    assert_close(results[1][0], results[0][0])
    assert results[0][1].keys() == results[1][1].keys()
    for key, wanted in results[0][1].items():
        torch.testing.assert_close(
            results[1][1][key], wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()), msg=key
        )


def test_compile_of_a_mixture_equals_eager_with_other_tokens_for_each_expert(modelling):
    layer = modelling.MixtureOfExperts(8, 16, num_experts=3, k=2)
    compiled = torch.compile(layer, backend="aot_eager")
    for seed in range(3):
        x = torch.randn((2, 5, 8), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), layer(x))


def assert_exports(model, given, fuse):
    """Exports for any batch, saves, loads, and compares at two batch sizes."""
    batch = torch.export.Dim("batch")
    shapes = {key: {name: {0: batch} for name in tree} for key, tree in given.items()}
    program = torch.export.export(Whole(model, fuse), (), given, dynamic_shapes=shapes, strict=True)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in (BATCH, 5):
        given = of_series(inputs(size, seed=size))
        with torch.no_grad():
            assert_close(loaded(**given), Whole(model, fuse)(**given))


def test_export_of_mixture_backbone_saves_and_loads_with_any_batch(modelling):
    assert_exports(network(modelling, "mixture"), of_series(inputs()), fuse=False)


def test_export_with_fusion_saves_and_loads_with_any_batch(modelling):
    assert_exports(network(modelling, "dense"), of_series(inputs()), fuse=True)


class TypesOf(TorchDispatchMode):
    """Records the element types that an operation is given."""

    def __init__(self, operation):
        super().__init__()
        self.operation, self.seen = operation, []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is self.operation:
            self.seen.append(args[0].dtype)
        return operation(*args, **(kwargs or {}))


def assert_near(got, wanted):
    """Most of what is there agrees to a few per cent; a token whose expert changed may not."""
    for x, y in zip(got, wanted, strict=True):
        assert torch.isfinite(x).all()
        apart = (x.float() - y).abs() / y.std()
        assert float(apart.median()) < 0.03
        assert float((apart > 0.3).float().mean()) < 0.05


def test_autocast_is_near_and_chooses_experts_in_fp32(model, request):
    given = inputs()
    with torch.no_grad():
        wanted = outputs(model(**given))
        with torch.autocast("cpu", dtype=torch.bfloat16), TypesOf(torch.ops.aten.topk.default) as types:
            got = outputs(model(**given))
    assert_near(got, wanted)
    mixtures = sum(type(module).__name__ == "MixtureOfExperts" for module in model.modules())
    assert types.seen == [torch.float32] * mixtures * len(given["images"])
    assert mixtures == (2 if request.node.callspec.params["model"] == "mixture" else 0)


def test_bfloat16_weights_are_near(model):
    given = inputs()
    with torch.no_grad():
        wanted = outputs(model(**given))
        got = outputs(model.to(torch.bfloat16)(**given))
    assert {x.dtype for x in got} == {torch.bfloat16}
    assert_near(got, wanted)


def test_gradient_checkpointing_changes_neither_values_nor_gradients(model):
    given, results = inputs(), []
    model.train()
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        maps = outputs(model(**given))
        sum((x * x).sum() for x in maps).backward()
        results.append((maps, {key: x.grad.clone() for key, x in model.named_parameters() if x.grad is not None}))
    assert_close(results[1][0], results[0][0], stds=1e-6)
    assert results[0][1].keys() == results[1][1].keys()
    for key, wanted in results[0][1].items():
        assert float(wanted.abs().max()) > 0 or "experts" in key or "embedding" in key, key
        torch.testing.assert_close(
            results[1][1][key], wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()), msg=key
        )


@pytest.mark.parametrize("name", NETWORKS)
def test_drop_path_is_active_in_training_mode_only(modelling, name):
    given, plain, dropping = inputs(), network(modelling, name), network(modelling, name, drop_path=0.5)
    with torch.no_grad():
        wanted = outputs(plain(**given))
        assert_close(outputs(dropping(**given)), wanted, stds=0)
        assert_close(outputs(plain.train()(**given)), wanted, stds=0)
        dropping.train()
        first, second = outputs(dropping(**given)), outputs(dropping(**given))
    assert not torch.equal(first[-1], wanted[-1])
    assert not torch.equal(first[-1], second[-1])
