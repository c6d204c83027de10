"""The microscope's transfer function on rings of Fourier space."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from halfmap.data.ctf import CTFParameters
from halfmap.ops.ctf import ctf, odd_aberration_phase
from halfmap.search.polar import PolarGrid


def transfer_on_rings(
    parameters: CTFParameters,
    grid: PolarGrid,
    pixel_size: float,
    *,
    phase_flipped: Tensor | None = None,
    intact_first_peak: bool = False,
) -> Tensor:
    """CTF of images at the samples of a polar grid.

    Parameters
    ----------
    parameters : CTFParameters
        Of n images.
    grid : PolarGrid
        Of the images as they are searched.
    pixel_size : float
        Of the same, Å.
    phase_flipped : Tensor (n,) of bool, optional
        Which images were multiplied by the sign of their CTF; default: none.
    intact_first_peak : bool
        Take the amplitude for 1 up to the first peak.

    Returns
    -------
    Tensor (n, rings, angles / 2)
        Complex where there are aberrations that are odd, real otherwise.
    """
    # Fourier cropping has changed the pixels.
    parameters = replace(parameters, pixel_size=torch.full_like(parameters.pixel_size, pixel_size))
    points = grid.frequencies.reshape(-1, 2) / grid.box
    values = ctf(points, **parameters.for_ctf())
    shape = (len(parameters), grid.rings, grid.angles // 2)
    values = values.expand(shape[0], -1).reshape(shape)
    if intact_first_peak:
        values = _intact_first_peak(values)
    if phase_flipped is not None:
        values = torch.where(phase_flipped[:, None, None], values.abs(), values)
    odd = parameters.for_odd_aberrations()
    if odd is not None:
        values = values * odd_aberration_phase(points, **odd).expand(shape[0], -1).reshape(shape)
    return values.to(grid.device)


def _intact_first_peak(values: Tensor) -> Tensor:
    """Amplitudes of 1 up to the first peak along each radius, signs kept."""
    falling = values.abs().diff(dim=1) < 0
    before = torch.cat([falling[:, :1] * 0, falling.int().cumsum(1)], dim=1) == 0
    return torch.where(before, torch.sign(values), values)
