#!/usr/bin/env bash
# Lint and tests, with everything they need. Further arguments go to pytest:  bash launch/test.sh tests/models
set -euo pipefail
# shellcheck disable=SC2034  # setup.sh reads it
SETUP_ARGS=(--requirement requirements-test.txt)
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
"$PYTHON" tests/browser.py  # fetched once, into .cache
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
# A file's tests share what they compile: they go to one process, the longest files first (tests/conftest.py).
"$PYTHON" -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 30 "$@"
