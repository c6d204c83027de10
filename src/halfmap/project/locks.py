"""Locks of the kernel (``flock``) on files, which go with the process that holds them."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from halfmap.errors import ProjectError
from halfmap.io.atomic import writing

_CHAIN_FILE = ".halfmap_run.lock"
_PATIENCE_s = 0.5


@contextmanager
def locked(path: Path, said: str, *, hint: str | None = None) -> Iterator[None]:
    """Hold the lock of the file `path`, which is made if need be.

    Parameters
    ----------
    path : Path
        Of the lock.
    said : str
        What another process that holds it means, of the folder that it lies in.
    hint : str, optional
        What to do about it.

    Raises
    ------
    ProjectError
        If another process holds it.
    """
    with writing(path):
        file = path.open("a")
    with file:
        # Whoever asks whether it is held holds it for an instant.
        deadline = time.monotonic() + _PATIENCE_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ProjectError(said, path=path.parent, hint=hint) from None
                time.sleep(0.02)
        yield


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of the file `path`, which is there."""
    # Shared and for reading: others may look too, also into a project that they may not change.
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@contextmanager
def making(root: Path) -> Iterator[None]:
    """Say in a sentence that the folder of a project cannot be made.

    Raises
    ------
    ProjectError, ResourceError
        If it cannot.
    """
    try:
        with writing(root):
            yield
    except OSError as error:
        message = f"no project can be made here ({(error.strerror or str(error)).lower()})"
        raise ProjectError(message, path=root, hint="choose another folder") from error


@contextmanager
def chain_locked(root: Path) -> Iterator[None]:
    """Be the only chain at work in the project in the folder `root`; one that stays empty is taken back.

    Raises
    ------
    ProjectError, ResourceError
        If `halfmap run` or `halfmap live` works there, or the folder cannot be made.
    """
    is_new = not root.exists()
    with making(root):
        root.mkdir(parents=True, exist_ok=True)
    lock = root / _CHAIN_FILE
    hint = "wait for it or end it; each of them goes on with what the other has done"
    try:
        with locked(lock, "another `halfmap run` or `halfmap live` works in this project", hint=hint):
            yield
    finally:
        if is_new and {path.name for path in root.iterdir()} == {lock.name}:
            with suppress(OSError):
                lock.unlink()
                root.rmdir()
