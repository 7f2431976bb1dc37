"""Do kernels move a run? The same training twice, plainly and with kernels, and how far its losses part.

python -m benchmarks.kernel_curves --config=configs/tiny.py --steps=200 --every=20

On a CPU the TPU's kernels are interpreted (as tests do), on a TPU they are run, on a GPU cuDNN's and Triton's.
"""

import argparse
import contextlib
import sys

import jax
import numpy as np

from skysense_jax import assembly, feed, sharding, train_state
from skysense_jax import config as config_lib

_KERNELS = {
    "cpu": dict.fromkeys(("attention", "window_attention"), "mosaic interpreted"),
    "tpu": dict.fromkeys(("attention", "window_attention"), "mosaic"),
    "gpu": dict(attention="cudnn", window_attention="triton"),
}


class Training:
    """A run of ``config`` from its first step, with these kernels."""

    def __init__(self, config, kernels):
        run = assembly.assemble(config, **kernels)
        self._mesh = sharding.make_mesh(1, 1, 1, 1, devices=jax.devices()[:1])
        shapes = assembly.batch_shapes(config, run.modalities)
        with jax.set_mesh(self._mesh):
            boxed = train_state.boxed_state(run.network, run.optimizer, shapes)
            how = dict(seed=config.optim.seed, mesh=self._mesh)
            self._state = train_state.create_state(run.network, run.optimizer, shapes, **how)
            self._step, self._seed = train_state.jit_step(run.step, boxed, self._mesh), run.seed

    def __call__(self, element) -> dict[str, float]:
        """One step; its terms."""
        with jax.set_mesh(self._mesh):
            self._state, metrics = self._step(self._state, feed.to_device(element, self._mesh), self._seed)
        return {name: float(value) for name, value in metrics.items() if name == "loss" or name.startswith("loss/")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/tiny.py")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--batch", type=int, default=0, help="samples a step; 0: the config's")
    given = parser.parse_args()
    config = config_lib.load(given.config).unlock()
    config.data.batch_size = given.batch or config.data.batch_size
    config_lib.validate(config, num_devices=1)
    plain = Training(config, dict.fromkeys(("attention", "window_attention"), "xla"))
    fast = Training(config, _KERNELS[jax.default_backend()])
    print("$ python -m benchmarks.kernel_curves", *sys.argv[1:])
    print(f"{'steps':>9}{'plain':>10}{'kernels':>10}{'largest difference of a term in them':>40}", flush=True)
    largest, rows = 0.0, []
    with contextlib.closing(iter(assembly.make_pipeline(config))) as source:
        for step in range(1, given.steps + 1):
            element = next(source)
            rows.append([run(element) for run in (plain, fast)])
            if step % given.every == 0:
                apart = max(abs(a[name] - b[name]) for a, b in rows for name in a)
                means = [np.mean([row[i]["loss"] for row in rows]) for i in (0, 1)]
                steps = f"{step - len(rows) + 1}-{step}"
                print(f"{steps:>9}{means[0]:>10.5f}{means[1]:>10.5f}{apart:>40.2e}", flush=True)
                largest, rows = max(largest, apart), []
    print(f"largest difference of any term in any step: {largest:.2e}")


if __name__ == "__main__":
    main()
