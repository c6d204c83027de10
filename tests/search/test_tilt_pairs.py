"""Tilt pairs whose tilt is known, and pairs of nothing."""

from __future__ import annotations

import math

import pytest
import torch
from tilt_simulation import pairs, turn

from halfmap.errors import ParameterError, ShapeError
from halfmap.search.tilt_pairs import compare_tilts, tilts


@pytest.mark.parametrize(("angle", "axis"), [(20.0, 35.0), (-20.0, 35.0), (45.0, -80.0), (10.0, 90.0)])
def test_a_tilt_has_its_angle_and_axis(angle, axis):
    found = tilts(turn(angle, axis, in_plane=25.0))
    assert [float(each) for each in found] == pytest.approx([angle, axis])


@pytest.mark.parametrize("group", ["C1", "C3", "O"])
def test_the_common_tilt_is_found(group):
    before, after = pairs(80, turn(15.0, 40.0, in_plane=5.0), group=group, share=0.6)
    found = compare_tilts(before, after, group=group)
    angle, axis = (float(each) for each in tilts(found.common))
    assert angle == pytest.approx(15, abs=1.5)
    assert axis == pytest.approx(40, abs=6)
    assert bool(found.near[:48].all())
    assert found.probability == 0.01
    assert found.share == pytest.approx(0.6 + 0.4 * found.chance, abs=0.15)
    # The scatter across the tilted direction is 3° along each of two axes: 1 / sigma² in radians.
    assert found.concentration == pytest.approx(1 / torch.deg2rad(torch.tensor(3.0)) ** 2, rel=0.5)


@pytest.mark.parametrize("axis", [0.0, 45.0, 89.0, 90.0, -89.0])
def test_the_error_of_the_angle_is_the_same_about_any_axis(axis):
    """Where axes are near to y, the tilts of some pairs have the other sign about the other end."""
    found = compare_tilts(*pairs(200, turn(20.0, axis, in_plane=30.0)), group="C1")
    assert found.angle_error_deg == pytest.approx(3 / 200**0.5, rel=0.15)


def test_pairs_that_are_not_near_do_not_make_the_rest_concentrated():
    before, after = pairs(600, turn(30.0, 60.0), scatter=7.0)
    found = compare_tilts(before, after, group="C1")
    # Those within 15° alone scatter by 5.6°, not 7°.
    assert 0.7 < found.share < 0.85
    assert found.concentration == pytest.approx(1 / math.radians(7.0) ** 2, rel=0.2)


@pytest.mark.parametrize("group", ["C1", "D3", "O"])
def test_random_pairs_show_none(group):
    before, after = pairs(60, turn(20.0, 0.0), share=0.0)
    found = compare_tilts(before, after, group=group, seed=3)
    assert found.probability > 0.02
    assert found.share < found.chance + 0.15


def test_the_other_hand_tilts_the_other_way():
    """Poses against the map inverted through its origin are turned by 180° in the plane."""
    before, after = pairs(40, turn(20.0, 30.0))
    half = torch.diag(torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64))
    one, two = (compare_tilts(a, b, group="C1") for a, b in ((before, after), (half @ before, half @ after)))
    assert float(tilts(one.common)[0]) == pytest.approx(-float(tilts(two.common)[0]), abs=0.5)
    assert float(tilts(one.common)[1]) == pytest.approx(float(tilts(two.common)[1]), abs=0.5)


def test_what_are_no_pairs_says_so():
    before, after = pairs(10, turn(20.0, 0.0))
    with pytest.raises(ShapeError, match="10 untilted and 9 tilted"):
        compare_tilts(before, after[:9], group="C1")
    with pytest.raises(ParameterError, match="4 tilt pairs are too few"):
        compare_tilts(before[:4], after[:4], group="C1")
