"""Projections through the padded transform against atoms projected one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from halfmap.io.models import scattering_coefficients
from halfmap.ops import fourier, grids, rotations
from halfmap.ops.potential import atomic_volume, projected_atoms
from halfmap.steps.simulate.projector import padded_transform, project

BOX = 64


@pytest.fixture(scope="module")
def atoms() -> dict:
    rng = np.random.default_rng(2)
    direction = rng.normal(size=(400, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    positions = direction * 20 * rng.random((400, 1)) ** (1 / 3)
    coefficients = torch.tensor(np.stack(scattering_coefficients("C"), axis=-1)).repeat(400, 1, 1)
    b_factors = torch.full((400,), 40.0)
    return {"positions": torch.tensor(positions), "coefficients": coefficients, "b_factors": b_factors}


@pytest.fixture(scope="module")
def transform(atoms) -> np.ndarray:
    box = {"shape": (BOX,) * 3, "pixel_size": 1.0}
    return padded_transform(
        atomic_volume(
            atoms["positions"], coefficients=atoms["coefficients"], b_factors=atoms["b_factors"], **box
        )
    )


def test_projections_are_those_of_rotated_atoms(atoms, transform):
    poses = rotations.random_rotations(6, generator=torch.Generator().manual_seed(3)).double()
    poses = torch.cat(
        [poses, torch.eye(3).double()[None], torch.diag(torch.tensor([-1.0, 1, -1])).double()[None]]
    )
    images = project(transform, poses, box=BOX, pixel_size=1.0)
    exact = torch.stack(
        [
            projected_atoms(
                atoms["positions"] @ pose.T,
                coefficients=atoms["coefficients"],
                b_factors=atoms["b_factors"],
                shape=(BOX, BOX),
                pixel_size=1.0,
            )
            for pose in poses
        ]
    )
    difference = fourier.fft_centred(images - exact, ndim=2).abs().square()
    power = fourier.fft_centred(exact, ndim=2).abs().square()
    k = grids.frequency_radius((BOX, BOX))
    # Near Nyquist the volume's transform ends and the window reaches beyond it.
    for low, high, tolerance in ((0.0, 0.2, 1.5e-3), (0.2, 0.4, 6e-3)):
        ring = (k >= low) & (k < high)
        error = (difference[:, ring].sum() / power[:, ring].sum()).sqrt()
        assert error < tolerance


def test_every_projection_has_the_volume_s_sum(transform, atoms):
    poses = rotations.random_rotations(5, generator=torch.Generator().manual_seed(4))
    images = project(transform, poses, box=BOX, pixel_size=2.0)
    sums = images.sum(dim=(1, 2)) / 2.0
    total = float(project(transform, torch.eye(3)[None], box=BOX, pixel_size=1.0).sum())
    assert torch.allclose(sums, torch.full((5,), total), rtol=1e-5)
    assert total == pytest.approx(400 * 2.5088 * 47.8776, rel=1e-3)


def test_a_volume_not_around_the_origin_moves_with_the_pose():
    volume = torch.zeros(32, 32, 32)
    volume[16 + 3, 16, 16 + 6] = 1.0
    volume = fourier.irfft3(
        fourier.rfft3(volume) * (grids.frequency_radius((32,) * 3) < 0.3), shape=(32,) * 3
    )
    # x -> y, y -> -x: a point at (x, y, z) = (6, 0, 3) is seen at (0, 6).
    turn = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    image = project(padded_transform(volume), turn[None], box=32, pixel_size=1.0)[0]
    assert divmod(int(image.argmax()), 32) == (16 + 6, 16)
