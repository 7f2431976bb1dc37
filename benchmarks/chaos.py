"""Can a run be lost? The same training once in peace and once killed again and again, compared to the last bit.

python -m benchmarks.chaos --kills=50 --steps=300 --processes=1

A kill is SIGKILL or SIGTERM (by turns) to one of the processes: one of four at a random instant of the start, while it
compiles or restores, the others a random number of steps on, while it steps, writes or seals a checkpoint. With several
processes the others have to end by themselves, and all are started again. What is compared is the last checkpoint:
every array of student, teacher, optimizer and counters, the place in the data, and the loss of every step. Steps that
had to be taken again are counted by the checkpoints.
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

from skysense_jax import metrics
from skysense_jax.launch.stop import EXIT_AGAIN

ROOT = pathlib.Path(__file__).resolve().parents[1]
_LONGEST_S = 900  # that a run may take from one kill to its end
_EVERY = 20  # steps between checkpoints
_HEARTBEAT_S = 10  # after which processes miss one that was killed


def start(config: str, workdir: pathlib.Path, *, processes: int, steps: int) -> list[subprocess.Popen]:
    """The processes of a run, on eight virtual devices together, their log at WORKDIR/../PROCESS.log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    running = []
    for number in range(processes):
        place = [f"--coordinator={address}", f"--num_processes={processes}", f"--process_id={number}"]
        environ = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={8 // processes}",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [sys.executable, "-m", "skysense_jax.train", f"--config={config}", f"--workdir={workdir}"]
        command += [f"--config.optim.num_steps={steps}", f"--heartbeat_timeout_s={_HEARTBEAT_S}"]
        command += [f"--config.run.checkpoint_every_steps={_EVERY}", "--config.run.keep_last=3"]
        with (workdir.parent / f"{workdir.name}-{number}.log").open("ab") as log:
            running.append(
                subprocess.Popen(
                    command + (place if processes > 1 else []), cwd=ROOT, env=environ, stdout=log, stderr=log
                )
            )
    return running


def wait(running: list[subprocess.Popen], seconds: float) -> list[int | None]:
    """The processes' exit statuses after at most so many seconds; None: still running."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(process.poll() is None for process in running):
        time.sleep(0.02)
    return [process.poll() for process in running]


def sealed(workdir: pathlib.Path) -> int:
    """The newest step that has a whole checkpoint, 0 if there is none."""
    return max((int(path.parent.name) for path in (workdir / "checkpoints").glob("*/MANIFEST.json")), default=0)


def reached(workdir: pathlib.Path, *, since: float) -> int:
    """The newest step in the metrics if they were written to ``since`` (seconds since 1970), else 0.

    A start takes back what a killed run had written behind its checkpoint: before, nothing is known of the start.
    """
    path = workdir / metrics.FILE_NAME
    if not path.exists() or path.stat().st_mtime < since:
        return 0
    return max((line["step"] for line in metrics.read_json_lines(path)), default=0)


def _until_steps(running: list[subprocess.Popen], workdir: pathlib.Path, step: int, *, since: float, more_s: float):
    """Waits until the run has written the numbers of ``step``, and a little more, or has ended."""
    deadline = time.monotonic() + _LONGEST_S
    while reached(workdir, since=since) < step and None in wait(running, 0.1) and time.monotonic() < deadline:
        pass
    wait(running, more_s)


def chaos(config: str, workdir: pathlib.Path, *, kills: int, processes: int, steps: int, longest: float, seed: int):
    """Runs to the end through ``kills`` kills, those of a start within ``longest`` seconds of it; a row for each.

    Raises:
      RuntimeError: the run ended by itself with something else than success.
    """
    rng, rows = random.Random(seed), []
    while True:
        began, left = time.time(), kills - len(rows)
        running = start(config, workdir, processes=processes, steps=steps)
        if left > 0 and rng.random() < 0.75:
            step = min(sealed(workdir) + rng.randint(1, 2 * _EVERY), steps)
            _until_steps(running, workdir, step, since=began, more_s=rng.uniform(0.0, 1.0))
            statuses = wait(running, 0.0)
        else:
            statuses = wait(running, rng.uniform(0.0, longest) if left > 0 else _LONGEST_S)
        if None in statuses and left <= 0:
            raise RuntimeError(f"the last leg took more than {_LONGEST_S} s; its log is {workdir}-*.log")
        if None not in statuses:
            if any(statuses):
                raise RuntimeError(f"the run ended with {statuses}; its log is {workdir}-*.log")
            if left <= 0:
                return rows
            # It came to its end before it was killed: back to a checkpoint in the middle, and on with the kills.
            saved = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
            for step in saved[1:]:
                shutil.rmtree(workdir / "checkpoints" / str(step))
            continue
        victim, kind = rng.choice(running), (signal.SIGKILL, signal.SIGTERM)[len(rows) % 2]
        step = reached(workdir, since=began)
        victim.send_signal(kind)
        told = time.monotonic()
        statuses = wait(running, _LONGEST_S if kind == signal.SIGTERM else 12 * _HEARTBEAT_S)
        took = time.monotonic() - told
        hung = sum(status is None for status in statuses)
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()
        allowed = {0, EXIT_AGAIN, -kind}  # at its end; told in time; told before it listened, or killed
        if processes > 1 and (kind == signal.SIGKILL or -kind in statuses):
            allowed |= {1, -signal.SIGABRT}  # the others miss the one that is gone
        unexpected = [status for status in statuses if status is not None and status not in allowed]
        again = max(step - sealed(workdir), 0)
        rows.append(dict(kind=kind.name, at_step=step, again=again, ends_s=took, hung=hung, unexpected=unexpected))


def last_state(workdir: pathlib.Path) -> dict[str, object]:
    """Digests of all arrays of the newest checkpoint and its place in the data; losses by step."""
    newest = max((workdir / "checkpoints").glob("*/MANIFEST.json"), key=lambda path: int(path.parent.name)).parent
    meta = json.loads((newest / "meta" / "metadata").read_text())
    lines = metrics.read_json_lines(workdir / metrics.FILE_NAME)
    return dict(
        step=int(newest.name),
        leaves=meta["leaves"],
        data=json.loads((newest / "data" / "metadata").read_text()),
        losses={line["step"]: line["loss"] for line in lines},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tests/nano.py")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--longest", type=float, default=20.0, help="seconds from a start to a kill in it at most")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print("$ python -m benchmarks.chaos", *sys.argv[1:])
    folder = pathlib.Path(tempfile.mkdtemp(prefix="chaos-"))
    peaceful, killed = folder / "peaceful", folder / "killed"
    how = dict(processes=given.processes, steps=given.steps)
    began = time.monotonic()
    statuses = wait(start(given.config, peaceful, **how), _LONGEST_S)
    if any(status != 0 for status in statuses):
        sys.exit(f"error: the run that nobody killed ended with {statuses}; its log is in {folder}")
    print(f"in peace: {time.monotonic() - began:.0f} s for {given.steps} steps", flush=True)
    rows = chaos(given.config, killed, kills=given.kills, longest=given.longest, seed=given.seed, **how)
    for kind in ("SIGKILL", "SIGTERM"):
        of_kind = [row for row in rows if row["kind"] == kind]
        again = [row["again"] for row in of_kind]
        seconds = sorted(row["ends_s"] for row in of_kind)
        if of_kind:
            at = [row["at_step"] for row in of_kind if row["at_step"]]
            print(
                f"{kind}: {len(of_kind) - len(at)} kills before the first step of a start, {len(at)} behind steps "
                f"{min(at, default=0)} to {max(at, default=0)}; steps again: mean {sum(again) / len(again):.1f}, most "
                f"{max(again)}; all ended within {seconds[-1]:.1f} s, median {seconds[len(seconds) // 2]:.1f}"
            )
    wrong = [row for row in rows if row["hung"] or row["unexpected"]]
    print(f"hung or ended otherwise than told: {len(wrong)} {wrong or ''}")
    wanted, found = last_state(peaceful), last_state(killed)
    differing = [name for name in wanted if wanted[name] != found[name]]
    print(
        f"step {found['step']}, {len(wanted['leaves'])} arrays, place in the data, {len(found['losses'])} losses: ",
        end="",
    )
    print(f"differ in {differing}" if differing else "equal to the last bit")
    if not differing:
        shutil.rmtree(folder)
    sys.exit(bool(differing or wrong))


if __name__ == "__main__":
    main()
