"""Logging: one logger for the package, readable on a terminal and plain in a job's run.out."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger("halfmap")
"""The package's logger. Every module says ``from halfmap.log import log``."""

log.addHandler(logging.NullHandler())


@contextmanager
def shown_on_terminal(level: int = logging.INFO) -> Iterator[None]:
    """Print the package's messages on stderr, coloured and wrapped where that is a terminal."""
    handler: logging.Handler = logging.StreamHandler()
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        console = Console(stderr=True)
        handler = RichHandler(console=console, show_path=False, show_time=False, show_level=False)
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
