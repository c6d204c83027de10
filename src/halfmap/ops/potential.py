"""Electrostatic potential of atoms on a grid, in volts, from scattering factors as sums of Gaussians."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.errors import ShapeError
from halfmap.log import report
from halfmap.ops import fourier, grids, planewise
from halfmap.units import ELEMENTARY_CHARGE_C, ELECTRON_MASS_kg, PLANCK_J_s

POTENTIAL_V_A2 = PLANCK_J_s**2 / (2 * math.pi * ELECTRON_MASS_kg * ELEMENTARY_CHARGE_C) * 1e20
"""Potential in V Å³ that one Å of electron scattering factor stands for, h² / (2 pi m e) = 47.878 V Å²."""

_OVERSAMPLING = 1.5
"""Finer grid on which the Gaussians are laid down before the Fourier crop."""

_ALIAS = 1e-4
"""Largest relative error at Nyquist that laying Gaussians on the finer grid may leave."""

_SLAB_BYTES = 1 << 27
"""Size of the parts in which the finer grid is filled."""

_TAIL = 1e-5
"""Height, relative to its peak, at which a Gaussian is cut."""


def scattering_factor(coefficients: Tensor, frequency: Tensor) -> Tensor:
    """Electron scattering factors of atoms at rest.

    Parameters
    ----------
    coefficients : Tensor (..., g, 2)
        Amplitudes a in Å and widths b in Å² of the Gaussians, last axis (a, b).
    frequency : Tensor (k,)
        Spatial frequency in 1/Å.

    Returns
    -------
    Tensor (..., k)
        f(k) = sum of a exp(-b k² / 4) in Å.

    References
    ----------
    .. [1] Peng, Ren, Dudarev & Whelan 1996, Acta Cryst. A52, 257-276, DOI 10.1107/S0108767395014371
    """
    amplitude, width = coefficients[..., 0, None], coefficients[..., 1, None]
    return (amplitude * torch.exp(-width * frequency.square() / 4)).sum(-2)


def atomic_volume(
    positions: Tensor,
    *,
    coefficients: Tensor,
    shape: Sequence[int],
    pixel_size: float,
    b_factors: Tensor | None = None,
) -> Tensor:
    """Potential of atoms in a box, limited to the frequencies that its voxels can hold.

    Every atom is a sum of Gaussians. They are laid on a grid 1.5 times finer, each broadened by one and
    the same Gaussian so that the grid resolves even the sharpest, then cropped in Fourier space and the
    broadening divided out again. What is left is the Fourier series of the exact potential up to Nyquist.

    Parameters
    ----------
    positions : Tensor (n, 3)
        Atoms as (x, y, z) in Å from the origin of the box, voxel ``n // 2``.
    coefficients : Tensor (n, g, 2)
        Gaussians of each atom's scattering factor, (a, b) in Å and Å²; multiply a by the occupancy.
    shape : sequence of 3 int
        Shape (d, h, w) of the box.
    pixel_size : float
        In Å.
    b_factors : Tensor (n,), optional
        Isotropic B-factors in Å²; 0 if not given.

    Returns
    -------
    Tensor (d, h, w), float32
        Potential in V. Frequencies from 1 / (2 pixel_size) on are zero. Parts of atoms outside the box
        are lost.

    Raises
    ------
    ShapeError
        If coefficients or B-factors are not those of as many atoms as there are positions.

    References
    ----------
    .. [1] Peng, Ren, Dudarev & Whelan 1996, Acta Cryst. A52, 257-276, DOI 10.1107/S0108767395014371
    .. [2] Kirkland 2010, Advanced Computing in Electron Microscopy, DOI 10.1007/978-1-4419-6533-2, ch. 5

    Examples
    --------
    >>> gaussians = [[0.0893, 0.2465], [0.2563, 1.71], [0.757, 6.4094], [1.0487, 18.6113], [0.3575, 50.2523]]
    >>> volume = atomic_volume(
    ...     torch.zeros(1, 3), coefficients=torch.tensor([gaussians]), shape=(32, 32, 32), pixel_size=0.5
    ... )
    >>> round(volume.sum().item() * 0.5**3, 1)  # 47.878 V Å² times carbon's 2.5088 Å
    120.1
    """
    return _potential(positions, coefficients, b_factors, tuple(shape), pixel_size)


def projected_atoms(
    positions: Tensor,
    *,
    coefficients: Tensor,
    shape: Sequence[int],
    pixel_size: float,
    b_factors: Tensor | None = None,
) -> Tensor:
    """Potential of atoms integrated along z, limited to the frequencies that the pixels can hold.

    As `atomic_volume`, without the volume: exact, and the reference for projections through one.

    Parameters
    ----------
    positions : Tensor (n, 3) or (n, 2)
        Atoms in Å from the origin of the image, pixel ``n // 2``; z has no influence.
    coefficients, b_factors
        As for `atomic_volume`.
    shape : sequence of 2 int
        Shape (h, w) of the image.
    pixel_size : float
        In Å.

    Returns
    -------
    Tensor (h, w), float32
        Projected potential in V Å.
    """
    return _potential(positions[:, :2], coefficients, b_factors, tuple(shape), pixel_size)


def _potential(
    positions: Tensor,
    coefficients: Tensor,
    b_factors: Tensor | None,
    shape: tuple[int, ...],
    pixel_size: float,
) -> Tensor:
    n, ndim = len(positions), len(shape)
    if positions.shape != (n, ndim) or coefficients.shape[:1] + coefficients.shape[2:] != (n, 2):
        raise ShapeError(
            f"{tuple(coefficients.shape)} coefficients do not fit {tuple(positions.shape)} positions"
        )
    if b_factors is not None and b_factors.shape != (n,):
        raise ShapeError(f"B-factors of shape {tuple(b_factors.shape)} do not belong to {n} atoms")
    fine = tuple(2 * math.ceil(_OVERSAMPLING * size / 2) for size in shape)
    spacing = np.array([pixel_size * size / f for size, f in zip(shape, fine, strict=True)])
    nyquist = 0.5 / pixel_size
    # A wave at Nyquist is aliased with one at (2 s - 1) Nyquist for an s times finer grid.
    blur = -4 * math.log(_ALIAS) / (((2 * _OVERSAMPLING - 1) ** 2 - 1) * nyquist**2)

    atoms = positions.detach().cpu().double().numpy()[:, ::-1]
    gaussians = coefficients.detach().cpu().double().numpy()
    widths = gaussians[..., 1] + blur
    if b_factors is not None:
        widths = widths + b_factors.detach().cpu().double().numpy()[:, None]
    heights = POTENTIAL_V_A2 * gaussians[..., 0] * (4 * math.pi / widths) ** (ndim / 2)
    voxels = _in_grid_units(atoms, fine, spacing)
    del atoms, gaussians

    def sharpen(spectrum: Tensor, square: Tensor) -> Tensor:
        inside = square < (nyquist * (1 - 1e-6)) ** 2
        return spectrum * torch.where(inside, torch.exp(blur * square / 4), 0)

    if ndim == 2:
        grid = np.zeros((1, *fine), np.float32)
        _lay_gaussians(grid, voxels, heights, widths, _triple(spacing, np.inf))
        spectrum = fourier.fft_centred(torch.from_numpy(grid[0]), ndim=2)
        spectrum = fourier.resize_spectrum(spectrum, shape=fine, new_shape=shape)
        square = grids.frequency_radius(shape, pixel_size).square()
        return fourier.ifft_centred(sharpen(spectrum, square), shape=shape).to(positions.device)
    planes = _planes(fine, voxels, heights, widths, spacing)
    values = planewise.spectrum_of_planes(planes, shape=fine, new_shape=shape)
    flat = grids.frequency_radius(shape[1:], pixel_size).square()
    for z, along_z in enumerate((torch.fft.fftfreq(shape[0]) / pixel_size).square()):
        values[z] = sharpen(torch.from_numpy(values[z]), flat + along_z).numpy()
    return planewise.volume_of_spectrum(values, shape=shape).to(positions.device)


def _planes(
    shape: tuple[int, ...], atoms: NDArray, heights: NDArray, widths: NDArray, spacing: NDArray
) -> Iterator[Tensor]:
    """Planes of the finer grid, laid down some at a time: all of them at once would be most of the memory."""
    reach = np.sqrt(-math.log(_TAIL) / (4 * math.pi**2) * widths.max(axis=1)) / spacing[0]
    thickness = 8 * max(1, _SLAB_BYTES // (32 * shape[1] * shape[2]))
    for first in report(range(0, shape[0], thickness), "atoms laid down"):
        slab = np.zeros((min(thickness, shape[0] - first), *shape[1:]), np.float32)
        near = (atoms[:, 0] + reach >= first) & (atoms[:, 0] - reach <= first + len(slab) - 1)
        _lay_gaussians(slab, atoms[near] - [first, 0, 0], heights[near], widths[near], spacing)
        yield from torch.from_numpy(slab)


def _in_grid_units(atoms: NDArray, fine: tuple[int, ...], spacing: NDArray) -> NDArray:
    """Positions (z, y, x) in voxels of the finer grid, from its first; an image has one plane, z = 0."""
    voxels = atoms / spacing + np.array([size // 2 for size in fine])
    return np.concatenate([np.zeros((len(atoms), 3 - len(fine))), voxels], axis=1)


def _triple(values: NDArray, fill: float) -> NDArray:
    return np.concatenate([np.full(3 - len(values), fill), values])


@numba.njit(parallel=True, cache=True, fastmath=True)
def _lay_gaussians(
    grid: NDArray, atoms: NDArray, heights: NDArray, widths: NDArray, spacing: NDArray
) -> None:
    """Add every Gaussian h exp(-4 pi² r² / b); a thread owns some planes, so that sums keep their order."""
    depth, height, width = grid.shape
    reach = -np.log(_TAIL) / (4 * np.pi**2)
    slab = 1 if depth == 1 else 4
    rows = height if depth > 1 else 32
    bands = (height + rows - 1) // rows
    for task in numba.prange(((depth + slab - 1) // slab) * bands):
        z_low, y_low = (task // bands) * slab, (task % bands) * rows
        z_high, y_high = min(depth, z_low + slab), min(height, y_low + rows)
        along_x = np.empty(width, np.float32)
        for i in range(atoms.shape[0]):
            z, y, x = atoms[i, 0], atoms[i, 1], atoms[i, 2]
            for g in range(heights.shape[1]):
                sharp = 4 * np.pi**2 / widths[i, g]
                cut = np.sqrt(reach * widths[i, g])
                z0, z1 = 0, 1
                if depth > 1:
                    z0 = max(z_low, int(np.ceil(z - cut / spacing[0])))
                    z1 = min(z_high, int(np.floor(z + cut / spacing[0])) + 1)
                y0 = max(y_low, int(np.ceil(y - cut / spacing[1])))
                y1 = min(y_high, int(np.floor(y + cut / spacing[1])) + 1)
                x0 = max(0, int(np.ceil(x - cut / spacing[2])))
                x1 = min(width, int(np.floor(x + cut / spacing[2])) + 1)
                if z0 >= z1 or y0 >= y1 or x0 >= x1:
                    continue
                for ix in range(x0, x1):
                    along_x[ix] = np.exp(-sharp * ((ix - x) * spacing[2]) ** 2)
                for iz in range(z0, z1):
                    dz = 0.0 if depth == 1 else (iz - z) * spacing[0]
                    of_z = heights[i, g] * np.exp(-sharp * dz * dz)
                    for iy in range(y0, y1):
                        dy = (iy - y) * spacing[1]
                        weight = np.float32(of_z * np.exp(-sharp * dy * dy))
                        for ix in range(x0, x1):
                            grid[iz, iy, ix] += weight * along_x[ix]
