"""Correct the motion of one movie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.random import SeedSequence
from numpy.typing import NDArray

from halfmap.data.motion import MotionTracks, accumulated_motion, polynomial_terms
from halfmap.errors import FileFormatError, ParameterError
from halfmap.io.motion import write_tracks
from halfmap.io.movies import open_movie
from halfmap.io.mrc import write_mrc
from halfmap.log import log
from halfmap.ops.threads import in_threads, one_blas_thread
from halfmap.steps.motion import correct
from halfmap.steps.motion.estimate import Estimate, estimate_motion
from halfmap.steps.motion.frames import Frames, load_frames
from halfmap.steps.motion.sums import Sums, binned_shape, sum_frames

if TYPE_CHECKING:
    from halfmap.steps.motion.step import MotionStep

FOLDER = "Micrographs"

ALIGNMENT_PIXEL_A = 2.8
"""Frames are shrunk to pixels of about this size to be aligned. Finer detail than 8 Å adds little, but noise
that coarser pixels would fold onto it costs a sixth of the accuracy."""

FEWEST_FRAMES = 3
_MOST_GROUPS = 60
_LEAST_GROUP_DOSE = 0.5
NO_SIGNAL = 4.5
"""Peaks of pairs of frames over their noise, below which they may be noise themselves."""


@dataclass(frozen=True)
class MovieItem:
    """A movie of the table, its optics group's settings with it; plain data that a worker can be sent."""

    name: str
    key: str
    path: Path
    size: tuple[int, int, int] | None
    pixel_size: float
    dose_per_frame: float
    pre_exposure: float
    voltage_kV: float
    gain: str | None
    gain_path: Path | None
    defects: str | None
    defect_path: Path | None
    eer_grouping: int | None
    eer_upsampling: int | None

    @property
    def n_frames(self) -> int:
        """Frames of the movie."""
        return self._known_size[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(y, x) of a frame."""
        return self._known_size[1:]

    @property
    def reading(self) -> dict[str, int]:
        """What must be known to read the file: of EER how frames are summed and pixels divided."""
        if self.eer_grouping is None or self.eer_upsampling is None:
            return {}
        return {"eer_grouping": self.eer_grouping, "eer_upsampling": self.eer_upsampling}

    @property
    def _known_size(self) -> tuple[int, int, int]:
        if self.size is None:
            raise ValueError("the size of a movie must be known by now")
        return self.size


def correct_movie(item: MovieItem, *, step: MotionStep, folder: Path, device: str) -> dict[str, Any]:
    """Align a movie, sum it, write everything and return what the table needs.

    Raises
    ------
    FileFormatError, ShapeError, ParameterError
        If the movie, its gain reference or its defects are not what the table says.
    """
    item = _with_size(item)
    first, last = _frame_range(item, step)
    frames = load_frames(
        item.path,
        first=first,
        last=last,
        n_expected=item.n_frames,
        shape_expected=item.shape,
        gain_path=item.gain_path,
        defect_path=item.defect_path,
        detect=step.detect_bad_pixels,
        seed=SeedSequence(list(item.key.encode())),
        **item.reading,
    )
    groups = group_frames(last - first, step.grouping or _automatic_group(item, last - first))
    estimate = _estimate(frames, groups, item, step, first, device)
    tracks = make_tracks(estimate, groups, frames.hot, item, step, first, last)
    sums = sum_frames(frames, tracks, step, device)
    return _write(item, step, folder, tracks, estimate, sums)


def _with_size(item: MovieItem) -> MovieItem:
    if item.size is not None:
        return item
    movie = open_movie(item.path, **item.reading)
    return replace(item, size=(movie.n_frames, *movie.shape))


def _frame_range(item: MovieItem, step: MotionStep) -> tuple[int, int]:
    first, last = step.first_frame - 1, step.last_frame or item.n_frames
    if last > item.n_frames or last - first < FEWEST_FRAMES:
        message = f"has {item.n_frames} frames, of which fewer than {FEWEST_FRAMES} are to be aligned"
        if last > item.n_frames:
            message = f"has {item.n_frames} frames, and frames to {last} are asked for"
        hint = "change the range of frames, or leave the movie out"
        raise ParameterError(message, path=item.name, hint=hint)
    return first, last


def _automatic_group(item: MovieItem, n: int) -> int:
    """Frames to align together: enough dose to see something, few enough groups to compare them all."""
    enough = int(np.ceil(_LEAST_GROUP_DOSE / item.dose_per_frame - 1e-6))
    return max(1, min(enough, n // FEWEST_FRAMES), -(-n // _MOST_GROUPS))


def group_frames(n: int, size: int) -> list[range]:
    """Groups of neighbouring frames; what is left over makes the last ones longer, the first moves most."""
    count = max(min(n, FEWEST_FRAMES), n // size)
    lengths = np.full(count, n // count)
    if n % count:
        lengths[-(n % count) :] += 1
    ends = np.cumsum(lengths)
    return [range(end - length, end) for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)]


def _estimate(
    frames: Frames, groups: list[range], item: MovieItem, step: MotionStep, first: int, device: str
) -> Estimate:
    wanted = min(ALIGNMENT_PIXEL_A, 0.4 * step.alignment_resolution)
    factor = max(1, round(wanted / item.pixel_size))
    shrunk = correct.shrink_frames(frames.counts, frames.gain, factor, groups)
    middles = np.array([(group.start + group.stop) / 2 for group in groups])
    estimate = estimate_motion(
        shrunk,
        pixel_size=factor * item.pixel_size,
        dose=item.pre_exposure + (first + middles) * item.dose_per_frame,
        voltage_kV=item.voltage_kV,
        patch_size=step.patch_size,
        resolution=step.alignment_resolution,
        correlation_length=step.correlation_length,
        lengths=np.array([len(group) for group in groups], np.float64),
        largest=step.largest_motion,
        local=step.local,
        device=device,
    )
    _check_finite(estimate, item)
    if estimate.peak_height < NO_SIGNAL:
        log.warning(
            "%s: frames hardly correlate (peaks %.1f times their noise): its motion is a guess",
            item.name,
            estimate.peak_height,
        )
    return estimate


def _check_finite(estimate: Estimate, item: MovieItem) -> None:
    known = [estimate.track, estimate.track_error, estimate.grid, estimate.grid_error]
    if not all(np.isfinite(values).all() for values in known if values is not None):
        raise FileFormatError(
            "cannot be aligned, its frames hold nothing to align",
            path=item.name,
            hint="look at its frames, and leave the movie out if they are empty",
        )


def make_tracks(
    estimate: Estimate,
    groups: list[range],
    hot: NDArray,
    item: MovieItem,
    step: MotionStep,
    first: int,
    last: int,
) -> MotionTracks:
    """State an estimate for every frame, in pixels of the movie and as shifts, with RELION's polynomial."""
    n, pixel = last - first, item.pixel_size

    def each_frame(values: NDArray) -> NDArray:
        return _between_groups(values, groups, n)

    def each_error(values: NDArray) -> NDArray:
        # The first group's is zero: what is before its middle would be less.
        return np.maximum(each_frame(values), 0)

    track = each_frame(estimate.track)
    grid = grid_error = coefficients = None
    if estimate.grid is not None and estimate.grid_error is not None:
        grid, grid_error = each_frame(estimate.grid), each_error(estimate.grid_error)
        grid = grid - grid[:1]
        coefficients = fit_polynomial(-grid / pixel, item.shape)
    patches = np.moveaxis(each_frame(np.moveaxis(estimate.patches, 1, 0)), 0, 1)
    return MotionTracks(
        movie=item.name,
        shape=item.shape,
        n_frames=item.n_frames,
        first_frame=first + 1,
        last_frame=last,
        pixel_size=pixel,
        dose_per_frame=item.dose_per_frame,
        pre_exposure=item.pre_exposure,
        voltage_kV=item.voltage_kV,
        binning=binned_shape(item.shape, step.binning)[1],
        gain=item.gain,
        defects=item.defects,
        eer_grouping=item.eer_grouping,
        eer_upsampling=item.eer_upsampling,
        global_shift=-(track - track[0]) / pixel,
        global_error=each_error(estimate.track_error) / pixel,
        local_coefficients=coefficients,
        local_grid=None if grid is None else -grid / pixel,
        local_error=None if grid_error is None else grid_error / pixel,
        # Pixels count from the centre of the first, estimates from its edge.
        patch_centres=estimate.centres / pixel - 0.5,
        patch_shifts=-(patches - patches[:, :1]) / pixel,
        patch_errors=np.moveaxis(each_error(np.moveaxis(estimate.patch_error, 1, 0)), 0, 1) / pixel,
        hot_pixels=hot,
    )


def _between_groups(values: NDArray, groups: list[range], n: int) -> NDArray:
    """Values (groups, ...) at the middles of groups, for every frame, by a smooth curve through them."""
    if len(groups) == n:
        return values
    if not np.isfinite(values).all():  # errors that are not known
        return np.full((n, *values.shape[1:]), np.nan)
    from scipy.interpolate import CubicSpline

    middles = np.array([(group.start + group.stop - 1) / 2 for group in groups])
    frames = np.arange(n)
    inside = np.clip(frames, middles[0], middles[-1])
    # On exponential drifts a natural spline or a monotone one is off further at the first frame.
    curve = CubicSpline(middles, values, axis=0, bc_type="not-a-knot")
    slope = curve.derivative()
    beyond = (frames - inside).reshape(-1, *[1] * (values.ndim - 1))
    return curve(inside) + beyond * slope(inside)


def fit_polynomial(shift: NDArray, shape: tuple[int, int]) -> NDArray:
    """RELION's polynomial (2, 18) nearest to local shifts (n, gy, gx, 2) at nodes spread over the field."""
    n, gy, gx = shift.shape[:3]
    y, x = np.linspace(0, shape[0] - 1, gy), np.linspace(0, shape[1] - 1, gx)
    terms = polynomial_terms(x, y[:, None], np.arange(n)[:, None, None], shape).reshape(-1, 18)
    scale = np.abs(terms).max(axis=0)
    scale[scale == 0] = 1
    with one_blas_thread():
        solution = np.linalg.lstsq(terms / scale, shift.reshape(-1, 2), rcond=None)[0]
    return (solution / scale[:, None]).T


def _write(
    item: MovieItem, step: MotionStep, folder: Path, tracks: MotionTracks, estimate: Estimate, sums: Sums
) -> dict[str, Any]:
    """Write images, motion and picture; the row of the table as plain data, files relative to `folder`."""
    from halfmap.steps.motion import pictures

    pixel = item.pixel_size * tracks.binning
    dtype = np.float16 if step.float16 else np.float32
    whole = sums.even + sums.odd
    images = {"EVN": sums.even, "ODD": sums.odd} if step.even_odd else {}
    if sums.weighted is None:
        images[""] = whole
    else:
        images[""] = sums.weighted
        if step.unweighted:
            images["noDW"] = whole
    row: dict[str, Any] = {"name": item.name, "key": item.key}
    # Not with_suffix: names of movies hold dots.
    stem = f"{FOLDER}/{item.key}"
    for suffix in images:
        row[suffix or "micrograph"] = f"{stem}_{suffix}.mrc" if suffix else f"{stem}.mrc"
    row |= {"PS": f"{stem}_PS.mrc", "tracks": f"{stem}.star"}
    write_tracks(folder / row["tracks"], tracks)
    write_mrc(folder / row["PS"], sums.spectrum, pixel_size=sums.spectrum_pixel_size)
    writing = [
        partial(write_mrc, folder / row[suffix or "micrograph"], image, pixel_size=pixel, dtype=dtype)
        for suffix, image in images.items()
    ]
    if step.pictures:
        picture = partial(
            pictures.draw_movie,
            folder / f"{stem}.png",
            tracks,
            micrograph=whole,
            spectrum=sums.spectrum,
            spectrum_pixel_size=sums.spectrum_pixel_size,
            title=item.name if estimate.peak_height >= NO_SIGNAL else f"{item.name}: its motion is a guess",
        )
        writing.insert(0, picture)
    in_threads(_call, writing)
    total, early, late = accumulated_motion(tracks)
    error = tracks.global_error if tracks.local_error is None else tracks.local_error
    return row | {
        "binning": tracks.binning,
        "stretch": item.shape[0] / whole.shape[0] / tracks.binning - 1,
        "total": total,
        "early": early,
        "late": late,
        "error": float(error[1:].mean() * item.pixel_size),
        "spread": local_spread(tracks),
        "misfit": estimate.misfit,
        "peak_height": min(estimate.peak_height, 1e6),
        "bad_pixels": len(tracks.hot_pixels),
    }


def _call(task: Callable[[], None]) -> None:
    task()


def local_spread(tracks: MotionTracks) -> float | None:
    """Root mean square over field and frames of the local motion in Å; None where none was looked for."""
    if tracks.local_grid is None:
        return None
    return float(np.sqrt(np.square(tracks.local_grid).sum(axis=-1).mean()) * tracks.pixel_size)
