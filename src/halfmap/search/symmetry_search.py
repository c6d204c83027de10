"""Find a map's point group, and the rotation and centre that put it into the standard setting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from halfmap.errors import ShapeError
from halfmap.ops import fourier
from halfmap.ops.fsc import fsc
from halfmap.ops.interpolation import rotate_volume, sample_volume
from halfmap.ops.rotations import from_rotation_vector
from halfmap.ops.symmetry import operators, order
from halfmap.ops.threads import one_blas_thread, one_torch_thread
from halfmap.search.symmetry_axes import DEGREE, axis_tables, best_orientation, null_scores
from halfmap.search.symmetry_map import RIM, VOXELS, Band, Sphere, coarser, extent

GROUPS = (*(f"C{n}" for n in range(2, 13)), *(f"D{n}" for n in range(2, 13)), "T", "O", "I2")
"""Point groups that are tried."""

LEAST_SHARE = 0.9
"""Least correlation under the weakest class of operators, in parts of what the map's noise would leave.

On simulated maps with noise symmetric models have 0.98 to 1.04, nearly symmetric ones (haemoglobin as D2,
an AAA+ hexamer as C6, AcrB as C3) 0.8 to 0.92.
"""

LEAST_OF_BEST = 0.93
"""And in parts of the best group's: a nearly symmetric map falls off there, as noise does not."""

LEAST_SIGMAS = 5.0
"""And above that of asymmetric maps, in standard deviations."""

_PROMISING, _HOPELESS = 0.6, 0.3
"""Least first score of groups that are refined, in parts of the best one and of what the noise leaves."""


@dataclass(frozen=True, eq=False)
class GroupScore:
    """How well a map has a point group about the best axes.

    Attributes
    ----------
    group : str
        Name as in `ops.symmetry`.
    correlation : float
        Mean correlation of the map with itself under the operators but the identity, over all Fourier
        coefficients of the band, each weighed by its signal: 1 without noise, 0 on average if not related.
    weakest : float
        The same of the class of operators with the lowest.
    search : float
        Mean correlation in the first search, before axes and centre were refined.
    null_mean, null_std : float
        Of the same in maps of random phases, each about its own best axes; NaN if there were none.
    rotation : Tensor (3, 3)
        Takes the map's coordinates to the standard setting.
    origin_px : Tensor (3,)
        Where the axes meet, (x, y, z) from voxel ``n // 2``.
    refined : bool
        Whether axes and centre were refined; groups without prospects are not.
    """

    group: str
    correlation: float
    weakest: float
    search: float
    null_mean: float
    null_std: float
    rotation: Tensor
    origin_px: Tensor
    refined: bool

    @property
    def sigmas(self) -> float:
        """Standard deviations by which the first search is above asymmetric maps."""
        return (self.search - self.null_mean) / self.null_std


@dataclass(frozen=True, eq=False)
class FoundSymmetry:
    """Outcome of a search.

    Attributes
    ----------
    best : GroupScore
        The point group that the map has, C1 if none.
    scores : list of GroupScore
        All groups tried, in the order of `GROUPS`.
    signal : float
        Correlation that the noise around the particle leaves between equivalent parts; 1 where none is seen.
    band : Band
        What was compared.
    centre_px : Tensor (3,)
        Middle of the band, (x, y, z) from voxel ``n // 2`` of the map.
    pixel_size : float
        Of the map, Å.
    """

    best: GroupScore
    scores: list[GroupScore]
    signal: float
    band: Band
    centre_px: Tensor
    pixel_size: float

    def share(self, score: GroupScore) -> float:
        """Correlation under the weakest operators of a group, in parts of what the noise leaves."""
        return score.weakest / self.signal if self.signal > 0 else 0.0


@one_torch_thread()
@one_blas_thread()
def find_symmetry(
    volume: Tensor,
    *,
    pixel_size: float,
    diameter: float | None = None,
    resolution: float = 15.0,
    groups: Sequence[str] = GROUPS,
    halves: tuple[Tensor, Tensor] | None = None,
    least_share: float = LEAST_SHARE,
    null_maps: int = 10,
    seed: int = 1,
) -> FoundSymmetry:
    """Find the point group of a map in any orientation, and its axes.

    Parameters
    ----------
    volume : Tensor (n, n, n)
        Map with a bright particle, off the centre of the box by any amount as long as it is whole. Noise
        around the particle, where it was not masked away, tells how much correlation is to be expected.
    pixel_size : float
        In Å.
    diameter : float, optional
        Longest distance in the particle, Å; default: measured on the map.
    resolution : float
        Finest detail that is compared, Å; at least three pixels are taken.
    groups : sequence of str
        Point groups to try.
    halves : pair of Tensor (n, n, n), optional
        Half maps, whose correlation tells how much noise the map has, whatever their scale and its filter;
        default: what is around the particle.
    least_share : float
        Least correlation under the weakest operators of a group, in parts of what the noise leaves.
    null_maps : int
        Maps of random phases, of the same spectrum in the same sphere, that are searched too; 0 for none.
    seed : int
        Of the random phases.

    Returns
    -------
    FoundSymmetry
        The largest group all of whose classes of operators correlate as the noise lets expect, and the scores
        of all groups. Handedness has no influence.

    Raises
    ------
    ShapeError
        If the map is not a cube.
    ParameterError
        If nothing stands out of the noise, or a group is unknown.

    Notes
    -----
    On shells about the centre the map is expanded in spherical harmonics; how its power is distributed over
    wave numbers about an axis gives its correlation under any turn about it [1]_. This table, of all axes of
    a hemisphere and all folds, is looked up at the axes of a group in every orientation of a grid. The best
    orientations are refined together with the centre, by the gradient of the correlation in real space.
    All shells count by their number of coefficients and their signal, not by their power, and the spherical
    average is left out: hollow or round maps are not symmetric because of that.

    References
    ----------
    .. [1] Crowther 1972, in: The Molecular Replacement Method, Gordon & Breach, 173-178
    """
    if volume.ndim != 3 or len(set(volume.shape)) != 1:
        raise ShapeError(f"the map has {tuple(volume.shape)} voxels, not a cube", hint="pad or crop it first")
    resolution = max(resolution, 3 * pixel_size)
    sphere, small = _sphere_about(volume, halves, pixel_size, resolution, diameter)
    first = max(resolution, 2 * math.pi * sphere.radius / DEGREE)
    rough, fine = sphere.band(small, first), sphere.band(small, resolution)
    tables = axis_tables(rough, groups)
    starts = {group: best_orientation(tables, group) for group in groups}
    null = null_scores(sphere, small, first, groups, null_maps, seed)
    least = _least_prospect(rough, [search for search, _ in starts.values()])
    middle = sphere.centre * sphere.pixel_size
    scores = []
    for group, (search, rotation) in starts.items():
        shift, refined = torch.zeros(3), search >= least
        for band in (rough, fine) if refined else ():
            rotation, shift = _refine(band, group, rotation, shift)
        correlations = _class_correlations(fine, group, rotation, shift)
        origin = (middle + shift) / pixel_size
        scores.append(GroupScore(group, *correlations, search, *null[group], rotation.T, origin, refined))
    centre = middle / pixel_size
    none = GroupScore("C1", 1.0, 1.0, 1.0, math.nan, math.nan, torch.eye(3), centre, refined=True)
    best = _decide(scores, least_share * fine.signal) or none
    return FoundSymmetry(best, scores, fine.signal, fine, centre, pixel_size)


def _sphere_about(
    volume: Tensor,
    halves: tuple[Tensor, Tensor] | None,
    pixel_size: float,
    resolution: float,
    diameter: float | None,
) -> tuple[Sphere, Tensor]:
    """The sphere around the particle, in as many voxels as the resolution needs, and the map in these."""
    how = {"pixel_size": pixel_size, "resolution": resolution}
    small, voxel, blank = coarser(volume.float().cpu(), **how)
    if halves is not None:
        one, two = (coarser(half.float().cpu(), **how)[0] for half in halves)
        halves = one, two
    centre, radius = extent(small, voxel, diameter, blank)
    sphere = Sphere(small, pixel_size=voxel, centre=centre, radius=radius, halves=halves, blank=blank)
    return sphere, small


def _least_prospect(band: Band, searches: Sequence[float]) -> float:
    """First score from which on groups are refined; the best one always is."""
    highest = max(searches)
    return min(highest, max(_PROMISING * highest, _HOPELESS * band.signal))


def correlation_of_shells(found: FoundSymmetry, score: GroupScore) -> Tensor:
    """Mean Fourier shell correlation of a map with itself under the operators of a group.

    Parameters
    ----------
    found : FoundSymmetry
        Outcome of the search.
    score : GroupScore
        One of its groups.

    Returns
    -------
    Tensor (s,)
        At the frequencies ``found.band.frequency``; of equal parts without noise it would be 1.
    """
    band = found.band
    shift = (score.origin_px - found.centre_px) * found.pixel_size / band.voxel
    spectrum = fourier.phase_shift(fourier.rfft3(band.array), shape=band.array.shape, shift_px=-shift)
    array = rotate_volume(fourier.irfft3(spectrum, shape=band.array.shape), score.rotation, method="cubic")
    # As many voxels as the band has, linear interpolation hardly changes a correlation.
    members = operators(score.group)
    # The inverse of an operator correlates as it does.
    inverse = _number(members, members.transpose(-1, -2))
    half = [i for i in range(1, len(members)) if i <= inverse[i]]
    weight = torch.tensor([1.0 if inverse[i] == i else 2.0 for i in half])
    curves = torch.stack([fsc(array, rotate_volume(array, members[i])) for i in half])
    curve = (weight[:, None] * curves).sum(0) / weight.sum()
    shells = torch.arange(len(curve)) / (band.array.shape[0] * band.voxel)
    return torch.from_numpy(np.interp(band.frequency.numpy(), shells.numpy(), curve.numpy()))


def to_standard_setting(volume: Tensor, score: GroupScore) -> Tensor:
    """Move the point where the axes meet to the origin and turn them into the standard setting."""
    shape = tuple(volume.shape)
    border = float(volume[0].median())
    spectrum = fourier.phase_shift(fourier.rfft3(volume), shape=shape, shift_px=-score.origin_px)
    moved = fourier.irfft3(spectrum, shape=shape) - border
    return rotate_volume(moved, score.rotation, method="cubic") + border


def _decide(scores: Sequence[GroupScore], least: float) -> GroupScore | None:
    """The largest group that holds; of two of one order the better one."""
    sound = [s for s in scores if s.refined and s.weakest >= least and not s.sigmas < LEAST_SIGMAS]
    if not sound:
        return None
    limit = LEAST_OF_BEST * max(score.weakest for score in sound)
    sound = [score for score in sound if score.weakest >= limit]
    return max(sound, key=lambda score: (order(score.group), score.weakest))


def _refine(band: Band, group: str, rotation: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Turn the axes and move the centre (in Å) to the highest correlation nearby."""
    points = _lattice(band)
    turned = points @ operators(group).float().transpose(-1, -2)
    # Angles and shifts in units in which the correlation falls alike.
    degrees = math.degrees(band.resolution / (4 * band.radius))
    length = band.resolution / (4 * band.voxel)

    def moved(step: Tensor) -> tuple[Tensor, Tensor]:
        return from_rotation_vector(step[:3] * degrees) @ rotation, shift / band.voxel + step[3:] * length

    def loss(values: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        step = torch.tensor(values, dtype=torch.float32, requires_grad=True)
        samples = _samples(band, turned, *moved(step))
        # The share of the power that is left by the mean over the group.
        negative = -samples.mean(0).square().sum() / samples.square().sum(-1).mean()
        (gradient,) = torch.autograd.grad(negative, step)
        return float(negative.detach()), gradient.double().numpy()

    options = {"maxiter": 30, "ftol": 1e-5}
    best = minimize(loss, np.zeros(6), jac=True, method="L-BFGS-B", options=options)
    rotation, shift_px = moved(torch.tensor(best.x, dtype=torch.float32))
    return rotation, shift_px * band.voxel


def _samples(band: Band, points: Tensor, rotation: Tensor, shift_px: Tensor) -> Tensor:
    """Map at points of the standard setting (order, p, 3)."""
    origin = band.array.shape[-1] // 2
    return sample_volume(band.array, points @ rotation.T + (shift_px + origin))


def _lattice(band: Band) -> Tensor:
    """Points within the sphere and its soft edge (p, 3), three per resolution along each axis."""
    step = VOXELS / 3
    radius = RIM * band.radius_px
    steps = math.floor(radius / step)
    line = torch.arange(-steps, steps + 1) * step
    points = torch.cartesian_prod(line, line, line)
    return points[points.norm(dim=1) <= radius]


def _class_correlations(band: Band, group: str, rotation: Tensor, shift: Tensor) -> tuple[float, float]:
    """Mean correlation under all operators but the identity, and under the weakest class of them."""
    turned = _lattice(band) @ operators(group).float().transpose(-1, -2)
    samples = _samples(band, turned, rotation, shift / band.voxel)
    samples = samples / samples.norm(dim=1, keepdim=True)
    products = (samples @ samples.T)[_ratio_classes(group)[0]]
    classes = _ratio_classes(group)[1]
    means = np.bincount(classes, products.numpy()) / np.bincount(classes)
    return float(products.mean()), float(means.min())


@lru_cache(maxsize=64)
def _ratio_classes(group: str) -> tuple[tuple[Tensor, Tensor], NDArray[np.int64]]:
    """Pairs of different operators of a group, and the conjugacy class of what is between them."""
    members = operators(group)
    n = len(members)
    conjugates = members[:, None] @ members[None] @ members[:, None].transpose(-1, -2)
    label = np.array([int(_number(members, conjugates[:, i]).min()) for i in range(n)])
    first, second = torch.triu_indices(n, n, offset=1)
    ratios = members[first].transpose(-1, -2) @ members[second]
    return (first, second), np.unique(label[_number(members, ratios)], return_inverse=True)[1].ravel()


def _number(members: Tensor, rotations: Tensor) -> NDArray[np.int64]:
    """Which member of a group each rotation is."""
    return (members.flatten(1) @ rotations.flatten(1).T).argmax(dim=0).numpy()
