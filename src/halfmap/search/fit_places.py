"""Places of a rigid model in a map: which are the same, and how far from its start a model may move."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from halfmap.ops.rotations import angular_distance, from_rotation_vector, to_rotation_vector

_SAME_deg, _SAME_A = 10.0, 3.0
"""Turn and shift below which two places are one."""


@dataclass(frozen=True, eq=False)
class Place:
    """Where a model is.

    Attributes
    ----------
    rotation : Tensor (3, 3), float64
        That the model is turned by about its centre.
    centre : Tensor (3,), float64
        (x, y, z) of this centre then, in Å from the map's first voxel.
    correlation : float
        Of the densities of map and model, where the model is.
    """

    rotation: Tensor
    centre: Tensor
    correlation: float = 0.0


class Range(NamedTuple):
    """How far from a place a model may move."""

    start: Place
    angle: float = 180.0
    """Degrees."""
    shift: float = math.inf
    """Å."""

    def nearest(self, place: Place) -> Place:
        """The place itself if it is within; else turned and shifted back as far as it takes, not scored."""
        way = place.centre - self.start.centre
        far, turned = float(way.norm()), float(angular_distance(place.rotation, self.start.rotation))
        if far <= self.shift and turned <= self.angle:
            return place
        vector = to_rotation_vector(place.rotation @ self.start.rotation.T)
        rotation = from_rotation_vector(vector * min(1.0, self.angle / max(turned, 1e-9)))
        centre = self.start.centre + way * min(1.0, self.shift / max(far, 1e-9))
        return Place(rotation @ self.start.rotation, centre)


def distinct(places: Sequence[Place], most: int, *, apart: float = _SAME_A) -> list[Place]:
    """Best places of which no two are the same."""
    kept: list[Place] = []
    for place in sorted(places, key=lambda each: -each.correlation):
        if not any(same_place(place, other, apart=apart) for other in kept):
            kept.append(place)
            if len(kept) == most:
                break
    return kept


def same_place(one: Place, other: Place, *, apart: float = _SAME_A) -> bool:
    """Whether two places differ by next to nothing."""
    if float((one.centre - other.centre).norm()) > apart:
        return False
    return float(angular_distance(one.rotation, other.rotation)) < _SAME_deg
