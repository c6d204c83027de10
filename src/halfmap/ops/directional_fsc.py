"""Fourier shell correlation in cones about many directions, and how much it differs between these."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import ConvexHull
from scipy.stats import chi2
from torch import Tensor

from halfmap.errors import ParameterError, ShapeError
from halfmap.ops.fourier import rfft3
from halfmap.ops.grids import friedel_weight

HALF_ANGLE = 20.0
"""Of a cone, degrees."""

THRESHOLD = 0.143

_CELL = 2.0
"""Side in degrees of the cells of the sphere that coefficients are summed in."""

_FIRST = 2
"""Shell from which on directions are told apart."""

_ENOUGH = 200.0
"""Coefficients that a cone holds at least, or shells about its own are taken in."""

_ALIKE = 1.7
"""Independent cones over those that fit into the sphere, as those that overlap a little are half independent:
with it the statistic of isotropic maps has the mean of χ²."""

_TINY = 1e-30

_SURE = 0.95
"""Of the hypothesis test."""


@dataclass(frozen=True, eq=False)
class DirectionalFSC:
    """Correlation of two half maps, shell by shell, in cones.

    Attributes
    ----------
    directions : Tensor (d, 3), float64
        Axes (x, y, z), one of each pair of opposite ones, spread evenly.
    curves : Tensor (d, shells), float64
        Correlation in each cone.
    whole : Tensor (shells,), float64
        In all of each shell.
    numbers : Tensor (d, shells), float64
        Coefficients of the full spectrum in each cone and shell. Where these are fewer than 200, the curves
        take in neighbouring shells (`widened`).
    half_angle : float
        Of the cones, degrees.
    """

    directions: Tensor
    curves: Tensor
    whole: Tensor
    numbers: Tensor
    half_angle: float

    def last_shells(self, threshold: float = THRESHOLD) -> Tensor:
        """Shell (d,) at which each curve first falls below a threshold, between shells; the last if never."""
        return _falls(self.curves, threshold)

    def resolutions(self, side: float, threshold: float = THRESHOLD) -> Tensor:
        """Resolution (d,) in Å along each direction, for a box `side` Å wide."""
        return side / self.last_shells(threshold)

    def corrected(self, randomised: Tensor, *, from_shell: int, last_shell: int) -> DirectionalFSC:
        """Take off what a mask correlates, the same in all directions, and end where a filter ends noise.

        Parameters
        ----------
        randomised : Tensor (shells,)
            Correlation r of the masked maps with random phases: (c - r) / (1 - r) takes c's place.
        from_shell : int
            First shell with random phases; curves are corrected from two shells later on.
        last_shell : int
            Beyond it curves are 0.
        """
        start, r = from_shell + 2, randomised.double()[from_shell + 2 :]
        kept = (torch.arange(len(self.whole)) <= last_shell).double()
        curves, whole = self.curves.clone(), self.whole.clone()
        for each in (curves, whole):
            each[..., start:] = (each[..., start:] - r) / (1 - r).clamp_min(_TINY)
        return replace(self, curves=curves * kept, whole=whole * kept)


def even_directions(count: int) -> Tensor:
    """Axes (count, 3) spread evenly over half the sphere, on a spiral."""
    number = torch.arange(count, dtype=torch.float64)
    z = 1 - (number + 0.5) / count
    angle = number * (math.pi * (3 - math.sqrt(5)))
    across = (1 - z.square()).sqrt()
    return torch.stack([across * angle.cos(), across * angle.sin(), z], dim=1)


def directional_fsc(
    first: Tensor,
    second: Tensor,
    *,
    mask: Tensor | None = None,
    directions: Tensor | int = 300,
    half_angle: float = HALF_ANGLE,
) -> DirectionalFSC:
    """Correlate two half maps shell by shell in cones about many directions.

    Parameters
    ----------
    first, second : Tensor (n, n, n)
        Unfiltered half maps.
    mask : Tensor (n, n, n), optional
        0 to 1; both are multiplied by it.
    directions : Tensor (d, 3) or int
        Axes of the cones, or how many `even_directions`.
    half_angle : float
        Between the axis and the edge of a cone, degrees.

    Returns
    -------
    DirectionalFSC
        Of the shells 0 to n // 2.

    Raises
    ------
    ShapeError
        If maps and mask are no cubes of one size.
    ParameterError
        If the half-angle is not between 5° and 90°.

    Notes
    -----
    Coefficients are summed once, plane by plane, in cells of 2° and shells; a cone is the sum of the cells
    whose middle is within. The memory is that of two half-spectra, and the time hardly grows with the number
    of directions. What the mask correlates is not taken off: it spreads what was measured into what was not,
    in both half maps alike, so that gaps seem narrower than they are, and that of views along one axis is
    missed. The sampling of the views shows it (`orientation.sample_fourier`). What it correlates in the mean
    of all directions, `DirectionalFSC.corrected` takes off.
    """
    n = len(first)
    masked = () if mask is None else (mask,)
    if any(tuple(each.shape) != (n, n, n) for each in (first, second, *masked)):
        shapes = ", ".join(str(tuple(each.shape)) for each in (first, second, *masked))
        raise ShapeError(f"maps and mask of {shapes} voxels cannot be compared")
    if not 5 <= half_angle <= 90:
        raise ParameterError(f"cones of {half_angle:g}° cannot be compared", hint="5° to 90°")
    axes = even_directions(directions) if isinstance(directions, int) else directions.double()
    a, b = (rfft3(each if mask is None else each * mask) for each in (first, second))
    cells = _Cells()
    sums = _summed(a, b, cells)
    inside = (axes @ cells.middles.T).abs() >= math.cos(math.radians(half_angle))
    whole = sums.sum(1)
    correlation = _correlation(whole)
    # Shells that are taken together count by their numbers, not by their power.
    power = torch.stack([(whole[1] * whole[2]).sqrt(), whole[1], whole[2]]).clamp_min(_TINY)
    sums[:3] *= (whole[3] / power)[:, None]
    within = torch.einsum("dc,kcs->kds", inside.double(), sums)
    curves = _correlation(widened(within, windows(within[3])))
    return DirectionalFSC(axes, curves, correlation, within[3], float(half_angle))


def area_ratio(found: DirectionalFSC, threshold: float = THRESHOLD) -> float:
    """Conical FSC area ratio: the least area under the curve of a cone over the greatest, 0 to 1.

    Each area ends where its curve first falls below the threshold. CryoSPARC calls it cFAR, and values below
    0.5 a sign of missing views.
    """
    ends = found.last_shells(threshold)[:, None]
    last = ends.long()
    upto = torch.nn.functional.pad(torch.cumulative_trapezoid(found.curves[:, 1:]), (2, 0))
    rest = (ends - last) * (found.curves.gather(1, last) + threshold) / 2
    areas = (upto.gather(1, last) + rest).clamp_min(0)
    return float(areas.min() / areas.max().clamp_min(_TINY))


def sphericity(found: DirectionalFSC, threshold: float = THRESHOLD) -> float:
    """How near to a sphere the surface is at which the correlation falls below a threshold, 0 to 1.

    Surface of the sphere of the same volume over the surface. Its corners are along the directions and their
    opposites, at the shells where these are lost.

    References
    ----------
    .. [1] Tan et al. 2017, Nat. Methods 14, 793-796, DOI 10.1038/nmeth.4347
    """
    ends = found.last_shells(threshold).numpy()
    axes = found.directions.numpy()
    corners, radius = np.concatenate([axes, -axes]), np.concatenate([ends, ends])
    faces = ConvexHull(corners).simplices
    return _roundness(corners, faces, radius) / _roundness(corners, faces, np.ones_like(radius))


@dataclass(frozen=True, eq=False)
class Occupancy:
    """Part of the directions that are not lost yet, shell by shell.

    Attributes
    ----------
    part : Tensor (shells,)
        Fourier shell occupancy: of the directions, those whose correlation is above the threshold.
    bingham : Tensor (shells,)
        Statistic of Bingham's test that these directions are spread evenly.
    limit : float
        What it exceeds in one of twenty cases if they are, for as many independent directions.
    """

    part: Tensor
    bingham: Tensor
    limit: float

    def shell_of(self, part: float) -> float:
        """Shell, between shells, at which the occupancy first falls below a part."""
        return float(_falls(self.part, part))

    @property
    def fall(self) -> float:
        """Frequency at which 10 % of the directions are left over that at which 90 % are: 1 if isotropic."""
        return self.shell_of(0.1) / self.shell_of(0.9)


def occupancy(found: DirectionalFSC, threshold: float = THRESHOLD, *, order: int = 1) -> Occupancy:
    """Fourier shell occupancy, with Bingham's test of the directions that are left.

    Parameters
    ----------
    found : DirectionalFSC
    threshold : float
        Of the correlation.
    order : int
        Of the maps' point group: equivalent directions are one.

    Returns
    -------
    Occupancy

    Notes
    -----
    Of n directions left with the scatter matrix T, Bingham's statistic is ``15/2 n (tr T² - 1/3)``, which has
    the χ² distribution of 5 degrees of freedom for independent even directions. Cones that overlap are not
    independent: n is 1.7 times the number of cones of this size that fit into the sphere, ``2 / (1 - cos)``,
    by the part that is left, over the group's order. Taken as independent, 300 directions would fail the test
    in any map. Whatever is left, T is even in the groups T, O and I: the test is blind there.

    A map is isotropic if the occupancy falls from 0.9 to 0.1 within a few shells, and the test is passed
    between.

    References
    ----------
    .. [1] Vilas & Tagare 2023, Nat. Methods 20, DOI 10.1038/s41592-023-01874-3
    """
    left = (found.curves >= threshold).double()
    left[:, :_FIRST] = 1
    part = left.mean(0)
    axes = found.directions
    scatter = torch.einsum("ds,di,dj->sij", left, axes, axes) / left.sum(0).clamp_min(1)[:, None, None]
    squared = (scatter @ scatter).diagonal(dim1=1, dim2=2).sum(1)
    independent = 2 / (1 - math.cos(math.radians(found.half_angle))) * _ALIKE / order
    bingham = 7.5 * independent * part * (squared - 1 / 3).clamp_min(0)
    return Occupancy(part, bingham.where(part > 0, 0.0), float(chi2.ppf(_SURE, 5)))


class _Cells:
    """Cells of the half sphere x >= 0: rings about the x axis, of about as wide cells each."""

    def __init__(self) -> None:
        self.rings = round(90 / _CELL)
        tilt = (torch.arange(self.rings, dtype=torch.float64) + 0.5) * (math.pi / 2 / self.rings)
        self.counts = (2 * math.pi * tilt.sin() / math.radians(_CELL)).round().clamp_min(1).long()
        self.offsets = torch.cat([self.counts.new_zeros(1), self.counts.cumsum(0)])
        ring = torch.repeat_interleave(torch.arange(self.rings), self.counts)
        step = torch.arange(len(ring)) - self.offsets[ring]
        angle = (step + 0.5) * (2 * math.pi / self.counts[ring])
        across, along = tilt.sin()[ring], tilt.cos()[ring]
        self.middles = torch.stack([along, across * angle.cos(), across * angle.sin()], dim=1)

    def __call__(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """Cell of each vector, x >= 0."""
        across = torch.hypot(y, z)
        ring = (torch.atan2(across, x) * (2 * self.rings / math.pi)).long().clamp_(max=self.rings - 1)
        counts = self.counts[ring]
        step = ((torch.atan2(z, y) / (2 * math.pi)) % 1 * counts).long()
        return self.offsets[ring] + torch.minimum(step, counts - 1)


def _summed(a: Tensor, b: Tensor, cells: _Cells) -> Tensor:
    """Products, powers and numbers (4, cells, shells) of half-spectra, plane by plane."""
    n, shells, count = len(a), len(a) // 2 + 1, len(cells.middles)
    sums = torch.zeros(4, count * shells, dtype=torch.float64)
    weight = friedel_weight((*a.shape[:2], n)).float()
    full = torch.fft.fftfreq(n, 1 / n)
    y, x = full[:, None], torch.arange(n // 2 + 1).float()[None]
    for z in range(n):
        radius = (x**2 + y**2 + full[z] ** 2).sqrt().round().long()
        inside = radius < shells
        own = [each.broadcast_to(radius.shape)[inside] for each in (x, y, full[z])]
        place = cells(*own) * shells + radius[inside]
        one, two = a[z][inside], b[z][inside]
        counted = weight.broadcast_to(radius.shape)[inside]
        products = (one.real * two.real + one.imag * two.imag, *(_power(each) for each in (one, two)))
        for total, values in zip(sums, (*products, torch.ones_like(counted)), strict=True):
            total.scatter_add_(0, place, (values * counted).double())
    return sums.reshape(4, count, shells)


def windows(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """First shell (shells,) of those to either side of each that hold 200 coefficients, and end of these.

    By the numbers (d, shells) that single cones and shells hold, in the mean over directions.
    """
    shells = numbers.shape[1]
    held = torch.nn.functional.pad(numbers.mean(0).cumsum(0), (1, 0))
    low, high = torch.arange(shells), torch.arange(shells) + 1
    for _ in range(shells):
        few = held[high] - held[low] < _ENOUGH
        # The shells before the first hold what all directions share.
        low = torch.where(few, (low - 1).clamp_min(0), low)
        high = torch.where(few, (high + 1).clamp_max(shells), high)
    return low, high


def widened(sums: Tensor, shells: tuple[Tensor, Tensor]) -> Tensor:
    """Sums (..., shells) over the shells about each, from a first one to before an end."""
    upto = torch.nn.functional.pad(sums.cumsum(-1), (1, 0))
    return upto[..., shells[1]] - upto[..., shells[0]]


def _power(values: Tensor) -> Tensor:
    return values.real.square() + values.imag.square()


def _correlation(sums: Tensor) -> Tensor:
    norm = (sums[1] * sums[2]).sqrt()
    return torch.where(norm > 0, sums[0] / norm.where(norm > 0, 1.0), 0.0)


def _falls(curves: Tensor, threshold: float) -> Tensor:
    """Where curves (..., shells) first fall below a threshold, between shells."""
    low = curves[..., _FIRST:] < threshold
    at = low.long().argmax(-1, keepdim=True) + _FIRST
    before, after = curves.gather(-1, at - 1), curves.gather(-1, at)
    part = ((before - threshold) / (before - after).clamp_min(_TINY)).where(before > threshold, 1.0)
    last = float(curves.shape[-1] - 1)
    return (at - 1 + part).squeeze(-1).where(low.any(-1), last)


def _roundness(corners: NDArray[np.float64], faces: NDArray[np.int32], radius: NDArray[np.float64]) -> float:
    """Sphericity of a polyhedron about the origin."""
    p, q, r = (corners[faces[:, i]] * radius[faces[:, i], None] for i in range(3))
    volume = np.abs((p * np.cross(q, r)).sum(1)).sum() / 6
    surface = np.linalg.norm(np.cross(q - p, r - p), axis=1).sum() / 2
    return float(np.pi ** (1 / 3) * (6 * volume) ** (2 / 3) / surface)
