"""What XLA's compilers are asked for beyond their defaults: the same in a run and in a plan of it.

Each was looked at in compiled programs, none was timed on an accelerator. Flags of the environment are in launch/.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Gathers of weights run beside the matrix products before them, in a scanned stack of MLPs on v5p. With the first four
# only, or with the last only, none did.
_TPU = {
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    "xla_enable_async_all_gather": True,
}
# The first is what GPUs are run with elsewhere and changed nothing in the programs looked at; the second gathers the
# next iteration's weights of a scan: of the same stack on H200 a third less of the exchanges stood alone. jax 0.11 does
# not know it, and refuses to compile with what it does not know.
_GPU = {"xla_gpu_enable_latency_hiding_scheduler": True, "xla_gpu_enable_pipelined_all_gather": True}
_OPTIONS: dict[str, dict[str, Any]] = {"tpu": _TPU, "gpu": _GPU}


@functools.cache
def _known(device: jax.Device) -> dict[str, Any]:
    wanted = _OPTIONS.get(device.platform, {})
    if not wanted:
        return {}
    alone, known = Mesh(np.asarray([device]), ("device",)), {}
    with jax.set_mesh(alone):  # not the caller's
        number = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(alone, PartitionSpec()))
        lowered = jax.jit(lambda x: x + 1).lower(number)
    for name, value in wanted.items():
        try:
            lowered.compile(compiler_options={name: value})
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):
                raise
            logging.warning("the compiler of %s knows no option %s: left out", device.device_kind, name)
        else:
            known[name] = value
    return known


def options(device: jax.Device) -> dict[str, Any]:
    """Compiler options for ``device``, present or a topology's, as far as its compiler knows them."""
    return dict(_known(device))
