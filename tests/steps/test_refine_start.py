"""Refinement: how much of the reference is used at first, and what is said when it ends."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from refine_simulation import BOX, DIAMETER, PIXEL, write_project

from halfmap.engine import Context
from halfmap.errors import ParameterError
from halfmap.io.tables import read_particles
from halfmap.steps.refine.expectation import BEST
from halfmap.steps.refine.iterate import _conclude, _say
from halfmap.steps.refine.model import Model, Stage, _scheduled
from halfmap.steps.refine.plan import Plan, first_detail, make_plan
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


def test_a_table_without_a_diameter_is_named(tmp_path: Path):
    write_project(tmp_path, n=60)
    table = read_particles(tmp_path / "particles.star")
    with pytest.raises(ParameterError, match=r"particles\.star: does not say how large"):
        make_plan(_step(diameter=None), Context(folder=tmp_path, project=tmp_path), table)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    write_project(tmp_path, n=60)
    table = read_particles(tmp_path / "particles.star")
    return make_plan(_step(most_iterations=7), Context(folder=tmp_path, project=tmp_path), table)[1]


def _model(plan: Plan, iteration: int, stage: Stage, **changes) -> Model:
    shells = torch.arange(plan.box // 2 + 1)
    model = Model(
        iteration=iteration,
        stage=stage,
        radius=8,
        padding=2.0,
        noise=torch.ones(2, 2, 1, plan.box // 2 + 1),
        scale=torch.ones(2, 4),
        deviation_A=torch.ones(2),
        curves=torch.stack([(shells <= 9).float()] * 2 + [0.1 * (shells > 0), (shells <= 9).float()]),
        from_shell=4,
        finest=9,
        stale=0,
        turned=180.0,
        jumped=1.0,
        apart=torch.zeros(2, 3),
    )
    return replace(model, **changes)


def _best(plan: Plan) -> np.ndarray:
    table = np.zeros((len(plan.halves), len(BEST)))
    table[:, BEST.index("pose_error")] = 1.0
    return table


@pytest.mark.parametrize(
    ("iteration", "stage", "stale", "limited"),
    [
        (5, "near", 0, True),  # The next would be the sixth of seven, and it still improves.
        (5, "near", 1, False),  # It has converged just then.
        (4, "near", 1, False),
        (4, "near", 0, False),  # It goes on.
        (6, "last", 0, False),  # That it is the last was said by the one before.
    ],
)
def test_the_limit_of_iterations_is_told_from_convergence(
    plan: Plan, iteration: int, stage: Stage, stale: int, limited: bool
):
    before = _model(plan, iteration, stage, stale=stale, turned=0.3)
    found = _model(plan, iteration + 1, stage, stale=stale, turned=0.3)
    new = _scheduled(plan, before, found, box=plan.box, error=1.0)
    assert new.limited is limited
    again = _model(plan, iteration + 2, new.stage, limited=new.limited)
    assert _scheduled(plan, new, again, box=plan.box, error=1.0).limited is limited


def test_the_end_is_stated(plan: Plan, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    done = _model(plan, 7, "done")
    _conclude(plan, done)
    assert "ended after 7 iterations at" in caplog.text and "improve no more" in caplog.text
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]
    _conclude(plan, replace(done, limited=True))
    assert "stopped by --most-iterations 7 before it converged" in caplog.text


def test_doubtful_correlations_are_warned_of(plan: Plan, caplog: pytest.LogCaptureFixture):
    curves = _model(plan, 7, "done").curves
    tight, ragged = curves.clone(), curves.clone()
    tight[2, 10], ragged[3, 14] = 0.5, 0.4
    _conclude(plan, _model(plan, 7, "done", curves=tight))
    assert "random phases correlate by 0.50" in caplog.text and "again" not in caplog.text
    caplog.clear()
    _conclude(plan, _model(plan, 7, "done", curves=ragged))
    assert f"is 0.40 again at {BOX * PIXEL / 14:.2f} Å" in caplog.text and "random" not in caplog.text


def test_missing_views_are_warned_of(plan: Plan, caplog: pytest.LogCaptureFixture):
    evenness = torch.ones(plan.box // 2 + 1)
    evenness[6] = 0.7
    _conclude(plan, _model(plan, 7, "done", evenness=evenness))
    assert "was hardly seen" in caplog.text and "leaves 0.70" in caplog.text


def test_the_end_of_the_images_is_no_missing_view(plan: Plan, caplog: pytest.LogCaptureFixture):
    curves = torch.ones(4, plan.box // 2 + 1)
    evenness = torch.ones(plan.box // 2 + 1)
    evenness[plan.nyquist :] = 0.7
    _conclude(plan, _model(plan, 7, "done", curves=curves, evenness=evenness, from_shell=99))
    assert "hardly seen" not in caplog.text


def test_poses_turn_from_the_second_iteration_on(
    plan: Plan, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    for number in (1, 2):
        models = _model(plan, number - 1, "everywhere"), _model(plan, number, "everywhere")
        _say(tmp_path, plan, *models, _best(plan))
        assert ("poses turned" in caplog.text) is (number == 2)
    assert json.loads((tmp_path / "it001.json").read_text())["turned_deg"] == 180.0
