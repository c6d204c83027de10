"""The compiled pass over the rows of a large STAR table."""

from __future__ import annotations

import numba
import numpy as np

_BELL, _HASH, _DOUBLE_QUOTE, _SINGLE_QUOTE = 7, 35, 34, 39
_SEPARATOR, _LINE_END = 31, 10
_GOOD, _RAGGED, _UNCLOSED, _CONTROL = 0, 1, 2, 3

# What a byte is, looked up: one test a byte instead of five.
_ORDINARY, _BLANK, _NEWLINE, _FORBIDDEN = 0, 1, 2, 3
_KIND = np.zeros(256, dtype=np.uint8)
_KIND[:32] = _FORBIDDEN
_KIND[127] = _FORBIDDEN
_KIND[[9, 32]] = _BLANK
_KIND[10] = _NEWLINE
_KIND[_BELL] = _ORDINARY


@numba.njit(cache=True, nogil=True)
def split(source: np.ndarray, target: np.ndarray, n_columns: int) -> tuple[int, int, int, int]:
    """Copy tokens from `source` to `target`; see `halfmap.io.star_rows.row_chunks` for the rules.

    Returns
    -------
    tuple of int
        Bytes written, rows, status and, for a ragged row, its number of values.
    """
    size = len(source)
    read = 0
    written = 0
    n_rows = 0
    while read < size:
        tokens = 0
        while True:
            while read < size and _KIND[source[read]] == _BLANK:
                read += 1
            if read == size or _KIND[source[read]] == _NEWLINE:
                break
            if source[read] == _HASH:
                while read < size and _KIND[source[read]] != _NEWLINE:
                    if _KIND[source[read]] == _FORBIDDEN:
                        return 0, n_rows, _CONTROL, 0
                    read += 1
                break
            if tokens > 0:
                target[written] = _SEPARATOR
                written += 1
            tokens += 1
            if source[read] in (_DOUBLE_QUOTE, _SINGLE_QUOTE):
                read, written, status = _copy_quoted(source, target, read, written)
            else:
                read, written, status = _copy_plain(source, target, read, written)
            if status != _GOOD:
                return 0, n_rows, status, 0
        read += 1
        if tokens == 0:
            continue
        if n_columns == 2 and tokens == 1:
            target[written] = _SEPARATOR
            written += 1
        elif tokens != n_columns:
            return 0, n_rows, _RAGGED, tokens
        target[written] = _LINE_END
        written += 1
        n_rows += 1
    return written, n_rows, _GOOD, 0


@numba.njit(cache=True, nogil=True)
def _copy_plain(source, target, read, written):
    """Copy up to the next white space."""
    while read < len(source):
        byte = source[read]
        kind = _KIND[byte]
        if kind != _ORDINARY:
            return read, written, _CONTROL if kind == _FORBIDDEN else _GOOD
        target[written] = byte
        written += 1
        read += 1
    return read, written, _GOOD


@numba.njit(cache=True, nogil=True)
def _copy_quoted(source, target, read, written):
    """Copy what stands between a quote and the same quote before white space, without bell characters."""
    quote = source[read]
    read += 1
    while read < len(source) and source[read] != _LINE_END:
        byte = source[read]
        if byte == quote and source[read - 1] != _BELL:
            end = read + 1
            if end == len(source) or _KIND[source[end]] in (_BLANK, _NEWLINE):
                return end, written, _GOOD
        if _KIND[byte] == _FORBIDDEN:
            return read, written, _CONTROL
        if byte != _BELL:
            target[written] = byte
            written += 1
        read += 1
    return read, written, _UNCLOSED
