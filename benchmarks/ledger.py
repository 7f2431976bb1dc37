"""What does each kind of block cost on a chip that is not here? Compiled ahead of time, forward and backward, bf16.

python -m benchmarks.ledger --config=configs/huge.py --target=v5p:4 > docs/ledger/huge_v5p.txt

A row a block: FLOPs over those of its matrix products by formula; GiB that it moves and milliseconds that it takes as
XLA counts and guesses them (a kernel of ours by its blocks and grid, ``kernels/window_tpu.traffic_bytes``); the
milliseconds of its matrix products at the chip's rated FLOPs; temporary memory. XLA says nothing of moves and time for
a GPU. Neither is a measurement: what a kernel computes is counted at full rate, which heads of 32 do not reach.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from skysense_jax import compiler, sharding, targets
from skysense_jax import config as config_lib
from skysense_jax.models.attention import rotation, token_offsets
from skysense_jax.models.swin import SwinBlock
from skysense_jax.models.vit import GlobalBlock
from skysense_jax.plan import forecast

_FUSED = {"tpu": "mosaic", "gpu": "triton"}
_GLOBAL = {"tpu": "mosaic", "gpu": "cudnn"}


def blocks(config, *, side: int, platform: str) -> Iterator[tuple[str, Any, tuple[int, ...], dict]]:
    """(name, module, shape of an image's tokens, further arguments), for ``side`` x ``side`` stage-1 tokens."""
    model = config.model.backbone
    common = dict(mlp_ratio=model.mlp_ratio, compute_dtype=jnp.bfloat16)
    for stage in (1, 2):
        width, tokens = model.width * 2 ** (stage - 1), side // 2 ** (stage - 1)
        for implementation in ("xla", _FUSED[platform]):
            for shifted in (False, True):
                name = f"swin {width}, {tokens} x {tokens}{', shifted' if shifted else ''}, {implementation}"
                block = SwinBlock(model.head_width, model.window, shifted, window_attention=implementation, **common)
                yield name, block, (tokens, tokens, width), {}
    for stage in (3, 4):
        width, tokens = model.width * 2 ** (stage - 1), side // 2 ** (stage - 1)
        offsets = np.concatenate((token_offsets((tokens, tokens), (tokens, tokens)), np.zeros((model.num_prompts, 2))))
        for implementation in ("xla", _GLOBAL[platform]):
            block = GlobalBlock(model.head_width, layer_scale_init=1e-5, attention=implementation, **common)
            name = f"global {width}, {tokens} x {tokens} + {model.num_prompts}, {implementation}"
            yield name, block, (len(offsets), width), dict(turn=rotation(offsets, head_width=model.head_width))


def ideal_flops(shape: tuple[int, ...], *, mlp_ratio: float, window: int) -> float:
    """Of an image's block, forward and backward: four projections and an MLP, scores and their mixtures."""
    num_tokens, width = math.prod(shape[:-1]), shape[-1]
    seen = num_tokens if len(shape) == 2 else window**2
    return 3 * 2 * num_tokens * ((4 + 2 * mlp_ratio) * width**2 + 2 * seen * width)


def row(name: str, block: Any, shape: tuple[int, ...], more: dict, *, images: int, device, chip, model) -> str:
    """One line of the table."""
    mesh = Mesh(np.asarray([device]).reshape(1, 1, 1, 1), sharding.MESH_AXES)
    placed = NamedSharding(mesh, PartitionSpec())
    tokens = jax.ShapeDtypeStruct((images, 1, *shape), jnp.bfloat16, sharding=placed)
    valid = jax.ShapeDtypeStruct(tokens.shape[:-1], jnp.bool_, sharding=placed)

    def loss(params, x, valid):
        out = block.apply(params, x, valid=valid, **more)
        return (out[0] if isinstance(out, tuple) else out).astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        boxed = jax.eval_shape(
            lambda: block.init(
                jax.random.key(0), jnp.zeros(tokens.shape, tokens.dtype), valid=jnp.ones(valid.shape, bool), **more
            )
        )
        params = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed), sharding.unbox(boxed)
        )
        lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, tokens, valid)
        options = compiler.options(chip.platform) | (forecast.GPU_OPTIONS if chip.platform == "gpu" else {})
        compiled = lowered.compile(compiler_options=options)
    ideal = images * ideal_flops(shape, mlp_ratio=model.mlp_ratio, window=model.window)
    temporary = compiled.memory_analysis().temp_size_in_bytes / 2**20
    said = compiled.cost_analysis() if chip.platform == "tpu" else {}
    told = (
        f"{said['flops'] / ideal:8.2f}{said['bytes accessed'] / 2**30:9.2f}{1e3 * said['optimal_seconds']:10.2f}"
        if said
        else f"{'-':>8}{'-':>9}{'-':>10}"
    )
    return f"{name:<44}{told}{1e3 * ideal / chip.flops:9.2f}{temporary:9.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--target", required=True, help="KIND:CHIPS, of which one is asked")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--only", default="", help="blocks whose name holds this")
    parser.add_argument("--side", type=int, default=128, help="stage-1 tokens along a side: 128 are 512 px of patch 4")
    given = parser.parse_args()
    config, target = config_lib.load(given.config), targets.parse(given.target)
    device = forecast.make_mesh(target, dict(data=target.num_chips, fsdp=1, tensor=1, expert=1)).devices.flat[0]
    print("$ python -m benchmarks.ledger", *sys.argv[1:])
    print(f"{config.name}, {given.images} images, on one {target.chip.name}; jax {jax.__version__}")
    print(f"{'block':<44}{'FLOPs x':>8}{'GiB':>9}{'guess ms':>10}{'ideal ms':>9}{'temp MiB':>9}", flush=True)
    for name, block, shape, more in blocks(config, side=given.side, platform=target.chip.platform):
        if given.only not in name:
            continue
        how = dict(images=given.images, device=device, chip=target.chip, model=config.model.backbone)
        print(row(name, block, shape, more, **how), flush=True)


if __name__ == "__main__":
    main()
