"""Write picks for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from halfmap.errors import ParameterError, TableError
from halfmap.io.coordinates import read_coordinates, write_coordinates
from halfmap.io.names import unique_stems
from halfmap.io.star import read_star, write_star
from halfmap.log import log
from halfmap.steps.pick.tables import COORDINATES, MICROGRAPH, PROBABILITY

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.pick.step import PickExport


def read_list(path: Path) -> dict[str, str]:
    """Coordinate files by the names of their micrographs.

    Raises
    ------
    TableError
        If the table names none, or a micrograph twice.
    """
    for block in read_star(path).values():
        if isinstance(block, pl.DataFrame) and {MICROGRAPH, COORDINATES} <= set(block.columns):
            names = block[MICROGRAPH].to_list()
            if len(set(names)) != len(names):
                raise TableError(
                    "names a micrograph twice", path=path, hint="join the tables by pick consensus"
                )
            return dict(zip(names, block[COORDINATES].to_list(), strict=True))
    message = f"names no coordinates: it has no columns _{MICROGRAPH} and _{COORDINATES}"
    raise TableError(message, path=path, hint="give the autopick.star of a job")


def run(step: PickExport, ctx: Context) -> None:
    """Write each table of coordinates in another format, and the list of the files."""
    if step.format == "box" and step.box is None:
        raise ParameterError("a .box file needs the boxes' size", hint="give --box, in pixels")
    source = ctx.resolve(step.coordinates)
    rows, listed = [], read_list(source)
    keys = unique_stems(list(listed), table=source)
    for key, (name, file) in zip(keys, listed.items(), strict=True):
        table = read_coordinates(ctx.resolve(file))
        if step.min_probability is not None:
            if PROBABILITY not in table.columns:
                raise TableError(f"lacks _{PROBABILITY}", path=file, hint="leave --min-probability out")
            table = table.filter(pl.col(PROBABILITY) >= step.min_probability)
        # Topaz names micrographs without their suffix.
        shown = Path(name).stem if step.format == "txt" else name
        table = table.with_columns(pl.lit(shown).alias(MICROGRAPH))
        path = ctx.folder / step.format / f"{key}.{step.format}"
        path.parent.mkdir(exist_ok=True)
        write_coordinates(path, table, scale=step.scale, box_size=step.box, durable=False)
        rows.append((name, ctx.relative(path), len(table)))
        log.debug("%d coordinates of %s", len(table), name)
    table = pl.DataFrame(rows, schema=[MICROGRAPH, COORDINATES, "hmPicks"], orient="row")
    write_star(ctx.folder / "exported.star", {"coordinate_files": table})
    several = "" if len(table) == 1 else "s"
    log.info("%d coordinates of %d micrograph%s", int(table["hmPicks"].sum()), len(table), several)
