"""Refinement: how much of the reference is used at first."""

from __future__ import annotations

from pathlib import Path

import pytest
from refine_simulation import BOX, DIAMETER, PIXEL, write_project

from halfmap.engine import Context
from halfmap.io.tables import read_particles
from halfmap.steps.refine.plan import first_detail, make_plan
from halfmap.steps.refine.step import RefineStep


def _step(**parameters) -> RefineStep:
    settings = {"particles": Path("particles.star"), "reference": Path("reference.mrc"), "diameter": DIAMETER}
    return RefineStep(**(settings | parameters))


@pytest.mark.parametrize(
    ("group", "diameter", "detail"),
    # Of a sphere of 144 Å each of 24 units has 52 Å by 52 Å.
    [("C1", 144.0, 40.0), ("D7", 144.0, 40.0), ("o", 144.0, 17.4), ("T", 144.0, 24.6), ("I2", 800.0, 40.0)],
)
def test_first_detail_shows_more_than_a_ball(group: str, diameter: float, detail: float):
    assert first_detail(_step(symmetry=group), diameter) == pytest.approx(detail, abs=0.05)
    assert first_detail(_step(symmetry=group, initial_lowpass=33.0), diameter) == 33.0


def test_what_both_half_sets_share_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """By default 12.1 Å for O in a sphere of 100 Å: half maps are not independent in what is coarser."""
    write_project(tmp_path, group="O", n=60)
    table = read_particles(tmp_path / "particles.star")
    plan = make_plan(_step(symmetry="O"), Context(folder=tmp_path, project=tmp_path), table)[1]
    assert plan.ring(None) == plan.ring(plan.initial_lowpass) == round(BOX * PIXEL / 12.06)
    assert "12.1 Å is in both half maps" in caplog.text
