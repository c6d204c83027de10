"""How far two half maps agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from halfmap.io.half_maps import HalfMaps
from halfmap.log import log
from halfmap.ops.fsc import CorrectedFSC, resolution
from halfmap.ops.fsc_interval import Interval, Scatter, noise_scatter, resolution_interval

if TYPE_CHECKING:
    from halfmap.steps.postprocess.step import Sharpening

THRESHOLD, HALF = 0.143, 0.5

_TIGHT = 0.1
"""Correlation by the mask at the resolution from which on it is too tight."""


@dataclass(frozen=True, eq=False)
class Curves:
    """Correlation of half maps.

    Attributes
    ----------
    fsc : CorrectedFSC
    resolution, resolution_half : float
        Å, where the corrected curve falls below 0.143 and 0.5.
    interval, interval_half : Interval
        In which these truly are.
    share : float
        Coefficients that are independent in the mask, over all.
    """

    fsc: CorrectedFSC
    resolution: float
    resolution_half: float
    interval: Interval
    interval_half: Interval
    share: float


def correlate(step: Sharpening, halves: HalfMaps, mask: Tensor) -> Curves:
    """Correlate the half maps, and say to what detail they agree and how sure that is."""
    generator = torch.Generator().manual_seed(step.seed)
    fsc = halves.corrected_fsc(
        mask, randomise_below=step.randomise_below, draws=step.draws, generator=generator
    )
    scatter = noise_scatter(mask, generator=generator)
    found = [_at(step, halves, fsc.corrected, scatter, threshold) for threshold in (THRESHOLD, HALF)]
    (fine, interval), (half, interval_half) = found
    curves = Curves(fsc, fine, half, interval, interval_half, scatter.share)
    _tell(step, halves, curves)
    return curves


def _at(
    step: Sharpening, halves: HalfMaps, curve: Tensor, scatter: Scatter, threshold: float
) -> tuple[float, Interval]:
    where = {"pixel_size": halves.pixel_size, "box": halves.box, "threshold": threshold}
    level = step.confidence / 100
    return resolution(curve, **where), resolution_interval(
        curve, scatter, **where, level=level, seed=step.seed
    )


def _tell(step: Sharpening, halves: HalfMaps, curves: Curves) -> None:
    log.info(
        "half maps agree to %.2f Å (%.2f to %.2f at %g %%) at a correlation of %g, "
        "to %.2f Å (%.2f to %.2f) at %g",
        *(curves.resolution, *curves.interval, step.confidence, THRESHOLD),
        *(curves.resolution_half, *curves.interval_half, HALF),
    )
    last = 2 * halves.pixel_size * (halves.box / 2) / (halves.box // 2)
    if curves.resolution <= last and halves.last_shell == halves.box // 2:
        log.warning("the half maps agree to the last shell, %.2f Å: smaller pixels would show more", last)
    shell = min(len(curves.fsc.masked) - 1, round(halves.box * halves.pixel_size / curves.resolution))
    mask = float(curves.fsc.randomised[shell])
    if curves.fsc.from_shell < shell and mask > _TIGHT:
        log.warning(
            "the mask alone correlates by %.2f at the resolution: it is tight or sharp; give a wider one",
            mask,
        )
