"""The record of finished items that lets a killed job go on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halfmap.io.atomic import writing

_BLOCK = 2**16


class Ledger:
    """Finished items of a job with their results, and failed ones, one JSON line each, appended as they end.

    A line is written only after the item's files have their final names. A line cut short by a kill is
    dropped on reading, as is one that is damaged, and its item runs again.

    Parameters
    ----------
    path : path
        ``items.jsonl`` of a job folder; need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def done(
        self,
        unit: str,
        versions: Mapping[str, str | None] | None = None,
        files: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Results by key of the finished items of one loop.

        Parameters
        ----------
        unit : str
            Of the loop.
        versions : mapping, optional
            What items are now, by key, where that is known: one that was done as another is not finished.
        files : mapping, optional
            Under what names they write files, by key: one that was done under another name is not finished,
            nor is one whose files another item has written over since.
        """
        found, owners = self._read(unit)
        versions, files = versions or {}, files or {}
        return {
            key: entry["result"]
            for key, entry in found.items()
            if "error" not in entry
            and (entry.get("version") is None or versions.get(key) in (None, entry["version"]))
            and ("files" not in entry or files.get(key, entry["files"]) == entry["files"])
            and owners.get(entry.get("files"), key) == key
        }

    def failed(self, unit: str, versions: Mapping[str, str | None]) -> dict[str, str]:
        """Reasons by key of those items of one loop that failed last as what they are now."""
        return {
            key: entry["error"]
            for key, entry in self._read(unit)[0].items()
            if "error" in entry and versions.get(key) == entry["version"]
        }

    def _read(self, unit: str) -> tuple[dict[str, dict[str, Any]], dict[str | None, str]]:
        """The last entry of each item of a loop, and which item wrote last under a name of files."""
        found: dict[str, dict[str, Any]] = {}
        owners: dict[str | None, str] = {}
        if not self.path.exists():
            return found, owners
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
                    if "files" in entry:
                        owners[entry["files"]] = entry["key"]
        return found, owners

    def append(
        self,
        unit: str,
        key: str,
        result: Any,
        seconds: float,
        version: str | None = None,
        files: str | None = None,
    ) -> Any:
        """Record one finished item; return its result as a resumed run will read it, tuples as lists."""
        entry = {"unit": unit, "key": key, "seconds": round(seconds, 3), "result": result}
        return json.loads(self._write(entry, version, files))["result"]

    def append_failure(self, unit: str, key: str, error: str, version: str, files: str | None = None) -> None:
        """Record one item that fails as what it is now."""
        self._write({"unit": unit, "key": key, "error": error}, version, files)

    def _write(self, entry: dict[str, Any], version: str | None, files: str | None) -> str:
        more = {"version": version, "files": files}
        line = json.dumps(entry | {name: value for name, value in more.items() if value is not None})
        with writing(self.path), self.path.open("ab") as file:
            file.write(line.encode() + b"\n")
        return line

    def repair(self) -> None:
        """Cut a last line that a kill left unfinished, so that the next one does not join it."""
        if not self.path.exists():
            return
        with self.path.open("rb+") as file:
            end = first = file.seek(0, os.SEEK_END)
            cut = -1
            while first and cut < 0:
                last, first = first, max(0, first - _BLOCK)
                file.seek(first)
                cut = file.read(last - first).rfind(b"\n")
            if first + cut + 1 < end:
                file.truncate(first + cut + 1)
