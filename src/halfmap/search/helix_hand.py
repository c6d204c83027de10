"""The hand of a map, by whether its helices are right-handed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.fft import next_fast_len
from scipy.stats import binomtest
from scipy.stats import t as student
from torch import Tensor
from torch.nn.functional import pad

from halfmap.io.models import scattering_coefficients
from halfmap.ops.filters import low_pass
from halfmap.ops.fourier import irfft3, rfft3
from halfmap.ops.helix import ELEMENTS, ideal_helix
from halfmap.ops.interpolation import rotate_volume, sample_volume
from halfmap.ops.masks import soft_sphere
from halfmap.ops.potential import atomic_volume
from halfmap.ops.rotations import from_rotation_vector, healpix_grid, view_direction
from halfmap.ops.symmetry import operators

RESIDUES = 11

_B_FACTOR = 20.0
"""Of the helix, Å²."""

_RADIUS_A, _HALF_A = 5.0, 9.0
"""Radius of the cylinder about a helix in which maps are compared with it, and half its length."""

_SPHERE_A = 8.0
"""Radius of the ball whose deviation places are first normalised by."""

_ORDER = 2
"""HEALPix order of the directions: neighbours are 15° apart."""

_ALONG_A, _ACROSS_A = _HALF_A, 8.0
"""Least distance of two places along the axis of one or across it: of cylinders one after the other half is
shared at most, of those side by side a tenth."""

_PLACES = 150
"""That are looked at more closely."""

_FLAT = 0.1
"""Deviation over that of the whole map below which there is nothing to be compared."""

_SPIN_DEG = 20.0
_TILT_DEG, _TILTS, _STEPS = 7.0, 2, 1
"""Of the close search: turns about the axis, tilts of the axis and how many each way, voxels each way."""


@dataclass(frozen=True, eq=False)
class HelixHand:
    """How well helices of either hand fit places of a map.

    Attributes
    ----------
    right, left : Tensor (n,)
        Correlation of the best right-handed and the best left-handed helix, of each place.
    places_px : Tensor (n, 3)
        (x, y, z) of their centres in voxels of the map searched.
    axes : Tensor (n, 3)
        Directions of the helices as first found.
    """

    right: Tensor
    left: Tensor
    places_px: Tensor
    axes: Tensor

    @property
    def best(self) -> Tensor:
        """Of both hands (n,)."""
        return torch.maximum(self.right, self.left)

    def above(self, correlation: float) -> HelixHand:
        """Places where a helix of either hand fits as well as this."""
        kept = self.best > correlation
        return HelixHand(self.right[kept], self.left[kept], self.places_px[kept], self.axes[kept])

    @property
    def difference(self) -> float:
        """Mean by which right-handed helices fit better."""
        return float((self.right - self.left).mean())

    @property
    def sigmas(self) -> float:
        """The same over its standard error, as if there were half as many places: neighbours share half."""
        apart = self.right - self.left
        error = float(apart.std()) / max(len(apart) / 2, 1) ** 0.5 if len(apart) > 1 else math.inf
        return float(apart.mean()) / max(error, 1e-9)

    @property
    def probability(self) -> float:
        """That of so great a mean difference by chance, by the t-distribution of half as many places."""
        return float(2 * student.sf(abs(self.sigmas), max(len(self.right) / 2 - 1, 1)))

    @property
    def sign_probability(self) -> float:
        """That as uneven numbers of places prefer either hand by chance."""
        if not len(self.right):
            return 1.0
        return float(binomtest(int((self.right > self.left).sum()), len(self.right)).pvalue)


def fit_helices(
    volume: Tensor,
    *,
    pixel_size: float,
    resolution: float,
    mask: Tensor,
    group: str = "C1",
    origin_px: Tensor | None = None,
) -> HelixHand:
    """Fit right-handed and left-handed alpha helices to the places of a map that look most like one.

    Places and directions are found with the mean of a helix over all turns about its axis and both hands,
    which prefers none. At each place, ideal helices of both hands are then compared with the map: all turns
    about the axis, axes and centres nearby. What is compared lies within a cylinder about the helix, its
    mean taken off and divided by its deviation. Cylinders of two places share half at most,
    and a place and its copies by the map's symmetry count as one, so that places are evidence of their own.

    Parameters
    ----------
    volume : Tensor (d, d, d)
        Map with even power at fine detail, as sharpened ones have.
    pixel_size : float
        Å, about a third of the resolution.
    resolution : float
        Å, to which the helix is taken.
    mask : Tensor (d, d, d)
        Where centres of helices may be.
    group : str
        Point group of the map.
    origin_px : Tensor (3,), optional
        (x, y, z) where its axes meet; default: voxel ``d // 2``.

    Returns
    -------
    HelixHand
        Of 150 places at most, those that look most like a helix first.

    Notes
    -----
    A turn of a helix is 5.4 Å high, so that its hand shows at 5.5 Å and better.
    """
    helix = _helix(pixel_size, resolution)
    origin = torch.full((3,), float(len(volume) // 2)) if origin_px is None else origin_px
    score, found = _likeness(volume, helix, pixel_size)
    score[mask < 0.5] = -math.inf
    places, axes = _separate(score, found, pixel_size, operators(group).to(score), origin.to(score))
    points = _cylinder(pixel_size)
    templates = _templates(helix, points)
    fits = [_fit(volume, place, axis, points, templates) for place, axis in zip(places, axes, strict=True)]
    if not fits:
        return HelixHand(torch.zeros(0), torch.zeros(0), torch.zeros(0, 3), torch.zeros(0, 3))
    right, left = torch.stack(fits).unbind(1)
    return HelixHand(right, left, places, axes)


def _helix(pixel_size: float, resolution: float) -> Tensor:
    """Density of a right-handed helix along z in a small box."""
    atoms = ideal_helix(RESIDUES).flatten(0, 1)
    size = 2 * math.ceil((_HALF_A + _RADIUS_A) / pixel_size) + 2
    shape = (size, size, size)
    gaussians = torch.stack(
        [torch.from_numpy(np.stack(scattering_coefficients(element), axis=-1)) for element in ELEMENTS]
    )
    density = atomic_volume(
        atoms,
        coefficients=gaussians.repeat(RESIDUES, 1, 1),
        shape=shape,
        pixel_size=pixel_size,
        b_factors=torch.full((len(atoms),), _B_FACTOR),
    )
    return irfft3(rfft3(density) * low_pass(shape, pixel_size=pixel_size, resolution=resolution), shape=shape)


def _cylinder(pixel_size: float) -> Tensor:
    """Voxels (p, 3) about the origin, (x, y, z) in pixels, that are compared."""
    reach = math.ceil(_HALF_A / pixel_size)
    axis = torch.arange(-reach, reach + 1, dtype=torch.float32)
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    inside = (torch.hypot(x, y) * pixel_size <= _RADIUS_A) & (z.abs() * pixel_size <= _HALF_A)
    return torch.stack([x[inside], y[inside], z[inside]], dim=1)


def _templates(helix: Tensor, points: Tensor) -> Tensor:
    """Helices at points, normalised: (2, turns, p), right-handed and left-handed ones, either way up."""
    angles = torch.arange(0, 360, _SPIN_DEG)
    spins = from_rotation_vector(torch.stack([0 * angles, 0 * angles, angles], dim=1))
    upside_down = torch.diag(torch.tensor([1.0, -1.0, -1.0]))
    turns = torch.cat([spins, spins @ upside_down])
    hands = []
    for sign in (1.0, -1.0):
        places = sign * points @ turns.mT
        hands.append(_normalised(sample_volume(helix, places + len(helix) // 2, method="cubic")))
    return torch.stack(hands)


def _likeness(volume: Tensor, helix: Tensor, pixel_size: float) -> tuple[Tensor, Tensor]:
    """How much the place at each voxel looks like a helix of any hand, and along which axis (d, d, d, 3)."""
    rod = _rod(helix, pixel_size)
    size = len(volume) + len(rod) // 2 + 1
    shape = (int(next_fast_len(size, real=True) or size),) * 3
    grow = (0, shape[0] - len(volume)) * 3
    padded, inside = pad(volume, grow), pad(torch.ones_like(volume), grow)
    spectrum = rfft3(padded)
    scatter = _local_deviation(padded, inside, pixel_size)
    best = torch.full(volume.shape, -math.inf)
    which = torch.zeros(volume.shape, dtype=torch.int64)
    directions = healpix_grid(_ORDER, psi_step=360.0)
    # A rod is the same from both ends.
    directions = directions[view_direction(directions)[:, 2] >= 0]
    part = tuple(slice(0, len(volume)) for _ in range(3))
    for number, direction in enumerate(directions):
        # A rod along z turned by the inverse lies along the view direction.
        kernel = pad(rotate_volume(rod, direction.T), (0, shape[0] - len(rod)) * 3)
        kernel = kernel.roll((-(len(rod) // 2),) * 3, (0, 1, 2))
        score = irfft3(spectrum * rfft3(kernel).conj(), shape=shape)[part] / scatter[part]
        better = score > best
        best = torch.where(better, score, best)
        which = torch.where(better, number, which)
    return best, view_direction(directions)[which]


def _rod(helix: Tensor, pixel_size: float) -> Tensor:
    """Mean of a helix over all turns about its axis, both ways up and both hands, its own mean taken off."""
    angles = torch.arange(0, 360, _SPIN_DEG)
    rod = torch.zeros_like(helix)
    for angle in angles:
        rod += rotate_volume(helix, from_rotation_vector(torch.tensor([0.0, 0.0, float(angle)])))
    # Even boxes have no mirror image of their first planes, which are empty.
    rod = rod + rod.flip((0, 1, 2)).roll((1, 1, 1), (0, 1, 2))
    inside = torch.zeros_like(rod, dtype=torch.bool)
    x, y, z = (_cylinder(pixel_size) + len(rod) // 2).long().unbind(1)
    inside[z, y, x] = True
    rod = torch.where(inside, rod - rod[inside].mean(), 0)
    return rod / rod.norm()


def _local_deviation(padded: Tensor, inside: Tensor, pixel_size: float) -> Tensor:
    """Standard deviation of a map within a ball about each voxel."""
    shape = tuple(padded.shape)
    ball = soft_sphere(shape, radius=_SPHERE_A, edge=2 * pixel_size, pixel_size=pixel_size)
    kernel = rfft3(ball.roll((-(shape[0] // 2),) * 3, (0, 1, 2)))
    count, mean, square = (
        irfft3(rfft3(each) * kernel, shape=shape) for each in (inside, padded, padded.square())
    )
    count = count.clamp_min(1)
    deviation = (square / count - (mean / count).square()).clamp_min(0).sqrt()
    return deviation.clamp_min(_FLAT * float(padded[inside > 0].std()))


def _separate(
    score: Tensor, axes: Tensor, pixel_size: float, turns: Tensor, origin: Tensor
) -> tuple[Tensor, Tensor]:
    """Highest places (n, 3), (x, y, z), and their axes (n, 3), apart from others and their copies."""
    score = score.clone()
    places, along = [], []
    for _ in range(_PLACES):
        flat = int(score.argmax())
        z, y, x = (int(each) for each in np.unravel_index(flat, score.shape))
        if not math.isfinite(float(score[z, y, x])):
            break
        place, axis = score.new_tensor([x, y, z]), axes[z, y, x].to(score)
        places.append(place)
        along.append(axis)
        for copy, turned in zip(turns @ (place - origin) + origin, turns @ axis, strict=True):
            _clear(score, copy, turned, pixel_size)
        score[z, y, x] = -math.inf
    if not places:
        return torch.zeros(0, 3), torch.zeros(0, 3)
    return torch.stack(places), torch.stack(along)


def _clear(score: Tensor, place: Tensor, axis: Tensor, pixel_size: float) -> None:
    """Leave nothing within a cylinder about a place."""
    reach = math.ceil(math.hypot(_ALONG_A, _ACROSS_A) / pixel_size)
    middle = [round(float(each)) for each in place.flip(0)]
    around = tuple(slice(max(0, m - reach), max(0, m + reach + 1)) for m in middle)
    part = score[around]
    z, y, x = (
        (torch.arange(n) + each.start - centre) * pixel_size
        for n, each, centre in zip(part.shape, around, place.flip(0), strict=True)
    )
    apart = torch.stack(torch.broadcast_tensors(x, y[:, None], z[:, None, None]), dim=-1)
    up = apart @ axis
    across = apart.square().sum(-1) - up.square()
    part[(up.abs() < _ALONG_A) & (across < _ACROSS_A**2)] = -math.inf


def _fit(volume: Tensor, place: Tensor, axis: Tensor, points: Tensor, templates: Tensor) -> Tensor:
    """Best correlation (2,) of right-handed and of left-handed helices near a place and a direction."""
    frame = _frame(axis)
    steps = torch.arange(-_STEPS, _STEPS + 1, dtype=torch.float32)
    shifts = torch.cartesian_prod(steps, steps, steps)
    angles = torch.arange(-_TILTS, _TILTS + 1, dtype=torch.float32) * _TILT_DEG
    tilts = torch.cartesian_prod(angles, angles)
    turns = from_rotation_vector(torch.cat([tilts, torch.zeros(len(tilts), 1)], dim=1))
    places = (points @ turns.mT)[:, None] + shifts[:, None]
    sampled = sample_volume(volume, (places @ frame + place).flatten(0, 1), method="linear")
    return (_normalised(sampled) @ templates.mT).amax((1, 2))


def _frame(axis: Tensor) -> Tensor:
    """Rows of a right-handed frame (3, 3) whose z is an axis."""
    other = torch.eye(3)[int(axis.abs().argmin())]
    x = torch.nn.functional.normalize(torch.linalg.cross(other, axis), dim=0)
    return torch.stack([x, torch.linalg.cross(axis, x), axis])


def _normalised(values: Tensor) -> Tensor:
    """Values (..., p) of mean 0 and length 1."""
    centred = values - values.mean(-1, keepdim=True)
    return centred / centred.norm(dim=-1, keepdim=True).clamp_min(1e-12)
