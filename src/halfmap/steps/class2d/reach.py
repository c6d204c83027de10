"""How far particles reach: a warning where the circle that averages are kept in is far too small."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.log import log
from halfmap.ops import fourier, grids
from halfmap.ops.threads import one_torch_thread
from halfmap.search.particles import ParticleImages
from halfmap.steps.class2d.plan import Plan

_SAMPLE, _BATCH = 500, 100
_COARSEST = 2
"""First Fourier ring of what is compared: slower waves are gradients of the ice."""

_RINGS = 16
_BACKGROUND = 0.85
"""Inner radius of what counts as background, over half the box; rings fill what is within."""

_CUT, _SIGMAS = 0.5, 5.0
"""Contrast to which particles reach, in parts of the strongest and in standard errors."""

_GAP = 1.25
"""How far they may reach beyond the circle: the CTF spreads contrast, and shells have it at their rims."""


def check_diameter(plan: Plan, images: ParticleImages) -> None:
    """Warn if particles have strong contrast far outside of the circle that averages are kept in."""
    radius, contrast, error = contrast_by_radius(plan, images)
    strong = np.flatnonzero(contrast > np.maximum(_CUT * contrast.max(), _SIGMAS * error))
    if len(strong) and radius[strong[-1]] > _GAP * plan.diameter / 2 / plan.pixel_size:
        log.warning(
            "particles have strong contrast still %.0f Å across, far beyond the circle of %.0f Å: unless "
            "those are neighbours, give a larger --diameter",
            *(2 * radius[strong[-1]] * plan.pixel_size, plan.diameter),
        )


@one_torch_thread()
def contrast_by_radius(plan: Plan, images: ParticleImages) -> tuple[NDArray, NDArray, NDArray]:
    """Coarse contrast of some particles in rings about their centres, above that of the background.

    Parameters
    ----------
    plan, images
        The classification and its images.

    Returns
    -------
    radius : array (rings,)
        In pixels of the search.
    contrast, error : array (rings,)
        Mean squares of images that are filtered to the detail of the first iteration, and standard errors.
    """
    rows = np.random.default_rng(plan.step.seed).permutation(len(images))[:_SAMPLE]
    finest = plan.iterations[0].radius
    squares = torch.cat([_ring_squares(images.get(some), finest) for some in images.batches(rows, _BATCH)])
    excess = (squares[:, :_RINGS] - squares[:, _RINGS:]).double().numpy()
    radius = (np.arange(_RINGS) + 0.5) * (_BACKGROUND * plan.box / 2 / _RINGS)
    return radius, excess.mean(0), excess.std(0) / len(rows) ** 0.5


def _ring_squares(images: Tensor, finest: int) -> Tensor:
    """Mean squares (n, rings + 1) in rings about the centre, the last one of which is the background."""
    box = images.shape[-1]
    wave = grids.frequency_radius((box, box)) * box
    spectrum = fourier.rfft2(images) * ((wave >= _COARSEST) & (wave <= finest))
    square = fourier.irfft2(spectrum, shape=(box, box)).square()
    radius = grids.radius((box, box))
    ring = (radius * (_RINGS / (_BACKGROUND * box / 2))).long().clamp(max=_RINGS)
    return torch.stack(
        [square[:, (ring == i) & (radius < box / 2)].mean(1) for i in range(_RINGS + 1)], dim=1
    )
