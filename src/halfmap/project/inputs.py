"""Input files of a job: the record of what they were, and whether they have changed since."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from stat import S_ISREG
from typing import Any

from halfmap.engine import Step
from halfmap.engine.parameters import Form, Parameter
from halfmap.io.names import find_files, name_in

_END = 2**14
"""Bytes at the beginning and at the end of files that are too many to be read whole."""

_BLOCK = 2**22

Entry = dict[str, Any]


def input_paths(step: Form, parameter: Parameter) -> tuple[Path, ...]:
    """Names and patterns of files that a step was given by a parameter; none if that takes no files."""
    value = getattr(step, parameter.name)
    if parameter.node is None or value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)


def record_inputs(step: Step, root: Path, known: Iterable[Entry] = ()) -> list[Entry]:
    """Describe every input file of a step as it is now, named from the project's folder `root`.

    A file is known again by size and date, or else by its contents, as copies of a project have other dates.
    Files named one by one are read whole for that, as the step reads them; of those in lists and patterns,
    which may be thousands of movies, the ends are.

    Parameters
    ----------
    step : Step
        With its inputs named relative to `root`.
    root : path
        Folder of the project.
    known : iterable of dict
        An earlier record: what has size and date as in there is not read again.
    """
    entries, names = {entry["path"]: entry for entry in known}, _Names(root)
    now = []
    for parameter in step.parameters():
        whole = not isinstance(getattr(step, parameter.name), tuple)
        for name in input_paths(step, parameter):
            paths = sorted(find_files(name, root)) or [root / name]
            now += [_describe(path, names.of(path), entries, whole=whole) for path in paths]
    return now


def changed_since(step: Step, root: Path, recorded: Iterable[Entry]) -> tuple[list[str], list[str]]:
    """Input files that have changed since they were recorded, and those that are new.

    A file that is still named, by itself or by a link, but gone, has not changed: it may have been archived,
    or its disk be out of reach. One that a pattern finds no more has.
    """
    names = _Names(root)
    before = {names.of(root / entry["path"]): entry for entry in recorded}
    now = {entry["path"]: entry for entry in record_inputs(step, root, before.values())}
    for name in before.keys() - now.keys():
        path = root / name
        now[name] = _describe(path, name, before) if path.exists() else {"path": name}
    changed = [name for name, entry in before.items() if not _is_same(now[name], entry)]
    return changed, [name for name in now if name not in before]


def times_of(folder: Path) -> dict[str, float]:
    """When the input files of the job in `folder` were written, in seconds since 1970, by their names."""
    record = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    return {entry["path"]: entry["modified"] for entry in record.get("inputs", []) if "modified" in entry}


class _Names(dict[Path, Path]):
    """Names of files in a project; thousands of files share a folder, whose name is found once."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def __missing__(self, folder: Path) -> Path:
        self[folder] = name = name_in(folder, self.root)
        return name

    def of(self, path: Path) -> str:
        return (self[path.parent] / path.name).as_posix()


def _describe(path: Path, name: str, known: Mapping[str, Entry], *, whole: bool = False) -> Entry:
    try:
        stat = path.stat()
    except OSError:
        return {"path": name, **known.get(name, {}), "gone": True}
    if not S_ISREG(stat.st_mode):
        return {"path": name, "bytes": 0}
    entry = {"path": name, "bytes": stat.st_size, "modified": round(stat.st_mtime, 3)}
    before = known.get(name, {})
    if entry.items() <= before.items():
        return {key: value for key, value in before.items() if key != "gone"}
    # What may not be read is for the step to say.
    with suppress(OSError):
        entry["contents"] = _digest(path, stat.st_size, whole=whole)
    return entry


def _digest(path: Path, size: int, *, whole: bool) -> str:
    total = hashlib.blake2b(digest_size=16)
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK if whole else _END):
            total.update(block)
            if not whole and size > file.tell() + _END:
                file.seek(size - _END)
    return total.hexdigest()


def _is_same(now: Entry, before: Entry) -> bool:
    by = "contents" if "contents" in now and "contents" in before else "modified"
    return all(now.get(key) == before.get(key) for key in ("bytes", by))
