"""Examine movies and list them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfmap.engine import Context
from halfmap.errors import FileFormatError, TableError

if TYPE_CHECKING:
    from halfmap.data import MovieSet
    from halfmap.steps.import_.step import ImportMovies

MTF_LABELS = "rlnResolutionInversePixel", "rlnMtfValue"


def examine(path: Path, *, step: ImportMovies) -> dict[str, Any]:
    """Read a movie's header and last frame; what the table needs of it as plain values.

    Raises
    ------
    FileFormatError
        If it cannot be opened, is cut short, or holds a single frame.
    """
    from halfmap.io.movies import open_movie

    movie = open_movie(path, eer_grouping=step.eer_grouping, eer_upsampling=step.eer_upsampling)
    if movie.n_frames < 2:
        raise FileFormatError("holds a single frame", path=path, hint="use: halfmap import micrographs")
    # A transfer that broke off leaves a TIFF whose headers may all be there.
    movie.read(movie.n_frames - 1)
    height, width = movie.shape
    return {
        "frames": movie.n_frames,
        "width": width,
        "height": height,
        "pixel_size": movie.pixel_size,
    }


def check_camera_files(step: ImportMovies, ctx: Context, headers: list[dict[str, Any]]) -> None:
    """Read the defects and the MTF, which motion correction and refinement would stumble over.

    Raises
    ------
    FileFormatError, TableError, ShapeError
        If one cannot be read, or the defects are not those of these movies.
    """
    from halfmap.io.defects import read_defects
    from halfmap.io.star import read_star

    if step.defects is not None:
        read_defects(ctx.resolve(step.defects), shape=(headers[0]["height"], headers[0]["width"]))
    if step.mtf is not None:
        path = ctx.resolve(step.mtf)
        labels = {label for block in read_star(path).values() for label in getattr(block, "columns", ())}
        missing = [label for label in MTF_LABELS if label not in labels]
        if missing:
            raise TableError(
                f"is no MTF: it has no column {missing[0]}", path=path, hint="give RELION's file"
            )


def tabulate(
    step: ImportMovies,
    ctx: Context,
    headers: list[dict[str, Any]],
    settings: dict[str, Any],
    *,
    gain: Path | None,
) -> MovieSet:
    """Make the table of movies: the session's settings as an optics group, a row per movie."""
    import polars as pl

    from halfmap.data import MovieSet

    optics = settings | {
        "rlnMicrographDoseRate": step.dose_per_frame,
        "rlnMicrographPreExposure": step.pre_exposure,
    }
    for label, path in (
        ("rlnMicrographGainName", gain),
        ("rlnMicrographDefectFile", step.defects),
        ("rlnMtfFileName", step.mtf),
    ):
        if path is not None:
            optics[label] = ctx.relative(ctx.resolve(path))
    if any(header["file"].lower().endswith(".eer") for header in headers):
        optics["rlnEERGrouping"] = step.eer_grouping
        optics["rlnEERUpsampling"] = step.eer_upsampling
    rows = pl.DataFrame(
        {
            "rlnMicrographMovieName": [ctx.relative(header["file"]) for header in headers],
            "rlnOpticsGroup": [1] * len(headers),
            "rlnImageSizeX": [header["width"] for header in headers],
            "rlnImageSizeY": [header["height"] for header in headers],
            "rlnImageSizeZ": [header["frames"] for header in headers],
        }
    )
    return MovieSet(optics=pl.DataFrame([optics]), rows=rows)
