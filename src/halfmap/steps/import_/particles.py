"""Read particles of RELION and cryoSPARC, find their stacks, and check that they hold what the table says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from halfmap.engine import Context
from halfmap.errors import ParameterError, TableError
from halfmap.log import log

if TYPE_CHECKING:
    import polars as pl

    from halfmap.data import ParticleSet
    from halfmap.io.images import ImageStack
    from halfmap.steps.import_.step import ImportParticles

IMAGE, PIXEL, BOX = "rlnImageName", "rlnImagePixelSize", "rlnImageSize"
FILE_COLUMNS = (IMAGE, "rlnReconstructImageName", "rlnMicrographName", "rlnMtfFileName")
"""Columns of file names, of which only the first must be found."""


def read(step: ImportParticles, ctx: Context) -> ParticleSet:
    """Read the table, joined with cryoSPARC's passthrough files.

    Raises
    ------
    TableError
        If it holds no extracted particles.
    ParameterError
        If passthrough files are given for a table that is not cryoSPARC's.
    """
    from halfmap.data import ParticleSet
    from halfmap.io.cryosparc import read_cs
    from halfmap.io.tables import read_particles

    path = ctx.resolve(step.particles)
    if step.passthrough and path.suffix != ".cs":
        message = "is not cryoSPARC's, so that no passthrough file belongs to it"
        raise ParameterError(message, path=path, hint="leave --passthrough out")
    if step.passthrough:
        particles = read_cs(path, passthrough=[ctx.resolve(other) for other in step.passthrough])
        if not isinstance(particles, ParticleSet):
            raise TableError(f"the file holds {particles.items}, not particles", path=path)
    else:
        particles = read_particles(path)
    if IMAGE not in particles.rows.columns:
        hint = "use: halfmap import coordinates"
        raise TableError("the particles have coordinates but no images", path=path, hint=hint)
    return particles


def locate(step: ImportParticles, ctx: Context, particles: ParticleSet) -> ParticleSet:
    """Rewrite names of files relative to the project.

    Raises
    ------
    TableError
        If a stack is nowhere to be found; names the first row that asks for it.
    """
    source = ctx.resolve(step.particles).absolute()
    roots = [ctx.resolve(step.images)] if step.images else [ctx.project, *source.parents]
    rows, optics = particles.rows, particles.optics
    for label in FILE_COLUMNS:
        if label in rows.columns:
            rows = rows.with_columns(_locate_column(rows[label], ctx, roots, source))
        if label in optics.columns:
            optics = optics.with_columns(_locate_column(optics[label], ctx, roots, source))
    return type(particles)(optics, rows, source)


def _locate_column(names: pl.Series, ctx: Context, roots: list[Path], table: Path) -> pl.Series:
    import polars as pl

    # Written as index@file; micrographs and MTFs, and stacks of one image, are a file alone.
    parts = names.str.extract_groups(r"^(?:(\d+)@)?(.*)$").struct.unnest()
    files = parts.to_series(1)
    found: dict[str, str] = {}
    for file in files.unique(maintain_order=True).drop_nulls():
        path = _find(file, roots)
        if path is not None:
            found[file] = ctx.relative(path)
        elif names.name == IMAGE:
            row = int((files == file).arg_max() or 0) + 1
            hint = "give the folder that such names are relative to with --images"
            raise TableError(f"its image stack {file} is not there", path=table, row=row, hint=hint)
        else:
            found[file] = file
    if missing := sum(name == file and not (ctx.project / name).exists() for name, file in found.items()):
        log.info("%d files of %s are not there; their names are kept as they are", missing, names.name)
    located = files.replace_strict(list(found), list(found.values()), return_dtype=pl.String)
    number = parts.to_series(0)
    return (
        pl.DataFrame({"number": number, "file": located})
        .select(
            pl.when(pl.col("number").is_null())
            .then(pl.col("file"))
            .otherwise(pl.col("number") + "@" + pl.col("file"))
        )
        .to_series()
        .alias(names.name)
    )


def _find(file: str, roots: list[Path]) -> Path | None:
    return next((root / file for root in roots if (root / file).is_file()), None)


def check(step: ImportParticles, ctx: Context, particles: ParticleSet) -> tuple[ParticleSet, ImageStack]:
    """Open all stacks, and complete the optics table with what their headers say.

    Raises
    ------
    TableError, FileFormatError, ShapeError
        If a stack is too short, broken, or of another box size than the table states.
    ParameterError
        If neither the table, the user nor the stacks state the pixel size.
    """
    import polars as pl

    from halfmap.data.optics import add_optics
    from halfmap.io.images import ImageStack

    path = particles.path
    stack = ImageStack(particles.rows[IMAGE], root=ctx.project, table=path)
    height, width = stack.shape
    if height != width:
        message = f"its images are {width} × {height} px"
        raise TableError(message, path=path, hint="extract particles in square boxes")
    optics, rows = particles.optics, particles.rows
    if BOX in optics.columns and (optics[BOX] != width).any():
        message = f"states a box of {optics[BOX].unique().to_list()[0]} px, the stacks have {width} px"
        raise TableError(message, path=path, hint="is it the table of other stacks?")
    if BOX not in optics.columns:
        optics = optics.with_columns(pl.lit(width).alias(BOX))
    if "rlnImageDimensionality" not in optics.columns:
        optics = optics.with_columns(pl.lit(2).alias("rlnImageDimensionality"))
    if PIXEL not in optics.columns:
        size = step.pixel_size or stack.pixel_size
        if size is None:
            message = "neither the table nor the stacks' headers state the pixel size"
            raise ParameterError(message, path=path, hint="give it with --pixel-size")
        groups = optics.with_columns(pl.lit(float(f"{size:.6g}")).alias(PIXEL))
        # A table of before RELION 3.1, whose origins in pixels can be turned to Å now.
        flat = rows.join(groups, on="rlnOpticsGroup", how="left", maintain_order="left")
        optics, rows = add_optics(flat.drop("rlnOpticsGroup"), pixel_column=PIXEL)
    elif (
        step.pixel_size is not None
        and ((optics[PIXEL] - step.pixel_size).abs() > 1e-3 * step.pixel_size).any()
    ):
        sizes = ", ".join(f"{size:g}" for size in optics[PIXEL].unique())
        message = f"the table states a pixel size of {sizes} Å, --pixel-size is {step.pixel_size:g}"
        raise ParameterError(message, path=path, hint="leave --pixel-size out, or correct the table")
    return type(particles)(optics, rows), stack


def say_counts(particles: ParticleSet, stack: ImageStack) -> None:
    """Say what was imported."""
    counts = len(particles), len(stack.files), len(particles.optics), stack.shape[1]
    log.info("particles: %d, image stacks: %d, optics groups: %d, box: %d px", *counts)
