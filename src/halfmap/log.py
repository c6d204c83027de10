"""Logging: one logger for the package, readable on a terminal and plain in a job's run.out."""

from __future__ import annotations

import logging

log = logging.getLogger("halfmap")
"""The package's logger. Every module says ``from halfmap.log import log``."""

log.addHandler(logging.NullHandler())


def show_on_terminal(level: int = logging.INFO) -> None:
    """Print the package's messages on the terminal, coloured where it can show colours."""
    from rich.console import Console
    from rich.logging import RichHandler

    handler = RichHandler(
        console=Console(stderr=True), show_path=False, show_time=False, show_level=False, markup=False
    )
    handler.addFilter(lambda record: not getattr(record, "quiet", False))
    log.addHandler(handler)
    log.setLevel(level)
