"""Reading on threads: the next things while the last are computed on, and each file once however many threads ask.

Pixels are decoded outside of Python's lock, so threads are enough. Next: features.py, which reads samples with it.
"""

import collections
import functools
import itertools
import threading
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


def kept(count: int) -> Callable[[Callable], Callable]:
    """``functools.lru_cache`` of ``count`` values, each made by one thread while the others wait for it."""

    def decorate(function: Callable) -> Callable:
        cached = functools.lru_cache(maxsize=count)(function)
        locks = [threading.Lock() for _ in range(64)]  # of what is asked for: others seldom wait for each other

        @functools.wraps(function)
        def ask(*args):
            with locks[hash(args) % len(locks)]:
                return cached(*args)

        ask.cache_info, ask.cache_clear = cached.cache_info, cached.cache_clear
        return ask

    return decorate
