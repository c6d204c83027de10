"""Grids of positions and spatial frequencies, last axis (x, y[, z]), and sums over rings and shells."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_SLAB = 2**22
"""Coefficients whose rings are summed at once."""


def frequencies(
    shape: Sequence[int],
    pixel_size: float = 1.0,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Spatial frequency vectors of a half-spectrum.

    Parameters
    ----------
    shape : sequence of 2 or 3 int
        Shape of the box in real space, (h, w) or (d, h, w).
    pixel_size : float
        In Å; with 1 the frequencies are in 1/px.
    device, dtype : optional
        Of the result.

    Returns
    -------
    Tensor (h, w // 2 + 1, 2) or (d, h, w // 2 + 1, 3)
        Frequencies (kx, ky[, kz]) in 1/Å, unshifted, DC at index 0.

    Notes
    -----
    The Nyquist frequency of an even axis is +1/2 along x and -1/2 along y and z.
    """
    axes = _frequency_axes(shape, pixel_size, device)
    return torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], dim=-1).to(dtype)


def frequency_radius(
    shape: Sequence[int],
    pixel_size: float = 1.0,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Length of the frequency in 1/Å (1/px for a pixel size of 1) on the half-spectrum of a box."""
    return _length(_frequency_axes(shape, pixel_size, device)).to(dtype)


def ring_index(shape: Sequence[int], *, device: torch.device | str | None = None) -> Tensor:
    """Fourier shell or ring to which each coefficient of a half-spectrum belongs.

    Parameters
    ----------
    shape : sequence of 2 or 3 int
        Shape of the box in real space.
    device : optional
        Of the result.

    Returns
    -------
    Tensor (h, w // 2 + 1) or (d, h, w // 2 + 1), int64
        Radius rounded to the nearest whole number of Fourier pixels. In a box that is not square that is the
        Fourier pixel of its longest side n, 1 / (n pixels), so that ring ``n // 2`` is Nyquist whatever the
        shape.
    """
    return _rings(_ring_axes(shape, device))


def friedel_weight(shape: Sequence[int], *, device: torch.device | str | None = None) -> Tensor:
    """How many coefficients of the full spectrum a column of the half-spectrum stands for, (w // 2 + 1,).

    Columns at kx = 0 and, for an even width, at Nyquist hold both members of their Friedel pairs; the others
    one.
    """
    width = shape[-1]
    weight = torch.full((width // 2 + 1,), 2, dtype=torch.float64, device=device)
    weight[0] = 1
    if width % 2 == 0:
        weight[-1] = 1
    return weight


def ring_sums(values: Tensor, *, shape: Sequence[int]) -> Tensor:
    """Sum real values of half-spectra over the rings or shells up to Nyquist, Friedel mates counted.

    Parameters
    ----------
    values : Tensor (..., h, w // 2 + 1) or (..., d, h, w // 2 + 1)
        Real values, the same for both members of a Friedel pair.
    shape : sequence of 2 or 3 int
        Shape of the box in real space.

    Returns
    -------
    Tensor (..., max(shape) // 2 + 1), float64
        Sums over the full spectrum, ring by ring of `ring_index`; the corners beyond Nyquist are left out.
    """
    ndim, longest = len(shape), max(shape)
    axes = _ring_axes(shape, values.device)
    weight = friedel_weight(shape, device=values.device)
    sums = weight.new_zeros((*values.shape[:-ndim], round(longest * ndim**0.5 / 2) + 2))
    # Slab by slab: indices and double-precision values of a large volume would be several times its size.
    step = max(1, _SLAB * shape[0] // max(values.numel(), 1))
    for first in range(0, shape[0], step):
        rings = _rings([axes[0][first : first + step], *axes[1:]]).flatten()
        slab = values.narrow(-ndim, first, min(step, shape[0] - first))
        weighted = (slab * weight).flatten(-ndim)
        sums = sums.scatter_add(-1, rings.expand(weighted.shape), weighted)
    return sums[..., : longest // 2 + 1]


def coordinates(
    shape: Sequence[int],
    pixel_size: float = 1.0,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Positions (x, y[, z]) in Å of the voxels of a box, (h, w, 2) or (d, h, w, 3), origin at ``n // 2``."""
    axes = _position_axes(shape, pixel_size, device)
    return torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], dim=-1).to(dtype)


def radius(
    shape: Sequence[int],
    pixel_size: float = 1.0,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Distance in Å of the voxels of a box from its origin ``n // 2``, of `shape`."""
    return _length(_position_axes(shape, pixel_size, device)).to(dtype)


def _frequency_axes(
    shape: Sequence[int], pixel_size: float, device: torch.device | str | None
) -> list[Tensor]:
    axes = [torch.fft.fftfreq(n, pixel_size, device=device, dtype=torch.float64) for n in shape[:-1]]
    return [*axes, torch.fft.rfftfreq(shape[-1], pixel_size, device=device, dtype=torch.float64)]


def _ring_axes(shape: Sequence[int], device: torch.device | str | None) -> list[Tensor]:
    longest = max(shape)
    return [axis * longest for axis in _frequency_axes(shape, 1.0, device)]


def _rings(axes: Sequence[Tensor]) -> Tensor:
    return _length(axes).round_().to(torch.int64)


def _position_axes(
    shape: Sequence[int], pixel_size: float, device: torch.device | str | None
) -> list[Tensor]:
    return [(torch.arange(n, device=device, dtype=torch.float64) - n // 2) * pixel_size for n in shape]


def _length(axes: Sequence[Tensor]) -> Tensor:
    """Euclidean length on the grid that the axes (slowest first) span."""
    ndim = len(axes)
    squares = [axis.square().reshape([-1] + [1] * (ndim - 1 - i)) for i, axis in enumerate(axes)]
    return sum(squares[1:], start=squares[0]).sqrt_()
