"""Small states on small meshes, and runs that saved some: for tests of checkpoints, in directories and in buckets."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from skysense_jax import checkpoint
from skysense_jax.checkpoint import Checkpoints


@struct.dataclass
class State:
    step: Any
    student: Any
    teacher: Any
    optimizer: Any


def make_state(seed=0, width=8):
    rng = np.random.default_rng(seed)
    params = {
        "stage": {
            "kernel": rng.standard_normal((16, width)).astype(np.float32),
            "bias": np.arange(3, dtype=np.float32),
        },
        "half": rng.standard_normal((64, 125)).astype(np.float32),
    }
    teacher = jax.tree.map(lambda x: 2 * x, params)
    return State(np.int32(seed), params, teacher, ({"moment": params["half"].astype(jnp.bfloat16)}, ()))


def mesh_of(shape):
    return Mesh(np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape), ("data", "fsdp"))


def placed(state, shape):
    """Abstract state on a mesh: matrices over both axes, the rest everywhere."""
    mesh = mesh_of(shape)
    spec = lambda x: PartitionSpec("fsdp", "data") if np.ndim(x) == 2 and x.shape[1] == 8 else PartitionSpec()  # noqa: E731
    as_shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec(x)))  # noqa: E731
    return jax.tree.map(as_shape, state)


def put(state, shape):
    return jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), state, placed(state, shape))


def open_run(workdir, **changes):
    return Checkpoints(workdir, **{**dict(every_steps=1, keep_last=3, keep_every_steps=1000), **changes})


def save(checkpoints, step, state, *, force=False):
    data_state = {"global_next_index": 8 * step, "nested": {"epochs": [1, 2]}}
    how = checkpoints.save if force else checkpoints.maybe_save
    return how(step, state, data_state=data_state, meta={"config": "a = 1\n"})


def save_and_wait(checkpoints, step):
    save(checkpoints, step, put(make_state(step), (1, 1)))
    checkpoints.wait()


def assert_bits_equal(got, want):
    got, want = ({p: np.asarray(x) for p, x in checkpoint.named_leaves(t).items()} for t in (got, want))
    assert list(got) == list(want)
    for path in want:
        assert (got[path].shape, got[path].dtype) == (want[path].shape, want[path].dtype), path
        assert got[path].tobytes() == want[path].tobytes(), path


def saved_run(workdir, steps=(1, 2), mesh=(1, 1), **changes):
    checkpoints = open_run(workdir, **changes)
    for step in steps:
        assert save(checkpoints, step, put(make_state(step), mesh))
    checkpoints.wait()
    return checkpoints
