"""Frames of half maps: a motion that is found, and poses that take it off."""

import pytest
import torch
from pose_simulation import Particle
from torch.utils._python_dispatch import TorchDispatchMode

from halfmap.ops.rotations import from_rotation_vector, random_rotations
from halfmap.search import frames
from halfmap.search.frames import Motion, motion_between

BOX = 32
PARTICLE = Particle.random(BOX, count=40, radius_px=9.0)
TURN, MOVE = torch.tensor([1.0, -2.0, 1.5]).double(), torch.tensor([0.2, -0.1, 0.15]).double()
ALL = torch.ones(BOX // 2 + 1)


def _moved(turn: torch.Tensor, move: torch.Tensor) -> Particle:
    """The particle A with ``A(x) = B(Q x + t)`` for the particle B: an atom at p comes to Q^T (p - t)."""
    rotation = from_rotation_vector(turn).to(PARTICLE.atoms)
    return Particle((PARTICLE.atoms - move.to(PARTICLE.atoms)) @ rotation, BOX)


def test_motion_is_found():
    found = motion_between(_moved(TURN, MOVE).volume(), PARTICLE.volume(), ALL)
    # To first order; the second is the turn of 2.7°, a twentieth in radians, times the particle's detail.
    assert float((found.turn_deg - TURN).norm() / TURN.norm()) < 0.1
    assert float((found.move_px - MOVE).norm() / MOVE.norm()) < 0.1


def test_noise_makes_it_smaller_and_no_other():
    """With noise as strong as the signal a part is found, and across it what scatters over several draws."""
    moved, fixed = _moved(TURN, MOVE).volume(), PARTICLE.volume()
    curve = torch.where(torch.arange(BOX // 2 + 1) < 8, 0.9, 0.0)
    found = []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(2, BOX, BOX, BOX, generator=generator) * fixed.std()
        found.append(motion_between(moved + noise[0], fixed + noise[1], curve).turn_deg)
    found = torch.stack(found)
    along = found @ TURN / TURN.square().sum()
    across = found - along[:, None] * TURN
    assert 0.3 < float(along.mean()) < 1
    assert float(across.mean(0).norm()) < 3 * float(across.std(0).norm()) / len(found) ** 0.5


@pytest.mark.parametrize(("group", "free"), [("C1", [1, 1, 1]), ("C3", [0, 0, 1]), ("D2", [0, 0, 0])])
def test_only_what_the_group_leaves_free(group: str, free: list[int]):
    found = motion_between(_moved(TURN, MOVE).volume(), PARTICLE.volume(), ALL, group)
    for vector in (found.turn_deg, found.move_px):
        assert [int(abs(float(value)) > 1e-9) for value in vector] == free


def test_nothing_is_computed_where_the_group_leaves_nothing_free(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(frames, "rfft3", None)
    found = motion_between(PARTICLE.volume(), PARTICLE.volume(), ALL, "D2")
    assert not found.turn_deg.any()
    assert not found.move_px.any()


def test_number_of_threads_changes_nothing():
    moved, fixed = _moved(TURN, MOVE).volume(), PARTICLE.volume()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(frames._normal_equations(moved, fixed, ALL))
    finally:
        torch.set_num_threads(before)
    for one, many in zip(*found, strict=True):
        torch.testing.assert_close(many, one, rtol=0, atol=1e-12 * float(one.abs().max()))


def test_no_more_is_held_at_a_time_than_a_few_maps():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            self.numel = max(self.numel, found.numel() if isinstance(found, torch.Tensor) else 0)
            return found

    moved, fixed = _moved(TURN, MOVE).volume(), PARTICLE.volume()
    with Largest() as seen:
        motion_between(moved, fixed, ALL)
    assert BOX**3 / 2 < seen.numel <= BOX**3


@pytest.mark.parametrize("part", [1.0, 0.5])
def test_poses_take_it_off(part: float):
    """Images of a map at some poses are those of the map without a part of the motion at the poses given."""
    rotations = random_rotations(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shifts = torch.randn(5, 2, generator=torch.Generator().manual_seed(2)).double()
    moved, motion = _moved(TURN, MOVE), Motion(TURN, MOVE)
    onto, left = motion.of_poses(rotations, shifts, part)
    # What is left to be taken off gives the other map.
    onto, left = Motion(TURN * (1 - part), MOVE * (1 - part)).of_poses(onto, left, 1.0)
    points = torch.stack(torch.meshgrid(torch.arange(-6, 7), torch.arange(7), indexing="ij"), -1).flatten(
        0, 1
    )
    points = points.double()

    def images(particle: Particle, rotations: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
        # A shift moves the image to the centre, so that the particle is off by its opposite.
        wave = torch.exp(2j * torch.pi * (-shifts @ points.T) * -1 / BOX)
        return particle.slices(rotations, points) * wave

    first, second = images(moved, rotations, shifts), images(PARTICLE, onto, left)
    # In two halves the moves are turned by half of the turn less.
    tolerance = 1e-4 if part == 1 else 0.01
    assert float((first - second).abs().max()) < tolerance * float(first.abs().max())
