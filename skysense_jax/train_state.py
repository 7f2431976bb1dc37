"""What a run carries from step to step, how it starts, and where each of its arrays lives on the mesh.

Randomness is not part of it: every step derives its keys from the seed and ``step``.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh

from skysense_jax import compiler
from skysense_jax.batch import Batch
from skysense_jax.models.skysense import SkySense
from skysense_jax.sharding import abstract, batch_sharding, tree_shardings, unbox


@struct.dataclass
class TrainState:
    """One run between two steps.

    Attributes:
      step: batches consumed, skipped updates included.
      student, teacher: parameters, fp32; the teacher is the exponential moving average of the student.
      optimizer: the optimizer's moments and counters.
      nonfinite_in_row, nonfinite_total: updates skipped for a non-finite loss or gradient.
    """

    step: Any  # int32
    student: Any
    teacher: Any
    optimizer: Any
    nonfinite_in_row: Any  # int32
    nonfinite_total: Any  # int32


def as_argument(seed: int) -> np.uint32:
    """What ``jax.random.key`` makes of a seed, as an argument of programs: they are the same for every seed."""
    return np.uint32(seed % 2**32)


def _init_boxed(model: SkySense, optimizer: optax.GradientTransformation, batch: Batch, seed: Any) -> TrainState:
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), batch)
    # the first of two: so a seed means what it always did
    params_key, _ = jax.random.split(jax.random.key(seed))
    student = model.init(params_key, zeros, train=False)["params"]
    counter = lambda: jnp.zeros((), jnp.int32)  # noqa: E731
    return TrainState(
        step=counter(),
        student=student,
        teacher=jax.tree.map(jnp.copy, student),
        optimizer=optimizer.init(student),
        nonfinite_in_row=counter(),
        nonfinite_total=counter(),
    )


def boxed_state(model: SkySense, optimizer: optax.GradientTransformation, batch: Batch) -> TrainState:
    """Shapes, dtypes and logical axes of the whole state; nothing is allocated.

    ``batch`` is a batch of shapes; parameters do not depend on its number of samples, so one sample is enough.
    """
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), batch)
    return jax.eval_shape(lambda: _init_boxed(model, optimizer, one, 0))


def state_shardings(boxed: TrainState, mesh: Mesh) -> TrainState:
    """Where each leaf of the state lives; what carries no logical axes (counters) is on every device."""
    return tree_shardings(boxed, mesh)


def abstract_state(boxed: TrainState, mesh: Mesh) -> TrainState:
    """Shapes with shardings: what a checkpoint is restored into."""
    return abstract(boxed, mesh)


def jit_step(step: Any, boxed: TrainState, mesh: Mesh) -> Any:
    """The training step, jitted: the state donated, its arrays where they lived. Call under ``jax.set_mesh(mesh)``."""
    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(state_shardings(boxed, mesh), None),
        compiler_options=compiler.options(mesh.local_devices[0]),
    )


def abstract_batch(shapes: Batch, mesh: Mesh) -> Batch:
    """A batch of shapes, placed: samples over the mesh's batch axes."""
    placed = batch_sharding(mesh)
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=placed), shapes)


def create_state(
    model: SkySense, optimizer: optax.GradientTransformation, batch: Batch, *, seed: int, mesh: Mesh
) -> TrainState:
    """A fresh state, each array made where it lives. Call under ``jax.set_mesh(mesh)``."""
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), batch)
    shardings = state_shardings(boxed_state(model, optimizer, batch), mesh)
    init = lambda seed: unbox(_init_boxed(model, optimizer, one, seed))  # noqa: E731
    return jax.jit(init, out_shardings=shardings)(as_argument(seed))
