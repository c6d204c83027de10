"""What comes of one item, in this process or in a worker."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from logging.handlers import QueueHandler
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from halfmap.errors import HalfmapError
from halfmap.io.atomic import is_out_of_resources
from halfmap.log import log


@dataclass(frozen=True)
class Outcome:
    """What came of one item: a result, or an error as the user should read it with its traceback."""

    result: Any = None
    error: str | None = None
    trace: str | None = None
    seconds: float = 0.0
    fatal: bool = False
    """Whether other items would fail alike, for want of disk space or permission."""
    lasting: bool = False
    """Whether the item would fail again as it is: by itself, and not for want of a file that is gone."""
    messages: tuple[logging.LogRecord, ...] = ()
    """What a worker process logged, where nobody hears it."""


def attempt(function: Callable[[Any], Any], item: Any) -> Outcome:
    """Call `function(item)` and turn any exception into an `Outcome`."""
    start = time.perf_counter()
    fatal = lasting = False
    try:
        return Outcome(result=function(item), seconds=time.perf_counter() - start)
    except HalfmapError as error:
        message, trace, fatal = str(error), None, is_out_of_resources(error)
        lasting = not fatal and (error.path is None or Path(error.path).exists())
    except MemoryError:
        message = "out of memory; use fewer workers (--workers) or a machine with more memory"
        trace = traceback.format_exc()
    except Exception as error:
        message, trace = f"{type(error).__name__}: {error}", traceback.format_exc()
        fatal = is_out_of_resources(error)
    seconds = time.perf_counter() - start
    return Outcome(error=message, trace=trace, seconds=seconds, fatal=fatal, lasting=lasting)


def attempt_in_worker(function: Callable[[Any], Any], item: Any) -> Outcome:
    """As `attempt`, for another process than the job's: what is logged comes back with the outcome."""
    queue: SimpleQueue[logging.LogRecord] = SimpleQueue()
    handler, level = QueueHandler(queue), log.level  # type: ignore[arg-type] - it needs no more than put_nowait
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        outcome = attempt(function, item)
    finally:
        log.setLevel(level)
        log.removeHandler(handler)
    return replace(outcome, messages=tuple(queue.get() for _ in range(queue.qsize())))
