"""Frames, hands and shares of two sets of poses whose differences are known."""

from __future__ import annotations

import math

import pytest
import torch

from halfmap.data.poses import Poses
from halfmap.errors import ShapeError
from halfmap.ops import symmetry
from halfmap.ops.rotations import angular_distance, from_rotation_vector, random_rotations
from halfmap.ops.slices import project_volume
from halfmap.search.pose_consensus import Frame, compare_poses

FRAME = from_rotation_vector(torch.tensor([40.0, -100.0, 70.0], dtype=torch.float64))
ORIGIN = torch.tensor([3.0, -5.0, 2.0], dtype=torch.float64)


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def refinements(
    n: int,
    frame: Frame,
    *,
    group: str = "C1",
    share: float = 1.0,
    turn: float = 0.5,
    move: float = 0.5,
    views: torch.Tensor | None = None,
) -> tuple[Poses, Poses, torch.Tensor]:
    """Poses of two refinements that scatter by a turn and a move, a share of them; of the rest, at random."""
    g = generator()
    rotations = random_rotations(n, generator=g, dtype=torch.float64) if views is None else views
    first = Poses(rotations, 5 * torch.randn(n, 2, generator=g, dtype=torch.float64))
    there = frame.of_poses(first)
    turned = from_rotation_vector(turn * torch.randn(n, 3, generator=g, dtype=torch.float64))
    operators = symmetry.operators(group)
    chosen = operators[torch.randint(len(operators), (n,), generator=g)]
    right = torch.arange(n) < share * n
    elsewhere = random_rotations(n, generator=g, dtype=torch.float64) if views is None else views.roll(7, 0)
    second = torch.where(right[:, None, None], turned @ there.rotations @ chosen, elsewhere)
    moves = move * torch.randn(n, 2, generator=g, dtype=torch.float64)
    return first, Poses(second.float(), (there.shifts_A + moves).float()), right


def test_a_map_of_the_other_hand_is_seen_half_a_turn_round():
    """What `Frame` assumes of a map that is inverted through its origin."""
    volume = torch.zeros(17, 17, 17)
    inner = torch.randn(7, 7, 7, generator=generator())
    volume[5:12, 5:12, 5:12] = inner
    poses = Poses(random_rotations(4, generator=generator()), torch.zeros(4, 2))
    frame = Frame(torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), mirrored=True)
    seen = project_volume(volume, poses.rotations)
    inverted = project_volume(volume.flip((0, 1, 2)), frame.of_poses(poses).rotations.float())
    torch.testing.assert_close(inverted, seen, atol=1e-3 * float(seen.abs().max()), rtol=0)


def test_a_turned_and_moved_map_has_the_poses_of_its_frame():
    """Points p of the first map are at ``Fᵀ p + s`` in the second, and must be seen at the same places."""
    g = generator()
    points = 10 * torch.randn(6, 3, generator=g, dtype=torch.float64)
    frame = Frame(FRAME, ORIGIN, mirrored=False)
    poses = Poses(
        random_rotations(5, generator=g, dtype=torch.float64), torch.randn(5, 2, generator=g).double()
    )
    there = frame.of_poses(poses)
    seen = [
        (places @ each.rotations.mT)[..., :2] - each.shifts_A[:, None]
        for places, each in ((points, poses), (points @ FRAME + ORIGIN, there))
    ]
    torch.testing.assert_close(seen[1], seen[0])


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("group", ["C1", "C4", "D2"])
def test_the_frame_is_found_whatever_it_is(group, mirrored):
    rotation, origin = FRAME, ORIGIN
    if group == "C4":
        rotation, origin = (
            from_rotation_vector(torch.tensor([0, 0, 23.0]).double()),
            origin * torch.tensor([0, 0, 1]),
        )
    if group == "D2":
        turns = symmetry.equal_settings("D2")
        assert turns is not None
        rotation, origin = turns[3], 0 * origin
    frame = Frame(rotation, origin, mirrored)
    first, second, right = refinements(600, frame, group=group, share=0.3)
    found = compare_poses(first, second, group=group, angle_deg=3.0, shift_A=3.0)
    assert found.frame.mirrored == mirrored
    settings = symmetry.operators(group) @ rotation
    assert float(angular_distance(settings, found.frame.rotation).min()) < 0.3
    torch.testing.assert_close(found.frame.shift_A, origin, atol=0.3, rtol=0)
    assert not bool((found.agree & ~right).any())
    assert found.share == pytest.approx(0.3, abs=0.02)
    assert found.chance < 0.01


def test_poses_of_nothing_agree_by_chance_alone():
    g = generator(3)
    first, second = (
        Poses(random_rotations(500, generator=g), torch.randn(500, 2, generator=g)) for _ in "ab"
    )
    found = compare_poses(first, second, group="O", angle_deg=15.0, shift_A=10.0)
    # Of all rotations, those within 15° of one of 24: the best of the frames tried finds some more.
    assert 24 * (math.radians(15) - math.sin(math.radians(15))) / math.pi < found.chance < 0.08
    assert abs(found.sigmas_above_chance) < 3


def test_preferred_views_are_chance():
    """All look along one axis, and differ by little from each other: to agree says next to nothing."""
    g = generator(4)
    narrow = from_rotation_vector(2 * torch.randn(800, 3, generator=g, dtype=torch.float64))
    frame = Frame(FRAME, 0 * ORIGIN, mirrored=False)
    first, second, _ = refinements(800, frame, share=0.0, views=narrow)
    found = compare_poses(first, second, group="C1", angle_deg=6.0, shift_A=10.0)
    assert found.share > 0.6
    assert abs(found.sigmas_above_chance) < 3


def test_shifts_count_as_well():
    frame = Frame(FRAME, ORIGIN, mirrored=False)
    first, second, _ = refinements(400, frame)
    away = second.shifts_A.clone()
    away[:100] += 20.0
    found = compare_poses(first, Poses(second.rotations, away), group="C1", angle_deg=3.0, shift_A=3.0)
    assert not bool(found.agree[:100].any())
    assert float(found.agree[100:].double().mean()) > 0.95


def test_the_same_seed_gives_the_same():
    first, second, _ = refinements(300, Frame(FRAME, ORIGIN, mirrored=False), share=0.5)
    one, two = (compare_poses(first, second, group="C1", angle_deg=3.0, shift_A=3.0) for _ in "ab")
    assert one.chance == two.chance
    assert torch.equal(one.turns_deg, two.turns_deg)


def test_poses_of_other_particles_are_refused():
    first, second, _ = refinements(10, Frame(FRAME, ORIGIN, mirrored=False))
    with pytest.raises(ShapeError, match="10 and 9 poses"):
        compare_poses(first, second[:9], group="C1", angle_deg=3.0, shift_A=3.0)
