"""How well rings and model agree: equiphase profile, resolution limit, figure of merit, ice ring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfmap.steps.ctf import likelihood
from halfmap.steps.ctf.likelihood import Problem, State
from halfmap.steps.ctf.tiles import Bins

THRESHOLD = 0.5
"""Correlation of the equiphase profile with its model at which Thon rings end."""

_PERIODS, _FEWEST = 2.0, 12
"""Thon rings, and bins at the least, that a window of correlation spans."""

WEAKEST = 10.0
"""Standard errors of the strength of the rings, below which there may be none."""

ICE_RING = 0.25, 0.28
_BESIDE_ICE = (0.215, 0.24), (0.295, 0.32)


@dataclass(frozen=True, eq=False)
class Profile:
    """Spectrum over its smooth part, less 1, averaged over places of one phase.

    Attributes
    ----------
    frequency : array (n,)
        At the field's mean defocus, 1/Å.
    data, error : array (n,)
        Mean and its standard error.
    model, model_error : array (n,)
        What the fit says, and its standard error by that of the defocus.
    rings : array (n,)
        -cos 2 chi.
    correlation : array (n,)
        Of data and rings in a sliding window.
    strength, strength_error : array (s,)
        Of the rings in each sector against the model's, and its standard error.
    """

    frequency: NDArray
    data: NDArray
    error: NDArray
    model: NDArray
    model_error: NDArray
    rings: NDArray
    correlation: NDArray
    strength: NDArray
    strength_error: NDArray


def equiphase_profile(problem: Problem, state: State, bins: Bins, defocus_error: float) -> Profile:
    """Average all bins of all tiles that have one phase chi.

    Parameters
    ----------
    problem, state
        Spectra and their fit.
    bins : Bins
        Geometry.
    defocus_error : float
        Standard error of the mean defocus in Å.

    Notes
    -----
    A bin of any tile and direction goes where a spectrum of the field's mean defocus without astigmatism has
    its phase. That is exact for every term of the phase; the smooth spectrum is divided out before. The
    correlation is Pearson's over a window of two Thon rings or 12 bins, the longer one.
    """
    log_s, contrast, defocus = likelihood.spectra_of(problem, state)
    phase = problem.phase
    base = phase[0] * state.surface[0] + phase[3] + phase[4] * state.cs_change
    n = len(bins.frequency)
    radial = base.mean(axis=1)
    turning = phase[1] * state.astigmatism[0] + phase[2] * state.astigmatism[1]
    # d chi / d k at each ring moves a bin along the frequency by what its phase differs.
    slope = np.gradient(radial, bins.frequency)
    step = bins.frequency[1] - bins.frequency[0]
    steep = np.where(np.abs(slope) * step < 0.02, np.inf, slope)
    total, square, weight, expected = (np.zeros(n) for _ in range(4))
    seen, possible = np.zeros(base.shape[1]), np.zeros(base.shape[1])
    inside_ring = (base - radial[:, None]) / steep[:, None]
    for t in range(len(problem.power)):
        offset = (phase[0] * (defocus[t] - state.surface[0]) + turning) / steep[:, None] + inside_ring
        place = np.arange(n)[:, None] + offset / step
        w = problem.weight * problem.effective / problem.trust[:, None]
        value = problem.power[t] * np.exp(-log_s[t])[:, None] - 1
        chi = base + turning + phase[0] * (defocus[t] - state.surface[0]) + state.phase_shift
        model = -contrast[t][:, None] * np.cos(2 * chi)
        seen += (w * model * value).sum(axis=0)
        possible += (w * model * model).sum(axis=0)
        low = np.floor(place).astype(int)
        for shift in (0, 1):
            part = w * (1 - np.abs(place - low - shift))
            index = low + shift
            good = (index >= 0) & (index < n) & (w > 0)
            where = index[good]
            total += np.bincount(where, (part * value)[good], n)
            expected += np.bincount(where, (part * model)[good], n)
            weight += np.bincount(where, part[good], n)
            square += np.bincount(where, (part * part / np.maximum(w, 1e-9))[good], n)
    weight = np.maximum(weight, 1e-9)
    rings = -np.cos(2 * (radial + state.phase_shift))
    data, model = total / weight, expected / weight
    sine = np.sin(2 * (radial + state.phase_shift))
    mean_contrast = np.maximum(contrast.mean(axis=0), 0)
    return Profile(
        frequency=bins.frequency,
        data=data,
        error=np.sqrt(square) / weight,
        model=model,
        model_error=np.abs(2 * mean_contrast * sine * phase[0].mean(axis=1)) * defocus_error,
        rings=rings,
        correlation=_sliding_correlation(data, rings, np.abs(slope) * step / np.pi),
        strength=seen / np.maximum(possible, 1e-9),
        strength_error=np.sqrt(1 / np.maximum(possible, 1e-9)),
    )


def _sliding_correlation(data: NDArray, rings: NDArray, turns: NDArray) -> NDArray[np.float64]:
    """Pearson's correlation in a window about each bin; `turns` are Thon rings per bin."""
    n = len(data)
    result = np.zeros(n)
    for i in range(n):
        half = int(np.clip(_PERIODS / 2 / max(float(turns[i]), 1e-3), _FEWEST / 2, n / 6))
        part = slice(max(0, i - half), min(n, i + half + 1))
        a, b = data[part] - data[part].mean(), rings[part] - rings[part].mean()
        norm = float(np.sqrt((a @ a) * (b @ b)))
        result[i] = float(a @ b) / norm if norm > 0 else 0.0
    return result


def resolution_limit(profile: Profile) -> float:
    """Finest resolution in Å to which rings are seen: where the correlation falls below 0.5 for good.

    For good means for as many bins as the shortest window has; so a gap at a node of thick ice or a ring of
    crystalline ice, beyond which rings go on, does not end them unless it is longer. Where all rings together
    are not significant it is that of the first bin.
    """
    good = profile.correlation >= THRESHOLD
    if not good.any() or significance(profile) < WEAKEST:
        return float(1 / profile.frequency[0])
    last, gap = int(np.argmax(good)), 0
    for i in range(last, len(good)):
        if good[i]:
            last, gap = i, 0
        else:
            gap += 1
            if gap > _FEWEST:
                break
    return float(1 / profile.frequency[last])


def significance(profile: Profile) -> float:
    """Strength of the rings over its standard error: about 5 for the best fit to mere noise.

    What a smooth spectrum could be as well is no evidence: at low frequencies, where rings are as wide as the
    spectrum's own waves, contrast and spectrum can make up for each other.
    """
    scale = 1 / profile.error
    smooth = np.linalg.qr(scale[:, None] * likelihood.spline_basis(len(scale), likelihood.SMOOTH))[0]
    model, data = (
        values - smooth @ (smooth.T @ values) for values in (scale * profile.model, scale * profile.data)
    )
    norm = float(np.linalg.norm(model))
    return float(model @ data) / norm if norm > 0 else 0.0


def has_rings(row: dict[str, Any]) -> bool:
    """Whether the rings of a micrograph, in columns of the table, are more than noise."""
    return row["hmCtfSignificance"] >= WEAKEST


def anisotropy(profile: Profile) -> tuple[float, float, float]:
    """How unevenly the rings' strength is spread over directions.

    Returns
    -------
    ratio, error : float
        Amplitude of the strength's two waves a turn over its mean, 0 to 1, and its standard error.
    direction : float
        Where the rings are weakest, 0 to 180°: drift goes that way.
    """
    angle = (np.arange(len(profile.strength)) + 0.5) * np.pi / len(profile.strength)
    terms = np.stack([np.ones_like(angle), np.cos(2 * angle), np.sin(2 * angle)], axis=-1)
    terms /= profile.strength_error[:, None]
    covariance = np.linalg.inv(terms.T @ terms)
    mean, cosine, sine = covariance @ terms.T @ (profile.strength / profile.strength_error)
    mean = max(float(mean), 1e-9)
    ratio = min(float(np.hypot(cosine, sine)) / mean, 1.0)
    error = float(np.sqrt(np.trace(covariance[1:, 1:]) / 2)) / mean
    return ratio, error, float(np.degrees(np.arctan2(-sine, -cosine)) / 2 % 180)


def figure_of_merit(problem: Problem, state: State) -> float:
    """Correlation of the averaged spectrum over its smooth part with the squared CTF, over all bins."""
    log_s, _, _ = likelihood.spectra_of(problem, state)
    data = (problem.power * np.exp(-log_s)[:, :, None]).mean(axis=0)
    chi = likelihood.phase_of(problem, state)
    model, w = -np.cos(2 * chi), problem.weight * (problem.trust[:, None] == 1)
    total = max(float(w.sum()), 1e-9)
    a, b = (values - (w * values).sum() / total for values in (data, model))
    norm = float(np.sqrt((w * a * a).sum() * (w * b * b).sum()))
    return float((w * a * b).sum()) / norm if norm > 0 else 0.0


def ice_ring(power: NDArray, count: NDArray, frequency: NDArray) -> float | None:
    """Power in the ice ring, 0.25 to 0.28 1/Å, over that between the frequencies on both sides, less 1.

    Parameters
    ----------
    power : array (t, r, s)
        Of all tiles.
    count : array (r, s)
        Coefficients in each bin.
    frequency : array (r,)
        1/Å.

    Returns
    -------
    float or None
        0 without a ring; None where the spectrum ends before it.
    """
    if frequency[-1] < _BESIDE_ICE[1][1]:
        return None
    spectrum = np.log(np.einsum("trs,rs->r", power, count) / np.maximum(count.sum(axis=1) * len(power), 1))
    beside = np.zeros(len(frequency), bool)
    for low, high in _BESIDE_ICE:
        beside |= (frequency >= low) & (frequency <= high)
    inside = (frequency >= ICE_RING[0]) & (frequency <= ICE_RING[1])
    line = np.polynomial.Polynomial.fit(frequency[beside], spectrum[beside], 1)
    return float(np.expm1(np.mean(spectrum[inside] - line(frequency[inside]))))
