"""How much memory does an export take? A sharded checkpoint of random weights, exported by the command itself.

    python -m benchmarks.export_memory --config=huge_moe   # 2 B parameters; needs 45 GiB of disk under --folder

The checkpoint has student, teacher and both moments, over 8 virtual devices; it is written without ever being in memory
as a whole (the four parts share their arrays). Printed: its size, the directory's, seconds, the export's peak memory.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import time

# before jax starts
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import orbax.checkpoint as ocp

from skysense_jax import assembly, checkpoint, sharding
from skysense_jax import config as config_lib
from skysense_jax.train_state import abstract_state, boxed_state
from skysense_jax.trees import named_leaves

STEP = 7
MEASURED = """
import resource, sys
from skysense_jax.export import __main__
__main__.main(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def save(config, workdir: pathlib.Path) -> int:
    """Writes the checkpoint; the number of parameters."""
    run = assembly.assemble(config)
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=1, expert=2)
    boxed = boxed_state(run.student, run.optimizer, assembly.batch_shapes(config, run.modalities))
    shapes, rng = abstract_state(boxed, mesh), np.random.default_rng(0)

    def draw(leaf):
        shard = lambda _: rng.standard_normal(leaf.sharding.shard_shape(leaf.shape), np.float32)  # noqa: E731
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, shard)

    params = named_leaves(jax.tree.map(draw, shapes.teacher))
    digests = checkpoint.tree_digests(params)
    arrays, leaves = [], {}
    for path, leaf in named_leaves(shapes).items():  # whatever ends like a parameter's path is that parameter
        name = next((name for name in params if path.endswith(f"/{name}")), None)
        arrays.append(params[name] if name else jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding))
        leaves[path] = [f"({', '.join(map(str, leaf.shape))}) {leaf.dtype}", digests[name] if name else 0]
    meta = {"config": config_lib.flat_text(config)}
    notes = {"leaves": leaves, "run": meta, "sha256": checkpoint._text_digest({}, leaves, meta)}
    handlers = dict(  # two GiB at a time, else all four parts would be copied at once
        state=ocp.StandardCheckpointHandler(save_concurrent_gb=2),
        data=ocp.JsonCheckpointHandler(),
        meta=ocp.JsonCheckpointHandler(),
    )
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with ocp.CheckpointManager(workdir / "checkpoints", item_handlers=handlers, options=options) as manager:
        state = ocp.args.StandardSave(jax.tree.unflatten(jax.tree.structure(shapes), arrays))
        manager.save(
            STEP, args=ocp.args.Composite(state=state, data=ocp.args.JsonSave({}), meta=ocp.args.JsonSave(notes))
        )
    return sum(array.size for array in params.values())


def size_of(folder: pathlib.Path) -> float:
    """GiB of all files under it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**30


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="huge_moe")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/export_memory"), help="made, removed")
    args = parser.parse_args()
    run, out = args.folder / "run", args.folder / "model"
    try:
        start = time.monotonic()
        count = save(config_lib.load(f"configs/{args.config}.py"), run.absolute())
        print(
            f"{args.config}: {count:,} parameters, checkpoint of {size_of(run):.1f} GiB, "
            f"written in {time.monotonic() - start:.0f} s",
            flush=True,
        )
        start = time.monotonic()
        command = [sys.executable, "-c", MEASURED, f"--workdir={run}", f"--out={out}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        peak = int(done.stdout.split()[-1]) / 2**20
        print(f"export: {size_of(out):.1f} GiB in {time.monotonic() - start:.0f} s, peak memory {peak:.1f} GiB")
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
