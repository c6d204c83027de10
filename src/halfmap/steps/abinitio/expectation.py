"""Compare particles with one map or several: posteriors of their poses, and of the maps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.ops.threads import one_torch_thread
from halfmap.search.backprojector import Backprojection
from halfmap.search.lens_noise import ring_means
from halfmap.search.maxima import Maxima, search_everywhere
from halfmap.search.polar import PolarGrid
from halfmap.search.prepared import PreparedImages, on_rings, prepare
from halfmap.search.projector import SplineVolume
from halfmap.search.sampling import DirectionSearch
from halfmap.steps.abinitio.plan import Plan
from halfmap.steps.abinitio.spectra import Spectra

BATCH = 64
"""Images that are worked on at a time."""

_COARSE_STARTS, _STARTS = 24, 8
"""Poses that are kept of the grid where ascents follow, and of the finer one before these."""

_FURTHER = 1.6
"""Radius of each ascent over that of the one before."""


@dataclass(frozen=True, eq=False)
class Found:
    """Likely poses of a batch of images against one map.

    Attributes
    ----------
    rotations, shifts_px, owner : Tensor (n, 3, 3), (n, 2), (n,)
    shares : Tensor (n,)
        Probability of each; those of an image sum to 1.
    log_evidence : Tensor (b,)
        Logarithm of the likelihood over that of noise, averaged over poses, but for a constant.
    maxima : Maxima or None
        The same with their widths, if they were refined.
    """

    rotations: Tensor
    shifts_px: Tensor
    owner: Tensor
    shares: Tensor
    log_evidence: Tensor
    maxima: Maxima | None


@dataclass(frozen=True, eq=False)
class Posterior:
    """Of a batch of images: poses against each map, and probabilities (b, classes) of the maps."""

    rows: NDArray[np.intp]
    ready: PreparedImages
    noise: Tensor
    found: tuple[Found, ...]
    classes: Tensor

    @property
    def log_evidence(self) -> Tensor:
        """Logarithm (b,) of the likelihood averaged over maps and poses."""
        logs = torch.stack([found.log_evidence for found in self.found], dim=1)
        return logs.logsumexp(1) - math.log(len(self.found))

    def add_to(self, sums: list[Backprojection]) -> None:
        """Put the images back where they may belong."""
        images = self.ready.weighted(self.ready.whole, torch.ones(len(self.rows)), self.noise)
        for number, (found, own) in enumerate(zip(self.found, sums, strict=True)):
            weights = found.shares * self.classes[found.owner, number]
            kept = weights > _NEGLIGIBLE
            poses = found.rotations[kept], found.shifts_px[kept], weights[kept].float()
            own.add(images, *poses, owner=found.owner[kept])


_NEGLIGIBLE = 1e-4
"""Probability of a pose that is not worth putting an image back."""


class Comparison:
    """Compare images with maps, to a radius.

    Parameters
    ----------
    plan, spectra
        Sizes, noise.
    maps : Tensor (k, box, box, box)
    radius : int
        Rings that are compared.
    refined : bool
        Whether poses are refined to maxima, each with the probability about it; the grid then compares no
        more rings than it resolves. While maps are still wrong that is too sure of itself: runs compare all
        rings at all poses of the grid.
    """

    def __init__(self, plan: Plan, spectra: Spectra, maps: Tensor, *, radius: int, refined: bool) -> None:
        self.plan, self.spectra, self.disc = plan, spectra, plan.disc
        coarse = min(radius, plan.coarse) if refined else radius
        self.radii = _ascents(coarse, radius) if refined else ()
        with one_torch_thread():
            reach = min(radius + 1, plan.box // 2)
            self.volumes = [SplineVolume.of(each, radius_px=reach) for each in maps]
        self.grid = PolarGrid(plan.box, coarse, plan.support_px, device=plan.device)
        step = max(plan.side / (2 * math.pi * coarse) * math.sqrt(2), plan.pixel_size)
        self.deviation_px = plan.shift_range / 2 / plan.pixel_size
        self.searches = [
            DirectionSearch(
                self.grid,
                volume,
                order=plan.order(coarse),
                group=plan.step.symmetry,
                range_px=max(plan.shift_range, step) / plan.pixel_size,
                step_px=step / plan.pixel_size,
                deviation_px=self.deviation_px,
                most=_COARSE_STARTS if refined else plan.likely,
            )
            for volume in self.volumes
        ]

    def __call__(self, rows: NDArray[np.intp], pictures: Tensor) -> Posterior:
        """Posterior of some particles, of which these are the images."""
        plan = self.plan
        parameters, flipped = plan.source.ctf[torch.from_numpy(rows)], torch.from_numpy(plan.flipped[rows])
        pictures, mask = pictures.to(plan.device), plan.image_mask()
        with one_torch_thread():
            how = parameters, self.disc, plan.pixel_size
            ready = prepare(pictures, mask, *how, phase_flipped=flipped)
            how = parameters, self.grid, plan.pixel_size
            samples, transfer = on_rings(pictures, mask, *how, phase_flipped=flipped)
            group = torch.from_numpy(plan.groups[rows]).to(plan.device)
            noise = self.spectra.noise.of_images(group, ring_means(self.disc, ready.ctf.square()))
        on_grid = samples, transfer, noise[:, : self.grid.rings]
        found = tuple(self._find(number, ready, noise, on_grid) for number in range(len(self.searches)))
        classes = torch.stack([one.log_evidence for one in found], dim=1).softmax(1)
        return Posterior(rows, ready, noise, found, classes)

    def _find(
        self, number: int, ready: PreparedImages, noise: Tensor, on_grid: tuple[Tensor, Tensor, Tensor]
    ) -> Found:
        search, volume = self.searches[number], self.volumes[number]
        if not self.radii:
            likely = search(*on_grid)
            # The search sums over poses what has to be averaged.
            prior = search.shifts_px.square().sum(1).div(-2 * self.deviation_px**2).logsumexp(0)
            poses = search.grid.angles * len(search.rows)
            evidence = likely.log_evidence - math.log(poses) - float(prior)
            found = likely.rotations, likely.shifts_px, likely.owner, likely.probability, evidence
            return Found(*(each.to(self.plan.device) for each in found), maxima=None)
        images = ready.weighted(ready.masked, torch.ones(len(ready.masked)), noise)
        maxima, _ = search_everywhere(
            search,
            volume,
            images,
            *on_grid,
            radii=self.radii,
            deviation_px=self.deviation_px,
            group=self.plan.step.symmetry,
            starts=_STARTS,
        )
        poses = maxima.poses
        return Found(
            poses.rotations, poses.shifts_px, maxima.owner, maxima.shares, maxima.log_evidence, maxima
        )


def _ascents(coarse: int, radius: int) -> tuple[float, ...]:
    """Radii of the ascents, from about that of the grid to the last."""
    steps = max(0, math.ceil(math.log(max(1.0, radius / coarse), _FURTHER)) - 1)
    return (*(min(radius, round(coarse * _FURTHER ** (i + 1))) for i in range(steps)), radius)
