#!/usr/bin/env bash
# Pre-trains on all workers of a TPU VM:  bash launch/tpu_vm.sh NAME ZONE --config=configs/huge.py:v5p:64 --workdir=DIR ...
# Run it where gcloud is logged in. It copies this checkout to every worker, installs it there, and starts the same
# command everywhere; the workers find each other through the TPU's metadata server. DIR and the data are on storage
# that all workers mount, or gs://bucket/name (launch/README.md). Told to stop, the run saves and ends with status 75;
# this script then starts it again while the TPU is there, at most RETRIES times. A Spot TPU that was taken away does not
# come back by itself: the script ends with 75 and says so. TPU_PYTHON: the workers' Python, 3.11 or newer.
set -euo pipefail
[ $# -ge 3 ] || { echo "usage: bash $0 NAME ZONE --config=FILE --workdir=DIR [--config.a.b=value ...]" >&2; exit 2; }
name=$1 zone=$2
shift 2
command -v gcloud >/dev/null || { echo "gcloud is not installed; wanted the Google Cloud CLI, logged in" >&2; exit 2; }
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target=${TPU_DIR:-skysense-jax} retries=${RETRIES:-20}
on_all() { gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"; }

archive=$(mktemp --suffix=.tar.gz) log=$(mktemp)
trap 'rm -f "$archive" "$log"' EXIT
tar -C "$root" --exclude=./.venv --exclude=./.git --exclude=./.cache --exclude=./runs -czf "$archive" .

# The workers may be new ones since the last start. A trainer that runs on without this terminal is told to save.
install() {
  gcloud compute tpus tpu-vm scp "$archive" "$name:$target.tar.gz" --zone="$zone" --worker=all
  on_all "pkill -TERM -f [s]kysense_jax.train; while pgrep -f [s]kysense_jax.train >/dev/null; do sleep 5; done
    mkdir -p $target && tar -C $target -xzf $target.tar.gz && cd $target && { [ -x .venv/bin/python ] ||
    ${TPU_PYTHON:-python3} -m venv .venv; } && .venv/bin/python -m pip install --quiet 'jax[tpu]>=0.10.2,<0.13' --editable '.[gcs]'"
}

# Ends this script if the TPU does not come back by itself: a pre-empted Spot TPU does not.
wait_until_ready() {
  local state
  for ((minute = 0; minute < ${WAIT_MINUTES:-60}; minute++)); do
    state=$(gcloud compute tpus tpu-vm describe "$name" --zone="$zone" --format='value(state)') || state=absent
    case $state in
      READY) return ;;
      PREEMPTED | TERMINATED | STOPPED | absent) break ;;
    esac
    sleep 60
  done
  echo "$name in $zone is $state; wanted READY. The run is saved: make the TPU anew, then give this command again" >&2
  exit 75
}

train=$(printf ' %q' -m skysense_jax.train "$@")
for ((try = 1; try <= retries; try++)); do
  wait_until_ready
  install
  status=0
  on_all "cd $target && export JAX_COMPILATION_CACHE_DIR=\$PWD/.cache/jax && exec .venv/bin/python$train" 2>&1 | tee "$log" || status=$?
  [ "$status" -eq 0 ] && exit 0
  echo "$(date -Is) try $try of $retries ended with status $status" >&2
  # The trainer says that it is to be started again; 255: the connection was lost, as when a worker is taken away.
  # (gcloud's own status need not be that of the command on the workers.)
  grep -q 'the same command goes on (exit status 75)' "$log" || [ "$status" -eq 255 ] || exit "$status"
done
exit 75
