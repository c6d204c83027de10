"""The backbone of an ideal alpha helix."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from halfmap.errors import ParameterError
from halfmap.ops.rotations import from_rotation_vector, to_rotation_vector

RISE_A, TURN_DEG = 1.5, 100.0
"""Along the axis and around it, from residue to residue."""

ELEMENTS = ("N", "C", "C", "O", "C")
"""Of the atoms N, CA, C, O and CB."""

_PHI, _PSI, _OMEGA = -57.8, -47.0, 180.0
_N_CA, _CA_C, _C_N, _C_O, _CA_CB = 1.458, 1.525, 1.329, 1.231, 1.521
_N_CA_C, _CA_C_N, _C_N_CA, _CA_C_O, _N_CA_CB = 111.2, 116.2, 121.7, 120.8, 110.4
_CB = -122.6
"""Torsion angle of CB about N-CA, from C, of L-amino acids."""


def ideal_helix(residues: int) -> Tensor:
    """Positions of the backbone atoms of a right-handed alpha helix of alanines.

    Parameters
    ----------
    residues : int

    Returns
    -------
    Tensor (residues, 5, 3), float64
        N, CA, C, O and CB of each residue, (x, y, z) in Å; the chain goes up the z axis and is centred at the
        origin.

    Raises
    ------
    ParameterError
        If there is no residue.

    Notes
    -----
    Two residues are built by bond lengths, bond angles and torsion angles. The screw that takes one to the
    other has nearly the ideal rise and turn; the first is repeated about its axis with exactly these.

    References
    ----------
    .. [1] Pauling, Corey & Branson 1951, PNAS 37, 205-211, DOI 10.1073/pnas.37.4.205
    .. [2] Engh & Huber 1991, Acta Cryst. A47, 392-400, DOI 10.1107/S0108767391001071 (bonds and angles)

    Examples
    --------
    >>> helix = ideal_helix(12)
    >>> round(float((helix[4, 3] - helix[8, 0]).norm()), 1)  # from O to N of the fourth residue on
    2.9
    """
    if residues < 1:
        raise ParameterError(f"a helix of {residues} residues cannot be", hint="give 1 or more")
    residue = _about_axis(*_two_residues())
    number = torch.arange(residues, dtype=torch.float64)
    none = torch.zeros_like(number)
    turns = from_rotation_vector(torch.stack([none, none, TURN_DEG * number], dim=1))
    helix = residue @ turns.mT + torch.stack([none, none, RISE_A * number], dim=1)[:, None]
    return helix - torch.stack([none[0], none[0], helix[..., 2].mean()])


def _two_residues() -> tuple[Tensor, Tensor]:
    """Atoms (5, 3) of two residues of a helix, one after the other."""
    first = torch.tensor([[0.0, 0.0, 0.0], [_N_CA, 0.0, 0.0]], dtype=torch.float64)
    bend = math.radians(_N_CA_C)
    n, ca = first
    c = ca + _CA_C * torch.tensor([-math.cos(bend), math.sin(bend), 0.0], dtype=torch.float64)
    both = []
    for _ in range(2):
        following = _placed(n, ca, c, _C_N, _CA_C_N, _PSI)
        o = _placed(n, ca, c, _C_O, _CA_C_O, _PSI + 180)
        cb = _placed(c, n, ca, _CA_CB, _N_CA_CB, _CB)
        both.append(torch.stack([n, ca, c, o, cb]))
        next_ca = _placed(ca, c, following, _N_CA, _C_N_CA, _OMEGA)
        n, ca, c = following, next_ca, _placed(c, following, next_ca, _CA_C, _N_CA_C, _PHI)
    return both[0], both[1]


def _placed(a: Tensor, b: Tensor, c: Tensor, length: float, angle: float, torsion: float) -> Tensor:
    """Atom at a distance from c, an angle with b and c, and a torsion angle with a, b and c, in degrees."""
    bend, turn = math.radians(angle), math.radians(torsion)
    along = torch.nn.functional.normalize(c - b, dim=0)
    across = torch.nn.functional.normalize(torch.linalg.cross(b - a, along), dim=0)
    third = torch.linalg.cross(across, along)
    return c + length * (
        -math.cos(bend) * along
        + math.sin(bend) * math.cos(turn) * third
        + math.sin(bend) * math.sin(turn) * across
    )


def _about_axis(first: Tensor, second: Tensor) -> Tensor:
    """The first residue, moved so that the screw to the second is about the z axis, and up it."""
    centres = first.mean(0), second.mean(0)
    u, _, vh = torch.linalg.svd((second - centres[1]).mT @ (first - centres[0]))
    sign = torch.ones(3, dtype=torch.float64)
    sign[2] = torch.linalg.det(u @ vh)
    turn = (u * sign) @ vh
    axis = torch.nn.functional.normalize(to_rotation_vector(turn), dim=0)
    # A point of the axis is moved along it alone.
    step = centres[1] - turn @ centres[0]
    across = step - (step @ axis) * axis
    point = torch.linalg.pinv(torch.eye(3, dtype=torch.float64) - turn) @ across
    if float(step @ axis) < 0:
        axis = -axis
    side = torch.linalg.cross(axis, torch.eye(3, dtype=torch.float64)[int(axis.abs().argmin())])
    side = torch.nn.functional.normalize(side, dim=0)
    frame = torch.stack([side, torch.linalg.cross(axis, side), axis])
    return (first - point) @ frame.mT
