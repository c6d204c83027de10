"""Orient the gain reference and make sure that it fits the movies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfmap.engine import Context
from halfmap.errors import ParameterError
from halfmap.log import log

if TYPE_CHECKING:
    import numpy as np

    from halfmap.steps.import_.step import ImportMovies

MOVIES_IN_CHECK = 4
"""Movies averaged for the check: a gain's pattern stands out of the counts of a hundred frames."""

CLEAR_MARGIN = 2.0
"""Another orientation must correlate this many times better than the given one to stop the import."""


def orient(step: ImportMovies, ctx: Context, headers: list[dict[str, Any]]) -> Path | None:
    """Turn the gain reference as asked, check it against the movies, store it in the job folder.

    Raises
    ------
    ParameterError
        If the reference clearly fits the mean frame better in another orientation; names that one.
    """
    if step.gain is None:
        return None
    from halfmap.io.gain import read_gain
    from halfmap.io.mrc import write_mrc

    path = ctx.folder / "gain.mrc"
    shape = headers[0]["height"], headers[0]["width"]
    if step.check_gain:
        _check(step, ctx.resolve(step.gain), _mean_frame(step, headers[:MOVIES_IN_CHECK]))
    reference = read_gain(ctx.resolve(step.gain), rotation=step.gain_rotation, flip=step.gain_flip, shape=shape)
    write_mrc(path, reference, pixel_size=step.pixel_size or headers[0]["pixel_size"] or 1.0)
    return path


def _mean_frame(step: ImportMovies, headers: list[dict[str, Any]]) -> np.ndarray:
    import numpy as np

    from halfmap.io.movies import open_movie

    total, frames = np.zeros((headers[0]["height"], headers[0]["width"])), 0
    for header in headers:
        movie = open_movie(Path(header["file"]), eer_grouping=step.eer_grouping, eer_upsampling=step.eer_upsampling)
        for first in range(0, movie.n_frames, 8):
            part = movie.read(first, min(first + 8, movie.n_frames))
            total += part.sum(axis=0, dtype=np.float64)
            frames += len(part)
    return (total / frames).astype(np.float32)


def _check(step: ImportMovies, path: Path, mean_frame: np.ndarray) -> None:
    from halfmap.io.gain import rank_orientations

    ranked = rank_orientations(path, mean_frame)
    given = next((fit for fit in ranked if (fit.rotation, fit.flip) == (step.gain_rotation, step.gain_flip)), None)
    best = ranked[0]
    score = given.correlation if given else 0.0
    log.info("gain reference: correlation %.3f with the inverse mean frame as given", score)
    if best is given or best.correlation < max(CLEAR_MARGIN * score, 0.05):
        return
    raise ParameterError(
        f"fits the movies better turned by --gain-rotation {best.rotation} --gain-flip {best.flip} "
        f"(correlation {best.correlation:.2f}, as given {score:.2f})",
        path=path,
        hint="use those, or --no-check-gain if you are sure",
    )
