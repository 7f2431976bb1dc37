"""Is the PyTorch module as fast as a user's own? Inference on hr images, against transformers' Swinv2 layers.

The other side is ``benchmarks/step.py``'s ``TorchBackbone``: ``transformers``' Swinv2 layers and merging, then plain
pre-norm blocks, of the same size, on pixels that are normalised already. It has no rotary embedding and returns its
last stage only, so it does slightly less. fp32, dense MLPs, random weights, ``torch.inference_mode()``, in turns.

    python -m benchmarks.torch_inference --config=tiny --batch=8 --size=256

On a busy machine --threads=1 and the ratio of CPU seconds say most: a waiting process has none.
"""

import argparse
import importlib
import json
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


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tiny", help="a name in configs/")
    parser.add_argument("--batch", type=int, default=8, help="images")
    parser.add_argument("--size", type=int, default=256, help="pixels along a side")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true", help="also both sides under torch.compile")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    module, other = build(args.config, args.size)
    raw = torch.rand(args.batch, 3, args.size, args.size) * 255
    m = module.model.modalities["hr"]
    normalised = ((raw.movedim(1, -1) - torch.tensor(m.mean)) / torch.tensor(m.std)).contiguous()
    runs = {"module": lambda: module(raw), "transformers": lambda: other({"hr": normalised})}
    if args.compile:
        compiled, compiled_other = torch.compile(module), torch.compile(other)
        runs["module, compiled"] = lambda: compiled(raw)
        runs["transformers, compiled"] = lambda: compiled_other({"hr": normalised})
    with torch.inference_mode():
        seconds = seconds_in_turns(runs, args.repeats)
    print(f"{args.config}, {args.batch} x {args.size} px, torch {torch.__version__}, {args.threads} threads")
    print(f"{'median':>34s} {'CPU':>10s}   images/s")
    for name, values in seconds.items():
        wall, cpu = np.median(values, axis=0)
        print(f"{name:24s} {wall:8.3f} s {cpu:8.3f} s {args.batch / wall:10.2f}")
    for ending in ("", ", compiled") if args.compile else ("",):
        ratios = np.median(
            seconds[f"transformers{ending}"] / seconds[f"module{ending}"], axis=0
        )  # of neighbours in time
        print(f"speed, module / transformers{ending}: {ratios[0]:.2f} x, by CPU {ratios[1]:.2f} x (goal {GOAL})")


if __name__ == "__main__":
    main()
