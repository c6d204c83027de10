"""From the spectra of tiles to defocus, astigmatism, phase shift and tilt, with their errors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from halfmap.data.defocus import N_TERMS, surface_terms
from halfmap.steps.ctf import fit as fits
from halfmap.steps.ctf import likelihood
from halfmap.steps.ctf.fit import Fit
from halfmap.steps.ctf.likelihood import Problem, State, evaluate, loss_of
from halfmap.steps.ctf.search import search_tilt
from halfmap.steps.ctf.thickness import Thickness
from halfmap.steps.ctf.thickness import fit_thickness as find_thickness
from halfmap.steps.ctf.tiles import TileSpectra

_ONLY_SEEN = 0.02
"""Weight of rings beyond those that are fitted."""

_STEEPEST = 2.0
"""Change of the defocus over a distance at the most, tan 63°."""

_COARSEST_A, _EXTENSION = 6.0, 0.9
"""Rings up to here are always fitted, finer ones by steps of this factor while they agree with them."""

_DISAGREE = 3.0
"""Standard errors from the stated Cs to that at which rings fit best, beyond which they are not fitted
together: a step too few costs little, one too many shifts the defocus."""

_OTHER_CS_MM = -1.2, 1.2
"""Changes of Cs from which a better one is looked for."""


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
    covariance : array (m + 4, m + 4)
        Of surface, astigmatism, phase shift, Cs, the misfit of the tiles in it.
    plane_covariance : array (7, 7)
        The same of `plane`.
    surface : array (6,)
        Coefficients of `fit.surface_terms`, zero where they are not supported.
    finest : float
        Resolution in Å to which rings were fitted.
    cs_change, cs_error : float
        Cs at which all rings fit best against the stated one, and its standard error, mm.
    thickness : Thickness
        Of the ice; None if it was not looked for.
    """

    fit: Fit
    plane: Fit
    problem: Problem
    covariance: NDArray
    plane_covariance: NDArray
    surface: NDArray
    finest: float
    cs_change: float
    cs_error: float
    thickness: Thickness | None = None


def estimate_ctf(
    spectra: TileSpectra,
    average: Fit,
    problem: Problem,
    *,
    fit_tilt: bool = True,
    fit_thickness: bool = False,
) -> CtfEstimate:
    """Estimate the CTF of a micrograph from all its tiles.

    Parameters
    ----------
    spectra : TileSpectra
        Power of tiles in polar bins.
    average, problem : Fit, Problem
        What `average.fit_average` found.
    fit_tilt : bool
        Whether the defocus may change over the field.
    fit_thickness : bool
        Whether nodes of the rings are looked for.

    Notes
    -----
    Rings are fitted as far as they agree with the coarser ones. What a wrong pixel size or Cs do to them
    grows with the fourth power of the frequency, so that agreement is that of the Cs at which the rings fit
    best with the stated one. Beyond, they only tell about their own background.
    """
    single, problem = problem, _of_tiles(spectra, average, problem)
    plane, best = _fit_plane(spectra, problem, average.state, fit_tilt=fit_tilt)
    thickness = find_thickness(plane, best) if fit_thickness else None
    if thickness is not None and thickness.value > 0:
        plane = replace(plane, thickness=thickness.value)
        best = fits.maximise(plane, best.state)
        plane = replace(plane, roughness=fits.roughness_of(best))
        best = fits.maximise(plane, best.state)
    near = _with_likely_cs(average, single, plane, best)
    cs_change, cs_error = fits.apparent_cs(plane, near.state)
    cs_error *= max(1.0, near.misfit)
    frequency = spectra.bins.frequency
    finest = float(frequency[-1])
    if abs(cs_change) > _DISAGREE * cs_error:
        finest = _consistent_range(plane, near, frequency)
        trust = np.where(frequency <= finest, 1.0, _ONLY_SEEN)
        plane = replace(plane, trust=trust, weight=plane.weight * trust[:, None])
        best = fits.maximise(plane, best.state)
    chosen, used = best, plane
    if plane.terms.shape[1] == 3:
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
        finest=1 / finest,
        cs_change=cs_change,
        cs_error=cs_error,
        thickness=thickness,
    )


def fit_spherical_aberration(spectra: TileSpectra, average: Fit, problem: Problem) -> tuple[Fit, Problem]:
    """Fit the rings of all tiles with any Cs, and say what the fit is the maximum of."""
    single, problem = problem, _of_tiles(spectra, average, problem)
    plane, best = _fit_plane(spectra, problem, average.state, fit_tilt=True)
    near = _with_likely_cs(average, single, plane, best)
    plane = replace(plane, free_cs=True)
    return fits.maximise(plane, near.state), plane


def _with_likely_cs(average: Fit, single: Problem, plane: Problem, best: Fit) -> Fit:
    """Fit all tiles with another Cs if the average's rings fit it far better, or return the fit as it is.

    From a Cs that is far off no step leads to the right one: fine rings in antiphase just seem to be none.
    """
    free = replace(single, free_cs=True)
    wave = free.phase[4].mean(axis=1) / free.phase[0].mean(axis=1)
    tried = []
    for change in _OTHER_CS_MM:
        # At the middle of the range the defocus makes up for it.
        surface = average.state.surface - change * wave[len(wave) // 2]
        start = replace(average.state, surface=surface, cs_change=change)
        tried.append(fits.maximise(free, start, iterations=10, tolerance=0.1))
    other = min(tried, key=lambda fit: fit.loss)
    if average.loss - other.loss < _DISAGREE**2 / 2:
        return best
    state = best.state
    surface = np.concatenate(
        [state.surface[:1] + other.state.surface - average.state.surface, state.surface[1:]]
    )
    start = replace(
        state,
        surface=surface,
        contrast=other.state.contrast,
        rough=other.state.rough,
        cs_change=other.state.cs_change,
    )
    return fits.maximise(replace(plane, free_cs=True), start)


def _of_tiles(spectra: TileSpectra, average: Fit, problem: Problem) -> Problem:
    return replace(
        problem,
        power=spectra.power,
        effective=1.0,
        overlap=spectra.overlap,
        roughness=fits.roughness_of(average),
    )


def _fit_plane(
    spectra: TileSpectra, problem: Problem, average: State, *, fit_tilt: bool
) -> tuple[Problem, Fit]:
    """Fit all tiles with a plane of defocus, or one defocus where there are few or it is wanted."""
    start = _start_tiles(spectra, average, problem)
    n_terms = 3 if fit_tilt and len(spectra.power) >= 4 else 1
    plane = _with_terms(problem, spectra, n_terms)
    if n_terms == 3:
        gradient = _find_tilt(spectra, plane, start)
        starts = [_with_surface(start, surface) for surface in ([start.surface[0], 0, 0], gradient)]
        start = min(starts, key=lambda state: loss_of(plane, state, evaluate(plane, state)))
    best = fits.maximise(plane, start, tolerance=0.1)
    # The tilt no longer blurs the rings of the average: what is rough about them is better known.
    plane = replace(plane, roughness=fits.roughness_of(best))
    return plane, fits.maximise(plane, best.state)


def _consistent_range(problem: Problem, best: Fit, frequency: NDArray) -> float:
    """Frequency in 1/Å up to which the rings agree with the stated Cs."""
    limit = 1 / _COARSEST_A
    while limit < frequency[-1]:
        further = limit / _EXTENSION
        change, error = fits.apparent_cs(problem, best.state, rings=frequency <= further)
        if abs(change) > _DISAGREE * error * max(1.0, best.misfit):
            break
        limit = further
    return float(min(limit, frequency[-1]))


def _start_tiles(spectra: TileSpectra, whole: State, problem: Problem) -> State:
    n = len(spectra.power)
    r = spectra.power.shape[1]
    state = replace(whole, profile=np.zeros((n, 3)), relative=np.ones(n))
    log_s, _, _ = likelihood.spectra_of(replace(problem, terms=np.ones((n, 1))), state)
    ratio = np.einsum("trs,rs->tr", spectra.power, problem.weight)
    total = np.maximum(problem.weight.sum(axis=1), 1e-9)
    logs = np.log(np.maximum(ratio / total, 1e-30)) - log_s
    slow = np.linspace(-1, 1, r)
    basis = np.stack([np.ones(r), slow, slow * slow - 1 / 3], axis=-1)
    used = np.sqrt(total)[:, None]
    profile = np.linalg.lstsq(used * basis, (used[:, 0] * logs).T, rcond=None)[0].T
    # The level common to all tiles belongs to the field.
    mean = profile.mean(axis=0)
    smooth = likelihood.spline_basis(r, len(whole.smooth))
    smooth_change = np.linalg.lstsq(smooth, basis @ mean, rcond=None)[0]
    return replace(state, profile=profile - mean, smooth=whole.smooth + smooth_change)


def _with_terms(problem: Problem, spectra: TileSpectra, n: int) -> Problem:
    return replace(problem, terms=surface_terms(spectra.centres[:, 0], spectra.centres[:, 1], n))


def _with_surface(state: State, surface: NDArray | list[float]) -> State:
    return replace(state, surface=np.asarray(surface, float))


def _find_tilt(spectra: TileSpectra, problem: Problem, state: State) -> NDArray:
    """Plane of defocus (3,) to start from."""
    flat = replace(problem, terms=np.ones((len(spectra.power), 1)))
    log_s, contrast, _ = likelihood.spectra_of(flat, state)
    excess = spectra.power * np.exp(-log_s)[:, :, None] - 1
    chi = likelihood.phase_of(problem, state)
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
