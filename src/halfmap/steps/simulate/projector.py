"""Projections of a potential volume along any direction, accurate to a few parts in ten thousand.

The refinement's projector interpolates linearly in a padded transform; what it is judged by must not share
its errors. Here a Kaiser-Bessel window of five samples interpolates in a transform padded 1.5 times.
"""

from __future__ import annotations

import math
from typing import Protocol

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.log import report
from halfmap.ops import fourier, planewise

_PADDING = 1.5
_WINDOW = 5
_MARGIN = _WINDOW // 2 + 1
_STEPS = 1024
"""Entries of the window's table per sample."""


class Planes(Protocol):
    """A volume, or planes that are made one by one when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, z: int, /) -> Tensor: ...


def _shape_parameter() -> float:
    """Width parameter of the window that leaves the least aliasing for this padding (Beatty et al. 2005)."""
    ratio = _WINDOW / _PADDING * (_PADDING - 0.5)
    return math.pi * math.sqrt(ratio**2 - 0.8)


def _window_table() -> NDArray:
    u = np.arange(_STEPS * _WINDOW // 2 + 2) / _STEPS
    inside = np.clip(1 - (2 * u / _WINDOW) ** 2, 0, None)
    beta = _shape_parameter()
    return np.where(2 * u <= _WINDOW, np.i0(beta * np.sqrt(inside)) / np.i0(beta), 0.0)


def _window_transform(n: int, padded: int) -> NDArray:
    """Fourier transform of the window, by which the voxels of a box of `n` are divided beforehand."""
    x = (np.arange(n) - n // 2) / padded
    argument = np.sqrt(_shape_parameter() ** 2 - (math.pi * _WINDOW * x) ** 2)
    return _WINDOW * np.sinh(argument) / argument / np.i0(_shape_parameter())


def padded_transform(volume: Tensor) -> NDArray:
    """Prepare a volume for `project`.

    Parameters
    ----------
    volume : Tensor (n, n, n)
        n even, origin at voxel ``n // 2``.

    Returns
    -------
    ndarray (2 r + 1, 2 r + 1, r + 4), complex64
        Half of the padded transform, origin at (r, r, 3), with a margin that the window reaches into.

    References
    ----------
    .. [1] Beatty, Nishimura & Pauly 2005, IEEE Trans. Med. Imaging 24, 799-808, DOI 10.1109/TMI.2005.848376
    """
    grid = np.empty(transform_shape(volume.shape[0]), np.complex64)
    fill_transform(grid, volume)
    return grid


def transform_shape(box: int) -> tuple[int, int, int]:
    """Shape of the padded transform of a box."""
    reach = _padded(box) // 2 + _MARGIN
    return 2 * reach + 1, 2 * reach + 1, reach + _MARGIN + 1


def fill_transform(grid: NDArray, planes: Planes) -> None:
    """Write the padded transform of a volume, given by its planes, to `grid`, which may be a memory map.

    Only parts of it are in memory at a time.
    """
    n = len(planes)
    padded = _padded(n)
    window = torch.from_numpy(_window_transform(n, padded))
    half, reach = padded // 2, padded // 2 + _MARGIN
    columns = slice(_MARGIN, _MARGIN + half + 1)
    before = half - n // 2
    # First each plane, written at the beginning of the grid; then the third axis, some rows at a time.
    for z in report(range(n), "transformed"):
        flat = planes[z] / (window[z] * window[:, None] * window).to(planes[z].dtype)
        flat = torch.nn.functional.pad(flat, (before, padded - n - before) * 2)
        spectrum = fourier.fft_centred(flat, ndim=2).numpy()
        grid[z, _MARGIN : _MARGIN + padded, columns] = np.roll(spectrum, half, axis=0)
    inner = grid[:, _MARGIN : _MARGIN + padded, columns]
    for rows in report(planewise.row_blocks(inner), "transformed along z"):
        block = np.zeros((rows.stop - rows.start, half + 1, padded, 1), np.complex64)
        place = (np.arange(n) - n // 2) % padded
        block[:, :, place, 0] = inner[:n, rows].transpose(1, 2, 0)
        block = fourier.fft2(torch.from_numpy(block)).numpy()[..., 0]
        inner[:, rows] = block[:, :, np.arange(-reach, reach + 1) % padded].transpose(2, 0, 1)
    for z in range(len(grid)):
        plane = grid[z]
        plane[:_MARGIN] = plane[padded : padded + _MARGIN]
        plane[_MARGIN + padded :] = plane[_MARGIN : 2 * _MARGIN + 1]
    # Beyond either end of the half axis the coefficients are those of the opposite wave, conjugated.
    for z in range(len(grid)):
        for column in [*range(_MARGIN), *range(columns.stop, grid.shape[2])]:
            k = column - _MARGIN
            source = -k if k < 0 else padded - k
            grid[z, :, column] = grid[-1 - z, ::-1, source + _MARGIN].conj()


def _padded(box: int) -> int:
    return 2 * math.ceil(_PADDING * box / 2)


def project(transform: NDArray, rotations: Tensor, *, box: int, pixel_size: float) -> Tensor:
    """Project a volume along the z axis of rotated frames.

    Parameters
    ----------
    transform : ndarray
        From `padded_transform`; may be a memory map.
    rotations : Tensor (b, 3, 3)
        Matrices that take volume to image coordinates.
    box : int
        Size n of the volume that the transform was made from.
    pixel_size : float
        Å per voxel.

    Returns
    -------
    Tensor (b, n, n), float32
        Line integrals, in the volume's unit times Å; frequencies from Nyquist on are zero.
    """
    slices = np.empty((len(rotations), box, box // 2 + 1), np.complex64)
    _extract(transform, rotations.double().numpy(), _window_table(), slices)
    return fourier.ifft_centred(torch.from_numpy(slices), shape=(box, box)) * pixel_size


@numba.njit(parallel=True, cache=True, fastmath=True)
def _extract(
    grid: NDArray[np.complex64], rotations: NDArray, table: NDArray, slices: NDArray[np.complex64]
) -> None:
    """Central slices: the window's weighted sum around each point of the slice."""
    count, n, columns = slices.shape
    centre = grid.shape[0] // 2
    padding = 2 * (centre - _MARGIN) / n
    for row in numba.prange(count * n):
        image, iy = row // n, row % n
        ky = iy if iy < (n + 1) // 2 else iy - n
        weights = np.empty((3, _WINDOW), np.float32)
        first = np.empty(3, np.int64)
        for kx in range(columns):
            if kx * kx + ky * ky >= n * n / 4:
                slices[image, iy, kx] = 0
                continue
            x = (rotations[image, 0, 0] * kx + rotations[image, 1, 0] * ky) * padding
            y = (rotations[image, 0, 1] * kx + rotations[image, 1, 1] * ky) * padding
            z = (rotations[image, 0, 2] * kx + rotations[image, 1, 2] * ky) * padding
            mirrored = x < 0
            if mirrored:
                x, y, z = -x, -y, -z
            for axis, k in enumerate((z + centre, y + centre, x + _MARGIN)):
                start = int(np.ceil(k - _WINDOW / 2))
                first[axis] = start
                for j in range(_WINDOW):
                    place = abs(start + j - k) * _STEPS
                    entry = int(place)
                    fraction = place - entry
                    weights[axis, j] = table[entry] * (1 - fraction) + table[entry + 1] * fraction
            real, imaginary = np.float32(0), np.float32(0)
            for jz in range(_WINDOW):
                for jy in range(_WINDOW):
                    part_real, part_imaginary = np.float32(0), np.float32(0)
                    for jx in range(_WINDOW):
                        value = grid[first[0] + jz, first[1] + jy, first[2] + jx]
                        part_real += weights[2, jx] * value.real
                        part_imaginary += weights[2, jx] * value.imag
                    weight = weights[0, jz] * weights[1, jy]
                    real += weight * part_real
                    imaginary += weight * part_imaginary
            slices[image, iy, kx] = complex(real, -imaginary) if mirrored else complex(real, imaginary)
