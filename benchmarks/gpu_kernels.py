"""The kernels of gpu.py: a matrix product, attention in windows, attention over all tokens, each against others.

Attention starts at projected tokens whose heads are merged and ends at such tokens, bf16: shifting and dividing into
windows, normalising and the rotary embedding are timed, as each network does them. Nothing is masked but what a shift
separates; the mask of valid tokens is there wherever the network passes one. Next: contest.py, gpu_torch.py.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from benchmarks.contest import Contestant, Prepared, Report, Setting
from skysense_jax import compiler
from skysense_jax.kernels import window as window_kernel
from skysense_jax.modalities import select
from skysense_jax.models import swin
from skysense_jax.models.attention import Rotation, SelfAttention, attend, rotate, rotation, token_offsets

PASSES = ("forward", "forward + backward")
_SIZES = {"gpu": (4096, 6144, 8192), "cpu": (1024, 2048)}
_WINDOW_CASES = ((1, False), (1, True), (2, False), (2, True))  # stage, whether shifted
_TINY_WINDOW_CASES = ((1, False), (2, True))


def matmul(report: Report, setting: Setting) -> None:
    """Rates of square matrix products; the largest goes into ``report.matmul_rate``."""
    best = 0.0
    for size in (64, 128) if setting.tiny else _SIZES[setting.platform]:
        inputs = {name: normal(index, (size, size)) for index, name in enumerate(("x", "y"))}
        product = lambda inputs, fixed: inputs["x"] @ inputs["y"]  # noqa: E731
        contestants = [
            jax_contestant("xla", product, inputs, {}, platform=setting.platform),
            Contestant("torch", lambda inputs=inputs: setting.torch.matmul(**inputs), setting.no_torch),
        ]
        flops, case = 2 * size**3, f"{size} x {size} x {size}"
        results = report.contest(
            "matmul", case, PASSES[0], contestants, flops=flops, reference=reference(product, inputs, {})
        )
        best = max([best, *(flops / result.seconds for result in results.values() if not result.told)])
    report.matmul_rate = best or float("nan")
    report.say(f"largest measured bf16 matmul rate: {best / 1e12:.4g} TFLOP/s")


# ---- attention in windows


def window_attention(report: Report, setting: Setting, backbone: Mapping[str, Any]) -> None:
    """Stages 1 and 2 of an aerial image, shifted and not; ``backbone`` is a config's ``model.backbone``."""
    head_width, window = backbone["head_width"], backbone["window"]
    for stage, shifted in _TINY_WINDOW_CASES if setting.tiny else _WINDOW_CASES:
        width, side = backbone["width"] * 2 ** (stage - 1), _side(setting, stage)
        shape, heads = (setting.images, 1, side, side, width), width // head_width
        inputs = {name: normal(index, shape) for index, name in enumerate(("query", "key", "value"))}
        inputs["bias"] = 16 * jax.nn.sigmoid(normal(3, (heads, window**2, window**2)).astype(jnp.float32))
        inputs["scale"] = 10 * jnp.exp(0.3 * normal(4, (heads,)).astype(jnp.float32))
        fixed = {"seen": jnp.ones(shape[:-1], bool)}
        how = dict(shifted=shifted, head_width=head_width)
        plain = functools.partial(plain_window, window=window, **how)
        name = "triton interpreted" if setting.tiny and setting.platform == "cpu" else "triton"
        sizes = dict(window=window, width=width, head_width=head_width, columns=side, itemsize=2, shifted=shifted)
        told = window_kernel.problem("triton", **sizes, tensor_devices=1)
        if name == "triton" and setting.platform == "cpu":
            told = told or "no GPU; --tiny runs it interpreted"
        flex = setting.no_torch or setting.torch.no_flex()
        flops = 4 * setting.images * side**2 * window**2 * width
        wanted = reference(plain, inputs, fixed, normal(5, shape))
        for backward, passes in enumerate(PASSES):
            upstream = normal(5, shape) if backward else None
            ours = functools.partial(kernel_window, implementation=name, **how)
            of_torch = lambda way, upstream=upstream, inputs=inputs, how=how: setting.torch.window(  # noqa: E731
                way, inputs, upstream, window=window, **how
            )
            contestants = [
                jax_contestant("xla", plain, inputs, fixed, upstream, platform=setting.platform),
                jax_contestant(name, ours, inputs, fixed, upstream, platform=setting.platform, absent=told),
                Contestant("torch sdpa", functools.partial(of_torch, "sdpa"), setting.no_torch),
                Contestant("torch sdpa alone", functools.partial(of_torch, "alone"), setting.no_torch),
                Contestant("torch flex", functools.partial(of_torch, "flex"), flex),
            ]
            case = f"stage {stage}, {setting.images} x {side} x {side} x {width}{', shifted' if shifted else ''}"
            report.contest("window", case, passes, contestants, flops=flops * (3 if backward else 1), reference=wanted)
        setting.release()


def plain_window(inputs: Mapping[str, Any], fixed: Mapping[str, Any], *, shifted, head_width, window) -> jax.Array:
    """What ``swin.WindowAttention`` does between its projections without a kernel."""
    _, images, rows, columns, _ = inputs["query"].shape
    split = "B I (P h) (Q w) ... -> B (I P Q) (h w) ..."
    maps = [inputs["query"], inputs["key"], inputs["value"], fixed["seen"]]
    shift = window // 2 if shifted else 0
    if shifted:
        maps = [jnp.roll(x, (-shift, -shift), axis=(2, 3)) for x in maps]
    query, key, value, seen = (rearrange(x, split, h=window, w=window) for x in maps)
    mask = seen[:, :, None, :]
    if shifted:
        mask = mask & np.tile(swin.shift_regions(rows, columns, window=window, shift=shift), (images, 1, 1))
    dtype = query.dtype
    query = swin.unit(query, head_width=head_width) * jnp.repeat(inputs["scale"], head_width)
    key = swin.unit(key, head_width=head_width)
    mixed = attend(
        query.astype(dtype),
        key.astype(dtype),
        value,
        head_width=head_width,
        bias=inputs["bias"],
        mask=mask,
        scale=1.0,
    )
    join = "B (I P Q) (h w) D -> B I (P h) (Q w) D"
    mixed = rearrange(mixed, join, h=window, w=window, P=rows // window, Q=columns // window)
    return jnp.roll(mixed, (shift, shift), axis=(2, 3)) if shifted else mixed


def kernel_window(inputs: Mapping[str, Any], fixed: Mapping[str, Any], **how: Any) -> jax.Array:
    """The same in a kernel of kernels/window.py."""
    return window_kernel.window_attention(**inputs, **fixed, **how)


# ---- attention over all tokens


def global_attention(report: Report, setting: Setting, backbone: Mapping[str, Any]) -> None:
    """Stages 3 and 4 of an aerial image, prompts included; ``backbone`` is a config's ``model.backbone``."""
    head_width, num_prompts = backbone["head_width"], backbone["num_prompts"]
    no_cudnn = "" if setting.platform == "gpu" else f"cuDNN needs an NVIDIA GPU; this is {setting.platform}"
    for stage in (3, 4):
        width, side = backbone["width"] * 2 ** (stage - 1), _side(setting, stage)
        cells = (setting.pixels // select(("hr",))[0].pixels_per_cell,) * 2
        offsets = np.concatenate((token_offsets((side, side), cells), np.zeros((num_prompts, 2))))
        shape = (setting.images, 1, len(offsets), width)
        inputs = {name: normal(index, shape) for index, name in enumerate(("query", "key", "value"))}
        turn = rotation(offsets, head_width=head_width)
        fixed = {"valid": jnp.ones(shape[:-1], bool), "turn": turn}
        plain = functools.partial(masked_global, head_width=head_width, implementation="xla")
        masked = functools.partial(masked_global, head_width=head_width, implementation="cudnn")
        free = functools.partial(unmasked_global, head_width=head_width, implementation="cudnn")
        wanted = reference(plain, inputs, fixed, normal(5, shape))
        flops = 4 * setting.images * len(offsets) ** 2 * width
        for backward, passes in enumerate(PASSES):
            upstream = normal(5, shape) if backward else None
            where = dict(platform=setting.platform)
            contestants = [
                jax_contestant("xla", plain, inputs, fixed, upstream, **where),
                jax_contestant("cudnn", masked, inputs, fixed, upstream, **where, absent=no_cudnn),
                jax_contestant("cudnn without mask", free, inputs, fixed, upstream, **where, absent=no_cudnn),
                Contestant(
                    "torch sdpa",
                    lambda upstream=upstream, inputs=inputs, turn=turn: setting.torch.full(
                        inputs, upstream, (turn.cos, turn.sin), head_width=head_width
                    ),
                    setting.no_torch,
                ),
            ]
            case = f"stage {stage}, {setting.images} x ({side} x {side} + {num_prompts}) x {width}"
            report.contest("global", case, passes, contestants, flops=flops * (3 if backward else 1), reference=wanted)
        setting.release()


def masked_global(inputs: Mapping[str, Any], fixed: Mapping[str, Any], *, head_width, implementation) -> jax.Array:
    """What ``attention.SelfAttention`` does between its projections."""
    block = SelfAttention(head_width, implementation)
    arguments = (inputs["query"], inputs["key"], inputs["value"], fixed["valid"], fixed["turn"])
    return block.apply({}, *arguments, method="_mixed")


def unmasked_global(inputs: Mapping[str, Any], fixed: Mapping[str, Any], *, head_width, implementation) -> jax.Array:
    """The same where every token is valid and no mask says so."""
    turn: Rotation = fixed["turn"]
    query, key = (rotate(inputs[name], turn, head_width=head_width) for name in ("query", "key"))
    return attend(query, key, inputs["value"], head_width=head_width, implementation=implementation)


# ---- both


def _side(setting: Setting, stage: int) -> int:
    """Tokens along a side of an aerial image in a stage."""
    return setting.pixels // select(("hr",))[0].patch // 2 ** (stage - 1)


def normal(seed: int, shape: tuple[int, ...]) -> jax.Array:
    """Normally distributed bf16, made on the device."""
    return jax.jit(jax.random.normal, static_argnums=(1, 2))(jax.random.key(seed), shape, jnp.bfloat16)


def _runner(function: Callable, backward: bool) -> Callable:
    """(inputs, fixed, upstream) -> "out" and, with ``backward``, "d_x" of every input x."""

    def run(inputs, fixed, upstream):
        if not backward:
            return {"out": function(inputs, fixed)}
        out, pull = jax.vjp(lambda inputs: function(inputs, fixed), inputs)
        return {"out": out} | {f"d_{name}": x for name, x in pull(upstream.astype(out.dtype))[0].items()}

    return run


def jax_contestant(name, function, inputs, fixed, upstream=None, *, platform: str, absent: str = "") -> Contestant:
    """``function(inputs, fixed)``, with gradients of all inputs if there is something from ``upstream``."""

    def prepare() -> Prepared:
        jitted = jax.jit(
            _runner(function, upstream is not None), compiler_options=compiler.options(jax.devices(platform)[0])
        )
        compiled = jitted.lower(inputs, fixed, upstream).compile()
        return Prepared(lambda: compiled(inputs, fixed, upstream))

    return Contestant(name, prepare, absent)


def reference(function, inputs, fixed, upstream=None) -> Callable[[], Mapping[str, Any]]:
    """A function that returns the results of ``function`` in fp32 on the same numbers, worked out once."""

    @functools.cache
    def wanted():
        exact = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
        with jax.default_matmul_precision("highest"):
            return jax.jit(_runner(function, upstream is not None))(exact, fixed, upstream)

    return wanted
