"""What several runs from random poses agree in: the check that a map is that of the particles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from halfmap.log import log
from halfmap.ops import symmetry
from halfmap.ops.fourier import irfft3, phase_shift, rfft3
from halfmap.ops.fsc import fsc, resolution
from halfmap.ops.threads import one_torch_thread
from halfmap.search.volume_alignment import Alignment, align_volume, centre_of_mass
from halfmap.steps.abinitio.plan import Plan

THRESHOLD = 0.5
"""Correlation of two maps of runs at the resolution to which they agree."""

_FINE = 10.0
"""Diameter of the particle over the resolution to which runs must agree to count as one."""


@dataclass(frozen=True, eq=False)
class Agreement:
    """Which runs agree, and the maps that those have in common.

    Attributes
    ----------
    maps : Tensor (k, box, box, box)
        Means of the runs that agree, or the maps of one run if there are none.
    resolutions : array (runs, runs)
        To which two runs agree, Å, the median of their maps; infinite if they do not.
    kept : array of int
        Runs, from 0, that the maps are of; the first is the one that the others were moved onto.
    classes : array (k,)
        Resolution to which runs agree in each map, Å; infinite if no two do.
    curves : Tensor (k, shells)
        Mean correlation of each map between the first run and the others that were kept; zero if none were.
    """

    maps: Tensor
    resolutions: NDArray[np.float64]
    kept: NDArray[np.intp]
    classes: NDArray[np.float64]
    curves: Tensor

    @property
    def agreed(self) -> bool:
        """Whether any two runs agree."""
        return len(self.kept) > 1

    @property
    def rejected(self) -> NDArray[np.intp]:
        """Runs, from 0, that were left out."""
        return np.setdiff1d(np.arange(len(self.resolutions)), self.kept)


@dataclass(frozen=True, eq=False)
class _Match:
    """One map of one run on one of another: how, and their correlation (shells,)."""

    alignment: Alignment
    curve: Tensor
    resolution: float


@one_torch_thread()
def compare(plan: Plan, runs: Tensor, evidence: Sequence[float]) -> Agreement:
    """Turn and move the maps of all runs onto each other, and combine those that agree.

    Parameters
    ----------
    plan : Plan
    runs : Tensor (runs, k, box, box, box)
        Their maps.
    evidence : sequence of float
        Mean log-evidence of the particles in each, by which one is chosen where none agree.

    Returns
    -------
    Agreement
    """
    n, k = runs.shape[:2]
    runs = runs.cpu()
    matches: dict[tuple[int, int], list[tuple[int, _Match]]] = {}
    resolutions = np.full((n, n), math.inf)
    np.fill_diagonal(resolutions, plan.side / plan.radius)
    for one in range(n):
        for other in range(one + 1, n):
            matches[one, other] = found = _matched(plan, runs[one], runs[other])
            resolutions[one, other] = resolutions[other, one] = np.median([m.resolution for _, m in found])
    limit = max(plan.diameter / _FINE, 1.5 * plan.step.resolution)
    kept = _group(resolutions, limit, evidence)
    first = int(kept[0])
    maps, curves = runs[first].clone(), torch.zeros(k, plan.box // 2 + 1)
    best, counts = np.full(k, math.inf), np.ones(k)
    for other in kept[1:]:
        for number, (mine, match) in enumerate(
            matches.get((first, other)) or _matched(plan, runs[first], runs[other])
        ):
            if match.resolution <= limit:
                maps[number] += match.alignment.apply(runs[other, mine])
                curves[number] += match.curve
                counts[number] += 1
                best[number] = min(best[number], match.resolution)
    maps /= torch.from_numpy(counts).float()[:, None, None, None]
    curves /= torch.from_numpy(np.maximum(counts - 1, 1)).float()[:, None]
    centred = torch.stack([_centred(plan, each) for each in maps])
    agreement = Agreement(centred, resolutions, kept, best, curves)
    _say(agreement)
    return agreement


def _matched(plan: Plan, fixed: Tensor, moving: Tensor) -> list[tuple[int, _Match]]:
    """For each map of a run, which map of another is most alike, each once, and how."""
    table = [[_match(plan, own, other) for other in moving] for own in fixed]
    gain = np.array([[match.alignment.correlation for match in line] for line in table])
    _, columns = linear_sum_assignment(-gain)
    return [(int(column), line[column]) for line, column in zip(table, columns, strict=True)]


def _match(plan: Plan, fixed: Tensor, moving: Tensor) -> _Match:
    mask = plan.sphere().cpu()
    how = {"mask": mask, "radius_px": plan.diameter / 2 / plan.pixel_size, "frequency": plan.radius}
    alignment = align_volume(moving, fixed, **how)
    curve = fsc(alignment.apply(moving) * mask, fixed * mask)
    curve[plan.radius + 1 :] = 0
    found = resolution(curve, pixel_size=plan.pixel_size, box=plan.box, threshold=THRESHOLD)
    return _Match(alignment, curve, max(found, plan.side / plan.radius))


def _group(resolutions: NDArray[np.float64], limit: float, evidence: Sequence[float]) -> NDArray[np.intp]:
    """The run that most others agree with, and those, best first."""
    agree = resolutions <= limit
    np.fill_diagonal(agree, False)
    frequencies = np.where(agree, 1 / resolutions, 0.0).sum(1)
    first = max(range(len(agree)), key=lambda run: (agree[run].sum(), frequencies[run], evidence[run]))
    others = np.flatnonzero(agree[first])
    return np.array([first, *others[np.argsort(resolutions[first, others], kind="stable")]], np.intp)


def _centred(plan: Plan, volume: Tensor) -> Tensor:
    """Map with its centre of mass in the origin, along the axes that symmetry leaves free."""
    centre = centre_of_mass(volume)
    group = plan.step.symmetry.strip().upper()
    if symmetry.order(group) > 1:
        centre = centre * torch.tensor([0.0, 0.0, 1.0 if group.startswith("C") else 0.0])
    spectrum = phase_shift(rfft3(volume), shape=volume.shape, shift_px=-centre.to(volume))
    return irfft3(spectrum, shape=volume.shape)


def _say(found: Agreement) -> None:
    """Log what agrees; warn where nothing does."""
    n = len(found.resolutions)
    names = ", ".join(str(run + 1) for run in found.kept)
    if n == 1:
        log.warning("one run alone cannot be checked: give --restarts of 2 or more")
    elif not found.agreed:
        pairs = found.resolutions[np.triu_indices(n, 1)]
        best = f"to {pairs.min():.0f} Å" if np.isfinite(pairs).any() else "at no resolution"
        log.warning(
            "no two of %d runs agree (the best two %s): there is no map that the particles alone lead to; "
            "what is written is that of run %s, the likeliest, and may be wrong. More --restarts, "
            "--iterations or particles may help, or fewer bad particles",
            *(n, best, names),
        )
    else:
        log.info(
            "runs %s agree to %.1f Å (at a correlation of %g); either hand is as likely as the other",
            *(names, found.classes.min(), THRESHOLD),
        )
        if len(found.rejected):
            log.warning("left out, as they differ: runs %s", ", ".join(str(r + 1) for r in found.rejected))
