"""How long does the whole training step take to trace, lower and compile? Prints a table; allocates no parameters.

python -m benchmarks.compile --config=tiny --config=huge --lower_only=huge
"""

import argparse
import importlib
import time

import jax

from skysense_jax import sharding, train, train_state


def measure(name: str, *, compile_it: bool) -> tuple[str, ...]:
    """A row: name, seconds to lower, lines of StableHLO, seconds to compile ("-" if it is not)."""
    config = importlib.import_module(f"configs.{name}").get_config()
    run = train.assemble(config)
    shapes = train.batch_shapes(config, run.modalities)
    mesh = sharding.make_mesh(**config.mesh)
    with jax.set_mesh(mesh):
        boxed = train_state.boxed_state(run.network, run.optimizer, shapes)
        state, batch = train_state.abstract_state(boxed, mesh), train_state.abstract_batch(shapes, mesh)
        step = train_state.jit_step(run.step, boxed, mesh)
        start = time.perf_counter()
        lowered = step.lower(state, batch, run.seed)
        lower_seconds = time.perf_counter() - start
        lines = len(lowered.as_text().splitlines())
        start = time.perf_counter()
        if compile_it:
            lowered.compile()
        seconds = f"{time.perf_counter() - start:.1f}" if compile_it else "-"
    return name, f"{lower_seconds:.1f}", str(lines), seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", default=[], help="named size; may be repeated")
    parser.add_argument("--lower_only", action="append", default=[], help="of these, the ones not to compile")
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.default_backend()}, {jax.device_count()} device(s)")
    print("| config | trace and lower, s | lines of StableHLO | compile, s |\n|---|---|---|---|")
    for name in args.config or ["tiny"]:
        print(f"| {' | '.join(measure(name, compile_it=name not in args.lower_only))} |", flush=True)


if __name__ == "__main__":
    main()
