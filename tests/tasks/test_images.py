"""Decoded files that threads share."""

import time
from concurrent import futures

import numpy as np
import pytest

from skysense_jax.tasks.images import kept


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
