"""Reading ahead: order, how far, what is raised."""

import threading
import time
from concurrent import futures

import pytest

from skysense_jax.eval.ahead import NUM_THREADS, ahead


def test_results_come_in_order_and_no_more_items_are_taken_than_may_be_ahead():
    taken, release = [], threading.Event()

    def items():
        for i in range(20):
            taken.append(i)
            yield i

    def read(i):
        if i == 0:
            assert release.wait(60)  # the first is the last to be done
        return i * i

    found = ahead(read, items(), depth=5)
    assert taken == []
    with futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(next, found)
        while len(taken) < 5:
            time.sleep(0.01)
        time.sleep(0.1)
        assert taken == [0, 1, 2, 3, 4]
        release.set()
        assert first.result() == 0
    assert taken == [0, 1, 2, 3, 4, 5]
    assert list(found) == [i * i for i in range(1, 20)]
    assert list(ahead(read, [])) == []


def test_several_threads_read():
    barrier = threading.Barrier(3)
    assert list(ahead(lambda i: barrier.wait(60) >= 0, range(3))) == [True] * 3


def test_error_is_raised_in_its_place_and_what_was_not_begun_never_is():
    asked, go_on = [], threading.Event()

    def read(i):
        asked.append(i)
        if i == 2:
            raise OSError("no such file")
        assert i < 2 or go_on.wait(60)
        return i

    found = ahead(read, range(100), depth=20)
    assert [next(found), next(found)] == [0, 1]
    threading.Timer(0.2, go_on.set).start()  # those that were begun end, and the pool with them
    with pytest.raises(OSError, match="no such file"):
        next(found)
    assert sorted(asked) == list(range(len(asked)))
    assert len(asked) <= 3 + NUM_THREADS
