"""What do a step's blocks cost on a chip that is not here? Compiled ahead of time, bf16, one kind of block at a time.

python -m benchmarks.ledger --config=configs/huge.py --target=v5p:4 > docs/ledger/huge_v5p.txt
python -m benchmarks.ledger --config=configs/huge.py:v5p:64 --target=v5p:64 --plan=docs/plans/huge_v5p_64.txt

The first compares kernels with XLA on ``--images`` aerial views, forward and backward. With ``--plan`` the blocks are
those of the config's step, on one device's samples, each as often as the step runs it, beside the plan's other parts.

The first takes gradients of the sum of the output, the second of its product with a given array.

A row a block: FLOPs over those of its matrix products by formula; GiB that it moves and milliseconds that it takes as
XLA counts and guesses them (a kernel of ours by its blocks and grid, ``traffic_bytes``); the milliseconds of its matrix
products at the chip's rated FLOPs; temporary memory. XLA says nothing of moves and time for a GPU. None of it is a
measurement: what a kernel computes is counted at full rate, which heads of 32 do not reach.
"""

import argparse
import dataclasses
import math
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from skysense_jax import assembly, compiler, modalities, sharding, targets
from skysense_jax import config as config_lib
from skysense_jax.models.attention import rotation, token_offsets
from skysense_jax.models.backbone import group_modalities
from skysense_jax.models.swin import SwinBlock
from skysense_jax.models.vit import GlobalBlock
from skysense_jax.plan import __main__ as plan_command
from skysense_jax.plan import forecast, parts

_FUSED = {"tpu": "mosaic", "gpu": "triton"}
_GLOBAL = {"tpu": "mosaic", "gpu": "cudnn"}


@dataclasses.dataclass(frozen=True)
class Block:
    """A kind of block and what it works on.

    Attributes:
      tokens: shape, B I N D or B I P Q D.
      more: further arguments.
      ideal: FLOPs of its matrix products, forward: projections and an MLP for each token, scores and their mixtures.
      student, teacher: how often each runs it in a step.
    """

    name: str
    module: Any
    tokens: tuple[int, ...]
    more: Mapping[str, Any]
    ideal: float
    student: int = 1
    teacher: int = 1


def swin(model, stage: int, samples: tuple[int, int], grid: tuple[int, int], implementation: str, **counts) -> Block:
    """A window block; ``counts`` also says whether it is ``shifted``."""
    width, shifted = model.width * 2 ** (stage - 1), counts.pop("shifted")
    how = dict(mlp_ratio=model.mlp_ratio, window_attention=implementation, compute_dtype=jnp.bfloat16)
    block = SwinBlock(model.head_width, model.window, shifted, **how)
    name = f"swin {width}, {grid[0]} x {grid[1]}{', shifted' if shifted else ''}, {implementation}"
    seen = min(model.window, *grid) ** 2
    ideal = _flops(math.prod(samples) * math.prod(grid), width, model.mlp_ratio, seen)
    return Block(name, block, (*samples, *grid, width), {}, ideal, **counts)


def whole(model, stage: int, samples: tuple[int, int], grid: tuple[int, int], implementation: str, **counts) -> Block:
    """A global block; ``counts`` also gives the ``num_experts`` of a mixture."""
    width, num_experts = model.width * 2 ** (stage - 1), counts.pop("num_experts", 0)
    offsets = np.concatenate((token_offsets(grid, grid), np.zeros((model.num_prompts, 2))))
    how = dict(mlp_ratio=model.mlp_ratio, layer_scale_init=1e-5, attention=implementation, compute_dtype=jnp.bfloat16)
    if num_experts:
        how |= {key: model[key] for key in ("num_experts", "experts_per_token", "capacity_factor")}
    name = f"global {width}, {grid[0]} x {grid[1]} + {model.num_prompts}{', experts' * bool(num_experts)}"
    mlp_ratio = model.mlp_ratio * (model.experts_per_token if num_experts else 1)
    more = dict(turn=rotation(offsets, head_width=model.head_width), train=True)
    ideal = _flops(math.prod(samples) * len(offsets), width, mlp_ratio, len(offsets))
    shape = (*samples, len(offsets), width)
    return Block(f"{name}, {implementation}", GlobalBlock(model.head_width, **how), shape, more, ideal, **counts)


def cells(model, samples: tuple[int, int], num_tokens: int, implementation: str, **counts) -> Block:
    """A block of the fusion encoder over short sequences."""
    how = dict(mlp_ratio=model.mlp_ratio, attention=implementation, compute_dtype=jnp.bfloat16)
    block = GlobalBlock(model.head_width, layer_scale_init=None, **how)
    ideal = _flops(math.prod(samples) * num_tokens, model.width, model.mlp_ratio, num_tokens)
    name = f"fusion {model.width}, {samples[1]} cells of {num_tokens}, {implementation}"
    return Block(name, block, (*samples, num_tokens, model.width), {}, ideal, **counts)


def _flops(num_tokens: int, width: int, mlp_ratio: float, seen: int) -> float:
    return 2.0 * num_tokens * ((4 + 2 * mlp_ratio) * width**2 + 2 * seen * width)


def comparison(config, *, images: int, side: int, platform: str) -> Iterator[Block]:
    """Kernels beside XLA, for images of ``side`` x ``side`` stage-1 tokens that merge as aerial ones do."""
    model, samples = config.model.backbone, (images, 1)
    for stage in (1, 2):
        for implementation in ("xla", _FUSED[platform]):
            for shifted in (False, True):
                yield swin(model, stage, samples, (side // stage,) * 2, implementation, shifted=shifted)
    for stage in (3, 4):
        for implementation in ("xla", _GLOBAL[platform]):
            yield whole(model, stage, samples, (side // 2 ** (stage - 1),) * 2, implementation)
    if model.num_moe_blocks:
        grid = (side // 8,) * 2
        yield whole(model, 4, samples, grid, _GLOBAL[platform], num_experts=model.num_experts)
    num_tokens = 1 + sum(config.data.num_dates.values())
    for implementation in ("xla", _GLOBAL[platform]):
        yield cells(config.model.fusion, (images, (side // 8) ** 2), num_tokens, implementation)


def of_step(config, *, samples: int, platform: str) -> Iterator[Block]:
    """The blocks of a step on ``samples`` samples: global and local views, each for both networks."""
    rows = modalities.select(config.data.modalities, config.data.new_modalities)
    efficiency, model = assembly.efficiency(config, platform), config.model.backbone
    inside, outside = efficiency["window_attention"], efficiency["attention"]
    batch = assembly.batch_shapes(config, rows)
    of_teacher = (1, int(config.objective.weights.qsacl > 0))  # local views are asked for their queries alone
    for views, seen in zip((batch.global_views, batch.local_views), of_teacher, strict=True):
        shapes = {name: x.shape for name, x in views.token_valid.items()}  # B V T P Q
        for group in group_modalities(rows, {name: shape[3:] for name, shape in shapes.items()}):
            images = (samples, sum(shapes[m.name][1] * shapes[m.name][2] for m in group))
            grid = shapes[group[0].name][3:]
            experts_from = sum(model.depths) - model.num_moe_blocks
            for stage, depth in enumerate(model.depths, 1):
                if stage > 1 and group[0].merges_at[stage - 2]:
                    grid = tuple(-(-n // 2) for n in grid)
                if stage < 3:
                    moves = min(grid) > model.window
                    for shifted, count in ((False, depth - depth // 2 * moves), (True, depth // 2 * moves)):
                        if count:
                            counts = dict(shifted=shifted, student=count, teacher=seen * count)
                            yield swin(model, stage, images, grid, inside, **counts)
                    continue
                dense = min(max(experts_from - sum(model.depths[: stage - 1]), 0), depth)
                for num_experts, count in ((0, dense), (model.num_experts, depth - dense)):
                    if count:
                        counts = dict(num_experts=num_experts, student=count, teacher=seen * count)
                        yield whole(model, stage, images, grid, outside, **counts)
        num_cells = next(iter(shapes.values()))[1] * math.prod(grid)
        num_tokens, depth = 1 + sum(shape[2] for shape in shapes.values()), config.model.fusion.depth
        yield cells(config.model.fusion, (samples, num_cells), num_tokens, outside, student=depth, teacher=seen * depth)


def compile_block(block: Block, *, backward: str, device, platform: str):
    """The block: forward alone (``backward`` empty), and backward from "ones" or from what is "given"."""
    mesh = Mesh(np.asarray([device]).reshape(1, 1, 1, 1), sharding.MESH_AXES)
    placed = NamedSharding(mesh, PartitionSpec())
    tokens = jax.ShapeDtypeStruct(block.tokens, jnp.bfloat16, sharding=placed)
    valid = jax.ShapeDtypeStruct(tokens.shape[:-1], jnp.bool_, sharding=placed)

    def forward(params, x, valid):
        out = block.module.apply(params, x, valid=valid, **block.more)
        return out[0] if isinstance(out, tuple) else out

    def loss(params, x, valid, upstream=None):
        out = forward(params, x, valid)
        return (out if upstream is None else out * upstream).astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        boxed = jax.eval_shape(
            lambda: block.module.init(
                jax.random.key(0),
                jnp.zeros(tokens.shape, tokens.dtype),
                valid=jnp.ones(valid.shape, bool),
                **block.more,
            )
        )
        params = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed), sharding.unbox(boxed)
        )
        function = {"": forward, "ones": jax.grad(loss, argnums=(0, 1))}
        function["given"] = jax.value_and_grad(loss, argnums=(0, 1))
        lowered = jax.jit(function[backward]).lower(params, tokens, valid, *[tokens] * (backward == "given"))
        options = compiler.options(mesh.devices.flat[0]) | (forecast.GPU_OPTIONS if platform == "gpu" else {})
        return lowered.compile(compiler_options=options)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What the compiler says of a compiled block; None where it says nothing."""

    flops: float | None
    gib: float | None
    guess_ms: float | None
    temporary_mib: float


def cost(block: Block, *, backward: str, device, platform: str) -> Cost:
    """Of the block, compiled."""
    compiled = compile_block(block, backward=backward, device=device, platform=platform)
    temporary = compiled.memory_analysis().temp_size_in_bytes / 2**20
    if platform != "tpu":
        return Cost(None, None, None, temporary)
    said = compiled.cost_analysis()
    return Cost(said["flops"], said["bytes accessed"] / 2**30, 1e3 * said["optimal_seconds"], temporary)


HEADER = f"{'block, forward and backward':<46}{'FLOPs x':>8}{'GiB':>9}{'guess ms':>10}{'ideal ms':>9}{'temp MiB':>9}"


def row(block: Block, *, device, chip) -> str:
    """One line of the comparison."""
    found = cost(block, backward="ones", device=device, platform=chip.platform)
    told = f"{'-':>8}{'-':>9}{'-':>10}"
    if found.flops is not None:
        told = f"{found.flops / (3 * block.ideal):8.2f}{found.gib:9.2f}{found.guess_ms:10.2f}"
    return f"{block.name:<46}{told}{1e3 * 3 * block.ideal / chip.flops:9.2f}{found.temporary_mib:9.0f}"


def say_step(config, target, plan: str, *, device) -> Iterator[str]:
    """The lines of a step's ledger; ``plan`` is the text of its plan."""
    chip, samples = target.chip, config.data.batch_size // target.num_chips
    again = config.efficiency.remat == "blocks"
    yield f"{samples} samples a chip; student forward{', again' * again} and backward, teacher forward; x: over ideal"
    yield f"{'block':<46}{'student':>8}{'teacher':>8}{'GiB':>9}{'guess ms':>10}{'ideal ms':>10}{'x':>6}"
    sums = {"backbone": np.zeros(3), "fusion": np.zeros(3), "backbone, nothing done again": np.zeros(3)}

    def line(name, counts, values):
        gib, guess, ideal = values
        return f"{name:<46}{counts}{gib:9.1f}{guess:10.1f}{ideal:10.1f}{guess / ideal if ideal else math.inf:6.2f}"

    for block in of_step(config, samples=samples, platform=chip.platform):
        forward, both = (cost(block, backward=b, device=device, platform=chip.platform) for b in ("", "given"))
        ideal = 1e3 * block.ideal / chip.flops
        once = np.asarray([forward.gib, forward.guess_ms, ideal])
        trained = np.asarray([both.gib, both.guess_ms, 3 * ideal])
        second = np.asarray([forward.gib, forward.guess_ms, 0.0]) * again
        values = block.student * (trained + second) + block.teacher * once
        part = "fusion" if block.name.startswith("fusion") else "backbone"
        sums[part] += values
        if part == "backbone":
            sums["backbone, nothing done again"] += values - block.student * second
        yield line(block.name, f"{block.student:>8}{block.teacher:>8}", values)
    others = np.zeros(3)
    rest = "|".join(name for name in parts.NAMES if not name.startswith(("stage", "fusion")))
    found = re.findall(rf"^  ({rest}) +([\d.]+) +([\d.]+) +([\d.]+)", plan, re.MULTILINE)
    assert {"merging", "losses and targets"} <= {name for name, *_ in found}, found
    for name, flops, gigabytes, ms in found:
        values = np.asarray([float(gigabytes) * 1e9 / 2**30, float(ms), 1e15 * float(flops) / chip.flops])
        others += values
        yield line(f"{name} (plan)", " " * 16, values)
    for name, values in sums.items():
        yield line(name, " " * 16, values)
    yield line("step", " " * 16, sums["backbone"] + sums["fusion"] + others)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--target", required=True, help="KIND:CHIPS, of which one is asked")
    parser.add_argument("--plan", type=pathlib.Path, help="of this config and target: a ledger of its step")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--side", type=int, default=128, help="stage-1 tokens along a side: 128 are 512 px of patch 4")
    given = parser.parse_args()
    config, target = config_lib.load(given.config), targets.parse(given.target)
    chip = target.chip
    device = forecast.make_mesh(target, dict(data=target.num_chips, fsdp=1, tensor=1, expert=1)).devices.flat[0]
    print("$ python -m benchmarks.ledger", *sys.argv[1:])
    if given.plan:
        if chip.platform != "tpu" or config.efficiency.remat == "matmuls":
            parser.error("--plan: wanted a TPU, whose compiler says what a block costs, and remat 'none' or 'blocks'")
        if f"config {config_lib.fingerprint(config, plan_command.PLANNED)}" not in given.plan.read_text():
            parser.error(f"--plan={given.plan}: got a plan of another config; wanted one of {given.config}")
        print(f"{config.name} on {target}; jax {jax.__version__}")
        for text in say_step(config, target, given.plan.read_text(), device=device):
            print(text, flush=True)
        return
    print(f"{config.name}, {given.images} images, on one {chip.name}; jax {jax.__version__}")
    print(HEADER, flush=True)
    for block in comparison(config, images=given.images, side=given.side, platform=chip.platform):
        print(row(block, device=device, chip=chip), flush=True)


if __name__ == "__main__":
    main()
