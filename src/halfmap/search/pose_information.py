"""How surely images say how they lie, where the map that they are compared with has noise of its own.

A turn moves what is far from its axis most: signal and noise alike, and noise of a map reaches to the rim of
its mask. So a map seems to change more when it is turned than the particle does, and poses seem surer than
they are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from halfmap.ops.fourier import rfft3
from halfmap.ops.grids import friedel_weight

_DECIMALS = 6
"""Of what is stored: matrix products round differently from run to run, which nobody shall see."""

_LEAST = 0.25
"""Part of what is shown that is signal at least: below it, noise decides which."""

_SEEN = [0, 1, 2, 3, 4]
"""Turns about x, y and z and moves along x and y: an image does not show the one along z."""


def nothing_but_signal() -> Tensor:
    """What `pose_information` gives of maps without noise (2, 6, 6)."""
    return torch.eye(6, dtype=torch.float64).expand(2, 6, 6).clone()


def pose_information(
    first: Tensor, second: Tensor, *, correlation: Tensor, noise: Tensor, share: float
) -> Tensor:
    """What half maps say of turns about and moves along the axes, with their noise and without.

    Parameters
    ----------
    first, second : Tensor (d, d, d)
        Half maps, unfiltered, in the mask that references have.
    correlation : Tensor (shells,)
        Of both; zero where nothing is compared.
    noise : Tensor (shells,)
        Power of the noise of images.
    share : float
        Part of the images of a half map that are in a reference.

    Returns
    -------
    Tensor (2, 6, 6), float64
        Of a reference, filtered as the correlation allows: how much it changes, and how far these are changes
        of the particle. Turns before moves, each block but for a factor of its own.

    Notes
    -----
    An image of the particle P, compared with a map M in the metric of its noise, tells poses apart by the
    products of their changes, dP · dM. Gauss and Newton take dM · dM for these. Filtered by its correlation
    with the particle, a map has dP · dM = dM · dM for moves, shell by shell. Noise that lies farther out than
    the particle has a larger part in turns. Products of one half map with the other hold none of it.
    """
    n = min(len(correlation), len(noise))
    f = correlation[1:n].double().cpu().clamp(0, 1)
    of_reference = f / (f + (1 - f) / share)
    # Rings grow with the radius, shells with its square.
    weight = of_reference / (noise[1:n].double().cpu() * torch.arange(1, n))
    weights = torch.zeros(2, n + 1, dtype=torch.float64)
    weights[:, 1:n] = torch.stack([weight * of_reference, weight])
    total, apart = (_products(volume, weights) for volume in (first + second, first - second))
    both = (total - apart) / 4
    shown, held = both[0] + apart[0] / (2 * share), both[1]
    scale = shown.diagonal().reshape(2, 3).mean(1).clamp_min(torch.finfo(torch.float64).tiny).rsqrt()
    scale = scale.repeat_interleave(3)
    return (torch.stack([shown, held]) * scale[:, None] * scale).round(decimals=_DECIMALS)


def _products(volume: Tensor, weights: Tensor) -> Tensor:
    """Products (k, 6, 6) of a volume's changes by weights (k, shells), the last for all shells beyond.

    What a turn changes, y dV/dz - z dV/dy, is d(yV)/dz - d(zV)/dy: four spectra hold all six changes, which
    are worked out plane by plane.
    """
    d, device = len(volume), volume.device
    place = torch.arange(d, device=device, dtype=volume.dtype) - d // 2
    of = [rfft3(volume * each) for each in (place, place[:, None], place[:, None, None])]
    plain = rfft3(volume)
    fx, along = torch.fft.rfftfreq(d, dtype=torch.float64), torch.fft.fftfreq(d, dtype=torch.float64)
    fy, pairs = along[:, None], friedel_weight((d, d, d))
    products = torch.zeros(len(weights), 6, 6, dtype=torch.float64, device=device)
    for plane, fz in enumerate(along):
        shells = ((fx.square() + fy.square() + fz.square()).sqrt() * d).round().long()
        counts = weights[:, shells.clamp_max(weights.shape[1] - 1)] * pairs
        inside = counts[0] > 0
        counts, inside = counts[:, inside].to(device), inside.to(device)
        kx, ky, kz = (f.expand(shells.shape).to(device)[inside] for f in (fx, fy, fz))
        x, y, z, v = (spectrum[plane][inside].to(torch.complex128) for spectrum in (*of, plain))
        # By 2 pi i each, which is left to the end.
        changes = [y * kz - z * ky, z * kx - x * kz, x * ky - y * kx, v * kx, v * ky, v * kz]
        columns = torch.view_as_real(torch.stack(changes))
        products += (columns * counts[:, None, :, None]).flatten(2) @ columns.flatten(1).T
    return (2 * math.pi) ** 2 * products.cpu()


def without_noise(precision: Tensor, rotations: Tensor, information: Tensor) -> Tensor:
    """Precision of poses less what it owes to noise of the map.

    Parameters
    ----------
    precision : Tensor (n, 5, 5), float64
        From Gauss-Newton steps; see `local.LocalPoses`.
    rotations : Tensor (n, 3, 3)
    information : Tensor (2, 6, 6)
        From `pose_information`.

    Returns
    -------
    Tensor (n, 5, 5)
        As it was where it determines nothing.

    Notes
    -----
    The noise of images moves the maximum by ``H⁻¹ g``, where the gradient g has the covariance F that Gauss
    and Newton find, and H is the curvature there is: the precision is ``H F⁻¹ H``. Of an image, F is its own
    and H has the part in it that it has in the mean over images.
    """
    onto = rotations.new_zeros(len(rotations), 6, 6)
    # A turn of the particle is one of the axes the other way; a shift centres it.
    onto[:, :3, :3], onto[:, 3:, 3:] = -rotations, rotations
    onto = onto[:, _SEEN].double()
    shown, held = (onto @ each.to(onto) @ onto.transpose(1, 2) for each in information)
    mean, failed = torch.linalg.cholesky_ex(shown)
    own, undetermined = torch.linalg.cholesky_ex(precision)
    bad = ((failed != 0) | (undetermined != 0))[:, None, None]
    eye = torch.eye(5, dtype=own.dtype, device=own.device)
    mean = torch.where(bad, eye, mean)
    part = torch.linalg.solve_triangular(mean, held, upper=False)
    part = torch.linalg.solve_triangular(mean, part.transpose(1, 2), upper=False)
    values, vectors = torch.linalg.eigh(torch.where(bad, eye, (part + part.transpose(1, 2)) / 2))
    root = own @ vectors * values.clamp(_LEAST, 1)[:, None]
    return torch.where(bad, precision, root @ root.transpose(1, 2))
