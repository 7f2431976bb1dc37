"""Who makes the shards of a dataset: processes of this machine, or workers of an engine that Apache Beam speaks to.

Both write the same bytes into the same folder, and one goes on where the other stopped. Next: beam.py.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """What was made, as a table; writes what is missing of ``out``, and tells stderr how far it is.

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
        begun = time.monotonic()
        _tell(_planned(maker.shards, missing))
        if engine.name == BEAM and missing:
            beam.run(make, missing, out, options)
        else:
            several = engine.workers > 1 and len(missing) > 1
            run = _run_here(make, missing, out, engine.workers) if several else _run_alone(maker, missing, out)
            for num, written in enumerate(run, 1):
                left = len(missing) - num
                left_s = left * (time.monotonic() - begun) / num
                told = f"; left: {left} of {len(maker.shards)} shards, some {_span(left_s)}" if left else ""
                _tell(f"{_finished(written)}{told}")
        if missing:
            _tell(f"made {len(missing)} of {len(maker.shards)} shards in {_span(time.monotonic() - begun)}")
        return folder.finish(maker, out)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _planned(shards: Sequence[Shard], missing: Sequence[Shard]) -> str:
    """What there is to do, and what is there already."""
    places = sum(shard.stop - shard.start for shard in shards)
    there = len(shards) - len(missing)
    goes_on = f"; goes on: {there} of {len(shards)} shards are there" if there else ""
    return f"{places} places in {len(shards)} shards are planned{goes_on}"


def _finished(written: folder.Written) -> str:
    return f"{written.shard.name}: {written.samples} samples, {written.rejected} rejected, {_span(written.seconds)}"


def _span(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def _run_alone(maker: Maker, missing: Sequence[Shard], out: epath.Path) -> Iterator[folder.Written]:
    for shard in missing:
        yield folder.write_shard(maker, shard, out)


def _run_here(
    make: Callable[[], Maker], missing: Sequence[Shard], out: epath.Path, workers: int
) -> Iterator[folder.Written]:
    """What came of each shard, as it is ready."""
    size, spawn = min(workers, len(missing)), multiprocessing.get_context("spawn")
    try:
        with concurrent.futures.ProcessPoolExecutor(size, spawn, _begin, (make, out)) as pool:
            try:
                for ready in concurrent.futures.as_completed([pool.submit(_write_one, shard) for shard in missing]):
                    yield ready.result()
            finally:
                pool.shutdown(cancel_futures=True)
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


def _write_one(shard: Shard) -> folder.Written:
    make, out = _WORKER
    return folder.write_shard(make(), shard, out)


def command(parser: argparse.ArgumentParser, work: Callable[[], str]) -> None:
    """Prints what ``work`` returns; ends the process with a line of words on what users can mend."""
    try:
        print(work())
    except (ValueError, ModuleNotFoundError) as error:
        parser.exit(1, f"error: {error}\n")
    except OSError as error:
        parser.exit(1, f"error: {error}. What is whole stays; the same command goes on\n")
