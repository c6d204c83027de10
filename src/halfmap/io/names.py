"""Names of files as a project's tables hold them, and files that names and patterns stand for."""

from __future__ import annotations

import glob
import os
from pathlib import Path


def without_dots(path: str | Path) -> Path:
    """An absolute path without ``..``, symbolic links kept except in what ``..`` climbs out of."""
    path = Path(path).absolute()
    if ".." not in path.parts:
        return path
    last = len(path.parts) - path.parts[::-1].index("..")
    return Path(os.path.realpath(Path(*path.parts[:last])), *path.parts[last:])


def name_in(path: str | Path, root: Path) -> Path:
    """Name of a file or pattern relative to the folder `root`; absolute if it lies outside.

    A folder has several names where a symbolic link leads to it. A link inside `root` to a file elsewhere
    counts as inside.
    """
    path = without_dots(path)
    if path.is_relative_to(root):
        return path.relative_to(root)
    if root.exists():
        for parent in path.parents:
            if parent.exists() and parent.samefile(root):
                return path.relative_to(parent)
    return path


def find_files(pattern: str | Path, root: Path) -> list[Path]:
    """Files that a name or a pattern with wildcards stands for, relative to the folder `root`."""
    # A name may hold brackets that a pattern would read as its own; so may the folder.
    if (root / pattern).exists():
        return [root / pattern]
    return [root / name for name in glob.glob(str(pattern), root_dir=root)]  # noqa: PTH207 - absolute patterns
