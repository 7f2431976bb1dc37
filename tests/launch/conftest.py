"""Starting real processes on loopback that share 8 virtual devices."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def start():
    """``start(n, [command], per_process=[[flag], ...], **environ)``: (exit status, output) of each of n processes.

    They are killed after ``timeout_s``, which makes a hang a status of -9.
    """
    running = []

    def start_processes(count, command, *, per_process=None, devices=None, timeout_s=400, **environ):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
        for number in range(count):
            num_devices = devices[number] if devices else 8 // count
            place = [f"--coordinator={address}", f"--num_processes={count}", f"--process_id={number}"]
            env = {
                **os.environ,
                **environ,
                "XLA_FLAGS": " ".join([*flags, f"--xla_force_host_platform_device_count={num_devices}"]),
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
                "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
            }
            running.append(
                subprocess.Popen(
                    [sys.executable, *command, *(place if count > 1 else []), *(per_process or [[]] * count)[number]],
                    cwd=ROOT,
                    env=env,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        outcomes = []
        for process in running[-count:]:
            try:
                text, _ = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                text, _ = process.communicate()
            outcomes.append((process.returncode, text))
        return outcomes

    yield start_processes
    for process in running:
        if process.poll() is None:
            process.kill()
            process.wait()
