"""Cut-offs of frequencies that vary over the map, each by what the other half map says of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from halfmap.ops.filters import radial_profile_to_grid
from halfmap.ops.fourier import irfft3, rfft3
from halfmap.ops.local_correlation import bands, in_bands, shells, smoothed, upsampled
from halfmap.search.regularise import Evidence, Filter, each_alone

_GRID = 80
"""Side of the grid that cut-offs are found on, at most."""

_COARSEST_A = 30.0
"""Detail that is left everywhere."""

_SOFT = 3
"""Shells over which maps end beyond the last one where half maps agree."""

_INSIDE = 0.05
"""Of the mask, where cut-offs matter."""


def nonuniform(evidence: Evidence) -> Filter:
    """Filter each place by the cut-off with which a half map tells most of the other.

    About each voxel the frequency is sought below which one half map comes nearest to the other, unfiltered
    one, in a window as wide as its correlation is certain, summed over both ways round. This is defined on
    both half sets, and both get the same cut-offs: all that either learns of the other is how fine its detail
    is, place by place. Each image is compared with a map that it had no share in.

    Notes
    -----
    With a and b what half maps have in a band, leaving it out costs ``a**2 + b**2`` and keeping it
    ``2 (a - b)**2``, so that it gains ``4 a b - a**2 - b**2``: the correlation of both must be above one
    half on the average. What a cut-off gains is summed over all bands below it, and the best one is taken.

    References
    ----------
    .. [1] Punjani, Zhang & Fleet 2020, Nat. Methods 17, 1214-1221, DOI 10.1038/s41592-020-00990-8
    """
    n, last = len(evidence.mask), int((evidence.correlation > 0).int().cumprod(0).sum()) - 1
    first = max(3.0, n * evidence.pixel_size / _COARSEST_A)
    middles = shells(n, min(first, n // 2 - 4.0))
    cut = _cut_offs(evidence, middles, last)
    inside = cut[upsampled(evidence.mask.cpu(), len(cut)) > _INSIDE]
    inside = inside if len(inside) else cut.flatten()
    least, most = float(inside.min()), float(inside.max())
    ends = [*middles[1:], 2 * middles[-1] - middles[-2]]
    # Weights that vary put some of what is within beyond.
    beyond = torch.arange(n // 2 + 1) - max(last, math.ceil(first))
    within = radial_profile_to_grid((1 - beyond / _SOFT).clamp(0, 1), shape=(n,) * 3)

    def weight(number: int, m: int) -> Tensor | float:
        # Half of a band whose middle is the cut-off is kept.
        middle, width = middles[number], ends[number] - middles[number]
        if middle + width / 2 <= least:
            return 1.0
        if middle - width / 2 >= most:
            return 0.0
        return ((upsampled(cut, m) - middle) / width + 0.5).clamp(0, 1)

    def made(volume: Tensor, half: int) -> Tensor:
        kept = in_bands(volume.cpu(), middles=middles, weight=weight)
        return irfft3(rfft3(kept) * within, shape=kept.shape).to(volume.device)

    return each_alone(evidence, made)


def _cut_offs(evidence: Evidence, middles: list[float], last: int) -> Tensor:
    """Shells (g, g, g) to which detail is kept, of those to the last one where half maps agree."""
    first, second = (each.cpu() for each in evidence.maps)
    grid = min(len(first), _GRID)
    mask = evidence.mask.cpu()
    gains = torch.stack(
        [
            upsampled(band.signal - band.noise, grid)
            for band in bands(first, second, mask=mask, middles=middles)
        ]
    ).double()
    # Maps may be on any scale; nothing is cut before the end of the first band.
    gains /= gains.abs().max().clamp_min(torch.finfo(gains.dtype).tiny)
    gains[0] = 0
    middle = torch.tensor(middles, dtype=gains.dtype)
    held = max(int((middle <= last).sum()), 1)
    gains = gains[:held]
    best = gains.cumsum(0).argmax(0, keepdim=True)
    after = (best + 1).clamp_max(held - 1)
    gain, loss = gains.gather(0, best)[0], -gains.gather(0, after)[0]
    # The cut-off is where the gain passes through nothing between the middles of two bands.
    part = torch.where(loss > 0, gain / (gain + loss).clamp_min(torch.finfo(gains.dtype).tiny), 0.0)
    cut = middle[best[0]] + part * (middle[after[0]] - middle[best[0]])
    # What is kept in the last band is kept to its end.
    whole = float(len(first)) if held == len(middles) else max(float(last), middles[held - 1])
    cut = torch.where(best[0] == held - 1, whole, cut).float()
    inside = cut[upsampled(mask, grid) > _INSIDE]
    wave = grid / float((inside if len(inside) else cut.flatten()).clamp_max(len(first) / 2).median())
    return smoothed(cut, width=wave / 2, over=torch.ones_like(cut))
