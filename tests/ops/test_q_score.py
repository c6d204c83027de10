"""Q-scores against a slow, plain reference, and against densities that are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from halfmap.errors import ShapeError
from halfmap.ops.interpolation import sample_volume
from halfmap.ops.q_score import q_scores, spiral

PIXEL = 0.8


def random_map(n: int = 24, seed: int = 1) -> torch.Tensor:
    volume = torch.randn(n, n, n, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.avg_pool3d(volume[None], 3, stride=1, padding=1)[0]


def gaussians(atoms: np.ndarray, sigma: float, n: int = 24, pixel: float = PIXEL) -> torch.Tensor:
    axis = np.arange(n) * pixel
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    found = np.zeros((n, n, n))
    for atom in atoms:
        found += np.exp(-((x - atom[0]) ** 2 + (y - atom[1]) ** 2 + (z - atom[2]) ** 2) / (2 * sigma**2))
    return torch.from_numpy(found).float()


def plain(volume: torch.Tensor, atoms: np.ndarray, sigma: float) -> list[float]:
    """Word for word as the definition has it, for atoms that are far from the faces."""
    mean, deviation = float(volume.double().mean()), float(volume.double().std(correction=0))
    high, low = min(mean + 10 * deviation, float(volume.max())), max(mean - deviation, float(volume.min()))
    scores = []
    for number, atom in enumerate(atoms):
        others = np.delete(atoms, number, axis=0)
        places, wanted = [atom] * 8, [high] * 8
        for shell in range(1, 21):
            radius = 0.1 * shell
            for trial in range(50):
                laid = atom + radius * spiral(8 + 2 * trial)
                apart = [np.linalg.norm(others - place, axis=1).min() for place in laid]
                free = [place for place, one in zip(laid, apart, strict=True) if one >= 0.9 * radius]
                if len(free) >= 8:
                    places += free
                    wanted += [low + (high - low) * math.exp(-((radius / sigma) ** 2) / 2)] * len(free)
                    break
        values = sample_volume(volume.double(), torch.from_numpy(np.array(places) / PIXEL)).numpy()
        scores.append(float(np.corrcoef(values, wanted)[0, 1]))
    return scores


@pytest.mark.parametrize("sigma", [0.6, 0.4])
def test_as_a_plain_reference(sigma):
    """Atoms in a chain, of which neighbours hide most points of each other, and one alone."""
    chain = np.cumsum(np.random.default_rng(2).normal(size=(12, 3)), axis=0)
    atoms = np.concatenate([9.2 + 0.8 * (chain - chain.mean(0)), [[3.0, 15.0, 15.0]]])
    assert ((atoms > 2.5) & (atoms < 16)).all()
    volume = random_map()
    found = q_scores(volume, torch.from_numpy(atoms), pixel_size=PIXEL, sigma=sigma)
    np.testing.assert_allclose(found.numpy(), plain(volume, atoms, sigma), atol=1e-5)


def test_an_atom_of_the_references_width_has_one_and_a_wider_one_less():
    atom = np.array([[6.0, 6.4, 6.2]])
    fine = [
        float(q_scores(gaussians(atom, width, 48, 0.25), torch.from_numpy(atom), pixel_size=0.25)[0])
        for width in (0.6, 0.9, 1.5)
    ]
    assert fine[0] > 0.995
    assert fine[0] > fine[1] > fine[2]


def test_scale_and_offset_of_the_map_do_not_count():
    volume, atoms = random_map(), torch.tensor([[8.0, 9.0, 10.0], [9.3, 9.0, 10.0]])
    one = q_scores(volume, atoms, pixel_size=PIXEL)
    torch.testing.assert_close(q_scores(40 * volume + 7, atoms, pixel_size=PIXEL), one, atol=1e-4, rtol=0)


def test_the_sign_does():
    volume, atoms = random_map(), torch.tensor([[8.0, 9.0, 10.0]])
    torch.testing.assert_close(
        q_scores(-volume, atoms, pixel_size=PIXEL), -q_scores(volume, atoms, pixel_size=PIXEL)
    )


def test_atoms_outside_and_flat_density_have_none():
    volume = torch.zeros(24, 24, 24)
    volume[:, :, 12:] = random_map()[:, :, 12:]
    atoms = torch.tensor([[-0.1, 9.0, 9.0], [3.0, 9.0, 9.0], [14.0, 9.0, 9.0], [9.0, 18.5, 9.0]])
    assert torch.isnan(q_scores(volume, atoms, pixel_size=PIXEL)).tolist() == [True, True, False, True]


def test_alternative_locations_do_not_hide_each_other():
    volume = random_map()
    atoms = torch.tensor([[8.0, 9.0, 10.0], [8.5, 9.0, 10.0]])
    alone = torch.cat([q_scores(volume, atom[None], pixel_size=PIXEL) for atom in atoms])
    both = q_scores(volume, atoms, pixel_size=PIXEL, groups=torch.tensor([1, 2]))
    torch.testing.assert_close(both, alone)
    assert not torch.allclose(q_scores(volume, atoms, pixel_size=PIXEL), alone, atol=1e-3)


def test_the_spiral_is_even():
    for n in (8, 24, 106):
        points = spiral(n)
        np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1)
        assert np.linalg.norm(points.mean(0)) < 0.1
        anywhere = np.random.default_rng(1).normal(size=(2000, 3))
        anywhere /= np.linalg.norm(anywhere, axis=1, keepdims=True)
        nearest = np.linalg.norm(anywhere[:, None] - points, axis=2).min(axis=1)
        assert nearest.max() < math.sqrt(4 * math.pi / n)


def test_shapes_are_checked():
    with pytest.raises(ShapeError, match="cannot be scored"):
        q_scores(torch.zeros(4, 4), torch.zeros(2, 3), pixel_size=1.0)
