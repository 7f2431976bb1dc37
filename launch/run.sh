#!/usr/bin/env bash
# Python in the project's environment, on all cores of a machine without an accelerator:
#   bash launch/run.sh benchmarks/learning.py --out=runs/learning
# JAX sees a virtual device per core, up to 4 (a batch of `tiny`), each with one thread.
set -euo pipefail
SETUP_ARGS=()
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
devices=$("$PYTHON" -c 'import os; print(max(n for n in (1, 2, 4) if n <= (os.cpu_count() or 1)))')
export JAX_NUM_CPU_DEVICES=${JAX_NUM_CPU_DEVICES:-$devices}
exec "$PYTHON" "$@"
