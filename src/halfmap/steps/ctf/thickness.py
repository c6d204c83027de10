"""Thickness of the ice from the nodes of the Thon rings."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from halfmap.steps.ctf import fit as fits
from halfmap.steps.ctf import likelihood
from halfmap.steps.ctf.fit import Fit
from halfmap.steps.ctf.likelihood import Problem

_GROUPS = 8
"""Of tiles of like defocus: one spectrum each stands for all of them."""

_THICKEST_A, _STEP_A, _FINE_STEP_A = 2000.0, 50.0, 15.0
_LEAST_GAIN = 4.5
"""In ln L against ice whose node is not within the range: three standard errors."""

_INSIDE = 0.87
"""Part of the finest frequency at which a node must be, so that the rings beyond it show."""


@dataclass(frozen=True)
class Thickness:
    """Thickness of the ice along the beam and its standard error in Å, not a number where no node shows."""

    value: float = math.nan
    error: float = math.nan


def fit_thickness(problem: Problem, best: Fit) -> Thickness:
    """Find the thickness whose nodes the rings show.

    Parameters
    ----------
    problem, best : Problem, Fit
        All tiles' spectra and their fit without thickness.

    Notes
    -----
    The rings' contrast is a smooth positive curve times the sinc of `likelihood.contrast_basis`. Only rings
    that weaken and come back turned over tell a node from a contrast that just fades; the likelihood is
    maximised over all else at every thickness. The standard error is half the width of the range where ln L
    is within 1/2 of its maximum.
    """
    grouped, state = _grouped(problem, best)

    def fit_at(thickness: float) -> Fit:
        return fits.maximise(replace(grouped, thickness=float(thickness)), state, iterations=4, tolerance=0.1)

    turns = float(problem.phase[0, -1].mean()) / math.pi
    thinnest = 1 / (turns * _INSIDE**2)
    coarse = np.arange(0.0, _THICKEST_A + 1, _STEP_A)
    tried = [fit_at(value) for value in coarse]
    middle = float(coarse[np.argmin([fit.loss for fit in tried])])
    # What the rings beyond the node told about the roughness was wrong before it was known.
    found = fits.maximise(replace(grouped, thickness=middle), tried[int(middle / _STEP_A)].state)
    grouped, state = replace(grouped, roughness=fits.roughness_of(found)), found.state
    fine = np.clip(middle + np.arange(-6, 7) * _FINE_STEP_A, 0, _THICKEST_A)
    losses = np.array([fit_at(value).loss for value in fine])
    place = int(np.argmin(losses))
    if place in (0, len(fine) - 1) or fine[place] < thinnest:
        return Thickness()
    fading = min(fit_at(value).loss for value in np.arange(0.0, thinnest, 2 * _STEP_A))
    if fading - losses[place] < _LEAST_GAIN:
        return Thickness()
    a, b, _ = np.polyfit(fine[place - 1 : place + 2] - fine[place], losses[place - 1 : place + 2], 2)
    value = float(fine[place] - b / (2 * a)) if a > 0 else float(fine[place])
    return Thickness(value, _half_width(fine, losses - losses[place]))


def _half_width(grid: NDArray, losses: NDArray) -> float:
    """Half the range of the grid within which the loss is 1/2 above its least at the most."""
    # The root of a parabola is straight: it can be interpolated though the range be shorter than a step.
    errors = np.sqrt(2 * losses)
    inside = np.flatnonzero(errors <= 1)
    ends = []
    for last, beyond in ((inside[0], inside[0] - 1), (inside[-1], inside[-1] + 1)):
        if not 0 <= beyond < len(grid):
            ends.append(float(grid[last]))
            continue
        part = (1 - errors[last]) / (errors[beyond] - errors[last])
        ends.append(float(grid[last] + part * (grid[beyond] - grid[last])))
    return (ends[1] - ends[0]) / 2


def _grouped(problem: Problem, best: Fit) -> tuple[Problem, likelihood.State]:
    """Mean spectra of groups of tiles at about one defocus, and the state to begin with."""
    t = len(problem.power)
    groups = np.array_split(np.argsort(problem.terms @ best.state.surface, kind="stable"), min(_GROUPS, t))
    level = np.median(problem.power, axis=(1, 2), keepdims=True)
    even = problem.power / np.maximum(level, 1e-30)
    grouped = replace(
        problem,
        power=np.stack([even[some].mean(axis=0) for some in groups]),
        terms=np.stack([problem.terms[some].mean(axis=0) for some in groups]),
        effective=problem.effective * t / len(groups),
    )
    strength = (likelihood.contrast_basis(problem) @ best.state.contrast).clip(0.0)
    state = best.state
    start = np.array([state.surface[0], *state.astigmatism, state.phase_shift])
    begun = likelihood.start_state(grouped, start, strength)
    return grouped, replace(begun, surface=state.surface, rough=state.rough, cs_change=state.cs_change)
