"""Maps filtered by what half maps agree in around each voxel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from halfmap.io.half_maps import HalfMaps
from halfmap.log import log
from halfmap.ops.fourier import irfft3, rfft3
from halfmap.ops.local_correlation import Band, bands, put_back, shells, upsampled, within_band
from halfmap.steps.postprocess.correlate import THRESHOLD
from halfmap.steps.postprocess.sharpen import Sharpened

if TYPE_CHECKING:
    from halfmap.steps.postprocess.step import PostprocessStep

_COARSEST_A, _FEWEST = 40.0, 3.0
"""Middle of the first band, and the shell it has at least."""

_SURE = 2.0
"""Standard deviations above that of noise from which on a local correlation counts."""

_GAIN = 3.0
"""Factor by which a voxel's surroundings are made stronger or weaker, at most."""


@dataclass(frozen=True, eq=False)
class LocalMaps:
    """Maps (n, n, n) that are filtered locally, within the mask.

    Attributes
    ----------
    filtered : Tensor
        Sharpened, and weighted at each voxel to where half maps agree around it.
    denoised : Tensor
        Weighted so that it is nearest to what is there, not sharpened.
    scaled : Tensor
        As filtered, with the amplitudes of every surroundings brought to those of the whole particle.
    """

    filtered: Tensor
    denoised: Tensor
    scaled: Tensor


def local_maps(
    step: PostprocessStep, halves: HalfMaps, mask: Tensor, sharpened: Sharpened
) -> LocalMaps | None:
    """Weight the map band by band and voxel by voxel; nothing if it is not wanted.

    Notes
    -----
    The mean of two maps that correlate by f has the correlation 2 f / (1 + f) with what is there, squared:
    Wiener's weight. Once f has fallen to that of noise, nothing finer is let through at this voxel.

    Bands are sharpened before they are correlated and weighted: a weight that differs between voxels smears
    some of a band over all frequencies, and sharpening after it would raise that many thousandfold at the
    finest ones.
    """
    if not step.local:
        return None
    box = halves.box
    first = max(_FEWEST, box * halves.pixel_size / _COARSEST_A)
    if first > box // 2 - 2:
        log.warning("the box is too small for maps that are filtered locally: there are none")
        return None
    spectra = [torch.zeros(box, box, box // 2 + 1, dtype=torch.complex64) for _ in range(3)]
    least: Tensor | None = None
    how = {"mask": mask, "middles": shells(box, first), "transfer": sharpened.transfer}
    for band in bands(halves.first, halves.second, **how):
        least, weights = _weights(band, least)
        sharp = _sharpened(band, sharpened.transfer)
        parts = (sharp, band.mean, sharp)
        for spectrum, weight, part in zip(spectra, weights, parts, strict=True):
            put_back(spectrum, weight * part, box)
    return LocalMaps(*(irfft3(spectrum, shape=(box,) * 3) * mask for spectrum in spectra))


def _sharpened(band: Band, transfer: Tensor) -> Tensor:
    """Mean of the half maps within the band (m, m, m), times the factor of each shell."""
    factors = within_band(transfer, len(band.mean), band.outer)
    return irfft3(rfft3(band.mean) * factors, shape=band.mean.shape)


def _weights(band: Band, least: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Least correlation of the bands so far, and weights of the three maps."""
    own = band.correlation
    if band.number == 0:
        # Means of large windows, and of the density itself: there is nothing to be told apart.
        own = torch.ones_like(own)
    least = own if least is None else torch.minimum(upsampled(least, len(own)), own)
    weight = _wiener(least, max(THRESHOLD, _SURE * band.deviation))
    mean = float((band.signal * band.inside).sum() / band.inside.sum())
    if mean <= 0 or band.number == 0:
        gain = torch.ones_like(weight)
    else:
        gain = (mean / band.signal.clamp_min(1e-6 * mean)).sqrt().clamp(1 / _GAIN, _GAIN)
    return least, (weight, _wiener(own, _SURE * band.deviation), weight * gain)


def _wiener(correlation: Tensor, floor: float) -> Tensor:
    """Weight of the mean of two maps by their correlation; 0 up to the floor, whole from twice that on."""
    # At a step between voxels that pass and those that do not, there would be detail finer than the band's.
    kept = correlation * (correlation / floor - 1).clamp(0, 1)
    return 2 * kept / (1 + kept)
