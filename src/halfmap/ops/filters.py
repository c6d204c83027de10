"""Filters on half-spectra (low, high and band pass, B-factor, whitening) and radial averages of spectra."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from halfmap.errors import ParameterError, ShapeError
from halfmap.ops.grids import frequency_radius, ring_index, ring_sums


def low_pass(
    shape: Sequence[int],
    *,
    pixel_size: float,
    resolution: float,
    edge_px: float = 2.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Filter that passes what is coarser than `resolution`, with a cosine edge.

    Parameters
    ----------
    shape : sequence of 2 or 3 int
        Shape of the box in real space.
    pixel_size, resolution : float
        In Å. The filter is one half at the frequency 1 / resolution.
    edge_px : float
        Full width of the edge in Fourier pixels, 1 / (longest side) each; 0 for a sharp edge.
    device, dtype : optional
        Of the result.

    Returns
    -------
    Tensor (h, w // 2 + 1) or (d, h, w // 2 + 1)
        Values from 0 to 1 to multiply a half-spectrum with.

    Raises
    ------
    ParameterError
        If pixel size or resolution are not positive or the edge is negative.

    Examples
    --------
    >>> low_pass((64, 64), pixel_size=1.0, resolution=8.0)[0, 8].item()
    0.5
    """
    if not (pixel_size > 0 and resolution > 0 and edge_px >= 0):
        raise ParameterError(
            f"no low-pass filter at {resolution} Å with an edge of {edge_px} px and {pixel_size} Å/px",
            hint="pixel size and resolution must be positive, the edge 0 or more",
        )
    radius = frequency_radius(shape, device=device, dtype=torch.float64) * max(shape)
    distance = radius - max(shape) * pixel_size / resolution
    if edge_px == 0:
        return (distance <= 0).to(dtype)
    position = (distance / edge_px + 0.5).clamp_(0, 1)
    return (0.5 + 0.5 * torch.cos(torch.pi * position)).to(dtype)


def high_pass(
    shape: Sequence[int],
    *,
    pixel_size: float,
    resolution: float,
    edge_px: float = 2.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Filter that passes what is finer than `resolution`: one minus `low_pass`, with its parameters."""
    passed = low_pass(
        shape, pixel_size=pixel_size, resolution=resolution, edge_px=edge_px, device=device, dtype=dtype
    )
    return 1 - passed


def band_pass(
    shape: Sequence[int],
    *,
    pixel_size: float,
    low_resolution: float,
    high_resolution: float,
    edge_px: float = 2.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Filter that passes what lies between two resolutions in Å, the coarser one first; see `low_pass`.

    Raises
    ------
    ParameterError
        If the low resolution is not the coarser of the two.
    """
    if low_resolution <= high_resolution:
        raise ParameterError(
            f"a band from {low_resolution} Å to {high_resolution} Å is empty",
            hint="the low resolution is the larger number of Å",
        )
    coarse, fine = (
        low_pass(shape, pixel_size=pixel_size, resolution=limit, edge_px=edge_px, device=device, dtype=dtype)
        for limit in (low_resolution, high_resolution)
    )
    return (1 - coarse) * fine


def b_factor(
    shape: Sequence[int],
    *,
    pixel_size: float,
    b_factor: float,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Filter exp(-B k² / 4), B in Å²: positive B blurs, negative B sharpens; shapes as `low_pass`."""
    k = frequency_radius(shape, pixel_size, device=device, dtype=torch.float64)
    return torch.exp(-b_factor / 4 * k.square_()).to(dtype)


def radial_average(values: Tensor, *, shape: Sequence[int]) -> Tensor:
    """Mean of real values on half-spectra over the rings or shells of the full spectrum.

    Parameters
    ----------
    values : Tensor (..., h, w // 2 + 1) or (..., d, h, w // 2 + 1)
        Real values on the half-spectrum, for example a power |F|².
    shape : sequence of 2 or 3 int
        Shape of the box in real space.

    Returns
    -------
    Tensor (..., max(shape) // 2 + 1)
        Mean per ring of `grids.ring_index` up to Nyquist, summed in float64, in the dtype of `values`.

    Raises
    ------
    ShapeError
        If the values are complex or not those of a box of `shape`.
    """
    expected = (*shape[:-1], shape[-1] // 2 + 1)
    if values.is_complex() or tuple(values.shape[-len(shape) :]) != expected:
        raise ShapeError(
            f"{values.dtype} values of shape {tuple(values.shape)} are not real ones of a box {tuple(shape)}",
            hint=f"their last axes should be {expected}",
        )
    counts = ring_sums(torch.ones(expected, device=values.device), shape=shape)
    return (ring_sums(values, shape=shape) / counts).to(values.dtype)


def radial_profile_to_grid(profile: Tensor, *, shape: Sequence[int]) -> Tensor:
    """Spread a radial profile over a half-spectrum, each coefficient taking the value of its ring.

    Parameters
    ----------
    profile : Tensor (..., n)
        Values of the rings 0 to n - 1; coefficients beyond take the last one.
    shape : sequence of 2 or 3 int
        Shape of the box in real space.

    Returns
    -------
    Tensor (..., h, w // 2 + 1) or (..., d, h, w // 2 + 1)
        The profile on the grid.
    """
    return profile[..., ring_index(shape, device=profile.device).clamp_(max=profile.shape[-1] - 1)]


def whitening(spectrum: Tensor, *, shape: Sequence[int]) -> Tensor:
    """Filter that gives each ring of a spectrum the power of white noise of variance 1.

    Parameters
    ----------
    spectrum : Tensor (..., h, w // 2 + 1) or (..., d, h, w // 2 + 1), complex
        Half-spectrum without normalisation, whose own radial average is to become flat.
    shape : sequence of 2 or 3 int
        Shape of the box in real space.

    Returns
    -------
    Tensor, real, as `spectrum`
        sqrt(number of voxels / radially averaged power); 0 in rings without power. Corners beyond Nyquist
        take the value at Nyquist.
    """
    power = spectrum.real.square() + spectrum.imag.square()
    profile = radial_average(power, shape=shape)
    gain = torch.where(profile > 0, (prod(shape) / profile).sqrt(), torch.zeros_like(profile))
    return radial_profile_to_grid(gain, shape=shape)
