"""The maximum of the likelihood over everything that the spectra depend on, and its curvature there."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter1d

from halfmap.steps.ctf._kernels import N_LOCAL, normal_sums
from halfmap.steps.ctf.likelihood import (
    CONTRAST,
    CONTRAST_SPREAD,
    PROFILE_SPREAD,
    SMOOTH,
    Problem,
    State,
    contrast_basis,
    contrast_prior,
    evaluate,
    loss_of,
    slow_terms,
    spline_basis,
)

_WINDOW = 15
"""Rings over which the roughness of the spectrum is averaged."""

UNKNOWN_CS_MM = 100.0
"""Standard error of a Cs of which the rings tell nothing."""

_LEAST_LEFT, _ROUNDED = 1e-3, 1e-9
"""Least share of the information on anything that is left, and what is none but for rounding."""

_DD = 11
"""Place of the information on defocus among the sums."""

_SCORE = N_LOCAL * (N_LOCAL + 1) // 2


@dataclass(frozen=True, eq=False)
class Fit:
    """The maximum of the likelihood.

    Attributes
    ----------
    state : State
        Where it is.
    loss : float
        -ln L, with the priors.
    surprise : float
        -ln of the likelihood with rough rings integrated out: fits that differ in roughness compare by it.
    covariance : array (m + 4, m + 4)
        Of surface, astigmatism, phase shift and Cs (zero where not fitted), by the noise alone.
    misfit : float
        Scatter of the tiles' own defoci over what noise explains.
    tile_offset, tile_error : array (t,)
        Defocus of each tile by itself against the surface, and its standard error, Å.
    residual : array (r,)
        Mean of the rings' data over the model without `State.rough`, in logarithm.
    residual_variance : array (r,)
        Its variance by noise.
    """

    state: State
    loss: float
    surprise: float
    covariance: NDArray
    misfit: float
    tile_offset: NDArray
    tile_error: NDArray
    residual: NDArray
    residual_variance: NDArray


def maximise(problem: Problem, state: State, *, iterations: int = 30, tolerance: float = 0.02) -> Fit:
    """Maximise the likelihood by Fisher scoring with Levenberg's damping.

    Parameters
    ----------
    problem : Problem
        Spectra.
    state : State
        Start.
    iterations : int
        Steps at the most.
    tolerance : float
        Stop when a step gains less than this in ln L.

    Notes
    -----
    The power of a coefficient is exponential with mean mu (Whittle's likelihood), so that a bin of n
    coefficients adds n (ln mu + P / mu) to -ln L, with mu = S (1 - c cos 2 chi): S and c are splines of the
    frequency, chi the phase of the lens. Deviations of whole rings from the spline, which form factors and
    ice cause, are Gaussian with the variance `Problem.roughness`; they are marginalised, so that what is
    only seen in the mean of rough rings weighs less.

    References
    ----------
    .. [1] Whittle 1953, Ark. Mat. 2, 423-434, DOI 10.1007/BF02590998
    """
    damping = 1e-3
    sums = evaluate(problem, state)
    loss = loss_of(problem, state, sums)
    for _ in range(iterations):
        system = _system(problem, state, sums)
        gained = 0.0
        for _ in range(6):
            trial = _step(problem, state, system, damping)
            trial_sums = evaluate(problem, trial)
            trial_loss = loss_of(problem, trial, trial_sums)
            if np.isfinite(trial_loss) and trial_loss <= loss:
                gained = loss - trial_loss
                state, sums, loss = trial, trial_sums, trial_loss
                damping = max(damping / 10, 1e-6)
                break
            damping *= 10
        if gained < tolerance:
            break
    return _finish(problem, state, sums, loss)


def gain_of(problem: Problem, state: State) -> float:
    """What one more step would gain in ln L, at a state that is the maximum with fewer terms."""
    system = _system(problem, state, evaluate(problem, state))
    scale = np.sqrt(np.maximum(np.diag(system.information), 1e-30))
    matrix = system.information / scale[:, None] / scale + 1e-9 * np.eye(len(scale))
    slope = system.score / scale
    return 0.5 * float(slope @ np.linalg.solve(matrix, slope))


def apparent_cs(problem: Problem, state: State, *, rings: NDArray | None = None) -> tuple[float, float]:
    """Change of Cs in mm, and its standard error, at which some of the rings (r,) fit best.

    All else may change along with it. It is one step from a state that fits well with the stated Cs.
    """
    sums = evaluate(problem, state)
    if rings is not None:
        sums[:, ~rings] = 0
    system = _system(replace(problem, free_cs=True), state, sums)
    if system.information[-1, -1] < UNKNOWN_CS_MM**-2:
        return state.cs_change, UNKNOWN_CS_MM
    scale = np.sqrt(np.maximum(np.diag(system.information), 1e-30))
    inverse = np.linalg.pinv(system.information / scale[:, None] / scale, hermitian=True)
    change = float(inverse[-1] @ (system.score / scale)) / float(scale[-1])
    return state.cs_change + change, float(np.sqrt(inverse[-1, -1])) / float(scale[-1])


@dataclass(frozen=True, eq=False)
class _System:
    """Normal equations of [smooth, contrast, geometry]; rough rings and each tile's own are marginalised.

    Attributes
    ----------
    information : array (n, n)
        What is left of it.
    score : array (n,)
    rings : array (r, 6 + m, 6 + m)
        Information of each ring on ln S, c, surface, astigmatism, phase shift, Cs.
    ring_score : array (r, 6 + m)
    tiles : array (t, 4, 4)
        Information on a tile's profile and relative contrast, the prior in it.
    tile_score : array (t, 4)
    cross : array (t, 4, n)
        Information that these share with all else.
    """

    information: NDArray
    score: NDArray
    rings: NDArray
    ring_score: NDArray
    tiles: NDArray
    tile_score: NDArray
    cross: NDArray


def _system(problem: Problem, state: State, sums: NDArray) -> _System:
    t, r = sums.shape[:2]
    m = problem.terms.shape[1]
    n = SMOOTH + CONTRAST + m + 4
    rings, ring_score = np.zeros((r, 6 + m, 6 + m)), np.zeros((r, 6 + m))
    tiles, tile_score, cross = np.zeros((t, 4, 4)), np.zeros((t, 4)), np.zeros((t, 4, n))
    contrast = contrast_basis(problem)
    normal_sums(
        sums,
        problem.terms,
        state.relative,
        contrast @ state.contrast,
        spline_basis(r, SMOOTH),
        contrast,
        slow_terms(r),
        float(problem.free_phase),
        problem.phase[4].mean(axis=1) * problem.free_cs,
        rings,
        ring_score,
        tiles,
        tile_score,
        cross,
    )
    shrink = 1 / (problem.roughness * rings[:, 0, 0] + 1)
    inverse = problem.roughness * shrink
    pull = shrink * (problem.roughness * ring_score[:, 0] - state.rough)
    reduced = rings - inverse[:, None, None] * rings[:, :, :1] * rings[:, :1, :]
    reduced_score = ring_score - rings[:, :, 0] * pull[:, None]
    columns = _columns(problem)
    information = np.einsum("rva,rvw,rwb->ab", columns, reduced, columns, optimize=True)
    score = np.einsum("rva,rv->a", columns, reduced_score)
    matrix, _ = contrast_prior(state.contrast)
    place = slice(SMOOTH, SMOOTH + CONTRAST)
    information[place, place] += matrix
    score[place] -= matrix @ state.contrast
    for place, free in ((-2, problem.free_phase), (-1, problem.free_cs)):
        if not free:
            information[place, place] = 1.0
    if t == 1:
        return _System(information, score, rings, ring_score, tiles[:0], tile_score[:0], cross[:0])
    precision = np.array([PROFILE_SPREAD**-2] * 3 + [CONTRAST_SPREAD**-2])
    tiles += np.diag(precision)
    tile_score -= precision * np.concatenate([state.profile, state.relative[:, None] - 1], axis=1)
    solved = _deviations(tiles, np.concatenate([cross, tile_score[..., None]], axis=2))
    taken = np.tensordot(cross, solved, axes=([0, 1], [0, 1]))
    information, score = _left(information, taken[:, :-1]), score - taken[:, -1]
    return _System(information, score, rings, ring_score, tiles, tile_score, cross)


def _left(information: NDArray, taken: NDArray) -> NDArray[np.float64]:
    """Information less what tiles take for their own, of which a little always stays.

    Rough rings have taken theirs before. Where there is little else, both take the same and more than all.
    """
    diagonal = np.diag(information)
    scale = np.sqrt(np.where(diagonal > 0, diagonal, 1.0))
    left = information - taken
    values, vectors = np.linalg.eigh(left / scale[:, None] / scale)
    if values[0] >= -_ROUNDED:
        return left
    return (vectors * np.maximum(values, _LEAST_LEFT)) @ vectors.T * scale[:, None] * scale


def _deviations(tiles: NDArray, right: NDArray) -> NDArray:
    """Solve for what is each tile's own (t, 4, n): it adds up to nothing, as the rest is the field's."""
    inverse = np.linalg.inv(tiles)
    free = inverse @ right
    return free - inverse @ np.linalg.solve(inverse.sum(axis=0), free.sum(axis=0))


def _columns(problem: Problem) -> NDArray[np.float64]:
    """What a ring's ln S, c and geometry (r, 6 + m, n) are made of: splines, and themselves."""
    n_rings, m = problem.power.shape[1], problem.terms.shape[1]
    columns = np.zeros((n_rings, 6 + m, SMOOTH + CONTRAST + m + 4))
    columns[:, 0, :SMOOTH] = spline_basis(n_rings, SMOOTH)
    columns[:, 1, SMOOTH : SMOOTH + CONTRAST] = contrast_basis(problem)
    columns[:, 2:, SMOOTH + CONTRAST :] = np.eye(m + 4)
    return columns


def _step(problem: Problem, state: State, system: _System, damping: float) -> State:
    scale = np.sqrt(np.maximum(np.diag(system.information), 1e-30))
    matrix = system.information / scale[:, None] / scale
    matrix[np.diag_indices_from(matrix)] += damping + 1e-9
    step = np.linalg.solve(matrix, system.score / scale) / scale
    m = problem.terms.shape[1]
    smooth, contrast, geometry = np.split(step, [SMOOTH, SMOOTH + CONTRAST])
    change = _columns(problem) @ step
    left = system.ring_score[:, 0] - np.einsum("rv,rv->r", system.rings[:, 0], change)
    rough = state.rough + (problem.roughness * left - state.rough) / (
        problem.roughness * system.rings[:, 0, 0] + 1
    )
    new = replace(
        state,
        smooth=state.smooth + smooth,
        rough=rough,
        contrast=state.contrast + contrast,
        surface=state.surface + geometry[:m],
        astigmatism=state.astigmatism + geometry[m : m + 2],
        phase_shift=state.phase_shift + float(geometry[m + 2]) * problem.free_phase,
        cs_change=state.cs_change + float(geometry[m + 3]) * problem.free_cs,
    )
    if len(system.tiles) == 0:
        return new
    own = _deviations(system.tiles, (system.tile_score - system.cross @ step)[..., None])[..., 0]
    return replace(
        new,
        profile=state.profile + own[:, :3],
        relative=np.clip(state.relative + own[:, 3], 0.0, 4.0),
    )


def _finish(problem: Problem, state: State, sums: NDArray, loss: float) -> Fit:
    system = _system(problem, state, sums)
    n = problem.terms.shape[1] + 4
    scale = np.sqrt(np.maximum(np.diag(system.information), 1e-30))
    inverse = np.linalg.pinv(system.information / scale[:, None] / scale, hermitian=True)
    covariance = (inverse / scale[:, None] / scale)[-n:, -n:]
    for place, free in ((-2, problem.free_phase), (-1, problem.free_cs)):
        if not free:
            covariance[place] = covariance[:, place] = 0
    # Of a tile alone: its defocus with its contrast and the level of its rings as the field has them.
    information = sums[..., _DD].sum(axis=1)
    score = sums[..., _SCORE + 2].sum(axis=1)
    t = len(sums)
    misfit = 1.0
    if t > problem.terms.shape[1] + 2:
        spread = np.sum(score**2 / np.maximum(information, 1e-30)) / (t - problem.terms.shape[1])
        spread *= problem.overlap
        misfit = float(np.sqrt(spread))
    ring_information = sums[..., 0].sum(axis=0)
    residual = state.rough + sums[..., _SCORE].sum(axis=0) / np.maximum(ring_information, 1e-9)
    return Fit(
        state=state,
        loss=loss,
        surprise=loss + 0.5 * float(np.log1p(problem.roughness * ring_information).sum()),
        covariance=covariance,
        misfit=misfit,
        tile_offset=score / np.maximum(information, 1e-30),
        tile_error=1 / np.sqrt(np.maximum(information, 1e-30)),
        residual=residual,
        residual_variance=problem.gain / np.maximum(ring_information, 1e-9),
    )


def roughness_of(fit: Fit) -> NDArray[np.float64]:
    """Variance by which the means of rings deviate from the smooth model beyond noise, (r,)."""
    square = uniform_filter1d(fit.residual**2, _WINDOW, mode="nearest")
    noise = uniform_filter1d(fit.residual_variance, _WINDOW, mode="nearest")
    return np.maximum(square - noise, 0.05 * noise)
