"""Who this process is among those of the run, read from the environment, and JAX told so.

Known: flags or JAX_* variables (loopback, bare machines, launch/gke_gpu.yaml), SLURM steps, GKE TPU pods and TPU VMs,
one slice or several. A process that finds none of these is alone and never starts ``jax.distributed``. JAX's own
detection is left off: under SLURM it gives every process one GPU, also where there is one process a node. Next:
start.py.
"""

import dataclasses
import glob
import importlib.util
import re
import urllib.error
import urllib.request
from collections.abc import Mapping

import jax

from skysense_jax.launch.roll_call import StartError

_TPU_PORT = 8476
_HIGH_PORTS = (61440, 4096)  # first and number of ports above those that Linux gives to outgoing connections
_METADATA = "http://{host}/computeMetadata/v1/instance/attributes/{key}"


@dataclasses.dataclass(frozen=True)
class Placement:
    """One process of several.

    Attributes:
      found_by: what told.
      coordinator: HOST:PORT of process 0.
      num_processes, process_id: of the run.
      local_device_ids: the GPUs of this machine that are this process'; None: all it sees.
    """

    found_by: str
    coordinator: str
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None = None


def find(
    environ: Mapping[str, str],
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Placement | None:
    """This process' place; None: it is the only one. Arguments win over JAX_* variables, these over a scheduler's.

    Raises:
      StartError: some of address, number and id are given or found and others are not, or they disagree.
    """
    found = _slurm(environ) or _tpu_pod(environ) or _tpu_vm(environ)
    coordinator = coordinator or environ.get("JAX_COORDINATOR_ADDRESS")
    num_processes = _integer(environ, "JAX_NUM_PROCESSES") if num_processes is None else num_processes
    process_id = _integer(environ, "JAX_PROCESS_ID") if process_id is None else process_id
    given = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
    if any(value is not None for value in given.values()):
        if found is None:
            missing = [flag for flag, value in given.items() if value is None]
            if missing and num_processes != 1:
                raise StartError(
                    f"{', '.join(missing)}: not given; wanted all of {', '.join(given)} (or JAX_COORDINATOR_ADDRESS, "
                    "JAX_NUM_PROCESSES, JAX_PROCESS_ID), or none of them for a run of one process"
                )
            found = Placement("flags or JAX_* variables", coordinator or "", num_processes or 1, process_id or 0)
        else:
            changed = dict(coordinator=coordinator, num_processes=num_processes, process_id=process_id)
            changed = {name: value for name, value in changed.items() if value is not None}
            found = dataclasses.replace(found, found_by=f"{found.found_by}, changed by flags or JAX_*", **changed)
    if found is None:
        if (_integer(environ, "JOB_COMPLETION_INDEX") or 0) > 0:
            raise StartError(
                "this is pod number " + environ["JOB_COMPLETION_INDEX"] + " of an indexed job, and "
                "JAX_COORDINATOR_ADDRESS is not set; wanted JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
                "JAX_PROCESS_ID in the pod's environment, as launch/gke_gpu.yaml sets them"
            )
        return None
    if found.num_processes < 1 or not 0 <= found.process_id < found.num_processes:
        raise StartError(
            f"process {found.process_id} of {found.num_processes} ({found.found_by}); wanted --process_id (or "
            "JAX_PROCESS_ID) from 0 to below --num_processes (or JAX_NUM_PROCESSES)"
        )
    return found if found.num_processes > 1 else None


def initialize(placement: Placement, *, timeout_s: int, heartbeat_timeout_s: int) -> None:
    """Connects this process to the others' JAX; all of them have met before (roll_call.py)."""
    jax.distributed.initialize(
        placement.coordinator,
        placement.num_processes,
        placement.process_id,
        local_device_ids=placement.local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=timeout_s,
        heartbeat_timeout_seconds=heartbeat_timeout_s,
    )


def _integer(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name)
    if not text:
        return None
    if not re.fullmatch(r"-?\d+", text):
        raise StartError(f"{name}: got {text!r}; wanted an integer")
    return int(text)


# ---- SLURM


def _slurm(environ: Mapping[str, str]) -> Placement | None:
    """A task of a step; not a batch script or a login shell, which have no list of the step's nodes."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if not all(environ.get(name) for name in names):
        return None
    job, count, number, local = (_integer(environ, name) or 0 for name in names[:1] + names[2:])
    # A requeued job keeps its number: the port moves on, should the last process 0 not be gone yet.
    first, size = _HIGH_PORTS
    port = (
        _integer(environ, "JAX_COORDINATOR_PORT")
        or first + (job + (_integer(environ, "SLURM_RESTART_COUNT") or 0)) % size
    )
    count = _integer(environ, "SLURM_STEP_NUM_TASKS") or count
    return Placement(
        found_by=f"SLURM job {job}",
        coordinator=f"{first_host(environ['SLURM_STEP_NODELIST'])}:{port}",
        num_processes=count,
        process_id=number,
        local_device_ids=_slurm_gpus(environ, local, count),
    )


def first_host(node_list: str) -> str:
    """The first name of SLURM's notation: "gpu[003-006,9],x" is gpu003 and others."""
    match = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\])?([^,\[]*)", node_list)
    if match is None:
        raise StartError(f"SLURM_STEP_NODELIST: got {node_list!r}; wanted names such as node[1-4]")
    return "".join(part or "" for part in match.groups())


def _slurm_gpus(environ: Mapping[str, str], local_id: int, num_processes: int) -> tuple[int, ...] | None:
    """With one task a node, or tasks that see only their own GPUs: all that is seen. Else an equal part each."""
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE") or str(num_processes)
    counts = []
    for part in tasks.split(","):  # "4(x2),3": as many tasks on each of two nodes, and three on the last
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise StartError(f"SLURM_STEP_TASKS_PER_NODE: got {tasks!r}; wanted e.g. 8(x4)")
        counts += [int(match[1])] * int(match[2] or 1)
    node = _integer(environ, "SLURM_NODEID") or 0
    here = counts[min(node, len(counts) - 1)]
    visible = [gpu for gpu in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    on_node = _integer(environ, "SLURM_GPUS_ON_NODE")
    own = "SLURM_GPUS_PER_TASK" in environ or len(visible) < here or (on_node and len(visible) * here <= on_node)
    if here == 1 or (visible and own):
        return None
    if len(visible) % here:
        raise StartError(
            f"{len(visible)} GPUs for {here} tasks on this node; wanted --ntasks-per-node=1, or one that divides them"
        )
    share = max(1, len(visible) // here)
    return tuple(range(local_id * share, (local_id + 1) * share))


# ---- TPU


def _tpu_pod(environ: Mapping[str, str]) -> Placement | None:
    """A pod of GKE, whose variables say all; several slices are joined by the MEGASCALE_* ones."""
    hosts = [host for host in environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    if not hosts or "TPU_WORKER_ID" not in environ:
        return None
    return _tpu("GKE TPU pod", environ, hosts, _integer(environ, "TPU_WORKER_ID") or 0, environ)


def _tpu_vm(environ: Mapping[str, str]) -> Placement | None:
    """A TPU VM: its metadata server knows the workers. Asked only where there are TPU chips."""
    wants_tpu = environ.get("JAX_PLATFORMS", "tpu") in ("", "tpu", "tpu,cpu")
    if not wants_tpu or environ.get("TPU_SKIP_MDS_QUERY") or not _has_tpu_chips():
        return None
    workers = _metadata(environ, "worker-network-endpoints")
    if not workers:
        return None
    # "name:port:address" each, or the address alone
    hosts = [worker.split(":")[-1] for worker in workers.strip().split(",")]
    settings = dict(re.findall(r"(?m)^\s*(\w+)\s*:\s*'?([^'\n]*?)'?\s*$", _metadata(environ, "tpu-env") or ""))
    number = _metadata(environ, "agent-worker-number")
    if number is None or not number.strip().isdigit():
        raise StartError(f"agent-worker-number of the TPU VM's metadata: got {number!r}; wanted this worker's number")
    return _tpu("TPU VM", environ, hosts, int(number), settings)


def _tpu(found_by: str, environ: Mapping[str, str], hosts: list[str], number: int, settings: Mapping[str, str]):
    slices, this_slice = (_integer(settings, f"MEGASCALE_{name}") for name in ("NUM_SLICES", "SLICE_ID"))
    first = settings.get("MEGASCALE_COORDINATOR_ADDRESS", "").split(":")[0] or hosts[0]
    return Placement(
        found_by=found_by + (f", {slices} slices" if slices and slices > 1 else ""),
        coordinator=f"{first}:{_integer(environ, 'JAX_COORDINATOR_PORT') or _TPU_PORT}",
        num_processes=len(hosts) * (slices or 1),
        process_id=number + (this_slice or 0) * len(hosts),
    )


def _has_tpu_chips() -> bool:
    return bool(importlib.util.find_spec("libtpu") and (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")))


def _metadata(environ: Mapping[str, str], key: str) -> str | None:
    """An attribute of this virtual machine; None if it has none of this name, or there is no metadata server."""
    host = environ.get("GCE_METADATA_HOST") or "metadata.google.internal"
    asked = urllib.request.Request(_METADATA.format(host=host, key=key), headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked, timeout=5) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise StartError(f"metadata server {host}, {key}: {error}") from error
    except OSError:
        return None  # chips without Google's server: a machine of its own
