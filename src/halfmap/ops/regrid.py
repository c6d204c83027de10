"""Put a map on another grid, of other voxels and another box, without interpolation errors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from halfmap.errors import ParameterError, ShapeError


def regrid(volume: Tensor, *, pixel_size: float, box: int, new_pixel_size: float) -> Tensor:
    """Sample the waves of a map at the voxels of another grid about the same origin.

    Parameters
    ----------
    volume : Tensor (n, n, n)
        With its origin at voxel ``n // 2``.
    pixel_size, new_pixel_size : float
        Of the map now and wanted, Å. They need have no common measure.
    box : int
        Side wanted, in voxels.

    Returns
    -------
    Tensor (box, box, box)
        What is finer than two new voxels is left out. Voxels outside the old box are 0.

    Raises
    ------
    ShapeError
        If the map is no cube.
    ParameterError
        If a pixel size is not above 0.

    Notes
    -----
    Each axis is multiplied by the matrix that sums its Fourier series at the new places: exact for the
    frequencies below Nyquist of both grids.
    """
    n = len(volume)
    if volume.ndim != 3 or len(set(volume.shape)) != 1:
        raise ShapeError(f"a map of {tuple(volume.shape)} voxels is no cube")
    if not (pixel_size > 0 and new_pixel_size > 0):
        raise ParameterError("a map cannot be put on a grid of voxels without size")
    if n == box and math.isclose(pixel_size, new_pixel_size, rel_tol=1e-6):
        return volume.clone()
    matrix = _matrix(n, box, new_pixel_size / pixel_size).to(volume)
    for _ in range(3):
        # The first axis becomes the last one each time.
        volume = torch.einsum("zyx,nz->yxn", volume, matrix)
    return volume


def _matrix(n: int, box: int, step: float) -> Tensor:
    """Values at `box` places, `step` voxels apart, of waves through n voxels: (box, n)."""
    place = (torch.arange(box, dtype=torch.float64) - box // 2) * step
    apart = place[:, None] - (torch.arange(n, dtype=torch.float64) - n // 2)
    frequency = torch.arange(1, n // 2 + 1, dtype=torch.float64)
    weight = torch.full_like(frequency, 2 / n)
    if n % 2 == 0:
        weight[-1] /= 2
    weight *= frequency / n * step <= 0.5
    waves = torch.zeros_like(apart) + 1 / n
    for k, w in zip(frequency.tolist(), weight.tolist(), strict=True):
        if w > 0:
            waves += w * torch.cos(2 * math.pi / n * k * apart)
    inside = (place >= -(n // 2) - 0.5) & (place <= n - 1 - n // 2 + 0.5)
    return waves * inside[:, None]
