"""The mask of the particle in each iteration: the one given, or one made from the map."""

from __future__ import annotations

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
