"""Logging: one logger for the package, readable on a terminal and plain in a job's run.out."""

from __future__ import annotations

import logging
import sys

log = logging.getLogger("halfmap")
"""The package's logger. Every module says ``from halfmap.log import log``."""

log.addHandler(logging.NullHandler())


def show_on_terminal(level: int = logging.INFO) -> None:
    """Print the package's messages on stderr, coloured and wrapped where that is a terminal."""
    handler: logging.Handler = logging.StreamHandler()
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        console = Console(stderr=True)
        handler = RichHandler(console=console, show_path=False, show_time=False, show_level=False)
    handler.setLevel(level)
    handler.addFilter(lambda record: not getattr(record, "quiet", False))
    log.addHandler(handler)
    log.setLevel(level)
