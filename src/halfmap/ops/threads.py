"""Compiled kernels on several threads of this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def in_threads(function: Callable[..., Result], *items: Iterable[Any]) -> list[Result]:
    """Call `function` on every item, as many at a time as torch has threads, and return the results in order.

    For functions that leave Python, such as kernels compiled with ``nogil``. Calls must not wait for each
    other: all share one pool of threads, which lives as long as the process.
    """
    return list(_pool(torch.get_num_threads()).map(function, *items))


@lru_cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="halfmap")
