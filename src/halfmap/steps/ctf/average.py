"""A first fit to the mean spectrum of all tiles, from the best starts of the whole range of defocus."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from halfmap.steps.ctf import fit as fits
from halfmap.steps.ctf import likelihood
from halfmap.steps.ctf.fit import Fit
from halfmap.steps.ctf.likelihood import Problem
from halfmap.steps.ctf.search import Search, ring_strength, search_defocus
from halfmap.steps.ctf.tiles import TileSpectra, independence, phase_terms

_SPIKE = 6.0
"""Standard errors by which a bin of the averaged spectrum sticks out when it is left out, a lattice spot."""

_BEYOND_A = 300.0
"""How far a fit may leave the range of defocus."""


@dataclass(frozen=True, kw_only=True)
class Optics:
    """What is known of the microscope.

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


def fit_average(
    spectra: TileSpectra, optics: Optics, search: Search, *, start: NDArray | None = None
) -> tuple[Fit, Problem]:
    """Fit the mean of all tiles.

    Parameters
    ----------
    spectra : TileSpectra
        Power of tiles in polar bins.
    optics : Optics
        Microscope.
    search : Search
        What is looked for.
    start : array (4,), optional
        Mean defocus, two components of the astigmatism in Å and phase shift in radian, where they are known
        from other tiles; instead of a search.

    Returns
    -------
    fit : Fit
        The maximum of the likelihood.
    problem : Problem
        What it is the maximum of, with one tile, the mean.
    """
    problem, excess = _without_spikes(_problem(spectra, optics, search))
    weight = problem.weight * problem.effective
    strength = ring_strength(excess, weight)
    if start is None:
        smooth = likelihood.spline_basis(len(excess), 12)
        starts = search_defocus(excess, weight, problem.phase, smooth, search)
    else:
        starts = [start]
    tried = []
    for candidate in starts:
        first = fits.maximise(problem, likelihood.start_state(problem, candidate, strength), iterations=8)
        known = replace(problem, roughness=fits.roughness_of(first))
        tried.append(fits.maximise(known, first.state, iterations=6))
    # A fit that ran out of the range is not what was asked for, unless none stayed.
    lowest, highest = search.lowest - _BEYOND_A, search.highest + _BEYOND_A
    inside = [fit for fit in tried if lowest <= fit.state.surface[0] <= highest]
    best = min(inside or tried, key=lambda fit: fit.surprise)
    fine = independence(spectra, problem.phase, float(best.state.surface[0]))
    plain = independence(spectra, problem.phase, 0.0)
    problem = replace(problem, weight=problem.weight * fine / plain, gain=(fine / plain).mean(axis=1))
    for _ in range(2):
        problem = replace(problem, roughness=fits.roughness_of(best))
        best = fits.maximise(problem, best.state)
    return best, problem


def start_of(fit: Fit) -> NDArray[np.float64]:
    """What `fit_average` can start from with other tiles of the same micrograph."""
    state = fit.state
    return np.array([state.surface[0], *state.astigmatism, state.phase_shift])


def _problem(spectra: TileSpectra, optics: Optics, search: Search) -> Problem:
    phase = phase_terms(
        spectra.bins,
        voltage_kV=optics.voltage_kV,
        cs_mm=optics.cs_mm,
        amplitude_contrast=optics.amplitude_contrast,
        fixed_phase=0.0 if search.free_phase else optics.phase_shift,
    )
    power = spectra.power.astype(np.float64)
    # Tiles of carbon or contaminants are brighter; none shall drown the others.
    level = np.median(power, axis=(1, 2), keepdims=True)
    frequency = spectra.bins.frequency
    return Problem(
        power=(power / np.maximum(level, 1e-30)).mean(axis=0, keepdims=True),
        weight=spectra.bins.count * independence(spectra, phase, 0.0),
        trust=np.ones(len(frequency)),
        effective=float(len(power)),
        phase=phase,
        terms=np.ones((1, 1)),
        free_phase=search.free_phase,
        roughness=likelihood.expected_roughness(frequency),
        gain=np.ones(len(frequency)),
    )


def _without_spikes(problem: Problem) -> tuple[Problem, NDArray]:
    """Weigh bins that stick out by 0; and the spectrum over its smooth background, less 1."""
    r = problem.power.shape[1]
    state = likelihood.start_state(problem, np.zeros(4), np.zeros(r))
    log_s, _, _ = likelihood.spectra_of(problem, state)
    excess = problem.power[0] / np.exp(log_s[0])[:, None] - 1
    # Against the ring's own middle, which Thon rings move.
    used = problem.weight > 0
    middle = np.nanmedian(np.where(used, excess, np.nan), axis=1, keepdims=True)
    n = np.maximum(problem.weight * problem.effective / problem.trust[:, None], 1e-9)
    spread = np.nanmedian(np.where(used, np.abs(excess - middle), np.nan), axis=1, keepdims=True) * 1.48
    limit = _SPIKE * np.maximum(1 / np.sqrt(n), spread)
    weight = np.where(excess - middle > limit, 0.0, problem.weight)
    return replace(problem, weight=weight), excess
