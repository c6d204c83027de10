"""The record of finished items that lets a killed job go on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halfmap.io.atomic import writing


class Ledger:
    """Finished items of a job with their results, one JSON line each, appended as they finish.

    A line is written only after the item's files have their final names. A line cut short by a kill is
    dropped on reading, as is one that is damaged, and its item runs again.

    Parameters
    ----------
    path : path
        ``items.jsonl`` of a job folder; need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def done(self, unit: str, versions: Mapping[str, str | None] | None = None) -> dict[str, Any]:
        """Results by key of the finished items of one loop.

        Parameters
        ----------
        unit : str
            Of the loop.
        versions : mapping, optional
            What items are now, by key, where that is known: one that was done as another is not finished.
        """
        found: dict[str, dict[str, Any]] = {}
        versions = versions or {}
        if not self.path.exists():
            return {}
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue  # a machine that lost power may leave anything
                if entry["unit"] == unit:
                    # The last one counts: its files took the place of others'.
                    found[entry["key"]] = entry
        return {
            key: entry["result"]
            for key, entry in found.items()
            if entry.get("version") is None or versions.get(key) in (None, entry["version"])
        }

    def append(self, unit: str, key: str, result: Any, seconds: float, version: str | None = None) -> Any:
        """Record one finished item; return its result as a resumed run will read it, tuples as lists."""
        entry = {"unit": unit, "key": key, "seconds": round(seconds, 3), "result": result}
        line = json.dumps(entry if version is None else entry | {"version": version})
        with writing(self.path), self.path.open("ab") as file:
            file.write(line.encode() + b"\n")
        return json.loads(line)["result"]

    def repair(self) -> None:
        """Cut a last line that a kill left unfinished, so that the next one does not join it."""
        if not self.path.exists():
            return
        with self.path.open("rb+") as file:
            content = file.read()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                file.truncate(whole)
