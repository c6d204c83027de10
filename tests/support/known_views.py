"""Views whose sampling of Fourier space and efficiency are known, for tests and a benchmark of them."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.special import eval_legendre, spherical_jn
from torch import Tensor

from halfmap.ops.rotations import from_rotation_vector, random_rotations

CONE = math.radians(40.0)
"""Angle about the axis within which the views of a cone lie."""


def looking_along(views: Tensor) -> Tensor:
    """Rotations with these viewing directions (n, 3), of any length, at any angle in the plane."""
    z = torch.nn.functional.normalize(views.double(), dim=1)
    other = torch.where(z[:, 2:].abs() < 0.9, z.new_tensor([0, 0, 1]), z.new_tensor([1, 0, 0]))
    x = torch.nn.functional.normalize(torch.linalg.cross(other, z), dim=1)
    return torch.stack([x, torch.linalg.cross(z, x), z], dim=1)


def distribution(name: str, n: int = 20_000, seed: int = 1) -> Tensor:
    """Rotations (n, 3, 3) of views from everywhere, along an axis, within a cone, or from its side."""
    generator = torch.Generator().manual_seed(seed)
    least = {"uniform": -1.0, "side": 0.0, "top": 1.0, "cone": math.cos(CONE)}[name]
    most = 0.0 if name == "side" else 1.0
    z = least + (most - least) * torch.rand(n, dtype=torch.float64, generator=generator)
    angle = 2 * math.pi * torch.rand(n, dtype=torch.float64, generator=generator)
    across = (1 - z.square()).clamp_min(0).sqrt()
    return looking_along(torch.stack([across * angle.cos(), across * angle.sin(), z], dim=1))


def density(name: str, z: np.ndarray) -> np.ndarray:
    """Analytic sampling, over that of uniform views, of directions with the cosine z to the axis."""
    across = np.sqrt(np.maximum(1 - z**2, 1e-12))
    if name == "uniform":
        return np.ones_like(z)
    if name == "side":
        return 2 / (np.pi * across)
    # Of the great circle across a direction, the part within the cone: it comes within asin(z) of the axis.
    return 2 * np.arccos(np.minimum(math.cos(CONE) / across, 1)) / np.pi / (1 - math.cos(CONE))


def axial_efficiency(name: str) -> float:
    """Efficiency of views about an axis, its point spread function expanded in Legendre polynomials."""
    z, weight = np.polynomial.legendre.leggauss(600)
    transfer = np.sqrt(density(name, z))
    k, r = np.arange(0.01, 5, 0.02), np.arange(0, 12, 0.04)
    angles = np.radians(np.arange(0.5, 90, 1))
    spread = np.zeros((len(angles), len(r)))
    for degree in range(0, 31, 2):
        part = (2 * degree + 1) / 2 * (weight * transfer * eval_legendre(degree, z)).sum()
        radial = spherical_jn(degree, k * r[:, None]) @ (k**1.5 * np.exp(-(k**2)))
        spread += (-1) ** (degree // 2) * part * eval_legendre(degree, np.cos(angles))[:, None] * radial
    radius = r[np.argmax(spread < spread.max() * math.exp(-2), axis=1)]
    area = radius * np.sqrt(radius**2 + np.gradient(radius, angles) ** 2) * np.sin(angles)
    mean = np.average(radius, weights=area)
    return 1 - 2 * math.sqrt(np.average((radius - mean) ** 2, weights=area)) / mean


def lost(share: float, attracted: float, seed: int, n: int = 3000) -> tuple[Tensor, Tensor]:
    """Two sets of poses: a share of each is wrong, of which a part falls near one direction."""
    generator = torch.Generator().manual_seed(seed)
    true = random_rotations(2 * n, generator=generator, dtype=torch.float64)
    true = true[(true[:, 2, 2].abs() < 0.5) | (torch.rand(2 * n, generator=generator) < 0.4)][:n]
    there = looking_along(torch.tensor([[0.6, 0.0, 0.8]]).repeat(len(true), 1))
    sets = []
    for _ in range(2):
        anywhere = random_rotations(len(true), generator=generator, dtype=torch.float64)
        near = from_rotation_vector(5 * torch.randn(len(true), 3, generator=generator).double()) @ there
        falls = torch.rand(len(true), generator=generator) < attracted
        wrong = torch.where(falls[:, None, None], near, anywhere)
        moved = torch.rand(len(true), generator=generator) < share
        jitter = from_rotation_vector(2 * torch.randn(len(true), 3, generator=generator).double())
        sets.append(torch.where(moved[:, None, None], wrong, jitter @ true))
    return sets[0], sets[1]
