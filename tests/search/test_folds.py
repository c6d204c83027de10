"""Particles dealt to parts: whole micrographs, of about one size, and half sets as a table has them."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from halfmap.data import ParticleSet
from halfmap.errors import TableError
from halfmap.search.folds import SUBSET, dealt, half_sets

OPTICS = pl.DataFrame({"rlnOpticsGroup": [1], "rlnOpticsGroupName": ["one"]})


def table(subset: list[int] | None, n: int = 80) -> ParticleSet:
    rows = pl.DataFrame({"rlnImageName": [f"{i + 1}@a.mrcs" for i in range(n)], "rlnOpticsGroup": [1] * n})
    return ParticleSet(OPTICS, rows if subset is None else rows.with_columns(pl.Series(SUBSET, subset)))


@pytest.mark.parametrize("parts", [2, 4])
def test_micrographs_stay_whole(parts):
    rng = np.random.default_rng(1)
    micrographs = rng.integers(0, 60, 3000)
    part = dealt(micrographs, parts, rng)
    assert all(len(set(part[micrographs == number])) == 1 for number in range(60))
    assert np.ptp(np.bincount(part)) <= 0.2 * 3000 / parts
    assert set(part) == set(range(parts))
    # Micrographs that were recorded one after the other are in all parts.
    assert set(part[micrographs < 15]) == set(range(parts))


def test_particles_of_few_micrographs_are_dealt_one_by_one():
    part = dealt(np.repeat([0, 1, 2], [700, 200, 100]), 2, np.random.default_rng(1))
    assert np.bincount(part).tolist() == [500, 500]
    assert 250 < part[:700].sum() < 450


def test_half_sets_are_those_of_the_table():
    subset = np.random.default_rng(2).integers(1, 3, 80)
    found = half_sets(table(subset.tolist()), np.arange(80) // 8, seed=1, fewest=20)
    assert found.tolist() == (subset - 1).tolist()


def test_half_sets_are_drawn_by_micrograph():
    micrographs = np.arange(80) // 8
    first, again, other = (half_sets(table(None), micrographs, seed=s, fewest=20) for s in (1, 1, 2))
    assert all(len(set(first[micrographs == number])) == 1 for number in range(10))
    assert first.tolist() == again.tolist() != other.tolist()


def test_half_sets_of_few_micrographs_see_all_of_their_defoci():
    micrographs = np.arange(80) // 20
    halves = half_sets(table(None), micrographs, seed=1, fewest=20)
    of_each = [np.bincount(halves[micrographs == number], minlength=2).min() for number in range(4)]
    assert min(of_each) > 2
    assert np.bincount(halves).tolist() == [40, 40]


@pytest.mark.parametrize(
    ("subset", "words"),
    [([1, 2] * 39 + [1, 3], "is 3, not 1 or 2"), ([1] * 70 + [2] * 10, "10 particles in")],
)
def test_half_sets_that_cannot_be(subset, words):
    with pytest.raises(TableError, match=words):
        half_sets(table(subset), np.arange(80) // 8, seed=1, fewest=20)


@pytest.mark.parametrize("n_micrographs", [2, 20])
def test_rows_of_one_image_stay_in_one_half_set(n_micrographs):
    """As of a table that a symmetry was expanded in."""
    one = table(None, 60)
    rows = pl.concat([one.rows] * 3).with_columns(pl.Series("copy", np.repeat([0, 1, 2], 60)))
    found = half_sets(
        ParticleSet(OPTICS, rows), np.tile(np.arange(60) % n_micrographs, 3), seed=1, fewest=20
    ).reshape(3, 60)
    assert (found == found[0]).all()
    assert 20 < found[0].sum() < 40


def test_an_image_in_both_half_sets_is_refused():
    rows = table([1, 2] * 40).rows
    torn = rows.with_columns(pl.Series("rlnImageName", ["1@a.mrcs", "1@a.mrcs", *rows["rlnImageName"][2:]]))
    with pytest.raises(TableError, match="is in both half sets") as told:
        half_sets(ParticleSet(OPTICS, torn), np.arange(80) // 8, seed=1, fewest=20)
    assert told.value.row == 2
