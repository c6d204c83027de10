"""Write a file whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from halfmap.errors import ResourceError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EROFS, errno.EPERM)
_TOLD_NUMBER = re.compile(r"\(os error ([0-9]+)\)")
_SHORT_WRITE = re.compile(r"[0-9]+ requested and [0-9]+ written")
_TEMPORARY = re.compile(r"\.[0-9]+(-[0-9a-f]+)?~.")


@contextmanager
def atomic_path(path: str | Path, *, durable: bool = True) -> Iterator[Path]:
    """Give a temporary name beside `path`; rename it to `path` when the block ends well, delete it otherwise.

    The temporary name keeps the suffixes of `path` (writers choose a format by them) and starts with a dot
    and the process number and random digits, so that two processes never write the same one: processes on
    two machines may have the same number.

    Parameters
    ----------
    path : path
        Final name of the file.
    durable : bool
        Wait until content and name are on the disk, so that a loss of power leaves no empty file. It takes
        1 to 5 ms, which only a step that writes thousands of small files in a row can feel.

    Raises
    ------
    ResourceError
        If the disk is full or the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}-{secrets.token_hex(4)}~{path.name}")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            if durable:
                _flush(temporary)
            temporary.replace(path)
            if durable:
                _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    try:
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
    except OSError as error:
        # Folders may be closed to reading, and some network file systems cannot flush them.
        if not (path.is_dir() and error.errno in (errno.EACCES, errno.EINVAL, errno.ENOTSUP)):
            raise


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Say in a sentence that a file or folder could not be written.

    Raises
    ------
    ResourceError
        If the disk is full, or the folder may not be written or is none.
    """
    try:
        yield
    except OSError as error:
        number = _error_number(error)
        if number in _FULL:
            raise ResourceError(
                "no space left on the disk", path=path, hint="free some and resume"
            ) from error
        if number in _FORBIDDEN:
            raise ResourceError(
                "cannot be written", path=path, hint="check the folder's permissions"
            ) from error
        if number in (errno.ENOTDIR, errno.EEXIST):
            raise ResourceError("is a file where a folder belongs", path=error.filename or path) from error
        raise


def is_out_of_resources(error: BaseException) -> bool:
    """Whether an error says that nothing more can be written, whatever it is."""
    return isinstance(error, ResourceError) or (isinstance(error, OSError) and _error_number(error) in _FULL)


def _error_number(error: OSError) -> int | None:
    """Number of a system error, which polars and NumPy only tell in words."""
    if error.errno is None and (told := _TOLD_NUMBER.search(str(error))):
        return int(told[1])
    if error.errno is None and _SHORT_WRITE.search(str(error)):
        return errno.ENOSPC
    return error.errno


def remove_temporaries(folder: Path, pattern: str = "**/.*~*") -> None:
    """Delete what killed processes left under temporary names; none may be writing there."""
    for path in folder.glob(pattern):
        if _TEMPORARY.match(path.name):
            path.unlink(missing_ok=True)


def write_text(path: str | Path, text: str, *, durable: bool = True) -> None:
    """Write `text` (UTF-8) to `path`, whole or not at all; `durable` as of `atomic_path`."""
    with atomic_path(path, durable=durable) as temporary:
        temporary.write_text(text, encoding="utf-8")
