"""Optics groups: what makes them valid, and how tables older than RELION 3.1 get theirs."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from halfmap.data.columns import OPTICS_COLUMNS
from halfmap.errors import TableError

GROUP = "rlnOpticsGroup"
NAME = "rlnOpticsGroupName"

_POSITIVE = (
    "rlnImagePixelSize",
    "rlnMicrographPixelSize",
    "rlnMicrographOriginalPixelSize",
    "rlnVoltage",
    "rlnImageSize",
)

_PIXEL_ORIGINS = {
    "rlnOriginX": "rlnOriginXAngst",
    "rlnOriginY": "rlnOriginYAngst",
    "rlnOriginXPrior": "rlnOriginXPriorAngst",
    "rlnOriginYPrior": "rlnOriginYPriorAngst",
}


def check_optics(optics: pl.DataFrame, *, path: Path | None = None) -> None:
    """Refuse an optics table that cannot be used.

    Raises
    ------
    TableError
        If it is empty, lacks the group number, holds one twice, or has a pixel size, voltage or box size
        that is NaN or not positive.
    """
    if optics.is_empty():
        raise TableError("no optics groups", path=path, hint="add an optics table")
    if GROUP not in optics.columns:
        raise TableError(f"the optics table lacks _{GROUP}", path=path, hint="number its rows from 1")
    twice = optics[GROUP].is_duplicated()
    if twice.any():
        row = twice.arg_max() or 0
        raise TableError(f"optics group {optics[GROUP][row]} comes twice", path=path, row=row + 1)
    for label in _POSITIVE:
        if label not in optics.columns:
            continue
        good = (optics[label].is_not_null() & optics[label].is_finite() & (optics[label] > 0)).fill_null(
            False
        )
        if not good.all():
            row = good.arg_min() or 0
            raise TableError(
                f"_{label} of optics group {optics[GROUP][row]} is {optics[label][row]}",
                path=path,
                row=row + 1,
                hint="it must be a positive number",
            )


def check_groups(rows: pl.DataFrame, optics: pl.DataFrame, *, path: Path | None = None) -> None:
    """Refuse rows that name no optics group, or one that does not exist.

    Raises
    ------
    TableError
        With the first such row.
    """
    if GROUP not in rows.columns:
        raise TableError(
            f"the rows lack _{GROUP}", path=path, hint="add it, so that each row refers to the optics table"
        )
    if not rows[GROUP].dtype.is_integer() or not optics[GROUP].dtype.is_integer():
        raise TableError(f"_{GROUP} holds values that are not whole numbers", path=path)
    known = rows[GROUP].is_in(optics[GROUP].implode()).fill_null(False)
    if not known.all():
        row = known.arg_min() or 0
        raise TableError(
            f"optics group {rows[GROUP][row]} is missing",
            path=path,
            row=row + 1,
            hint=f"the optics table has {', '.join(map(str, optics[GROUP].sort()))}",
        )


def add_optics(rows: pl.DataFrame, *, pixel_column: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Split a table without optics groups (RELION 3.0 and older) into optics and rows of RELION 3.1.

    Every distinct combination of the microscope's values (voltage, Cs, amplitude contrast, detector pixel,
    magnification, beam tilt, ...) becomes a group, numbered as they appear. Those columns move to the optics
    table as they are, so that nothing is lost; the pixel size is 1e4 times the detector's pixel size (µm)
    over the magnification. Origins in pixels become origins in Å where the pixel size is known.

    Parameters
    ----------
    rows : DataFrame
        Particles, micrographs or movies.
    pixel_column : str
        Column of the optics table that the pixel size goes to.

    Returns
    -------
    tuple of DataFrame
        Optics and rows.
    """
    moved = [label for label in rows.columns if label in OPTICS_COLUMNS]
    index = pl.int_range(pl.len(), dtype=pl.Int64).alias("index")
    if moved:
        groups = rows.select(*moved, index).group_by(moved, maintain_order=True).agg("index")
    else:
        groups = rows.select(index.implode())
    number = pl.int_range(1, pl.len() + 1, dtype=pl.Int64).alias("number")
    numbers = groups.select(number, "index").explode("index").sort("index")["number"]
    optics = groups.drop("index", GROUP, strict=False)
    optics = optics.insert_column(0, groups.select(number)["number"].alias(GROUP))
    if NAME not in optics.columns:
        optics = optics.insert_column(1, ("opticsGroup" + optics[GROUP].cast(pl.String)).alias(NAME))
    if pixel_column not in optics.columns and {"rlnDetectorPixelSize", "rlnMagnification"} <= set(moved):
        pixel_size = 1e4 * pl.col("rlnDetectorPixelSize") / pl.col("rlnMagnification")
        optics = optics.with_columns(pixel_size.alias(pixel_column))
    rows = rows.drop(moved).with_columns(numbers.alias(GROUP))
    if pixel_column in optics.columns:
        rows = _origins_to_angstrom(rows, per_row(pixel_column, rows, optics))
    return optics, rows


def per_row(label: str, rows: pl.DataFrame, optics: pl.DataFrame) -> pl.Series:
    """Value of an optics column for every row."""
    return (
        rows[GROUP]
        .replace_strict(optics[GROUP], optics[label], return_dtype=optics[label].dtype)
        .alias(label)
    )


def _origins_to_angstrom(rows: pl.DataFrame, pixel_size: pl.Series) -> pl.DataFrame:
    names = {
        px: angst for px, angst in _PIXEL_ORIGINS.items() if px in rows.columns and angst not in rows.columns
    }
    return rows.with_columns(rows[label] * pixel_size for label in names).rename(names)
