"""Verdicts on tilt pairs."""

from __future__ import annotations

import polars as pl
import pytest
import torch
from tilt_simulation import pairs, turn

from halfmap.data import ParticleSet
from halfmap.data.poses import Poses
from halfmap.errors import TableError
from halfmap.steps.validate.tilt import check_tilt

OPTICS = pl.DataFrame({"rlnOpticsGroup": [1], "rlnImagePixelSize": [1.0], "rlnImageSize": [64]})


def table(rotations: torch.Tensor) -> ParticleSet:
    n = len(rotations)
    rows = pl.DataFrame({"rlnImageName": [f"{i + 1}@a.mrcs" for i in range(n)], "rlnOpticsGroup": [1] * n})
    return ParticleSet(OPTICS, rows).with_poses(Poses(rotations, torch.zeros(n, 2)))


def check(tmp_path, tilt_angle: float | None = 20.0, tilt_axis: float | None = None, axis=30.0, **how):
    before, after = pairs(60, turn(20.0, axis), **how)
    group = how.get("group", "C1")
    return check_tilt(
        tmp_path, table(before), table(after), group=group, tilt_angle=tilt_angle, tilt_axis=tilt_axis
    )


def test_pairs_that_show_the_tilt_are_green(tmp_path):
    found = check(tmp_path, share=0.8)
    assert found.light == "green"
    assert found.values["tilt_angle_deg"] == pytest.approx(20, abs=2)
    assert found.values["tilt_axis_deg"] == pytest.approx(30, abs=5)
    assert found.values["near_percent"] == pytest.approx(80, abs=5)
    assert "other_hand" not in found.values
    assert (tmp_path / found.pictures[0]).stat().st_size > 5000


def test_few_that_do_are_amber(tmp_path):
    found = check(tmp_path, share=0.3)
    assert found.light == "amber"
    assert "the poses of the others are wrong" in found.sentence


def test_another_angle_than_the_stage_had_is_amber(tmp_path):
    found = check(tmp_path, tilt_angle=30.0)
    assert found.light == "amber"
    assert "the stage was tilted by 30°" in found.sentence


def test_random_pairs_are_red(tmp_path):
    found = check(tmp_path, share=0.0)
    assert found.light == "red"
    assert "show no common tilt" in found.sentence


@pytest.mark.parametrize(
    ("angle", "axis", "light"),
    [(20.0, 30.0, "green"), (-20.0, 30.0, "red"), (20.0, 210.0, "red"), (-20.0, 210.0, "green")],
)
def test_the_direction_tells_the_hand(tmp_path, angle, axis, light):
    found = check(tmp_path, tilt_angle=angle, tilt_axis=axis)
    assert found.light == light
    assert found.values["other_hand"] == (light == "red")


@pytest.mark.parametrize("given", [0.0, 60.0, 120.0, 240.0, -60.0])
def test_another_axis_tells_no_hand(tmp_path, given):
    found = check(tmp_path, tilt_axis=given, axis=92.0)
    assert found.light == "amber"
    assert f"the axis is not the one given, {given:g}°" in found.sentence
    assert "hand:" in found.sentence
    assert "other_hand" not in found.values
    assert found.values["tilt_axis_off_deg"] == pytest.approx(88 if given == 0 else 30, abs=8)


@pytest.mark.parametrize(("given", "light"), [(80.0, "green"), (-88.0, "red"), (100.0, "green")])
def test_an_axis_near_the_one_given_tells_the_hand(tmp_path, given, light):
    assert check(tmp_path, tilt_axis=given, axis=92.0).light == light


def test_tables_of_other_lengths_are_refused(tmp_path):
    before, after = pairs(10, turn(20.0, 30.0))
    with pytest.raises(TableError, match="has 9 particles, but 10 are untilted"):
        check_tilt(tmp_path, table(before), table(after[:9]), group="C1", tilt_angle=None)
