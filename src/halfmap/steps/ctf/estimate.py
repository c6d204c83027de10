"""From the spectra of tiles to defocus, astigmatism, phase shift and tilt, with their errors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from halfmap.data.defocus import N_TERMS, surface_terms
from halfmap.steps.ctf import fit as fits
from halfmap.steps.ctf.fit import Fit, Problem, State
from halfmap.steps.ctf.search import ring_strength, search_defocus, search_tilt
from halfmap.steps.ctf.tiles import TileSpectra, independence, phase_terms

_SPIKE = 6.0
"""Standard errors by which a bin of the averaged spectrum sticks out when it is left out, a lattice spot."""

_ONLY_SEEN = 0.02
"""Weight of rings beyond those that are fitted."""

_STEEPEST = 2.0
"""Change of the defocus over a distance at the most, tan 63°."""


@dataclass(frozen=True, kw_only=True)
class Optics:
    """What is known of the microscope, and what is looked for.

    Attributes
    ----------
    voltage_kV, cs_mm, amplitude_contrast : float
        As in the optics table.
    phase_shift : float
        Known phase shift in degrees, unless it is fitted.
    """

    voltage_kV: float
    cs_mm: float
    amplitude_contrast: float
    phase_shift: float = 0.0


@dataclass(frozen=True, eq=False)
class CtfEstimate:
    """What the spectra of a micrograph say.

    Attributes
    ----------
    fit : Fit
        Of all tiles, with the surface that the data support.
    plane : Fit
        Of all tiles, with a plane.
    problem : Problem
        What `fit` is the maximum of.
    covariance : array (m + 3, m + 3)
        Of surface, astigmatism, phase shift, the misfit of the tiles in it.
    plane_covariance : array (6, 6)
        The same of `plane`.
    surface : array (6,)
        Coefficients of `fit.surface_terms`, zero where they are not supported.
    """

    fit: Fit
    plane: Fit
    problem: Problem
    covariance: NDArray
    plane_covariance: NDArray
    surface: NDArray


def estimate_ctf(
    spectra: TileSpectra,
    optics: Optics,
    *,
    lowest_defocus: float,
    highest_defocus: float,
    finest: float = 0.0,
    fit_phase_shift: bool = False,
    fit_tilt: bool = True,
) -> CtfEstimate:
    """Estimate the CTF of a micrograph.

    Parameters
    ----------
    spectra : TileSpectra
        Power of tiles in polar bins.
    optics : Optics
        Microscope.
    lowest_defocus, highest_defocus : float
        Range searched, Å.
    finest : float
        Resolution in Å to which rings are fitted; finer ones only tell about their own background.
    fit_phase_shift : bool
        Whether the phase shift is looked for.
    fit_tilt : bool
        Whether the defocus may change over the field.
    """
    phase = phase_terms(
        spectra.bins,
        voltage_kV=optics.voltage_kV,
        cs_mm=optics.cs_mm,
        amplitude_contrast=optics.amplitude_contrast,
        fixed_phase=0.0 if fit_phase_shift else optics.phase_shift,
    )
    trust = np.where(spectra.bins.frequency * finest <= 1, 1.0, _ONLY_SEEN)
    limits = lowest_defocus, highest_defocus
    whole, problem = _fit_average(spectra, phase, limits, trust, free_phase=fit_phase_shift)
    problem = replace(
        problem,
        power=spectra.power,
        effective=1.0,
        overlap=spectra.overlap,
        roughness=fits.roughness_of(whole),
    )
    start = _start_tiles(spectra, whole.state, problem)
    n_terms = 3 if fit_tilt and len(spectra.power) >= 4 else 1
    plane = _with_terms(problem, spectra, n_terms)
    if n_terms == 3:
        gradient = _find_tilt(spectra, plane, start)
        starts = [_with_surface(start, surface) for surface in ([start.surface[0], 0, 0], gradient)]
        start = min(starts, key=lambda state: fits.loss_of(plane, state, fits.evaluate(plane, state)))
    best = fits.maximise(plane, start, tolerance=0.1)
    # The tilt no longer blurs the rings of the average: what is rough about them is better known.
    plane = replace(plane, roughness=fits.roughness_of(best))
    best = fits.maximise(plane, best.state)
    chosen, used = best, plane
    if n_terms == 3:
        chosen, used = _choose_surface(spectra, plane, best)
    surface = np.zeros(N_TERMS)
    surface[: len(chosen.state.surface)] = chosen.state.surface
    return CtfEstimate(
        fit=chosen,
        plane=best,
        problem=used,
        covariance=chosen.covariance * max(1.0, chosen.misfit) ** 2,
        plane_covariance=best.covariance * max(1.0, best.misfit) ** 2,
        surface=surface,
    )


def _fit_average(
    spectra: TileSpectra, phase: NDArray, limits: tuple[float, float], trust: NDArray, *, free_phase: bool
) -> tuple[Fit, Problem]:
    """Fit the mean of all tiles from the best starts of the whole range."""
    power = spectra.power.astype(np.float64)
    # Tiles of carbon or contaminants are brighter; none shall drown the others.
    level = np.median(power, axis=(1, 2), keepdims=True)
    mean = (power / np.maximum(level, 1e-30)).mean(axis=0, keepdims=True)
    problem = Problem(
        power=mean,
        weight=spectra.bins.count * independence(spectra, phase, 0.0) * trust[:, None],
        trust=trust,
        effective=float(len(power)),
        phase=phase,
        terms=np.ones((1, 1)),
        free_phase=free_phase,
        roughness=fits.expected_roughness(spectra.bins.frequency),
        gain=np.ones(len(spectra.bins.frequency)),
    )
    problem, excess = _without_spikes(problem)
    weight = problem.weight * problem.effective
    strength = ring_strength(excess, weight)
    starts = search_defocus(
        excess,
        weight,
        phase,
        fits.spline_basis(len(excess), 12),
        lowest=limits[0],
        highest=limits[1],
        free_phase=free_phase,
    )
    tried = []
    for start in starts:
        first = fits.maximise(problem, fits.start_state(problem, start, strength), iterations=8)
        known = replace(problem, roughness=fits.roughness_of(first))
        tried.append(fits.maximise(known, first.state, iterations=6))
    # A fit that ran out of the range is not what was asked for, unless none stayed.
    inside = [fit for fit in tried if limits[0] - 300 <= fit.state.surface[0] <= limits[1] + 300]
    best = min(inside or tried, key=lambda fit: fit.surprise)
    fine = independence(spectra, phase, float(best.state.surface[0]))
    plain = independence(spectra, phase, 0.0)
    problem = replace(problem, weight=problem.weight * fine / plain, gain=(fine / plain).mean(axis=1))
    for _ in range(2):
        problem = replace(problem, roughness=fits.roughness_of(best))
        best = fits.maximise(problem, best.state)
    return best, problem


def _without_spikes(problem: Problem) -> tuple[Problem, NDArray]:
    """Weigh bins that stick out by 0; and the spectrum over its smooth background, less 1."""
    r = problem.power.shape[1]
    state = fits.start_state(problem, np.zeros(4), np.zeros(r))
    log_s, _, _ = fits.spectra_of(problem, state)
    excess = problem.power[0] / np.exp(log_s[0])[:, None] - 1
    # Against the ring's own middle, which Thon rings move.
    used = problem.weight > 0
    middle = np.nanmedian(np.where(used, excess, np.nan), axis=1, keepdims=True)
    n = np.maximum(problem.weight * problem.effective / problem.trust[:, None], 1e-9)
    spread = np.nanmedian(np.where(used, np.abs(excess - middle), np.nan), axis=1, keepdims=True) * 1.48
    limit = _SPIKE * np.maximum(1 / np.sqrt(n), spread)
    weight = np.where(excess - middle > limit, 0.0, problem.weight)
    return replace(problem, weight=weight), excess


def _start_tiles(spectra: TileSpectra, whole: State, problem: Problem) -> State:
    n = len(spectra.power)
    r = spectra.power.shape[1]
    state = replace(whole, profile=np.zeros((n, 3)), relative=np.ones(n))
    log_s, _, _ = fits.spectra_of(replace(problem, terms=np.ones((n, 1))), state)
    ratio = np.einsum("trs,rs->tr", spectra.power, problem.weight)
    total = np.maximum(problem.weight.sum(axis=1), 1e-9)
    logs = np.log(np.maximum(ratio / total, 1e-30)) - log_s
    slow = np.linspace(-1, 1, r)
    basis = np.stack([np.ones(r), slow, slow * slow - 1 / 3], axis=-1)
    used = np.sqrt(total)[:, None]
    profile = np.linalg.lstsq(used * basis, (used[:, 0] * logs).T, rcond=None)[0].T
    # The level common to all tiles belongs to the field.
    mean = profile.mean(axis=0)
    smooth = fits.spline_basis(r, len(whole.smooth))
    smooth_change = np.linalg.lstsq(smooth, basis @ mean, rcond=None)[0]
    return replace(state, profile=profile - mean, smooth=whole.smooth + smooth_change)


def _with_terms(problem: Problem, spectra: TileSpectra, n: int) -> Problem:
    return replace(problem, terms=surface_terms(spectra.centres[:, 0], spectra.centres[:, 1], n))


def _with_surface(state: State, surface: NDArray | list[float]) -> State:
    return replace(state, surface=np.asarray(surface, float))


def _find_tilt(spectra: TileSpectra, problem: Problem, state: State) -> NDArray:
    """Plane of defocus (3,) to start from."""
    flat = replace(problem, terms=np.ones((len(spectra.power), 1)))
    log_s, contrast, _ = fits.spectra_of(flat, state)
    excess = spectra.power * np.exp(-log_s)[:, :, None] - 1
    chi = (
        problem.phase[0] * state.surface[0]
        + problem.phase[1] * state.astigmatism[0]
        + problem.phase[2] * state.astigmatism[1]
        + problem.phase[3]
        + state.phase_shift
    )
    strength = np.sqrt(np.maximum(contrast.mean(axis=0), 1e-3))
    side = max(spectra.shape) * spectra.pixel_size / 2
    plane = search_tilt(
        np.minimum(excess, 4.0),
        problem.weight,
        chi,
        problem.phase[0].mean(axis=1),
        strength,
        spectra.centres,
        largest=_STEEPEST * side,
    )
    plane[0] += state.surface[0]
    return plane


def _choose_surface(spectra: TileSpectra, plane: Problem, best: Fit) -> tuple[Fit, Problem]:
    """Take a level, inclined or curved field by Schwarz's criterion; tiles are the observations."""
    n = len(spectra.power)
    scale = max(1.0, best.misfit) ** 2
    gradient = best.state.surface[1:3]
    inverse = np.linalg.pinv(best.covariance[1:3, 1:3], hermitian=True)
    if n >= 16:
        curved = _with_terms(plane, spectra, 6)
        start = _with_surface(best.state, np.concatenate([best.state.surface, np.zeros(3)]))
        if 2 * fits.gain_of(curved, start) / scale > 3 * np.log(n) + 6:
            return fits.maximise(curved, start, iterations=6), curved
    if float(gradient @ inverse @ gradient) / scale > 2 * np.log(n):
        return best, plane
    level = _with_terms(plane, spectra, 1)
    return fits.maximise(level, _with_surface(best.state, best.state.surface[:1]), iterations=3), level
