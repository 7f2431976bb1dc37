"""What XLA's compilers are asked for beyond their defaults: the same in a run and in a plan of it.

Each was looked at in compiled programs, none was timed on an accelerator. Flags of the environment are in launch/.
"""

from typing import Any

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
# next iteration's weights of a scan: of the same stack on H200 a third less of the exchanges stood alone.
_GPU = {"xla_gpu_enable_latency_hiding_scheduler": True, "xla_gpu_enable_pipelined_all_gather": True}
_OPTIONS: dict[str, dict[str, Any]] = {"tpu": _TPU, "gpu": _GPU}


def options(platform: str) -> dict[str, Any]:
    """Compiler options for devices of a platform, as ``Device.platform`` names it."""
    return dict(_OPTIONS.get(platform, {}))
