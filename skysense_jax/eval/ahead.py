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


def kept(num_bytes: int) -> Callable[[Callable], Callable]:
    """A cache of arrays: as many of those asked for last as have ``num_bytes``, at least one.

    Each is made by one thread, and others that ask for it wait.
    """

    def decorate(function: Callable) -> Callable:
        found: collections.OrderedDict[tuple, Any] = collections.OrderedDict()
        changing, making = threading.Lock(), [threading.Lock() for _ in range(64)]

        @functools.wraps(function)
        def ask(*args):
            with making[hash(args) % len(making)]:  # who asks for another array seldom waits
                with changing:
                    if args in found:
                        found.move_to_end(args)
                        return found[args]
                made = function(*args)
                with changing:
                    found[args] = made
                    while len(found) > 1 and sum(array.nbytes for array in found.values()) > num_bytes:
                        found.popitem(last=False)
                return made

        return ask

    return decorate
