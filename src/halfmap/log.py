"""Logging: one logger for the package, readable on a terminal and plain in a job's run.out."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

log = logging.getLogger("halfmap")
"""The package's logger. Every module says ``from halfmap.log import log``."""

log.addHandler(logging.NullHandler())

Item = TypeVar("Item")

_SILENCE_s = 15.0
_TERMINAL = "terminal"


def report(items: Sequence[Item], what: str) -> Iterator[Item]:
    """Go through the parts of a computation, saying every 15 s how far it is; a short one says nothing."""
    said = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - said > _SILENCE_s:
            said = time.monotonic()
            log.info("%s: %.0f %%", what, 100 * done / len(items))
        yield item


@contextmanager
def shown_on_terminal(level: int = logging.INFO) -> Iterator[None]:
    """Print the package's messages on stderr, coloured and wrapped where that is a terminal."""
    handler: logging.Handler = logging.StreamHandler()
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        console = Console(stderr=True)
        handler = RichHandler(console=console, show_path=False, show_time=False, show_level=False)
    handler.set_name(_TERMINAL)
    handler.setLevel(level)
    handler.addFilter(lambda record: not getattr(record, "quiet", False))
    before = log.level
    log.addHandler(handler)
    log.setLevel(level)
    try:
        yield
    finally:
        log.setLevel(before)
        log.removeHandler(handler)


@contextmanager
def terminal_filtered(wanted: Callable[[logging.LogRecord], bool]) -> Iterator[None]:
    """Print only those messages that are wanted; files of messages still get all."""
    handlers = [handler for handler in log.handlers if handler.get_name() == _TERMINAL]
    for handler in handlers:
        handler.addFilter(wanted)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(wanted)
