"""Orient the gain reference and make sure that it fits the movies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfmap.engine import Context
from halfmap.errors import FileFormatError, ParameterError
from halfmap.log import log

if TYPE_CHECKING:
    import numpy as np

    from halfmap.steps.import_.step import ImportMovies

MOVIES_IN_CHECK = 4
"""Movies averaged for the check: a gain's pattern stands out of the counts of a hundred frames."""

FRAMES_AT_A_TIME = 8

CLEAR_MARGIN = 2.0
"""Another orientation must correlate this many times better than the given one to stop the import."""

NOTICEABLE = 0.05
"""Correlation below which no orientation is said to fit; chance gives 1e-3 on a million pixels."""


def orient(
    step: ImportMovies, ctx: Context, headers: list[dict[str, Any]], *, pixel_size: float
) -> Path | None:
    """Turn the gain reference as asked, check it against the movies, store it in the job folder.

    Raises
    ------
    ParameterError
        If the reference clearly fits the mean frame better in another orientation, which is named, or is of
        another size and fits in none.
    ShapeError
        If it fits the frames in no orientation.
    """
    if step.gain is None:
        return None
    from halfmap.io.gain import is_divided, match_gain, read_gain
    from halfmap.io.mrc import write_mrc

    source, stored = ctx.resolve(step.gain), ctx.folder / "gain.mrc"
    shape = headers[0]["height"], headers[0]["width"]
    movie = headers[0]["file"]
    reference = read_gain(source, rotation=step.gain_rotation, flip=step.gain_flip)
    # RELION refuses two sizes, but for EER it has the gain of physical pixels serve super-resolution, too.
    is_eer = movie.lower().endswith(".eer") and step.eer_upsampling == 2
    sizes = "" if is_eer else _sizes(reference.shape, shape)
    if step.check_gain:
        _check(step, source, headers[:MOVIES_IN_CHECK], sizes=sizes)
    reference = match_gain(reference, shape, path=source)
    if sizes:
        log.warning("gain reference: %s; make sure that it was taken with this camera and mode", sizes)
    # What is stored means the same to RELION, which divides EER movies by all but the camera's own format.
    if is_divided(source, movie) != is_divided(stored, movie):
        reference = read_gain(
            source, rotation=step.gain_rotation, flip=step.gain_flip, shape=shape, divided=True
        )
    write_mrc(stored, reference, pixel_size=pixel_size)
    return stored


def _sizes(gain: tuple[int, ...], movie: tuple[int, int]) -> str:
    """Say both sizes (y, x) and how a reference of half or double the movies' is used; else nothing."""
    if (2 * gain[0], 2 * gain[1]) == movie:
        how = "each of its pixels stands for 2 × 2 of theirs"
    elif gain == (2 * movie[0], 2 * movie[1]):
        how = "the mean of 2 × 2 of its pixels stands for one of theirs"
    else:
        return ""
    return f"it is {gain[1]} × {gain[0]} px, the movies are {movie[1]} × {movie[0]}: {how}"


def _mean_frame(step: ImportMovies, headers: list[dict[str, Any]]) -> np.ndarray:
    import numpy as np

    from halfmap.io.movies import open_movie

    total, frames = np.zeros((headers[0]["height"], headers[0]["width"])), 0
    for header in headers:
        movie = open_movie(header["file"], eer_grouping=step.eer_grouping, eer_upsampling=step.eer_upsampling)
        for first in range(0, movie.n_frames, FRAMES_AT_A_TIME):
            part = movie.read(first, min(first + FRAMES_AT_A_TIME, movie.n_frames))
            sound = np.isfinite(part).all(axis=(1, 2))
            total += part[sound].sum(axis=0, dtype=np.float64)
            frames += int(sound.sum())
    if not frames:
        message = "the gain reference cannot be compared: every frame of the first movies holds NaN"
        raise FileFormatError(
            message, path=headers[0]["file"], hint="make the movies again, or leave them out"
        )
    return (total / frames).astype(np.float32)


def _check(step: ImportMovies, path: Path, headers: list[dict[str, Any]], *, sizes: str) -> None:
    from halfmap.io.gain import is_divided, rank_orientations

    divided = is_divided(path, headers[0]["file"])
    ranked = rank_orientations(path, _mean_frame(step, headers), divided=divided)
    given = next(
        (fit for fit in ranked if (fit.rotation, fit.flip) == (step.gain_rotation, step.gain_flip)), None
    )
    best = ranked[0]
    score = given.correlation if given else 0.0
    log.info("gain reference: correlation %.3f with the movies' mean frame as given", score)
    if score < -NOTICEABLE:
        raise ParameterError(
            f"is the reciprocal of what it should be (correlation {score:.2f} with the movies' mean frame)",
            path=path,
            hint="frames are multiplied by it: give 1 / reference, or --no-check-gain if you are sure",
        )
    if best.correlation < NOTICEABLE and sizes:
        raise ParameterError(
            f"the movies show no trace of this gain reference (correlation {best.correlation:.3f} at best); "
            f"{sizes}",
            path=path,
            hint="give the one of this camera and mode, or --no-check-gain if you are sure",
        )
    if best.correlation < NOTICEABLE:
        log.warning(
            "gain reference: the movies show no trace of it in any orientation (correlation %.3f at best); "
            "are they gain corrected already?",
            best.correlation,
        )
    elif best.correlation > CLEAR_MARGIN * score:
        raise ParameterError(
            f"fits the movies better with --gain-rotation {best.rotation} --gain-flip {best.flip} "
            f"(correlation {best.correlation:.2f}, as given {score:.2f})",
            path=path,
            hint="use those, or --no-check-gain if you are sure",
        )
