"""The model's map, and how far it agrees with the map, shell by shell."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from halfmap.errors import ParameterError, ShapeError
from halfmap.io.volumes import read_volume
from halfmap.log import log
from halfmap.ops.envelope import particle_region
from halfmap.ops.filters import radial_profile_to_grid
from halfmap.ops.fourier import irfft3, rfft3
from halfmap.ops.fsc import resolution, shell_correlation
from halfmap.ops.grids import ring_sums
from halfmap.ops.masks import around_points, soft_edge
from halfmap.search.model_density import model_map
from halfmap.steps.fit.place import Given, Placed

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.fit.step import FitStep

HALF, THRESHOLD = 0.5, 0.143

_RADIUS_A, _EXTEND_px, _EDGE_px = 3.0, 3.0, 6.0
"""About atoms that the mask is 1 within, how far it is extended, and its soft edge."""


@dataclass(frozen=True, eq=False)
class Agreement:
    """A map and the map of its model.

    Attributes
    ----------
    simulated : Tensor (d, h, w)
        The model's map, V.
    volume : Tensor (d, h, w)
        The same, each shell brought to the map's scale.
    mask : Tensor (d, h, w)
        0 to 1.
    unmasked, masked : Tensor (shells,)
        Correlation of both, all over and within the mask.
    half, threshold : float
        Å, where the masked one falls below 0.5 and 0.143.
    whole_half, whole_threshold : float
        Å, where the other one does.
    """

    simulated: Tensor
    volume: Tensor
    mask: Tensor
    unmasked: Tensor
    masked: Tensor
    half: float
    threshold: float
    whole_half: float
    whole_threshold: float


def compare(step: FitStep, ctx: Context, given: Given, placed: Placed) -> Agreement:
    """Make the model's map on the map's grid, correlate both, and bring it to the map's scale."""
    simulated = model_map(placed.model, shape=given.shape, pixel_size=given.pixel_size, origin=given.origin)
    mask = _mask(step, ctx, given, placed)
    whole, model = rfft3(given.volume), rfft3(simulated)
    unmasked = shell_correlation(whole, model, shape=given.shape)
    del whole
    ours, theirs = rfft3(given.volume * mask), rfft3(simulated * mask)
    masked = shell_correlation(ours, theirs, shape=given.shape)
    volume = irfft3(model * _scale(ours, theirs, given.shape).to(model.real.dtype), shape=given.shape)
    where = {"pixel_size": given.pixel_size, "box": max(given.shape)}
    found = Agreement(
        simulated,
        volume,
        mask,
        unmasked,
        masked,
        *(resolution(masked, **where, threshold=level) for level in (HALF, THRESHOLD)),
        *(resolution(unmasked, **where, threshold=level) for level in (HALF, THRESHOLD)),
    )
    log.info(
        "map and model agree to %.2f Å at a correlation of %g, to %.2f Å at %g, within the mask",
        *(found.half, HALF, found.threshold, THRESHOLD),
    )
    return found


def _scale(ours: Tensor, theirs: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Factors (d, h, w // 2 + 1) of shells that bring the model's map closest to the map."""
    cross = ring_sums(ours.real * theirs.real + ours.imag * theirs.imag, shape=shape)
    power = ring_sums(theirs.real.square() + theirs.imag.square(), shape=shape)
    # Where they disagree nothing of the model's map is in the map, but it must not be turned over.
    factors = (cross / power.clamp_min(torch.finfo(power.dtype).tiny)).clamp_min(0)
    return radial_profile_to_grid(factors, shape=shape)


def _mask(step: FitStep, ctx: Context, given: Given, placed: Placed) -> Tensor:
    if step.mask is not None:
        return _read_mask(ctx.resolve(step.mask), given)
    pixel, voxels = given.pixel_size, given.voxels(placed.model.positions)
    # Of a large box only the part about the model: distances of all voxels would take longer than all else.
    margin = _RADIUS_A / pixel + _EXTEND_px + _EDGE_px + 1
    first = np.maximum(np.floor(voxels.min(0) - margin), 0).astype(int)
    last = np.minimum(np.ceil(voxels.max(0) + margin) + 1, given.shape[::-1]).astype(int)
    part = tuple(slice(int(a), int(b)) for a, b in zip(first[::-1], last[::-1], strict=True))
    mask = torch.zeros(given.shape)
    near = around_points(tuple(mask[part].shape), voxels - first, radius_px=_RADIUS_A / pixel)
    region = particle_region(torch.from_numpy(near), least_piece=0.0)
    mask[part] = soft_edge(region, extend=_EXTEND_px * pixel, width=_EDGE_px * pixel, pixel_size=pixel)
    return mask


def _read_mask(path: Path, given: Given) -> Tensor:
    found = read_volume(path, may_be_flat=True, pixel_size=given.pixel_size)
    if found.array.shape != given.shape:
        its, mine = (" × ".join(str(n) for n in shape[::-1]) for shape in (given.shape, found.array.shape))
        hint = "make one in its box: halfmap mask"
        raise ShapeError(f"the mask has {mine} voxels, the map {its}", path=path, hint=hint)
    low, high = float(found.array.min()), float(found.array.max())
    if low < -0.01 or high > 1.01 or not high > 0:
        message = f"is no mask: its values go from {low:.3g} to {high:.3g}"
        raise ParameterError(message, path=path, hint="values must be 0 outside and 1 inside")
    return torch.from_numpy(found.array.clip(0, 1))
