"""What is in a table, in one screen: STAR and cryoSPARC files, coordinates."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from halfmap.data import MicrographSet, MovieSet, ParticleSet, TableSet
from halfmap.data.columns import COLUMNS
from halfmap.errors import FileFormatError, TableError
from halfmap.io.info import facts, warning
from halfmap.io.star import read_star

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

PREVIEW_ROWS, PREVIEW_COLUMNS, NAME_LENGTH = 5, 6, 30

_IMPORTANT = (
    "rlnImageName",
    "rlnMicrographMovieName",
    "rlnMicrographName",
    "rlnCoordinateX",
    "rlnCoordinateY",
    "rlnDefocusU",
    "rlnAngleRot",
    "rlnAngleTilt",
    "rlnAnglePsi",
    "rlnOriginXAngst",
    "rlnClassNumber",
    "rlnRandomSubset",
    "rlnImageSizeZ",
)
"""Columns worth a look, first those that are shown when space is short."""

_QUALITY = (
    "rlnCtfAstigmatism",
    "rlnPhaseShift",
    "rlnCtfMaxResolution",
    "rlnCtfFigureOfMerit",
    "rlnCtfIceRingDensity",
    "rlnMicrographTiltAngle",
    "rlnAccumMotionTotal",
    "rlnAccumMotionEarly",
    "rlnAccumMotionLate",
    "rlnAutopickFigureOfMerit",
    "rlnMaxValueProbDistribution",
)
"""RELION's columns that tell good items from bad; of ours all that are numbers do, but those below."""

_NO_QUALITY = ("hmMicrographHeight", "hmMicrographWidth", "hmContrastSign", "hmFlippedY", "hmSignalScale")

_OPTICS = {
    "rlnOpticsGroupName": "optics group",
    "rlnVoltage": "kV",
    "rlnSphericalAberration": "Cs mm",
    "rlnAmplitudeContrast": "amp. contrast",
    "rlnMicrographOriginalPixelSize": "movie Å/px",
    "rlnMicrographPixelSize": "micrograph Å/px",
    "rlnImagePixelSize": "particle Å/px",
    "rlnImageSize": "box px",
    "rlnMicrographDoseRate": "e/Å² a frame",
}


def describe_star(path: Path) -> list[RenderableType]:
    """Describe a STAR file: its blocks, and of movies, micrographs and particles what matters.

    Raises
    ------
    FileFormatError, TableError
        If the file cannot be parsed.
    """
    blocks = read_star(path)
    parts: list[RenderableType] = [_blocks(blocks)]
    kinds = _kinds(blocks)
    for kind in kinds:
        try:
            table = _read(path, kind)
        except TableError as error:
            parts += ["", warning(f"cannot be used as {kind.items}: {error.message}")]
        else:
            parts += describe_set(table)
    if not kinds:
        loops = {name: block for name, block in blocks.items() if isinstance(block, pl.DataFrame)}
        pairs = {name: block for name, block in blocks.items() if isinstance(block, dict)}
        for block in list(pairs.values())[:1]:
            parts += ["", facts(list(block.items())[:12])]
        if loops:
            name = max(loops, key=lambda key: loops[key].height)
            parts += ["", _preview(loops[name], f"first rows of data_{name}")]
    return parts


def describe_cs(path: Path) -> list[RenderableType]:
    """Describe a cryoSPARC file: its fields, and its particles or micrographs where it holds all they need.

    Raises
    ------
    FileFormatError
        If it is no such file.
    """
    import numpy as np

    from halfmap.io.cryosparc import read_cs

    try:
        table, problem = read_cs(path), None
    except TableError as error:
        table, problem = None, error
    records = np.load(path, allow_pickle=False, max_header_size=10_000_000)
    names = [name for name in records.dtype.names if "/" in name]
    groups = {name.split("/")[0]: 0 for name in names}
    for name in names:
        groups[name.split("/")[0]] += 1
    fields = ", ".join(f"{group} ({n})" for group, n in groups.items())
    parts: list[RenderableType] = [
        facts([("holds", f"cryoSPARC table of {len(records):,} items"), ("fields", fields)])
    ]
    if problem is not None:
        parts.append(warning(f"{problem.message}; {problem.hint}" if problem.hint else problem.message))
    return parts + (describe_set(table) if table is not None else [])


def describe_coordinates(path: Path) -> list[RenderableType]:
    """Describe a file of particle coordinates, or what else a text may hold: defects, a table, lines.

    Raises
    ------
    FileFormatError, TableError
        If it is no text, or coordinates with a mistake.
    """
    from halfmap.io.coordinates import read_coordinates

    try:
        table = read_coordinates(path)
    except TableError as error:
        # A row that is wrong is a mistake in coordinates; otherwise the columns are not theirs.
        if error.row is not None or path.suffix.lower() == ".box":
            raise
        return _describe_defects(path) or _describe_text(path)
    if table.is_empty():
        raise FileFormatError("holds no coordinates", path=path)
    rows: list[tuple[str, object]] = [("holds", f"{table.height:,} particle coordinates")]
    if "rlnMicrographName" in table.columns:
        rows.append(("micrographs", f"{table['rlnMicrographName'].n_unique():,}"))
    for label, name, unit in (
        ("rlnCoordinateX", "x", " px"),
        ("rlnCoordinateY", "y", " px"),
        ("rlnAutopickFigureOfMerit", "score", ""),
    ):
        if label in table.columns:
            rows.append((name, _range(table[label], unit)))
    return [facts(rows), "", _preview(table, "first rows")]


def _describe_defects(path: Path) -> list[RenderableType] | None:
    from halfmap.io.defects import read_rectangles

    try:
        rectangles = read_rectangles(path)
    except FileFormatError as error:
        return [facts([("holds", error.message.removeprefix("is "))])]
    except TableError:
        return None
    frame = pl.DataFrame([row[1:] for row in rectangles], schema=["x", "y", "width", "height"], orient="row")
    area = sum(w * h for *_, w, h in rectangles)
    rows = [("holds", f"{frame.height:,} rectangles of defective pixels"), ("pixels", f"{area:,} at most")]
    return [facts(rows), "", _preview(frame, "first rows")]


def _describe_text(path: Path) -> list[RenderableType]:
    lines = [line for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    data = [line for line in lines if not line.startswith("#")]
    mark = next((mark for mark in ("\t", ",", ";") if data and mark in data[0]), None)
    rows = [[word.strip("\"' ") for word in line.split(mark)] for line in data]
    widths = {len(row) for row in rows}
    # Sentences may have the same number of words; a table without commas or tabs has numbers.
    is_prose = mark is None and not any(char.isdigit() for line in data[1:] for char in line)
    if is_prose or len(rows) < 2 or len(widths) != 1 or widths == {1} or len(set(rows[0])) != len(rows[0]):
        first: list[tuple[str, object]] = [("", line[:100]) for line in lines[:PREVIEW_ROWS]]
        return [facts([("holds", f"text of {len(lines):,} lines, none that Halfmap knows"), *first])]
    frame = pl.DataFrame(rows[1:], schema=rows[0], orient="row")
    holds = f"table of {frame.height:,} rows × {frame.width} columns, not coordinates: no columns x and y"
    return [facts([("holds", holds)]), "", _preview(frame, "first rows")]


def _kinds(blocks: Mapping[str, object]) -> Sequence[type[TableSet]]:
    """Choose what the file's tables may be: by the names of blocks, in old files by their columns."""
    kinds: tuple[type[TableSet], ...] = (MovieSet, MicrographSet, ParticleSet)
    named = [kind for kind in kinds if isinstance(blocks.get(kind.block), pl.DataFrame)]
    if named:
        return named
    loops = [block for block in blocks.values() if isinstance(block, pl.DataFrame)]
    return [kind for kind in reversed(kinds) if any(kind.holds(loop.columns) for loop in loops)][:1]


def _read(path: Path, kind: type[TableSet]) -> TableSet:
    from halfmap.io.tables import read_micrographs, read_movies, read_particles

    readers = {MovieSet: read_movies, MicrographSet: read_micrographs, ParticleSet: read_particles}
    return readers[kind](path)


def describe_set(table: TableSet) -> list[RenderableType]:
    """Describe movies, micrographs or particles: optics groups, what the rows hold, the first of them."""
    quality = _quality(table.rows)
    return [
        *("", facts(_set_facts(table)), "", _optics(table)),
        *(["", quality] if quality else []),
        *("", _preview(table.rows.head(2) if quality else table.rows, "first rows")),
    ]


def _quality(rows: pl.DataFrame) -> Table | None:
    """Lay out smallest, middle and largest value of each column that tells good items from bad."""
    from rich.table import Table
    from rich.text import Text

    columns = [
        label
        for label, kind in rows.schema.items()
        if kind.is_numeric() and (label in _QUALITY or (label.startswith("hm") and label not in _NO_QUALITY))
    ]
    lines, missing = [], []
    for label in columns:
        values = rows[label].cast(pl.Float64).fill_nan(None)
        known = values.drop_nulls()
        unit = COLUMNS[label].unit if label in COLUMNS else "none"
        name = f"{label.removeprefix('rln')} [{unit}]" if unit != "none" else label.removeprefix("rln")
        figures = (known.min(), known.median(), known.max()) if len(known) else (None, None, None)
        lines.append([name, *(f"{x:,.4g}" if isinstance(x, float) else "–" for x in figures)])
        missing.append(values.null_count())
    if not lines:
        return None
    quality = Table(box=None, padding=(0, 2))
    quality.add_column(Text("quality", style="cyan"))
    for heading in ("min", "median", "max", *(["unknown"] if any(missing) else [])):
        quality.add_column(Text(heading, style="cyan"), justify="right")
    for line, count in zip(lines, missing, strict=True):
        quality.add_row(*map(Text, line), *([f"{count:,}" if count else ""] if any(missing) else []))
    return quality


def _set_facts(table: TableSet) -> list[tuple[str, object]]:
    rows, columns = table.rows, table.rows.columns
    pairs: list[tuple[str, object]] = [("holds", f"{len(table):,} {table.items}")]
    if "rlnMicrographName" in columns and isinstance(table, ParticleSet):
        pairs.append(("micrographs", f"{rows['rlnMicrographName'].n_unique():,}"))
    if "rlnImageName" in columns:
        files = rows["rlnImageName"].str.split("@").list.last().n_unique()
        pairs.append(("image stacks", f"{files:,}"))
    if {"rlnDefocusU", "rlnDefocusV"} <= set(columns):
        mean = (rows["rlnDefocusU"] + rows["rlnDefocusV"]) / 2
        pairs.append(("defocus", _range(mean, " Å")))
    elif table.items != "movies":
        pairs.append(("defocus", "not estimated"))
    if isinstance(table, ParticleSet):
        pairs.append(("poses", _poses(rows)))
    pairs.append(("classes", _counts(rows, "rlnClassNumber")))
    pairs.append(("half sets", _counts(rows, "rlnRandomSubset")))
    if "rlnImageSizeZ" in columns:
        pairs.append(("frames", _range(rows["rlnImageSizeZ"], "")))
    if "hmCtfProblem" in columns:
        pairs.append(("problems", _problems(rows["hmCtfProblem"])))
    pairs.append(
        ("columns", f"{len(columns)}: {', '.join(column.removeprefix('rln') for column in columns)}")
    )
    return pairs


def _poses(rows: pl.DataFrame) -> str:
    if "rlnAnglePsi" not in rows.columns:
        return "none"
    tilted = [label for label in ("rlnAngleRot", "rlnAngleTilt") if label in rows.columns]
    # 2D classification writes zeros.
    return "3D" if any((rows[label] != 0).any() for label in tilted) else "in the plane only"


def _counts(rows: pl.DataFrame, label: str) -> str | None:
    if label not in rows.columns:
        return None
    counts = rows[label].value_counts().sort(label)
    shown = [f"{value}: {count:,}" for value, count in counts.head(12).iter_rows()]
    return ", ".join(shown) + (f" and {counts.height - 12} more" if counts.height > 12 else "")


def _problems(series: pl.Series) -> str | Text:
    found = series.filter(series != "none").value_counts(sort=True)
    if found.is_empty():
        return "none"
    shown = "; ".join(f"{count:,} × {text}" for text, count in found.head(4).iter_rows())
    return warning(shown + (f" and {found.height - 4} more" if found.height > 4 else ""))


def _range(series: pl.Series, unit: str) -> str:
    low, high = series.min(), series.max()
    if low is None or high is None:
        return "no values"
    return f"{low:,.5g}{unit}" if low == high else f"{low:,.5g} to {high:,.5g}{unit}"


def _blocks(blocks: Mapping[str, object]) -> Table:
    rows: list[tuple[str, object]] = []
    for name, block in list(blocks.items())[:12]:
        if isinstance(block, pl.DataFrame):
            rows.append((f"data_{name}", f"{block.height:,} rows × {block.width} columns"))
        elif isinstance(block, dict):
            rows.append((f"data_{name}", f"{len(block)} values"))
    if len(blocks) > len(rows):
        rows.append(("", f"and {len(blocks) - len(rows)} more blocks"))
    return facts(rows)


def _optics(table: TableSet) -> Table:
    labels = [label for label in _OPTICS if label in table.optics.columns]
    frame = table.optics.select(labels).head(8)
    counts = [
        table.rows.filter(pl.col("rlnOpticsGroup") == group).height
        for group in table.optics["rlnOpticsGroup"]
    ]
    rows = [(*row, f"{count:,}") for row, count in zip(frame.iter_rows(), counts, strict=False)]
    return _grid([*(_OPTICS[label] for label in labels), table.items], rows)


def _preview(frame: pl.DataFrame, title: str) -> Table:
    """Lay out the first rows of the columns that matter, long names without their folders."""
    important = [label for label in _IMPORTANT if label in frame.columns]
    labels = (important or frame.columns)[:PREVIEW_COLUMNS]
    rows = frame.head(PREVIEW_ROWS).select(labels).rows()
    # Whole columns go before a digit of any is cut off.
    room, kept = shutil.get_terminal_size().columns, 0
    for number, label in enumerate(labels):
        widths = [min(len(_short(row[number])), NAME_LENGTH) for row in rows]
        room -= max(len(label.removeprefix("rln")), *widths, 0) + 2
        if room < 0 and number:
            break
        kept += 1
    return _grid(labels[:kept], [row[:kept] for row in rows], title=title)


def _grid(headings: Sequence[str], rows: Sequence[Sequence[object]], *, title: str | None = None) -> Table:
    """Lay out rows under headings; without a title the headings are phrases that may take two lines."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1), title=title, title_justify="left", title_style="italic")
    for number, heading in enumerate(headings):
        # Numbers stay whole where names must give way.
        widths = [len(_short(row[number])) for row in rows if not isinstance(row[number], str)]
        table.add_column(
            Text(heading.removeprefix("rln"), style="cyan"),
            overflow="ellipsis",
            no_wrap=title is not None,
            min_width=max(widths, default=None),
        )
    for row in rows:
        table.add_row(*(Text(_short(value)) for value in row))
    return table


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = "" if value is None else str(value)
    if len(text) <= NAME_LENGTH:
        return text
    number, mark, name = text.rpartition("@")
    kept = NAME_LENGTH - len(number) - len(mark) - 1
    return f"{number}{mark}…{name[-max(kept, 1) :]}"
