"""Who a process is, in the environments of schedulers as their documentation and one real SLURM show them."""

import http.server
import threading

import pytest

from skysense_jax.launch import processes
from skysense_jax.launch.processes import Placement
from skysense_jax.launch.roll_call import StartError

SLURM = dict(
    SLURM_JOB_ID="4097",
    SLURM_STEP_NODELIST="gpu[003-006]",
    SLURM_NTASKS="4",
    SLURM_PROCID="2",
    SLURM_LOCALID="0",
    SLURM_NODEID="2",
    SLURM_STEP_TASKS_PER_NODE="1(x4)",
)


@pytest.fixture(autouse=True)
def _no_tpu_here(monkeypatch):
    monkeypatch.setattr(processes, "_has_tpu_chips", lambda: False)


def test_laptop_is_one_process():
    assert processes.find({}) is None
    assert processes.find({"JAX_NUM_PROCESSES": "1"}) is None
    assert processes.find({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}) is None


def test_flags_win_over_variables():
    environ = dict(JAX_COORDINATOR_ADDRESS="a:1", JAX_NUM_PROCESSES="4", JAX_PROCESS_ID="3")
    assert processes.find(environ) == Placement("flags or JAX_* variables", "a:1", 4, 3)
    assert processes.find(environ, coordinator="b:2", process_id=0) == Placement(
        "flags or JAX_* variables", "b:2", 4, 0
    )


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (dict(coordinator="a:1"), "--num_processes, --process_id: not given"),
        (dict(num_processes=2, process_id=0), "--coordinator: not given"),
        (dict(coordinator="a:1", num_processes=2, process_id=2), "process 2 of 2"),
        (dict(coordinator="a:1", num_processes=2, process_id=-1), "process -1 of 2"),
    ],
)
def test_half_given_places_are_refused_by_flag(given, told):
    with pytest.raises(StartError, match=told):
        processes.find({}, **given)


def test_variable_that_is_no_number_is_named():
    with pytest.raises(StartError, match="JAX_PROCESS_ID: got 'two'"):
        processes.find(dict(JAX_COORDINATOR_ADDRESS="a:1", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="two"))


def test_pod_of_an_indexed_job_without_a_coordinator_is_refused():
    with pytest.raises(StartError, match=r"pod number 3 .*JAX_COORDINATOR_ADDRESS"):
        processes.find({"JOB_COMPLETION_INDEX": "3"})


def test_slurm_task_a_node_sees_all_gpus():
    found = processes.find({**SLURM, "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"})
    assert found == Placement("SLURM job 4097", "gpu003:61441", 4, 2, None)


def test_slurm_requeued_job_takes_another_port_and_an_override_wins():
    assert processes.find({**SLURM, "SLURM_RESTART_COUNT": "2"}).coordinator == "gpu003:61443"
    assert processes.find({**SLURM, "JAX_COORDINATOR_PORT": "5000"}).coordinator == "gpu003:5000"
    found = processes.find({**SLURM, "JAX_COORDINATOR_ADDRESS": "10.0.0.1:5"})
    assert (found.coordinator, found.process_id) == ("10.0.0.1:5", 2)


@pytest.mark.parametrize(
    ("local_id", "visible", "gpus"),
    [("3", "0,1,2,3", (3,)), ("1", "0,1,2,3,4,5,6,7", (2, 3)), ("2", "5", None), ("3", "", (3,))],
)
def test_slurm_tasks_of_a_node_share_its_gpus(local_id, visible, gpus):
    """Four tasks a node: all see all GPUs, or each only its own; a CPU machine shows none."""
    environ = {**SLURM, "SLURM_LOCALID": local_id, "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_NTASKS": "8"}
    assert processes.find({**environ, "CUDA_VISIBLE_DEVICES": visible}).local_device_ids == gpus


def test_slurm_tasks_with_gpus_of_their_own_take_all_that_they_see():
    environ = {**SLURM, "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x4)", "SLURM_NTASKS": "8"}
    four = {**environ, "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    assert processes.find({**four, "SLURM_GPUS_PER_TASK": "4"}).local_device_ids is None
    assert processes.find({**four, "SLURM_GPUS_ON_NODE": "8"}).local_device_ids is None
    assert processes.find({**four, "SLURM_GPUS_ON_NODE": "4"}).local_device_ids == (2, 3)


def test_slurm_gpus_that_tasks_do_not_divide_are_refused():
    environ = {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "3(x4)", "SLURM_NTASKS": "12"}
    with pytest.raises(StartError, match=r"8 GPUs for 3 tasks on this node; wanted --ntasks-per-node=1, or one"):
        processes.find({**environ, "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"})


def test_slurm_batch_script_and_single_task_are_one_process():
    batch = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"}
    assert processes.find(batch) is None
    assert processes.find({**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[3,5]", "node3"),
        ("gpu[003-006,9],x", "gpu003"),
        ("a-[07-09]-ib,b", "a-07-ib"),
    ],
)
def test_first_host_of_slurm_node_lists(nodes, first):
    assert processes.first_host(nodes) == first


def test_gke_tpu_pod_of_one_slice_and_of_two():
    pod = dict(TPU_WORKER_HOSTNAMES="w-0.j,w-1.j,w-2.j", TPU_WORKER_ID="1")
    assert processes.find(pod) == Placement("GKE TPU pod", "w-0.j:8476", 3, 1)
    second = dict(MEGASCALE_NUM_SLICES="2", MEGASCALE_SLICE_ID="1", MEGASCALE_COORDINATOR_ADDRESS="s0-w-0.j:8080")
    assert processes.find({**pod, **second}) == Placement("GKE TPU pod, 2 slices", "s0-w-0.j:8476", 6, 4)


def _metadata_server(attributes):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            value = attributes.get(self.path.rpartition("/")[2])
            allowed = self.headers["Metadata-Flavor"] == "Google"
            self.send_response(403 if not allowed else 404 if value is None else 200)
            self.end_headers()
            self.wfile.write((value or "").encode())

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.mark.parametrize("worker", ["unknown:unknown:10.0.0.{}", "10.0.0.{}"])
def test_tpu_vm_is_told_by_its_metadata_server(monkeypatch, worker):
    monkeypatch.setattr(processes, "_has_tpu_chips", lambda: True)
    attributes = {
        "worker-network-endpoints": ",".join(worker.format(i) for i in range(4)),
        "agent-worker-number": "2",
        "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-16'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
        "MEGASCALE_COORDINATOR_ADDRESS: '10.9.9.9:8080'\n",
    }
    with _metadata_server(attributes) as server:
        environ = {"GCE_METADATA_HOST": f"127.0.0.1:{server.server_port}"}
        assert processes.find(environ) == Placement("TPU VM, 2 slices", "10.9.9.9:8476", 8, 6)
        attributes["tpu-env"] = "ACCELERATOR_TYPE: 'v5litepod-16'\n"
        assert processes.find(environ) == Placement("TPU VM", "10.0.0.0:8476", 4, 2)
        assert processes.find({**environ, "JAX_PLATFORMS": "cpu"}) is None
        server.shutdown()


def test_chips_without_a_metadata_server_are_one_process(monkeypatch):
    monkeypatch.setattr(processes, "_has_tpu_chips", lambda: True)
    assert processes.find({"GCE_METADATA_HOST": "127.0.0.1:9"}) is None
