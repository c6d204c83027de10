"""Where the particle is in its map: the mask of each iteration, and how far the map reaches in the end."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from halfmap.errors import ParameterError
from halfmap.ops.envelope import find_region
from halfmap.ops.fourier import resample
from halfmap.ops.masks import around_region, edge_around_region
from halfmap.search.reference import read_mask
from halfmap.steps.refine.plan import Plan

_COARSE_A = 15.0
"""Detail that a mask follows at most."""

_FROM_A = 25.0
"""Resolution from which on a map says where the particle is."""


AROUND = 1.1
"""Diameter of a sphere over that of the map that it is to hold."""

_REACHING = 0.995
"""Share of the particle's volume that its diameter holds."""

_WHOLE_BOX = 0.9
"""Diameter over the box's side from which on what stands out of the noise is no particle."""


def solvent_mask(plan: Plan, volume: Tensor, resolution_A: float) -> Tensor:
    """Soft mask of the particle within the sphere of its diameter, whose edge is as soft.

    Parameters
    ----------
    plan : Plan
        The refinement.
    volume : Tensor (d, d, d)
        Its map as it is now, unfiltered.
    resolution_A : float
        That it has.

    Returns
    -------
    Tensor (d, d, d)
        Values from 0 to 1.
    """
    box = len(volume)
    pixel_size = plan.side / box
    sphere = plan.sphere(box, edge_around_region(box, resolution=resolution_A, pixel_size=pixel_size))
    if plan.mask is not None:
        given = read_mask(plan.mask, plan.side)
        return resample(given, new_shape=(box,) * 3).clamp(0, 1).to(volume) * sphere
    if not resolution_A < _FROM_A:
        return sphere
    finest = max(_COARSE_A, 1.5 * resolution_A)
    try:
        seen, blank = (volume * sphere).cpu(), (sphere < 0.5).cpu()
        found = find_region(seen, pixel_size=pixel_size, resolution=finest, blank=blank)
    except ParameterError:  # nothing stands out of the noise
        return sphere
    mask = around_region(found.region, resolution=resolution_A, pixel_size=pixel_size)
    return mask.to(volume) * sphere


def reach(plan: Plan, volume: Tensor, resolution_A: float) -> float | None:
    """Diameter in Å of the sphere about the box's centre that holds the particle, wherever it ends.

    Parameters
    ----------
    plan : Plan
        The refinement; neither its mask nor its sphere matter.
    volume : Tensor (d, d, d)
        Its map, unfiltered.
    resolution_A : float
        That it has.

    Returns
    -------
    float or None
        None where the map is too coarse, or noisy, to say.
    """
    if not resolution_A < _FROM_A:
        return None
    finest = max(_COARSE_A, 1.5 * resolution_A)
    box = min(len(volume), 2 * math.ceil(1.5 * plan.side / finest))
    small = resample(volume.cpu(), new_shape=(box,) * 3)
    place = (torch.arange(box) - box // 2) * (plan.side / box)
    distance = torch.linalg.vector_norm(
        torch.stack(torch.meshgrid(place, place, place, indexing="ij")), dim=0
    )
    try:
        found = find_region(
            small,
            pixel_size=plan.side / box,
            resolution=finest,
            least_piece=1.0,
            blank=distance > _WHOLE_BOX * plan.side / 2,
        )
    except ParameterError:  # nothing stands out of the noise
        return None
    inside = distance[found.region].sort().values
    diameter = 2 * float(inside[int(_REACHING * (len(inside) - 1))])
    return diameter if diameter < _WHOLE_BOX * plan.side else None
