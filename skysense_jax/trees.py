"""Names of a tree's leaves, as checkpoints, tables and the optimizer's masks spell them."""

from typing import Any

import jax
from flax import linen as nn


def path_string(path: tuple[Any, ...]) -> str:
    """Names along a jax key path joined by "/"; flax's partitioning boxes leave no trace."""
    names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", None)))) for key in path]
    boxed = bool(path) and isinstance(path[-1], jax.tree_util.GetAttrKey) and names[-1] == "value"
    return "/".join(names[:-1] if boxed else names)


def named_leaves(tree: Any) -> dict[str, Any]:
    """Path ("a/b/kernel") to leaf, boxes kept whole, in the tree's order."""
    is_box = lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)  # noqa: E731
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_box)
    return {path_string(path): leaf for path, leaf in leaves}
