"""Directions spread over the sphere, and viewing directions of particles."""

from __future__ import annotations

import torch
from torch import Tensor

from halfmap.errors import ParameterError, ShapeError
from halfmap.ops._healpix import pixel_centres, pixel_count
from halfmap.ops.rotations import from_rotation_vector, view_direction
from halfmap.ops.symmetry import in_asymmetric_unit, operators, order

_ORDER, _MOST = 4, 6
"""HEALPix order of the directions, and that of the finest grid that a group of many operators gets."""

_FEWEST = 200
"""Directions of an asymmetric unit at least."""

_OFF_AXES = (0.13, 0.19, 1.1)
"""Rotation vector in degrees that takes the grid's directions off the borders of asymmetric units. Its ring
on the equator stays in the slice of a view along z."""


def sphere(group: str = "C1", *, healpix_order: int | None = None) -> Tensor:
    """Directions (d, 3) spread evenly over the sphere: those of one asymmetric unit, then their equivalents.

    No two are the same, and each has the same area but near the units' borders. By default
    3072 or so, 3.7° apart; more for a group of many operators, each of whose units is to have 200.
    """
    if healpix_order is None:
        healpix_order = _ORDER
        while pixel_count(healpix_order) < _FEWEST * order(group) and healpix_order < _MOST:
            healpix_order += 1
    centres = pixel_centres(torch.arange(pixel_count(healpix_order)), order=healpix_order)
    rot, tilt = torch.deg2rad(centres[:, 0]), torch.deg2rad(centres[:, 1])
    directions = torch.stack([tilt.sin() * rot.cos(), tilt.sin() * rot.sin(), tilt.cos()], dim=1)
    directions = directions @ from_rotation_vector(torch.tensor(_OFF_AXES, dtype=torch.float64)).T
    unit = directions[in_asymmetric_unit(directions, group)]
    return torch.cat([unit @ operator for operator in operators(group)])


def checked_views(rotations: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Viewing directions (n, 3) and weights (n,), checked, in float64."""
    if rotations.ndim != 3 or rotations.shape[1:] != (3, 3):
        raise ShapeError(f"rotations of shape {tuple(rotations.shape)} are not (n, 3, 3)")
    if not len(rotations):
        raise ParameterError("there are no particles whose views could be counted")
    views = view_direction(rotations).double().cpu()
    if weights is None:
        return views, torch.ones(len(views), dtype=torch.float64)
    if weights.shape != (len(views),):
        raise ShapeError(f"weights of shape {tuple(weights.shape)} are not those of {len(views)} particles")
    if bool((weights < 0).any()) or not float(weights.sum()) > 0:
        raise ParameterError("weights of particles must be 0 or more, and not all 0")
    return views, weights.double().cpu()
