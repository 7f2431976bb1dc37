"""PyTorch's side of gpu.py, on the device that jax has: the exported module's functions, compiled if there is CUDA.

Imported only where torch is installed. Arguments come as jax arrays and are copied; results keep PyTorch's type and are
read by contest.py. Weights and activations are bf16. Next: gpu_kernels.py, gpu_networks.py.
"""

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor

from benchmarks.contest import Prepared
from skysense_jax.export.modeling_skysensev2 import FeaturesOnly, ShiftedWindows, SkySenseV2, attend, rotate, windows


def has_cuda() -> bool:
    """Whether this torch sees a GPU."""
    return torch.cuda.is_available()


def version() -> str:
    """Of torch, and of the CUDA that it was built for."""
    return f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"


def no_flex() -> str:
    """Why flex attention is not here; empty if it is."""
    if not has_cuda():
        return "flex attention needs CUDA"
    try:
        from torch.nn.attention.flex_attention import flex_attention  # noqa: F401
    except ImportError as error:
        return str(error)
    return ""


def release() -> None:
    """Forgets what was compiled, of which torch keeps few, and gives back memory that it keeps, so that jax has it."""
    if has_cuda():
        torch.compiler.reset()
        torch.cuda.empty_cache()


def _device() -> str:
    return "cuda" if has_cuda() else "cpu"


def _tensor(x: Any) -> Tensor:
    """A copy on the device, in the same dtype."""
    dtype = getattr(torch, np.dtype(x.dtype).name if x.dtype.name != "bfloat16" else "bfloat16")
    host = np.array(jax.device_get(x).astype(np.float32) if x.dtype.name == "bfloat16" else x)
    return torch.from_numpy(host).to(_device(), dtype)


def _wait(_: Any) -> None:
    if has_cuda():
        torch.cuda.synchronize()


def _compiled(function: Callable) -> Callable:
    """Compiled for a GPU and these shapes; an error where torch would run the function as it is and say nothing."""
    if not has_cuda():
        return function
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(function, dynamic=False)


def _prepared(
    function: Callable[..., Tensor],
    inputs: Mapping[str, Tensor],
    upstream: Tensor | None,
    read: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict,
) -> Prepared:
    """``function(**inputs)``, with gradients of all inputs if there is something from ``upstream``."""
    function = _compiled(function)
    inputs = {name: x.requires_grad_(upstream is not None) for name, x in inputs.items()}

    def start() -> dict[str, Tensor]:
        if upstream is None:
            with torch.no_grad():
                return {"out": function(**inputs)}
        out = function(**inputs)
        gradients = torch.autograd.grad(out, list(inputs.values()), upstream)
        return {"out": out} | {f"d_{name}": x for name, x in zip(inputs, gradients)}

    return Prepared(start, _wait, read)


def matmul(x: jax.Array, y: jax.Array) -> Prepared:
    """A matrix product, by the library that torch calls."""
    tensors = _tensor(x), _tensor(y)
    return Prepared(lambda: {"out": tensors[0] @ tensors[1]}, _wait)


# ---- attention


def window(
    way: str,
    inputs: Mapping[str, jax.Array],
    upstream: jax.Array | None,
    *,
    window: int,
    shifted: bool,
    head_width: int,
) -> Prepared:
    """Attention in windows of maps [B 1 P Q D], one of

    - "sdpa": normalised, the bias and what a shift separates added up to a mask, as the exported module does it;
    - "flex": the same with flex attention, which adds both to each score as it goes;
    - "alone": PyTorch's attention and no more. Windows are shifted and divided, queries and keys normalised and the
      mask is added up before, and there is no gradient of the bias: less than a network needs.
    """
    images, _, rows, columns, _ = inputs["query"].shape
    near, shift = None, window // 2 if shifted else 0
    if shifted:
        near = ShiftedWindows.neighbours(rows, columns, window, window // 2, torch.device(_device()))
    of_map = dict(window=window, shift=shift)
    split = functools.partial(_split, head_width=head_width, **of_map)
    join = functools.partial(_join, images=images, rows=rows, columns=columns, **of_map)
    tensors = {name: _tensor(x) for name, x in inputs.items()}
    above = None if upstream is None else _tensor(upstream)
    if way == "alone":
        query, key = unit(split(tensors["query"]), tensors["scale"]), unit(split(tensors["key"]))
        mask = tensors["bias"][None].to(query.dtype)
        if shifted:
            hidden = torch.where(near[:, None], mask.new_zeros(()), torch.finfo(mask.dtype).min / 2)
            mask = (mask + hidden).repeat(images, 1, 1, 1)
        apart = {"query": query, "key": key, "value": split(tensors["value"])}
        read = lambda found: {name: join(found[name]) for name in ("out", "d_value") if name in found}  # noqa: E731
        attention = functools.partial(_sdpa, mask=mask)
        contiguous = {name: x.contiguous() for name, x in apart.items()}
        return _prepared(attention, contiguous, None if above is None else split(above).contiguous(), read)

    def whole(query, key, value, bias, scale):
        query, key = unit(split(query), scale), unit(split(key))
        if way == "flex":
            return join(_flex(query, key, split(value), bias, near))
        seen = None if near is None else near.repeat(images, 1, 1)
        return join(attend(query, key, split(value), seen=seen, bias=bias, scale=1.0))

    return _prepared(whole, tensors, above)


def unit(x: Tensor, length: Tensor | None = None) -> Tensor:
    """[N A M K] with the last axis scaled in fp32 to 1, or to a ``length`` [A]; never in place."""
    scale = torch.rsqrt(x.float().square().sum(-1, keepdim=True))
    return (x * (scale if length is None else scale * length[:, None, None])).to(x.dtype)


def _split(x: Tensor, *, window: int, shift: int, head_width: int) -> Tensor:
    """The maps [B 1 P Q D] as heads of their windows [N A M K]."""
    x = x.roll((-shift, -shift), dims=(2, 3)) if shift else x
    return windows(x.flatten(0, 1), window).unflatten(-1, (-1, head_width)).transpose(1, 2)


def _join(x: Tensor, *, images: int, rows: int, columns: int, window: int, shift: int) -> Tensor:
    """The inverse of ``_split``."""
    x = x.transpose(1, 2).flatten(2)
    x = x.reshape(images, 1, rows // window, columns // window, window, window, -1)
    x = x.transpose(3, 4).reshape(images, 1, rows, columns, -1)
    return x.roll((shift, shift), dims=(2, 3)) if shift else x


def _sdpa(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0)


def _flex(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, near: Tensor | None) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    def scored(score, number, head, of_query, of_key):
        score = score + bias[head, of_query, of_key]
        if near is None:
            return score
        return torch.where(near[number % near.shape[0], of_query, of_key], score, -float("inf"))

    return flex_attention(query, key, value, score_mod=scored, scale=1.0)


def full(
    inputs: Mapping[str, jax.Array], upstream: jax.Array | None, turn: tuple[Any, Any], *, head_width: int
) -> Prepared:
    """Attention over all tokens [B 1 N D], turned by their places, as the exported module does it: without a mask."""
    cos, sin = (_tensor(x) for x in turn)
    cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

    def attention(query, key, value):
        heads = [x.flatten(0, 1).unflatten(-1, (-1, head_width)).transpose(1, 2) for x in (query, key, value)]
        y = attend(rotate(heads[0], cos, sin), rotate(heads[1], cos, sin), heads[2])
        return y.transpose(1, 2).reshape(query.shape)

    above = None if upstream is None else _tensor(upstream)
    return _prepared(attention, {name: _tensor(x) for name, x in inputs.items()}, above)


# ---- the network


def backbone(
    description: Mapping[str, Any], state: Mapping[str, np.ndarray], images: jax.Array, checked: tuple[str, ...]
) -> Prepared:
    """Forward and backward of the exported module on aerial images [B 1 H W C], normalised; parameters in bf16.

    ``description`` and ``state`` are what an exported directory holds; ``checked`` names the weights whose gradients
    are read.
    """
    with torch.device("meta"):
        whole = SkySenseV2(json.loads(json.dumps(description)), normalise=False, check_inputs=False, out_indices=(3,))
    whole.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()}, assign=True)
    network = FeaturesOnly(whole, "hr").to(_device(), torch.bfloat16).train()
    pixels = _tensor(images).flatten(0, 1).movedim(-1, 1).contiguous()
    parameters = dict(whole.named_parameters())
    run = _compiled(network)

    def start() -> dict[str, Any]:
        (features,) = run(pixels)
        loss = features.float().square().mean()
        return {"out": features, "gradients": torch.autograd.grad(loss, list(parameters.values()))}

    def read(found: Mapping[str, Any]) -> dict[str, Tensor]:
        gradients = dict(zip(parameters, found["gradients"]))
        return {"out": found["out"].movedim(1, -1)} | {f"d_{name}": gradients[name] for name in checked}

    def further() -> str:
        if not has_cuda():
            return ""
        torch.cuda.reset_peak_memory_stats()
        _wait(start())
        return f"peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB of torch's"

    return Prepared(start, _wait, read, further)
