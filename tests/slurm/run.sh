#!/usr/bin/env bash
# By hand, as root, on a Debian machine to spare:  apt-get install slurm-wlm munge, then  bash tests/slurm/run.sh
# A SLURM of this one machine (two CPUs, two tasks) runs launch/slurm.sbatch on the CPU with the smallest config:
#   1. to its end;
#   2. requeued in mid-run by an administrator (scontrol requeue): ends, waits, goes on from its checkpoint, finishes;
#   3. told to stop in mid-run (SIGUSR1, as before the time limit): saves, requeues itself, goes on, finishes.
# What it prints ends with "all as wanted". Its daemons and files live in a temporary folder and end with it. Takes
# about a quarter of an hour, most of it SLURM's two minutes between a requeue and the next start. PYTHON: as for the
# sbatch file.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
work=$(mktemp -d /tmp/slurm-test-XXXXXX)
chmod 755 "$work"
host=$(hostname -s)
daemons=()
finish() {
  scancel --full --user root 2>/dev/null || true
  for pid in "${daemons[@]}"; do kill "$pid" 2>/dev/null || true; done
  echo "logs: $work"
}
trap finish EXIT

# ---- a SLURM of one machine
install -d -o munge -g munge -m 755 "$work/munge"
dd if=/dev/urandom of="$work/munge/key" bs=1024 count=1 status=none
chown munge:munge "$work/munge/key"
chmod 400 "$work/munge/key"
# munged wants folders that others cannot write above its socket: not /tmp
socket=/run/slurm-test-munge.$$
install -d -o munge -g munge -m 755 "$socket"
runuser -u munge -- munged --foreground --force --key-file="$work/munge/key" --socket="$socket/socket" \
  --pid-file="$socket/pid" --log-file="$work/munge/log" --seed-file="$work/munge/seed" &
daemons+=($!)
cat >"$work/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$socket/socket
CredType=cred/munge
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobRequeue=1
KillWait=60
ReturnToService=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
install -d "$work/state" "$work/spool"
export SLURM_CONF=$work/slurm.conf
for _ in $(seq 50); do [ -S "$socket/socket" ] || sleep 0.2; done
slurmctld -D -f "$work/slurm.conf" >"$work/slurmctld.log" 2>&1 &
daemons+=($!)
slurmd -D -f "$work/slurm.conf" >"$work/slurmd.log" 2>&1 &
daemons+=($!)
for _ in $(seq 60); do sinfo -h -o %T 2>/dev/null | grep -q idle || sleep 1; done
sinfo

# ---- runs
export PYTHON=$python SKYSENSE_ROOT=$root SKYSENSE_GPU_ENV=0 JAX_PLATFORMS=cpu PYTHONPATH=$root:$root/tests
export XLA_FLAGS="--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0 ${XLA_FLAGS:-}"
steps=${STEPS:-40}
submit() { # NAME: submits a run of its own working directory, prints the job's number
  sbatch --parsable --nodes=1 --ntasks-per-node=2 --cpus-per-task=1 --gpus-per-node=0 --time=60 \
    --output="$work/$1.log" "$root/launch/slurm.sbatch" --config=tests/nano.py --workdir="$work/run-$1" \
    --config.optim.num_steps="$steps" --config.run.checkpoint_every_steps=5 --config.run.input_workers=1
}
saved() { # NAME: the newest step that is saved
  find "$work/run-$1/checkpoints" -mindepth 1 -maxdepth 1 -name '[0-9]*' -not -name '*tmp*' -printf '%f\n' 2>/dev/null |
    sort -n | tail -1
}
wait_saved() { # NAME: until something is saved
  for _ in $(seq 600); do [ -z "$(saved "$1")" ] || return 0; sleep 1; done
  echo "nothing was saved by $1" >&2
  tail -30 "$work/$1.log" >&2
  exit 1
}
state() { scontrol show job "$1" | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p'; }
finished() { # NAME JOB: until it has ended, then looks at what it left
  for _ in $(seq 1200); do
    case $(state "$2") in COMPLETED | FAILED | CANCELLED | TIMEOUT | NODE_FAIL) break ;; *) sleep 2 ;; esac
  done
  echo "$1: job $2 $(state "$2"), $(saved "$1") of $steps steps saved, starts: $(grep -c ' start number ' "$work/$1.log")"
  [ "$(state "$2")" = COMPLETED ] && [ "$(saved "$1")" = "$steps" ] || { tail -40 "$work/$1.log" >&2; exit 1; }
  # each step stands once in the metrics, whatever was taken twice
  lines=$(grep -o '"step": [0-9]*' "$work/run-$1/metrics.jsonl" | sort | uniq -c | awk '$1 == 1' | wc -l)
  [ "$lines" -eq "$steps" ] || { echo "$1: $lines steps in metrics.jsonl; wanted $steps" >&2; exit 1; }
}
resumed() { # NAME: the step that the last start began at, which must not be 0
  step=$(sed -n 's/.* starting at step \([0-9]*\) of .*/\1/p' "$work/$1.log" | tail -1)
  echo "$1: went on from step $step"
  [ "$step" -gt 0 ]
}

job=$(submit end)
finished end "$job"

job=$(submit requeued)
wait_saved requeued
scontrol requeue "$job"
finished requeued "$job"
resumed requeued

job=$(submit told)
wait_saved told
scancel --signal=USR1 "$job" # what --signal=USR1@300 does before the time limit: to the tasks, not to the script
finished told "$job"
resumed told
grep -q 'ended with status 75' "$work/told.log"

# one through, two with a stop in it: the same losses
"$python" - "$work" <<'CHECK'
import json, pathlib, sys

losses = [
    [json.loads(line)["loss"] for line in (pathlib.Path(sys.argv[1]) / f"run-{name}/metrics.jsonl").open()]
    for name in ("end", "requeued", "told")
]
assert losses[0] == losses[1] == losses[2], losses
print(f"{len(losses[0])} losses equal in all three runs, last {losses[0][-1]:.4f}")
CHECK
echo "all as wanted"
