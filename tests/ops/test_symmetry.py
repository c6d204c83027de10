"""Point groups against RELION's operators (live, and by their recorded axes), and what symmetry means."""

from __future__ import annotations

import math
import re
import subprocess

import numpy as np
import pytest
import torch

from halfmap.errors import ParameterError, ShapeError
from halfmap.ops import rotations as rot
from halfmap.ops import symmetry
from halfmap.ops.slices import project_volume

F64 = torch.float64
GROUPS = ["C1", "C2", "C4", "C7", "D1", "D2", "D7", "T", "O", "I1", "I2", "I3", "I4"]

# Axes (fold, direction to four digits) among those of the operators that RELION 3.1.3 prints, and how many
# there are; together with the group property they determine each group.
RECORDED = {
    "C4": (4, [(4, (0, 0, 1))]),
    "D7": (14, [(7, (0, 0, 1)), (2, (1, 0, 0)), (2, (0.9010, 0.4339, 0))]),
    "T": (12, [(3, (0, 0, 1)), (3, (0, 0.9428, -0.3333)), (2, (0, 0.8165, 0.5774))]),
    "O": (24, [(4, (1, 0, 0)), (4, (0, 1, 0)), (4, (0, 0, 1)), (2, (0.7071, 0.7071, 0))]),
    "I": (60, [(2, (1, 0, 0)), (2, (0, 1, 0)), (2, (0, 0, 1)), (5, (0.5257, 0, 0.8507))]),
    "I1": (60, [(2, (1, 0, 0)), (2, (0, 1, 0)), (2, (0, 0, 1)), (5, (0.8507, 0, 0.5257))]),
    "I2": (60, [(5, (0.5257, 0, 0.8507)), (3, (0.9342, 0, 0.3568)), (5, (0.8507, 0.5257, 0))]),
    "I3": (
        60,
        [(5, (0, 0, 1)), (5, (0.8944, 0, -0.4472)), (2, (0.8506, 0, 0.5257)), (3, (0.9822, 0, 0.1876))],
    ),
    "I4": (
        60,
        [(5, (0, 0, 1)), (5, (0.8944, 0, 0.4472)), (2, (0.8506, 0, -0.5257)), (3, (0.9822, 0, -0.1876))],
    ),
}


def seeded(n: int) -> torch.Tensor:
    return rot.random_rotations(n, generator=torch.Generator().manual_seed(n), dtype=F64)


def largest_gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """Distance of two sets of matrices: how far the loneliest of either is from the other set."""
    gaps = (a[:, None] - b).abs().amax(dim=(-1, -2))
    return max(gaps.amin(dim=0).max().item(), gaps.amin(dim=1).max().item())


@pytest.mark.parametrize("group", GROUPS)
def test_operators_are_a_group(group):
    operators = symmetry.operators(group)
    assert len(operators) == symmetry.order(group)
    assert torch.equal(operators[0], torch.eye(3, dtype=F64))
    assert torch.allclose(torch.linalg.det(operators), torch.ones(len(operators), dtype=F64))
    gaps = (operators[:, None] - operators).abs().amax(dim=(-1, -2))
    assert (gaps + torch.eye(len(operators))).min() > 0.1
    products = (operators[:, None] @ operators).reshape(-1, 3, 3)
    assert largest_gap(products, operators) < 1e-12


@pytest.mark.parametrize("group", RECORDED)
def test_axes_are_those_recorded_from_relion(group):
    count, axes = RECORDED[group]
    operators = symmetry.operators(group)
    assert len(operators) == count
    for fold, axis in axes:
        direction = torch.nn.functional.normalize(torch.tensor(axis, dtype=F64), dim=0)
        turn = rot.from_rotation_vector(direction * 360 / fold)
        # Four digits of an axis leave up to 1e-4 in a matrix.
        assert (operators - turn).abs().amax(dim=(-1, -2)).min() < 2e-4


@pytest.mark.relion
@pytest.mark.parametrize("group", [*RECORDED, "C1", "D2"])
def test_operators_are_what_relion_prints(group, tmp_path):
    command = ["relion_refine", "--sym", group, "--print_symmetry_ops", "--o", str(tmp_path / "x")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    blocks = re.findall(r"R\(\d+\)=\s*\n((?:.*\n){3})", printed)
    matrices = np.array([[float(x) for x in block.split()] for block in blocks]).reshape(-1, 3, 3)
    assert len(matrices) == symmetry.order(group)
    # RELION's generators are typed to six digits.
    assert largest_gap(symmetry.operators(group), torch.from_numpy(matrices)) < 1e-5


@pytest.mark.parametrize("group", GROUPS)
def test_one_equivalent_is_in_the_asymmetric_unit(group):
    rotations = seeded(2000)
    equivalents = rotations[:, None] @ symmetry.operators(group)
    directions = rot.view_direction(equivalents)
    inside = symmetry.in_asymmetric_unit(directions, group)
    assert (inside.sum(dim=1) == 1).all()
    # An nth of the sphere's directions are inside: five standard errors of a binomial.
    n = symmetry.order(group)
    share = symmetry.in_asymmetric_unit(rot.view_direction(rotations), group).double().mean()
    assert abs(share - 1 / n) <= 5 * math.sqrt((1 - 1 / n) / n / 2000)


def test_units_of_cyclic_and_dihedral_groups_are_wedges():
    angles = torch.tensor([[29.0, 100.0, 0.0], [31.0, 80.0, 0.0], [-29.0, 80.0, 0.0]], dtype=F64)
    directions = rot.view_direction(rot.from_euler(angles))
    assert symmetry.in_asymmetric_unit(directions, "C6").tolist() == [True, False, True]
    assert symmetry.in_asymmetric_unit(directions, "D6").tolist() == [False, False, True]


@pytest.mark.parametrize("group", ["C1", "C3", "D4", "O", "I3"])
def test_reduced_rotations_are_equivalent_and_inside(group):
    rotations = seeded(300)
    reduced = symmetry.reduce_to_asymmetric_unit(rotations, group)
    assert symmetry.in_asymmetric_unit(rot.view_direction(reduced), group).all()
    turns = rotations.transpose(-1, -2) @ reduced
    gaps = (turns[:, None] - symmetry.operators(group)).abs().amax(dim=(-1, -2))
    assert gaps.amin(dim=1).max() < 1e-12
    assert symmetry.symmetric_distance(rotations, reduced, group).max() < 1e-10


def test_symmetric_distance_counts_from_the_nearest_equivalent():
    start = seeded(50)
    small = rot.from_rotation_vector(torch.tensor([3.0, -1.0, 2.0], dtype=F64))
    moved = start @ small @ symmetry.operators("O")[7]
    expected = math.sqrt(14)
    np.testing.assert_allclose(symmetry.symmetric_distance(start, moved, "O").numpy(), expected, atol=1e-9)
    assert rot.angular_distance(start, moved).min() > 30


def blobs(box: int, points: torch.Tensor, width: float) -> torch.Tensor:
    """Sum of Gaussians at points (n, 3) from the centre."""
    axis = torch.arange(box, dtype=F64) - box // 2
    x, y, z = (torch.exp(-((axis - points[:, i, None]) ** 2) / (2 * width**2)) for i in range(3))
    return torch.einsum("nz,ny,nx->zyx", z, y, x)


@pytest.mark.parametrize("group", ["C3", "D2", "T", "O", "I2"])
def test_symmetric_volume_and_the_side_operators_stand_on(group):
    operators = symmetry.operators(group)
    seeds = torch.tensor([[7.0, 2.0, 4.0], [3.0, -5.0, 1.0]], dtype=F64)
    # V(S x) = V(x) holds if the blobs' centres are a union of orbits.
    volume = blobs(32, (operators @ seeds.T).transpose(1, 2).reshape(-1, 3), 1.6)
    rotation = seeded(1)[0]
    views = project_volume(volume, rotation @ operators)
    # Linear interpolation at padding 2 is good to about one per cent; another image differs by far more.
    assert (views - views[0]).flatten(1).norm(dim=1).max() < 0.03 * views[0].norm()
    wrong = project_volume(volume, operators @ rotation)
    assert (wrong - views[0]).flatten(1).norm(dim=1).max() > 0.2 * views[0].norm()
    # Averaging over the group leaves what is symmetric; cubic interpolation loses some of each blob's peak.
    average = symmetry.symmetrise_volume(volume, group)
    assert (average - volume).norm() < 0.03 * volume.norm()


def test_averaging_a_lone_blob_makes_its_orbit():
    point = torch.tensor([[8.0, 3.0, -2.0]], dtype=F64)
    operators = symmetry.operators("D3")
    expected = blobs(32, operators @ point[0], 2.0) / 6
    average = symmetry.symmetrise_volume(blobs(32, point, 2.0), "D3")
    assert (average - expected).norm() < 0.02 * expected.norm()


def test_lattice_operators_average_exactly():
    volume = torch.randn(9, 9, 9, dtype=F64, generator=torch.Generator().manual_seed(0))
    expected = sum(torch.rot90(volume, k, dims=(-2, -1)) for k in range(4)) / 4
    for method in ("linear", "cubic"):
        average = symmetry.symmetrise_volume(volume, "C4", method=method)
        np.testing.assert_allclose(average.numpy(), expected.numpy(), atol=1e-12)


@pytest.mark.parametrize(("group", "count"), [("D2", 6), ("D7", 2), ("T", 2), ("O", 1), ("I3", 1)])
def test_settings_keep_the_axes_where_they_are(group, count):
    """They turn operators into operators, no two of them alike, and no other rotation does."""
    operators, turns = symmetry.operators(group), symmetry.equal_settings(group)
    assert turns is not None
    assert len(turns) == count
    others = torch.cat([symmetry.operators(each) for each in ("D2", "D28", "T", "O", "I1", "I3")])
    kept = []
    for turn in others:
        turned = turn @ operators @ turn.T
        gaps = (turned[:, None] - operators).abs().amax((2, 3))
        if float(gaps.amin(1).max()) < 1e-6:
            kept.append(turn)
    # Of each such rotation there is one equivalent among those listed.
    gaps = ((turns[:, None] @ operators)[:, :, None] - torch.stack(kept)).abs().amax((3, 4))
    assert bool(((gaps < 1e-6).sum((0, 1)) == 1).all())
    assert bool(((gaps < 1e-6).sum((1, 2)) > 0).all())
    assert symmetry.equal_settings("C4") is None


def test_names():
    assert torch.equal(symmetry.operators("i"), symmetry.operators("I2"))
    assert symmetry.order(" d12 ") == 24
    for name in ("", "C", "C0", "D-2", "I5", "TH", "E", "4"):
        with pytest.raises(ParameterError, match="no point group"):
            symmetry.operators(name)
    operators = symmetry.operators("T")
    operators += 1
    assert torch.equal(symmetry.operators("T")[0], torch.eye(3, dtype=F64))


def test_refuses_other_shapes():
    with pytest.raises(ShapeError, match="directions"):
        symmetry.in_asymmetric_unit(torch.zeros(4), "C2")
    with pytest.raises(ShapeError, match="cube"):
        symmetry.symmetrise_volume(torch.zeros(4, 4, 5), "C2")
