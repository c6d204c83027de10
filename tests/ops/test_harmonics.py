"""Spherical harmonics against closed forms, and turning about axes against turning the volume."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from halfmap.ops import grids, harmonics
from halfmap.ops.interpolation import rotate_volume
from halfmap.ops.rotations import from_rotation_vector


def test_the_small_d_of_degree_one():
    b = 0.7
    c, s = math.cos(b), math.sin(b)
    expected = [
        [(1 + c) / 2, s / math.sqrt(2), (1 - c) / 2],
        [-s / math.sqrt(2), c, s / math.sqrt(2)],
        [(1 - c) / 2, -s / math.sqrt(2), (1 + c) / 2],
    ]
    np.testing.assert_allclose(harmonics.rotation_y(1, np.array([b]))[0], expected, atol=1e-12)


@pytest.mark.parametrize("degree", [0, 5, 24])
def test_the_small_d_is_a_rotation_that_adds_up(degree):
    a, b, both = harmonics.rotation_y(degree, np.array([0.4, 1.1, 1.5]))
    np.testing.assert_allclose(a @ b, both, atol=1e-10)
    np.testing.assert_allclose(a @ a.T, np.eye(2 * degree + 1), atol=1e-10)


def test_expansion_of_single_harmonics():
    x, y, z = grids.coordinates((33,) * 3, dtype=torch.float64).unbind(-1)
    # sqrt(3 / 4 pi) z is Y_10, and sqrt(15 / 4 pi) x y is i / sqrt(2) (Y_2-2 - Y_22).
    volume = math.sqrt(3 / (4 * math.pi)) * z + math.sqrt(15 / (4 * math.pi)) * x * y
    radius = 8.0
    found = harmonics.expand(volume, radii_px=torch.tensor([radius]), degree=4)
    expected = [np.zeros(2 * ell + 1, complex) for ell in range(5)]
    expected[1][1] = radius
    expected[2][[0, 4]] = np.array([1j, -1j]) / math.sqrt(2) * radius**2
    for mine, its in zip(found, expected, strict=True):
        # Cubic interpolation is exact for polynomials of second degree.
        np.testing.assert_allclose(mine[:, 0].numpy(), its, atol=1e-9)


def test_power_about_axes_tells_the_correlation_under_turns():
    generator = torch.Generator().manual_seed(3)
    size, sigma = 33, 3.0
    where = grids.coordinates((size,) * 3)
    volume = torch.zeros(where.shape[:-1])
    for centre in torch.randn(6, 3, generator=generator) * 4:
        volume += torch.exp(-(where - centre).square().sum(-1) / (2 * sigma**2))
    radii = torch.arange(1.0, 16)
    # Shells a voxel apart, each with its area.
    shells = [c * radii for c in harmonics.expand(volume, radii_px=radii, degree=16)]
    tilts = np.array([0.0, 35.0, 90.0])
    power = harmonics.axial_power(shells, tilts=tilts, n_rot=36)
    total = sum(float(c.abs().square().sum()) for c in shells)
    np.testing.assert_allclose(power.sum(-1), total, rtol=1e-9)
    norm = float(volume.square().sum())
    for row, column, angle in [(0, 0, 90.0), (1, 7, 180.0), (2, 20, 72.0)]:
        tilt, rot = math.radians(tilts[row]), math.radians(10.0 * column)
        axis = [math.sin(tilt) * math.cos(rot), math.sin(tilt) * math.sin(rot), math.cos(tilt)]
        turn = from_rotation_vector(torch.tensor(axis) * angle)
        direct = float((volume * rotate_volume(volume, turn, method="cubic")).sum()) / norm
        waves = np.cos(math.radians(angle) * np.arange(17))
        assert (power[row, column] * waves).sum() / total == pytest.approx(direct, abs=5e-3)
