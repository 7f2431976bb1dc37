#!/usr/bin/env bash
# The main job on the embedded default: writes procedural scenes as records, pre-trains `tiny` on them, probes it, writes
# pictures. The scenes are the first 256 of configs/tiny.py, rendered once instead of at every draw: of
# --config.data.scenes only what the probe takes counts here. Remove the folder after a change of the generator.
# Further arguments go to the trainer:  bash launch/local.sh --config.optim.num_steps=50
set -euo pipefail
# shellcheck disable=SC2034  # setup.sh reads it
SETUP_ARGS=()
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
workdir=${WORKDIR:-runs/tiny} scenes=$PWD/runs/scenes_256_of_16_cells
ls "$scenes"/*.array_record >/dev/null 2>&1 ||
  "$PYTHON" -m skysense_jax.data.scenes --out="$scenes" --num_scenes=256 --extent_cells=16
"$PYTHON" -m skysense_jax.train --config=configs/tiny.py --workdir="$workdir" \
  --config.data.sources="(('$scenes/*.array_record', 1.0),)" "$@"
echo "Pictures: $workdir/pictures   Metrics: $workdir/metrics.jsonl   Again to go on, or remove $workdir to start anew."
