"""Rows of a STAR table as bytes that a CSV parser reads: tokens apart by one separator, one row a line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np

from halfmap.errors import FileFormatError, TableError
from halfmap.ops.cores import usable_cores

SEPARATOR = "\x1f"
"""Unit separator: it may not occur in a STAR file, so tokens need no quotes."""

CHUNK_BYTES = 8 * 2**20
"""Larger tables go through the compiled loop, this much at a time, so that the copies stay in the cache and
memory stays bounded; for smaller ones importing Numba costs more than it saves."""

_WORKERS = 4  # threads of the compiled loop, which needs no lock

_GOOD, _RAGGED, _UNCLOSED, _CONTROL = range(4)
_CONTROL_CHARACTERS = bytes(c for c in range(32) if c not in b"\a\t\n")
_SPECIAL = re.compile(rb"[\"'#]")


def split_line(line: bytes) -> list[bytes]:
    r"""Tokens of one line: quotes removed, a comment (a token that starts with #) dropped.

    A quote closes where white space or the end of the line follows. RELION marks a quote inside a quoted
    string with a bell character before it (``\a``), which is removed.

    Raises
    ------
    ValueError
        If a quote is not closed.
    """
    tokens = []
    position = 0
    while True:
        while position < len(line) and line[position] in b" \t":
            position += 1
        if position == len(line) or line[position] == ord("#"):
            return tokens
        if line[position] in b"\"'":
            end = _closing_quote(line, position)
            tokens.append(line[position + 1 : end].replace(b"\a", b""))
            position = end + 1
        else:
            end = position
            while end < len(line) and line[end] not in b" \t":
                end += 1
            tokens.append(line[position:end])
            position = end


def _closing_quote(line: bytes, start: int) -> int:
    quote = line[start : start + 1]
    end = line.find(quote, start + 1)
    while end != -1:
        if line[end + 1 : end + 2] in (b"", b" ", b"\t") and line[end - 1 : end] != b"\a":
            return end
        end = line.find(quote, end + 1)
    raise ValueError("a quote is not closed")


def has_control_character(data: bytes) -> bool:
    """Whether there is a byte that no text file holds."""
    return len(data.translate(None, _CONTROL_CHARACTERS)) != len(data)


def next_header(data: bytes, start: int, stop: int) -> int:
    """Where the line of the next ``data_`` header begins, -1 if there is none before `stop`.

    A header is alone on its line: a row may well begin with a file called ``data_something``.
    """
    position = data.find(b"data_", start, stop)
    while position != -1:
        # Most of what is found stands within a name.
        if position > 0 and data[position - 1] not in b"\n \t":
            position = data.find(b"data_", position + 5, stop)
            continue
        line_start = data.rfind(b"\n", 0, position) + 1
        line_end = data.find(b"\n", position)
        line_end = len(data) if line_end == -1 else line_end
        if is_header(data[line_start:line_end]):
            return line_start
        position = data.find(b"data_", line_end, stop)
    return -1


def is_header(line: bytes) -> bool:
    """Whether a line holds a ``data_`` name and at most a comment."""
    tokens = line.split(maxsplit=2)
    return (
        bool(tokens) and tokens[0].startswith(b"data_") and (len(tokens) == 1 or tokens[1].startswith(b"#"))
    )


def row_chunks(
    data: bytes, start: int, *, n_columns: int, path: Path, table: str
) -> Iterator[tuple[bytes, int, int]]:
    """Rows of a table, tokens apart by `SEPARATOR`, in chunks.

    Blank lines and comments are skipped. In a table of two columns the second value may be missing, as
    RELION before version 4 wrote empty ones; it becomes an empty token.

    Yields
    ------
    tuple
        Bytes, number of rows, and the position in `data` behind them; that of the last one is where the next
        block or the end of the file is.

    Raises
    ------
    TableError
        If a row has too few or too many values or a quote that is not closed.
    FileFormatError
        If there are control characters: not a text file.
    """
    n_before = 0
    for chunk, end in _chunks(data, start, n_columns):
        rows, n_rows, status, found = chunk
        row = n_before + n_rows + 1
        if status == _CONTROL:
            raise FileFormatError(
                f"control characters in table {table!r}", path=path, hint="is it a STAR file?"
            )
        if status == _UNCLOSED:
            raise TableError(f"a quote is not closed in table {table!r}", path=path, row=row)
        if status == _RAGGED:
            raise TableError(
                f"{found} values for the {n_columns} columns of table {table!r}",
                path=path,
                row=row,
                hint="mend the row, or quote values that hold spaces",
            )
        yield rows, n_rows, end
        n_before += n_rows


_Chunk = tuple[bytes, int, int, int]
"""Rows, their number, status and, for a ragged row, its number of values."""


def _chunks(data: bytes, start: int, n_columns: int) -> Iterator[tuple[_Chunk, int]]:
    size = len(data)
    stop = next_header(data, start, min(start + CHUNK_BYTES, size))
    if stop != -1 or size - start <= CHUNK_BYTES:
        stop = size if stop == -1 else stop
        yield _split_python(data[start:stop], n_columns), stop
        return
    if n_columns <= 2:
        # A header could be taken for a row; wider tables need no search through the whole file.
        stop = next_header(data, start, size)
    workers = min(_WORKERS, usable_cores())
    bounds = _bounds(data, start, size if stop == -1 else stop)
    with ThreadPoolExecutor(workers) as pool:
        while some := list(islice(bounds, workers)):
            splits = pool.map(lambda bound: _split_compiled(data, bound[0], bound[1], n_columns), some)
            for (begin, end), (chunk, row_start) in zip(some, splits, strict=True):
                header = begin + row_start
                if chunk[2] == _RAGGED and is_header(data[header : data.find(b"\n", header) + 1 or size]):
                    yield _split_compiled(data, begin, header, n_columns)[0], header
                    return
                yield chunk, end


def _bounds(data: bytes, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Beginnings and ends of chunks of whole lines."""
    while start < stop:
        end = data.rfind(b"\n", start, min(start + CHUNK_BYTES, stop)) + 1
        if end == 0:
            end = data.find(b"\n", start, stop) + 1 or stop
        yield start, end
        start = end


def _split_python(body: bytes, n_columns: int) -> _Chunk:
    """Split rows by a plain loop over lines."""
    if has_control_character(body):
        return b"", 0, _CONTROL, 0
    plain = _SPECIAL.search(body) is None
    separator = SEPARATOR.encode()
    rows = []
    for line in body.split(b"\n"):
        if plain or _SPECIAL.search(line) is None:
            tokens = line.split()
        else:
            try:
                tokens = split_line(line)
            except ValueError:
                return b"", len(rows), _UNCLOSED, 0
        if not tokens:
            continue
        if n_columns == 2 and len(tokens) == 1:
            tokens.append(b"")
        if len(tokens) != n_columns:
            return b"", len(rows), _RAGGED, len(tokens)
        rows.append(separator.join(tokens))
    rows.append(b"")
    return b"\n".join(rows), len(rows) - 1, _GOOD, 0


def _split_compiled(data: bytes, start: int, stop: int, n_columns: int) -> tuple[_Chunk, int]:
    """Do the same in one compiled pass over the bytes; also, where a ragged row begins after `start`."""
    from halfmap.io.star_kernel import split

    source = np.frombuffer(data, dtype=np.uint8)[start:stop]
    # Tokens never grow, but "a\n" becomes three bytes where a second value is missing.
    target = np.empty(len(source) + (len(source) // 2 if n_columns == 2 else 0) + 2, dtype=np.uint8)
    length, n_rows, status, found = split(source, target, n_columns)
    if status != _GOOD:
        return (b"", n_rows, status, found), int(length)
    return (target[: int(length)].tobytes(), n_rows, status, 0), 0
