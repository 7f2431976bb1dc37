"""How fast are kernels, backbones and a training step on one GPU, beside PyTorch? All of it in one run, in turns.

    python -m benchmarks.gpu --config=configs/huge.py | tee gpu.txt
    python -m benchmarks.gpu --parts=window,global --images=4 --repeats=11

Prints the machine, the largest measured rate of a bf16 matrix product, then a table a part; what a column means is in
contest.py. What is compared, and with what: gpu_kernels.py (attention in windows and over all tokens), gpu_networks.py
(backbones, the step), gpu_torch.py. Every contestant is held against the plain one in fp32 before it is timed. A
contestant that is not here has a row "not here: REASON"; one that fails or gives wrong numbers has a row too, and the
command ends with status 1. With ``--tiny`` a CPU runs all of the code in a minute, and no figure means anything.

jax takes memory as it needs it (XLA_PYTHON_CLIENT_PREALLOCATE=false) but gives none back, and PyTorch lives beside it:
with too many images the second of them has none.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys

import jax
from ml_collections import ConfigDict

from benchmarks import gpu_kernels, gpu_networks
from benchmarks.contest import Report, Setting
from skysense_jax import config as config_lib

PARTS = ("window", "global", "backbone", "step")
_FULL = dict(
    config="configs/huge.py",
    backbone=["configs/base.py", "configs/huge.py"],
    images=8,
    pixels=512,
    batch=8,
    repeats=7,
    seconds=0.2,
)
_TINY = dict(
    config="configs/tiny.py", backbone=["configs/tiny.py"], images=2, pixels=128, batch=2, repeats=1, seconds=0.001
)


def arguments(argv: list[str]) -> argparse.Namespace:
    """What was asked for; ``--tiny`` changes what is not said."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="whose widths the kernels have and whose step is run (configs/huge.py)")
    parser.add_argument("--backbone", action="append", help="a config; may be repeated (configs/base.py, huge.py)")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them, with commas (all)")
    parser.add_argument("--images", type=int, help="of kernels and backbones (8)")
    parser.add_argument("--pixels", type=int, help="along a side of an aerial image, a multiple of 128 (512)")
    parser.add_argument("--batch", type=int, help="samples of a step; halved until they fit (8)")
    parser.add_argument("--attention", default="auto", help="config.efficiency.attention of the step")
    parser.add_argument("--remat", default="none", help="of the backbones; PyTorch's recomputes nothing")
    parser.add_argument("--trace", type=pathlib.Path, help="folder for a trace of the step, whose time is told apart")
    parser.add_argument("--repeats", type=int, help="timings of each contestant, in turns; their median counts (7)")
    parser.add_argument("--seconds", type=float, help="of a timing (0.2)")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU, kernels interpreted")
    args = parser.parse_args(argv)
    for name, value in (_TINY if args.tiny else _FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.parts = args.parts.split(",")
    if unknown := sorted(set(args.parts) - set(PARTS)):
        parser.error(f"--parts: got {','.join(unknown)}; wanted some of {','.join(PARTS)}")
    if args.pixels < 1 or args.pixels % 128:
        parser.error(f"--pixels: got {args.pixels}; wanted a multiple of 128, so that windows divide stages 1 and 2")
    for name in ("images", "batch", "repeats", "seconds"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name}: got {getattr(args, name)}; wanted more than 0")
    return args


def torch_side(platform: str) -> tuple[object | None, str]:
    """benchmarks/gpu_torch.py, and why it is None (empty if it is not)."""
    if importlib.util.find_spec("torch") is None:
        return None, "torch is not installed"
    try:
        from benchmarks import gpu_torch
    except Exception as error:  # a torch that does not fit this machine's libraries
        return None, f"torch does not load: {error}".splitlines()[0]
    if platform != "cpu" and not gpu_torch.has_cuda():
        return None, f"torch {gpu_torch.version()} sees no GPU"
    return gpu_torch, ""


def commit() -> str:
    """Of this checkout, and whether its files differ from it."""
    root = pathlib.Path(__file__).parents[1]
    if shutil.which("git") is None or not (root / ".git").exists():
        return "not known: no git or no checkout"
    ask = lambda *words: subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)  # noqa: E731
    found = ask("rev-parse", "--short=12", "HEAD")
    changed = " with changes" if ask("status", "--porcelain", "--untracked-files=no").stdout.strip() else ""
    return found.stdout.strip() + changed if found.returncode == 0 else f"not known: {found.stderr.strip()[:80]}"


def header(report: Report, setting: Setting, args: argparse.Namespace) -> None:
    """What the figures were measured on."""
    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    facts = [f"{device.device_kind}, {setting.platform}"]
    facts += [f"capability {device.compute_capability}"] if hasattr(device, "compute_capability") else []
    facts += [f"{limit / 2**30:.1f} GiB for jax"] if limit else []
    names = sorted({d.name for d in importlib.metadata.distributions() if d.name})
    plugins = [name for name in names if name.startswith(("jax-cuda", "jax-rocm", "nvidia-cudnn"))]
    packages = ("jax", "jaxlib", "flax", *plugins)
    sizes = f"{args.images} images of {args.pixels} px, {args.repeats} repeats of {args.seconds:g} s, in turns; medians"
    for name, value in (
        ("command", f"python -m benchmarks.gpu {' '.join(args.argv)}"),
        ("device", ", ".join(facts)),
        ("platform", " ".join(device.client.platform_version.split())),
        ("python", sys.version.split()[0]),
        ("packages", ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)),
        ("torch", setting.torch.version() if setting.torch else f"not here: {setting.no_torch}"),
        ("commit", commit()),
        ("XLA_FLAGS", os.environ.get("XLA_FLAGS", "none")),
        ("sizes", sizes),
    ):
        report.say(f"{name:<10} {value}")


def loaded(source: str, *, tiny: bool) -> ConfigDict:
    """A config in bf16; a tiny one in fp32 with one modality, a block a stage and one loss: it compiles in seconds."""
    config = config_lib.load(source).unlock()
    config.model.compute_dtype = "float32" if tiny else "bfloat16"
    if tiny:
        config.data.update(modalities=("s1",), num_dates=dict(s1=1), photometric_strength=0.0)
        config.model.backbone.depths = (1, 1, 1, 1)
        config.model.fusion.depth = 1
        config.objective.weights.update(qsacl=0.0, text_alignment=0.0, balance=0.0)
        config.objective.mgcl.update(object_weight=0.0, pixel_weight=0.0)
    return config.lock()


def main(argv: list[str] | None = None) -> int:
    """Prints the tables; 1 if a contestant failed or was refused."""
    argv = sys.argv[1:] if argv is None else argv
    args = arguments(argv)
    args.argv = argv
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    platform = jax.default_backend()
    if platform not in ("cpu", "gpu"):
        raise SystemExit(f"error: jax is on {platform!r}; wanted a GPU, or a CPU with --tiny")
    torch, no_torch = torch_side(platform)
    setting = Setting(platform, torch, no_torch, args.tiny, args.images, args.pixels)
    report = Report(repeats=args.repeats, seconds=args.seconds)
    config = loaded(args.config, tiny=args.tiny)
    backbones = [loaded(source, tiny=args.tiny) for source in args.backbone]
    header(report, setting, args)
    report.say("\n# matmul")
    report.heading()
    gpu_kernels.matmul(report, setting)
    runs = {
        "window": lambda: gpu_kernels.window_attention(report, setting, config.model.backbone),
        "global": lambda: gpu_kernels.global_attention(report, setting, config.model.backbone),
        "backbone": lambda: [gpu_networks.backbone(report, setting, each, remat=args.remat) for each in backbones],
        "step": lambda: gpu_networks.step(
            report, config, batch=args.batch, attention=args.attention, folder=args.trace
        ),
    }
    for part in args.parts:
        report.say(f"\n# {part}")
        report.heading()
        runs[part]()
    report.say(f"\n{len(report.failures)} failed" + "".join(f"\nFAILED {failure}" for failure in report.failures))
    return int(bool(report.failures))


if __name__ == "__main__":
    sys.exit(main())
