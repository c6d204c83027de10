"""Thresholds and probabilities from scores alone."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from halfmap.data import MicrographSet
from halfmap.io.mrc import write_mrc
from halfmap.io.star import read_star
from halfmap.io.tables import write_micrographs
from halfmap.project import Project
from halfmap.steps.pick.calibrate import calibrate
from halfmap.steps.pick.step import PickBlob


def _maxima(rng, n, mean=0.0):
    """Like the maxima of noise: skewed to high values."""
    return mean + rng.normal(size=(n, 3)).max(axis=1)


def test_two_populations_are_told_apart_and_counted():
    rng = np.random.default_rng(1)
    false, true = _maxima(rng, 3000), rng.normal(4.0, 0.8, 800)
    found = calibrate(np.concatenate([false, true]), _maxima(rng, 3000, 0.7))
    assert found.kind == "two populations"
    wrong = (false >= found.threshold).sum()
    picked = wrong + (true >= found.threshold).sum()
    assert picked == found.picked
    # The threshold that knows the truth is right in so many of 3800.
    best = min((false >= t).sum() + (true < t).sum() for t in np.linspace(1, 5, 200))
    assert wrong + (true < found.threshold).sum() < 1.2 * best
    assert found.false_discovery_rate == pytest.approx(wrong / picked, abs=0.02)


def test_probabilities_rise_with_the_score_and_are_calibrated():
    rng = np.random.default_rng(2)
    score = np.concatenate([_maxima(rng, 4000), rng.normal(3.2, 0.9, 1500)])
    truth = np.arange(len(score)) >= 4000
    found = calibrate(score, _maxima(rng, 4000))
    assert (np.diff(found.probability) >= 0).all()
    likely = found.of(score)
    for low, high in ((0.2, 0.4), (0.4, 0.6), (0.6, 0.8)):
        bin_ = (likely >= low) & (likely < high)
        part = truth[bin_].mean()
        error = math.sqrt(part * (1 - part) / bin_.sum())
        # The model is not that of the data: a tenth beyond the error of counting.
        assert abs(part - likely[bin_].mean()) < 0.1 + 3 * error


def test_a_higher_probability_picks_fewer():
    rng = np.random.default_rng(3)
    score = np.concatenate([_maxima(rng, 1000), rng.normal(3.5, 0.8, 400)])
    loose, strict = (calibrate(score, probability=p) for p in (0.2, 0.9))
    assert strict.picked < loose.picked
    assert strict.false_discovery_rate < loose.false_discovery_rate


@pytest.mark.parametrize("n", [60, 600, 6000])
def test_of_noise_alone_next_to_nothing_is_picked(n):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        found = calibrate(_maxima(rng, n), _maxima(rng, n))
        assert found.picked <= max(2, 0.005 * n)


def test_particles_alone_are_all_picked():
    rng = np.random.default_rng(5)
    found = calibrate(rng.normal(9, 0.7, 300), _maxima(rng, 400))
    assert found.kind == "above noise"
    assert found.picked > 290
    assert found.expected_false < 5


@pytest.mark.parametrize("score", [[], [1.0], [1.0, 1.0, 1.0], [np.nan, np.inf]])
def test_few_scores_give_no_picks(score):
    found = calibrate(np.array(score))
    assert found.kind == "none"
    assert found.picked == 0
    assert math.isinf(found.threshold)


def test_scores_of_any_scale_give_the_same_picks():
    rng = np.random.default_rng(6)
    score = np.concatenate([_maxima(rng, 800), rng.normal(4, 0.8, 300)])
    null = _maxima(rng, 800)
    one, other = calibrate(score, null), calibrate(100 * score - 7, 100 * null - 7)
    assert other.picked == one.picked
    assert other.threshold == pytest.approx(100 * one.threshold - 7)


def test_micrographs_of_other_strength_have_their_own_thresholds():
    rng = np.random.default_rng(7)
    centres = np.array([3.2, 4.0, 5.0, 6.0, 4.5])
    false = [_maxima(rng, 1600) for _ in centres]
    # Fragments of all sizes; the last micrograph has no particles.
    true = [rng.normal(c, 0.6, 0 if i == 4 else 600) for i, c in enumerate(centres)]
    broken = [rng.uniform(0.8, c, 0 if i == 4 else 100) for i, c in enumerate(centres)]
    score = [np.concatenate(parts) for parts in zip(false, true, broken, strict=True)]
    truth = [np.isin(np.arange(len(s)), 1600 + np.arange(len(t))) for s, t in zip(score, true, strict=True)]
    number = np.repeat(np.arange(5), [len(part) for part in score])
    joined, null = np.concatenate(score), _maxima(rng, 2000)

    def f1(picked):
        return (
            2
            * sum((p & t).sum() for p, t in zip(picked, truth, strict=True))
            / (sum(p.sum() for p in picked) + sum(t.sum() for t in truth))
        )

    found, pooled = calibrate(joined, null, micrograph=number), calibrate(joined, null)
    own = [found.part(i).threshold for i in range(5)]
    assert own[0] < own[1] < own[2] < own[3]
    picked = [s >= t for s, t in zip(score, own, strict=True)]
    assert f1(picked) > f1([s >= pooled.threshold for s in score])
    assert sum(p.sum() for p in picked) == found.picked
    assert picked[4].sum() < 32
    wrong = sum((p & ~t).sum() for p, t in zip(picked, truth, strict=True))
    assert found.false_discovery_rate == pytest.approx(wrong / found.picked, abs=0.05)
    likely = np.concatenate([found.part(i).of(part) for i, part in enumerate(score)])
    assert found.expected_false == pytest.approx((1 - likely[np.concatenate(picked)]).sum())


def test_micrographs_in_any_order_give_the_same_thresholds():
    rng = np.random.default_rng(8)
    score = [np.concatenate([_maxima(rng, 300), rng.normal(c, 0.7, 90)]) for c in (4.0, 5.0, 6.0)]
    order = (2, 0, 1)
    one = calibrate(np.concatenate(score), micrograph=np.repeat(range(3), 390))
    other = calibrate(np.concatenate([score[i] for i in order]), micrograph=np.repeat(range(3), 390))
    for place, i in enumerate(order):
        assert other.part(place).threshold == pytest.approx(one.part(i).threshold)


def test_fragments_are_counted_as_false_and_pairs_are_not():
    rng = np.random.default_rng(9)
    background, single = _maxima(rng, 3000), rng.normal(6.0, 0.8, 900)
    pairs = rng.uniform(6.5, 10.5, 90)
    fragments = 0.85 + 5.1 * rng.uniform(0, 0.9, 120)
    score = np.concatenate([background, fragments, single, pairs])
    found = calibrate(score, _maxima(rng, 3000))
    picked = found.picks(score)
    assert picked[-990:].mean() > 0.97
    wrong = picked[:-990].sum() / picked.sum()
    assert found.false_discovery_rate == pytest.approx(wrong, abs=0.02)


def test_strengths_that_multiply_are_calibrated_too():
    rng = np.random.default_rng(10)
    score = np.concatenate([_maxima(rng, 4000), 0.85 + 6 * np.exp(rng.normal(0, 0.3, 1000))])
    found = calibrate(score, _maxima(rng, 4000), scatter=0.3)
    picked = found.picks(score)
    assert picked[4000:].mean() > 0.95
    assert found.false_discovery_rate == pytest.approx(picked[:4000].sum() / picked.sum(), abs=0.02)


def test_what_is_far_stronger_than_particles_is_not_picked():
    rng = np.random.default_rng(11)
    dirt = rng.uniform(30, 60, 40)
    score = np.concatenate([_maxima(rng, 2000), rng.normal(6.0, 0.8, 500), dirt])
    found = calibrate(score, _maxima(rng, 2000))
    assert found.picks(score)[2000:2500].mean() > 0.97
    assert not found.picks(dirt).any()
    assert found.of(dirt).max() < 0.05


def test_a_micrograph_without_candidates_takes_the_usual_threshold():
    rng = np.random.default_rng(12)
    score = np.concatenate([_maxima(rng, 800), rng.normal(6.0, 0.8, 200)])
    found = calibrate(score, micrograph=rng.integers(0, 3, 1000))
    assert found.part(3).threshold == found.threshold


def test_empty_micrographs_stay_empty_beside_crowded_ones():
    """Whitening divides by the power of particles as well: crowded micrographs have a narrower background."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        crowded = [np.append(0.45 * _maxima(rng, 340), rng.normal(4.6, 0.4, 300)) for _ in range(2)]
        empty = [_maxima(rng, 640) for _ in range(2)]
        number = np.repeat(range(4), 640)
        found = calibrate(np.concatenate(crowded + empty), _maxima(rng, 2560), micrograph=number)
        for i in (0, 1):
            picked = found.part(i).picks(crowded[i])
            assert picked[340:].mean() > 0.99
            assert picked[:340].sum() <= 1
        assert sum(found.part(2 + i).picks(empty[i]).sum() for i in (0, 1)) <= 2


@pytest.mark.parametrize("share", [0.005, 0.008, 0.015])
def test_few_clear_particles_are_found_without_false_ones(share):
    false = true = total = 0
    stated = 0.0
    for seed in range(3):
        rng = np.random.default_rng(seed)
        noise, particles = _maxima(rng, 5000), rng.normal(7, 0.7, int(5000 * share))
        found = calibrate(np.append(noise, particles), _maxima(rng, 5000))
        false, true = false + found.picks(noise).sum(), true + found.picks(particles).sum()
        total, stated = total + len(particles), stated + found.expected_false
    assert true > 0.98 * total
    assert false <= 0.02 * total
    assert stated < 0.03 * total


def test_expected_false_picks_are_those_of_the_table():
    rng = np.random.default_rng(14)
    for mean, count in ((7.0, 40), (9.0, 300), (3.0, 200)):
        score = np.append(_maxima(rng, 3000 if count < 300 else 0), rng.normal(mean, 0.7, count))
        found = calibrate(score, _maxima(rng, 3000))
        likely = found.of(score[found.picks(score)])
        assert len(likely) == found.picked
        assert likely.min() >= 0.5 - 1e-9
        assert found.expected_false == pytest.approx((1 - likely).sum())


def test_what_is_kept_of_a_micrograph_does_not_grow_with_its_candidates():
    rng = np.random.default_rng(15)
    score = np.append(_maxima(rng, 40_000), rng.normal(6, 0.7, 8000))
    found = calibrate(score, _maxima(rng, 4000), micrograph=rng.integers(0, 4, len(score)))
    assert all(len(part.grid) < 300 for part in found.parts)


def test_nothing_is_picked_in_the_empty_ones_of_a_job(tmp_path):
    size, pixel_A, diameter_A = 640, 3.0, 130.0
    radius = diameter_A / 2 / pixel_A
    rng = np.random.default_rng(16)
    y, x = np.mgrid[:size, :size]
    names = [f"Images/{kind}{i}.mrc" for kind in ("crowded", "empty") for i in range(2)]
    for name in names:
        image = rng.normal(100, 1.5, (size, size))
        places: list[tuple[float, float]] = []
        while "crowded" in name and len(places) < 60:
            px, py = rng.uniform(25, size - 26, 2)
            if all(math.hypot(px - a, py - b) * pixel_A > diameter_A for a, b in places):
                places.append((px, py))
                image -= 1.2 * np.sqrt(np.maximum(radius**2 - (x - px) ** 2 - (y - py) ** 2, 0)) / radius
        write_mrc(tmp_path / name, image.astype(np.float32), pixel_size=pixel_A)
    optics = {"rlnOpticsGroup": [1], "rlnOpticsGroupName": ["one"], "rlnMicrographPixelSize": [pixel_A]}
    rows = pl.DataFrame({"rlnMicrographName": names, "rlnOpticsGroup": [1] * 4})
    write_micrographs(tmp_path / "m.star", MicrographSet(pl.DataFrame(optics), rows))
    step = PickBlob(micrographs=Path("m.star"), diameter=diameter_A, pictures=False)
    table = read_star(Project.open(tmp_path).run(step).folder / "autopick.star")["coordinate_files"]
    assert isinstance(table, pl.DataFrame)
    picks = dict(table.select("rlnMicrographName", "hmPicks").iter_rows())
    assert all(55 <= picks[name] <= 62 for name in names[:2])
    assert sum(picks[name] for name in names[2:]) <= 2
