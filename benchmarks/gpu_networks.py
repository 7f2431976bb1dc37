"""The networks of gpu.py: forward + backward of a backbone by kernel, and a whole training step.

The backbone has dense MLPs, no drop path, and layer scales of 0.1, so that a wrong block shows in what it gives.
Next: contest.py, gpu_torch.py, benchmarks/step.py (the same with all modalities, against ``transformers``).
"""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks.contest import Contestant, Prepared, Report, Setting
from benchmarks.gpu_kernels import PASSES
from skysense_jax import assembly, compiler, cost, sharding, trace, train_state
from skysense_jax import config as config_lib
from skysense_jax.batch import Batch
from skysense_jax.export import names, write
from skysense_jax.kernels import window as window_kernel
from skysense_jax.modalities import Modality, select
from skysense_jax.models.backbone import Backbone
from skysense_jax.models.skysense import make_backbone
from skysense_jax.trees import named_leaves, path_string

# Weights whose gradients are compared: what lies under all blocks, and the projections of one of each kind of block.
CHECKED = (
    "patch_embed.hr.projection.weight",
    "stages.0.blocks.0.attn.w_msa.qkv.weight",
    "stages.2.blocks.0.attn.attn.in_proj_weight",
)
_TRACED = 2  # steps
ATTENTION = ("xla", "cudnn", "cudnn+triton")  # of config.efficiency.attention


def memory(compiled: Any, device: Any) -> str:
    """What a compiled program asks for, and the most that was in use on the device until now, if it counts."""
    asked = compiled.memory_analysis()
    assert asked is not None, device
    num_bytes = asked.argument_size_in_bytes + asked.output_size_in_bytes + asked.temp_size_in_bytes
    text = f"asks {(num_bytes - asked.alias_size_in_bytes) / 2**30:.2f} GiB"
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return text if peak is None else f"{text}, peak so far {peak / 2**30:.2f} GiB"


# ---- the backbone


def backbone(report: Report, setting: Setting, config: ConfigDict, *, remat: str) -> None:
    """Forward + backward of a config's backbone on aerial images, with each kernel, and of the same in PyTorch."""
    rows = select(("hr",))
    fields = {**config.model.backbone, "num_moe_blocks": 0, "drop_path": 0.0, "layer_scale_init": 0.1}
    images, valid = _aerial(rows[0], setting)
    device = jax.devices()[0]

    def network(dtype: Any, **how: Any) -> Backbone:
        return make_backbone(rows, **fields, **how, compute_dtype=dtype)

    params = jax.jit(lambda: sharding.unbox(network(jnp.bfloat16).init(jax.random.key(0), images, valid, train=False)))
    params = params()
    weights = list(names.weights(rows, backbone=fields, fusion=None))

    def read(found: Mapping[str, Any]) -> dict[str, Any]:
        used = [weight for weight in weights if weight.name in CHECKED]
        paths = {path for weight in used for path in weight.paths}
        gradients = {path: np.asarray(x) for path, x in _by_path(found["gradients"]).items() if path in paths}
        return {"out": found["out"]} | {f"d_{name}": x for name, x in names.join(used, gradients).items()}

    def compiled(dtype: Any, **how: Any) -> Any:
        model = network(dtype, **how)

        def loss(params, images):
            features = model.apply(params, images, valid, train=True).features["hr"]
            return jnp.square(features.astype(jnp.float32)).mean(), features

        def run(params, images):
            gradients, out = jax.grad(loss, has_aux=True)(params, images)
            return {"out": out, "gradients": gradients}

        return jax.jit(run, compiler_options=compiler.options(jax.devices()[0])).lower(params, images).compile()

    def prepare(how: Mapping[str, Any]) -> Prepared:
        program = compiled(jnp.bfloat16, **how)
        return Prepared(lambda: program(params, images), read=read, further=lambda: memory(program, device))

    def reference() -> dict[str, Any]:
        with jax.default_matmul_precision("highest"):
            return read(compiled(jnp.float32, remat="none" if setting.tiny else "blocks")(params, images))

    def of_torch() -> Prepared:
        description = write.describe(rows, backbone=fields, fusion=None, training={})
        state = names.join(weights, {path: np.array(x) for path, x in _by_path(params).items()})
        return setting.torch.backbone(description, state, images["hr"], CHECKED)

    contestants = []
    for name in ATTENTION:
        how, told = _efficiency(config, name, fields, remat)
        contestants.append(Contestant(name, lambda how=how: prepare(how), told))
    if setting.tiny and setting.platform == "cpu":
        how = dict(window_attention="triton interpreted")
        contestants.append(Contestant("triton interpreted", lambda: prepare(how)))
    contestants.append(Contestant("torch", of_torch, setting.no_torch))
    cells = setting.pixels // rows[0].pixels_per_cell
    flops = 3 * setting.images * cost.backbone_flops(rows[0], cells, **{k: fields[k] for k in cost.COSTLY})
    case = f"{config.name}, {setting.images} x {setting.pixels} px, remat {remat}"
    report.contest("backbone", case, PASSES[1], contestants, flops=flops, reference=reference, samples=setting.images)
    setting.release()


def _aerial(row: Modality, setting: Setting) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Normalised images [B 1 H W C] and what is valid of their tokens: all."""
    shape = (setting.images, 1, setting.pixels, setting.pixels, row.num_bands)
    tokens = (setting.pixels // row.patch,) * 2
    images = jax.random.normal(jax.random.key(1), shape, jnp.float32)
    return {row.name: images}, {row.name: jnp.ones((*shape[:2], *tokens), bool)}


def _by_path(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the backbone by the paths that ``export/names.py`` has."""
    return {f"backbone/{path}": leaf for path, leaf in named_leaves(params["params"]).items()}


def _efficiency(config: ConfigDict, attention: str, fields: Mapping[str, Any], remat: str) -> tuple[dict, str]:
    """The network's arguments for a kind of attention, and why it is not here (empty if it is)."""
    config = config.copy_and_resolve_references()
    config.efficiency.attention = attention
    try:
        how = assembly.efficiency(config)
    except ValueError as error:
        return {}, str(error)
    told = ""
    if how["window_attention"] == "triton":  # a block that the kernel does not take would be "xla" without a word here
        sizes = {key: fields[key] for key in ("window", "width", "head_width")} | dict(columns=fields["window"])
        told = window_kernel.problem("triton", **sizes, itemsize=2, shifted=False, tensor_devices=1)
    return {**how, "remat": remat}, told


# ---- the whole step


def step(report: Report, config: ConfigDict, *, batch: int, attention: str, folder: pathlib.Path | None = None) -> None:
    """A training step of the config, at ``batch`` samples or, halved until it fits, fewer; traced into ``folder``."""
    config = config.copy_and_resolve_references().unlock()
    config.mesh.update(dict.fromkeys(sharding.MESH_AXES, 1))
    config.efficiency.attention = attention
    try:
        how = assembly.efficiency(config)
        name, told = f"{attention}: {how['attention']}, in windows {how['window_attention']}", ""
    except ValueError as error:
        name, told = attention, str(error)
    while True:
        config.data.batch_size = config.parts.logits = batch  # prototype logits of a sample at a time
        config.parts.microbatches = 1
        config_lib.validate(config, num_devices=1)
        rows = select(config.data.modalities, config.data.new_modalities)
        contestant = Contestant(name, lambda: _prepared_step(config, folder), told)
        results = report.contest(
            "step",
            f"{config.name}, batch {batch}, remat {config.efficiency.remat}",
            "training step",
            [contestant],
            flops=assembly.batch_flops(config, rows),
            samples=batch,
            may_not_fit=batch > 1,
        )
        if not results[name].told.startswith("does not fit"):
            break
        batch //= 2
    traces = sorted(folder.rglob("*.xplane.pb")) if folder else []
    if traces and (found := trace.split(trace.read(traces[-1]), num_steps=_TRACED)):
        report.say(f"\n{traces[-1]}: {found.text()}")


def _prepared_step(config: ConfigDict, folder: pathlib.Path | None) -> Prepared:
    """Steps one after another, each from the state that the last one left."""
    device = jax.devices()[0]
    run = assembly.assemble(config)
    shapes = assembly.batch_shapes(config, run.modalities)
    mesh = sharding.make_mesh(**config.mesh, devices=[device])
    with jax.set_mesh(mesh):
        boxed = train_state.boxed_state(run.network, run.optimizer, shapes)
        batch = jax.device_put(filled(shapes, run.modalities), sharding.batch_sharding(mesh))
        state = [train_state.create_state(run.network, run.optimizer, shapes, seed=0, mesh=mesh)]
        compiled = train_state.jit_step(run.step, boxed, mesh).lower(state[0], batch, run.seed).compile()

    def start() -> Any:
        state[0], metrics = compiled(state[0], batch, run.seed)
        return state[0], metrics

    def read(found: Any) -> dict[str, Any]:
        skipped, loss = int(found[0].nonfinite_total), float(found[1]["loss"])
        if skipped or not math.isfinite(loss):
            raise ValueError(f"loss {loss}, {skipped} updates skipped; wanted finite numbers")
        return {}

    def further() -> str:
        asked = memory(compiled, device)
        if folder:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0
            with jax.profiler.trace(folder, profiler_options=options):
                for _ in range(_TRACED):
                    last = start()
                jax.block_until_ready(last)
        return asked

    return Prepared(start, read=read, further=further)


def filled(shapes: Batch, rows: tuple[Modality, ...]) -> Batch:
    """A batch of noise in each modality's units, all of it valid, every view of the same ground."""
    rng, by_name = np.random.default_rng(0), {m.name: m for m in rows}

    def fill(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        *_, kind, name = ("", *path_string(path).split("/"))
        if kind == "images":
            return rng.uniform(*by_name[name].typical_range, leaf.shape).astype(leaf.dtype)
        if name == "affine":
            return np.broadcast_to(np.eye(2, 3, dtype=leaf.dtype), leaf.shape)
        if name == "labels":
            return (rng.random(leaf.shape) / leaf.shape[-1]).astype(leaf.dtype)
        number = {"day_of_year": 180, "record": 0, "bad_record": -1}.get(kind if kind == "day_of_year" else name, 1)
        return np.full(leaf.shape, number, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)
