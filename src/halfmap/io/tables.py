"""Movies, micrographs and particles from STAR and cryoSPARC files, and back, by the file's suffix."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import polars as pl

from halfmap.data import MicrographSet, MovieSet, ParticleSet, TableSet
from halfmap.data.optics import add_optics
from halfmap.errors import FileFormatError, TableError
from halfmap.io.images import TIFF_SUFFIXES
from halfmap.io.star import Block, read_star, write_star

Set = TypeVar("Set", bound=TableSet)

_OLD_NAMES = ("images", "")
"""Blocks that RELION 3.0 and older, and other programs, put rows in."""

_OTHER_BLOCKS = ("optics", MovieSet.block, MicrographSet.block, ParticleSet.block)


def read_particles(path: str | Path) -> ParticleSet:
    """Read particles from a STAR file (RELION 3.0 to 5) or a cryoSPARC ``.cs`` file.

    Tables without optics groups get them (`halfmap.data.optics.add_optics`); `halfmap.io.star.read_star`
    gives a file as it is.

    Raises
    ------
    FileFormatError
        If the file is not what its suffix says.
    TableError
        If the file holds no particles, or a table that cannot be.
    """
    return _read(Path(path), ParticleSet)


def read_micrographs(path: str | Path) -> MicrographSet:
    """Read micrographs from a STAR file or a cryoSPARC ``.cs`` file; see `read_particles`."""
    return _read(Path(path), MicrographSet)


def read_movies(path: str | Path) -> MovieSet:
    """Read movies from a STAR file; see `read_particles`."""
    return _read(Path(path), MovieSet)


def write_particles(path: str | Path, particles: ParticleSet, *, comment: str | None = None) -> None:
    """Write particles as STAR 3.1, or as cryoSPARC's format if `path` ends in ``.cs``; whole or not at all.

    Raises
    ------
    TableError
        If a value cannot be written in that format.
    """
    if Path(path).suffix == ".cs":
        from halfmap.io.cryosparc import write_cs

        write_cs(path, particles)
    else:
        _write(path, particles, comment)


def write_micrographs(path: str | Path, micrographs: MicrographSet, *, comment: str | None = None) -> None:
    """Write micrographs as STAR 3.1, whole or not at all."""
    _write(path, micrographs, comment)


def write_movies(path: str | Path, movies: MovieSet, *, comment: str | None = None) -> None:
    """Write movies as STAR 3.1, whole or not at all."""
    _write(path, movies, comment)


def _write(path: str | Path, table: TableSet, comment: str | None) -> None:
    if Path(path).suffix != ".star":
        raise FileFormatError(f"{table.items} are written as STAR", path=path, hint="name the file *.star")
    blocks: dict[str, Block] = {"optics": table.optics, table.block: table.rows}
    write_star(path, blocks, comment=comment)


def _read(path: Path, kind: type[Set]) -> Set:
    if path.suffix == ".cs":
        from halfmap.io.cryosparc import read_cs

        table = read_cs(path)
        if not isinstance(table, kind):
            raise TableError(f"the file holds {table.items}, not {kind.items}", path=path)
        return table
    if path.suffix.lower() in (*TIFF_SUFFIXES, ".mrc", ".mrcs", ".map", ".eer"):
        hint = f"`halfmap import {kind.items}` makes one"
        if kind is ParticleSet:
            hint = "give the table that lists its images (.star or .cs)"
        raise FileFormatError(f"is an image, not a table of {kind.items}", path=path, hint=hint)
    blocks = read_star(path)
    rows = _find_rows(blocks, kind, path)
    optics = blocks.get("optics")
    if isinstance(optics, dict):
        # A single group may be written as keys.
        optics = pl.DataFrame([optics]) if optics else None
    if optics is None:
        optics, rows = add_optics(rows, pixel_column=kind.pixel_column)
    return kind(optics, rows, path)


def _find_rows(blocks: dict[str, Any], kind: type[TableSet], path: Path) -> pl.DataFrame:
    """Find the block named for the kind, or else the only one that may hold such items."""
    loops = {name: block for name, block in blocks.items() if isinstance(block, pl.DataFrame)}
    if kind.block in loops:
        return loops[kind.block]
    candidates = [
        name for name, block in loops.items() if name not in _OTHER_BLOCKS and kind.holds(block.columns)
    ]
    picked = [name for name, block in loops.items() if name not in _OTHER_BLOCKS and _is_of_picks(block)]
    if picked and kind is not ParticleSet:
        hint = f"give the table of the {kind.items} that they were picked in"
        raise TableError(f"holds coordinates, not {kind.items}", path=path, hint=hint)
    old = [name for name in _OLD_NAMES if name in candidates]
    if len(candidates) == 1 or old:
        return loops[(old or candidates)[0]]
    found = ", ".join(f"data_{name}" for name in blocks)
    raise TableError(f"no {kind.items} among {found}", path=path, hint="is it the right file?")


def _is_of_picks(block: pl.DataFrame) -> bool:
    """Whether these are coordinates, or names of files with such, in micrographs."""
    columns = set(block.columns)
    return "rlnImageName" not in columns and bool({"rlnCoordinateX", "rlnMicrographCoordinates"} & columns)
