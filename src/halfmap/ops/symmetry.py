"""Point groups of particles in RELION's settings: operators, asymmetric units, distances and averages.

A volume V has the symmetry of a group if ``V(S x) = V(x)`` for each of its operators S. Its projections
with the rotation matrices ``R`` and ``R S`` are then the same image: operators stand on the right of
rotations, and turn viewing directions d into ``Sᵀ d``.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache

import torch
from torch import Tensor

from halfmap.errors import ParameterError, ShapeError
from halfmap.ops.interpolation import Method, rotate_volume
from halfmap.ops.rotations import angular_distance, from_rotation_vector, view_direction

__all__ = [
    "equal_settings",
    "in_asymmetric_unit",
    "operators",
    "order",
    "reduce_to_asymmetric_unit",
    "symmetric_distance",
    "symmetrise_volume",
]

_GOLDEN = (1 + math.sqrt(5)) / 2

_POLYHEDRAL: dict[
    str, tuple[int, tuple[tuple[int, tuple[float, float, float]], ...], tuple[float, float]]
] = {
    "T": (12, ((3, (0.0, 0.0, 1.0)), (2, (0.0, math.sqrt(2.0), 1.0))), (-67.76, 37.37)),
    "O": (24, ((4, (0.0, 0.0, 1.0)), (3, (1.0, 1.0, 1.0))), (28.54, 31.76)),
    "I1": (60, ((2, (0.0, 0.0, 1.0)), (5, (_GOLDEN, 0.0, 1.0))), (48.57, 13.42)),
    "I2": (60, ((2, (0.0, 0.0, 1.0)), (5, (1.0, 0.0, _GOLDEN))), (138.57, 13.42)),
    "I3": (60, ((5, (0.0, 0.0, 1.0)), (2, (1.0, 0.0, -_GOLDEN))), (130.89, 23.23)),
    "I4": (60, ((5, (0.0, 0.0, 1.0)), (2, (1.0, 0.0, _GOLDEN))), (49.11, 23.23)),
}
"""Order, generators (fold, axis), and the centre (rot, tilt) of the asymmetric unit.

The centres are the directions whose nearest equivalent is farthest, so that the units are compact.
"""

_WORDS = {
    "cyclic": "C and the fold, as in C4,",
    "dihedral": "D and the fold, as in D2,",
    "tetrahedral": "T",
    "octahedral": "O",
    "icosahedral": "I",
    "asymmetric": "C1",
}
"""What to give for a group's name in words."""


def order(group: str) -> int:
    """Count the operators of a point group.

    Examples
    --------
    >>> order("D7"), order("O"), order("I")
    (14, 24, 60)
    """
    name, fold = _parse(group)
    return {"C": fold, "D": 2 * fold}.get(name) or _POLYHEDRAL[name][0]


def operators(group: str) -> Tensor:
    """List the rotations of a point group.

    Parameters
    ----------
    group : str
        C<n>, D<n>, T, O, I1, I2 (also I), I3 or I4, in either case.

    Returns
    -------
    Tensor (order, 3, 3) float64
        Rotation matrices acting on volume coordinates, the identity first.

    Raises
    ------
    ParameterError
        If there is no such group.

    Notes
    -----
    RELION's settings. C and D: n-fold axis along z; D: a two-fold axis along x. T: a three-fold axis along
    z, a two-fold axis in the plane yz. O: four-fold axes along x, y, z. I1 and I2: two-fold axes along x,
    y, z, and five-fold axes in the plane xz nearer to x (I1) or nearer to z (I2). I3 and I4: a five-fold
    axis along z, another in the plane xz below x (I3) or above x (I4).
    """
    return _operators(*_parse(group)).clone()


def equal_settings(group: str) -> Tensor | None:
    """List rotations between the orientations in which a map has a group's standard setting.

    Parameters
    ----------
    group : str
        As for `operators`.

    Returns
    -------
    Tensor (n, 3, 3) float64 or None
        One of each class ``R S`` with the operators S, the identity first; none if the axis is the only one
        that is fixed, as in C<n>, so that any angle about it will do.

    Notes
    -----
    They are the group's normaliser among the rotations: that of D<n> is D<2n>, that of D2 and T is O.
    """
    name, fold = _parse(group)
    if name == "C" or fold == 1:
        return None
    inside = operators(group)
    if name == "D":
        turns = operators("O") if fold == 2 else operators(f"D{2 * fold}")
    elif name == "T":
        turns = torch.stack([inside[0], _turn((0.0, math.sqrt(2.0), 1.0), inside.new_tensor([90.0]))[0]])
    else:
        turns = inside[:1]
    kept: list[Tensor] = []
    for turn in turns:
        if all(float((inside - other.T @ turn).abs().amax((1, 2)).min()) > 1e-6 for other in kept):
            kept.append(turn)
    return torch.stack(kept)


def in_asymmetric_unit(directions: Tensor, group: str) -> Tensor:
    """Tell which viewing directions lie inside the asymmetric unit.

    Parameters
    ----------
    directions : Tensor (..., 3)
        Unit vectors in volume coordinates; those of rotations are `rotations.view_direction`.
    group : str
        As for `operators`.

    Returns
    -------
    Tensor (...) of bool
        True for exactly one of the equivalents ``Sᵀ d`` of any direction, borders aside.

    Notes
    -----
    The unit is the set of directions nearer to one centre than to any of its equivalents (the Dirichlet
    cell). For C<n> it is a wedge of 360°/n about the x axis, for D<n> its upper half. RELION divides the
    sphere otherwise for T, O and I, into as many equal parts.
    """
    if directions.shape[-1:] != (3,):
        raise ShapeError(f"directions of shape {tuple(directions.shape)} are not (..., 3)")
    return _nearness(directions, group).argmax(dim=-1) == 0


def reduce_to_asymmetric_unit(rotations: Tensor, group: str) -> Tensor:
    """Replace rotations (..., 3, 3) by the equivalents ``R S`` that look along the asymmetric unit."""
    best = _nearness(view_direction(rotations), group).argmax(dim=-1)
    return rotations @ operators(group).to(rotations)[best]


def symmetric_distance(a: Tensor, b: Tensor, group: str) -> Tensor:
    """Smallest angle in degrees between `a` and any equivalent of `b`: (..., 3, 3) twice -> (...)."""
    equivalents = b[..., None, :, :] @ operators(group).to(b)
    return angular_distance(a[..., None, :, :], equivalents).amin(dim=-1)


def symmetrise_volume(volume: Tensor, group: str, *, method: Method = "cubic") -> Tensor:
    """Average volumes over the operators of a point group, in real space.

    Parameters
    ----------
    volume : Tensor (..., d, d, d)
        Real volumes whose symmetry axes meet at the origin, voxel ``d // 2``.
    group : str
        As for `operators`.
    method : {"linear", "cubic"}
        Interpolation; see `interpolation.rotate_volume`.

    Returns
    -------
    Tensor (..., d, d, d)
        ``mean of V(S x) over S``; corners that an operator turns out of the box count as zero.

    Examples
    --------
    >>> volume = torch.zeros(5, 5, 5)
    >>> volume[2, 2, 4] = 1
    >>> symmetrise_volume(volume, "C2")[2, 2].round(decimals=3)
    tensor([0.5000, 0.0000, 0.0000, 0.0000, 0.5000])
    """
    if volume.ndim < 3 or len(set(volume.shape[-3:])) != 1:
        raise ShapeError(f"a volume to be symmetrised must be a cube, not of shape {tuple(volume.shape)}")
    total = volume.clone()
    for operator in operators(group)[1:]:
        total += rotate_volume(volume, operator, method=method)
    return total / order(group)


def _parse(group: str) -> tuple[str, int]:
    """Family and fold of a group's name: ("C", 4), ("I2", 0)."""
    name = group.strip().upper()
    if name in (*_POLYHEDRAL, "I"):
        return ("I2" if name == "I" else name), 0
    match = re.fullmatch(r"([CD])([1-9][0-9]*)", name)
    if match is None:
        hint = "give C1, C2, ..., D2, ..., T, O or I (the same as I2; I1, I3 and I4 are other settings)"
        for word, letter in _WORDS.items():
            if len(name) >= 4 and word.upper().startswith(name[:4]):
                hint = f"give {letter} for {word}"
        raise ParameterError(f"there is no point group '{group}'", hint=hint)
    return match[1], int(match[2])


@lru_cache(maxsize=64)
def _operators(name: str, fold: int) -> Tensor:
    if name == "C" or name == "D":
        turns = _turn((0.0, 0.0, 1.0), torch.arange(fold, dtype=torch.float64) * 360 / fold)
        return turns if name == "C" else torch.cat([turns, turns @ torch.diag(turns.new_tensor([1, -1, -1]))])
    size, generators, _ = _POLYHEDRAL[name]
    steps = torch.cat([_turn(axis, torch.tensor([360.0 / n], dtype=torch.float64)) for n, axis in generators])
    group = torch.eye(3, dtype=torch.float64)[None]
    while len(group) < size:
        products = torch.cat([group, (group[:, None] @ steps).reshape(-1, 3, 3)])
        gaps = (products[:, None] - products).abs().amax(dim=(-1, -2))
        first = (gaps < 1e-6).int().argmax(dim=-1)
        group = products[first == torch.arange(len(products))]
    return group


def _turn(axis: tuple[float, float, float], angles: Tensor) -> Tensor:
    direction = torch.tensor(axis, dtype=torch.float64)
    return from_rotation_vector(direction / direction.norm() * angles[:, None])


def _nearness(directions: Tensor, group: str) -> Tensor:
    """Cosine between the centre of the asymmetric unit and the equivalents Sᵀ d: (..., 3) -> (..., order)."""
    name, _ = _parse(group)
    rot, tilt = {"C": (0.0, 90.0), "D": (0.0, 45.0)}.get(name) or _POLYHEDRAL[name][2]
    rot, tilt = math.radians(rot), math.radians(tilt)
    x, y, z = math.sin(tilt) * math.cos(rot), math.sin(tilt) * math.sin(rot), math.cos(tilt)
    centres = operators(group) @ torch.tensor([x, y, z], dtype=torch.float64)
    return directions @ centres.to(directions).T
