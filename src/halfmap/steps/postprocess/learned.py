"""A map with what a network expects of it, to look at."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from halfmap.io.half_maps import HalfMaps
from halfmap.io.volumes import VIEWING
from halfmap.log import log
from halfmap.nets.map_prior import MapPrior
from halfmap.nets.weights import shipped
from halfmap.ops.filters import low_pass
from halfmap.ops.fourier import irfft3, resample, rfft3
from halfmap.ops.grids import ring_index
from halfmap.search.halfmaps import believed
from halfmap.search.regularise.learned import WEIGHTS, Learned, posterior_mean
from halfmap.steps.postprocess.correlate import Curves
from halfmap.steps.postprocess.sharpen import Sharpened
from halfmap.steps.postprocess.tables import write_maps

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.postprocess.step import SharpenStep


_ACROSS = 2.5
"""Voxels of maps that the network sees across the finest detail."""

_LEAST = 16
"""Side of such maps."""


def network(step: SharpenStep, ctx: Context) -> tuple[MapPrior, Tensor] | None:
    """Network and how far it errs, where one is asked for."""
    if not step.learned:
        return None
    return Learned(shipped(WEIGHTS) if step.weights is None else ctx.resolve(step.weights)).network()


def write(
    ctx: Context,
    halves: HalfMaps,
    mask: Tensor,
    curves: Curves,
    sharpened: Sharpened,
    network: tuple[MapPrior, Tensor],
) -> Tensor:
    """Write the mean of the map and of what a network says that it is of, sharpened as the map is.

    Returns
    -------
    Tensor (n, n, n)
        What was written.
    """
    side = halves.box * halves.pixel_size
    agreed = believed(curves.fsc.corrected).float()
    agreed[math.floor(side / curves.resolution) + 1 :] = 0
    # The network has learned from maps whose finest detail is a few voxels wide.
    small = min(halves.box, max(_LEAST, 2 * math.ceil(_ACROSS * side / curves.resolution / 2)))
    mean, inside = (resample(each, new_shape=(small,) * 3) for each in (halves.mean, mask))
    # The mean of two maps is as one of twice as many images.
    both = (2 * agreed / (1 + agreed))[: small // 2 + 1]
    found = posterior_mean(mean, inside.clamp(0, 1), both, *network)
    shape, shells = tuple(mask.shape), ring_index(mask.shape)
    spectrum = rfft3(resample(found, new_shape=shape))
    spectrum *= sharpened.transfer.float()[shells.clamp_max(len(sharpened.transfer) - 1)]
    if torch.isfinite(torch.tensor(sharpened.lowpass)):
        spectrum *= low_pass(shape, pixel_size=halves.pixel_size, resolution=sharpened.lowpass)
    volume = irfft3(spectrum, shape=shape) * mask
    write_maps(ctx, halves, {"learned.mrc": volume}, label=VIEWING)
    log.info("learned.mrc is for viewing only: a network had a part in it, and no resolution is of it")
    return volume
