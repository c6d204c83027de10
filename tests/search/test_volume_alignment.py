"""Maps turned, moved and mirrored by known amounts come back onto the ones that they were."""

from __future__ import annotations

import pytest
import torch
from pose_simulation import Particle

from halfmap.errors import ShapeError
from halfmap.ops.fsc import fsc
from halfmap.ops.masks import soft_sphere
from halfmap.ops.rotations import angular_distance, random_rotations
from halfmap.ops.symmetry import equal_settings, operators, symmetric_distance
from halfmap.search.volume_alignment import Alignment, align_volume, centre_of_mass, inverted

BOX, RADIUS = 32, 11.0
MASK = soft_sphere((BOX,) * 3, radius=RADIUS, edge=3.0)
HOW = {"mask": MASK, "radius_px": RADIUS, "frequency": 9}


def pair(seed: int, *, mirrored: bool, noise: float = 0.0, group: str = "C1"):
    """A map, the same of other atoms turned and moved, and by what."""
    generator = torch.Generator().manual_seed(seed)
    atoms = Particle.random(BOX, count=40, radius_px=8.0, seed=seed).atoms
    atoms = torch.cat([atoms @ operator.T for operator in operators(group)])
    rotation = random_rotations(1, generator=generator, dtype=torch.float64)[0]
    shift = torch.randn(3, generator=generator, dtype=torch.float64)
    moved = (-atoms if mirrored else atoms) @ rotation.T + shift
    fixed, moving = (Particle(a, BOX).volume() for a in (moved, atoms))
    power = float(fixed[MASK > 0.5].std())
    fixed, moving = (v + noise * power * torch.randn(v.shape, generator=generator) for v in (fixed, moving))
    return fixed, moving, rotation, shift


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("noise", [0.0, 2.0])
def test_map_comes_back(mirrored, noise):
    fixed, moving, rotation, shift = pair(1, mirrored=mirrored, noise=noise)
    found = align_volume(moving, fixed, **HOW)
    assert found.mirrored == mirrored
    # A tenth of the finest detail compared, 3.6 px, at the particle's edge; with noise three times as much.
    tolerance = 0.36 * (3 if noise else 1)
    assert float(torch.deg2rad(angular_distance(found.rotation, rotation))) * RADIUS < tolerance
    assert float((found.shift_px - shift).norm()) < tolerance
    if not noise:
        assert float(fsc(found.apply(moving) * MASK, fixed * MASK)[1:10].min()) > 0.95
        assert found.correlation > 0.95


def test_hand_is_told_only_where_it_is_asked_for():
    fixed, moving, *_ = pair(2, mirrored=True)
    assert align_volume(moving, fixed, **HOW).correlation > 0.95
    assert align_volume(moving, fixed, hands=False, **HOW).correlation < 0.8


def test_any_equivalent_rotation_of_a_symmetric_map():
    fixed, moving, rotation, _ = pair(3, mirrored=False, group="D2")
    found = align_volume(moving, fixed, **HOW)
    assert float(symmetric_distance(found.rotation, rotation, "D2")) < 2.0
    assert found.correlation > 0.95


@pytest.mark.parametrize("mirrored", [False, True])
def test_maps_of_one_setting_need_few_rotations(mirrored):
    """Those of D2 with axes exchanged: one of six rotations, no shift, and the other hand if need be."""
    atoms = Particle.random(BOX, count=10, radius_px=8.0, seed=6).atoms
    atoms = torch.cat([atoms @ operator.T for operator in operators("D2")])
    turns = equal_settings("D2")
    assert turns is not None
    for turn in turns:
        fixed = Particle((-atoms if mirrored else atoms) @ turn.T, BOX).volume()
        found = align_volume(Particle(atoms, BOX).volume(), fixed, turns=turns, **HOW)
        assert float(symmetric_distance(found.rotation, turn, "D2")) < 1e-3
        assert found.mirrored == mirrored
        assert found.over_chance > 0.95


@pytest.mark.parametrize("mirrored", [False, True])
def test_inverse_brings_the_other_map_back(mirrored):
    volume = Particle.random(BOX, count=40, radius_px=8.0, seed=7).volume()
    rotation = random_rotations(1, generator=torch.Generator().manual_seed(7), dtype=torch.float64)[0]
    there = Alignment(rotation, torch.tensor([1.5, -2.0, 0.7]).double(), mirrored, 1.0)
    back = there.inverse.apply(there.apply(volume))
    assert float(fsc(back * MASK, volume * MASK)[1:10].min()) > 0.98


def test_other_maps_do_not_correlate():
    fixed, *_ = pair(4, mirrored=False)
    _, moving, *_ = pair(5, mirrored=False)
    assert align_volume(moving, fixed, **HOW).correlation < 0.7


def test_chance_is_what_a_search_finds_in_other_maps():
    """A few coarse coefficients match somewhere; and maps that are the same but for noise are above that."""
    size, radius = 22, 6.9
    how = {"mask": soft_sphere((size,) * 3, radius=radius, edge=3.0), "radius_px": radius, "frequency": 6}
    maps = [
        Particle(Particle.random(size, count=40, radius_px=5.5, seed=s).atoms, size).volume()
        for s in range(4)
    ]
    others = [align_volume(maps[i], maps[i + 2], **how) for i in range(2)]
    assert min(found.correlation for found in others) > 0.35
    assert max(abs(found.over_chance) for found in others) < 0.2
    generator = torch.Generator().manual_seed(0)
    noise = 0.7 * float(maps[0][how["mask"] > 0.5].std())
    one, two = (maps[0] + noise * torch.randn(maps[0].shape, generator=generator) for _ in range(2))
    found = align_volume(one, two, **how)
    assert found.correlation < 0.95
    assert found.over_chance > 0.4


def test_maps_of_a_large_group_are_alike_by_chance():
    """Few coefficients are left to maps of one setting: any two may correlate, which is no agreement."""
    turns, found = equal_settings("O"), []
    for seed in range(8):
        atoms = [Particle.random(BOX, count=3, radius_px=8.0, seed=s).atoms for s in (seed, seed + 500)]
        whole = [torch.cat([own @ operator.T for operator in operators("O")]) for own in atoms]
        one, other = (Particle(own, BOX).volume() for own in whole)
        found.append(align_volume(one, other, turns=turns, order=24, **HOW))
    assert max(each.correlation for each in found) > 0.15
    assert max(each.over_chance for each in found) < 0.05
    assert align_volume(one, one, turns=turns, order=24, **HOW).over_chance > 0.9


def test_centre_is_that_of_what_is_above_a_quarter():
    volume = torch.zeros(9, 9, 9)
    volume[4, 4, 4], volume[4, 4, 8] = 1.0, 0.2
    assert centre_of_mass(volume).tolist() == [0.0, 0.0, 0.0]
    volume[4, 4, 8] = 0.5
    assert centre_of_mass(volume).tolist() == [1.0, 0.0, 0.0]


def test_inverted_twice_is_the_same():
    for size in (8, 9):
        volume = torch.randn(size, size, size)
        assert torch.equal(inverted(inverted(volume)), volume)
        assert inverted(volume)[size // 2, size // 2, size // 2] == volume[size // 2, size // 2, size // 2]


def test_maps_of_two_sizes_are_refused():
    with pytest.raises(ShapeError, match="cannot be aligned"):
        align_volume(torch.zeros(8, 8, 8), torch.zeros(9, 9, 9), **HOW)
