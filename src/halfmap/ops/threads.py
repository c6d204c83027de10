"""Compiled kernels on several threads of this process, and results that do not depend on how many."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from threading import Lock
from typing import Any, TypeVar

import torch
from threadpoolctl import ThreadpoolController

Result = TypeVar("Result")


class _Blas:
    """How many threads are inside `one_blas_thread`, and what ends it."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.inside = 0
        self.limit: AbstractContextManager[object] = nullcontext()


_blas = _Blas()


def in_threads(function: Callable[..., Result], *items: Iterable[Any]) -> list[Result]:
    """Call `function` on every item, as many at a time as torch has threads, and return the results in order.

    For functions that leave Python, such as kernels compiled with ``nogil``. Calls must not wait for each
    other: all share one pool of threads, which lives as long as the process. All have ended before the error
    of the first one that failed is raised.
    """
    pool = _pool(torch.get_num_threads())
    calls = [pool.submit(function, *each) for each in zip(*items, strict=False)]
    try:
        wait(calls)
    finally:
        # After an interruption, those that have not begun.
        for call in calls:
            call.cancel()
    return [call.result() for call in calls]


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Context in which matrix products and factorisations round the same whatever the number of threads.

    All threads share the setting: it lasts as long as any of them is inside.
    """
    with _blas.lock:
        if _blas.inside == 0:
            _blas.limit = _controller().limit(limits=1, user_api="blas")
            _blas.limit.__enter__()
        _blas.inside += 1
    try:
        yield
    finally:
        with _blas.lock:
            _blas.inside -= 1
            if _blas.inside == 0:
                _blas.limit.__exit__(None, None, None)


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Run torch on one thread inside the block, or the function decorated; compiled kernels keep theirs.

    torch cuts arrays between threads, and where it cuts, sums are ordered and functions rounded otherwise.
    One unit in the last place of an expected count changes a count now and then, and a seed must not mean
    another result on another machine. The compiled kernels are written so that threads change nothing.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def _controller() -> ThreadpoolController:
    # Looking for the libraries takes longer than most of what they are limited for.
    return ThreadpoolController()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="halfmap")
