"""Every error that Halfmap raises on purpose: one sentence that names the file, the row and the remedy."""

from __future__ import annotations

from pathlib import Path


class HalfmapError(Exception):
    """Root of all errors a user can cause or mend; the command line prints it and exits with code 2.

    Parameters
    ----------
    message : str
        What is wrong, without the file's name.
    path : path, optional
        File that it is wrong in.
    row : int, optional
        Row of that file's table, counted from 1 as a user counts them.
    hint : str, optional
        What to do about it.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | Path | None = None,
        row: int | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.path = path
        self.row = row
        self.hint = hint

    def __str__(self) -> str:
        where = "" if self.path is None else str(self.path)
        if self.row is not None:
            where += f"{', ' if where else ''}row {self.row}"
        text = f"{where}: {self.message}" if where else self.message
        return f"{text}; {self.hint}" if self.hint else text

    def __reduce__(self):
        # Keyword-only arguments do not survive the default pickling between worker processes.
        return _rebuild, (type(self), self.message, self.path, self.row, self.hint)


def _rebuild(cls, message, path, row, hint) -> HalfmapError:
    return cls(message, path=path, row=row, hint=hint)


class FileFormatError(HalfmapError):
    """A file is not what its name or header says: truncated, corrupt, of an unknown kind."""


class TableError(HalfmapError):
    """A table lacks a column, a row or an optics group, or holds a value that cannot be."""


class ShapeError(HalfmapError):
    """Arrays that belong together do not fit each other."""


class ParameterError(HalfmapError):
    """A parameter is outside what it may be, alone or beside the others."""


class ResourceError(HalfmapError):
    """Memory, disk or a device is missing."""


class ProjectError(HalfmapError):
    """A project or job folder is missing, locked, or in a state that forbids what was asked."""


class ItemsFailedError(HalfmapError):
    """Items of a step failed: all of them, or more than the user allows."""


class TooManyFailedError(ItemsFailedError):
    """More items failed than the options allow."""
