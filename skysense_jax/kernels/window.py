"""Window attention of a Swin V2 block between its projections: which kernel, over which devices, and its gradient.

Written plainly, for every window of 8 x 8 tokens, every head h and every token n of it, over the tokens m of the window
that n may look at:

    score[h, n, m] = scale[h] * unit(query[h, n]) . unit(key[h, m]) + bias[h, n, m]
    out[h, n] = sum over m of softmax(score[h, n, :])[m] * value[h, m]

unit(x) is x / |x|, zeros stay zeros. The same in XLA: models/swin.py. Next: window_tpu.py, window_gpu.py.
"""

import functools

import jax
from jaxtyping import Array, Bool, Float

from skysense_jax.kernels import window_gpu, window_tpu
from skysense_jax.kernels.devices import by_samples

# By name, and whether it runs as Python on any device, which is for tests.
_KERNELS = {
    "mosaic": (window_tpu, False),
    "mosaic interpreted": (window_tpu, True),
    "triton": (window_gpu, False),
    "triton interpreted": (window_gpu, True),
}


def problem(
    implementation: str,
    *,
    window: int,
    width: int,
    head_width: int,
    columns: int,
    itemsize: int,
    shifted: bool,
    tensor_devices: int,
) -> str:
    """Why this kernel cannot take windows, maps, heads or devices such as these; empty if it can.

    ``itemsize``: bytes of a number of the maps.
    """
    if tensor_devices > 1:
        return f"heads over {tensor_devices} devices (config.mesh.tensor); wanted 1"
    sizes = dict(window=window, width=width, head_width=head_width, columns=columns, itemsize=itemsize)
    return _KERNELS[implementation][0].problem(**sizes, shifted=shifted)


def window_attention(
    query: Float[Array, "B I P Q D"],
    key: Float[Array, "B I P Q D"],
    value: Float[Array, "B I P Q D"],
    bias: Float[Array, "A M M"],
    scale: Float[Array, " A"],
    seen: Bool[Array, "B I P Q"],
    *,
    shifted: bool,
    head_width: int,
    implementation: str,
    batch_axes: tuple[str, ...] = (),
) -> Float[Array, "B I P Q D"]:
    """What each token gathers from the tokens of its window that are ``seen``, in the dtype of ``query``.

    Maps are projected, their heads merged, their sides whole windows; ``bias`` and ``scale`` are fp32.
    A token that may look at none gets a finite mean that its caller must not use, with arbitrary gradients.
    ``shifted``: windows lie half their side further down and right, those of the last row and column around the map's
    edge, where tokens do not look at what is no neighbour. On a mesh (``jax.set_mesh``) samples lie over its
    ``batch_axes``, and each device works on its own.
    """

    def local(query, key, value, seen, bias, scale):
        flat = [x.reshape(-1, *x.shape[2:]) for x in (query, key, value)]
        out = _attend(*flat, bias, scale, seen.reshape(-1, *seen.shape[2:]), shifted, head_width, implementation)
        return out.reshape(query.shape)

    return by_samples(local, (query, key, value, seen), (bias, scale), batch_axes=batch_axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _attend(query, key, value, bias, scale, seen, shifted, head_width, implementation):
    kernel, interpret = _KERNELS[implementation]
    how = dict(shifted=shifted, head_width=head_width, interpret=interpret)
    return kernel.forward(query, key, value, bias, scale, seen, **how)


def _attend_forward(query, key, value, bias, scale, seen, shifted, head_width, implementation):
    out = _attend(query, key, value, bias, scale, seen, shifted, head_width, implementation)
    return out, (query, key, value, bias, scale, seen)


def _attend_backward(shifted, head_width, implementation, kept, upstream):
    kernel, interpret = _KERNELS[implementation]
    how = dict(shifted=shifted, head_width=head_width, interpret=interpret)
    return *kernel.backward(*kept, upstream, **how), None


_attend.defvjp(_attend_forward, _attend_backward)
