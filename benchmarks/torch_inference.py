"""Is the PyTorch module as fast as a user's own? Inference on hr images, against transformers' Swinv2 layers.

The other side is ``benchmarks/step.py``'s ``TorchBackbone``: ``transformers``' Swinv2 layers and merging, then plain
pre-norm blocks, of the same size, on pixels that are normalised already. It has no rotary embedding and returns its
last stage only, so it does slightly less. fp32, dense MLPs, random weights, ``torch.inference_mode()``, in turns.
One process says little: where its memory happens to lie moves the ratio by a tenth, so several are averaged.

    python -m benchmarks.torch_inference --config=tiny --batch=8 --size=256

On a busy machine --threads=1 and the ratio of CPU seconds say most: a waiting process has none.
"""

import argparse
import importlib
import json
import multiprocessing
import time
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.step import TorchBackbone
from skysense_jax.export import write
from skysense_jax.export.modeling_skysensev2 import FeaturesOnly, SkySenseV2
from skysense_jax.modalities import select

GOAL = 1.0  # images a second of the module, in those of the other side


def build(config: str, size: int) -> tuple[FeaturesOnly, TorchBackbone]:
    """Both networks of a size in configs/, with random weights, for hr images of ``size`` pixels."""
    rows, fields = select(("hr",)), importlib.import_module(f"configs.{config}").get_config().model.backbone
    if size % rows[0].pixels_per_cell:
        raise SystemExit(f"error: --size: {size}; wanted a multiple of {rows[0].pixels_per_cell} pixels (10 m)")
    description = write.describe(rows, backbone={**fields, "num_moe_blocks": 0}, fusion=None, training={})
    module = FeaturesOnly(SkySenseV2(json.loads(json.dumps(description)), check_inputs=False), "hr")
    names = ("width", "depths", "head_width", "window", "mlp_ratio", "num_prompts")
    other = TorchBackbone(rows, size // rows[0].pixels_per_cell, **{name: fields[name] for name in names})
    return module.eval(), other.eval()


def seconds_in_turns(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, np.ndarray]:
    """[repeats 2] wall-clock and CPU seconds of each of ``runs``, called in turns, after two calls that do not count.

    One side comes first in every other turn, so that neither always finds the other's memory in the caches.
    """
    seconds = {name: [] for name in runs}
    for turn in range(repeats + 2):
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter(), time.process_time()
            runs[name]()
            seconds[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return {name: np.array(values[2:]) for name, values in seconds.items()}


def measure(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """[repeats 2] seconds of each side, as ``seconds_in_turns`` takes them, in this process."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    module, other = build(args.config, args.size)
    raw = torch.rand(args.batch, 3, args.size, args.size) * 255
    m = module.model.modalities["hr"]
    normalised = ((raw.movedim(1, -1) - torch.tensor(m.mean)) / torch.tensor(m.std)).contiguous()
    if args.compile:
        module, other = torch.compile(module), torch.compile(other)
    with torch.inference_mode():
        return seconds_in_turns(
            {"module": lambda: module(raw), "transformers": lambda: other({"hr": normalised})}, args.repeats
        )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tiny", help="a name in configs/")
    parser.add_argument("--batch", type=int, default=8, help="images")
    parser.add_argument("--size", type=int, default=256, help="pixels along a side")
    parser.add_argument("--repeats", type=int, default=15, help="in each process")
    parser.add_argument("--processes", type=int, default=8, help="fresh ones, one after another")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true", help="both sides under torch.compile")
    args = parser.parse_args()
    if args.processes < 2:
        raise SystemExit(f"error: --processes: {args.processes}; wanted 2 or more, for a standard error")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        processes = pool.map(measure, [args] * args.processes, chunksize=1)
    how = ", torch.compile" if args.compile else ""
    print(f"{args.config}, {args.batch} x {args.size} px, torch {torch.__version__}, {args.threads} threads{how}")
    for name in processes[0]:
        wall, cpu = np.median([np.median(seconds[name], axis=0) for seconds in processes], axis=0)
        print(f"{name:14s} median {wall:8.3f} s, CPU {cpu:8.3f} s, {args.batch / wall:10.2f} images/s")
    # Neighbours in time within a process; processes differ by where their memory happens to lie.
    ratios = np.array([np.median(s["transformers"] / s["module"], axis=0) for s in processes])
    mean, error = ratios.mean(0), ratios.std(0, ddof=1) / np.sqrt(len(ratios))
    print(
        f"speed, module / transformers: {mean[0]:.3f} +- {error[0]:.3f} x, by CPU {mean[1]:.3f} +- {error[1]:.3f} x "
        f"(mean and standard error of {len(ratios)} processes, {ratios[:, 0].min():.2f} to {ratios[:, 0].max():.2f}; "
        f"goal {GOAL})"
    )


if __name__ == "__main__":
    main()
