"""Verdicts on two refinements whose particles agree, agree in part, or by chance."""

from __future__ import annotations

import math

import polars as pl
import pytest
import torch
from validate_given import given

from halfmap.data import ParticleSet
from halfmap.data.poses import Poses
from halfmap.errors import TableError
from halfmap.ops.rotations import from_rotation_vector, random_rotations
from halfmap.search.pose_consensus import Frame
from halfmap.steps.validate.consensus import check_consensus, compare, match

N = 400
FRAME = Frame(
    from_rotation_vector(torch.tensor([50.0, 20.0, -80.0], dtype=torch.float64)),
    torch.tensor([4.0, -2.0, 1.0], dtype=torch.float64),
    mirrored=False,
)
OPTICS = pl.DataFrame({"rlnOpticsGroup": [1], "rlnImagePixelSize": [1.0], "rlnImageSize": [64]})


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def table(poses: Poses, stack: str = "Extract/job001/a.mrcs") -> ParticleSet:
    names = [f"{i + 1:06d}@{stack}" for i in range(len(poses))]
    rows = pl.DataFrame({"rlnImageName": names, "rlnOpticsGroup": [1] * len(poses)})
    return ParticleSet(OPTICS, rows).with_poses(poses)


def poses(seed: int = 1, n: int = N) -> Poses:
    g = generator(seed)
    return Poses(random_rotations(n, generator=g, dtype=torch.float64), 3 * torch.randn(n, 2, generator=g))


def second(first: Poses, share: float, scatter_deg: float = 0.6) -> Poses:
    """The first poses in another frame, a share of them near, the others anywhere."""
    n = len(first)
    there = FRAME.of_poses(first)
    turn = from_rotation_vector(scatter_deg * torch.randn(n, 3, generator=generator(2), dtype=torch.float64))
    near = (torch.arange(n) < share * n)[:, None, None]
    return Poses(torch.where(near, turn @ there.rotations, poses(9, n).rotations), there.shifts_A)


def check(tmp_path, first: ParticleSet, other: ParticleSet, group: str = "C1"):
    return check_consensus(
        given(particles=first, resolution=4.0, diameter=120.0), other, tmp_path, group=group
    )


@pytest.mark.parametrize(("share", "light"), [(0.8, "green"), (0.35, "amber"), (0.1, "red"), (0.0, "red")])
def test_the_light_is_that_of_the_share_that_agrees(tmp_path, share, light):
    first = poses()
    found = check(tmp_path, table(first), table(second(first, share)))
    assert found.light == light
    assert found.values["agree_percent"] == pytest.approx(100 * share, abs=3)
    assert found.values["agree_by_chance_percent"] < 2
    assert found.sentence.startswith(f"{found.values['agree_percent']:.0f} % of 400 particles")
    assert found.values["tolerance_deg"] == pytest.approx(3.82, abs=0.01)
    assert (tmp_path / found.pictures[0]).stat().st_size > 5000


def test_particles_that_agree_are_those_that_do():
    first = poses()
    compared = compare(
        given(particles=table(first), resolution=4.0, diameter=120.0), table(second(first, 0.5)), group="C1"
    )
    kept = compared.consistent.rows["rlnImageName"].str.split("@").list.first().cast(int).to_list()
    assert max(kept) <= N // 2
    assert len(kept) > 0.95 * N / 2


def test_agreement_that_a_point_group_brings_is_no_agreement(tmp_path):
    """At 40 Å, one of 60 equivalents is near to anything."""
    particles = given(particles=table(poses()), resolution=40.0, diameter=120.0)
    found = check_consensus(particles, table(poses(5)), tmp_path, group="I")
    assert found.values["agree_percent"] > 60
    assert found.light == "red"


def test_stated_errors_that_are_right_are_found_right(tmp_path):
    first = poses(n=1000)
    one, two = table(first), table(second(first, 1.0, scatter_deg=0.5))
    error = 0.5 / 2**0.5
    one, two = (
        each.with_columns(pl.lit(error).alias("hmAngleViewError"), pl.lit(error).alias("hmAnglePsiError"))
        for each in (one, two)
    )
    found = check(tmp_path, one, two)
    # Of three normal deviates, the sum of squares is below 4 with this probability.
    assert found.values["angles_within_stated_errors_percent"] == pytest.approx(73.9, abs=4)


def test_a_view_that_draws_particles_is_told(tmp_path):
    """Of each refinement, 40 % of the particles go to one view, not the same ones."""
    n = 3000
    first = poses(n=n)
    there = FRAME.of_poses(first)
    target = torch.tensor([0.0, 0.6, 0.8], dtype=torch.float64)
    about = from_rotation_vector(torch.tensor([[36.8699, 0, 0]], dtype=torch.float64))
    spin = torch.rand(n, generator=generator(3), dtype=torch.float64) * 360
    in_plane = from_rotation_vector(torch.stack([0 * spin, 0 * spin, spin], 1))
    drawn = in_plane @ about
    torch.testing.assert_close(drawn[:, 2], target.expand(n, 3), atol=1e-5, rtol=0)
    lost = torch.rand(n, generator=generator(4)) < 0.4
    rotations = torch.where(lost[:, None, None], drawn, there.rotations)
    found = check(tmp_path, table(first), table(Poses(rotations, there.shifts_A)))
    angles = [math.radians(found.values[f"attracting_{name}_deg"]) for name in ("rot", "tilt")]
    direction = torch.tensor([math.cos(angles[0]), math.sin(angles[0]), 1.0], dtype=torch.float64)
    direction *= torch.tensor([math.sin(angles[1])] * 2 + [math.cos(angles[1])])
    # Views are counted in cones of 15°.
    assert float(direction @ target) > math.cos(math.radians(15))
    assert "has drawn" in found.sentence


def test_rows_are_matched_by_image():
    first, other = table(poses(n=4)), table(poses(n=4), stack="./Extract/job002/../job001/a.mrcs")
    mixed = other.with_rows(other.rows[[3, 1]])
    one, two = match(first, mixed)
    assert one.rows["rlnImageName"].str.slice(5, 1).to_list() == ["2", "4"]
    assert two.rows["rlnImageName"].str.slice(5, 1).to_list() == ["2", "4"]
    elsewhere = table(poses(n=4), stack="/data/copy/a.mrcs")
    assert len(match(first, elsewhere)[0]) == 4


def test_tables_that_cannot_be_matched_say_so(tmp_path):
    first = table(poses(n=4))
    with pytest.raises(TableError, match="no image is in both tables"):
        match(first, table(poses(n=4), stack="b.mrcs"))
    with pytest.raises(TableError, match=r"row 3: lists 000001@\S+ more than once"):
        match(first, first.with_rows(first.rows[[0, 1, 0]]))
    without = ParticleSet(
        OPTICS,
        first.rows.drop("rlnImageName").with_columns(
            rlnMicrographName=pl.lit("a"), rlnCoordinateX=pl.lit(1.0), rlnCoordinateY=pl.lit(1.0)
        ),
    )
    with pytest.raises(TableError, match="the particles have no images"):
        check(tmp_path, without, first)
