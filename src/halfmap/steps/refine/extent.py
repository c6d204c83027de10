"""Where the part of the map lies that particles are aligned by, and how far it reaches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Extent:
    """Place and size of what is compared.

    Attributes
    ----------
    centre_A : Tensor (3,), float64
        (x, y, z) from the centre of the box.
    spread_A : float
        Root of the mean squared distance from it, along one direction.
    """

    centre_A: Tensor
    spread_A: float

    @classmethod
    def of_sphere(cls, diameter: float) -> Extent:
        """Of a sphere about the centre of the box."""
        return cls(torch.zeros(3, dtype=torch.float64), diameter / 2 / math.sqrt(5))

    @classmethod
    def of_mask(cls, values: Tensor, side: float) -> Extent:
        """Of a mask (n, n, n) in a box of `side` Å."""
        values, n = values.double(), len(values)
        place = (torch.arange(n, dtype=torch.float64) - n // 2) * (side / n)
        # Volumes are indexed (z, y, x).
        along = torch.stack([values.sum(tuple({0, 1, 2} - {axis})) for axis in (2, 1, 0)])
        along = along / values.sum()
        centre = along @ place
        variance = (along * (place - centre[:, None]).square()).sum(1)
        return cls(centre, math.sqrt(float(variance.mean())))
