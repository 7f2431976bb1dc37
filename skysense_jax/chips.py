"""The accelerators that are known: what they hold, what they are rated at, what jax calls them.

The one table of rates; every figure is a vendor's data sheet, named in the row. The plan predicts with it (plan/), a
run divides by it (measure.py). Nothing here imports jax or an accelerator's compiler.
"""

import dataclasses

GIB, GB = 2**30, 1e9


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator.

    Attributes:
      platform: what jax calls it, "tpu" or "gpu".
      memory_bytes: what a program may use of it, less than the label says.
      flops: bf16 multiply-adds a second, dense, as two operations each.
      memory_bandwidth: bytes a second, read and written.
      link_bandwidth: bytes a second that a chip sends to others of its slice (TPU: all links, one direction) or of its
        host (GPU: NVLink, one direction).
      network_bandwidth: bytes a second that a chip sends beyond its slice or host.
      link_latency: seconds of a hop between neighbours over links; of every step of a ring on a host.
      network_latency: the same beyond the slice or host.
      chips_per_host: of the usual machine.
      largest_slice: chips that are linked without the network.
      cores: TensorCores of a TPU (more than one: the cloud's own names count them), multiprocessors of a GPU.
      dimensions: of the torus that links a slice; 0: all chips of a host are linked to each other.
      source: where the figures come from.
      device_kinds: what jax says in ``Device.device_kind``; other boards of the same name are rated otherwise.
    """

    name: str
    platform: str
    memory_bytes: int
    flops: float
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    link_latency: float
    network_latency: float
    chips_per_host: int
    largest_slice: int
    cores: int
    dimensions: int
    source: str
    device_kinds: tuple[str, ...]


def _tpu(name, memory_gib, teraflops, bandwidth, link_gbits, largest, cores, dimensions, *kinds) -> Chip:
    source = f"Google Cloud TPU documentation, {name}; memory as its compiler states it"
    # Links are quoted as both directions of all of them; 100 Gbit/s to the network for a host of four chips. Latency:
    # a microsecond a hop (Austin et al., How to Scale Your Model, on sharded matrices); ten on the network are a guess.
    rates = teraflops * 1e12, bandwidth * GB, link_gbits / 16 * GB, 3.1 * GB, 1e-6, 1e-5
    return Chip(name, "tpu", int(memory_gib * GIB), *rates, 4, largest, cores, dimensions, source, kinds)


def _gpu(name, memory_gib, teraflops, bandwidth, nvlink, cores, label, *kinds) -> Chip:
    source = f"NVIDIA data sheet of {label}; {memory_gib} GiB of it usable"
    # NVLink is quoted as both directions; 400 Gbit/s of InfiniBand or RoCE a GPU, as in machines of eight. Latencies
    # of a ring's step are those that NCCL chooses algorithms by (src/graph/tuning.cc, protocol LL128).
    rates = teraflops * 1e12, bandwidth * GB, nvlink / 2 * GB, 50 * GB, 1.9e-6, 4e-6
    return Chip(name, "gpu", int(memory_gib * GIB), *rates, 8, 8, cores, 0, source, kinds)


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        _tpu("v5e", 15.75, 197, 819, 1600, 256, 1, 2, "TPU v5 lite", "TPU v5e"),
        _tpu("v5p", 95.74, 459, 2765, 4800, 8960, 2, 3, "TPU v5", "TPU v5p"),
        _tpu("v6e", 31.25, 918, 1640, 3584, 256, 1, 2, "TPU v6 lite", "TPU v6e"),
        _gpu("h20", 94, 148, 4000, 900, 78, "H20, 96 GB", "NVIDIA H20"),
        _gpu("h100", 78, 989, 3350, 900, 132, "H100 SXM, 80 GB", "NVIDIA H100 80GB HBM3"),
        _gpu("h200", 139, 989, 4800, 900, 132, "H200, 141 GB", "NVIDIA H200"),
    )
}
_BY_KIND = {kind: chip for chip in CHIPS.values() for kind in chip.device_kinds}


def of_device_kind(kind: str) -> Chip | None:
    """The chip that jax calls ``kind``; None if it is not in the table, as a CPU is not."""
    return _BY_KIND.get(kind)
