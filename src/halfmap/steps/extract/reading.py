"""A micrograph whose first rows are used while the last are read."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import get_ident
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from halfmap.io.binary import file_size, reading
from halfmap.io.images import TIFF_SUFFIXES, read_image
from halfmap.io.mrc import read_header
from halfmap.io.mrc_header import MrcHeader, truncated
from halfmap.io.tiff import tiff_info

STRIP_BYTES = 1 << 22
"""Of the rows that are read at a time."""


@dataclass(frozen=True, eq=False)
class Arriving:
    """A micrograph of which only the first rows may be there.

    Attributes
    ----------
    image : array (h, w)
        Its pixels; rows not waited for hold anything.
    strips : list of Future
        Reading of the rows, so many at a time; none if all are there.
    rows_each : int
        Rows of a strip.
    """

    image: NDArray[np.float32]
    strips: list[Future[None]]
    rows_each: int

    def wait(self, rows: int) -> None:
        """Wait until the first rows are there.

        Raises
        ------
        FileFormatError
            If they cannot be read.
        """
        for strip in self.strips[: -(-rows // self.rows_each)]:
            strip.result()


@contextmanager
def arriving(path: Path) -> Iterator[Arriving]:
    """Read a micrograph over the last one of its size, in a thread of its own.

    Fresh memory would take half as long again. What is not stored as plain rows is read at once.

    Raises
    ------
    FileFormatError
        As `read_image`.
    """
    header = None if path.suffix.lower() in TIFF_SUFFIXES else read_header(path)
    if header is None or not _has_plain_rows(header):
        pixels = read_image(path)
        image = _room(pixels.shape, get_ident())
        np.copyto(image, pixels)
        yield Arriving(image, [], len(image))
        return
    image = _room(header.shape[1:], get_ident())
    rows = max(1, STRIP_BYTES // header.row_bytes)
    with reading(path):
        stream = path.open("rb", buffering=0)
        stream.seek(header.data_offset)
    with stream, ThreadPoolExecutor(1) as thread:
        parts = (image[first : first + rows] for first in range(0, len(image), rows))
        try:
            yield Arriving(image, [thread.submit(_read_rows, header, stream, part) for part in parts], rows)
        finally:
            thread.shutdown(cancel_futures=True)


def image_shape(path: Path) -> tuple[int, ...]:
    """Size (h, w) of a micrograph, from its header."""
    is_tiff = path.suffix.lower() in TIFF_SUFFIXES
    return tuple(tiff_info(path).shape[-2:] if is_tiff else read_header(path).shape[-2:])


def forget_micrograph() -> None:
    """Give up the memory that is kept for the next micrograph."""
    _room.cache_clear()


@lru_cache(maxsize=1)
def _room(shape: tuple[int, ...], thread: int) -> NDArray[np.float32]:
    # One for each thread that asks: two jobs of one process must not share it.
    return np.empty(shape, np.float32)


def _has_plain_rows(header: MrcHeader) -> bool:
    is_one = header.shape[0] == 1 and header.stored_axes == (3, 2, 1)
    return is_one and header.compression is None and not header.packed


def _read_rows(header: MrcHeader, stream: BinaryIO, rows: NDArray[np.float32]) -> None:
    """Read the next rows of the file."""
    is_native = header.stored_dtype == rows.dtype
    raw = rows if is_native else np.empty(rows.shape, header.stored_dtype)
    view = raw.view(np.uint8).reshape(-1).data
    with reading(header.path):
        while len(view):
            if not (got := stream.readinto(view)):  # type: ignore[attr-defined] - a raw file
                raise truncated(header, file_size(header.path))
            view = view[got:]
    if not is_native:
        np.copyto(rows, raw)
