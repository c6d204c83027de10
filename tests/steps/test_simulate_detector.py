"""The counting detector: Poisson statistics, gain, flaws, transfer, super-resolution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.random import SeedSequence
from scipy import stats

from halfmap.steps.simulate.detector import build_camera

SHAPE = (256, 320)


def camera(**changes):
    settings = {
        "shape": SHAPE,
        "upsampling": 1,
        "efficiency": 1.0,
        "mislocation_px": 0.15,
        "gain_spread": 0.0,
        "n_dead": 0,
        "n_hot": 0,
    }
    return build_camera(SeedSequence(3), **{**settings, **changes})


# Both ways of drawing, and both sides of the limit between them.
@pytest.mark.parametrize("mean", [0.05, 0.9, 3.0, 11.9, 12.1, 60.0])
def test_counts_are_poisson_distributed(mean):
    expected = np.full(SHAPE, mean, np.float32)
    counts = np.concatenate([camera().expose(expected, SeedSequence(seed), bits=16) for seed in range(4)])
    n = counts.size
    assert counts.mean() == pytest.approx(mean, abs=4 * np.sqrt(mean / n))
    # The variance of a Poisson sample's variance is (2 mean² + mean) / n.
    assert counts.var() == pytest.approx(mean, abs=4 * np.sqrt((2 * mean**2 + mean) / n))
    observed = np.bincount(counts.ravel())
    model = stats.poisson.pmf(np.arange(observed.size), np.float64(np.float32(mean))) * n
    usual = model > 10
    chi2 = (np.square(observed - model)[usual] / model[usual]).sum()
    assert chi2 < stats.chi2.ppf(0.9999, usual.sum())


def test_pixels_are_independent():
    counts = camera().expose(np.full(SHAPE, 2.0, np.float32), SeedSequence(1), bits=8).astype(float)
    counts -= counts.mean()
    for axis in (0, 1):
        correlation = (counts * np.roll(counts, 1, axis)).mean() / counts.var()
        assert abs(correlation) < 4 / np.sqrt(counts.size)


def test_frames_of_one_seed_are_equal_and_of_others_are_not():
    expected = np.full(SHAPE, 2.0, np.float32)
    first, again, other = (camera().expose(expected, SeedSequence(seed), bits=8) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert np.mean(first == other) < 0.3


def test_recorded_times_gain_is_the_electrons_counted():
    uneven = camera(gain_spread=0.1, efficiency=0.8)
    expected = np.full(SHAPE, 30.0, np.float32)
    recorded = np.mean([uneven.expose(expected, SeedSequence(seed), bits=16) for seed in range(100)], axis=0)
    assert uneven.gain.mean() == pytest.approx(1, abs=1e-4)
    assert 0.08 < uneven.gain.std() < 0.2
    # Mean counts of 24 / gain over 100 frames; in units of their own error.
    error = (recorded * uneven.gain - 24) / (uneven.gain * np.sqrt(24 / uneven.gain / 100))
    assert abs(error.mean()) < 4 / np.sqrt(error.size)
    assert error.std() == pytest.approx(1, abs=0.02)
    assert np.corrcoef(recorded.ravel(), 1 / uneven.gain.ravel())[0, 1] > 0.9


def test_dead_pixels_count_nothing_and_hot_ones_too_much():
    flawed = camera(n_dead=10, n_hot=10)
    counts = np.stack(
        [flawed.expose(np.full(SHAPE, 2.0, np.float32), SeedSequence(s), bits=8) for s in range(50)]
    )
    x, y = flawed.dead.T
    assert counts[:, y, x].max() == 0
    assert flawed.gain[y, x].max() == 0
    x, y = flawed.hot[:, :2].astype(int).T
    assert np.allclose(counts[:, y, x].mean(axis=0), 2 + flawed.hot[:, 2], atol=4 * np.sqrt(60 / 50))
    assert (flawed.gain == 0).sum() == 10


def test_counts_saturate_instead_of_wrapping():
    counts = camera().expose(np.full(SHAPE, 400.0, np.float32), SeedSequence(1), bits=8)
    assert counts.min() == 255


def test_mtf_is_the_pixel_s_area_and_the_mislocation():
    """Electrons thrown on a pixel grid with an error of 0.15 px transfer waves as the MTF says."""
    rng = np.random.default_rng(4)
    n, length, frequency = 2_000_000, 64, 20 / 64
    place = rng.uniform(0, length, 4 * n)
    place = place[rng.random(4 * n) < 0.5 * (1 + np.cos(2 * np.pi * frequency * place))][:n]
    recorded = np.floor(place + 0.15 * rng.normal(size=place.size) + 0.5).astype(int) % length
    profile = np.bincount(recorded, minlength=length)
    wave = np.exp(-2j * np.pi * frequency * np.arange(length))
    measured = 2 * abs(np.dot(profile, wave)) / profile.sum()
    assert measured == pytest.approx(float(camera().mtf(np.array(frequency))), abs=4 * np.sqrt(2 / n))


def test_transfer_on_the_grid_is_the_mtf_along_the_axes():
    grid = camera().transfer((64, 64))
    k = torch.fft.rfftfreq(64)
    assert np.allclose(grid[0], camera().mtf(k), atol=1e-6)
    assert np.allclose(grid[:33, 0], camera().mtf(k), atol=1e-6)


def test_super_resolution_divides_pixels_and_keeps_their_flaws():
    fine = camera(upsampling=2, n_dead=3, n_hot=2, gain_spread=0.05)
    coarse = camera(upsampling=1, n_dead=3, n_hot=2, gain_spread=0.05)
    assert fine.gain.shape == (512, 640)
    assert np.array_equal(fine.gain.reshape(256, 2, 320, 2).mean(axis=(1, 3)), coarse.gain)
    assert len(fine.dead) == 12
    assert fine.hot[:, 2].sum() == pytest.approx(coarse.hot[:, 2].sum())
    # Binned by two, super-resolution's transfer is that of the physical pixels.
    k = np.linspace(0, 0.5, 9)
    assert np.allclose(fine.mtf(k / 2) * np.cos(np.pi * k / 2), coarse.mtf(k))
