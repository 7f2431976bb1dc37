"""Compiles a step for a target without hardware and says what a device would hold, compute, move and send.

The target's own compiler does it (extras ``plan-tpu`` and ``plan-gpu``), so what fits here fits there; times are rates
of chips.py and no measurement. Next: __main__.py prints it.
"""

import dataclasses
import functools
import importlib.util
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from skysense_jax import assembly, sharding, train_state
from skysense_jax.chips import Chip
from skysense_jax.plan import flops, program
from skysense_jax.targets import Target

# What libtpu asks of the cloud's metadata server, answered here, where there is none; two processes may compile.
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # any will do: the topology is given
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# What XLA asks of a GPU to compile for it; limits are those of NVIDIA's compute capability 9.0 (Hopper).
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  fpus_per_core: 128 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  core_count: {chip.cores} memory_bandwidth: {chip.memory_bandwidth:.0f} device_memory_size: {chip.memory_bytes}
  cuda_compute_capability {{ major: 9 minor: 0 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "NVIDIA {chip.name}"
"""
# Without a device its compiler picks tiles for Triton's matrix products blindly, and fails on some.
DOES_NOT_FIT = "does not fit"  # begins what is said of a step that is too large
GPU_OPTIONS: dict[str, Any] = {"xla_gpu_enable_triton_gemm": False}
_QUICK: dict[str, dict[str, Any]] = {
    "tpu": {"exec_time_optimization_effort": -1.0},
    "gpu": {"xla_disable_hlo_passes": "triton-softmax-rewriter"},
}


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Of one step on one device.

    Attributes:
      state_bytes: arguments, which are the training state and the batch; donated, so that they stand once.
      temporary_bytes: activations, gradients and what the compiler keeps besides.
      peak_bytes: state, results that are not donated, and temporaries together: what the program asks for.
      flops: of the step as traced, recomputation included, counted over its jaxpr; a device's share.
      model_flops: of the model, and of what it distils, by formula and without recomputation; a device's share.
      schedule: what the compiled program does, in its order.
      mesh_shape: devices along each axis, neighbours along the last.
    """

    state_bytes: int
    temporary_bytes: int
    peak_bytes: int
    flops: float
    model_flops: float
    schedule: tuple[program.Event, ...]
    mesh_shape: Mapping[str, int]

    @functools.cached_property
    def totals(self) -> program.Totals:
        """What the schedule moves and sends in all."""
        return program.totals(self.schedule)

    def compute_seconds(self, chip: Chip) -> float:
        """At the chip's rated bf16 FLOPs."""
        return self.flops / chip.flops

    def memory_seconds(self, chip: Chip) -> float:
        """Of the memory traffic at the chip's rated bandwidth."""
        return self.totals.memory_bytes / chip.memory_bandwidth

    def network_seconds(self, target: Target) -> float:
        """Of all exchanges one after another."""
        exchanges = (
            times * self.exchange_seconds(event, target)
            for event, times in program.flatten(self.schedule)
            if isinstance(event, program.Exchange)
        )
        return sum(exchanges, 0.0)

    def played(self, target: Target) -> tuple[float, float]:
        """Seconds of work, instruction by instruction, and seconds that exchanges add to it because the schedule
        places no work, or not enough, beside them."""
        work = lambda w: work_seconds(w, target.chip)  # noqa: E731
        return program.play(self.schedule, work, lambda exchange: self.exchange_seconds(exchange, target))

    def step_seconds(self, target: Target) -> float:
        """Work and what exchanges add to it."""
        return sum(self.played(target))

    def scaling(self, target: Target, more: Target) -> float:
        """A step's seconds over those on more chips of the kind, each with the samples that it has: along ``data``,
        which must have two devices or more here for its exchanges to be known."""
        times = more.num_chips // target.num_chips
        wider = dataclasses.replace(
            self,
            schedule=program.widen(self.schedule, "data", times),
            mesh_shape={**self.mesh_shape, "data": times * self.mesh_shape["data"]},
        )
        return self.step_seconds(target) / wider.step_seconds(more)

    def exchange_seconds(self, exchange: program.Exchange, target: Target) -> float:
        """Latency and bytes of one exchange: over links while the axes of the exchange, and all within, are linked.

        Beyond that each host (or slice) sends with the network of all its members of the group.
        """
        chip, group = target.chip, exchange.group
        linked = min(target.chips_per_slice, chip.largest_slice)
        outermost = list(self.mesh_shape).index(exchange.axes[0])
        reach = math.prod(list(self.mesh_shape.values())[outermost:])
        nodes = max(min(group, reach // linked), 1)  # that only the network joins
        members = group / nodes
        # hops: around a torus both ways, or a ring; sums over many nodes go up and down a tree
        hops = chip.dimensions * members ** (1 / chip.dimensions) / 2 if chip.dimensions else members - 1
        latency = hops * chip.link_latency
        reduces = exchange.kind == "all-reduce"
        latency += (math.log2(nodes) if reduces else nodes - 1) * chip.network_latency
        if exchange.kind in ("all-to-all", "ragged-all-to-all", "collective-permute"):  # straight to their receivers
            latency = chip.link_latency if nodes == 1 else chip.network_latency
        seconds = exchange.bytes_sent / chip.link_bandwidth
        if nodes > 1 and "all-to-all" in exchange.kind:  # each device's own network takes what is for other hosts
            operand = exchange.bytes_sent / (1 - 1 / group)
            seconds = max(seconds, operand * (1 - 1 / nodes) / chip.network_bandwidth)
        elif nodes > 1:
            seconds = max(seconds, exchange.bytes_sent / (members * chip.network_bandwidth))
        return latency * (2 if reduces else 1) + seconds


def work_seconds(work: program.Work, chip: Chip) -> float:
    """The longer of an instruction's FLOPs, on a TPU in all passes, and its bytes at the chip's rates."""
    flops = work.flops * (work.passes if chip.platform == "tpu" else 1)
    return max(flops / chip.flops, work.num_bytes / chip.memory_bandwidth)


def make_mesh(target: Target, sizes: dict[str, int]) -> Mesh:
    """The mesh of a run over the target's devices, which only a compiler may use.

    Raises:
      ValueError: the target's compiler is not installed, or the sizes do not multiply to the number of chips.
    """
    wanted, extra = ("libtpu", "plan-tpu") if target.chip.platform == "tpu" else ("jax_cuda13_plugin", "plan-gpu")
    if importlib.util.find_spec(wanted) is None:
        raise ValueError(f"--target={target.chip.name}: no compiler for it: pip install --editable '.[{extra}]'")
    if target.chip.platform == "tpu":
        for name, value in _TPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        options: dict[str, Any] = {"topology_name": target.topology, "num_slices": target.num_slices}
        if target.chips_per_slice == 1:
            options["chips_per_host_bounds"] = (1, 1, 1)
    else:
        options = {"topology": target.topology, "target_config": _HOPPER.format(chip=target.chip)}
    compiler = "tpu" if target.chip.platform == "tpu" else "cuda"
    devices = topologies.get_topology_desc(platform=compiler, **options).devices
    return sharding.make_mesh(**sizes, devices=devices)


def compile_step(
    config: Any, mesh: Mesh, *, say: Callable[[str], None] = lambda text: None, quick: bool = False
) -> Forecast:
    """The step of ``config``, compiled for the devices of ``mesh``; nothing is allocated. ``say`` hears how far it is.

    ``quick``: compilers leave out what takes most of their time, a TPU's the search for tiles and more, a GPU's Triton
    kernels for norms and softmax. Memory is near and above; traffic and exchanges are not a run's. A block of ``huge``
    takes 12 s for 52 on a TPU, and 1.39 GiB for 1.27; `tiny` has twice the traffic and four times the exchanges there.

    Raises:
      ValueError: the compiler found no way to fit the step into the target's memory.
    """
    run = assembly.assemble(config, mesh.devices.flat[0].platform)
    shapes = assembly.batch_shapes(config, run.modalities)
    start = time.monotonic()
    stage = lambda name: say(f"{name} after {time.monotonic() - start:.0f} s")  # noqa: E731
    with jax.set_mesh(mesh):
        boxed = train_state.boxed_state(run.network, run.optimizer, shapes)
        step = train_state.jit_step(run.step, boxed, mesh)
        frozen = None if run.frozen is None else run.frozen.abstract(mesh)
        state, batch = train_state.abstract_state(boxed, mesh), train_state.abstract_batch(shapes, mesh)
        traced = step.trace(state, batch, run.seed, frozen)
        stage("traced")
        lowered = traced.lower()
        stage("lowered")
        on_gpu = mesh.devices.flat[0].platform == "gpu"
        options = (dict(GPU_OPTIONS) if on_gpu else {}) | (_QUICK["gpu" if on_gpu else "tpu"] if quick else {})
        try:
            compiled = lowered.compile(options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise ValueError(f"{DOES_NOT_FIT}: {str(error).splitlines()[0]}") from error
        stage("compiled")
    memory = compiled.memory_analysis()
    return Forecast(
        state_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        peak_bytes=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
        flops=flops.of_jaxpr(traced.jaxpr.jaxpr) / mesh.size,
        model_flops=assembly.batch_flops(config, run.modalities, run.frozen) / mesh.size,
        schedule=program.read(compiled.as_text(), dict(mesh.shape)),
        mesh_shape=dict(mesh.shape),
    )
