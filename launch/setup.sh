#!/usr/bin/env bash
# Sourced by the other scripts: a virtual environment in .venv with this package, then PYTHON points into it.
# SETUP_ARGS, an array, goes to pip. Uses $SKYSENSE_PYTHON (default python3) to make it; 3.11 or newer.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
base_python=${SKYSENSE_PYTHON:-python3}
"$base_python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "Python 3.11 or newer is needed; $base_python is $("$base_python" --version). Set SKYSENSE_PYTHON." >&2
  exit 1
}
[ -x .venv/bin/python ] || "$base_python" -m venv .venv
PYTHON=$PWD/.venv/bin/python
"$PYTHON" -m pip install --quiet --disable-pip-version-check --editable . ${SETUP_ARGS[@]+"${SETUP_ARGS[@]}"}
export PYTHON JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/.cache/jax}
# On a CPU a step's buffers (hundreds of MiB) stay with glibc, in huge pages, and are not faulted in again each step.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1000000000000:glibc.malloc.top_pad=67108864}
# Without a GPU (whose kernels it would change too) LLVM's level 1: the first step of `tiny` is there after 114 s, not 140.
command -v nvidia-smi >/dev/null || export XLA_FLAGS="--xla_backend_optimization_level=1 ${XLA_FLAGS:-}"
