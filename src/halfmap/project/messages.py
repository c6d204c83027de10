"""What a job logs: run.out for all, run.err for what went wrong, and the warnings among it."""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from halfmap.io.atomic import writing
from halfmap.log import log

WARNINGS_FILE = "run.err"
"""Warnings, errors and tracebacks of a job."""

_IN_VIEW = 12
"""Lines after which what was said is out of sight."""

_WARNING = re.compile(r"[-0-9]{10} [:,0-9]{12} WARNING (.*)")


_ERROR = re.compile(_WARNING.pattern.replace("WARNING", "ERROR"))


class _LogFile(logging.FileHandler):
    """A file of messages; that none can be written any more must not bury why in tracebacks."""

    def __init__(self, path: Path, level: int) -> None:
        super().__init__(path, encoding="utf-8")
        self.setLevel(level)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with suppress(OSError):
            super().close()


class WarningsSeen(logging.Handler):
    """Keeps the warnings of a run, each once, and the last lines that it has shown."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._texts: dict[str, None] = {}
        self.last: deque[str] = deque(maxlen=_IN_VIEW)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the record's text."""
        if record.levelno == logging.WARNING:
            self._texts[record.getMessage()] = None
        if not getattr(record, "quiet", False):
            self.last.append(record.getMessage())

    @property
    def texts(self) -> list[str]:
        """The warnings, in the order in which they came first."""
        return list(self._texts)


@contextmanager
def logging_to(folder: Path) -> Iterator[WarningsSeen]:
    """Keep the package's messages in ``run.out``, its warnings, errors and tracebacks in ``run.err``."""
    with writing(folder):
        files = (
            _LogFile(folder / "run.out", logging.INFO),
            _LogFile(folder / WARNINGS_FILE, logging.DEBUG),
        )
    files[1].addFilter(lambda record: record.levelno != logging.INFO)
    seen = WarningsSeen()
    level_before = log.level
    for handler in (*files, seen):
        log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        yield seen
    finally:
        log.setLevel(level_before)
        for handler in (*files, seen):
            log.removeHandler(handler)
            handler.close()


def read_warnings(folder: Path) -> list[str]:
    """Warnings that the job in `folder` has given in all its runs, each once."""
    path = folder / WARNINGS_FILE
    if not path.exists():
        return []
    with path.open(encoding="utf-8", errors="replace") as file:
        found = (_WARNING.match(line) for line in file)
        return list(dict.fromkeys(match[1] for match in found if match))


def read_error(folder: Path) -> str | None:
    """The last error that the job in `folder` has logged: what it ended with, if it failed."""
    path = folder / WARNINGS_FILE
    if not path.exists():
        return None
    found = _ERROR.findall(path.read_text(encoding="utf-8", errors="replace"))
    return found[-1] if found else None
