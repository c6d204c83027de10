"""Turn and move one map onto another: over all rotations, shifts, and both hands."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from halfmap.errors import ShapeError
from halfmap.ops import harmonics
from halfmap.ops.filters import radial_average, radial_profile_to_grid
from halfmap.ops.fourier import irfft3, phase_shift, rfft3
from halfmap.ops.interpolation import rotate_volume, sample_volume
from halfmap.ops.rotations import angular_distance, from_euler, from_rotation_vector, random_rotations
from halfmap.ops.threads import one_blas_thread, one_torch_thread

_HIGHEST_DEGREE = 24
"""Of the harmonics, which bounds the frequencies of the first search."""

_STARTS, _APART = 4, 20.0
"""Rotations that ascents begin at, each hand, and the angle in degrees that they are apart at least."""

_TURN = 0.1
"""Turn in radians that makes about as much difference as a shift by one pixel."""

_SHELL = 1.5
"""Voxels between the shells on which maps are expanded, about."""

_FIRST_STEPS, _EVERY = 12, 5
_STEPS, _FINALISTS = 40, 2
"""Steps of the first ascents, which compare one voxel of so many; of the last ones, and their number."""

_LEAST_POWER = 1e-6

_LEAST_LEFT = 0.05
"""Part of the correlation that is always said to be lacking by chance: small maps have few coefficients."""

_TURNS, _VOXELS = 100, 4000
"""Random rotations that chance is judged by, and voxels at which maps are compared for that, at least."""


@dataclass(frozen=True, eq=False)
class Alignment:
    """How a map comes onto another one.

    Attributes
    ----------
    rotation : Tensor (3, 3), float64
        That the map is turned by, after it was mirrored.
    shift_px : Tensor (3,), float64
        (x, y, z) that it is moved by after that.
    mirrored : bool
        Whether the map is inverted through its origin first, which makes it of the other hand.
    correlation : float
        Of both maps then, all frequencies compared having the same weight.
    chance : float
        Correlation that the same search finds between maps which have nothing in common but their outline
        and spectrum, and seldom more.
    """

    rotation: Tensor
    shift_px: Tensor
    mirrored: bool
    correlation: float
    chance: float = 0.0

    @property
    def inverse(self) -> Alignment:
        """How the other map comes onto this one."""
        back = self.rotation.T
        shift = back @ self.shift_px
        return replace(self, rotation=back, shift_px=shift if self.mirrored else -shift)

    @property
    def over_chance(self) -> float:
        """Correlation over that of chance: 1 for the same maps, 0 or less for most others of an outline."""
        return (self.correlation - self.chance) / max(1 - self.chance, _LEAST_LEFT)

    def apply(self, volume: Tensor) -> Tensor:
        """The map (d, d, d) on the other one."""
        turned = rotate_volume(inverted(volume) if self.mirrored else volume, self.rotation, method="cubic")
        spectrum = phase_shift(rfft3(turned), shape=turned.shape, shift_px=self.shift_px.to(turned))
        return irfft3(spectrum, shape=turned.shape)


@one_torch_thread()
@one_blas_thread()
def align_volume(
    moving: Tensor,
    fixed: Tensor,
    *,
    mask: Tensor,
    radius_px: float,
    frequency: int,
    hands: bool = True,
    turns: Tensor | None = None,
    order: int = 1,
) -> Alignment:
    """Find the rotation, the shift and, if wanted, the hand of one map that bring it onto another.

    Parameters
    ----------
    moving, fixed : Tensor (d, d, d)
        Maps of one size.
    mask : Tensor (d, d, d)
        Soft sphere about the origin in which they are compared.
    radius_px : float
        Of this sphere.
    frequency : int
        Finest shell that is compared.
    hands : bool
        Whether the other hand of the moving map is tried as well.
    turns : Tensor (n, 3, 3), optional
        Rotations about the origin that are compared as they are, without shifts: those of
        `symmetry.equal_settings` for maps of one group. By default all are searched, with shifts.
    order : int
        Operators of the group of these maps; their axes being the same, they are so much more like by chance.

    Returns
    -------
    Alignment

    Raises
    ------
    ShapeError
        If the maps are not cubes of one size.

    Notes
    -----
    The correlation at all rotations follows from spherical harmonics of both maps on shells about their
    centres of mass, by a Fourier transform over two of the Euler angles for each value of the third [1]_.
    From the best rotations the correlation in real space is climbed, by its gradient, together with the
    shift. Shells of Fourier space have the same power in both maps beforehand: else the coarsest ones, which
    are alike in all particles of a size, would decide.

    Chance is judged by correlations at random rotations: the best of n independent ones is hardly above their
    mean, which is that of the outlines, and sqrt(2 ln n) standard deviations. In a search n is the number of
    elements of Wigner's matrices up to the degree of the harmonics, times the hands. The variance is one over
    the number of independent coefficients, of which maps of a group have fewer by its order. Where a
    symmetric map is turned onto itself rotations at random vary more than that, which is no chance.

    References
    ----------
    .. [1] Kostelec & Rockmore 2008, J. Fourier Anal. Appl. 14, 145-179, DOI 10.1007/s00041-008-9013-5
    """
    if moving.shape != fixed.shape or len(set(fixed.shape)) != 1 or fixed.ndim != 3:
        raise ShapeError(f"maps of {tuple(moving.shape)} and {tuple(fixed.shape)} voxels cannot be aligned")
    target = _equalised(fixed * mask, frequency)
    inside = (mask > 0.5).nonzero().flip(1)
    volumes = {False: moving, True: inverted(moving)} if hands else {False: moving}
    equalised = {mirrored: _equalised(each * mask, frequency) for mirrored, each in volumes.items()}
    if turns is None:
        centres = {mirrored: centre_of_mass(each * mask) for mirrored, each in volumes.items()}
        origin = centre_of_mass(fixed * mask)
        found = _searched(equalised, centres, target, origin, inside, radius_px, frequency)
    else:
        origin = torch.zeros(3, dtype=torch.float64)
        wanted = _at(target, inside)
        found = [
            Alignment(turn, origin, mirrored, float(_correlation(own, wanted, inside, turn, origin)))
            for mirrored, own in equalised.items()
            for turn in turns
        ]
    chosen = max(found, key=lambda one: one.correlation)
    compared = inside[:: max(1, len(inside) // _VOXELS)]
    reached = _at_random(equalised[chosen.mirrored], target, compared, chosen, origin)
    spread = min(float(reached.std()), _coefficients(target, inside, frequency) ** -0.5)
    tries = len(turns) if turns is not None else _rotations(_degree(frequency, radius_px, len(fixed)))
    above = spread * math.sqrt(2 * math.log(len(volumes) * tries) * order)
    return replace(chosen, chance=float(reached.mean()) + above)


def _searched(
    hands: dict[bool, Tensor],
    centres: dict[bool, Tensor],
    target: Tensor,
    origin: Tensor,
    inside: Tensor,
    radius_px: float,
    frequency: int,
) -> list[Alignment]:
    """Maxima of the correlation of each hand, with its centre, with the target about its origin."""
    starts = []
    for mirrored, own in hands.items():
        for rotation in _best_rotations(own, centres[mirrored], target, origin, radius_px, frequency):
            begin = Alignment(rotation, origin - rotation @ centres[mirrored], mirrored, 0.0)
            starts.append(_climb(own, target, inside[::_EVERY], begin, _FIRST_STEPS))
    best = sorted(starts, key=lambda one: -one.correlation)[:_FINALISTS]
    return [_climb(hands[one.mirrored], target, inside, one, _STEPS) for one in best]


def inverted(volume: Tensor) -> Tensor:
    """Map (d, d, d) inverted through its origin, voxel ``d // 2``: its other hand."""
    flipped = volume.flip(0, 1, 2)
    return flipped if len(volume) % 2 else flipped.roll((1, 1, 1), (0, 1, 2))


def centre_of_mass(volume: Tensor) -> Tensor:
    """Centre (x, y, z) of what is above a quarter of a map's highest density, in voxels from its origin."""
    weight = (volume - 0.25 * volume.max()).clamp_min(0).double()
    axis = torch.arange(len(volume), dtype=torch.float64) - len(volume) // 2
    total = weight.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return torch.stack([(weight.sum(rest) * axis).sum() / total for rest in ((0, 1), (0, 2), (1, 2))])


def _equalised(volume: Tensor, frequency: int) -> Tensor:
    """Map with the same power in all shells to a frequency, and nothing beyond or at the origin."""
    spectrum, shape = rfft3(volume), tuple(volume.shape)
    power = radial_average(spectrum.abs().square(), shape=shape)
    weight = power.clamp_min(_LEAST_POWER * float(power.max())).rsqrt()
    shells = torch.arange(len(weight))
    weight = torch.where((shells > 0) & (shells <= frequency), weight, torch.zeros_like(weight))
    return irfft3(spectrum * radial_profile_to_grid(weight, shape=shape), shape=shape)


def _degree(frequency: int, radius_px: float, box: int) -> int:
    """Highest degree of harmonics that detail up to a frequency needs at the edge of a sphere."""
    return min(_HIGHEST_DEGREE, math.ceil(2 * math.pi * frequency * radius_px / box))


def _rotations(degree: int) -> int:
    """Dimensions of the functions on rotations that are made of harmonics up to a degree."""
    return sum((2 * ell + 1) ** 2 for ell in range(degree + 1))


def _coefficients(volume: Tensor, inside: Tensor, frequency: int) -> float:
    """Independent coefficients of a map up to a frequency, at voxels (n, 3) of which some may hold little."""
    # Of n Gaussian values of norm 1 the fourth powers have the sum 3 / n.
    voxels = 3 / float(_at(volume, inside).double().pow(4).sum().clamp_min(1e-12))
    return voxels * 4 / 3 * math.pi * (frequency / len(volume)) ** 3


def _best_rotations(
    moving: Tensor, start: Tensor, fixed: Tensor, origin: Tensor, radius_px: float, frequency: int
) -> list[Tensor]:
    """Rotations (3, 3) of highest correlation about the centres of two maps, some way apart."""
    degree = _degree(frequency, radius_px, len(fixed))
    count = max(4, round(radius_px / _SHELL))
    radii = (torch.arange(count) + 0.5) * (radius_px / count)
    expansions = []
    for volume, centre in ((fixed, origin), (moving, start)):
        spectrum = phase_shift(rfft3(volume), shape=volume.shape, shift_px=-centre.to(volume))
        centred = irfft3(spectrum, shape=volume.shape)
        expansions.append(harmonics.expand(centred, radii_px=radii, degree=degree))
    angles = np.linspace(0, np.pi, 2 * degree + 1)
    n = 4 * degree
    table = np.zeros((len(angles), n, n), np.complex128)
    weight = radii.double().square()
    for ell, (a, b) in enumerate(zip(*expansions, strict=True)):
        if ell == 0:  # turns into itself whatever the maps
            continue
        product = ((a.conj() * weight) @ b.T).numpy()
        places = np.arange(-ell, ell + 1) % n
        table[:, places[:, None], places] += harmonics.rotation_y(ell, angles) * product
    scores = np.fft.fft2(table, axes=(1, 2)).real
    return _peaks(scores, angles)


def _peaks(scores: NDArray[np.float64], tilts: NDArray[np.float64]) -> list[Tensor]:
    """Rotations of the highest scores (tilts, n, n), each `_APART` from those before."""
    n = scores.shape[1]
    order = np.argsort(-scores, axis=None, kind="stable")[:4000]
    tilt, first, last = np.unravel_index(order, scores.shape)
    step = 360.0 / n
    # The angles of the table turn the vector, those of the convention the axes.
    euler = np.stack([-last * step, -np.degrees(tilts[tilt]), -first * step], axis=1)
    rotations = from_euler(torch.from_numpy(euler))
    kept: list[Tensor] = []
    while len(kept) < _STARTS and len(rotations):
        kept.append(rotations[0])
        rotations = rotations[angular_distance(rotations, rotations[0]) > _APART]
    return kept


def _at_random(moving: Tensor, fixed: Tensor, inside: Tensor, found: Alignment, origin: Tensor) -> Tensor:
    """Correlations at random rotations about the centre (x, y, z) of the fixed map."""
    turns = random_rotations(_TURNS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = found.rotation.T @ (origin - found.shift_px)
    wanted = _at(fixed, inside)
    return torch.stack([_correlation(moving, wanted, inside, turn, origin - turn @ start) for turn in turns])


def _climb(moving: Tensor, fixed: Tensor, inside: Tensor, start: Alignment, steps: int) -> Alignment:
    """Climb to the highest correlation near an alignment, compared at some voxels (n, 3), (x, y, z)."""
    rotation, shift, wanted = start.rotation, start.shift_px, _at(fixed, inside)

    def turned(vector: Tensor) -> Tensor:
        return from_rotation_vector(torch.rad2deg(vector[:3] * _TURN)) @ rotation

    def loss(values: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        vector = torch.from_numpy(values).requires_grad_()
        correlation = _correlation(moving, wanted, inside, turned(vector), shift + vector[3:])
        correlation.backward()
        assert vector.grad is not None
        return -float(correlation.detach()), -vector.grad.numpy()

    best = minimize(loss, np.zeros(6), jac=True, method="L-BFGS-B", options={"maxiter": steps})
    vector = torch.from_numpy(best.x)
    return Alignment(turned(vector), shift + vector[3:], start.mirrored, -float(best.fun))


def _at(fixed: Tensor, inside: Tensor) -> Tensor:
    """Values of a map at some voxels, of mean 0 and norm 1."""
    wanted = fixed[inside[:, 2], inside[:, 1], inside[:, 0]]
    wanted = wanted - wanted.mean()
    return wanted / wanted.norm().clamp_min(1e-12)


def _correlation(moving: Tensor, wanted: Tensor, inside: Tensor, rotation: Tensor, shift: Tensor) -> Tensor:
    """Correlation of a map, turned and moved, with the values wanted at some voxels (n, 3), (x, y, z)."""
    origin = float(len(moving) // 2)
    where = (inside.float() - origin - shift.float()) @ rotation.float() + origin
    found = sample_volume(moving, where, method="linear")
    found = found - found.mean()
    return (found * wanted).sum() / found.norm().clamp_min(1e-12)
