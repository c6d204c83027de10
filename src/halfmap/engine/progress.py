"""How far a loop over items, or a round of such loops, is: on the terminal, in the log, in the job folder."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halfmap.io.atomic import writing
from halfmap.log import log


class Progress:
    """Progress as a bar on a terminal, as lines elsewhere, and always as events in the job folder.

    Parameters
    ----------
    path : path
        ``events.jsonl`` of the job folder.
    unit : str
        Singular word for an item.
    done, total : int
        Items done before, and in all.
    """

    def __init__(self, path: Path, unit: str, *, done: int, total: int) -> None:
        self.path, self.unit, self.done, self.total = path, unit, done, total
        self.before, self.failed = done, 0
        self.start = time.monotonic()
        self.bar: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty() and self.total > 1:
            from rich import progress as rich
            from rich.console import Console

            columns = (
                rich.TextColumn("{task.description}"),
                rich.BarColumn(),
                rich.MofNCompleteColumn(),
                rich.TimeRemainingColumn(),
            )
            self.bar = rich.Progress(*columns, console=Console(stderr=True), transient=True)
            self.bar.start()
            self.task = self.bar.add_task(f"{self.unit}s", total=self.total, completed=self.done)
        return self

    def advance(self, key: str, seconds: float, error: str | None) -> None:
        """Count an item as over, well or (with `error`) badly."""
        self.done += 1
        self.failed += error is not None
        event = {
            "unit": self.unit,
            "key": key,
            "done": self.done,
            "failed": self.failed,
            "total": self.total,
            "seconds": round(seconds, 3),
        }
        if error is not None:
            event["error"] = error
        append_event(self.path, "item", event)
        if self.bar is not None:
            failed = f" ({self.failed} failed)" if self.failed else ""
            self.bar.update(self.task, advance=1, description=f"{self.unit}s{failed}")
        elif self.done * 10 // self.total > (self.done - 1) * 10 // self.total:
            rate = (time.monotonic() - self.start) / max(1, self.done - self.before)
            failed = f", {self.failed} failed" if self.failed else ""
            units = f"{self.unit}{'' if self.total == 1 else 's'}"
            left = (self.total - self.done) * rate
            rest = f", {duration(left)} left" if left >= 1 else ""
            log.info("%d of %d %s%s, %.2f s each%s", self.done, self.total, units, failed, rate, rest)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()


def duration(seconds: float) -> str:
    """About how long something takes: 40 s, 12 min, 3.5 h."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"


def append_event(path: Path, kind: str, values: Mapping[str, Any]) -> None:
    """Add an event of a kind to ``events.jsonl``."""
    event = {"time": round(time.time(), 3), "event": kind, **values}
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(event) + "\n")
