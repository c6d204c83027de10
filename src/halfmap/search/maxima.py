"""Posteriors of poses against one volume: their maxima, what each holds, and the evidence of the volume."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halfmap.ops import symmetry
from halfmap.search.disc import DiscImages
from halfmap.search.local import LocalPoses, PosePrior, refine_poses
from halfmap.search.projector import SplineVolume
from halfmap.search.sampling import DirectionSearch, subdivided

_LEAST_SHARE = 1e-3
"""Part of a posterior that a maximum must hold to be kept."""

_EARLY = 1e-4
"""The same while frequencies are still left out, which may change it."""

_ROTATIONS = 8 * math.pi**2
"""Volume of all rotations, measured by turns in radians."""


@dataclass(frozen=True, eq=False)
class Maxima:
    """Maxima of the posteriors of a batch of images, those of one image one after the other, the best first.

    Attributes
    ----------
    poses : LocalPoses
        n of them, with their widths.
    owner : Tensor (n,) int64
        Image of each.
    shares : Tensor (n,) float64
        Part of the posterior of its image that each holds; those of an image sum to 1.
    log_evidence : Tensor (b,) float64
        Logarithm of the likelihood over that of noise alone, averaged over all poses by their prior: what
        several volumes are to be compared by.
    """

    poses: LocalPoses
    owner: Tensor
    shares: Tensor
    log_evidence: Tensor

    @property
    def best(self) -> Tensor:
        """Index (b,) of the maximum of each image that holds most."""
        return torch.searchsorted(self.owner, torch.arange(len(self.log_evidence), device=self.owner.device))


def climb(
    volume: SplineVolume,
    images: DiscImages,
    rotations: Tensor,
    shifts_px: Tensor,
    owner: Tensor,
    *,
    radii: Sequence[float],
    deviation_px: float,
    group: str = "C1",
    most: int = 4,
    prior: PosePrior | None = None,
    priors: int = 1,
) -> Maxima:
    """Climb from some poses of each image to maxima of its posterior, with more and more frequencies.

    Parameters
    ----------
    volume : SplineVolume
    images : DiscImages
        b of them.
    rotations, shifts_px, owner : Tensor (n, 3, 3), (n, 2), (n,)
        Where to begin, at least one pose for each image, those of one image one after the other.
    radii : sequence of float
        Largest frequency of each ascent in Fourier pixels, growing.
    deviation_px : float
        Standard deviation of the normal prior of shifts.
    group : str
        Point group, of which poses that are equivalent are one, and the prior is that of an asymmetric unit.
    most : int
        Maxima kept for an image after each ascent.
    prior : PosePrior, optional
        Of each of the poses, instead: the nearest of those of its image.
    priors : int
        How many of these an image has, with equal chances, if they are given.

    Returns
    -------
    Maxima

    Notes
    -----
    The basin of a maximum is as wide as the finest detail compared: detail that is added only when a pose is
    near enough does not trap it. Each maximum counts by Laplace's approximation.
    """
    least = [_EARLY] * (len(radii) - 1) + [_LEAST_SHARE]
    local = LocalPoses(rotations, shifts_px, torch.empty(0), torch.empty(0))
    prior = None if prior is None else prior.to(owner.device)
    widest = _widest(owner, prior, deviation_px, group) + math.log(priors)
    shares = torch.empty(0)
    for radius, part in zip(radii, least, strict=True):
        start = local.rotations, local.shifts_px
        how = {"radius": radius, "deviation_px": deviation_px, "prior": prior}
        local = refine_poses(volume, images, *start, owner=owner, **how)
        shares = local.shares(owner, group)
        kept = _kept(shares, owner, most, part)
        owner, shares = owner[kept], shares[kept]
        widest, prior = widest[kept], None if prior is None else prior[kept]
        local = LocalPoses(*(each[kept] for each in vars(local).values()))
    total = torch.zeros(len(images), dtype=shares.dtype, device=shares.device).index_add_(0, owner, shares)
    evidence = _evidence(local, owner, len(images), widest)
    return Maxima(local, owner, shares / total[owner], evidence)


def search_everywhere(
    search: DirectionSearch,
    volume: SplineVolume,
    images: DiscImages,
    samples: Tensor,
    ctf: Tensor,
    noise: Tensor,
    *,
    radii: Sequence[float],
    deviation_px: float,
    group: str = "C1",
    centres_px: Tensor | None = None,
    starts: int = 8,
) -> tuple[Maxima, Tensor]:
    """Find maxima among all poses: a grid at a low radius, finer where it is likely, then ascents.

    Parameters
    ----------
    search : DirectionSearch
        Of this volume and group.
    volume, images
        As for `climb`.
    samples, ctf, noise : Tensor (b, rings, angles / 2) twice, (b, rings)
        The same images on the rings of the search.
    radii, deviation_px, group
        As for `climb`; the first radius is also that of the finer grid.
    centres_px : Tensor (b, 2), optional
        Shifts about which shifts are searched, none by default.
    starts : int
        Poses of the finer grid that ascents begin at.

    Returns
    -------
    Maxima
    significant : Tensor (b,) int64
        Poses of the coarse grid that hold 99.9 % of the posterior, or as many as are kept.
    """
    if centres_px is not None:
        samples = samples * search.grid.shifts(centres_px)
    coarse = search(samples, ctf, noise)
    if centres_px is not None:
        coarse = replace(coarse, shifts_px=coarse.shifts_px + centres_px[coarse.owner])
    fine = subdivided(coarse, volume, images, radius=radii[0], deviation_px=deviation_px, most=starts)
    maxima = climb(
        volume,
        images,
        fine.rotations,
        fine.shifts_px,
        fine.owner.to(images.linear.device),
        radii=radii,
        deviation_px=deviation_px,
        group=group,
    )
    return maxima, coarse.owner.bincount(minlength=len(images))


def _kept(shares: Tensor, owner: Tensor, most: int, least: float) -> Tensor:
    """Indices of the best maxima of each image that hold a part worth it, the best first."""
    order = torch.argsort(shares, descending=True, stable=True)
    order = order[torch.argsort(owner[order], stable=True)]
    whose = owner[order]
    rank = torch.arange(len(order), device=order.device) - torch.searchsorted(whose, whose)
    return order[(rank < most) & ((shares[order] >= least) | (rank == 0))]


def _widest(owner: Tensor, prior: PosePrior | None, deviation_px: float, group: str) -> Tensor:
    """Logarithm (n,) of the volume of the prior about each pose, by its density at the middle."""
    if prior is not None:
        determinant = torch.linalg.slogdet(prior.precision).logabsdet
        return 2.5 * math.log(2 * math.pi) - 0.5 * determinant
    # Poses that are equivalent are counted once, and each stands for as many.
    widest = math.log(_ROTATIONS / symmetry.order(group)) + math.log(2 * math.pi * deviation_px**2)
    return torch.full((len(owner),), widest, dtype=torch.float64, device=owner.device)


def _evidence(local: LocalPoses, owner: Tensor, n: int, widest: Tensor) -> Tensor:
    """Sum of the normal distributions about the maxima, over the prior of which `widest` is the volume."""
    spread = -0.5 * torch.linalg.slogdet(local.precision).logabsdet + 2.5 * math.log(2 * math.pi)
    # What nothing determines is as wide as the prior.
    spread = torch.where(spread.isfinite(), spread, widest).minimum(widest)
    logs = local.log_likelihood + spread - widest
    greatest = logs.new_full((n,), -math.inf).scatter_reduce_(0, owner, logs, "amax")
    total = logs.new_zeros(n).index_add_(0, owner, (logs - greatest[owner]).exp())
    return greatest + total.log()
