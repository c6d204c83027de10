"""How evenly views sample Fourier space: slices in each direction, what that costs, and views that attract.

A particle with the rotation R is seen along ``R[2]`` and gives the central slice across this direction. Of N
slices from evenly spread views, N / (2 r) pass within half a voxel of any point at a radius of r voxels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import hyp1f1
from torch import Tensor

from halfmap.errors import ParameterError
from halfmap.ops._views import checked_views, sphere
from halfmap.ops.attraction import Attraction, attraction
from halfmap.ops.symmetry import operators, order

__all__ = [
    "Attraction",
    "Sampling",
    "attraction",
    "efficiency",
    "sample_fourier",
    "sphere",
    "view_density",
]

RADIUS = 50.0
"""Fourier voxels at which slices are counted; the curve over larger ones is flat for many particles."""

_PAIRS = 1 << 22
"""Views times directions that are compared at a time."""

_ROWS = 256
"""Directions that are compared with all others at a time."""

_SURFACE = math.exp(-2)
"""Of the point spread function's maximum, where its surface is."""

_STEP, _FARTHEST = 0.25, 40.0
"""Between radii at which the surface is looked for, and the farthest; it is at 3.31 for even views."""

_PROBED = 3
"""HEALPix order of the directions in which it is looked for."""

_FLATTEST = 1e-3
"""Cosine between a direction and the surface's normal, at least."""


@dataclass(frozen=True, eq=False)
class Sampling:
    """How many slices pass by each direction of Fourier space.

    Attributes
    ----------
    directions : Tensor (d, 3), float64
        Unit vectors (x, y, z) over the whole sphere, each of the same area. Those of one asymmetric unit come
        first, then their equivalents.
    slices : Tensor (d,), float64
        Slices, or sum of their weights, within reach; equivalents of the particles counted.
    one : float
        What one slice counts: 1, or the mean weight.
    unit : int
        Directions of one asymmetric unit.
    """

    directions: Tensor
    slices: Tensor
    one: float
    unit: int

    @property
    def relative(self) -> Tensor:
        """Sampling (d,) over that of evenly spread views: 1 everywhere for these."""
        return self.slices / self.slices.mean()

    @property
    def unsampled(self) -> float:
        """Part of Fourier space that no slice reaches, 0 to 1."""
        return float((self.slices <= 0).double().mean())

    @property
    def scf(self) -> float:
        """Sampling compensation factor: one over the mean of one over the sampling; 0 if there are gaps.

        The signal-to-noise ratio of shells is that of evenly spread views times this factor: 1 for these,
        8 / π² = 0.81 for views from all sides of an axis.
        """
        return 0.0 if self.unsampled > 0 else 1 / float((1 / self.relative).mean())

    @property
    def scf_star(self) -> float:
        """SCF*: the sampled part of Fourier space, by the factor where gaps count as if one slice was there.

        ``(1 - g) / (m <1/s>)`` with the part g in gaps, the mean m of all slices s, and the mean <> over all
        directions, in gaps with s = 1. The same as `scf` without gaps. With gaps it falls with the number of
        particles, as these are of no use there. It is ``SCF / (1 + g / (1 - g) m SCF)``, with the SCF of what
        is sampled alone, as the authors' first program has it; later ones put two slices into gaps.
        """
        filled = self.slices.where(self.slices > 0, self.one)
        return (1 - self.unsampled) / float(self.slices.mean() * (1 / filled).mean())

    def worst(self, count: int = 1) -> tuple[Tensor, Tensor]:
        """Directions (count, 3) about which fewest slices pass, and the relative sampling (count,) there.

        Of one asymmetric unit. Means about each direction, by the eighth power of the cosine: in a gap, its
        middle is the worst.
        """
        directions, relative = self.directions.float(), self.relative.float()
        means = []
        for some in directions[: self.unit].split(_ROWS):
            near = (some @ directions.T).pow_(8)
            means.append((near @ relative) / near.sum(1))
        about = torch.cat(means).double()
        first = torch.argsort(about, stable=True)[:count]
        return self.directions[first], about[first]


def sample_fourier(
    rotations: Tensor, *, group: str = "C1", weights: Tensor | None = None, radius: float = RADIUS
) -> Sampling:
    """Count the slices that pass within half a voxel of each direction at a radius of Fourier space.

    Parameters
    ----------
    rotations : Tensor (n, 3, 3)
        Of the particles, one each: equivalents by the group are counted here.
    group : str
        Point group, as for `symmetry.operators`.
    weights : Tensor (n,), optional
        Of the particles, 0 or more; 1 by default.
    radius : float
        In Fourier voxels. At a larger one slices have less reach, and fewer particles leave gaps.

    Returns
    -------
    Sampling

    Raises
    ------
    ShapeError
        If these are no rotations, or weights of other particles.
    ParameterError
        If there are none, all weights are 0 or one is negative, or the radius is less than 1.

    References
    ----------
    .. [1] Baldwin & Lyumkis 2020, Prog. Biophys. Mol. Biol. 150, 160-183,
       DOI 10.1016/j.pbiomolbio.2019.09.002
    .. [2] Baldwin & Lyumkis 2021, Prog. Biophys. Mol. Biol. 160, 53-65,
       DOI 10.1016/j.pbiomolbio.2020.06.003
    """
    if not radius >= 1:
        raise ParameterError(f"slices cannot be counted at {radius:g} Fourier voxels", hint="1 or more")
    views, weight = checked_views(rotations, weights)
    reach = 0.5 / radius
    directions = sphere(group)
    slices = _summed(views, weight, directions, group, lambda cosine: cosine.abs() <= reach)
    return Sampling(directions, slices, float(weight.mean()), len(directions) // order(group))


def view_density(
    rotations: Tensor, *, group: str = "C1", weights: Tensor | None = None, width: float = 5.0
) -> tuple[Tensor, Tensor]:
    """Smooth the distribution of views over the sphere, for pictures and for what is seen most.

    Parameters
    ----------
    rotations, group, weights
        As for `sample_fourier`.
    width : float
        Standard deviation of the smoothing along each of two axes, degrees.

    Returns
    -------
    directions : Tensor (d, 3)
        Of `sphere`: viewing directions in volume coordinates.
    density : Tensor (d,)
        Over that of evenly spread views: 1 everywhere for these.

    Notes
    -----
    By the density of von Mises and Fisher. A view from the other side gives the mirror image, and is not the
    same.
    """
    views, weight = checked_views(rotations, weights)
    if not 1 <= width <= 60:
        raise ParameterError(f"views cannot be smoothed by {width:g}°", hint="1 to 60")
    sharp = math.radians(width) ** -2
    directions = sphere(group)
    sums = _summed(views, weight, directions, group, lambda cosine: torch.exp(sharp * (cosine - 1)))
    mean = -math.expm1(-2 * sharp) / (2 * sharp) * float(weight.sum()) * order(group)
    return directions, sums / mean


def efficiency(sampling: Sampling) -> float:
    """Efficiency E_od of a distribution of views: 1 - 2 σ / R of its point spread function.

    Parameters
    ----------
    sampling : Sampling
        From `sample_fourier`.

    Returns
    -------
    float
        1 for evenly spread views, 0.80 for views from all sides of an axis, below 0.1 for a single view.

    Notes
    -----
    The transfer function is the root of the number of slices at each point of Fourier space, by
    ``exp(-B k² / 4)``; where its Fourier transform has fallen to 1/e² of its maximum is a surface, whose
    distance from the origin has the mean R and the standard deviation σ. Both are taken over the surface's
    area. Slices have no thickness here but in how they spread over directions: their number at a radius k is
    the sampling of a direction over k, the transfer function falls apart into directions, and the B-factor
    changes nothing but the scale. Where the surface does not close, R is cut off at 12 times that of evenly
    spread views. Less than 0 is given as 0.

    References
    ----------
    .. [1] Naydenova & Russo 2017, Nat. Commun. 8, 629, DOI 10.1038/s41467-017-00782-3
    """
    directions = sampling.directions.numpy()
    transfer = sampling.relative.sqrt().numpy()
    # The other side is the same.
    probed = sphere(healpix_order=_PROBED).numpy()
    probed = probed[probed @ np.array([0.12, 0.34, 0.93]) > 0]
    radius = _surface(probed, directions, transfer)
    cosine = probed @ directions.T
    slope = transfer * np.sign(cosine) * _slope(radius[:, None] * np.abs(cosine))
    gradient = slope @ directions
    outwards = np.abs((gradient * probed).sum(1)) / np.linalg.norm(gradient, axis=1)
    area = radius**2 / np.maximum(outwards, _FLATTEST)
    mean = np.average(radius, weights=area)
    deviation = math.sqrt(np.average((radius - mean) ** 2, weights=area))
    return max(0.0, 1 - 2 * deviation / mean)


def _surface(
    probed: NDArray[np.float64], directions: NDArray[np.float64], transfer: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Distance from the origin at which the point spread function has fallen, along some directions."""
    table = np.arange(0, _FARTHEST + _STEP, _STEP / 20)
    # Of k^(3/2) exp(-k²) by cos(k x): what a direction of Fourier space adds at a distance x along it.
    value = hyp1f1(1.25, 0.5, -(table**2) / 4)
    cosine = np.abs(probed @ directions.T)
    whole = float(transfer.sum())
    limit = _SURFACE * whole
    radius = np.full(len(probed), _FARTHEST)
    left, before = np.arange(len(probed)), np.full(len(probed), whole)
    for r in np.arange(_STEP, _FARTHEST, _STEP):
        now = np.interp(r * cosine[left], table, value) @ transfer
        falls = now < limit
        part = (before - limit)[falls] / (before - now)[falls]
        radius[left[falls]] = r - _STEP + part * _STEP
        left, before = left[~falls], now[~falls]
        if not len(left):
            break
    return radius


def _slope(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Derivative of what `_surface` sums, by x."""
    table = np.arange(0, _FARTHEST + _STEP, _STEP / 20)
    return np.interp(x, table, -1.25 * table * hyp1f1(2.25, 1.5, -(table**2) / 4))


def _summed(
    views: Tensor,
    weights: Tensor,
    directions: Tensor,
    group: str,
    kernel: Callable[[Tensor], Tensor],
) -> Tensor:
    """Sum a function of the cosine with the equivalents of all views, at the directions of `sphere`.

    It is the same at equivalent directions, so that those of one asymmetric unit are enough.
    """
    turns = operators(group).float()
    unit = directions[: len(directions) // len(turns)]
    sums = torch.zeros(len(unit), dtype=torch.float64)
    step = max(1, _PAIRS // len(unit))
    for turn in turns:
        turned = unit.float() @ turn
        for start in range(0, len(views), step):
            part = slice(start, start + step)
            values = kernel(views[part].float() @ turned.T)
            sums += weights[part].float() @ values.float()
    return sums.repeat(len(turns))
