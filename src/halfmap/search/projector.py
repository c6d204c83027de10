"""Slices of a volume at any points of Fourier space, by cubic splines, with gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from halfmap.errors import ParameterError, ShapeError
from halfmap.ops.fourier import fft1, rfft1
from halfmap.ops.threads import in_threads
from halfmap.search import _spline_kernels as kernels
from halfmap.search.polar import PolarGrid

_TORCH_SAMPLES = 1 << 19
"""Samples that the torch body holds at a time, each with its 64 neighbours: some 1 GB."""

_PADDED = 1 << 22
"""Numbers of padded rows that are transformed at a time."""

_POWER = 4
"""A cubic B-spline is a box convolved with itself so often, hence its envelope's power of a sinc."""


@dataclass(frozen=True, eq=False)
class SplineVolume:
    """Fourier transform of a padded volume, ready for cubic interpolation.

    Attributes
    ----------
    values : Tensor (2 m + 5, 2 m + 5, m + 4), complex
        Coefficients (z, y, x) of cubic B-splines, each axis' six times too large and so divided by 6³.
        Frequency 0 is at (m + 2, m + 2, 1).
    box : int
        Side of the volume in voxels.
    padded_box : int
        Side that it was padded to.

    Notes
    -----
    B-splines in Fourier space multiply the volume by ``sinc⁴(x / D)`` along each axis, D the padded box.
    Divided out beforehand, it leaves the aliases that the spline lets through: a quarter of a box from the
    centre they are 6e-4 of a point's amplitude with padding 2, where linear interpolation leaves 2 %. And the
    derivative of the slice is smooth.

    References
    ----------
    .. [1] Unser, Aldroubi & Eden 1993, IEEE Trans. Signal Process. 41, 821-833, DOI 10.1109/78.193220
    """

    values: Tensor
    box: int
    padded_box: int

    @classmethod
    def of(cls, volume: Tensor, *, radius_px: float | None = None, padding: float = 2.0) -> SplineVolume:
        """Prepare a volume.

        Parameters
        ----------
        volume : Tensor (d, d, d)
            Real-space volume, its origin at voxel ``d // 2``.
        radius_px : float, optional
            Largest frequency wanted, in Fourier pixels of the unpadded box; by default Nyquist's.
        padding : float
            Size of the padded box over `d`.

        Raises
        ------
        ShapeError
            If the volume is not a cube.
        ParameterError
            If the padding is below 1 or the radius beyond Nyquist's frequency.
        """
        if volume.ndim != 3 or len(set(volume.shape)) != 1:
            raise ShapeError(f"a volume to be sliced must be a cube, not of shape {tuple(volume.shape)}")
        box = len(volume)
        radius = box / 2 if radius_px is None else radius_px
        if not (padding >= 1 and 0 < radius <= box / 2):
            raise ParameterError(f"padding {padding} and radius {radius} px do not fit a box of {box} px")
        padded = 2 * round(box * padding / 2)
        x = (torch.arange(box, dtype=torch.float64, device=volume.device) - box // 2) / padded
        envelope = (torch.sinc(x).pow(_POWER) * 6).reciprocal().to(volume.dtype)
        corrected = volume * envelope[:, None, None] * envelope[:, None] * envelope
        return cls(_with_border(corrected, padded, math.ceil(radius * padded / box)), box, padded)

    @property
    def limit(self) -> float:
        """Largest frequency held, in Fourier pixels of the unpadded box."""
        return (self.values.shape[2] - 4) / self.scale

    @property
    def scale(self) -> float:
        """Voxels of the transform per Fourier pixel of an image of `box` pixels."""
        return self.padded_box / self.box

    @property
    def origin(self) -> int:
        """Index of frequency 0 along z and y."""
        return len(self.values) // 2

    def turns(self, rotations: Tensor) -> Tensor:
        """The two rows (n, 2, 3) of rotations that place a slice, in voxels per Fourier pixel."""
        if rotations.shape[1:] != (3, 3):
            raise ShapeError(f"rotations of shape {tuple(rotations.shape)} are not (n, 3, 3)")
        if not bool(rotations.isfinite().all()):
            raise ParameterError("a rotation matrix holds a number that is not finite")
        return (rotations[:, :2] * self.scale).to(self.values.real).contiguous()

    def flat(self) -> np.ndarray:
        """The real numbers in a row, for kernels."""
        return torch.view_as_real(self.values).view(-1).numpy()

    def check(self, points: Tensor) -> Tensor:
        """Points (p, 2) in the volume's precision, refused if one lies beyond the frequencies held."""
        if float(points.norm(dim=-1).max()) > self.limit + 1e-6:
            raise ParameterError(f"slices are wanted beyond the {self.limit:g} Fourier pixels of the volume")
        return points.to(self.values.real).contiguous()


def sample_slices(volume: SplineVolume, rotations: Tensor, points: Tensor) -> Tensor:
    """Central slices at any points.

    Parameters
    ----------
    volume : SplineVolume
    rotations : Tensor (n, 3, 3)
        From volume to image coordinates.
    points : Tensor (p, 2)
        Frequencies (kx, ky) in Fourier pixels of an image of the volume's box.

    Returns
    -------
    Tensor (n, p), complex
        The transform about the origin of the volume, at ``R.T @ (kx, ky, 0)``.

    Raises
    ------
    ParameterError
        If a point lies beyond the volume's radius, or a rotation is not finite.
    """
    turns, points = volume.turns(rotations), volume.check(points)
    if volume.values.device.type != "cpu":
        return torch.cat([values for values, _ in _sample_torch(volume, turns, points, gradients=False)])
    out = torch.empty(len(turns), 2 * len(points), dtype=points.dtype)

    def cut(part: np.ndarray) -> None:
        first, stop = part
        kernels.sample(
            volume.flat(), volume.origin, turns[first:stop].numpy(), points.numpy(), out[first:stop].numpy()
        )

    in_threads(cut, parts(len(turns)))
    return torch.view_as_complex(out.unflatten(1, (-1, 2)))


def sample_gradients(volume: SplineVolume, rotations: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Slices as `sample_slices`, and derivatives (n, p, 3) by the position (x, y, z) in Fourier pixels."""
    turns, points = volume.turns(rotations), volume.check(points)
    if volume.values.device.type != "cpu":
        values, slopes = zip(*_sample_torch(volume, turns, points, gradients=True), strict=True)
        return torch.cat(values), torch.cat(slopes)
    out = torch.empty(len(turns), len(points), 8, dtype=points.dtype)
    kernels.sample_gradients(volume.flat(), volume.origin, turns.numpy(), points.numpy(), out.numpy())
    found = torch.view_as_complex(out.unflatten(-1, (4, 2)))
    return found[..., 0], found[..., 1:] * volume.scale


def polar_references(volume: SplineVolume, rotations: Tensor, grid: PolarGrid) -> Tensor:
    """Projections (k, rings, angles / 2), complex, along the view directions of rotations (k, 3, 3)."""
    frequencies = grid.frequencies.flatten(0, 1).to(volume.values.device)
    return sample_slices(volume, rotations, frequencies).unflatten(1, (grid.rings, -1))


def parts(n: int) -> np.ndarray:
    """Bounds (parts, 2) of about even parts of `n` items for threads."""
    bounds = np.linspace(0, n, min(n, 4 * torch.get_num_threads()) + 1).astype(int)
    return np.stack([bounds[:-1], bounds[1:]], axis=1)


def _with_border(volume: Tensor, n: int, m: int) -> Tensor:
    """Voxels -m - 2 … m + 2 along z and y and -1 … m + 2 along x of the transform of a volume padded to n.

    Axis after axis is padded, transformed and cut: what is nothing and what is not wanted take no time.
    """
    box = len(volume)
    wide = torch.arange(-m - 2, m + 3, device=volume.device) % n
    half = torch.arange(-1, m + 3, device=volume.device)
    # What is left of negative x is the conjugate, as nothing is complex yet.
    stored, mate = torch.where(half.abs() > n // 2, n - half, half.abs()), (half < 0) | (half > n // 2)
    step = max(1, _PADDED // (n * box))
    between = volume.new_empty(box, len(wide), len(half), dtype=volume.dtype.to_complex())
    for z in torch.arange(box).split(step):
        rows = rfft1(_centred(volume[z], n))[..., stored]
        rows = torch.where(mate, rows.conj(), rows)
        between[z] = fft1(_centred(rows.transpose(1, 2), n))[..., wide].transpose(1, 2)
    values = between.new_empty(len(wide), len(wide), len(half))
    for y in torch.arange(len(wide)).split(step):
        values[:, y] = fft1(_centred(between[:, y].permute(1, 2, 0), n))[..., wide].permute(2, 0, 1)
    return values


def _centred(rows: Tensor, n: int) -> Tensor:
    """Rows (..., d) padded to (..., n), with what was at d // 2 at 0."""
    d = rows.shape[-1]
    padded = rows.new_zeros(*rows.shape[:-1], n)
    padded[..., : d - d // 2] = rows[..., d // 2 :]
    padded[..., n - d // 2 :] = rows[..., : d // 2]
    return padded


def _sample_torch(volume: SplineVolume, turns: Tensor, points: Tensor, *, gradients: bool):
    """Values (n, p) and derivatives (n, p, 3), or none, part by part on any device."""
    step = max(1, _TORCH_SAMPLES // len(points))
    flat, n_y, n_x = volume.values.reshape(-1), *volume.values.shape[1:]
    near = torch.arange(4, device=turns.device)
    offsets = ((near[:, None, None] * n_y + near[:, None]) * n_x + near).flatten()
    for first in range(0, len(turns), step):
        position = points @ turns[first : first + step]
        flipped = position[..., 0] < 0
        position = torch.where(flipped[..., None], -position, position)
        base = position.floor()
        ix, iy, iz = base.long().unbind(-1)
        at = ((iz + volume.origin - 1) * n_y + iy + volume.origin - 1) * n_x + ix
        found = flat[at[..., None] + offsets].unflatten(-1, (4, 4, 4))
        found = torch.where(flipped[..., None, None, None], found.conj(), found)
        weights, slopes = _spline(position - base)
        x, y, z = weights.to(found.dtype).unbind(-2)
        values = torch.einsum("npzyx,npz,npy,npx->np", found, z, y, x)
        if not gradients:
            yield values, values
            continue
        dx, dy, dz = slopes.to(found.dtype).unbind(-2)
        kinds = ((z, y, dx), (z, dy, x), (dz, y, x))
        derivatives = [torch.einsum("npzyx,npz,npy,npx->np", found, *kind) for kind in kinds]
        signs = torch.where(flipped, -volume.scale, volume.scale)
        yield values, torch.stack(derivatives, dim=-1) * signs[..., None]


def _spline(fraction: Tensor) -> tuple[Tensor, Tensor]:
    """Six times the weights and slopes (..., 4) of the cubic B-spline at the four neighbours."""
    f, g = fraction, 1 - fraction
    weights = [g**3, 4 + f**2 * (3 * f - 6), 4 + g**2 * (3 * g - 6), f**3]
    slopes = [-(g**2), f * (3 * f - 4), g * (4 - 3 * g), f**2]
    return torch.stack(weights, dim=-1), 3 * torch.stack(slopes, dim=-1)
