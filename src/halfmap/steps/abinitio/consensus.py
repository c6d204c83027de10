"""What several runs from random poses agree in: the check that a map is that of the particles."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
from halfmap.steps.abinitio.run import read_maps

THRESHOLD = 0.5
"""Correlation of two maps of runs at the resolution to which they agree."""

_FINE, _FINER = 10.0, 1.5
"""Resolution to which runs must agree to count as one: the diameter over this, or this times the finest."""

_OVER_CHANCE = 1 / 3
"""Correlation over that of chance, from which on runs agree: of unlike hollow balls it is next to nothing."""

_LEAST_EVIDENCE = 1.0
"""Mean log-evidence of a run that counts: what particles get from having been added to the map is less."""

_SURE = 4.0
"""Difference between evidences over its standard error, from which on a run is believed to be better."""


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
    over_chance : array (runs, runs)
        Correlation of two runs over that of chance, the median of their maps.
    evidence : array (runs,)
        Mean log-evidence of some particles, the same in all runs.
    """

    maps: Tensor
    resolutions: NDArray[np.float64]
    kept: NDArray[np.intp]
    classes: NDArray[np.float64]
    curves: Tensor
    over_chance: NDArray[np.float64]
    evidence: NDArray[np.float64]

    @property
    def agreed(self) -> bool:
        """Whether any two runs agree."""
        return len(self.kept) > 1

    @property
    def best(self) -> str:
        """How well the run of the maps agrees with any other, in words."""
        own = np.delete(self.resolutions[self.kept[0]], self.kept[0])
        return f"to {own.min():.0f} Å" if np.isfinite(own).any() else "at no resolution"

    @property
    def rejected(self) -> NDArray[np.intp]:
        """Runs, from 0, that were left out."""
        return np.setdiff1d(np.arange(len(self.resolutions)), self.kept)

    def tell(self) -> None:
        """Log what agrees; warn where nothing does."""
        names = ", ".join(str(run + 1) for run in self.kept)
        if len(self.resolutions) == 1:
            log.warning("one run alone cannot be checked: give --restarts of 2 or more")
        elif not self.agreed:
            log.warning(
                "run %s, the likeliest of %d, agrees with no other beyond chance (best %s): its map is "
                "written, but may be wrong, and no resolution is claimed. More --restarts, --iterations or "
                "particles may help, or fewer bad particles",
                *(names, len(self.resolutions), self.best),
            )
        else:
            log.info(
                "runs %s agree to %.1f Å (at a correlation of %g); either hand is as likely as the other",
                *(names, self.classes.min(), THRESHOLD),
            )
            if len(self.rejected):
                others = ", ".join(str(run + 1) for run in self.rejected)
                log.warning("left out, as they differ: runs %s", others)


@dataclass(frozen=True)
class Pair:
    """Two runs, from 0, and the files of their maps."""

    one: int
    other: int
    fixed: Path
    moving: Path

    @property
    def name(self) -> str:
        """In the job's ledger."""
        return f"run{self.one + 1:02d}_run{self.other + 1:02d}"


@dataclass(frozen=True, eq=False)
class Match:
    """A map of one run, how the map `number` of another comes onto it, and their correlation (shells,)."""

    number: int
    alignment: Alignment
    curve: Tensor
    resolution: float

    @classmethod
    def of(cls, plan: Plan, told: dict[str, Any]) -> Match:
        """From what `match` tells."""
        rotation, shift = (torch.tensor(told[name], dtype=torch.float64) for name in ("rotation", "shift_px"))
        alignment = Alignment(rotation, shift, told["mirrored"], told["correlation"], told["chance"])
        curve = torch.tensor(told["curve"])
        found = resolution(curve, pixel_size=plan.pixel_size, box=plan.box, threshold=THRESHOLD)
        return cls(told["number"], alignment, curve, max(found, plan.side / plan.radius))


def match(pair: Pair, *, plan: Plan) -> list[dict[str, Any]]:
    """Tell for each map of a run which map of another is most alike, each once, and how.

    Parameters
    ----------
    pair : Pair
        The runs.
    plan : Plan

    Returns
    -------
    list of dict
        As `Match.of` reads them.
    """
    return matched(plan, read_maps(pair.fixed), read_maps(pair.moving))


@one_torch_thread()
def matched(plan: Plan, fixed: Tensor, moving: Tensor) -> list[dict[str, Any]]:
    """The same for the maps (k, box, box, box) of two runs."""
    mask = plan.sphere().cpu()
    # Finer detail, of which each run has its own noise, would say little of chance.
    frequency = round(plan.side / _limit(plan))
    how = {"mask": mask, "radius_px": plan.diameter / 2 / plan.pixel_size, "frequency": frequency}
    turns = symmetry.equal_settings(plan.step.symmetry)
    table = [[align_volume(other, own, turns=turns, **how) for other in moving] for own in fixed]
    _, columns = linear_sum_assignment([[-found.correlation for found in line] for line in table])
    told = []
    for own, line, column in zip(fixed, table, columns, strict=True):
        found = line[column]
        curve = fsc(found.apply(moving[column]) * mask, own * mask)
        curve[plan.radius + 1 :] = 0
        values = {"number": int(column), "mirrored": found.mirrored, "curve": curve.tolist()}
        values |= {"rotation": found.rotation.tolist(), "shift_px": found.shift_px.tolist()}
        told.append(values | {"correlation": found.correlation, "chance": found.chance})
    return told


@one_torch_thread()
def compare(
    plan: Plan, runs: Tensor, evidence: NDArray[np.float64], matches: dict[tuple[int, int], list[Match]]
) -> Agreement:
    """Say which runs agree, and combine their maps.

    Parameters
    ----------
    plan : Plan
    runs : Tensor (runs, k, box, box, box)
        Their maps.
    evidence : array (runs, particles)
        Log-evidence of some particles, the same in all runs.
    matches : dict of list of Match
        Of any two runs, the first before the second.

    Returns
    -------
    Agreement
    """
    n, k = runs.shape[:2]
    resolutions, over_chance = np.full((n, n), math.inf), np.zeros((n, n))
    np.fill_diagonal(resolutions, plan.side / plan.radius)
    for (one, other), found in matches.items():
        resolutions[[one, other], [other, one]] = np.median([each.resolution for each in found])
        gains = [each.alignment.over_chance for each in found]
        over_chance[[one, other], [other, one]] = np.median(gains)
    limit = _limit(plan)
    likely = evidence.mean(1) >= _LEAST_EVIDENCE
    agree = (resolutions <= limit) & (over_chance >= _OVER_CHANCE) & likely & likely[:, None]
    kept = _group(agree, evidence)
    first = int(kept[0])
    maps, curves = runs[first].clone(), torch.zeros(k, plan.box // 2 + 1)
    best, counts = np.full(k, math.inf), np.ones(k)
    for other in map(int, kept[1:]):
        for own, each in enumerate(_onto(matches, first, other)):
            if each.resolution <= limit:
                maps[own] += each.alignment.apply(runs[other, each.number])
                curves[own] += each.curve
                counts[own] += 1
                best[own] = min(best[own], each.resolution)
    maps /= torch.from_numpy(counts).float()[:, None, None, None]
    curves /= torch.from_numpy(np.maximum(counts - 1, 1)).float()[:, None]
    centred = torch.stack([_centred(plan, each) for each in maps])
    return Agreement(centred, resolutions, kept, best, curves, over_chance, evidence.mean(1))


def _limit(plan: Plan) -> float:
    """Resolution in Å to which two runs must agree to count as one."""
    return max(plan.diameter / _FINE, _FINER * plan.side / plan.radius)


def _onto(matches: dict[tuple[int, int], list[Match]], first: int, other: int) -> list[Match]:
    """How the maps of another run come onto those of the first."""
    if first < other:
        return matches[first, other]
    found = matches[other, first]
    turned = [replace(each, number=own, alignment=each.alignment.inverse) for own, each in enumerate(found)]
    return [turned[own] for own in np.argsort([each.number for each in found])]


def _group(agree: NDArray[np.bool_], evidence: NDArray[np.float64]) -> NDArray[np.intp]:
    """The likeliest run that any agrees with, and those; or the likeliest alone, if it is surely likelier."""
    agree = agree & ~np.eye(len(agree), dtype=bool)
    ordered = np.argsort(-evidence.mean(1), kind="stable")
    alone = np.array([int(ordered[0])])
    if not agree.any():
        return alone
    first = next(int(run) for run in ordered if agree[run].any())
    if _better(evidence[alone[0]], evidence[first]):
        return alone
    return np.array([first, *(int(run) for run in ordered if agree[first, run])])


def _better(one: NDArray[np.float64], other: NDArray[np.float64]) -> bool:
    """Whether the same particles are likelier under one run than under another by more than chance."""
    difference = one - other
    return bool(difference.mean() > _SURE * difference.std() / math.sqrt(len(difference)))


def _centred(plan: Plan, volume: Tensor) -> Tensor:
    """Map with its centre of mass in the origin, along the axes that symmetry leaves free."""
    centre = centre_of_mass(volume)
    group = plan.step.symmetry.strip().upper()
    if symmetry.order(group) > 1:
        centre = centre * torch.tensor([0.0, 0.0, 1.0 if group.startswith("C") else 0.0])
    spectrum = phase_shift(rfft3(volume), shape=volume.shape, shift_px=-centre.to(volume))
    return irfft3(spectrum, shape=volume.shape)
