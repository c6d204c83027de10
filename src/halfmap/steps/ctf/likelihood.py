"""The likelihood of all tiles' spectra, and what they are modelled by."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import BSpline

from halfmap.ops.threads import in_threads
from halfmap.steps.ctf._kernels import N_SUMS, ring_sums

CLIP = 4.0
SMOOTH, CONTRAST = 12, 7
"""Degrees of freedom of the smooth spectrum and of the contrast of its rings."""

_MOST_CONTRAST = 0.9
CONTRAST_SPREAD = 0.5
"""Of tiles' contrast about the field's, a priori."""

_CONTRAST_BEND, _TYPICAL_CONTRAST, _NEGATIVE_CONTRAST = 0.3, 0.4, 0.01
"""Typical second difference and size of the contrast's spline, and how far it may be below 0."""

PROFILE_SPREAD = 1.0
"""Of the logarithm of their spectra."""


@dataclass(frozen=True, eq=False)
class Problem:
    """Spectra to be fitted; see `_kernels.ring_sums` for the arrays.

    Attributes
    ----------
    power : array (t, r, s)
    weight : array (r, s)
    effective : float
    phase : array (5, r, s)
    terms : array (t, m)
        Terms of the surface of defocus at each tile.
    free_phase, free_cs : bool
        Whether the phase shift and Cs are fitted.
    thickness : float
        Of the ice in Å: it damps the rings, and turns them over beyond its nodes.
    roughness : array (r,)
        Variance of what a ring's mean deviates from the smooth model beyond noise: form factors of the
        particles, ice.
    gain : array (r,)
        How much more than for the mean of a ring the weight is for its rise and fall.
    trust : array (r,)
        Factor that `weight` has been multiplied with: below 1 for rings that are only looked at.
    overlap : float
        How much less tiles weigh for overlapping others.
    """

    power: NDArray
    weight: NDArray[np.float64]
    effective: float
    phase: NDArray[np.float64]
    terms: NDArray[np.float64]
    free_phase: bool
    roughness: NDArray[np.float64]
    gain: NDArray[np.float64]
    trust: NDArray[np.float64]
    overlap: float = 1.0
    free_cs: bool = False
    thickness: float = 0.0


@dataclass(frozen=True, eq=False)
class State:
    """Values of all that is fitted.

    Attributes
    ----------
    smooth : array (12,)
        Spline of ln S.
    rough : array (r,)
        Deviations of single rings from it.
    profile : array (t, 3)
        Each tile's own slow change of ln S.
    contrast : array (7,)
        Spline of c.
    relative : array (t,)
        Each tile's contrast against it.
    surface : array (m,)
        Coefficients of the defocus over the field, Å.
    astigmatism : array (2,)
        cos and sin component of half the difference of the defoci, Å.
    phase_shift : float
        Radian.
    cs_change : float
        Cs against the stated one, mm.
    """

    smooth: NDArray
    rough: NDArray
    profile: NDArray
    contrast: NDArray
    relative: NDArray
    surface: NDArray
    astigmatism: NDArray
    phase_shift: float
    cs_change: float = 0.0


@lru_cache(maxsize=16)
def spline_basis(n_rings: int, n_functions: int) -> NDArray[np.float64]:
    """Cubic B-splines (r, n), closer to each other towards low frequencies, where spectra are steep."""
    place = np.sqrt(np.linspace(0.04, 1, n_rings))
    inner = np.linspace(place[0], place[-1], n_functions - 2)
    knots = np.concatenate([[inner[0]] * 3, inner, [inner[-1]] * 3])
    return BSpline.design_matrix(place, knots, 3).toarray()


def start_state(problem: Problem, start: NDArray, strength: NDArray) -> State:
    """Start from a defocus, two astigmatisms, a phase shift and the amplitude (r,) of the rings."""
    t, r = problem.power.shape[:2]
    smooth, contrast = spline_basis(r, SMOOTH), spline_basis(r, CONTRAST)
    total = problem.weight.sum(axis=1)
    mean = np.einsum("trs,rs->r", problem.power, problem.weight) / np.maximum(total * t, 1e-9)
    logs = np.log(np.maximum(mean, 1e-30))
    used = np.sqrt(total)[:, None]
    surface = np.zeros(problem.terms.shape[1])
    surface[0] = start[0]
    return State(
        smooth=np.linalg.lstsq(used * smooth, used[:, 0] * logs, rcond=None)[0],
        rough=np.zeros(r),
        profile=np.zeros((t, 3)),
        contrast=np.linalg.lstsq(contrast, np.minimum(strength, 0.5), rcond=None)[0],
        relative=np.ones(t),
        surface=surface,
        astigmatism=np.array(start[1:3], float),
        phase_shift=float(start[3]),
    )


def contrast_basis(problem: Problem) -> NDArray[np.float64]:
    """Functions (r, 7) of the ring that the contrast is made of, all zero at the nodes of thick ice.

    What lies at a height z in the ice adds pi lambda k² z to the phase chi. The mean of cos 2 chi over a slab
    of thickness d is that of its middle times sin(x) / x with x = pi lambda k² d.

    References
    ----------
    .. [1] Tichelaar et al. 2020, Ultramicroscopy 216, 113023, DOI 10.1016/j.ultramic.2020.113023
    """
    basis = spline_basis(problem.power.shape[1], CONTRAST)
    turns = problem.phase[0].mean(axis=1) / np.pi
    return basis * np.sinc(turns * problem.thickness)[:, None]


def phase_of(problem: Problem, state: State) -> NDArray[np.float64]:
    """Phase chi (r, s) at the field's mean defocus."""
    return (
        problem.phase[0] * state.surface[0]
        + problem.phase[1] * state.astigmatism[0]
        + problem.phase[2] * state.astigmatism[1]
        + problem.phase[3]
        + problem.phase[4] * state.cs_change
        + state.phase_shift
    )


def spectra_of(problem: Problem, state: State) -> tuple[NDArray, NDArray, NDArray]:
    """Logarithm of S (t, r), contrast (t, r) and defocus (t,) of each tile."""
    r = problem.power.shape[1]
    log_s = spline_basis(r, SMOOTH) @ state.smooth + state.rough + state.profile @ slow_terms(r).T
    contrast = np.outer(state.relative, contrast_basis(problem) @ state.contrast)
    return log_s, np.clip(contrast, -_MOST_CONTRAST, _MOST_CONTRAST), problem.terms @ state.surface


def slow_terms(n_rings: int) -> NDArray[np.float64]:
    """Terms (r, 3) of a tile's own change of ln S."""
    v = np.linspace(-1, 1, n_rings)
    return np.stack([np.ones(n_rings), v, v * v - 1 / 3], axis=-1)


def evaluate(problem: Problem, state: State) -> NDArray[np.float64]:
    """Sums of each tile's rings (t, r, N_SUMS) at a state; see `_kernels.ring_sums`."""
    log_s, contrast, defocus = spectra_of(problem, state)
    t, r = problem.power.shape[:2]
    sums = np.empty((t, r, N_SUMS))
    edges = np.linspace(0, t, min(t, 4 * torch.get_num_threads()) + 1).astype(int)

    def part(first: int, last: int) -> None:
        ring_sums(
            first,
            last,
            problem.power,
            problem.weight,
            problem.effective,
            problem.phase,
            log_s,
            contrast,
            defocus,
            state.astigmatism,
            state.phase_shift,
            state.cs_change,
            CLIP,
            sums,
        )

    in_threads(part, edges[:-1].tolist(), edges[1:].tolist())
    return sums


def loss_of(problem: Problem, state: State, sums: NDArray) -> float:
    """-ln L with the priors on rough rings and tiles' contrasts."""
    rough = problem.roughness > 0
    prior = 0.5 * np.sum(state.rough[rough] ** 2 / problem.roughness[rough])
    prior += 0.5 * np.sum((state.relative - 1) ** 2) / CONTRAST_SPREAD**2
    prior += 0.5 * np.sum(state.profile**2) / PROFILE_SPREAD**2
    prior += 0.5 * contrast_prior(state.contrast)[1]
    return float(sums[..., -1].sum() + prior)


def contrast_prior(values: NDArray) -> tuple[NDArray, float]:
    """Prior that contrasts change slowly with frequency and are positive: its matrix, and its value.

    Rings of the wrong defocus fit where the contrast is free to change its sign.
    """
    second = np.diff(np.eye(len(values)), 2, axis=0)
    matrix = second.T @ second / _CONTRAST_BEND**2 + np.diag(
        np.where(values < 0, _NEGATIVE_CONTRAST, _TYPICAL_CONTRAST) ** -2.0
    )
    return matrix, float(values @ matrix @ values)


def expected_roughness(frequency: NDArray) -> NDArray[np.float64]:
    """Variance that particles' form factors give to rings at frequencies (r,) in 1/Å, before it is known."""
    return (0.3 * np.exp(-((frequency / 0.06) ** 2)) + 0.01) ** 2
