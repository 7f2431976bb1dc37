"""How much memory does an export take? A sharded checkpoint of random weights, exported by the command itself.

    python -m benchmarks.export_memory --config=small_moe
    python -m benchmarks.export_memory --config=huge_moe --teacher_only   # 2 B parameters

The checkpoint is written over 8 virtual devices; its student, teacher and moments share their arrays. Orbax takes
copies of all four to write it, so that of 2 B parameters only the teacher can be written within 24 GiB. Printed: its
size, the directory's, seconds, peak memory of both.
"""

import argparse
import os
import pathlib
import resource
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
from etils import epath

from skysense_jax import assembly, digests, manifest, restore, sharding
from skysense_jax import config as config_lib
from skysense_jax.train_state import abstract_state, boxed_state
from skysense_jax.trees import named_leaves

STEP = 7
MEASURED = """
import pathlib, sys
from skysense_jax.export import __main__
__main__.main(sys.argv[1:])
status = pathlib.Path("/proc/self/status").read_text()  # ru_maxrss begins at that of the parent process
print(status.split("VmHWM:")[1].split()[0])
"""


def save(config, workdir: pathlib.Path, teacher_only: bool) -> int:
    """Writes the checkpoint; the number of parameters."""
    run = assembly.assemble(config)
    mesh = sharding.make_mesh(data=1, fsdp=8, tensor=1, expert=1)
    boxed = boxed_state(run.network, run.optimizer, assembly.batch_shapes(config, run.modalities))
    shapes, rng = abstract_state(boxed, mesh), np.random.default_rng(0)
    shapes = {"teacher": shapes.teacher} if teacher_only else dict(vars(shapes))

    draw = lambda leaf: jax.device_put(rng.standard_normal(leaf.shape, np.float32), leaf.sharding)  # noqa: E731
    params = named_leaves(jax.tree.map(draw, shapes["teacher"]))
    of_params = digests.tree_digests(params)
    arrays, leaves = [], {}
    for path, leaf in named_leaves(shapes).items():  # whatever ends like a parameter's path is that parameter
        name = next((name for name in params if path.endswith(f"/{name}")), None)
        arrays.append(params[name] if name else jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding))
        leaves[path] = [f"({', '.join(map(str, leaf.shape))}) {leaf.dtype}", of_params[name] if name else 0]
    meta = {"config": config_lib.flat_text(config)}
    notes = {"leaves": leaves, "run": meta, "sha256": restore.text_digest({}, leaves, meta)}
    handlers = dict(  # two GiB at a time, else all four parts would be copied at once
        state=ocp.PyTreeCheckpointHandler(save_concurrent_gb=2, save_device_host_concurrent_gb=2),
        data=ocp.JsonCheckpointHandler(),
        meta=ocp.JsonCheckpointHandler(),
    )
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with ocp.CheckpointManager(workdir / "checkpoints", item_handlers=handlers, options=options) as manager:
        state = ocp.args.PyTreeSave(jax.tree.unflatten(jax.tree.structure(shapes), arrays))
        manager.save(
            STEP, args=ocp.args.Composite(state=state, data=ocp.args.JsonSave({}), meta=ocp.args.JsonSave(notes))
        )
    manifest.write(epath.Path(workdir) / "checkpoints" / str(STEP))
    return sum(array.size for array in params.values())


def size_of(folder: pathlib.Path) -> float:
    """GiB of all files under it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**30


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="huge_moe")
    parser.add_argument("--teacher_only", action="store_true", help="no student, no optimizer")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/export_memory"), help="made, removed")
    args = parser.parse_args()
    run, out = args.folder / "run", args.folder / "model"
    try:
        start = time.monotonic()
        count = save(config_lib.load(f"configs/{args.config}.py"), run.absolute(), args.teacher_only)
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
        print(f"peak memory of writing it {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
        print(f"export: {size_of(out):.1f} GiB in {time.monotonic() - start:.0f} s, peak memory {peak:.1f} GiB")
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
