"""A batch worked on in parts, one after the other, so that what a part needs stands in memory once and not B times.

Part i holds samples i, i + n, i + 2 n ...: every device keeps a share of each part, and nothing moves. What all samples
have in common is wrapped in ``Shared`` and goes to each part as it is.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shared:
    """A value that has no batch axis."""

    value: Any


def split(x: Shaped[Array, "B *rest"], parts: int) -> Shaped[Array, "n b *rest"]:
    """``x`` cut into ``parts``."""
    return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)


def join(x: Shaped[Array, "n b *rest"]) -> Shaped[Array, "B *rest"]:
    """The batch whose parts these are."""
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])


def fold(fn: Callable[[Any, Any], Any], start: Any, tree: Any, *, parts: int) -> Any:
    """``fn(result so far, part)`` for each part of ``tree`` (first axes: the batch), beginning with ``start``."""
    if parts == 1:
        return fn(start, tree)
    cut, whole = _cut(tree, parts)
    return jax.lax.scan(lambda so_far, part: (fn(so_far, whole(part)), None), start, cut)[0]


def total(fn: Callable[[Any], Any], tree: Any, *, parts: int) -> Any:
    """The sum of ``fn(part)``, a tree of sums over samples; a gradient computes each part once more."""
    if parts == 1:
        return fn(tree)
    cut, whole = _cut(tree, parts)
    of_part = jax.checkpoint(lambda part: fn(whole(part)), prevent_cse=False)  # the scan keeps the two passes apart
    shapes = jax.eval_shape(lambda cut: of_part(jax.tree.map(lambda x: x[0], cut)), cut)
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    add = lambda so_far, part: (jax.tree.map(jnp.add, so_far, of_part(part)), None)  # noqa: E731
    return jax.lax.scan(add, zero, cut)[0]


def each(fn: Callable[[Any], Any], tree: Any, *, parts: int) -> Any:
    """``fn(tree)``, a tree of arrays with the batch first, worked out part by part."""
    if parts == 1:
        return fn(tree)
    cut, whole = _cut(tree, parts)
    return jax.tree.map(join, jax.lax.map(lambda part: fn(whole(part)), cut))


def _cut(tree: Any, parts: int) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The leaves of ``tree`` that have a batch axis, cut, and what makes a tree of one part's leaves."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=lambda leaf: isinstance(leaf, Shared))
    shared = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Shared)}
    cut = [split(leaf, parts) for i, leaf in enumerate(leaves) if i not in shared]

    def whole(part):
        of_part = iter(part)
        return structure.unflatten(shared[i] if i in shared else next(of_part) for i in range(len(leaves)))

    return cut, whole
