"""The geometry of an ideal alpha helix."""

from __future__ import annotations

import pytest
import torch

from halfmap.errors import ParameterError
from halfmap.ops.helix import RISE_A, TURN_DEG, ideal_helix


def torsion(a, b, c, d) -> float:
    axis = torch.nn.functional.normalize(c - b, dim=0)
    first, last = ((each - (each @ axis) * axis) for each in (a - b, d - c))
    return float(torch.rad2deg(torch.atan2(torch.linalg.cross(axis, first) @ last, first @ last)))


def test_it_is_a_right_handed_screw():
    helix = ideal_helix(8)
    step = torch.deg2rad(torch.tensor(TURN_DEG, dtype=torch.float64))
    x, y, z = helix[:-1].unbind(-1)
    turned = torch.stack([x * step.cos() - y * step.sin(), x * step.sin() + y * step.cos(), z + RISE_A], -1)
    torch.testing.assert_close(helix[1:], turned)


def test_its_geometry_is_that_of_proteins():
    helix = ideal_helix(12)
    n, ca, c, o, cb = helix.unbind(1)
    radii = helix[0, :, :2].norm(dim=1).tolist()
    # Radii of polyalanine: N 1.55, CA 2.29, C 1.66, O 2.01, CB 3.29 Å, of slightly other torsions.
    assert radii == pytest.approx([1.55, 2.29, 1.66, 2.01, 3.29], abs=0.1)
    assert float((c[4] - n[5]).norm()) == pytest.approx(1.33, abs=0.06)
    assert float((ca[4] - ca[5]).norm()) == pytest.approx(3.80, abs=0.03)
    assert float((o[3] - n[7]).norm()) == pytest.approx(2.9, abs=0.1)
    assert torsion(c[4], n[5], ca[5], c[5]) == pytest.approx(-57.8, abs=2)
    assert torsion(n[5], ca[5], c[5], n[6]) == pytest.approx(-47.0, abs=2)
    # L-amino acids.
    assert float(torch.linalg.cross(n[5] - ca[5], c[5] - ca[5]) @ (cb[5] - ca[5])) > 2
    assert float(helix[..., 2].mean()) == pytest.approx(0, abs=1e-9)


def test_no_residues_are_no_helix():
    with pytest.raises(ParameterError, match="a helix of 0 residues"):
        ideal_helix(0)
