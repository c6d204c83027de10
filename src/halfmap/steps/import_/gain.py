"""Orient the gain reference and make sure that it fits the movies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfmap.engine import Context
from halfmap.errors import FileFormatError, HalfmapError, ParameterError
from halfmap.log import log

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from halfmap.io.gain import GainOrientation
    from halfmap.steps.import_.step import ImportMovies

MOVIES_IN_CHECK = 4
"""Movies averaged for the check, spread over all: specimen and hot pixels of one must not decide."""

FRAMES_IN_CHECK = 8
"""Of each of them at least: millions of pixels show a gain at a hundredth of an electron a frame."""

PIXELS_AT_A_TIME = 2**26
"""Read of a movie at once; of small frames as many are taken as have this many pixels."""

PLAIN = 0.25
"""Part of the reference's pattern that the frames must show, in any orientation, to be said to show it. Less
is left where the camera's software has corrected them with an older reference."""

TELLING = 0.05
"""Error of that part by chance above which nothing is said."""

SURE = 8.0
"""Errors by which another orientation must be better to stop the import."""

NOTICEABLE = 0.1
"""Part of the pattern by which it must be better, too: no reference is perfect."""

STORED = "gain.mrc"
"""In the job's folder."""

_INSIST = "or --no-check-gain if you are sure"


def look_first(step: ImportMovies, ctx: Context, files: Sequence[Path]) -> None:
    """Read the reference and the headers of some movies, before all of them are examined.

    Raises
    ------
    FileFormatError
        If the reference cannot be read.
    ShapeError
        If it fits none of these movies, whichever way it is turned.
    """
    if step.gain is None:
        return
    from halfmap.io.gain import match_gain, may_fit, read_gain
    from halfmap.io.movies import open_movie

    source = ctx.resolve(step.gain)
    if _is_kept(source, ctx):
        return
    reference, shapes = read_gain(source), []
    for file in files[:: -(-len(files) // MOVIES_IN_CHECK)]:
        try:
            movie = open_movie(file, eer_grouping=step.eer_grouping, eer_upsampling=step.eer_upsampling)
        except HalfmapError:
            continue  # its turn comes
        shapes.append(movie.shape)
    if shapes and not any(may_fit(reference.shape, shape) for shape in shapes):
        match_gain(reference, shapes[0], path=source)  # raises


def orient(
    step: ImportMovies, ctx: Context, headers: list[dict[str, Any]], *, pixel_size: float
) -> Path | None:
    """Turn the gain reference as asked, check it against the movies, store it in the job folder.

    Where the reference is gone, what an earlier run has stored is taken. Movies that are gone have no part in
    the check.

    Raises
    ------
    ParameterError
        If the reference clearly fits the mean frame better in another orientation or as its reciprocal, whose
        options are named, or is of another size and fits in none.
    ShapeError
        If it fits the frames in no orientation.
    """
    if step.gain is None:
        return None
    from halfmap.io.gain import is_divided, match_gain, read_gain
    from halfmap.io.mrc import write_mrc

    source, stored = ctx.resolve(step.gain), ctx.folder / STORED
    if _is_kept(source, ctx):
        log.warning("%s is gone: the gain reference is taken as it was stored before", source)
        ctx.decisions.note("gain", [])  # checked again when it is back
        return stored
    shape = headers[0]["height"], headers[0]["width"]
    movie = headers[0]["file"]
    reference = read_gain(source, rotation=step.gain_rotation, flip=step.gain_flip)
    # RELION refuses two sizes, but for EER it has the gain of physical pixels serve super-resolution, too.
    is_eer = movie.lower().endswith(".eer") and step.eer_upsampling == 2
    sizes = "" if is_eer else _sizes(reference.shape, shape)
    stat = source.stat()
    checked = [f"{source.name} {stat.st_size} {stat.st_mtime:.3f}", *(header["file"] for header in headers)]
    if step.check_gain and not ctx.decisions.hold("gain", checked):
        there = [header for header in headers if Path(header["file"]).exists()]
        if there:
            _check(step, source, there[:: -(-len(there) // MOVIES_IN_CHECK)], sizes=sizes)
        ctx.decisions.note("gain", checked)
    reference = match_gain(reference, shape, path=source)
    if sizes:
        log.warning("gain reference: %s; make sure that it was taken with this camera and mode", sizes)
    # What is stored means the same to RELION, which divides EER movies by all but the camera's own format.
    if _is_divided(step, source, movie) != is_divided(stored, movie):
        reference = read_gain(
            source, rotation=step.gain_rotation, flip=step.gain_flip, shape=shape, divided=True
        )
    write_mrc(stored, reference, pixel_size=pixel_size)
    return stored


def _is_kept(source: Path, ctx: Context) -> bool:
    """Whether the reference is gone, but stored by an earlier run of the job."""
    return not source.exists() and (ctx.folder / STORED).exists()


def _is_divided(step: ImportMovies, source: Path, movie: str) -> bool:
    from halfmap.io.gain import is_divided

    return is_divided(source, movie) != step.gain_inverse


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
    """Mean of the first frames of some movies, those with NaN passed over."""
    import numpy as np

    from halfmap.io.movies import open_movie

    pixels = headers[0]["height"] * headers[0]["width"]
    total, frames = np.zeros((headers[0]["height"], headers[0]["width"]), np.float32), 0
    for header in headers:
        movie = open_movie(header["file"], eer_grouping=step.eer_grouping, eer_upsampling=step.eer_upsampling)
        last = min(movie.n_frames, max(FRAMES_IN_CHECK, PIXELS_AT_A_TIME // pixels))
        at_once = max(1, PIXELS_AT_A_TIME // pixels)
        for first in range(0, last, at_once):
            for frame in movie.read(first, min(first + at_once, last)):
                if np.isfinite(frame).all():
                    total += frame
                    frames += 1
    if not frames:
        message = "the gain reference cannot be compared: every frame of the first movies holds NaN"
        raise FileFormatError(
            message, path=headers[0]["file"], hint="make the movies again, or leave them out"
        )
    return total / frames


def _check(step: ImportMovies, path: Path, headers: list[dict[str, Any]], *, sizes: str) -> None:
    from halfmap.io.gain import rank_orientations

    divided = _is_divided(step, path, headers[0]["file"])
    ranked = rank_orientations(path, _mean_frame(step, headers), divided=divided)
    judge(step, path, ranked, sizes=sizes)


def judge(step: ImportMovies, path: Path, ranked: Sequence[GainOrientation], *, sizes: str = "") -> None:
    """Stop the import where the reference is not what was stated, warn where the movies do not show it.

    Parameters
    ----------
    step : ImportMovies
        Orientation as given.
    path : Path
        The reference.
    ranked : sequence of GainOrientation
        As `halfmap.io.gain.rank_orientations` gives them.
    sizes : str
        What is said of a reference of half or double the movies' pixels, which must show in them.

    Raises
    ------
    ParameterError
        With the options that mend it.
    """
    best = ranked[0]
    if not best.error <= TELLING:
        log.info("gain reference: not checked, too few electrons (or it is flat) to tell its orientation")
        return
    given = next((f for f in ranked if (f.rotation, f.flip) == (step.gain_rotation, step.gain_flip)), None)
    correlation, share = (given.correlation, given.share) if given else (0.0, 0.0)
    log.info("gain reference: correlation %.3f with the movies' mean frame as given", correlation)
    if abs(best.share) < PLAIN:
        _say_no_trace(path, best.correlation, sizes)
        return
    turn = f"--gain-rotation {best.rotation} --gain-flip {best.flip}"
    turned = abs(best.share) - abs(share) > max(NOTICEABLE, SURE * best.error)
    if best.share < 0:
        options = "--no-gain-inverse" if step.gain_inverse else "--gain-inverse"
        where = ""
        if turned:
            options, where = f"{options} {turn}", f" when turned by {turn}"
        message = (
            f"is the reciprocal of what it should be (correlation {best.correlation:.2f} with the movies' "
            f"mean frame{where})"
        )
        raise ParameterError(message, path=path, hint=f"use {options}, {_INSIST}")
    if turned:
        message = (
            f"fits the movies better with {turn} (correlation {best.correlation:.2f}, as given "
            f"{correlation:.2f})"
        )
        raise ParameterError(message, path=path, hint=f"use those, {_INSIST}")


def _say_no_trace(path: Path, correlation: float, sizes: str) -> None:
    """Warn that frames seem corrected already; of a reference of another size that is an error."""
    if sizes:
        message = f"the movies show no trace of this gain reference (correlation {correlation:.3f} at best)"
        hint = f"give the one of this camera and mode, {_INSIST}"
        raise ParameterError(f"{message}; {sizes}", path=path, hint=hint)
    log.warning(
        "gain reference: the movies show no trace of it in any orientation (correlation %.3f at best); "
        "are they gain corrected already? Then import them without --gain, or it is applied twice",
        correlation,
    )
