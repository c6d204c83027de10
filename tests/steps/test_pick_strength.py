"""Fragments among the picks of a network, told by their strength."""

from __future__ import annotations

import numpy as np
import scipy.stats

from halfmap.io.micrographs import Image, flattened
from halfmap.steps.pick.candidates import Candidates
from halfmap.steps.pick.strength import evidence, strengths


def test_fragments_lose_and_particles_keep_their_odds():
    rng = np.random.default_rng(1)
    whole, broken = rng.normal(6, 0.7, 300), rng.uniform(1, 3.6, 40)
    pairs = rng.uniform(7, 11, 30)
    strength = np.concatenate([whole, pairs, broken])
    looks = np.full(len(strength), 3.0)
    found = looks + evidence(looks, strength)
    assert (found[:330] > 0).mean() > 0.98
    # The weakest 1.5 in a thousand whole ones are as strong as the strongest fragment.
    assert (found[330:] < 0).mean() > 0.9
    assert found[300:330].min() >= np.median(found[:300]) - 1


def test_strengths_of_any_scale_say_the_same():
    rng = np.random.default_rng(2)
    strength, looks = rng.normal(5, 1, 100), rng.normal(2, 1, 100)
    np.testing.assert_allclose(evidence(looks, strength), evidence(looks, 30 * strength), atol=1e-6)


def test_few_particles_and_unknown_strengths_add_nothing():
    rng = np.random.default_rng(3)
    assert (evidence(np.full(5, 4.0), rng.normal(5, 1, 5)) == 0).all()
    strength = np.append(rng.normal(5, 1, 50), np.nan)
    assert evidence(np.full(51, 4.0), strength)[-1] == 0
    assert (evidence(np.zeros(0), np.zeros(0))).shape == (0,)


def test_half_of_a_ball_is_weaker_than_a_whole_one():
    rng = np.random.default_rng(4)
    y, x = np.mgrid[:300, :300]
    places = [(60 + 45 * i, 60 + 45 * j) for i in range(5) for j in range(5)]
    image = rng.normal(size=(300, 300))
    for k, (px, py) in enumerate(places):
        chord = 2 * np.sqrt(np.maximum(100 - (x - px) ** 2 - (y - py) ** 2, 0)) / 20
        image -= (2.0 if k % 2 else 1.0) * chord
    mask = np.ones(image.shape, bool)
    micrograph = Image(flattened(image.astype(np.float32), mask, 150), 5.0, mask, None, (1, 1))
    px, py = np.array(places, np.float32).T
    found = strengths(micrograph, Candidates(px, py, np.ones(25, np.float32)), 100.0)
    whole = np.median(found[1::2])
    assert (found[::2] < 0.7 * whole).mean() > 0.9
    assert (found[1::2] > 0.7 * whole).mean() > 0.9


def test_strengths_add_the_ratio_of_their_densities():
    """Normal about the middle, against anything between it and nothing."""
    rng = np.random.default_rng(5)
    middle, deviation = 6.0, 1.2
    strength = rng.normal(middle, deviation, 20_000)
    added = evidence(np.full(len(strength), 20.0), strength)
    weaker = strength < middle
    densities = scipy.stats.norm.pdf(strength[weaker], middle, deviation) * middle
    np.testing.assert_allclose(added[weaker], np.maximum(np.log(densities), -10), atol=0.1)
    assert np.ptp(added[strength > middle + 0.1]) == 0


def test_no_candidate_is_worse_than_the_floor():
    rng = np.random.default_rng(8)
    strength = np.append(rng.normal(6, 0.3, 500), [0.0, 0.5])
    np.testing.assert_array_equal(evidence(np.full(502, 5.0), strength)[-2:], [-10, -10])


def test_what_is_much_stronger_than_particles_gains_nothing():
    rng = np.random.default_rng(9)
    strength = np.concatenate([rng.normal(6, 0.7, 300), [11.0, 18.0, 18.0]])
    added = evidence(np.full(303, 2.0), strength)
    assert added[300] == np.max(added) > 0.5
    np.testing.assert_array_equal(added[301:], [0, 0])


def test_the_more_alike_particles_are_the_more_they_gain():
    rng = np.random.default_rng(6)
    strength = np.append(rng.normal(6, 1, 200), np.nan)
    gain = [evidence(np.full(201, 2.0), strength)]
    gain += [evidence(np.full(201, 2.0), np.append(rng.uniform(0, 6, 200), np.nan))]
    assert np.median(gain[0]) > 0.5
    # Scattered as noise's peaks are.
    assert np.nanmax(gain[1]) < 0.1
    assert gain[0][-1] == gain[1][-1] == 0


def test_noise_that_looks_like_some_particles_gains_nothing():
    # More than enough would be expected of the looks alone, but no valley parts them from the rest.
    looks = np.random.default_rng(7).normal(-5, 2, 600)
    assert (1 / (1 + np.exp(-looks))).sum() > 12
    assert (evidence(looks, np.full(600, 5.0)) == 0).all()
