"""Sums of aligned images: what noise adds to the averages that it is aligned to is taken away."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from halfmap.search.inplane import InPlaneSearch
from halfmap.search.polar import PolarGrid
from halfmap.search.sums import Sums

BOX, RADIUS, SUPPORT = 32, 10, 12.0
SPOTS = ((0.0, 6.0), (5.0, -3.0), (-5.0, -3.0), (1.0, 1.0))
NOISE = 0.5


def figure(turn: float = 0.0, shift: tuple[float, float] = (0.0, 0.0), *, flip: bool = False) -> torch.Tensor:
    """Spots turned by an angle from x towards y, then moved."""
    y, x = np.mgrid[:BOX, :BOX] - BOX // 2
    image = np.zeros((BOX, BOX))
    for a, b in SPOTS:
        a = -a if flip else a
        px = a * math.cos(turn) - b * math.sin(turn) + shift[0]
        py = a * math.sin(turn) + b * math.cos(turn) + shift[1]
        image += np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * 1.5**2))
    return torch.from_numpy(image).float()


@pytest.fixture(scope="module")
def grids():
    coarse = PolarGrid(BOX, RADIUS // 2, SUPPORT)
    return [coarse, coarse.finer(2, RADIUS)]


def search(grids, strength: float, kinds: int = 1):
    """A search with averages of some strength, and these."""
    references = grids[-1].sample(strength * torch.stack([figure(), figure(flip=True)])[:kinds])
    weights = torch.zeros(kinds)
    return InPlaneSearch(grids, references, weights, range_px=2.0, deviation_px=1.0), references


def aligned(grids, images, strength, kinds=1):
    """Samples of averages from sums as they are and as they are corrected, and the averages."""
    found, references = search(grids, strength, kinds)
    samples = grids[-1].sample(images)
    ctf = torch.ones(samples.shape)
    noise = torch.full((1, grids[-1].rings), BOX**2 * NOISE**2)
    sums = Sums.of(found(samples, ctf, noise), references, grids[-1])[0]
    raw, weights = sums.samples()
    corrected, _ = sums.unbiased(references)
    return raw / weights, corrected / weights, references


def along(samples, references, grid) -> np.ndarray:
    """How much of each average there is in samples; 1 for the average itself."""
    product = (references.conj() * samples).real * grid.weights
    return (product.sum((1, 2)) / (references.abs().square() * grid.weights).sum((1, 2))).numpy()


@pytest.mark.parametrize("strength", [0.15, 0.6])
def test_noise_does_not_add_up_to_what_it_is_aligned_to(grids, strength):
    """Pure noise: as it is, it gives much of the average back; corrected, nothing beyond chance."""
    random = torch.Generator().manual_seed(3)
    noise = NOISE * torch.randn(10, 60, BOX, BOX, generator=random)
    # Noise outside the support is none of the search's.
    y, x = np.mgrid[:BOX, :BOX] - BOX // 2
    noise = noise * torch.from_numpy(np.hypot(x, y) < SUPPORT - 1)
    parts = [aligned(grids, part, strength, 2) for part in noise]
    raw, corrected = (np.array([along(part[i], part[2], grids[-1]) for part in parts]) for i in (0, 1))
    error = corrected.std() / math.sqrt(corrected.size)
    assert raw.mean() > 10 * error
    assert abs(corrected.mean()) < 3 * error


def test_signal_is_kept(grids):
    """Images of the average, turned and moved, in noise: it comes back whole."""
    random = np.random.default_rng(4)
    torch.manual_seed(5)
    images = torch.stack([figure(random.uniform(-3, 3), tuple(random.normal(0, 0.7, 2))) for _ in range(150)])
    images = images + NOISE * torch.randn(images.shape)
    raw, corrected, references = aligned(grids, images, 1.0)
    assert along(raw, references, grids[-1])[0] == pytest.approx(1.0, abs=0.06)
    assert along(corrected, references, grids[-1])[0] == pytest.approx(1.0, abs=0.06)


def test_expected_sums_against_a_direct_loop(grids):
    """Averages turned, moved, seen through the CTF one by one, each by its probability; then turned back."""
    grid = grids[-1]
    found, references = search(grids, 0.3, 2)
    random = torch.Generator().manual_seed(1)
    images = figure(0.4, (1.0, 0.0)) + NOISE * torch.randn(2, BOX, BOX, generator=random)
    ctf = torch.rand(2, grid.rings, grid.angles // 2, generator=random) - 0.3
    noise = torch.full((1, grid.rings), BOX**2 * NOISE**2)
    posterior = found(grid.sample(images), ctf, noise)
    sums, _ = Sums.of(posterior, references, grid)
    zero = torch.zeros_like(sums.squared)
    kept = Sums(sums.expected, zero, zero).samples()[0]
    weight = ctf.square() * grid.weights / noise[..., None]
    half = grid.angles // 2

    def turned(samples, angle):
        return torch.cat([samples, samples.conj()], dim=-1).roll(angle, -1)[..., :half]

    direct = torch.zeros_like(kept)
    for i in range(2):
        moves = [grid.shifts(shift[None])[0] for shift in posterior.shifts_px[i]]
        poses = [(t, angle) for t in range(len(moves)) for angle in range(grid.angles)]
        chance = posterior.probability[:, i]
        expected = sum(
            moves[t].conj() * (chance[angle, t, :, None, None] * turned(references, angle)).sum(0)
            for t, angle in poses
        )
        for t, angle in poses:
            back = turned(moves[t] * weight[i] * expected, -angle)
            direct += chance[angle, t, :, None, None] * back
    torch.testing.assert_close(kept, direct, rtol=1e-3, atol=1e-3 * float(direct.abs().max()))
