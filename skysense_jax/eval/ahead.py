"""Reading on threads: the next things while the last are computed on.

Pixels are decoded outside of Python's lock, so threads are enough. Next: features.py, which reads samples with it.
"""

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import Any

NUM_THREADS = 4


def ahead(read: Callable[[Any], Any], items: Iterable[Any], *, depth: int = NUM_THREADS) -> Iterator[Any]:
    """``read`` of each item, in their order; at most ``depth`` are read, or being read, before they are asked for.

    What ``read`` raises is raised in its place. ``items`` is gone through by the thread that asks.
    """
    items = iter(items)
    with futures.ThreadPoolExecutor(NUM_THREADS) as pool:
        waiting = collections.deque(pool.submit(read, item) for item in itertools.islice(items, depth))
        try:
            while waiting:
                found = waiting.popleft().result()
                waiting.extend(pool.submit(read, item) for item in itertools.islice(items, 1))
                yield found
        finally:
            for future in waiting:
                future.cancel()
