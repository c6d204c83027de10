"""Open files for reading so that every failure is one sentence that names the file."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from halfmap.errors import FileFormatError
from halfmap.ops.cores import usable_cores

_END = 2**14
"""Bytes of a file's beginning and end by which its contents are known again."""


def sum_of_ends(path: Path) -> str:
    """A short sum of a file's size, beginning and end, by which large files are known again quickly.

    Raises
    ------
    FileFormatError
        If it cannot be read.
    """
    with reading(path), path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        total = hashlib.blake2b(f"{size}".encode() + file.read(_END), digest_size=8)
        file.seek(max(0, size - _END))
        total.update(file.read(_END))
    return total.hexdigest()


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn what the operating system says about `path` into a FileFormatError.

    Raises
    ------
    FileFormatError
        If the file is missing, is a folder, may not be read, or the disk fails under it.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise FileFormatError("there is no such file", path=path, hint="check the name and folder") from error
    except IsADirectoryError as error:
        raise FileFormatError("is a folder, not a file", path=path, hint="name the file in it") from error
    except PermissionError as error:
        raise FileFormatError("may not be read", path=path, hint="check the file's permissions") from error
    except OSError as error:
        # Decompressors report bad data as an OSError without a number: leave those to the format's reader.
        if error.errno is None or error.errno not in errno.errorcode:
            raise
        raise FileFormatError(
            f"cannot be read ({error.strerror})", path=path, hint="check the disk"
        ) from error


@contextmanager
def opened(path: str | Path) -> Iterator[BinaryIO]:
    """Open `path` for unbuffered binary reading, with the errors of `reading`."""
    with reading(path), Path(path).open("rb", buffering=0) as stream:
        yield stream  # type: ignore[misc]  # a raw FileIO reads as a BinaryIO does


def file_size(path: str | Path) -> int:
    """Size of `path` in bytes."""
    with reading(path):
        if (path := Path(path)).is_dir():
            raise IsADirectoryError
        return path.stat().st_size


def decoding_threads() -> int:
    """Threads for decoding frames: as many as this process may use processors, at most 8."""
    return min(8, usable_cores())
