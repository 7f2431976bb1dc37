#!/usr/bin/env bash
# The main job on the embedded default: pre-trains `tiny` on procedural scenes, probes it, writes pictures.
# Further arguments go to the trainer:  bash launch/local.sh --config.optim.num_steps=50
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
workdir=${WORKDIR:-runs/tiny}
bash launch/run.sh -m skysense_jax.train --config=configs/tiny.py --workdir="$workdir" "$@"
echo "Pictures: $workdir/pictures   Metrics: $workdir/metrics.jsonl   Again to go on, or remove $workdir to start anew."
