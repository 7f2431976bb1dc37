"""Reading ahead: order, how far, what is raised; and values that threads share."""

import threading
import time
from concurrent import futures

import numpy as np
import pytest

from skysense_jax.eval.ahead import NUM_THREADS, ahead, kept


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


def test_value_is_made_once_however_many_threads_ask_and_as_many_bytes_are_kept_as_may_be():
    made = []

    @kept(2 * 80)
    def slow(key):
        made.append(key)
        time.sleep(0.05)
        return np.full({"large": 50}.get(key, 10), ord(key[0]), np.float64)

    with futures.ThreadPoolExecutor(8) as pool:
        assert [array[0] for array in pool.map(slow, "aaaaaaaa")] == [97] * 8
    assert made == ["a"]
    assert [slow(key)[0] for key in "bacac"] == [98, 97, 99, 97, 99]
    assert made == ["a", "b", "c"]
    slow("b")
    assert made == ["a", "b", "c", "b"]
    assert slow("large").size == slow("large").size == 50  # alone more than may be kept
    slow("b")
    assert made == ["a", "b", "c", "b", "large", "b"]


def test_what_failed_is_asked_for_again():
    tried = []

    @kept(80)
    def fail(key):
        tried.append(key)
        raise OSError(key)

    for _ in range(2):
        with pytest.raises(OSError, match="a"):
            fail("a")
    assert tried == ["a", "a"]
