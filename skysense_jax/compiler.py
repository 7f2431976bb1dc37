"""What XLA's compilers are asked for beyond their defaults: the same in a run and in a plan of it.

Each was looked at in compiled programs, none was timed on an accelerator. Flags of the environment are in launch/.
"""

from typing import Any

# Gathers of weights run beside the matrix products before them. It takes all five: with the first, second and fourth
# alone, or the last alone, every gather of a scanned layer on v5p stood alone.
_TPU = {
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    "xla_enable_async_all_gather": True,
}
# The same on GPUs, across the iterations of a scan: of a scanned layer a third less of the exchanges stands alone.
_GPU = {"xla_gpu_enable_latency_hiding_scheduler": True, "xla_gpu_enable_pipelined_all_gather": True}
_OPTIONS: dict[str, dict[str, Any]] = {"tpu": _TPU, "gpu": _GPU}


def options(platform: str) -> dict[str, Any]:
    """Compiler options for devices of a platform, as ``Device.platform`` names it."""
    return dict(_OPTIONS.get(platform, {}))
