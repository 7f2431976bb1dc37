"""Who makes the shards of a dataset: processes of this machine, or workers of an engine that Apache Beam speaks to.

Both write the same bytes into the same folder, and one goes on where the other stopped. Next: beam.py.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from etils import epath

from skysense_jax.ingest import folder
from skysense_jax.ingest.folder import Maker, Shard

LOCAL, BEAM = "local", "beam"


@dataclasses.dataclass(frozen=True)
class Engine:
    """How shards are made.

    Attributes:
      name: LOCAL or BEAM.
      workers: processes on this machine.
      flags: of Apache Beam.
    """

    name: str = LOCAL
    workers: int = 1
    flags: tuple[str, ...] = ()


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that ``engine_of`` reads."""
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes on this machine")
    parser.add_argument("--engine", choices=(LOCAL, BEAM), default=LOCAL, help="what makes the shards")
    told = "of Apache Beam, with --engine=beam: -- --runner=FlinkRunner --flink_master=..."
    parser.add_argument("beam_flags", nargs="*", metavar="-- FLAGS", help=told)


def engine_of(given: argparse.Namespace) -> Engine:
    """The engine that the flags name.

    Raises:
      ValueError: they contradict each other.
    """
    if given.workers < 1:
        raise ValueError(f"--workers: got {given.workers}; wanted 1 or more")
    if given.beam_flags and given.engine != BEAM:
        raise ValueError(f"got {' '.join(given.beam_flags)}; wanted --engine=beam with flags of Apache Beam")
    return Engine(given.engine, given.workers, tuple(given.beam_flags))


def build(make: Callable[[], Maker], out: epath.Path, *, facts: Mapping[str, Any], engine: Engine) -> str:
    """What was made, as a table; writes what is missing of ``out``.

    Args:
      make: what each process makes its maker with; picklable.
      facts: what the bytes depend on, as JSON has it.

    Raises:
      ModuleNotFoundError: of an extra.
      ValueError: ``out`` holds another dataset, or not one sample came of it, or a flag is wrong.
      OSError: something cannot be written; what is whole stays, and the same call goes on.
    """
    if engine.name == BEAM:
        from skysense_jax.ingest import beam  # Apache Beam is an extra

        options = beam.options_of(engine)
    with folder.claimed(out, facts):
        maker = make()
        missing = folder.to_make(out, maker.shards)
        if engine.name == BEAM and missing:
            beam.run(make, missing, out, options)
        elif engine.workers > 1 and len(missing) > 1:
            _run_here(make, missing, out, engine.workers)
        else:
            for shard in missing:
                folder.write_shard(maker, shard, out)
        return folder.finish(maker, out)


def _run_here(make: Callable[[], Maker], missing: Sequence[Shard], out: epath.Path, workers: int) -> None:
    size, spawn = min(workers, len(missing)), multiprocessing.get_context("spawn")
    try:
        with concurrent.futures.ProcessPoolExecutor(size, spawn, _begin, (make, out)) as pool:
            list(pool.map(_write_one, missing))
    except BrokenProcessPool as error:
        raise OSError(f"a process was killed, for want of memory perhaps; wanted --workers below {size}") from error


# What a process makes its maker with, and the folder; the maker is made with the first shard, whose error is then told.
_WORKER: list[Any] = []


def _begin(make: Callable[[], Maker], out: epath.Path) -> None:
    _WORKER[:] = [functools.cache(make), out]
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool's processes outlive a parent that is killed: each keeps open what would tell the others."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _write_one(shard: Shard) -> None:
    make, out = _WORKER
    folder.write_shard(make(), shard, out)


def command(parser: argparse.ArgumentParser, work: Callable[[], str]) -> None:
    """Prints what ``work`` returns; ends the process with a line of words on what users can mend."""
    try:
        print(work())
    except (ValueError, ModuleNotFoundError) as error:
        parser.exit(1, f"error: {error}\n")
    except OSError as error:
        parser.exit(1, f"error: {error}. What is whole stays; the same command goes on\n")
