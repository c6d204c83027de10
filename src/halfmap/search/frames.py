"""The frames of two half maps: how one is turned and moved against the other, and poses without that."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from halfmap.ops import symmetry
from halfmap.ops.fourier import irfft3, rfft3
from halfmap.ops.rotations import from_rotation_vector

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
    d = len(first)
    k = torch.fft.fftfreq(d, dtype=torch.float64)
    z, y, x = k[:, None, None], k[:, None], torch.fft.rfftfreq(d, dtype=torch.float64)
    shells = ((z * z + y * y + x * x).sqrt() * d).round().long().clamp_max(len(correlation) - 1)
    kept = correlation.clamp(0, 1).to(first)[shells.to(first.device)]
    mean = rfft3(first + second) * (kept / 2)
    apart = irfft3(rfft3(first - second) * kept, shape=first.shape).flatten()
    gradient = torch.stack(
        [irfft3(mean * (2j * math.pi * axis).to(mean), shape=first.shape).flatten() for axis in (x, y, z)]
    )
    place = torch.arange(d, device=first.device, dtype=first.dtype) - d // 2
    pz, py, px = (each.flatten() for each in torch.meshgrid(place, place, place, indexing="ij"))
    gx, gy, gz = gradient
    columns = torch.stack([py * gz - pz * gy, pz * gx - px * gz, px * gy - py * gx, gx, gy, gz])
    matrix = (columns @ columns.T).double().cpu()
    found = torch.linalg.lstsq(matrix, (columns @ apart).double().cpu()[:, None]).solution[:, 0]
    free = symmetry.operators(group).double().mean(0)
    # Matrix products round differently from run to run, which nobody shall see.
    turn, move = ((free @ part).round(decimals=_DECIMALS) for part in (torch.rad2deg(found[:3]), found[3:]))
    return Motion(turn, move)
