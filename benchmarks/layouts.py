"""What do a mesh and a mixture of experts cost? Whole training steps in turns, as ratios of the first one's time.

On a CPU eight virtual devices share the cores, so the same batch on eight is the same work, and what is above 1 is the
price of dividing it: exchanges, smaller products, more kernels. A mixture with one expert a token and the dense network
have the same active FLOPs; what is above 1 is the price of routing and of the free places (config capacity_factor).

XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m benchmarks.layouts --batch=8 --step=tiny --step=tiny_moe \
    --step=tiny:8,1,1,1 --step=tiny:1,8,1,1 --step=tiny_moe:1,1,1,8
"""

import argparse
import contextlib
import math
import re
import time

import jax

from benchmarks.timing import median_seconds
from skysense_jax import assembly, feed, sharding, train_state
from skysense_jax import config as config_lib
from skysense_jax.plan import flops


def compiled(name, layout, batch_size):
    """A function that runs one step of a config after another, its FLOPs as traced, and the seconds to compile it."""
    config = config_lib.load(f"configs/{name}.py").unlock()
    config.data.batch_size = batch_size
    config.mesh.update(dict(zip(sharding.MESH_AXES, layout, strict=True)))
    config_lib.validate(config, num_devices=math.prod(layout))
    run = assembly.assemble(config)
    shapes = assembly.batch_shapes(config, run.modalities)
    mesh = sharding.make_mesh(**config.mesh, devices=jax.devices()[: math.prod(layout)])
    with jax.set_mesh(mesh):
        boxed = train_state.boxed_state(run.network, run.optimizer, shapes)
        with contextlib.closing(iter(assembly.make_pipeline(config))) as source:
            batch = feed.to_device(next(source), mesh)
        state = [train_state.create_state(run.network, run.optimizer, shapes, seed=0, mesh=mesh)]
        start = time.perf_counter()
        traced = train_state.jit_step(run.step, boxed, mesh).trace(state[0], batch, run.seed)
        step = traced.lower().compile()
        seconds = time.perf_counter() - start

    def once():
        state[0], metrics = step(state[0], batch, run.seed)
        jax.block_until_ready((state[0], metrics))

    return once, flops.of_jaxpr(traced.jaxpr.jaxpr), seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", action="append", required=True, help="config[:data,fsdp,tensor,expert]; repeat")
    parser.add_argument("--batch", type=int, default=8, help="samples of a step, over all devices")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    steps = []
    for text in args.step:
        name, _, sizes = text.partition(":")
        layout = tuple(int(size) for size in re.findall(r"\d+", sizes)) or (1, 1, 1, 1)
        if len(layout) != 4 or math.prod(layout) > jax.device_count():
            parser.error(f"got --step={text} on {jax.device_count()} devices; wanted CONFIG[:data,fsdp,tensor,expert]")
        steps.append((name, layout, *compiled(name, layout, args.batch)))
    seconds = median_seconds([step[2] for step in steps], args.repeats)
    print(f"jax {jax.__version__}, {jax.device_count()} x {jax.devices()[0].device_kind}, batch {args.batch}")
    print("| config | mesh | GFLOP as traced | compile, s | step, s | time / first | FLOPs / first |")
    print("|---|---|---|---|---|---|---|")
    for (name, layout, _, step_flops, compile_seconds), each in zip(steps, seconds):
        row = [name, " x ".join(map(str, layout)), f"{step_flops / 1e9:.1f}", f"{compile_seconds:.0f}", f"{each:.3f}"]
        print("|", " | ".join([*row, f"{each / seconds[0]:.2f}", f"{step_flops / steps[0][3]:.2f}"]), "|")


if __name__ == "__main__":
    main()
