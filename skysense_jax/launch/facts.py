"""What a process knows of its own machine before JAX starts: versions, code, config, flags, data, working directory.

Plain values that JSON can hold. Nothing is judged here but what a process can judge alone; comparing with the others is
report.py's. Does not import jax.
"""

import glob
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import re
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

import skysense_jax
from skysense_jax import storage

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "array_record", "numpy")
# Of these a host has what its accelerator needs, or none.
PLUGINS = (
    "libtpu",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "jax-rocm7-plugin",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
)
FLAGS = (
    "XLA_FLAGS",
    "LIBTPU_INIT_ARGS",
    "JAX_PLATFORMS",
    "JAX_ENABLE_X64",
    "JAX_DEFAULT_MATMUL_PRECISION",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
    "NCCL_ALGO",
    "NCCL_PROTO",
    "NCCL_NVLS_ENABLE",
    "NCCL_IB_DISABLE",
)
# What drivers show of a machine's devices; there also where a driver would fail.
_DEVICE_FILES = {"gpu": "/dev/nvidia[0-9]*", "tpu": "/dev/accel[0-9]*", "tpu (vfio)": "/dev/vfio/[0-9]*"}
_PER_HOST_FLAG = r"--xla_(dump_\w+|force_host_platform_device_count)"  # may differ between hosts
SCENES = "scenes"


def host_name() -> str:
    """This machine's name, as reports call it."""
    return socket.gethostname()


def collect(*, config_text: str, sources: Sequence[str], more_flags: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Facts of this process by name. ``config_text``: all fields, a line each; ``sources``: globs or "scenes";
    ``more_flags``: beside those of the environment."""
    return dict(
        host=host_name(),
        pid=os.getpid(),
        versions=versions(),
        code=code_digest(),
        config=config_text,
        flags={name: _without_per_host(os.environ.get(name, "")) for name in FLAGS} | dict(more_flags or {}),
        device_files={kind: len(glob.glob(pattern)) for kind, pattern in _DEVICE_FILES.items()},
        sources={name: source_facts(name) for name in sources if name != SCENES},
    )


def versions() -> dict[str, str]:
    """Of Python and of the packages that a step depends on; "none" where a plugin is not installed."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *PLUGINS):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def code_digest() -> str:
    """The version of this package and a digest of its source: hosts with another checkout compute something else."""
    root, digest = pathlib.Path(skysense_jax.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return f"{skysense_jax.__version__} {digest.hexdigest()[:12]}"


def _without_per_host(flags: str) -> str:
    return " ".join(sorted(flag for flag in flags.split() if not re.match(_PER_HOST_FLAG, flag)))


def source_facts(pattern: str) -> dict[str, Any]:
    """How many files match, their bytes, a digest of names and sizes, and what keeps this process from reading them."""
    files, digest, problem = [], hashlib.sha256(), ""
    try:
        if storage.is_url(pattern):  # refused here where it cannot be read: its reader would wait without a word
            files = storage.find(pattern)
        else:
            files = [(file, os.stat(file).st_size) for file in sorted(glob.glob(pattern, recursive=True))]
            for file, _ in files[:1] + files[-1:]:
                with open(file, "rb") as opened:
                    opened.read(1)
        problem = "" if files else "no file matches"
    except OSError as error:
        problem = f"{error.filename}: {error.strerror}"
    except ValueError as error:
        problem = str(error)
    for file, length in files:
        digest.update(f"{os.path.basename(file)} {length}\n".encode())
    size = sum(length for _, length in files)
    return dict(files=len(files), bytes=size, digest=digest.hexdigest()[:12], problem=problem)


# ---- the working directory


class Token:
    """A file in the working directory by which processes see whether it is one and the same for all."""

    def __init__(self, workdir: storage.Directory, name: str):
        self._path = workdir / f".preflight-{name}"
        self._written = False

    def write(self) -> str:
        """Nothing, or why this process cannot write there."""
        told = storage.problem(str(self._path)) if storage.in_bucket(self._path) else ""
        try:
            if not told:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._path.write_text(self._path.name)
                self._written = True
        except OSError as error:
            told = error.strerror or str(error)
        except Exception as error:  # a bucket's client has errors of its own
            if not storage.in_bucket(self._path):
                raise
            told = f"{type(error).__name__}: {error}".split("\n")[0]
        return f"{told} ({host_name()})" if told else ""

    def is_there(self, *, wait_s: float) -> bool:
        """Whether this process reads what was written; network file systems may show a new file late."""
        deadline = time.monotonic() + wait_s
        while True:
            try:
                if self._path.read_text() == self._path.name:
                    return True
            except OSError:
                pass  # not there, or not yet
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.2)

    def remove(self) -> None:
        """It is gone, if this process wrote it."""
        if self._written:
            self._path.unlink(missing_ok=True)
