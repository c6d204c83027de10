"""The compiled pass over the rows of a large STAR table."""

from __future__ import annotations

import numba
import numpy as np

_BELL, _TAB, _NEWLINE, _SPACE, _HASH = 7, 9, 10, 32, 35
_DOUBLE_QUOTE, _SINGLE_QUOTE, _SEPARATOR = 34, 39, 31
_GOOD, _RAGGED, _UNCLOSED, _CONTROL = 0, 1, 2, 3

# Positions are unsigned: they need no test for a negative index, which is a third of the time.
_ZERO, _ONE = np.uint64(0), np.uint64(1)


@numba.njit(cache=True, nogil=True)
def split(source: np.ndarray, target: np.ndarray, n_columns: int) -> tuple[np.uint64, int, int, int]:
    """Copy tokens from `source` to `target`; see `halfmap.io.star_rows.row_chunks` for the rules.

    Returns
    -------
    tuple
        Bytes written, rows, status and number of values of the last row; for a ragged row, where it begins in
        `source` instead of the bytes written.
    """
    size = np.uint64(len(source))
    read = _ZERO
    written = _ZERO
    n_rows = 0
    while read < size:
        row_start = read
        tokens = 0
        while True:
            while read < size and (source[read] == _SPACE or source[read] == _TAB):
                read += _ONE
            if read == size or source[read] == _NEWLINE:
                break
            if source[read] == _HASH:
                while read < size and source[read] != _NEWLINE:
                    if _is_control(source[read]):
                        return _ZERO, n_rows, _CONTROL, 0
                    read += _ONE
                break
            if tokens > 0:
                target[written] = _SEPARATOR
                written += _ONE
            tokens += 1
            if source[read] in (_DOUBLE_QUOTE, _SINGLE_QUOTE):
                read, written, status = _copy_quoted(source, target, read, written)
            else:
                read, written, status = _copy_plain(source, target, read, written)
            if status != _GOOD:
                return _ZERO, n_rows, status, 0
        read += _ONE
        if tokens == 0:
            continue
        if n_columns == 2 and tokens == 1:
            target[written] = _SEPARATOR
            written += _ONE
        elif tokens != n_columns:
            return row_start, n_rows, _RAGGED, tokens
        target[written] = _NEWLINE
        written += _ONE
        n_rows += 1
    return written, n_rows, _GOOD, 0


@numba.njit(cache=True, nogil=True)
def _is_control(byte: int) -> bool:
    return byte < _SPACE and byte not in (_TAB, _NEWLINE, _BELL)


@numba.njit(cache=True, nogil=True)
def _copy_plain(source, target, read, written):
    """Copy up to the next white space."""
    size = np.uint64(len(source))
    while read < size:
        byte = source[read]
        # One comparison for nearly every byte: this loop is most of the time.
        if byte <= _SPACE and byte != _BELL:
            return read, written, _CONTROL if _is_control(byte) else _GOOD
        target[written] = byte
        written += _ONE
        read += _ONE
    return read, written, _GOOD


@numba.njit(cache=True, nogil=True)
def _copy_quoted(source, target, read, written):
    """Copy what stands between a quote and the same quote before white space, without bell characters."""
    size = np.uint64(len(source))
    quote = source[read]
    read += _ONE
    while read < size and source[read] != _NEWLINE:
        byte = source[read]
        if byte == quote and source[read - _ONE] != _BELL:
            end = read + _ONE
            if end == size or source[end] in (_SPACE, _TAB, _NEWLINE):
                return end, written, _GOOD
        if _is_control(byte):
            return read, written, _CONTROL
        if byte != _BELL:
            target[written] = byte
            written += _ONE
        read += _ONE
    return read, written, _UNCLOSED
