"""Where the particles are: from tables of picks or of refined particles to pixels of the micrographs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from halfmap.data import MicrographSet, ParticleSet
from halfmap.data.defocus import DefocusSurface
from halfmap.data.optics import GROUP, per_row
from halfmap.errors import TableError
from halfmap.io.coordinates import read_many_coordinates
from halfmap.io.star import read_star
from halfmap.io.tables import read_particles
from halfmap.log import log

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.extract.step import ExtractStep

MICROGRAPH, IMAGE, X, Y = "rlnMicrographName", "rlnImageName", "rlnCoordinateX", "rlnCoordinateY"
ORIGINS = ("rlnOriginXAngst", "rlnOriginYAngst")
PRIORS = ("rlnOriginXPriorAngst", "rlnOriginYPriorAngst")
FILES = "rlnMicrographCoordinates"
SCORE, PROBABILITY = "rlnAutopickFigureOfMerit", "hmPickProbability"
PIXEL = "rlnMicrographPixelSize"
INDEX, CUT = "micrograph", ("cut x", "cut y")
"""Columns of our own while the step runs: row of the micrograph, and pixel that becomes a box's middle."""

DEFOCUS = ("rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle")
CTF = (
    *DEFOCUS,
    "rlnPhaseShift",
    "rlnCtfBfactor",
    "rlnCtfScalefactor",
    "rlnCtfMaxResolution",
    "rlnCtfFigureOfMerit",
    "hmDefocusUncertainty",
)
"""What a particle has of its micrograph's CTF."""

_UNSET = -999
"""What RELION's manual picking writes where there is nothing to say."""


_DECIMALS = 4  # of an origin in Å


@dataclass(frozen=True, eq=False)
class Picks:
    """Particles of micrographs that are there, in the order of the micrographs.

    Parameters
    ----------
    rows : DataFrame
        A row each; `INDEX` refers to `micrographs`.
    optics : DataFrame
        Optics groups of the rows.
    micrographs : MicrographSet
        All of them.
    """

    rows: pl.DataFrame
    optics: pl.DataFrame
    micrographs: MicrographSet


def read(step: ExtractStep, ctx: Context, micrographs: MicrographSet) -> Picks:
    """Read the coordinates and match them with the micrographs.

    Raises
    ------
    TableError
        If none belongs to one of the micrographs, or none is good enough.
    """
    path = ctx.resolve(step.coordinates)
    particles = _read_rows(path, ctx)
    rows, optics = particles.rows, particles.optics
    index = _match(rows[MICROGRAPH], micrographs)
    rows = rows.with_columns(index.alias(INDEX))
    strange = rows.filter(pl.col(INDEX).is_null())
    if len(strange) == len(rows):
        message = f"none of its {len(rows)} particles is of one of these micrographs"
        raise TableError(message, path=path, hint=f"the first is of {rows[MICROGRAPH][0]}")
    if len(strange):
        counts = len(strange), strange[MICROGRAPH].n_unique()
        log.info("%d particles of %d micrographs that are not in the table are left out", *counts)
    rows = rows.drop_nulls(INDEX)
    rows = _good_enough(rows, step, path).sort(INDEX, maintain_order=True)
    names = micrographs.rows[MICROGRAPH][rows[INDEX]]
    rows = rows.with_columns(names.alias(MICROGRAPH))
    # The micrograph's, where all that the particles' says is its number.
    if len(optics.columns) <= 2:
        groups = micrographs.rows[GROUP][rows[INDEX]]
        return Picks(rows.with_columns(groups.alias(GROUP)), micrographs.optics, micrographs)
    return Picks(rows, optics, micrographs)


def _read_rows(path: Path, ctx: Context) -> ParticleSet:
    if path.suffix.lower() in (".box", ".txt", ".csv"):
        hint = "import such files first: halfmap import coordinates"
        raise TableError("is a coordinate file of another program", path=path, hint=hint)
    tables = [] if path.suffix == ".cs" else list(read_star(path).values())
    tables = [table for table in tables if isinstance(table, pl.DataFrame)]
    lists = [table for table in tables if FILES in table.columns]
    if any({X, Y} <= set(table.columns) and not {MICROGRAPH, IMAGE} & set(table.columns) for table in tables):
        message = "holds coordinates without the names of their micrographs"
        hint = "give the table that lists such files, as picking and `halfmap import coordinates` write it"
        raise TableError(message, path=path, hint=hint)
    if not lists:
        particles = read_particles(path)
        for label in (MICROGRAPH, X, Y):
            if label not in particles.rows.columns:
                hint = "give particles whose places in micrographs are known"
                raise TableError(f"its particles lack _{label}", path=path, hint=hint)
        for label in (X, Y):
            finite = particles.rows[label].cast(pl.Float64, strict=False).is_finite().fill_null(False)
            if not finite.all():
                row = int(finite.arg_min() or 0) + 1
                raise TableError(f"_{label} is not a number", path=path, row=row, hint="mend or drop the row")
        return particles
    names, files = (lists[0][label] for label in (MICROGRAPH, FILES))
    joined, errors = read_many_coordinates([ctx.resolve(file) for file in files])
    for number, error in sorted(errors.items()):
        ctx.fail("coordinate file", files[number], str(error))
    parts = [
        part.rows.with_columns(names[part.file].alias(MICROGRAPH)).drop(GROUP, strict=False)
        for part in joined
    ]
    if not parts:
        reason = ctx.failures[0].reason if ctx.failures else "pick particles, with a lower threshold"
        raise TableError("there are no particles in any of its files", path=path, hint=reason)
    rows = pl.concat(parts, how="diagonal_relaxed")
    empty = [
        label
        for label, kind in rows.schema.items()
        if kind.is_numeric() and label not in (X, Y) and (rows[label] == _UNSET).all()
    ]
    optics = pl.DataFrame({GROUP: [1]})
    return ParticleSet(optics, rows.drop(empty).with_columns(pl.lit(1).alias(GROUP)), path)


def _match(names: pl.Series, micrographs: MicrographSet) -> pl.Series:
    """Row of the micrograph of every name: of the same, or else the only one of the same file name."""
    known = micrographs.rows[MICROGRAPH]
    rows = {name: row for row, name in enumerate(known)}
    stems = known.map_elements(lambda name: Path(name).stem, return_dtype=pl.String)
    unique = stems.is_unique()
    by_stem = {stem: row for row, (stem, one) in enumerate(zip(stems, unique, strict=True)) if one}
    asked = names.unique()
    found = [rows.get(name, by_stem.get(Path(name).stem)) for name in asked]
    return names.replace_strict(asked, pl.Series(found, dtype=pl.Int64), return_dtype=pl.Int64)


def _good_enough(rows: pl.DataFrame, step: ExtractStep, path: Path) -> pl.DataFrame:
    """Leave out what scores too low."""
    for option, label, least in (
        ("--min-score", SCORE, step.min_score),
        ("--min-probability", PROBABILITY, step.min_probability),
    ):
        if least is None:
            continue
        if label not in rows.columns:
            raise TableError(f"its particles lack _{label}", path=path, hint=f"leave {option} out")
        kept = rows.filter(pl.col(label).is_not_nan() & (pl.col(label) >= least))
        if kept.is_empty():
            message = f"none of {len(rows)} particles reaches {option} {least:g}"
            raise TableError(message, path=path, hint=f"the best has {rows[label].max():g}")
        log.info("%d of %d particles reach %s %g", len(kept), len(rows), option, least)
        rows = kept
    return rows


def place(step: ExtractStep, picks: Picks) -> Picks:
    """Say which pixel becomes the middle of each box, and give each particle a CTF.

    Raises
    ------
    TableError
        If neither particles nor micrographs have a CTF, or pixel sizes are missing or differ.

    Notes
    -----
    Picks are cut at the pixel whose corner they are in, as RELION does, and ``rlnOrigin`` says what is left
    of their place. Images of particles were cut there already, so that the fraction of their coordinates
    means nothing; their refined centre is rounded to the nearest pixel.
    """
    micrographs, rows = picks.micrographs, picks.rows
    pixel_size = _pixel_size(picks)
    place = rows.select(pl.col(X, Y).cast(pl.Float64)).to_numpy()
    if IMAGE in rows.columns:
        place = np.floor(place)
    origin = np.zeros_like(place)
    if has_origins := set(ORIGINS) <= set(rows.columns):
        origin = rows.select(ORIGINS).to_numpy().astype(float)
        if not np.isfinite(origin).all():
            row = int(np.flatnonzero(~np.isfinite(origin).all(axis=1))[0])
            message = f"a particle of {rows[MICROGRAPH][row]} has an origin that is not a number"
            raise TableError(message, hint="drop it, or refine the particles again")
    true = place - origin / pixel_size
    if has_origins and not step.recentre:
        cut, left = np.floor(place), origin
    else:
        cut = np.floor(true + 0.5) if has_origins else np.floor(true)
        left = ((cut - true) * pixel_size).round(_DECIMALS)
    columns = dict(zip((X, Y, *ORIGINS), (*cut.T, *left.T), strict=True))
    columns |= {name: values.astype(np.int64) for name, values in zip(CUT, cut.T, strict=True)}
    for label, change in zip(PRIORS, (left - origin).T, strict=True):
        if label in rows.columns:
            columns[label] = rows[label].to_numpy() + change
    rows = rows.with_columns(pl.Series(label, values) for label, values in columns.items())
    if step.defocus_of_micrographs or not set(DEFOCUS) <= set(rows.columns):
        rows = _with_ctf(rows, true, micrographs)
    return Picks(rows, picks.optics, micrographs)


def _pixel_size(picks: Picks) -> float:
    """Pixel size of all micrographs that have particles."""
    micrographs = picks.micrographs
    used = micrographs.select(pl.Series(np.isin(np.arange(len(micrographs)), picks.rows[INDEX].to_numpy())))
    sizes = used.column(PIXEL).unique().sort().to_list()
    if sizes[-1] - sizes[0] > 1e-4 * sizes[0]:
        message = f"its micrographs have pixels of {', '.join(f'{size:g}' for size in sizes)} Å"
        hint = "extract from those of one pixel size at a time"
        raise TableError(message, path=micrographs.path, hint=hint)
    if PIXEL in picks.optics.columns:
        theirs = per_row(PIXEL, picks.rows, picks.optics)
        if (theirs - sizes[0]).abs().max() > 1e-3 * sizes[0]:  # type: ignore[operator] - numbers
            message = f"the particles' places are in pixels of {theirs[0]:g} Å, its own are of {sizes[0]:g} Å"
            hint = "use the micrographs that they were picked in"
            raise TableError(message, path=micrographs.path, hint=hint)
    return float(sizes[0])


def _with_ctf(rows: pl.DataFrame, true: np.ndarray, micrographs: MicrographSet) -> pl.DataFrame:
    """Give particles the CTF of their micrographs, with the defocus at their places."""
    known = micrographs.rows
    for label in DEFOCUS:
        if label not in known.columns:
            hint = "estimate the CTF first: halfmap ctf"
            raise TableError(f"the micrographs lack _{label}", path=micrographs.path, hint=hint)
    labels = [label for label in CTF if label in known.columns]
    rows = rows.drop(CTF, strict=False).hstack(known.select(labels)[rows[INDEX]])
    if "hmDefocusSurface" not in known.columns:
        return rows
    change = np.zeros(len(rows))
    for first, last, row in by_micrograph(rows):
        surface = DefocusSurface.of_row(known.row(row, named=True))
        change[first:last] = surface.at(*true[first:last].T).round(2)
    return rows.with_columns(pl.col(label) + pl.Series(change) for label in DEFOCUS[:2])


def by_micrograph(rows: pl.DataFrame) -> list[tuple[int, int, int]]:
    """First row, the one behind the last, and the micrograph, for every micrograph that has particles."""
    index = rows[INDEX].to_numpy()
    edges = [0, *(np.flatnonzero(np.diff(index)) + 1).tolist(), len(index)]
    return [(a, b, int(index[a])) for a, b in pairwise(edges) if b > a]
