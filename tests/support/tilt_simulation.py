"""Poses of particles before and after the stage was tilted."""

from __future__ import annotations

import torch

from halfmap.ops import symmetry
from halfmap.ops.rotations import from_rotation_vector, random_rotations


def turn(angle: float, axis: float, in_plane: float = 0.0) -> torch.Tensor:
    """A tilt about an axis in the plane, after a turn in it."""
    radians = torch.deg2rad(torch.tensor(axis, dtype=torch.float64))
    vector = angle * torch.stack([radians.cos(), radians.sin(), 0 * radians])
    first = from_rotation_vector(torch.tensor([0.0, 0.0, in_plane], dtype=torch.float64))
    return from_rotation_vector(vector) @ first


def pairs(n: int, common: torch.Tensor, *, group: str = "C1", share: float = 1.0, scatter: float = 3.0):
    """Rotations of pairs that show a common one, scattered by degrees, a share of them; others at random."""
    g = torch.Generator().manual_seed(1)
    before = random_rotations(n, generator=g, dtype=torch.float64)
    noise = from_rotation_vector(scatter * torch.randn(n, 3, generator=g, dtype=torch.float64))
    operators = symmetry.operators(group)
    chosen = operators[torch.randint(len(operators), (n,), generator=g)]
    after = noise @ common @ before @ chosen
    wrong = torch.arange(n) >= share * n
    after[wrong] = random_rotations(int(wrong.sum()), generator=g, dtype=torch.float64)
    return before, after
