"""STAR files of RELION 3.0 to 5, read and written without loss and fast enough for millions of rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import IO

import polars as pl

from halfmap import __version__
from halfmap.data.columns import COLUMNS
from halfmap.errors import FileFormatError, TableError
from halfmap.io.atomic import atomic_path
from halfmap.io.star_rows import (
    SEPARATOR,
    has_control_character,
    is_header,
    next_header,
    row_chunks,
    split_line,
)
from halfmap.io.star_values import convert, format_column, format_value

Value = str | int | float | bool
"""Value of a key in a block without rows."""

Block = pl.DataFrame | Mapping[str, Value]
"""What stands under one ``data_`` name: rows, or key-value pairs."""

RELION_VERSION = 30001
"""Version tag written before every block: optics groups, understood by RELION 3.1 and later."""

_READ_DTYPES: dict[type, type[pl.DataType]] = {
    str: pl.String,
    int: pl.Int64,
    float: pl.Float64,
    bool: pl.Int64,
}


def read_star(path: str | Path) -> dict[str, pl.DataFrame | dict[str, Value]]:
    r"""Read every block of a STAR file.

    Columns that Halfmap knows (`halfmap.data.columns`) have the type stated there. Of others, numbers are
    read as numbers only where nothing is lost: no leading zeros, no plus sign, no more than 17 digits, a
    decimal point where there is an exponent; a column with any other value is text. ``nan`` is read as NaN;
    who needs a number (a pixel size, a defocus) refuses it.

    Parameters
    ----------
    path : path
        STAR 3.0, 3.1, 4 or 5; line ends of any kind.

    Returns
    -------
    dict
        By block name without ``data_``: a DataFrame for a loop, its labels without the leading underscore,
        or a dict for key-value pairs.

    Raises
    ------
    FileFormatError
        If the file cannot be read, is not text, or its blocks are not STAR.
    TableError
        If a row is short or long, a label or block name comes twice, or a value is of the wrong type.

    Notes
    -----
    The grammar is RELION's: one row a line, quoted strings (single or double), no text fields between
    semicolons. Two blocks of one name are an error, where RELION would silently take the first. Blank
    lines within rows are skipped, where RELION would stop. Rows are split by one pass over the bytes and
    parsed by polars.
    """
    path = Path(path)
    return parse_star(_load(path), path)


def parse_star(data: bytes, path: Path) -> dict[str, pl.DataFrame | dict[str, Value]]:
    """Every block of a STAR file's content with line feeds at the ends of lines; as `read_star`.

    Parameters
    ----------
    data : bytes
        The content.
    path : Path
        For messages.
    """
    try:
        return _read_blocks(data, path)
    except (UnicodeDecodeError, pl.exceptions.PolarsError) as error:
        raise _not_text(data, path) from error


def write_star(
    path: str | Path, blocks: Mapping[str, Block], *, comment: str | None = None, durable: bool = True
) -> None:
    r"""Write blocks as STAR 3.1, whole or not at all; `read_star` gives them back equal.

    Floats are written with as many digits as they need to be read back the same, NaN as ``nan``, booleans
    as 0 and 1, strings in double quotes where they are empty, hold white space or could be taken for
    something else. A missing (null) float is written as ``nan``, a missing string as ``""``.

    Parameters
    ----------
    path : path
        File to write.
    blocks : mapping
        By block name without ``data_``: a DataFrame, or a mapping of keys to values.
    comment : str, optional
        Lines to put on top.
    durable : bool
        As of `halfmap.io.atomic.atomic_path`.

    Raises
    ------
    TableError
        If a name, a label, a type or a value cannot be written.

    Notes
    -----
    RELION never writes a table without rows and cannot read one that another block follows; leave such a
    table out of files that RELION is to read.
    """
    path = Path(path)
    lines = [f"Written by Halfmap {__version__}", *(comment or "").splitlines()]
    with atomic_path(path, durable=durable) as temporary, temporary.open("wb") as file:
        file.write("".join(f"# {line}\n" for line in lines).encode())
        for name, block in blocks.items():
            _check_name(name, f"block name {name!r}", path)
            file.write(f"\n# version {RELION_VERSION}\n\ndata_{name}\n\n".encode())
            if isinstance(block, pl.DataFrame):
                _write_loop(file, block, path)
            else:
                _write_pairs(file, block, path)
            file.write(b"\n")


def _load(path: Path) -> bytes:
    """All bytes, without byte order mark, with line ends of one kind."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FileFormatError(
            f"cannot be read ({error.strerror or error})", path=path, hint="check the path"
        ) from error
    data = data.removeprefix(b"\xef\xbb\xbf")
    return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in data else data


def _not_text(data: bytes, path: Path) -> FileFormatError:
    try:
        data.decode()
        where = "a value"
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        where = f"line {line}"
    return FileFormatError(f"{where} is not UTF-8 text", path=path, hint="is it a STAR file?")


def _read_blocks(data: bytes, path: Path) -> dict[str, pl.DataFrame | dict[str, Value]]:
    blocks: dict[str, pl.DataFrame | dict[str, Value]] = {}
    header = next_header(data, 0, len(data))
    if header == -1:
        raise FileFormatError("no data_ block", path=path, hint="is it a STAR file?")
    if any(line.strip() and not line.lstrip().startswith(b"#") for line in data[:header].split(b"\n")):
        raise FileFormatError("text before the first data_ block", path=path, hint="is it a STAR file?")
    while header < len(data):
        end = _line_end(data, header)
        name = data[header:end].split()[0][len(b"data_") :].decode()
        if name in blocks:
            raise TableError(f"block data_{name} comes twice", path=path, hint="rename or remove one of them")
        blocks[name], header = _read_block(data, end + 1, name, path)
    return blocks


def _line_end(data: bytes, position: int) -> int:
    end = data.find(b"\n", position)
    return len(data) if end == -1 else end


def _read_block(
    data: bytes, position: int, name: str, path: Path
) -> tuple[pl.DataFrame | dict[str, Value], int]:
    """Content of a block and the position of the next one."""
    pairs: dict[str, Value] = {}
    while position < len(data):
        end = _line_end(data, position)
        line = data[position:end].strip(b" \t")
        if is_header(line):
            break
        if line.split(maxsplit=1)[:1] == [b"loop_"]:
            if pairs:
                raise FileFormatError(
                    f"block data_{name} holds both keys and a loop", path=path, hint="split it in two blocks"
                )
            return _read_loop(data, end + 1, name, path)
        if line.startswith(b"_"):
            label, value = _read_pair(line, len(pairs) + 1, name, path)
            if label in pairs:
                raise TableError(f"_{label} comes twice in block data_{name}", path=path)
            pairs[label] = value
        elif line and not line.startswith(b"#"):
            number = data.count(b"\n", 0, position) + 1
            raise FileFormatError(
                f"line {number} in block data_{name} is neither a label nor loop_", path=path
            )
        position = end + 1
    return pairs, position


def _read_pair(line: bytes, row: int, name: str, path: Path) -> tuple[str, Value]:
    try:
        if has_control_character(line):
            raise ValueError("control characters")
        tokens = split_line(line)
        if len(tokens) != 2:
            raise ValueError(f"{len(tokens) - 1} values where one belongs")
    except ValueError as error:
        label = line.split()[0].decode()
        raise TableError(f"{label} of block data_{name}: {error}", path=path, row=row) from None
    label = _label(tokens[0], path)
    return label, convert(pl.Series(label, [tokens[1].decode()]), path=path, row=row).item()


def _label(token: bytes, path: Path) -> str:
    label = token.split(b"#")[0][1:].decode()
    _check_name(label, f"label {token.decode()!r}", path)
    return label


def _check_name(name: str, what: str, path: Path) -> None:
    # A block may have no name: RELION 3.0 wrote data_ alone.
    empty = not name and what.startswith("label")
    if empty or "#" in name or not name.isprintable() or name.split() not in ([name], []) or name[:1] == "_":
        raise TableError(f"{what} cannot be one", path=path)


def _read_loop(data: bytes, position: int, name: str, path: Path) -> tuple[pl.DataFrame, int]:
    """Rows of a loop and the position of the next block."""
    labels, position = _read_labels(data, position, name, path)
    if not labels:
        if position < len(data) and not is_header(data[position : _line_end(data, position)]):
            raise TableError(f"rows without labels in block data_{name}", path=path)
        return pl.DataFrame(), position
    frames = []
    n_before = 0
    for rows, n_rows, end in row_chunks(data, position, n_columns=len(labels), path=path, table=name):
        position = end
        if n_rows:
            frames.append(_parse_rows(rows, labels, n_before, path))
            n_before += n_rows
    if not frames:
        known = {label: COLUMNS[label].dtype for label in labels if label in COLUMNS}
        return pl.DataFrame(schema={label: known.get(label, str) for label in labels}), position
    columns = [
        series if series.name in COLUMNS else convert(series, path=path) for series in pl.concat(frames)
    ]
    return pl.DataFrame(columns), position


def _read_labels(data: bytes, position: int, name: str, path: Path) -> tuple[list[str], int]:
    """Labels of a loop and the position of its first row."""
    labels: list[str] = []
    while position < len(data):
        end = _line_end(data, position)
        line = data[position:end].strip(b" \t")
        if line.startswith(b"_"):
            first, *rest = line.split(maxsplit=1)
            if rest and not rest[0].startswith(b"#"):
                raise TableError(f"text after label {first.decode()} of block data_{name}", path=path)
            labels.append(_label(first, path))
        elif line and not line.startswith(b"#"):
            break
        position = end + 1
    for index, label in enumerate(labels):
        if labels.index(label) < index:
            raise TableError(f"_{label} comes twice in block data_{name}", path=path)
    return labels, position


def _parse_rows(rows: bytes, labels: list[str], n_before: int, path: Path) -> pl.DataFrame:
    """Rows as a frame: known columns of their type, others as text."""
    if len(labels) == 1:
        # A lone empty string is a blank line, which a CSV parser would skip.
        texts = pl.DataFrame({labels[0]: rows.decode().split("\n")[:-1]})
        return pl.DataFrame([_known(series, n_before, path) for series in texts])
    schema = {
        label: _READ_DTYPES[COLUMNS[label].dtype] if label in COLUMNS else pl.String for label in labels
    }
    try:
        frame = _parse_csv(rows, schema)
    except pl.exceptions.PolarsError:
        frame = _parse_csv(rows, dict.fromkeys(labels, pl.String))
    return pl.DataFrame([_known(series, n_before, path) for series in frame])


def _parse_csv(rows: bytes, schema: Mapping[str, type[pl.DataType]]) -> pl.DataFrame:
    return pl.read_csv(rows, has_header=False, separator=SEPARATOR, quote_char=None, schema=schema)


def _known(series: pl.Series, n_before: int, path: Path) -> pl.Series:
    if series.dtype == pl.String:
        series = series.fill_null("")
    return convert(series, path=path, row=n_before + 1) if series.name in COLUMNS else series


def _write_loop(file: IO[bytes], frame: pl.DataFrame, path: Path) -> None:
    for label in frame.columns:
        _check_name(label, f"label {label!r}", path)
    header = "".join(f"_{label} #{number} \n" for number, label in enumerate(frame.columns, start=1))
    file.write(f"loop_ \n{header}".encode())
    if frame.height:
        texts = pl.DataFrame([format_column(series, path=path) for series in frame])
        file.flush()
        texts.write_csv(file, include_header=False, separator=" ", quote_style="never")


def _write_pairs(file: IO[bytes], pairs: Mapping[str, Value], path: Path) -> None:
    width = max(map(len, pairs), default=0)
    for label, value in pairs.items():
        _check_name(label, f"label {label!r}", path)
        file.write(f"_{label:<{width}} {format_value(label, value, path=path)}\n".encode())
