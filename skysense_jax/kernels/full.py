"""Attention of all tokens of an image to each other, between its projections: over which devices, and its gradient.

Written plainly, for every head h and every token n, over the tokens m of the image that are seen:

    out[h, n] = sum over m of softmax(turn(query[h, n]) . turn(key[h, m]) / sqrt(head width))[m] * value[h, m]

turn(x) rotates each pair of channels of a head by its token's angle. The same in XLA: models/attention.py.
Next: full_tpu.py.
"""

import functools
import math

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from skysense_jax.kernels import full_tpu

_INTERPRETED = {"mosaic": False, "mosaic interpreted": True}  # the second runs as Python on any device, for tests
NAMES = tuple(_INTERPRETED)


def problem(*, num_tokens: int, width: int, head_width: int, itemsize: int, tensor_devices: int) -> str:
    """Why the kernel cannot take sequences, width, heads or devices such as these; empty if it can.

    ``itemsize``: bytes of a number of the maps.
    """
    if width // head_width % tensor_devices:
        return f"{width // head_width} heads over {tensor_devices} devices (config.mesh.tensor); wanted a divisor"
    width //= tensor_devices
    return full_tpu.problem(num_tokens=num_tokens, width=width, head_width=head_width, itemsize=itemsize)


def full_attention(
    query: Float[Array, "B I N D"],
    key: Float[Array, "B I N D"],
    value: Float[Array, "B I N D"],
    seen: Bool[Array, "B I N"],
    turn: tuple[Float[Array, "N K2"], Float[Array, "N K2"]] | None,
    *,
    head_width: int,
    implementation: str,
    batch_axes: tuple[str, ...] = (),
    head_axis: str | None = None,
) -> Float[Array, "B I N D"]:
    """What each token gathers from the tokens of its image that are ``seen``, in the dtype of ``query``.

    Tokens are projected, their heads merged. ``turn``: cosine and sine of each token's angles, a pair of a head's
    channels j and j + K / 2 each, or None. A token of an image without one that is seen gets a finite mean that its
    caller must not use, with arbitrary gradients. On a mesh (``jax.set_mesh``) samples lie over its ``batch_axes`` and
    heads over its ``head_axis``; each device works on its own.
    """

    def local(query, key, value, seen, turn):
        return _attend(query, key, value, seen, turn, head_width, implementation)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.shape.values()) == 1:
        return local(query, key, value, seen, turn)
    divided = query.shape[0] % math.prod(mesh.shape[axis] for axis in batch_axes) == 0
    samples = batch_axes if divided else None
    of_heads, whole = PartitionSpec(samples, None, None, head_axis), PartitionSpec()
    specs = (of_heads, of_heads, of_heads, PartitionSpec(samples), whole)
    return jax.shard_map(local, in_specs=specs, out_specs=of_heads, check_vma=False)(query, key, value, seen, turn)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(query, key, value, seen, turn, head_width, implementation):
    how = dict(head_width=head_width, interpret=_INTERPRETED[implementation])
    return full_tpu.forward(query, key, value, seen, turn, **how)


def _attend_forward(query, key, value, seen, turn, head_width, implementation):
    return _attend(query, key, value, seen, turn, head_width, implementation), (query, key, value, seen, turn)


def _attend_backward(head_width, implementation, kept, upstream):
    how = dict(head_width=head_width, interpret=_INTERPRETED[implementation])
    no_angles = jax.tree.map(jax.numpy.zeros_like, kept[-1])
    return *full_tpu.backward(*kept, upstream, **how), None, no_angles


_attend.defvjp(_attend_forward, _attend_backward)
