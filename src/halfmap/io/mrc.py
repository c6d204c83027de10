"""Read and write MRC images, stacks and maps (MRC2014), whole or by section, in bounded memory.

Arrays are `(sections, y, x)` in the order of the file: row 0 is the first stored row, which the field's
viewers show at the bottom. Maps whose columns, rows and sections are not x, y and z are turned to (z, y, x)
on reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from halfmap.errors import FileFormatError
from halfmap.io.binary import file_size, opened, reading
from halfmap.io.mrc_header import MrcHeader, inflate, read_header, truncated
from halfmap.io.mrc_writer import MrcStackWriter, write_mrc

__all__ = ["MrcHeader", "MrcStackWriter", "open_mrc", "read_header", "read_mrc", "read_sections", "write_mrc"]


def read_mrc(path: str | Path, index: int | slice | Sequence[int] | NDArray | None = None) -> NDArray:
    """Read sections of an MRC file, and no others.

    Parameters
    ----------
    path : path
        MRC, MRCS or MAP file, plain or compressed (`.gz`, `.bz2`).
    index : int, slice, sequence of int or None
        Sections counted from 0, in the order they are to come; None for all.

    Returns
    -------
    ndarray (n, y, x), or (y, x) for one index
        In the file's own type, native byte order; 4-bit data as uint8.

    Raises
    ------
    FileFormatError
        As `read_header`, or if a section is asked that is not in the file.

    Notes
    -----
    Neighbouring sections are read in one go and the others in the order of the file. A compressed file is
    inflated in memory up to the last section asked.

    Examples
    --------
    >>> import tempfile, numpy as np
    >>> from halfmap.io.mrc import read_mrc, write_mrc
    >>> path = tempfile.mkdtemp() + "/stack.mrcs"
    >>> write_mrc(path, np.zeros((5, 4, 6), np.float32), pixel_size=1.5)
    >>> read_mrc(path, [4, 0]).shape
    (2, 4, 6)
    """
    return read_sections(read_header(path), index)


def read_sections(header: MrcHeader, index: int | slice | Sequence[int] | NDArray | None = None) -> NDArray:
    """Read sections as `read_mrc` does, of a file whose header is at hand."""
    sections = _sections(header, index)
    if header.stored_axes != (3, 2, 1):
        array = np.array(_map(header)[_as_array(sections)], dtype=header.dtype)
    else:
        array = _decode(header, _read_raw(header, sections), header.stored_shape[1:])
    return array[0] if isinstance(index, int | np.integer) else array


def _sections(
    header: MrcHeader, index: int | slice | Sequence[int] | NDArray | None
) -> range | NDArray[np.int64]:
    n = header.shape[0]
    if index is None or isinstance(index, slice):
        return range(n)[index if index is not None else slice(None)]
    sections = np.atleast_1d(np.asarray(index, dtype=np.int64)).ravel()
    wrong = sections[(sections < -n) | (sections >= n)]
    if len(wrong):
        message = f"holds {n} sections, number {wrong[0]} (from 0) was asked"
        raise FileFormatError(message, path=header.path, hint="check the table")
    return sections % n


def _read_raw(header: MrcHeader, sections: range | NDArray[np.int64]) -> NDArray[np.uint8]:
    """Raw bytes of the sections, (n, bytes of a section)."""
    size = header.section_bytes
    if len(sections) == 0:
        return np.empty((0, size), np.uint8)
    if header.compression is not None:
        # The header's length is a claim until the data are there: no array of that length before.
        first, last = min(sections[0], sections[-1]), max(sections[0], sections[-1])
        if not isinstance(sections, range):
            first, last = int(sections.min()), int(sections.max())
        start, stop = header.data_offset + first * size, header.data_offset + (last + 1) * size
        data = np.frombuffer(inflate(header.path, header.compression, start, stop), np.uint8)
        return data.reshape(-1, size)[_as_array(sections) - first]
    sections = _as_array(sections)
    out = np.empty((len(sections), size), np.uint8)
    starts = np.flatnonzero(np.diff(sections, prepend=sections[0] - 2) != 1)
    stops = np.append(starts[1:], len(sections))
    with opened(header.path) as stream:
        for run in np.argsort(sections[starts], kind="stable"):
            stream.seek(header.data_offset + int(sections[starts[run]]) * size)
            _fill(header, stream, out[starts[run] : stops[run]].data.cast("B"))
    return out


def _as_array(sections: range | NDArray[np.int64]) -> NDArray[np.int64]:
    if isinstance(sections, range):
        return np.arange(sections.start, sections.stop, sections.step)
    return sections


def _fill(header: MrcHeader, stream: BinaryIO, view: memoryview) -> None:
    # One system call gives at most 2 GiB.
    done = 0
    while done < len(view):
        got = stream.readinto(view[done:])  # type: ignore[attr-defined]
        if not got:
            raise truncated(header, file_size(header.path))
        done += got


def _decode(header: MrcHeader, raw: NDArray[np.uint8], shape: tuple[int, int]) -> NDArray:
    if not header.packed:
        array = raw.view(header.stored_dtype).reshape(-1, *shape)
        return array if array.dtype.isnative else array.byteswap(inplace=True).view(header.dtype)
    rows = raw.reshape(-1, shape[0], header.row_bytes)
    array = np.empty((*rows.shape[:2], 2 * header.row_bytes), np.uint8)
    array[..., 0::2] = rows & 15  # the first pixel is in the low bits
    array[..., 1::2] = rows >> 4
    return array[..., : shape[1]]


def open_mrc(path: str | Path) -> NDArray:
    """Map an MRC file into memory, read-only.

    Returns
    -------
    ndarray (sections, y, x)
        A memory map in the file's byte order; compressed and 4-bit files, which cannot be mapped, are read.

    Raises
    ------
    FileFormatError
        As `read_header`.
    """
    return _map(read_header(path))


def _map(header: MrcHeader) -> NDArray:
    if header.compression is not None or header.packed:
        sections = range(header.stored_shape[0])
        stored = _decode(header, _read_raw(header, sections), header.stored_shape[1:])
    else:
        with reading(header.path):
            stored = np.memmap(
                header.path,
                header.stored_dtype,
                mode="r",
                offset=header.data_offset,
                shape=header.stored_shape,
            )
    return stored.transpose([header.stored_axes.index(axis) for axis in (3, 2, 1)])
