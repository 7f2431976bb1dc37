"""How large the gradient of each loss term is in each layer: looked at on demand (``config.run.norms_every_steps``).

A term whose gradient is a hundred times another's decides alone what a layer learns, and a layer whose gradient grows
from look to look is where a run will leave the rails. A look costs a forward and a backward pass for each term, and one
for their sum.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, UInt32

from skysense_jax.batch import Batch
from skysense_jax.sharding import LAYERS
from skysense_jax.train_state import TrainState
from skysense_jax.train_step import Sides, student_gradient, student_sums
from skysense_jax.trees import named_leaves

Norms = dict[str, Float[Array, ""]]


def layer_norms(tree: Any, boxed: Any) -> Norms:
    """The Euclidean norm of what ``tree`` holds for each layer: "backbone/stage1_0", "backbone/stage3/7".

    ``boxed``: parameters with the names of their axes; blocks that a scan stacks are told apart by them.
    """
    squares: dict[str, Any] = {}
    leaves = named_leaves(tree)
    for path, box in named_leaves(boxed).items():
        layer, square = "/".join(path.split("/")[:2]), jnp.square(leaves[path].astype(jnp.float32))
        if isinstance(box, nn.Partitioned) and LAYERS in box.names:
            depth = box.names.index(LAYERS)
            of_blocks = square.sum([axis for axis in range(square.ndim) if axis != depth])
            parts = {f"{layer}/{block}": of_block for block, of_block in enumerate(of_blocks)}
        else:
            parts = {layer: square.sum()}
        for name, part in parts.items():
            squares[name] = squares.get(name, 0.0) + part
    return {name: jnp.sqrt(square) for name, square in squares.items()}


def gradient_norms(
    sides: Sides, boxed: Any, state: TrainState, batch: Batch, seed: UInt32[Array, ""], frozen: Any = None
) -> Mapping[str, Any]:
    """``{"gradient": {term: norms}, "parameters": norms}`` of the student before a step on ``batch``.

    Terms are weighted as in the loss, before the gradient is clipped; "loss" is their sum.
    """
    inputs, _, targets = sides.look(state, batch, seed, frozen)
    weights = sides.objective.weights
    terms = jax.eval_shape(lambda: student_sums(sides.student(state.student), inputs, targets, sides.objective))
    # without a mixture of experts there is no term of routers, whatever its weight
    asked = {name: {name: weight} for name, weight in weights.items() if weight > 0 and name in terms}
    asked["loss"] = weights
    gradients = {}
    for term, chosen in asked.items():
        objective = dataclasses.replace(sides.objective, weights=dict.fromkeys(weights, 0.0) | dict(chosen))
        _, _, gradient = student_gradient(
            sides.student, state.student, inputs, targets, objective, microbatches=sides.microbatches
        )
        gradients[term] = layer_norms(gradient, boxed)
    return {"gradient": gradients, "parameters": layer_norms(state.student, boxed)}
