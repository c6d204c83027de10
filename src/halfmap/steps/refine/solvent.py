"""The mask of the particle in each iteration: the one given, or one made from the map."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import torch
from torch import Tensor

from halfmap.errors import ParameterError, ShapeError
from halfmap.io.volumes import read_volume
from halfmap.ops.envelope import find_region
from halfmap.ops.fourier import resample
from halfmap.ops.masks import soft_edge
from halfmap.steps.refine.plan import Plan

_COARSE_A = 15.0
"""Detail that a mask follows at most."""

_FROM_A = 25.0
"""Resolution from which on a map says where the particle is."""

_EXTEND_A, _EDGE_A = 4.0, 8.0
"""What a mask leaves around the particle's blurred surface, and its soft edge."""

_SIDES = 5e-3
"""Relative difference of the sides of two boxes that rounding of pixel sizes explains."""


def solvent_mask(plan: Plan, volume: Tensor, resolution_A: float) -> Tensor:
    """Soft mask of the particle within the sphere of its diameter.

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
    sphere, pixel_size = plan.sphere(box), plan.side / box
    if plan.mask is not None:
        given = given_mask(plan.mask, plan.side)
        return resample(given, new_shape=(box,) * 3).clamp(0, 1).to(volume) * sphere
    if not resolution_A < _FROM_A:
        return sphere
    finest = max(_COARSE_A, 1.5 * resolution_A)
    try:
        found = find_region(volume * sphere, pixel_size=pixel_size, resolution=finest, blank=sphere < 0.5)
    except ParameterError:  # nothing stands out of the noise
        return sphere
    width = max(_EDGE_A, 3 * pixel_size)
    return soft_edge(found.region, extend=_EXTEND_A, width=width, pixel_size=pixel_size).to(volume) * sphere


@functools.lru_cache(maxsize=1)
def given_mask(path: Path, side: float) -> Tensor:
    """Read the mask that was given, of a box of `side` Å.

    Raises
    ------
    FileFormatError
        If it is no volume that can be used.
    ShapeError
        If its box is another.
    ParameterError
        If it is not a mask.
    """
    found, hint = read_volume(path, cubic=True), "make one in the particles' box: halfmap mask"
    values = torch.from_numpy(found.array)
    if float(values.min()) < -0.01 or float(values.max()) > 1.01:
        raise ParameterError(f"{path}: the mask holds values that are not between 0 and 1", hint=hint)
    if not float(values.max()) > 0.5:
        raise ParameterError(f"{path}: the mask is empty", hint=hint)
    own = len(values) * found.pixel_size
    if not math.isclose(own, side, rel_tol=_SIDES):
        raise ShapeError(
            f"the mask's box is {own:.0f} Å wide, the particles' {side:.0f} Å", path=path, hint=hint
        )
    return values
