"""The bound that noise like a micrograph puts on what the network makes of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.spatial import KDTree
from tests.steps.test_pick_learned import frame, grains, picked, rings

from halfmap.io.micrographs import Image
from halfmap.steps.pick.learned import Learned
from halfmap.steps.pick.learned_noise import most_log_odds, noise_like


def test_next_to_nothing_is_picked_in_noise_of_any_grain():
    """Grains of up to two fifths of the diameter; by their looks alone every tenth place has a particle."""
    counts = [picked(grains(width, seed)) for width in (0.0, 1.0, 2.0, 3.0, 4.0) for seed in (6, 7, 8)]
    assert sum(len(picks) for picks, _ in counts) < 0.01 * sum(places for _, places in counts)
    assert sum(len(picks) > 0 for picks, _ in counts) <= 2


def test_a_few_particles_are_found_in_noise():
    image, centres = rings((480, 480), 5.0, 120.0, 6, seed=9)
    picks, _ = picked(frame(image, 5.0))
    near, which = KDTree(centres).query(np.stack([picks.x, picks.y], -1))
    assert len(picks) == 6
    assert set(which[near < 5]) == set(range(6))


def test_candidates_are_sorted_and_the_seed_decides_the_noise():
    image, _ = rings((300, 420), 5.0, 120.0, 30, seed=13)
    one, again, other = (
        Learned(120.0).search(frame(image, 5.0), np.random.default_rng(seed))[0] for seed in (1, 1, 2)
    )
    assert np.all(np.diff(one.score) <= 0)
    assert np.array_equal(one.score, again.score)
    assert np.array_equal(one.x, again.x)
    assert not np.array_equal(one.score, other.score)


def test_noise_is_not_louder_for_dirt():
    """A patch of 50 deviations, dark or bright, in grainy noise."""
    values = gaussian_filter(np.random.default_rng(21).normal(size=(400, 400)), 1.0).astype(np.float32)
    values /= values.std()
    plain = noise_like(frame(values, 5.0), np.random.default_rng(1)).values.std()
    for strength in (-50, 50):
        dirty = values.copy()
        dirty[100:112, 200:212] += strength
        noise = noise_like(frame(dirty, 5.0), np.random.default_rng(1)).values.std()
        assert noise == pytest.approx(plain, rel=0.02)


def test_noise_has_the_power_and_the_mask_of_the_micrograph():
    rng = np.random.default_rng(15)
    values = gaussian_filter(rng.normal(size=(300, 400)), 2).astype(np.float32)
    mask = np.ones(values.shape, bool)
    mask[:, :100] = False
    image = Image(values / values.std() * mask, 5.0, mask, None, (1.0, 1.0))
    noise = noise_like(image, np.random.default_rng(1)).values
    assert not noise[~mask].any()
    # The deviation of that of 90,000 pixels in grains of 4 π 2² pixels is 2 %.
    assert noise[mask].std() == pytest.approx(image.values[mask].std(), rel=0.06)
    power = [np.abs(np.fft.rfft2(each)[:40, :40]) ** 2 for each in (noise, image.values)]
    assert power[0].sum() == pytest.approx(power[1].sum(), rel=0.1)
    assert np.corrcoef(noise[mask], image.values[mask])[0, 1] == pytest.approx(0, abs=0.1)


def test_candidates_like_those_of_noise_are_left_no_odds():
    rng = np.random.default_rng(16)
    noise, particles = rng.normal(-3, 1.5, 500), rng.normal(6, 0.5, 40)
    score = np.concatenate([rng.normal(-3, 1.5, 500), particles])
    most = most_log_odds(score, noise)
    assert np.all(np.diff(most[np.argsort(score)]) >= 0)
    assert most[500:].min() > 4
    # As many in noise as at its middle: 250 of 290.
    assert np.interp(-3, np.sort(score), np.sort(most)) == pytest.approx(math.log(40 / 250), abs=0.3)
    alone = most_log_odds(score[:500], noise)
    assert (alone > 0).mean() < 0.01


def test_the_bound_is_the_q_value():
    """Against a plain loop over all thresholds, with the tail as it is defined; many scores are equal."""
    rng = np.random.default_rng(22)
    noise = np.sort(rng.normal(-3, 1.5, 300)).round(1)
    score = np.concatenate([rng.normal(-3, 1.5, 250), rng.normal(0.5, 1.5, 20), rng.normal(6, 1, 10)]).round(
        1
    )
    top = noise[-30:]
    fall = (sum(top - top[0]) + 1) / 30

    def above(threshold):
        if threshold > top[0]:
            return 30 * math.exp(-(threshold - top[0]) / fall)
        return sum(noise >= threshold)

    parts = {t: above(t) / sum(score >= t) for t in score}
    least = [min(part for t, part in parts.items() if t <= s) for s in score]
    expected = [math.log((1 - q) / q) for q in np.clip(least, 1e-9, 0.99)]
    np.testing.assert_allclose(most_log_odds(score, noise), expected, rtol=1e-9)


def test_few_candidates_are_judged_too():
    assert most_log_odds(np.array([1.0, 2.0]), np.zeros(0)).min() > 10
    assert most_log_odds(np.zeros(0), np.array([1.0])).shape == (0,)
    low, high = most_log_odds(np.array([0.0, 9.0]), np.array([0.5]))
    assert low <= 0 < high
