"""Bring a movie's frames into memory with their gain, bad pixels found and replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.random import SeedSequence
from numpy.typing import NDArray

from halfmap.errors import FileFormatError, ShapeError
from halfmap.io.binary import decoding_threads
from halfmap.io.defects import read_defects
from halfmap.io.gain import is_divided, read_gain
from halfmap.io.movies import Movie, open_movie
from halfmap.log import log
from halfmap.steps.motion import _pixels

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

EER_GROUPING, EER_UPSAMPLING = 32, 1
"""How an EER movie is read where nothing says otherwise: frames summed to one, parts of a pixel's edge."""

_STRIP_px = 128
"""Rows that a thread works on at once; each strip sums half a box above and below its own rows as well."""

_SAMPLED = 4
"""One strip in so many tells the spread of the pixels."""

_SUSPECT = 4.5
"""Spreads by which the fast comparison must find a pixel off, before it is looked at closely."""

_OUTLIER = 6.0
"""Spreads by which a bad pixel is off what its surroundings say."""

_ALONE = 5.0
"""Spreads by which it is off four fifths of its neighbours too, so that sharp features are left whole."""

_LARGEST_PART = 0.005
"""If more pixels than this part seem bad, they are not."""


_MAD = 1.4826
"""Standard deviations of a normal distribution to one median of the absolute deviation."""


@dataclass(frozen=True, eq=False)
class Frames:
    """Frames of a movie, ready to be aligned.

    Attributes
    ----------
    counts : array (n, h, w)
        In the file's own type, rows in MRC order, bad pixels replaced.
    gain : array (h, w), float32
        Factors to multiply the counts with; ones where there is no gain reference. At a bad pixel it is that
        of the pixels its counts come from.
    hot : array (m, 2), int32
        Bad pixels (x, y) found in this movie, in the movie's pixels and MRC order, beside those of gain 0 and
        those of the defect file.
    defective : int
        Pixels replaced in all.
    """

    counts: NDArray
    gain: NDArray[np.float32]
    hot: NDArray[np.int32]
    defective: int


@dataclass(frozen=True, eq=False)
class _Camera:
    """What all movies of a camera have in common; its arrays are shared and never written to.

    `gain` (h, w) is 0 where a pixel is known to be bad. `bad` (m,) are the flat indices of those pixels,
    `sources` (m, k) those of good pixels near them, of which there are `n_sources` (m,).
    """

    gain: NDArray[np.float32]
    bad: NDArray[np.int32]
    sources: NDArray[np.int32]
    n_sources: NDArray[np.int32]


def load_frames(
    path: str | Path,
    *,
    first: int,
    last: int,
    n_expected: int,
    shape_expected: tuple[int, int],
    gain_path: str | Path | None,
    defect_path: str | Path | None,
    eer_grouping: int = EER_GROUPING,
    eer_upsampling: int = EER_UPSAMPLING,
    detect: bool = True,
    seed: SeedSequence,
) -> Frames:
    """Read frames of a movie, and replace the pixels that are dead, defective or hot.

    Parameters
    ----------
    path : path
        Movie.
    first, last : int
        Frames first, ..., last - 1 are read, counted from 0.
    n_expected : int
        Frames that the table of movies says the file has; it may have more.
    shape_expected : tuple of 2 int
        (y, x) of a frame by that table.
    gain_path, defect_path : path or None
        Gain reference as `halfmap.io.gain.read_gain` takes it, already turned; defects as
        `halfmap.io.defects.read_defects` takes them.
    eer_grouping, eer_upsampling : int
        As in `halfmap.io.movies.open_movie`.
    detect : bool
        Whether to look for bad pixels that nothing lists.
    seed : SeedSequence
        Decides what bad pixels are replaced by, whatever the threads and the range of frames.

    Raises
    ------
    FileFormatError
        If the movie is cut short or corrupt, holds fewer frames than expected or not those asked, holds a
        frame that is zero all over, or NaN or infinity.
    ShapeError
        If the movie, its gain reference and its defects are not of one size.

    Notes
    -----
    A pixel is bad if the sum of its counts is off what the mean of a box around it says, the gain taken into
    account, and off at least four fifths of its neighbours too. Counts are compared by their square roots,
    whose spread does not depend on the mean [1]_, and the few suspects by their deviance, which is right in
    the tails as well; the unit is the spread over the image. Movies of real numbers or with negative ones
    were corrected by another program and are compared as they are, in units of the spread nearby.

    In every frame a bad pixel gets the count of a pixel drawn anew from the good ones around it. That keeps
    the mean and the statistics of the counts, and leaves no pattern that stays in place from frame to frame,
    which alignment would lock on to.

    References
    ----------
    .. [1] Anscombe 1948, Biometrika 35, 246-254, DOI 10.1093/biomet/35.3-4.246
    """
    path = Path(path)
    movie = open_movie(path, eer_grouping=eer_grouping, eer_upsampling=eer_upsampling)
    _check_movie(movie, first, last, n_expected, shape_expected)
    camera = _camera_of(movie, *(None if file is None else Path(file) for file in (gain_path, defect_path)))
    counts = _read_counts(movie, first, last)
    total = _sum_frames(path, counts, first)
    gain = camera.gain.copy()
    flat = gain.reshape(-1)
    hot = np.zeros(0, np.int32)
    if detect:
        counted = counts.dtype.kind != "f" and float(total.min()) >= 0
        hot = _find_bad(path, total, gain, counted)
    flat[hot] = 0
    bad = np.concatenate([camera.bad, hot])
    if bad.size:
        sources, n_sources = _sources(gain, hot)
        sources = np.concatenate([camera.sources, sources])
        n_sources = np.concatenate([camera.n_sources, n_sources])
        key = seed.generate_state(1, np.uint64)[0]
        frames = counts.reshape(len(counts), -1)

        def replace(frame: int) -> None:
            _pixels.replace(frames[frame], flat, bad, sources, n_sources, key, first + frame)

        _in_threads(replace, range(len(frames)))
        flat[bad] = _pixels.mean_gain(flat, sources, n_sources)
    y, x = np.divmod(hot, movie.shape[1])
    return Frames(counts, gain, np.column_stack([x, y]).astype(np.int32), int(bad.size))


def _check_movie(
    movie: Movie, first: int, last: int, n_expected: int, shape_expected: tuple[int, int]
) -> None:
    if movie.shape != tuple(shape_expected):
        message = f"is {movie.shape[0]} x {movie.shape[1]} px (y, x), its table says "
        message += f"{shape_expected[0]} x {shape_expected[1]}"
        raise ShapeError(message, path=movie.path, hint="import the movies again")
    if movie.n_frames < n_expected:
        message = f"holds {movie.n_frames} frames, its table says {n_expected}"
        raise FileFormatError(message, path=movie.path, hint="copy or transfer the file again")
    if not 0 <= first < last <= movie.n_frames:
        message = f"holds {movie.n_frames} frames, {first + 1} to {last} were asked"
        raise FileFormatError(message, path=movie.path, hint="check the frame range")


def _read_counts(movie: Movie, first: int, last: int) -> NDArray:
    """Frames in a type that the kernels know, in an array that may be changed."""
    counts = movie.read(first, last)
    if counts.dtype == np.float16:
        counts = counts.astype(np.float32)
    if counts.dtype.kind not in "iuf":
        message = f"holds numbers of the type {counts.dtype}, which is not a camera's"
        raise FileFormatError(message, path=movie.path, hint="give 8 or 16 bit counts or float32")
    return np.require(counts, requirements=["C", "W"])


def _camera_of(movie: Movie, gain_path: Path | None, defect_path: Path | None) -> _Camera:
    """Gain and known defects of a movie's camera; a file that does not fit is told as the movie's fault."""
    divided = gain_path is not None and is_divided(gain_path, movie.path)
    try:
        return _read_camera(
            gain_path, _changed(gain_path), defect_path, _changed(defect_path), movie.shape, divided
        )
    except ShapeError as error:
        file = defect_path if error.path == defect_path else gain_path
        raise ShapeError(f"does not fit {file}: {error.message}", path=movie.path, hint=error.hint) from error


def _changed(path: Path | None) -> int | None:
    """When a file was last changed, so that a new one of the same name is read anew."""
    try:
        return None if path is None else path.stat().st_mtime_ns
    except OSError:
        return None  # its reader says what is wrong


@lru_cache(1)
def _read_camera(
    gain_path: Path | None,
    gain_changed: int | None,
    defect_path: Path | None,
    defect_changed: int | None,
    shape: tuple[int, int],
    divided: bool,
) -> _Camera:
    gain = np.ones(shape, np.float32)
    if gain_path is not None:
        gain = read_gain(gain_path, shape=shape, divided=divided)
    if defect_path is not None:
        # Nothing but this cache holds the gain, which nothing but `_Camera` will see.
        gain[read_defects(defect_path, shape=shape)] = 0
    bad = np.flatnonzero(gain.reshape(-1) <= 0).astype(np.int32)
    if bad.size == gain.size:
        file = defect_path if defect_path is not None else gain_path
        raise ShapeError("leaves no pixel that is good", path=file)
    camera = _Camera(gain, bad, *_sources(gain, bad))
    for array in (camera.gain, camera.bad, camera.sources, camera.n_sources):
        array.setflags(write=False)
    return camera


def _sources(gain: NDArray[np.float32], bad: NDArray[np.int32]) -> tuple[NDArray, NDArray]:
    """Good pixels near each bad one, and their number."""
    parts = np.array_split(bad, decoding_threads()) if bad.size > 1000 else [bad]
    found = _in_threads(lambda part: _pixels.find_sources(gain, part), parts)
    return np.concatenate([part[0] for part in found]), np.concatenate([part[1] for part in found])


def _sum_frames(path: Path, counts: NDArray, first: int) -> NDArray[np.float32]:
    """Sum of the frames (h, w); an error where one is empty or holds what is no number."""
    for number, frame in enumerate(counts, start=first + 1):
        if not frame.any():
            message = f"frame {number} is zero all over"
            raise FileFormatError(message, path=path, hint="copy the file again or leave the frame out")
    height, width = counts.shape[1:]
    total = np.empty((height, width), np.float32)
    kind = np.float32 if counts.dtype.kind == "f" else np.int32

    def add(strip: tuple[int, int]) -> None:
        _pixels.sum_frames(counts, *strip, np.empty(width, kind), total)

    _in_threads(add, _strips(height))
    if kind is np.float32 and not np.isfinite(total).all():
        wrong = [n for n, frame in enumerate(counts, start=first + 1) if not np.isfinite(frame).all()]
        where = f"frame {wrong[0]}" if wrong else "the sum of its frames"
        message = f"holds NaN or infinite values in {where}"
        raise FileFormatError(message, path=path, hint="make the movie again")
    return total


def _find_bad(path: Path, total: NDArray[np.float32], gain: NDArray[np.float32], counted: bool) -> NDArray:
    """Flat indices of pixels of the sum (h, w) that are off their surroundings; gain 0 is passed over."""
    height, width = total.shape
    tiles = _measure_tiles(total, gain, counted)
    strips = _strips(height)

    def deviations(strip: tuple[int, int]) -> NDArray[np.float32]:
        out = np.empty((strip[1] - strip[0], width), np.float32)
        _pixels.deviations(total, gain, *tiles, *strip, counted, out)
        return out

    def sample(strip: tuple[int, int]) -> NDArray[np.float32]:
        found = deviations(strip)[::3, ::3]
        return np.abs(found[found != 0])

    sampled = np.concatenate(_in_threads(sample, strips[len(strips) // 2 % _SAMPLED :: _SAMPLED]))
    # Counts cannot spread less than by chance; where they seem to, they are few. Numbers are in units of the
    # spread nearby, which is larger than that of even places where the image has edges.
    scale = max(1.0, float(np.median(sampled)) * _MAD) if sampled.size else 1.0

    def outliers(strip: tuple[int, int]) -> NDArray[np.int32]:
        found = deviations(strip).reshape(-1)
        suspects = np.flatnonzero(np.abs(found) > _SUSPECT * scale)
        places = (suspects + strip[0] * width).astype(np.int32)
        off, alone = _look_closely(total, gain, tiles[1], places, found[suspects], counted)
        return places[(np.abs(off) > _OUTLIER * scale) & (alone * np.sign(off) > _ALONE * scale)]

    bad = np.concatenate(_in_threads(outliers, strips))
    if bad.size > _LARGEST_PART * total.size:
        log.warning(
            "%s: %d pixels (%.1f %%) seem bad, too many to be; none of them is replaced",
            path.name,
            bad.size,
            100 * bad.size / total.size,
        )
        return np.zeros(0, np.int32)
    return bad


def _measure_tiles(
    total: NDArray[np.float32], gain: NDArray[np.float32], counted: bool
) -> tuple[NDArray, NDArray]:
    """Median and spread of gain-corrected counts in tiles; those of the others where they are not known."""
    tiles = tuple(-(-size // _pixels.TILE_px) for size in total.shape)
    centre, spread = np.empty(tiles, np.float32), np.empty(tiles, np.float32)
    _in_threads(lambda row: _pixels.measure_tiles(total, gain, row, counted, centre, spread), range(tiles[0]))
    for values, otherwise in ((centre, 0), (spread, 1)):
        known = np.isfinite(values)
        values[~known] = np.median(values[known]) if known.any() else otherwise
    return centre, spread


def _look_closely(
    total: NDArray[np.float32],
    gain: NDArray[np.float32],
    spread: NDArray[np.float32],
    places: NDArray[np.int32],
    found: NDArray[np.float32],
    counted: bool,
) -> tuple[NDArray, NDArray]:
    """How far the pixels at `places` are off the box around them, and off four fifths of their neighbours."""
    seen, factor = total.reshape(-1)[places], gain.reshape(-1)[places]
    above, below = _pixels.neighbour_levels(total, gain, places)
    level = np.where(found > 0, above, below)
    if counted:
        # What the box says, from the difference of the square roots.
        expected = np.square(np.maximum(np.sqrt(seen + 0.375) - found / 2, 0)) - 0.375
        return _surprise(seen, expected), _surprise(seen, level / factor)
    y, x = np.divmod(places, total.shape[1])
    return found, (seen * factor - level) / spread[y // _pixels.TILE_px, x // _pixels.TILE_px]


def _surprise(seen: NDArray, expected: NDArray) -> NDArray:
    """Signed root of the deviance of Poisson counts: as many standard deviations of a normal distribution.

    It holds in the tails, where the difference of square roots does not: 31 counts where 7 are expected are
    6.7 standard deviations off, and 5.8 by their roots.
    """
    expected = np.maximum(expected, 1e-3)
    ratio = np.where(seen > 0, seen, 1) / expected
    deviance = 2 * (seen * np.log(ratio) - (seen - expected))
    return np.sign(seen - expected) * np.sqrt(np.maximum(deviance, 0))


def _strips(height: int) -> list[tuple[int, int]]:
    return [(y, min(y + _STRIP_px, height)) for y in range(0, height, _STRIP_px)]


def _in_threads(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """Results of `function` for every item, called in threads; the kernels hold no lock."""
    threads = min(decoding_threads(), len(items))
    if threads <= 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))
