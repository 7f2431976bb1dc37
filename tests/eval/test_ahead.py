"""Reading ahead: order, how far, what is raised; and values that threads share."""

import threading
import time
from concurrent import futures

import pytest

from skysense_jax.eval.ahead import ahead, kept


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


def test_error_is_raised_in_its_place_and_what_was_begun_is_left():
    def read(i):
        if i == 2:
            raise OSError("no such file")
        return i

    found = ahead(read, range(10))
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(OSError, match="no such file"):
        next(found)
    assert list(found) == []


def test_value_is_made_once_however_many_threads_ask_and_the_oldest_is_dropped():
    made, begun = [], threading.Event()

    @kept(2)
    def slow(key):
        made.append(key)
        begun.set()
        time.sleep(0.05)
        return key.upper()

    with futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(slow, "aaaaaaaa")) == ["A"] * 8
    assert made == ["a"]
    assert [slow(key) for key in "baca"] == ["B", "A", "C", "A"]
    assert made == ["a", "b", "c"]
    assert slow("b") == "B"
    assert made == ["a", "b", "c", "b"]
