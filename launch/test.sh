#!/usr/bin/env bash
# Lint and tests, with everything they need. Further arguments go to pytest:  bash launch/test.sh tests/models
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" --requirement requirements-test.txt
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m pytest --numprocesses 2 "$@"
