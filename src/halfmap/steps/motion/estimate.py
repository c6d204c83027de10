"""Where the specimen is in every frame: the whole field first, then field and patches together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.fft import next_fast_len

from halfmap.errors import ShapeError
from halfmap.ops.threads import in_threads, one_blas_thread
from halfmap.steps.motion._correct_kernels import shrink
from halfmap.steps.motion._likelihood_kernels import cut_patch
from halfmap.steps.motion.likelihood import (
    Band,
    PatchSpectra,
    Spectrum,
    damage_of,
    make_band,
    measure_spectrum,
    patch_spectra,
    smear_of,
)
from halfmap.steps.motion.pairs import pair_tracks, soft_edge
from halfmap.steps.motion.prior import SpaceModes, space_modes, time_modes

_TRACK_PIXEL_A = 14.0
"""Pixels that are fine enough to find the track of the whole field."""

_COARSEST_A = 400.0
_TAPER = 0.04
_OUTLIER = 6.0
"""Standard deviations at which pixels are cut: one ray must not steer a patch."""

_ROUNDS = 20
_SETTLED_A = 0.1
"""Steps smaller than this, nowhere larger, end the search."""

_SETTLED_SPREAD = 0.05
"""And so does a change of the strength of local motion by less than this part."""

_LARGEST_STEP_A = 8.0
_FIRST_SPREAD_A = 6.0
_SPREADS_A = 0.05, 30.0
"""Standard deviation of local motion that is assumed at first, and between what it may be found to be."""

_TRACK_SPREAD_A = 50.0
"""Standard deviation of a step of the whole field: no constraint where anything is seen."""

NODES = 9
"""Nodes along each axis that the local motion is stated on."""

_FEWEST_PATCHES = 9
_SMALLEST_FIELD_A = 250.0

_DARK = 0.5
"""Of the median brightness: what is darker is grid, aperture or gold and no specimen."""

_COARSE_A = 45.0
_MARGIN_A = 120.0
"""How far from the dark the field fades in; edges of shadows stand still while the specimen moves."""

_PATCH_SPREAD_A = 5.0
"""Standard deviation assumed of the local motion of a patch that is looked at alone."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """Displacements of the specimen against the first frame, (x, y) in Å.

    Attributes
    ----------
    track : array (n, 2)
        Of the whole field.
    track_error : array (n,)
        Standard error of that along an axis.
    grid : array (n, NODES, NODES, 2) or None
        What comes to it at nodes spread evenly over the field, both edges included.
    grid_error : array (n, NODES, NODES) or None
        Standard error along an axis of track and grid together.
    centres : array (p, 2)
        Centres of the patches in Å.
    patches : array (p, n, 2)
        Displacements against the track by each patch alone, smooth in time; NaN without local motion.
    patch_error : array (p, n)
        Standard errors of those.
    spread : float
        Standard deviation in Å of local motion, as found.
    misfit : float
        Scatter of the patches about the model over what their noise explains; errors were multiplied by it.
    peak_height : float
        See `pair_tracks`.
    rounds : int
        Steps of the search.
    """

    track: NDArray
    track_error: NDArray
    grid: NDArray | None
    grid_error: NDArray | None
    centres: NDArray
    patches: NDArray
    patch_error: NDArray
    spread: float
    misfit: float
    peak_height: float
    rounds: int


@dataclass(frozen=True, eq=False)
class _Layout:
    """Patches of a field: their first rows and columns, shape, and centres in Å."""

    top: NDArray
    left: NDArray
    shape: tuple[int, int]
    centres: NDArray


class _Patches:
    """Patches (n, h, w) that follow the whole field to the pixel: no mean, no outliers, soft edges.

    Each is cut when it is asked for; all together they would take as much memory as the frames.
    """

    def __init__(self, frames: NDArray[np.float32], layout: _Layout, offset: NDArray) -> None:
        self.frames, self.layout, self.offset = frames, layout, offset
        self.edges = soft_edge(layout.shape[0], _TAPER), soft_edge(layout.shape[1], _TAPER)
        # Of a few thousand pixels of each frame: the spread needs no more.
        spread = np.sqrt(np.mean([np.var(frame[::31, ::7]) for frame in frames]))
        self.limit = np.float32(_OUTLIER * spread)

    def __len__(self) -> int:
        return len(self.layout.top)

    def __getitem__(self, number: int, /) -> NDArray[np.float32]:
        patch = np.empty((len(self.frames), *self.layout.shape), np.float32)
        top, left = self.layout.top[number], self.layout.left[number]
        cut_patch(self.frames, top, left, self.offset, self.edges, self.limit, patch)
        return patch


def estimate_motion(
    frames: NDArray[np.float32],
    *,
    pixel_size: float,
    dose: NDArray,
    voltage_kV: float,
    patch_size: float,
    resolution: float,
    correlation_length: float,
    largest: float,
    lengths: NDArray | None = None,
    local: bool = True,
    device: str = "cpu",
) -> Estimate:
    """Estimate the motion of a movie.

    All pairs of frames give the track of the whole field. Then the likelihood of all displacements at once
    (`halfmap.steps.motion.likelihood`) times the prior of local motion (`prior`) is climbed by Fisher's
    scoring: the track is free in every frame, local motion is a combination of smooth modes. Spectra of
    specimen and noise, the specimen's power in each patch and the strength of local motion are measured on
    the way, so nothing is tuned to a data set. The inverse information is the error of every displacement.

    Parameters
    ----------
    frames : array (n, h, w)
        Gain-corrected frames, or sums of neighbouring ones, with pixels of a few Å.
    pixel_size : float
        Their pixel size in Å.
    dose : array (n,)
        Dose in e/Å² at the middle of each.
    voltage_kV : float
        Acceleration voltage.
    patch_size : float
        Wanted side of the patches in Å.
    resolution : float
        Finest detail used, Å.
    correlation_length : float
        Distance in Å over which local motion is alike.
    largest : float
        Largest displacement between two frames, Å.
    lengths : array (n,), optional
        Number of frames in each of the sums; all alike if not given.
    local : bool
        Whether the field may deform.
    device : str
        Where the heavy part runs.

    Raises
    ------
    ShapeError
        If the field is too small to see motion in.

    References
    ----------
    .. [1] Zheng et al. 2017, Nat. Methods 14, 331-332, DOI 10.1038/nmeth.4193 (patches)
    .. [2] Zivanov, Nakane & Scheres 2019, IUCrJ 6, 5-17, DOI 10.1107/S205225251801463X (motion as a Gaussian
       process)
    .. [3] MacKay 1992, Neural Comput. 4, 415-447, DOI 10.1162/neco.1992.4.3.415 (strength of the prior)
    """
    n, h, w = frames.shape
    if min(h, w) * pixel_size < _SMALLEST_FIELD_A:
        raise ShapeError(
            f"a field of {h * pixel_size:.0f} x {w * pixel_size:.0f} Å is too small to see motion in",
            hint=f"{_SMALLEST_FIELD_A:.0f} Å are the least: is the pixel size of the movies right?",
        )
    relative = np.ones(n) if lengths is None else lengths / np.mean(lengths)
    frames = _without_shadows(frames, pixel_size)
    if np.ptp(relative) > 0:
        frames = frames / np.sqrt(relative)[:, None, None].astype(np.float32)
    factor = max(1, round(_TRACK_PIXEL_A / pixel_size))
    with one_blas_thread():
        track, height = pair_tracks(
            _shrunk(frames, factor), pixel_size=factor * pixel_size, largest=largest, device=device
        )
    layout = _lay_out((h, w), pixel_size, patch_size)
    n_patches = len(layout.centres)
    offset = np.rint(track / pixel_size).astype(np.int64)
    band = make_band(
        layout.shape,
        pixel_size=pixel_size,
        low=1 / _COARSEST_A,
        high=min(1 / resolution, 0.48 / pixel_size),
        independent=float(np.prod([_independent(side) for side in layout.shape])),
    )
    spectra = patch_spectra(_Patches(frames, layout, offset), band, device)
    damage = damage_of(band.centre, dose, voltage_kV=voltage_kV) * np.sqrt(relative)[:, None]
    size = h * pixel_size, w * pixel_size
    with one_blas_thread():
        modes, in_time = space_modes(size, length=correlation_length), time_modes(dose)
    in_space = modes(layout.centres)
    if not local or n_patches < _FEWEST_PATCHES:
        in_space, in_time = np.zeros((n_patches, 0)), np.zeros((n, 0))
    search = _Search(spectra, band, damage, in_space, in_time, track, offset * pixel_size)
    with one_blas_thread():
        rounds = search.climb()
        return search.result(layout.centres, modes, size, height, rounds)


class _Search:
    """The climb to the most probable displacements."""

    def __init__(
        self,
        spectra: PatchSpectra,
        band: Band,
        damage: NDArray,
        in_space: NDArray,
        in_time: NDArray,
        track: NDArray,
        cut: NDArray,
    ) -> None:
        self.spectra, self.band, self.damage, self.faded = spectra, band, damage, damage
        self.in_space, self.in_time = in_space, in_time
        self.track, self.local = track.copy(), np.zeros((in_space.shape[1], in_time.shape[1], 2))
        self.turned = np.broadcast_to(cut, (len(in_space), *cut.shape)).astype(np.float64)
        self.spread = _FIRST_SPREAD_A
        self.power = spectra.power()
        self.spectrum: Spectrum

    def displacements(self) -> NDArray:
        """Of every patch in every frame, (p, n, 2) in Å."""
        local = np.einsum("ps,ft,stx->pfx", self.in_space, self.in_time, self.local)
        return self.track + local

    def climb(self) -> int:
        """Step until nothing moves; the number of steps."""
        for number in range(1, _ROUNDS + 1):
            gradient, information = self._look()
            step_track, step_local, covariance = self._solve(gradient, information)
            moved = step_track + np.einsum("ps,ft,stx->pfx", self.in_space, self.in_time, step_local)
            largest = float(np.abs(moved).max())
            length = min(1.0, _LARGEST_STEP_A / max(largest, 1e-9))
            self.track, self.local = self.track + length * step_track, self.local + length * step_local
            before = self.spread
            self._rate_spread(covariance)
            if largest < _SETTLED_A and abs(np.log(self.spread / before)) < _SETTLED_SPREAD:
                return number
        return _ROUNDS

    def _look(self) -> tuple[NDArray, NDArray]:
        """Gradient (p, n, 2) and expected information (p, n, n) at the present displacements."""
        wanted = self.displacements()
        self.faded = self.damage * smear_of(self.band.centre, self.track)
        aligned = self.spectra.turn(wanted - self.turned, self.faded)
        self.turned = wanted
        self.spectrum = measure_spectrum(aligned, self.power, self.band, self.faded)
        gradient = self.spectra.gradients(self.spectrum.weights(self.faded), self.faded)
        return gradient, self.spectrum.information(self.band, self.faded)

    def _system(self, information: NDArray) -> NDArray:
        """Information about the track after the first frame, then about the modes; prior included."""
        n, n_modes = len(self.track), self.in_space.shape[1] * self.in_time.shape[1]
        system = np.zeros((n - 1 + n_modes, n - 1 + n_modes))
        steps = (np.eye(n)[1:] - np.eye(n)[:-1])[:, 1:] / _TRACK_SPREAD_A
        system[: n - 1, : n - 1] = information.sum(axis=0)[1:, 1:] + steps.T @ steps
        across = np.einsum("pfg,gt->pft", information, self.in_time)
        mixed = np.einsum("pft,ps->fst", across, self.in_space).reshape(n, n_modes)[1:]
        inner = np.einsum("ft,pfu->ptu", self.in_time, across)
        outer = np.einsum("ps,pr->psr", self.in_space, self.in_space)
        both = np.einsum("psr,ptu->stru", outer, inner, optimize=True).reshape(n_modes, n_modes)
        system[: n - 1, n - 1 :], system[n - 1 :, : n - 1] = mixed, mixed.T
        system[n - 1 :, n - 1 :] = both + np.eye(n_modes) / self.spread**2
        return system

    def _solve(self, gradient: NDArray, information: NDArray) -> tuple[NDArray, NDArray, NDArray]:
        n = len(self.track)
        steps = (np.eye(n)[1:] - np.eye(n)[:-1]) / _TRACK_SPREAD_A
        pull = gradient.sum(axis=0) - steps.T @ (steps @ self.track)
        by_mode = np.einsum("ps,ft,pfx->stx", self.in_space, self.in_time, gradient)
        by_mode -= self.local / self.spread**2
        covariance = np.linalg.inv(self._system(information))
        solution = covariance @ np.concatenate([pull[1:], by_mode.reshape(-1, 2)])
        track = np.concatenate([np.zeros((1, 2)), solution[: n - 1]])
        return track, solution[n - 1 :].reshape(self.local.shape), covariance

    def _rate_spread(self, covariance: NDArray) -> None:
        """MacKay's update of the strength of local motion: its size over what the data determined of it."""
        if self.local.size == 0:
            return
        determined = max(self._determined(covariance), 0.5)
        spread = np.sqrt(float(np.square(self.local).sum()) / (2 * determined))
        self.spread = float(np.clip(spread, *_SPREADS_A))

    def _determined(self, covariance: NDArray) -> float:
        """How many of the modes, along one axis, the data determine and not the prior."""
        first = len(self.track) - 1
        return len(covariance) - first - float(np.trace(covariance[first:, first:])) / self.spread**2

    def result(
        self,
        centres: NDArray,
        modes: SpaceModes,
        size: tuple[float, float],
        height: float,
        rounds: int,
    ) -> Estimate:
        """State the motion and its errors at the place where the climb ended."""
        n = len(self.track)
        gradient, information = self._look()
        _, _, covariance = self._solve(gradient, information)
        misfit = self._misfit(gradient, information, covariance)
        track, grid, grid_error = self.track, None, None
        variance = np.concatenate([[0.0], np.diag(covariance)[: n - 1]])
        if self.local.size:
            y, x = (np.linspace(0, side, NODES) for side in size)
            at_nodes = modes(np.stack(np.meshgrid(x, y), axis=-1))
            local = np.einsum("yxs,ft,stc->fyxc", at_nodes, self.in_time, self.local)
            # What all of the field has in common belongs to its track.
            common = local.mean(axis=(1, 2))
            track, grid = track + common, local - common[:, None, None]
            grid_error = misfit * np.sqrt(self._variances(at_nodes, covariance))
            variance = self._variances(at_nodes.mean(axis=(0, 1), keepdims=True), covariance)[:, 0, 0]
        patches, patch_error = self._patches_alone(gradient, information)
        return Estimate(
            track=track,
            track_error=misfit * np.sqrt(variance),
            grid=grid,
            grid_error=grid_error,
            centres=centres,
            patches=patches - (track - self.track),
            patch_error=misfit * patch_error,
            spread=self.spread if self.local.size else 0.0,
            misfit=misfit,
            peak_height=height,
            rounds=rounds,
        )

    def _misfit(self, gradient: NDArray, information: NDArray, covariance: NDArray) -> float:
        """Root of the patches' chi² per degree of freedom; 1 where noise alone scatters them."""
        # The Laplacian of frames has one null direction, a common displacement, which no gradient has: what
        # is added there makes it invertible and changes nothing.
        n = len(self.track)
        common = np.trace(information, axis1=1, axis2=2)[:, None, None] / n**2
        chi2 = float((gradient * np.linalg.solve(information + common, gradient)).sum())
        shifts = len(self.track) - 1
        free = 2 * (len(gradient) * shifts - shifts - self._determined(covariance))
        return float(np.sqrt(max(chi2 / max(free, 1), 1.0)))

    def _variances(self, modes: NDArray, covariance: NDArray) -> NDArray:
        """Variance of track and local motion together where the modes are these (y, x, s): (n, y, x)."""
        n, shape = len(self.track), modes.shape[:2]
        variances, first = np.zeros((n, *shape)), n - 1
        for f in range(1, n):
            local = np.einsum("yxs,t->yxst", modes, self.in_time[f]).reshape(*shape, -1)
            mixed = local @ covariance[first:, f - 1]
            own = np.einsum("yxa,ab,yxb->yx", local, covariance[first:, first:], local, optimize=True)
            variances[f] = np.maximum(covariance[f - 1, f - 1] + 2 * mixed + own, 0)
        return variances

    def _patches_alone(self, gradient: NDArray, information: NDArray) -> tuple[NDArray, NDArray]:
        """What each patch says by itself, smooth in time: its displacement against the track."""
        if not self.local.size:
            return np.full((len(gradient), *self.track.shape), np.nan), np.full(gradient.shape[:2], np.nan)
        alone = np.einsum("ft,pfg,gu->ptu", self.in_time, information, self.in_time, optimize=True)
        covariance = np.linalg.inv(alone + np.eye(self.in_time.shape[1]) / _PATCH_SPREAD_A**2)
        # The gradient that it would have if it had not moved against the track.
        pull = gradient + information @ (self.displacements() - self.track)
        pull = np.einsum("ft,pfx->ptx", self.in_time, pull)
        moved = np.einsum("ft,ptu,pux->pfx", self.in_time, covariance, pull, optimize=True)
        error = np.sqrt(np.einsum("ft,ptu,fu->pf", self.in_time, covariance, self.in_time, optimize=True))
        return moved, error


def _without_shadows(frames: NDArray[np.float32], pixel_size: float) -> NDArray[np.float32]:
    """Frames with the dark parts of the field faded out and the rest level, where there are dark parts.

    The edge of a shadow is seen in every frame at the same place and would hold the track still.
    """
    from scipy.ndimage import distance_transform_edt, gaussian_filter, map_coordinates

    factor = max(1, round(_COARSE_A / pixel_size))
    h, w = (side // factor for side in frames.shape[1:])
    mean = frames.mean(axis=0)
    coarse = mean[: h * factor, : w * factor].reshape(h, factor, w, factor).mean(axis=(1, 3))
    dark = coarse < _DARK * np.median(coarse)
    # Movies that another program has levelled have no brightness to go by.
    if not dark.any() or coarse.min() < 0:
        return frames
    distance = np.asarray(distance_transform_edt(~dark)) * factor * pixel_size
    window = np.sin(np.pi / 2 * np.clip(distance / _MARGIN_A - 1, 0, 1)) ** 2
    blur = _MARGIN_A / (factor * pixel_size)
    level = gaussian_filter(coarse * ~dark, blur) / np.maximum(gaussian_filter(1.0 * ~dark, blur), 1e-3)
    places = np.meshgrid(
        *((np.arange(side) + 0.5) / factor - 0.5 for side in frames.shape[1:]), indexing="ij", sparse=False
    )
    window, level = (
        map_coordinates(image, places, order=1, mode="nearest").astype(np.float32)
        for image in (window, level)
    )
    brightness = frames.mean(axis=(1, 2)) / mean.mean()
    return (frames - brightness[:, None, None] * level) * window


def _independent(side: int) -> float:
    """Part of the coefficients of an axis that are independent when its patches have soft edges."""
    power = np.square(soft_edge(side, _TAPER).astype(np.float64))
    return float(np.mean(power) ** 2 / np.mean(np.square(power)))


def _shrunk(frames: NDArray[np.float32], factor: int) -> NDArray[np.float32]:
    """Sums of blocks of pixels, over a field that transforms fast."""
    h, w = (_fast_size(side // factor) for side in frames.shape[1:])
    shrunk = np.empty((len(frames), h, w), np.float32)
    even = np.ones(frames.shape[1:], np.float32)
    in_threads(lambda frame, out: shrink(frame, even, factor, out), frames, shrunk)
    return shrunk


def _lay_out(shape: tuple[int, int], pixel_size: float, patch_size: float) -> _Layout:
    """Patches side by side, in the middle of the field, of a size that transforms fast."""
    counts = [max(1, round(side * pixel_size / patch_size)) for side in shape]
    sides = [_fast_size(side // count) for side, count in zip(shape, counts, strict=True)]
    starts = [
        (np.arange(count) * (side - own) // max(count - 1, 1)) if count > 1 else np.array([(side - own) // 2])
        for side, own, count in zip(shape, sides, counts, strict=True)
    ]
    top, left = (axis.ravel() for axis in np.meshgrid(*starts, indexing="ij"))
    # A shrunk pixel's centre is half of it from its edge, from where places in Å are counted here.
    x, y = (start + side / 2 for start, side in ((left, sides[1]), (top, sides[0])))
    return _Layout(top, left, (sides[0], sides[1]), np.stack([x, y], axis=-1) * pixel_size)


def _fast_size(side: int) -> int:
    """Largest even number up to `side` whose prime factors are small."""
    side -= side % 2
    while side > 16 and next_fast_len(side, real=True) != side:
        side -= 2
    return side
