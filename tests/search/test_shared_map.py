"""Differences of class maps against what noise gives, shell by shell and place by place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from halfmap.ops.fourier import irfft3, rfft3
from halfmap.ops.grids import frequency_radius
from halfmap.ops.rotations import random_rotations
from halfmap.search.backprojector import Backprojection
from halfmap.search.disc import DiscImages, FourierDisc
from halfmap.search.shared_map import Chance, Folded, added, kept, where_strong

BOX = 16


def test_chance_is_what_sorted_noise_leaves():
    """Noise alone, sorted by two maps of which each is compared with whole volumes of noise."""
    generator = torch.Generator().manual_seed(1)
    maps = 0.15 * torch.randn(2, 64, generator=generator, dtype=torch.float64)
    noise = torch.randn(40000, 64, generator=generator, dtype=torch.float64)
    shares = torch.tensor([0.7, 0.3], dtype=torch.float64)
    posterior = (noise @ maps.T - maps.square().sum(1) / 2 + shares.log()).softmax(1)
    means = posterior.T @ noise / posterior.sum(0)[:, None]
    overlaps = (posterior.T @ posterior).numpy()
    chance = Chance.of(maps.reshape(1, 2, 4, 4, 4), overlaps[None])
    for number in (0, 1):
        found = means[number] - noise.mean(0)
        expected = chance.mean(number, [0]).flatten()
        # Standard errors of means of as many; expected is measured with the same particles.
        error = (1 / float(posterior[:, number].sum())) ** 0.5
        assert float((found - expected).abs().max()) < 5 * error
        assert float(expected.abs().max()) > 10 * error


def test_kept_is_wieners_factor_of_two_halves():
    """Of the mean of two halves that correlate by f, 2 f / (1 + f) is signal."""
    volume = torch.randn(BOX, BOX, BOX, generator=torch.Generator().manual_seed(2))
    curve = torch.linspace(1, -0.2, BOX // 2 + 1)
    found = rfft3(kept(volume, curve)) / rfft3(volume)
    shells = (frequency_radius((BOX,) * 3, dtype=torch.float64) * BOX).round().long()
    for shell in range(1, BOX // 2):
        f = float(curve[shell].clamp(0, 1))
        assert found.real[shells == shell].numpy() == pytest.approx(2 * f / (1 + f), abs=1e-4)


def test_strong_places_stay_and_noise_goes():
    generator = torch.Generator().manual_seed(3)
    difference = torch.randn(32, 32, 32, generator=generator)
    difference[8:14, 8:14, 8:14] += 8.0
    weight = where_strong(difference, 1.0, sigma_px=2.0, least=0.1)
    assert float(weight[9:13, 9:13, 9:13].min()) > 0.9
    assert float(weight[20:, 20:, 20:].mean()) < 0.25
    assert float(weight.min()) == pytest.approx(0.1)


def sums_of_noise(seed: int) -> Backprojection:
    generator = torch.Generator().manual_seed(seed)
    disc = FourierDisc(BOX, 6)
    values = torch.view_as_complex(torch.randn(50, len(disc.points), 2, generator=generator))
    sums = Backprojection.empty(BOX, disc.radius)
    rotations = random_rotations(50, generator=generator, dtype=torch.float64)
    sums.add(DiscImages(disc, values, torch.ones(50, len(disc.points))), rotations, torch.zeros(50, 2))
    return sums


def test_folds_make_halves_and_all():
    """Of noise the halves do not agree; without a fold there is nothing of it."""
    folds = [sums_of_noise(seed) for seed in range(4)]
    found = Folded.of(folds, torch.ones(BOX, BOX, BOX), seed=1)
    assert float(found.curve[2:6].abs().max()) < 0.5
    assert np.allclose(found.total.sums.data.numpy(), added(folds).sums.data.numpy(), atol=1e-4)
    low = frequency_radius((BOX,) * 3) * BOX < 6
    own = found.unfiltered(added(folds[1:]))
    whole = Folded.of([folds[0], folds[0]], torch.ones(BOX, BOX, BOX), seed=1).unfiltered()

    def passed(volume: torch.Tensor) -> torch.Tensor:
        return irfft3(rfft3(volume) * low, shape=(BOX,) * 3)

    one, other = passed(own), passed(whole)
    assert float((one * other).sum() / (one.norm() * other.norm())) > 0.9
