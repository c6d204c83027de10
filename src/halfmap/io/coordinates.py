"""Read and write particle coordinates: STAR, EMAN `.box`, Topaz `.txt` and `.csv`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from halfmap.errors import FileFormatError, HalfmapError, ParameterError, TableError
from halfmap.io.atomic import write_text
from halfmap.io.binary import opened
from halfmap.io.star import parse_star, read_star, write_star

MICROGRAPH, X, Y, FOM = "rlnMicrographName", "rlnCoordinateX", "rlnCoordinateY", "rlnAutopickFigureOfMerit"
SUFFIXES = (".star", ".box", ".txt", ".csv")

_MEND = "mend or drop the row"

# Names of columns in the tables of pickers, in lower case.
_NAMES = {
    MICROGRAPH: ("image_name", "micrograph", "micrograph_name", "image", "filename", "rlnmicrographname"),
    X: ("x_coord", "x", "x_px", "coordinate_x", "rlncoordinatex"),
    Y: ("y_coord", "y", "y_px", "coordinate_y", "rlncoordinatey"),
    FOM: ("score", "confidence", "fom", "rlnautopickfigureofmerit"),
}


def read_coordinates(path: str | Path, *, scale: float = 1.0) -> pl.DataFrame:
    """Read where particles are, whatever program wrote it.

    Parameters
    ----------
    path : path
        By its suffix: `.star` of RELION or Topaz; `.box` of EMAN (corner and size of a box: its centre is
        taken); `.txt` or `.csv` of Topaz and others: a header that names the columns, tabs or commas
        between them, or two to four columns without a header: [micrograph,] x, y[, score].
    scale : float
        Factor from the file's pixels to the micrograph's. Topaz picks in down-sampled pixels: for
        micrographs it was given at an eighth of their size the scale is 8.

    Returns
    -------
    DataFrame
        rlnCoordinateX, rlnCoordinateY (float64, pixels of the micrograph from its first stored pixel) and,
        where the file has them, rlnMicrographName, rlnAutopickFigureOfMerit and a STAR file's other columns.

    Raises
    ------
    FileFormatError
        If the file cannot be read or its suffix is none of these.
    TableError
        If there are no columns of coordinates, or a row's are not numbers; names the row.
    ParameterError
        If the scale is not a positive number.
    """
    path = Path(path)
    if not (math.isfinite(scale) and scale > 0):
        raise ParameterError(f"the scale of coordinates {scale} is not a positive number")
    readers = {".star": _read_star, ".box": _read_box, ".txt": _read_delimited, ".csv": _read_delimited}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(SUFFIXES)
        raise FileFormatError("is no coordinate file by its name", path=path, hint=f"they end in {known}")
    table = reader(path)
    for name in (X, Y):
        # A header is the first row; a user counts rows of data.
        bad = table.select((~pl.col(name).is_finite().fill_null(False)).arg_true()).to_series()
        if len(bad):
            raise _no_number(path, bad[0] + 1, f"_{name}", table[name][bad[0]])
    return table.with_columns(pl.col(X, Y) * scale)


@dataclass(frozen=True, eq=False)
class Joined:
    """Rows of many files of coordinates, and which file each is of, as a number from 0."""

    rows: pl.DataFrame
    file: NDArray[np.int64]


def read_many_coordinates(paths: Sequence[Path]) -> tuple[list[Joined], dict[int, HalfmapError]]:
    """Read many files of coordinates at once; STAR files with the same columns are parsed as one.

    A thousand tables of some hundred rows take a hundredth of the time that they take one by one.

    Parameters
    ----------
    paths : sequence of Path
        As of `read_coordinates`.

    Returns
    -------
    list of Joined
        A table for each set of columns; files without rows are in none.
    dict of int to HalfmapError
        What is wrong with files that cannot be read, by their numbers.
    """
    alike: dict[bytes, list[tuple[int, bytes, int]]] = {}
    found, errors, others = list[Joined](), dict[int, HalfmapError](), list[int]()
    for number, path in enumerate(paths):
        parts = _head_and_rows(path)
        if parts is None:
            others.append(number)
        elif parts[1]:
            alike.setdefault(parts[0], []).append((number, *parts[1:]))
    for head, files in alike.items():
        numbers, texts, counts = zip(*files, strict=True)
        rows = _parsed(head + b"".join(texts), paths[numbers[0]])
        if rows is None or len(rows) != sum(counts):
            others += numbers
        else:
            found.append(Joined(rows, np.repeat(np.array(numbers, np.int64), counts)))
    for number in sorted(others):
        try:
            rows = read_coordinates(paths[number])
        except HalfmapError as error:
            errors[number] = error
            continue
        if len(rows):
            found.append(Joined(rows, np.full(len(rows), number)))
    return found, errors


def _head_and_rows(path: Path) -> tuple[bytes, bytes, int] | None:
    """A STAR file of one plain loop in two, up to its last label and behind, and how many rows; else None."""
    if path.suffix.lower() != ".star":
        return None
    try:
        data = path.read_bytes().replace(b"\r\n", b"\n")
    except OSError:
        return None  # as reading it by itself says
    last = data.rfind(b"\n_")
    end = data.find(b"\n", last + 1) + 1
    if last < 0 or end == 0 or data.count(b"data_") != 1:
        return None
    rows = data[end:].strip()
    return data[:end], rows + b"\n" if rows else b"", rows.count(b"\n") + 1


def _parsed(data: bytes, path: Path) -> pl.DataFrame | None:
    """Coordinates of such files together; None where something is wrong with one of them."""
    try:
        table = next(iter(parse_star(data, path).values()))
    except HalfmapError:
        return None
    if not isinstance(table, pl.DataFrame) or not {X, Y} <= set(table.columns):
        return None
    table = table.with_columns(pl.col(X, Y).cast(pl.Float64, strict=False))
    finite = table.select((pl.col(X).is_finite() & pl.col(Y).is_finite()).fill_null(False).all())
    return table if finite.item() else None


def _no_number(path: Path, row: int, name: str, value: object) -> TableError:
    return TableError(f"{name} is {value!r}, not a number", path=path, row=row, hint=_MEND)


def _read_star(path: Path) -> pl.DataFrame:
    try:
        blocks = read_star(path)
    except TableError as error:
        if error.row is None or error.hint:
            raise
        raise TableError(error.message, path=path, row=error.row, hint=_MEND) from error
    tables = [block for block in blocks.values() if isinstance(block, pl.DataFrame)]
    for table in tables:
        if X in table.columns and Y in table.columns:
            return table.with_columns(pl.col(X, Y).cast(pl.Float64, strict=False))
    raise TableError(
        "has no columns rlnCoordinateX and rlnCoordinateY", path=path, hint="is it a table of picks?"
    )


def _lines(path: Path) -> list[str]:
    with opened(path) as stream:
        data = stream.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileFormatError("is not text", path=path, hint="give a table of coordinates") from error
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _read_box(path: Path) -> pl.DataFrame:
    rows = []
    for number, line in enumerate(_lines(path), start=1):
        values = [_number(word) for word in line.replace(",", " ").split()[:4]]
        if len(values) < 4 or None in values:
            raise TableError(
                "is not x, y and two sizes", path=path, row=number, hint="write x y width height"
            )
        x, y, width, height = (value or 0.0 for value in values)
        rows.append((x + width / 2, y + height / 2))
    return pl.DataFrame(rows, schema={X: pl.Float64, Y: pl.Float64}, orient="row")


def _read_delimited(path: Path) -> pl.DataFrame:
    lines = _lines(path)
    if not lines:
        return pl.DataFrame(schema={X: pl.Float64, Y: pl.Float64})
    separator = next((mark for mark in ("\t", ",", ";") if mark in lines[0]), None)
    rows = [[word.strip() for word in line.split(separator)] for line in lines]
    width = len(rows[0])
    wrong = next((number for number, row in enumerate(rows) if len(row) != width), None)
    places, data = _columns(path, rows)
    if wrong is not None:
        row = wrong + 1 - (len(rows) - len(data))
        message = f"has {len(rows[wrong])} columns, the others {width}"
        raise TableError(message, path=path, row=row, hint=_MEND)
    columns = {name: [row[place] for row in data] for name, place in places.items()}
    for name, word in ((X, "x"), (Y, "y")):
        for row, value in enumerate(columns[name], start=1):
            number = _number(value)
            if number is None or not math.isfinite(number):
                raise _no_number(path, row, word, value)
    table = pl.DataFrame(columns, schema=dict.fromkeys(columns, pl.String))
    return table.with_columns(pl.exclude(MICROGRAPH).cast(pl.Float64, strict=False))


def _columns(path: Path, rows: list[list[str]]) -> tuple[dict[str, int], list[list[str]]]:
    """Place of each column, by a header or by convention, and the rows below the header."""
    first = rows[0]
    if any(_number(word) is not None for word in first):
        has_name = _number(first[0]) is None
        order = [MICROGRAPH, X, Y, FOM] if has_name else [X, Y, FOM]
        if not len(order) - 1 <= len(first) <= len(order):
            message = f"has {len(first)} columns without a header"
            raise TableError(message, path=path, hint="name the columns in a first line, such as x,y,score")
        return dict(zip(order, range(len(first)), strict=False)), rows
    header = [word.strip("\"' ").lower() for word in first]
    places = {}
    for name, known in _NAMES.items():
        place = next((header.index(word) for word in known if word in header), None)
        if place is not None:
            places[name] = place
    if X not in places or Y not in places:
        raise TableError("has no columns x and y", path=path, hint=f"its columns are {', '.join(first)}")
    return places, rows[1:]


def write_coordinates(
    path: str | Path,
    table: pl.DataFrame,
    *,
    scale: float = 1.0,
    box_size: int | None = None,
    durable: bool = True,
) -> None:
    """Write coordinates for another program, whole or not at all.

    Parameters
    ----------
    path : path
        Format by its suffix: `.star` (all columns), `.box` (corners, needs `box_size`), `.txt` (Topaz, needs
        rlnMicrographName) or `.csv`.
    table : DataFrame
        As `read_coordinates` gives it.
    scale : float
        Factor from the micrograph's pixels to the file's, the inverse of that on reading.
    box_size : int, optional
        Side of EMAN's boxes in the file's pixels.
    durable : bool
        As of `halfmap.io.atomic.atomic_path`.

    Raises
    ------
    TableError
        If the table lacks the coordinates, or Topaz's micrograph names.
    ParameterError
        If the scale is not a positive number, or a `.box` has no box size.
    FileFormatError
        If the suffix is none of these.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    missing = [name for name in (X, Y) if name not in table.columns]
    if suffix == ".txt" and MICROGRAPH not in table.columns:
        missing.append(MICROGRAPH)
    if missing:
        raise TableError(f"lacks {', '.join(missing)}", path=path)
    if not (math.isfinite(scale) and scale > 0):
        raise ParameterError(f"the scale of coordinates {scale} is not a positive number")
    table = table.with_columns(pl.col(X, Y).cast(pl.Float64) * scale)
    if suffix == ".star":
        write_star(path, {"": table}, durable=durable)
    elif suffix == ".box":
        if box_size is None or box_size < 1:
            raise ParameterError(
                "a .box file needs the boxes' size", path=path, hint="give a box size in pixels"
            )
        corners = table.select(pl.col(X, Y) - box_size / 2)
        lines = [f"{x:.2f}\t{y:.2f}\t{box_size}\t{box_size}\n" for x, y in corners.iter_rows()]
        write_text(path, "".join(lines), durable=durable)
    elif suffix in (".txt", ".csv"):
        names = {MICROGRAPH: "image_name", X: "x_coord", Y: "y_coord", FOM: "score"}
        chosen = [name for name in names if name in table.columns]
        renamed = table.select(chosen).rename({name: names[name] for name in chosen})
        text = renamed.write_csv(separator="\t" if suffix == ".txt" else ",")
        write_text(path, text, durable=durable)
    else:
        known = ", ".join(SUFFIXES)
        raise FileFormatError("is no coordinate file by its name", path=path, hint=f"they end in {known}")
