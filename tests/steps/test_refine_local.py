"""Local refinement: from the table's poses, near them, about a fulcrum, and between their equivalents."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from pose_simulation import Particle
from refine_simulation import BOX, DIAMETER, PIXEL, N, errors, run, write_project

from halfmap.data import Poses
from halfmap.engine import Context
from halfmap.errors import ParameterError, TableError
from halfmap.io.mrc import write_mrc
from halfmap.io.tables import read_particles, write_particles
from halfmap.ops.masks import soft_sphere
from halfmap.ops.rotations import from_rotation_vector, random_rotations
from halfmap.ops.symmetry import operators
from halfmap.project import Project
from halfmap.search import maxima
from halfmap.steps.refine import expectation, iterate, plan
from halfmap.steps.refine.given import GivenPoses, given_poses
from halfmap.steps.refine.step import RefineStep


def disturbed(poses: Poses, *, turn_deg: float, shift_A: float) -> Poses:
    generator = torch.Generator().manual_seed(8)
    n = len(poses.rotations)
    turns = torch.randn(n, 3, generator=generator, dtype=torch.float64) * turn_deg
    shifts = torch.randn(n, 2, generator=generator, dtype=torch.float64) * shift_A
    return Poses(from_rotation_vector(turns) @ poses.rotations, poses.shifts_A + shifts)


def with_poses(folder: Path, poses: Poses) -> None:
    path = folder / "particles.star"
    write_particles(path, read_particles(path).with_poses(poses))


def test_begins_at_the_poses_of_the_table_and_never_searches_elsewhere(tmp_path, monkeypatch):
    poses = write_project(tmp_path)
    monkeypatch.setattr("halfmap.steps.refine.expectation.search_everywhere", None)
    start = disturbed(poses, turn_deg=4.0, shift_A=2.0)
    # An eighth of the particles is given the view from behind, where a local refinement must leave them.
    wrong = torch.arange(N) % 8 == 0
    behind = from_rotation_vector(torch.tensor([[0.0, 180.0, 0.0]], dtype=torch.float64))
    rotations = torch.where(wrong[:, None, None], behind @ start.rotations, start.rotations)
    with_poses(tmp_path, Poses(rotations, start.shifts_A))
    job = run(tmp_path, local=True, turn_deviation=5.0, most_iterations=5)
    angle = errors(job, poses)
    assert float(angle[wrong].min()) > 90
    before = 4.0 * math.sqrt(3)
    stated = torch.from_numpy(read_particles(job / "particles.star").rows["hmPoseUncertainty"].to_numpy())
    assert float(angle[~wrong].median()) < 0.7 * before
    assert float((angle < stated)[~wrong].double().mean()) > 0.45


def test_prior_holds_what_the_images_do_not_decide(tmp_path):
    """Of images of noise the poses stay as near to the table's as the prior says."""
    poses = write_project(tmp_path, signal=0.0, n=80)
    with_poses(tmp_path, poses)
    job = run(tmp_path, local=True, turn_deviation=1.0, shift_deviation=1.0, most_iterations=2)
    assert float(errors(job, poses).median()) < 2.0
    found = read_particles(job / "particles.star").poses
    assert float((found.shifts_A.double() - poses.shifts_A).norm(dim=1).median()) < 2.0


def test_relaxed_symmetry_finds_which_of_the_equivalents_it_is(tmp_path, monkeypatch):
    """A particle with two-fold symmetry but for a part: poses begin at either, and end at the right one."""
    alike = Particle.random(BOX, count=60, radius_px=11.0).atoms
    own = alike[:25] @ operators("C2")[0].T + torch.tensor([0.0, 0.0, 0.5])
    atoms = torch.cat([alike, alike @ operators("C2")[1].T.to(alike), own])
    poses = write_project(tmp_path, signal=1.6, atoms=atoms)
    turned = torch.arange(N) % 2 == 0
    mates = torch.where(turned[:, None, None], poses.rotations @ operators("C2")[1], poses.rotations)
    with_poses(tmp_path, disturbed(Poses(mates, poses.shifts_A), turn_deg=2.0, shift_A=1.0))
    among = []

    def climb(*where, priors, **how):
        among.append(priors)
        return maxima.climb(*where, priors=priors, **how)

    monkeypatch.setattr(expectation, "climb", climb)
    held = run(tmp_path, local=True, turn_deviation=4.0, most_iterations=3)
    assert set(among) == {1}
    assert float((errors(held, poses)[turned] > 90).double().mean()) > 0.9
    among.clear()
    relaxed = run(tmp_path, local=True, relax="C2", turn_deviation=4.0, most_iterations=4)
    # Also after all but one were left.
    assert set(among) == {2}
    assert float((errors(relaxed, poses) < 20).double().mean()) > 0.9


def test_half_sets_that_have_met_are_told(tmp_path, caplog):
    """Those of the table are kept in silence; drawn ones have met in what the poses were found with."""
    with_poses(tmp_path, write_project(tmp_path, n=60))
    table, context = read_particles(tmp_path / "particles.star"), Context(folder=tmp_path, project=tmp_path)
    settings = {"particles": Path("particles.star"), "reference": Path("reference.mrc"), "diameter": DIAMETER}
    subset = pl.Series("rlnRandomSubset", np.arange(60) % 2 + 1)
    for local, rows, told in (
        (True, table, True),
        (False, table, False),
        (True, table.with_columns(subset), False),
    ):
        caplog.clear()
        plan.make_plan(RefineStep(**settings, local=local, initial_lowpass=25.0), context, rows)
        assert ("have met" in caplog.text and "25 Å" in caplog.text) == told


def test_prior_is_about_the_nearest_equivalent():
    poses = Poses(random_rotations(4, generator=torch.Generator().manual_seed(1)), torch.ones(4, 2))
    given = GivenPoses(
        rotations=poses.rotations.double(),
        shifts_A=poses.shifts_A.double(),
        equivalents=operators("D2").double(),
        turn_deg=3.0,
        shift_A=6.0,
        fulcrum_A=torch.zeros(3, dtype=torch.float64),
    )
    rows, mates = np.array([1, 1, 3]), torch.tensor([2, 3, 0])
    expected = given.rotations[rows] @ given.equivalents[mates]
    near = from_rotation_vector(torch.full((3, 3), 4.0, dtype=torch.float64)) @ expected
    prior = given.prior(rows, near, pixel_size=2.0)
    torch.testing.assert_close(prior.rotations, expected)
    assert prior.shifts_px.tolist() == [[0.5, 0.5]] * 3
    widths = prior.precision.diagonal(dim1=1, dim2=2).rsqrt()
    torch.testing.assert_close(
        widths, torch.tensor([math.radians(3.0)] * 3 + [3.0] * 2).double().expand(3, 5)
    )


@pytest.mark.parametrize(("group", "relaxed", "count"), [("C1", "D2", 4), ("C2", "D2", 2), ("D2", "D2", 1)])
def test_equivalents_that_are_one_by_symmetry_are_one(tmp_path, group, relaxed, count):
    step = RefineStep(
        particles=Path("a.star"), reference=Path("a.mrc"), symmetry=group, local=True, relax=relaxed
    )
    with_poses(tmp_path, write_project(tmp_path, n=4))
    given = given_poses(step, read_particles(tmp_path / "particles.star"), torch.zeros(3))
    assert given is not None
    assert len(given.equivalents) == count
    apart = given.equivalents[:, None].transpose(-1, -2) @ given.equivalents
    same = (apart[:, :, None] - operators(group)).abs().amax((-2, -1)).amin(-1) < 1e-6
    assert torch.equal(same, torch.eye(count) > 0)


def test_fulcrum_is_the_centre_of_the_mask(tmp_path, monkeypatch):
    poses = write_project(tmp_path, n=60)
    with_poses(tmp_path, poses)
    mask = soft_sphere((BOX,) * 3, radius=20.0, edge=8.0, pixel_size=PIXEL, centre=(24.0, 8.0, -16.0))
    write_mrc(tmp_path / "mask.mrc", mask.numpy(), pixel_size=PIXEL)
    made = []

    def stop(ctx, planned, *rest):
        made.append(planned)
        raise KeyboardInterrupt

    monkeypatch.setattr(iterate, "begin", stop)
    for more in ({"mask": Path("mask.mrc")}, {"fulcrum": (1.0, 2.0, 3.0)}, {}):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, local=True, **more)
    expected = [24.0, 8.0, -16.0], [1.0, 2.0, 3.0], [0.0, 0.0, 0.0]
    for planned, place in zip(made, expected, strict=True):
        assert isinstance(planned, plan.Plan) and planned.given is not None
        assert planned.given.fulcrum_A.tolist() == pytest.approx(place, abs=0.1)


def test_bad_input(tmp_path):
    poses = write_project(tmp_path, n=60)
    with pytest.raises(TableError, match=r"no poses to begin .* _rlnAngleRot"):
        run(tmp_path, local=True)
    for more in ({"relax": "D2"}, {"fulcrum": (0.0, 0.0, 1.0)}):
        with pytest.raises(ParameterError, match=r"is of a local refinement.*--local"):
            run(tmp_path, **more)
    with_poses(tmp_path, poses)
    table = read_particles(tmp_path / "particles.star")
    angles = np.where(np.arange(60) == 7, np.nan, table.rows["rlnAngleTilt"].to_numpy())
    write_particles(tmp_path / "particles.star", table.with_columns(pl.Series("rlnAngleTilt", angles)))
    with pytest.raises(TableError, match="row 8"):
        run(tmp_path, local=True)
    assert not list(Project.at(tmp_path).root.glob(f"{RefineStep.folder}/*/map.mrc"))
