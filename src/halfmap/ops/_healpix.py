"""HEALPix pixel centres in nested order, as rotation grids need them."""

from __future__ import annotations

import torch
from torch import Tensor

from halfmap.errors import ParameterError

_MAX_ORDER = 12
"""Finest order: 1.2e9 rotations' indices at order 8 already; 12 keeps every intermediate inside int64."""


def pixel_count(order: int) -> int:
    """Count the pixels of the sphere at this order, 12 · 4^order."""
    if not 0 <= order <= _MAX_ORDER:
        raise ParameterError(f"HEALPix order {order} is not between 0 and {_MAX_ORDER}")
    return 12 * 4**order


def pixel_centres(pixel: Tensor, *, order: int) -> Tensor:
    """Directions and in-plane origins of nested pixel numbers, (..., 3) float64: rot, tilt, psi in degrees.

    Notes
    -----
    Górski et al. 2005 (10.1086/427976), section 4: a nested number is the base face and, bit-interleaved,
    the place (x, y) inside it; the ring follows from x + y and the place in the ring from x - y. Their
    integer place j with its half-pixel shift cancels in the longitude, which is linear in x - y along a
    ring.

    With psi = 0 everywhere, neighbours near a pole would differ by as much in-plane as in rot, and the
    children of a pixel would leave its cell. Turning by -(rot - rot of the face's centre) cos(tilt) carries
    the in-plane origin along each parallel without rotation, so that neighbours within a face keep
    together.
    """
    count = pixel_count(order)
    if pixel.numel() and (int(pixel.min()) < 0 or int(pixel.max()) >= count):
        raise ParameterError(f"HEALPix pixel numbers of order {order} lie between 0 and {count - 1}")
    n_side = 2**order
    pixel = pixel.to(torch.int64)
    face, inner = pixel // n_side**2, pixel % n_side**2
    x, y = torch.zeros_like(inner), torch.zeros_like(inner)
    for bit in range(order):
        x |= (inner >> 2 * bit & 1) << bit
        y |= (inner >> 2 * bit + 1 & 1) << bit
    face_row = face // 4
    ring = (face_row + 2) * n_side - (x + y) - 1
    ring_quarter = torch.minimum(torch.minimum(ring, 4 * n_side - ring), torch.full_like(ring, n_side))
    cap = 1 - ring_quarter.double() ** 2 / (3 * n_side**2)
    z = torch.where(
        ring < n_side, cap, torch.where(ring > 3 * n_side, -cap, (4 - 2 * ring.double() / n_side) / 3)
    )
    offset = 45.0 * (x - y).double() / ring_quarter.double()
    rot = 45.0 * (2 * (face % 4) - face_row % 2 + 1) + offset
    return torch.stack([rot % 360.0, torch.rad2deg(torch.arccos(z)), -offset * z], dim=-1)
