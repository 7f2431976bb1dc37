"""What do checkpoints cost a run? Seconds that the loop waits, CPU seconds behind it, and what verification takes.

python -m benchmarks.checkpoint_cost --config=configs/small.py --batch=8 --saves=3

Each save goes to its end with no step beside it, so that all of the process's CPU seconds behind it are the save's. The
share is that of one save per ``--every`` steps of the length measured here; ``--step_s`` asks for that of another
length, since a step on CPUs is longer than on what the config is meant for. Files are verified as they lie in memory.
"""

import argparse
import contextlib
import pathlib
import sys
import tempfile
import time

import jax
import numpy as np

from skysense_jax import assembly, config, feed, manifest, resume, sharding, train_state
from skysense_jax.checkpoint import Checkpoints
from skysense_jax.digests import tree_digests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/small.py")
    parser.add_argument("--batch", type=int, default=8, help="samples a step, for the seconds of a step")
    parser.add_argument("--steps", type=int, default=2, help="timed steps, behind the one that compiles; 0: none")
    parser.add_argument("--step_s", type=float, default=0.0, help="seconds of a step, instead of timed ones")
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--every", type=int, default=100, help="steps from save to save")
    parser.add_argument("--folder", default=None, help="where checkpoints are written and removed (a temporary one)")
    given = parser.parse_args()
    print("$ python -m benchmarks.checkpoint_cost", *sys.argv[1:])
    settings = config.load(given.config)
    settings.data.batch_size = given.batch
    settings.mesh.update(data=1, fsdp=1, tensor=1, expert=1)
    config.validate(settings, num_devices=1)
    run, mesh = assembly.assemble(settings), sharding.make_mesh(**settings.mesh, devices=jax.devices()[:1])
    shapes = assembly.batch_shapes(settings, run.modalities)
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory(dir=given.folder) as folder:
        boxed = train_state.boxed_state(run.network, run.optimizer, shapes)
        state = train_state.create_state(run.network, run.optimizer, shapes, seed=0, mesh=mesh)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        print(f"{settings.name}: {size / 2**30:.2f} GiB of state in {len(jax.tree.leaves(state))} arrays")
        step_s, state = given.step_s, jax.block_until_ready(state)
        if given.steps:
            timed, state = _step_seconds(settings, run, boxed, mesh, state, given.steps)
            print(f"a step of {given.batch} samples here: {timed:.2f} s")
            step_s = step_s or timed
        state = _as_trained(state)
        checkpoints = Checkpoints(folder, every_steps=1, keep_last=2, keep_every_steps=10**9)
        meta, rows = resume.run_facts(settings), []
        for step in range(1, given.saves + 2):
            began = time.perf_counter()
            checkpoints.save(step, state, data_state={}, meta=meta)
            blocked, cpu, saved = time.perf_counter() - began, time.process_time(), time.perf_counter()
            checkpoints.wait()
            rows.append((blocked, time.process_time() - cpu, time.perf_counter() - saved))
        for blocked, cpu, seconds in rows[1:]:  # the first compiles the digests
            print(f"save: blocked {blocked:.2f} s, behind it {seconds:.2f} s with {cpu:.2f} CPU seconds", end="; ")
            if step_s:
                share = (blocked + cpu) / (blocked + given.every * step_s)
                print(f"{share:.2%} of {given.every} steps of {step_s:.2f} s")
            else:
                print(f"2 % of {given.every} steps of {(blocked + cpu) / 0.02 / given.every:.2f} s")
        newest = pathlib.Path(folder) / "checkpoints" / str(given.saves + 1)
        print(f"verification: files {_seconds(lambda: manifest.problem(newest)):.2f} s, ", end="")
        print(f"arrays {_seconds(lambda: tree_digests(state)):.2f} s; ", end="")
        abstract = train_state.abstract_state(boxed, mesh)
        whole = _seconds(lambda: jax.block_until_ready(checkpoints.restore_latest(abstract).state))
        print(f"the whole restore {whole:.2f} s")
        checkpoints.close()


def _as_trained(state):
    """Noise in place of all numbers: a new state's moments are zeros, which would be packed into nothing."""
    random = np.random.default_rng(0)

    def noise(leaf):
        if leaf.dtype != np.float32:
            return leaf
        return jax.device_put(random.standard_normal(leaf.shape, np.float32), leaf.sharding)

    return jax.tree.map(noise, state)


def _seconds(what) -> float:
    began = time.perf_counter()
    what()
    return time.perf_counter() - began


def _step_seconds(settings, run, boxed, mesh, state, steps):
    """Mean seconds of a step on one batch, and the state behind them."""
    settings.run.input_workers, settings.run.input_threads = 0, 1
    with contextlib.closing(iter(assembly.make_pipeline(settings))) as source:
        element = next(source)
    step_fn, batch = train_state.jit_step(run.step, boxed, mesh), feed.to_device(element, mesh)
    state, _ = jax.block_until_ready(step_fn(state, batch, run.seed))
    began = time.perf_counter()
    for _ in range(steps):
        state, _ = step_fn(state, batch, run.seed)
    jax.block_until_ready(state)
    return (time.perf_counter() - began) / steps, state


if __name__ == "__main__":
    main()
