"""Picks of several pickers, joined."""

from __future__ import annotations

import numpy as np
import pytest

from halfmap.steps.pick.consensus import Joined, coinciding, join, weigh, with_own


def _picks(*rows):
    return np.array([(x, y, p) for x, y, p in rows], float).reshape(-1, 3)


def test_near_picks_of_different_pickers_become_one_at_their_mean():
    joined = join([_picks((10, 10, 0.9), (50, 50, 0.9)), _picks((12, 10, 0.9)), _picks((11, 13, 0.9))], 5.0)
    order = np.argsort(joined.x)
    assert joined.votes[order].tolist() == [[True, True, True], [True, False, False]]
    np.testing.assert_allclose(joined.x[order], [11, 50])
    np.testing.assert_allclose(joined.y[order], [11, 50])


def test_picks_of_one_picker_are_never_joined():
    joined = join([_picks((10, 10, 0.9), (13, 10, 0.9)), _picks((12.5, 10, 0.9))], 5.0)
    assert len(joined.x) == 2
    assert joined.votes.sum() == 3
    both = joined.votes.all(axis=1)
    np.testing.assert_allclose(joined.x[both], [12.75])


def test_nothing_to_join():
    assert len(join([np.zeros((0, 3)), np.zeros((0, 3))], 5.0).x) == 0


def test_rates_of_pickers_are_found_without_truth():
    rates = [(0.9, 0.01), (0.7, 0.05), (0.8, 0.02)]
    rng = np.random.default_rng(7)
    truth = rng.random(20_000) < 0.3
    votes = np.stack(
        [np.where(truth, rng.random(20_000) < a, rng.random(20_000) < b) for a, b in rates], axis=1
    )
    seen = votes.any(axis=1)
    probability, found, false = weigh(votes[seen], float((~seen).sum()))
    np.testing.assert_allclose(found, [a for a, _ in rates], atol=0.03)
    np.testing.assert_allclose(false, [b for _, b in rates], atol=0.015)
    kept = probability >= 0.5
    assert truth[seen][kept].mean() == pytest.approx(probability[kept].mean(), abs=0.01)


def test_of_two_pickers_those_picks_are_believed_that_both_have():
    rng = np.random.default_rng(8)
    truth = rng.random(20_000) < 0.3
    false = rng.random((2, 20_000)) < 0.03
    votes = np.stack(
        [np.where(truth, rng.random(20_000) < a, b) for a, b in zip((0.9, 0.8), false, strict=True)], 1
    )
    seen = votes.any(axis=1)
    probability, _, _ = weigh(votes[seen], float((~seen).sum()))
    both = votes[seen].all(axis=1)
    assert probability[both].min() > 0.98
    assert probability[~both].max() < probability[both].min()


def test_agreement_is_more_probable():
    votes = np.array([[1, 1, 1]] * 60 + [[1, 1, 0]] * 20 + [[1, 0, 0]] * 15 + [[0, 0, 1]] * 15, bool)
    probability, _, _ = weigh(votes, 200.0)
    assert probability[0] > probability[60] > probability[-1]


def test_agreement_makes_no_pick_surer_than_its_surest_picker():
    votes = np.array([[1, 1, 1], [1, 1, 0], [0, 0, 1], [1, 0, 0]], bool)
    own = np.where(votes, [[0.7, 0.8, 0.6], [0.95, 0.9, 0], [0, 0, 0.6], [np.nan, 0, 0]], np.nan)
    joined = Joined(np.zeros(4), np.zeros(4), votes, own)
    found = with_own(np.array([0.999, 0.99, 0.4, 0.9]), joined)
    assert (found[:3] <= np.nanmax(own[:3], axis=1)).all()
    # The last one's picker gives no probabilities.
    assert found[3] == pytest.approx(0.9)


def test_the_same_picks_under_another_name_are_seen():
    rng = np.random.default_rng(3)
    one, other = rng.uniform(0, 500, (2, 300, 3))
    shifted = one + 0.03
    assert coinciding([(one, shifted), (one, other)]) == pytest.approx(0.5, abs=0.01)
    assert coinciding([(one, one + 0.5)]) < 0.01
    # A part of a picker's picks is no picker of its own.
    assert coinciding([(one, shifted[:20])]) == 1
    assert coinciding([(one, one[:0])]) == 0
