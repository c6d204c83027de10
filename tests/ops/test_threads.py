"""Calls in threads: results in order, and nothing goes on after an error."""

from __future__ import annotations

import time

import pytest
from threadpoolctl import threadpool_info

from halfmap.ops.threads import in_threads, one_blas_thread


def test_results_are_in_the_order_of_the_items():
    def late(number: int) -> int:
        time.sleep(0.02 * (3 - number))
        return number

    assert in_threads(late, range(4)) == [0, 1, 2, 3]
    assert in_threads(lambda a, b: a + b, [1, 2], [10, 20]) == [11, 22]
    assert in_threads(late, []) == []


def test_all_calls_have_ended_before_the_first_error_is_raised():
    ended = []

    def call(number: int) -> None:
        if number == 1:
            time.sleep(0.05)
            raise OSError("first of the items to fail")
        if number == 2:
            raise ValueError("fails before it")
        time.sleep(0.1)
        ended.append(number)

    with pytest.raises(OSError, match="first of the items"):
        in_threads(call, range(6))
    assert sorted(ended) == [0, 3, 4, 5]


def test_one_blas_thread_lasts_until_the_last_is_outside():
    """Two threads that overlap: the setting is back afterwards, and holds for as long as either is inside."""

    def threads() -> int:
        return max(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")

    before = threads()
    first, second = one_blas_thread(), one_blas_thread()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert threads() == 1
    second.__exit__(None, None, None)
    assert threads() == before
