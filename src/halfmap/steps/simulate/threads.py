"""Results that do not depend on the number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Run torch on one thread inside the block; compiled kernels keep theirs.

    torch cuts arrays between threads, and where it cuts, sums are ordered and functions rounded otherwise.
    One unit in the last place of an expected count changes a count now and then, and a seed must not mean
    another data set on another machine. The compiled kernels are written so that threads change nothing.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
