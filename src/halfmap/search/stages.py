"""How a search for poses goes on from coarse detail to fine."""

from __future__ import annotations

import math

_COARSEST, _FINEST = 2, 3
"""HEALPix orders of the grid of directions."""

_REACH = 1.6
"""Coarse radius times angular step and radius of the particle, in Fourier pixels of its box, about."""

_FURTHER = 1.6
"""Radius of each ascent over that of the one before."""


def coarse_grid(radius: int, box_over_diameter: float) -> tuple[int, int]:
    """HEALPix order of the first grid, and rings compared on it, where `radius` are to be in the end.

    Between neighbours of a grid the outermost detail of the particle moves by a step; rings whose waves are
    not much longer than that say nothing there.
    """
    order, reach = _COARSEST - 1, 0
    while reach < radius and order < _FINEST:
        order += 1
        reach = max(3, round(_REACH * box_over_diameter / math.radians(58.6 / 2**order)))
    return order, min(radius, reach)


def ascents(coarse: int, radius: int) -> tuple[float, ...]:
    """Radii of the ascents, from about that of the first grid to the last."""
    steps = max(0, math.ceil(math.log(radius / coarse, _FURTHER)) - 1)
    return (*(min(radius, round(coarse * _FURTHER ** (i + 1))) for i in range(steps)), radius)
