"""Names of files as a project's tables hold them, and files that names and patterns stand for."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from halfmap.errors import TableError


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
    """Files that a name or a pattern with wildcards stands for, relative to the folder `root`.

    ``**`` stands for any folders, and none; what it finds are files.
    """
    # A name may hold brackets that a pattern would read as its own; so may the folder.
    if (root / pattern).exists():
        return [root / pattern]
    deep = "**" in Path(pattern).parts
    names = glob.glob(str(pattern), root_dir=root, recursive=deep)  # noqa: PTH207 - absolute patterns
    return [root / name for name in names if not (deep and (root / name).is_dir())]


def unique_stems(names: Sequence[str], *, table: str | Path | None = None) -> list[str]:
    """Names for the files made of each file of a table: its own without folder and ending.

    Where two would get the same, their folders are added; if that does not tell them apart, their endings; at
    last their rows. What a file gets does not depend on the order of the others, except at last.

    Parameters
    ----------
    names : sequence of str
        Micrographs or movies, as a table names them.
    table : path, optional
        The table, for messages.

    Raises
    ------
    TableError
        If a file is listed twice; names the row.
    """
    seen: set[str] = set()
    for row, name in enumerate(names, start=1):
        if name in seen:
            raise TableError(f"lists {name} again", path=table, row=row, hint="keep one of these rows")
        seen.add(name)
    paths = [PurePosixPath(name) for name in names]
    stems = [path.stem for path in paths]
    for longer in (
        lambda path: "_".join(_folders_and_name(path.with_suffix(""))),
        lambda path: "_".join(_folders_and_name(path)).replace(".", "_"),
    ):
        count = Counter(stems)
        stems = [stem if count[stem] == 1 else longer(path) for stem, path in zip(stems, paths, strict=True)]
    count = Counter(stems)
    return [stem if count[stem] == 1 else f"{row:06d}_{stem}" for row, stem in enumerate(stems, start=1)]


def _folders_and_name(path: PurePosixPath) -> list[str]:
    return [part for part in path.parts if part not in ("/", "..")]
