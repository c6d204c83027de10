"""Match coordinates with micrographs, whatever picker wrote them, and write one table per micrograph."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from halfmap.engine import Context
from halfmap.errors import HalfmapError, TableError
from halfmap.log import log

if TYPE_CHECKING:
    import polars as pl

    from halfmap.data import MicrographSet
    from halfmap.steps.import_.step import ImportCoordinates

MICROGRAPH, X, Y = "rlnMicrographName", "rlnCoordinateX", "rlnCoordinateY"
SCORE, DIAMETER = "rlnAutopickFigureOfMerit", "hmParticleDiameter"
MOSTLY = 0.5
"""Share of coordinates outside the micrographs that means a wrong scale."""

SHOWN = 3
"""Micrographs with coordinates outside them that are named."""


def gather(
    step: ImportCoordinates, ctx: Context, files: list[Path], micrographs: MicrographSet
) -> dict[str, pl.DataFrame]:
    """Read all coordinates and sort them by the name of their micrograph.

    Raises
    ------
    HalfmapError
        If no file can be read and belongs to any of the micrographs.
    TableError
        If most coordinates lie outside the micrographs, or two micrographs have one name.
    """
    import polars as pl

    names: dict[str, str] = {}
    for row, name in enumerate(micrographs.rows[MICROGRAPH], start=1):
        if names.setdefault(_stem(name), name) != name:
            message = f"{name} and {names[_stem(name)]} differ only in their folders or suffixes"
            hint = "coordinates go by the names of files: import these micrographs' coordinates apart"
            raise TableError(message, path=micrographs.path, row=row, hint=hint)
    found: dict[str, list[pl.DataFrame]] = {}
    problems: list[tuple[Path, HalfmapError]] = []
    for file in files:
        try:
            parts = list(_by_micrograph(file, step, names))
        except HalfmapError as error:
            problems.append((file, error))
            continue
        for name, table in parts:
            found.setdefault(name, []).append(table)
    if not found and len(problems) == 1:
        raise problems[0][1]
    if not found:
        message = f"none of {len(problems)} coordinate files is of use; the first one: {problems[0][1]}"
        raise TableError(message, path=micrographs.path)
    for file, error in problems:
        ctx.fail("coordinate file", ctx.relative(file), str(error))
    if step.min_score is not None:
        found = _best(found, step.min_score)
    picks = _inside(ctx, found, micrographs)
    if step.diameter is None:
        return picks
    # Extraction takes it from here.
    return {name: table.with_columns(pl.lit(step.diameter).alias(DIAMETER)) for name, table in picks.items()}


def _stem(name: str) -> str:
    return Path(name).name.removesuffix(".gz").removesuffix(".bz2").rsplit(".", 1)[0]


def _by_micrograph(
    file: Path, step: ImportCoordinates, names: dict[str, str]
) -> Iterable[tuple[str, pl.DataFrame]]:
    """Parts of a coordinate file with the micrographs they belong to; others are counted and dropped."""
    import polars as pl

    from halfmap.io.coordinates import read_coordinates

    table = read_coordinates(file, scale=step.scale)
    if step.min_score is not None and SCORE not in table.columns and len(table):
        raise TableError("has no scores", path=file, hint="leave --min-score out")
    if SCORE in table.columns:
        table = table.with_columns(pl.col(SCORE).cast(pl.Float64, strict=False))
    if MICROGRAPH not in table.columns:
        owner = _owner(_stem(file.name), names)
        if owner is None:
            hint = f"begin its name with a micrograph's, such as {next(iter(names))}"
            raise TableError("is of none of the micrographs by its name", path=file, hint=hint)
        return [(owner, table)]
    parts, strangers = [], 0
    for (name,), part in table.group_by(MICROGRAPH, maintain_order=True):
        # Topaz writes names without a suffix, which may hold dots of their own.
        owner = names.get(str(name)) or names.get(_stem(str(name)))
        if owner is None:
            strangers += 1
        else:
            parts.append((owner, part.drop(MICROGRAPH).with_columns(pl.lit(owner).alias(MICROGRAPH))))
    if not parts:
        first = table[MICROGRAPH][0] if len(table) else "nothing"
        ours = Path(next(iter(names.values()))).name
        message = f"names none of the micrographs: its first is {first}, the table's first is {ours}"
        raise TableError(message, path=file, hint="give the table of the micrographs it was picked in")
    if strangers:
        log.warning("%s: %d of the micrographs it names are not in the table", file, strangers)
    return parts


def _owner(stem: str, names: dict[str, str]) -> str | None:
    """Micrograph whose name is the longest that this one begins with, up to a word's end."""
    candidates = [
        name for name in names if stem == name or (stem.startswith(name) and not stem[len(name)].isalnum())
    ]
    return names[max(candidates, key=len)] if candidates else None


def _best(found: dict[str, list[pl.DataFrame]], min_score: float) -> dict[str, list[pl.DataFrame]]:
    """Leave out what scores too low; a micrograph may be left with none."""
    import polars as pl

    score = pl.col(SCORE)
    kept = {
        name: [
            part.filter(score.is_not_nan() & (score >= min_score)) if len(part) else part for part in parts
        ]
        for name, parts in found.items()
    }
    before, after = (sum(len(part) for parts in each.values() for part in parts) for each in (found, kept))
    if before and not after:
        highest = pl.concat([part[SCORE] for parts in found.values() for part in parts if len(part)]).max()
        raise TableError(
            f"none of {before} coordinates scores {min_score:g} or more", hint=f"the best scores {highest}"
        )
    log.info("%d of %d coordinates score %g or more", after, before, min_score)
    return kept


def _inside(
    ctx: Context, found: dict[str, list[pl.DataFrame]], micrographs: MicrographSet
) -> dict[str, pl.DataFrame]:
    """Leave out what lies outside its micrograph."""
    import polars as pl

    from halfmap.io.movies import open_movie

    picks, total, outside = {}, 0, {}
    for name in micrographs.rows[MICROGRAPH]:
        if name not in found:
            continue
        whole = pl.concat(
            [part.drop(MICROGRAPH, strict=False) for part in found[name]], how="diagonal_relaxed"
        )
        height, width = open_movie(ctx.resolve(name)).shape
        inside = whole.filter(pl.col(X).is_between(0, width - 1) & pl.col(Y).is_between(0, height - 1))
        total += len(whole)
        if len(inside) < len(whole):
            outside[Path(name).name] = len(whole) - len(inside)
        picks[name] = inside
    lost = sum(outside.values())
    hint = "were the micrographs binned (shrunk) for picking? give --scale"
    if lost > MOSTLY * total:
        message = f"{lost} of {total} coordinates lie outside the micrographs"
        raise TableError(message, hint=hint)
    if lost:
        worst = sorted(outside, key=lambda name: -outside[name])
        named = ", ".join(f"{name} ({outside[name]})" for name in worst[:SHOWN])
        named += f" and {len(worst) - SHOWN} more" if len(worst) > SHOWN else ""
        text = "%d of %d coordinates lie outside their micrographs and are left out: those of %s; %s"
        log.warning(text, lost, total, named, hint)
    return picks


def write(ctx: Context, picks: dict[str, pl.DataFrame], micrographs: MicrographSet) -> pl.DataFrame:
    """Write one table of coordinates per micrograph, and the table that names them; return the latter."""
    import polars as pl

    from halfmap.io.coordinates import write_coordinates
    from halfmap.io.star import write_star

    rows = []
    for name, table in picks.items():
        path = ctx.folder / "coordinates" / f"{_stem(name)}.star"
        # Thousands of small files, which the same command makes again: waiting for the disk doubles its time.
        write_coordinates(path, table, durable=False)
        rows.append((name, ctx.relative(path)))
    count = sum(map(len, picks.values()))
    filled, total = sum(len(table) > 0 for table in picks.values()), len(micrographs)
    text = f"{count} coordinate{'' if count == 1 else 's'} in {filled} of {total} "
    text += f"micrograph{'' if total == 1 else 's'}"
    if filled < len(rows):
        text += f"; {len(rows) - filled} more {'has' if len(rows) - filled == 1 else 'have'} none left"
    log.info("%s", text)
    table = pl.DataFrame(rows, schema=[MICROGRAPH, "rlnMicrographCoordinates"], orient="row")
    write_star(ctx.folder / "coordinates.star", {"coordinate_files": table})
    return table
