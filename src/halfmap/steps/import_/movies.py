"""Examine movies and list them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfmap.engine import Context
from halfmap.errors import FileFormatError, TableError
from halfmap.log import log
from halfmap.steps.import_.microscope import contents

if TYPE_CHECKING:
    from halfmap.data import MovieSet
    from halfmap.steps.import_.step import ImportMovies

MOST_DOSE_e_per_A2, LEAST_DOSE_e_per_A2 = 200.0, 2.0
"""Whole exposures beyond which the dose per frame was hardly meant so."""

NAMED = 3
"""Movies that a warning names."""

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


def warn_of_exposure(step: ImportMovies, headers: list[dict[str, Any]]) -> None:
    """Warn of a whole exposure that can hardly be, and of movies with another number of frames than most."""
    counts = Counter(header["frames"] for header in headers)
    frames = counts.most_common(1)[0][0]
    total = frames * step.dose_per_frame
    said = f"{frames} frames of {step.dose_per_frame:g} e/Å² are {total:.4g} e/Å² in all"
    if total > MOST_DOSE_e_per_A2:
        log.warning(
            "%s, more than particles survive: --dose-per-frame is that of one frame; if %g e/Å² is the whole "
            "exposure, give %.4g",
            *(said, step.dose_per_frame, step.dose_per_frame / frames),
        )
    elif total < LEAST_DOSE_e_per_A2:
        log.warning(
            "%s, in which little can be seen: is --dose-per-frame in e/Å², and that of a frame?", said
        )
    odd = [header for header in headers if header["frames"] != frames]
    if odd:
        named = ", ".join(f"{Path(header['file']).name} {header['frames']}" for header in odd[:NAMED])
        log.warning(
            "%d of %d movies have another number of frames than the %d of most (%s%s); they are kept, with "
            "the same dose per frame: import them by themselves if they were divided otherwise, or leave out "
            "those that broke off",
            *(len(odd), len(headers), frames, named, ", …" if len(odd) > NAMED else ""),
        )


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
            **contents(headers),
        }
    )
    return MovieSet(optics=pl.DataFrame([optics]), rows=rows)
