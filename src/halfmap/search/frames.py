"""The frames of two half maps: how one is turned and moved against the other, and poses without that."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from halfmap.ops import symmetry
from halfmap.ops.fourier import ifft1, irfft2, rfft3
from halfmap.ops.rotations import from_rotation_vector

_Vector = tuple[Tensor, Tensor, Tensor]

_DECIMALS = 6
"""Of degrees and pixels."""


@dataclass(frozen=True, eq=False)
class Motion:
    """A turn about the centre of the box and a move, both small.

    Attributes
    ----------
    turn_deg, move_px : Tensor (3,), float64
        Vectors (x, y, z): axis times angle, and shift.
    """

    turn_deg: Tensor
    move_px: Tensor

    def of_poses(self, rotations: Tensor, shifts_px: Tensor, part: float) -> tuple[Tensor, Tensor]:
        """Poses (n, 3, 3), (n, 2) against a map that has a part of this motion taken off.

        The map found, A, and the other, B, are ``A(x) = B(Q x + t)`` for a turn Q and a move t.
        """
        device = rotations.device
        turned = rotations @ from_rotation_vector(-part * self.turn_deg).to(device)
        moved = turned @ (part * self.move_px).to(device, turned.dtype)
        return turned, shifts_px + moved[:, :2]


def motion_between(first: Tensor, second: Tensor, correlation: Tensor, group: str = "C1") -> Motion:
    """How the second map has to be turned and moved to be the first, if not by much.

    Parameters
    ----------
    first, second : Tensor (d, d, d)
        Masked.
    correlation : Tensor (shells,)
        Of both, which says how much of each shell counts.
    group : str
        Point group of both; what it does not leave free is zero.

    Returns
    -------
    Motion

    Notes
    -----
    ``first(x) = second(x + w × x + t)``: to first order the difference of the maps is the gradient of their
    mean times the motion, six unknowns for all voxels. Noise of the mean makes what is found smaller than it
    is, never larger; noise of the difference has no part in that of the mean, where both maps have as much.
    """
    free = symmetry.operators(group).double().mean(0).round(decimals=_DECIMALS)
    if not bool(free.any()):
        return Motion(torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    matrix, vector = _normal_equations(first, second, correlation)
    found = torch.linalg.lstsq(matrix, vector[:, None]).solution[:, 0]
    # Sums differ in the last place from machine to machine, which nobody shall see.
    turn, move = ((free @ part).round(decimals=_DECIMALS) for part in (torch.rad2deg(found[:3]), found[3:]))
    return Motion(turn, move)


def _normal_equations(first: Tensor, second: Tensor, correlation: Tensor) -> tuple[Tensor, Tensor]:
    """Matrix (6, 6) and vector (6,) of the least squares, float64.

    Plane by plane: six volumes more would take more memory than all else does. In double precision, the order
    of sums, which depends on the number of threads, changes nothing that rounding leaves.
    """
    d, device = len(first), first.device
    curve = correlation.clamp(0, 1).to(first)
    along = torch.fft.fftfreq(d, device=device)
    across = torch.fft.rfftfreq(d, device=device), along[:, None]
    mean = _filtered(first + second, curve / 2)
    steep = _planes(mean * (2j * math.pi * along)[:, None, None])
    mean = _planes(mean)
    apart = _planes(_filtered(first - second, curve))
    matrix, vector = first.new_zeros(6, 6, dtype=torch.float64), first.new_zeros(6, dtype=torch.float64)
    place = torch.arange(d, device=device, dtype=torch.float64) - d // 2
    for z in range(d):
        spectra = *(mean[z] * (2j * math.pi * wave) for wave in across), steep[z], apart[z]
        gx, gy, gz, lacking = (irfft2(each, shape=(d, d)).double() for each in spectra)
        changed = _changed((gx, gy, gz), (place, place[:, None], place[z]))
        columns = torch.stack([each.flatten() for each in changed])
        matrix += columns @ columns.T
        vector += columns @ lacking.flatten()
    return matrix.cpu(), vector.cpu()


def _filtered(volume: Tensor, curve: Tensor) -> Tensor:
    """Spectrum of a volume, each shell times its value of a curve and those beyond times the last."""
    spectrum, d = rfft3(volume), len(volume)
    squared = torch.fft.fftfreq(d, device=volume.device).double().square()
    for plane, z in zip(spectrum, squared, strict=True):
        radius = (squared[: plane.shape[1]] + squared[:, None] + z).sqrt() * d
        plane *= curve[radius.round().long().clamp_max(len(curve) - 1)]
    return spectrum


def _planes(spectrum: Tensor) -> Tensor:
    """Spectra (d, d, d // 2 + 1) of the planes along z of a volume."""
    return ifft1(spectrum.movedim(0, -1)).movedim(-1, 0)


def _changed(slope: _Vector, place: _Vector) -> Iterator[Tensor]:
    """First-order changes by turns and moves, of slopes along x, y and z at places (x, y, z)."""
    (gx, gy, gz), (x, y, z) = slope, place
    yield y * gz - z * gy
    yield z * gx - x * gz
    yield x * gy - y * gx
    yield from (gx, gy, gz)
