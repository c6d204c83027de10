"""Where to start: defocus and astigmatism from the whole range, and the tilt, by matched filters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter1d, uniform_filter1d

DEFOCUS_STEP_A = 60.0
"""Turns the phase of the rings at 3.5 Å by half a radian either way."""

_ASTIGMATISMS_A = (0, 150, 300, 500, 750, 1000, 1500, 2000)
"""Half differences of the two defoci that are tried."""

_ANGLES = 12
_WINDOW = 15
"""Rings over which the strength of the Thon rings is averaged."""

_APART_A = 400.0
"""Candidates closer than this would be refined to the same defocus."""


def ring_strength(excess: NDArray, weight: NDArray) -> NDArray:
    """Amplitude of the Thon rings (r,) in a flattened spectrum (r, s) whose bins have the given weights."""
    used = (weight > 0).sum(axis=1)
    n = np.maximum(used, 1)
    power = np.where(weight > 0, excess**2, 0).sum(axis=1) / n
    noise = np.where(weight > 0, 1 / np.maximum(weight, 1e-9), 0).sum(axis=1) / n
    mean = uniform_filter1d(power, _WINDOW, mode="nearest") - uniform_filter1d(noise, _WINDOW, mode="nearest")
    return np.sqrt(2 * np.clip(mean, 1e-6, 0.1))


@dataclass(frozen=True, kw_only=True)
class Search:
    """What is looked for.

    Attributes
    ----------
    lowest, highest : float
        Range of the mean defocus, Å.
    free_phase : bool
        Whether any phase shift is possible.
    """

    lowest: float
    highest: float
    free_phase: bool = False


def search_defocus(
    excess: NDArray, weight: NDArray, phase: NDArray, smooth: NDArray, search: Search, *, n_best: int = 6
) -> list[NDArray]:
    """Find the defoci whose rings fit a flattened spectrum best.

    Parameters
    ----------
    excess : array (r, s)
        Power over its smooth background, less 1.
    weight : array (r, s)
        Independent values that each bin is worth.
    phase : array (5, r, s)
        See `tiles.phase_terms`.
    smooth : array (r, n)
        Functions of the ring that the background is made of: what looks like them is no evidence.
    search : Search
        What is looked for.
    n_best : int
        Candidates wanted at the most.

    Returns
    -------
    list of array (4,)
        Mean defocus, two components of the astigmatism in Å, phase shift in radian; the best first.

    Notes
    -----
    The filter is the rings of a defocus with the amplitude that the spectrum itself shows at each
    frequency. It is applied sector by sector for all defoci at once; an astigmatism is then a sum over
    sectors at defoci that differ. Its score is the log-likelihood gained with the best overall amplitude.
    """
    margin = 1.05 * max(_ASTIGMATISMS_A)
    grid = np.arange(search.lowest - margin, search.highest + margin, DEFOCUS_STEP_A)
    filters = _filters(grid, excess, weight, phase, smooth)
    answers = (weight * excess).T @ filters  # (s, defocus)
    if not search.free_phase:
        answers, filters = answers.real, filters.real
    n_sectors = excess.shape[1]
    power = weight.sum(axis=1) @ np.square(np.abs(filters)) / n_sectors
    sectors = (np.arange(n_sectors) + 0.5) * np.pi / n_sectors
    inside = np.flatnonzero((grid >= search.lowest) & (grid <= search.highest))
    best, found = np.full(len(inside), -np.inf), np.zeros((len(inside), 3))
    rows = np.arange(n_sectors)[:, None]
    for half in _ASTIGMATISMS_A:
        for angle in np.arange(_ANGLES if half else 1) * np.pi / _ANGLES:
            offset = np.rint(half * np.cos(2 * (sectors - angle)) / DEFOCUS_STEP_A).astype(int)
            place = inside[None] + offset[:, None]
            total = answers[rows, place].sum(axis=0)
            # Rings are -cos 2 chi: without a phase shift only the opposite of the filter will do.
            size = np.abs(total) if search.free_phase else np.maximum(-total, 0)
            gain = size**2 / np.maximum(power[place].sum(axis=0), 1e-12)
            better = gain > best
            best[better] = gain[better]
            found[better, 0], found[better, 1] = half * np.cos(2 * angle), half * np.sin(2 * angle)
            if search.free_phase:
                # Rings are -cos(2 chi + 2 phi), the filter exp(2 i chi).
                found[better, 2] = np.mod((np.pi - np.angle(total[better])) / 2, np.pi)
    around = maximum_filter1d(best, 2 * round(_APART_A / DEFOCUS_STEP_A) + 1)
    peaks = np.flatnonzero(best >= around)
    peaks = peaks[np.argsort(-best[peaks], kind="stable")][:n_best]
    return [np.array([grid[inside[i]], *found[i]]) for i in peaks]


def _filters(
    grid: NDArray, excess: NDArray, weight: NDArray, phase: NDArray, smooth: NDArray
) -> NDArray[np.complex128]:
    """Rings (r, n) of every defocus of the grid at the strength of the spectrum's, without what is smooth."""
    per_ring = weight.sum(axis=1)
    weighted = (weight * phase[0]).sum(axis=1) / np.maximum(per_ring, 1e-9)
    centre = np.where(per_ring > 0, weighted, phase[0].mean(axis=1))
    rest = phase[3].mean(axis=1)
    filters = ring_strength(excess, weight)[:, None] * np.exp(2j * (centre[:, None] * grid + rest[:, None]))
    gram = smooth.T @ (per_ring[:, None] * smooth)
    return filters - smooth @ np.linalg.lstsq(gram, smooth.T @ (per_ring[:, None] * filters), rcond=None)[0]


def search_tilt(
    excess: NDArray,
    weight: NDArray,
    chi: NDArray,
    factor: NDArray,
    strength: NDArray,
    centres: NDArray,
    *,
    largest: float,
) -> NDArray:
    """Find the plane of defocus that the rings of all tiles fit best.

    Parameters
    ----------
    excess : array (t, r, s)
        Power of each tile over its smooth background, less 1.
    weight : array (r, s)
        Independent values that a bin is worth.
    chi : array (r, s)
        Phase at the defocus of the whole field.
    factor : array (r,)
        Change of the phase per Å of defocus.
    strength : array (r,)
        Amplitude of the rings.
    centres : array (t, 2)
        Places of the tiles, -1 to 1.
    largest : float
        Greatest change of defocus from the middle to an edge, Å.

    Returns
    -------
    array (3,)
        Defocus in the middle against the field's, change from the middle to the right and the upper edge.
    """
    rotor = weight * np.exp(2j * chi)
    rings = np.einsum("trs,rs->tr", excess, rotor) * strength
    step = DEFOCUS_STEP_A
    reach = int(np.ceil(2.2 * largest / step))
    offsets = np.arange(-reach, reach + 1) * step
    answers = -(rings @ np.exp(2j * factor[:, None] * offsets)).real
    best, result = -np.inf, np.zeros(3)
    tiles = np.arange(len(centres))
    span = largest
    middles = np.arange(-2, 3) * 100.0
    width = 10
    for _ in range(3):
        start = result.copy()
        steps = np.linspace(-span, span, 2 * width + 1)
        gx, gy = np.meshgrid(start[1] + steps, start[2] + steps, indexing="ij")
        plane = gx[..., None] * centres[:, 0] + gy[..., None] * centres[:, 1]
        for middle in start[0] + middles:
            place = np.clip(np.rint((plane + middle) / step).astype(int) + reach, 0, 2 * reach)
            score = answers[tiles, place].sum(axis=-1)
            i = np.unravel_index(np.argmax(score), score.shape)
            if score[i] > best:
                best, result = float(score[i]), np.array([middle, gx[i], gy[i]])
        span, middles, width = 1.5 * span / width, middles / 3, 4
    return result
