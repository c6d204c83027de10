"""Write a file whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from halfmap.errors import ResourceError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; rename it to `path` when the block ends well, delete it otherwise.

    The temporary name keeps the suffixes of `path` (writers choose a format by them) and starts with a dot
    and the process number, so that two processes never write the same one.

    Raises
    ------
    ResourceError
        If the disk is full or the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}~{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                "no space left on the disk", path=path, hint="free some and resume"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise ResourceError(
                "cannot be written", path=path, hint="check the folder's permissions"
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
