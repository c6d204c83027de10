"""Power of the signal from the correlation of two independent halves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfmap.ops.slices import SliceAccumulator
from halfmap.search.regularise import Halves

_LEAST, _MOST = 1e-3, 0.999
"""Range of the correlation that is believed: next to none beyond the signal, short of one within."""


@dataclass(frozen=True)
class FSCRegulariser:
    """Signal power shell by shell, so that both maps are Wiener-filtered by their correlation.

    Parameters
    ----------
    strength : float
        Factor of the signal's power, above 1 for less regularisation (RELION's T).

    Notes
    -----
    In a shell of mean weight w, whose averages have noise of power 1 / w, the correlation of the halves f
    makes the signal's power ``f / (1 - f) / w``. Shells from the first on where the halves stop to correlate
    have next to none.

    References
    ----------
    .. [1] Scheres 2012, J. Struct. Biol. 180, 519-530, DOI 10.1016/j.jsb.2012.09.006
    .. [2] Scheres & Chen 2012, Nat. Methods 9, 853-854, DOI 10.1038/nmeth.2115
    """

    strength: float = 1.0

    def __call__(self, halves: Halves) -> tuple[Tensor, Tensor]:
        """Reciprocals of the signal's power, the same for both halves."""
        a, b = (half.symmetrised().sums for half in halves)
        sums = shell_sums(a, b)
        correlation = halves_correlation(sums)
        snr = correlation.clamp(_LEAST, _MOST)
        weight = (sums[3] / sums[4].clamp_min(1)).clamp_min(torch.finfo(torch.float32).tiny)
        prior = (weight * (1 - snr) / (snr * self.strength)).to(a.data)
        spread = prior[_shells(a).clamp_max(len(prior) - 1)]
        return spread, spread


def shell_sums(a: SliceAccumulator, b: SliceAccumulator) -> Tensor:
    """Sums over shells (5, shells), float64: cross power and powers of two halves' averages, weight, count.

    Shells are one Fourier pixel of the unpadded box wide. Voxels without weight in either half are left out.
    """
    shells, origin = _shells(a), a.limit + 1
    n = int(a.limit / a.voxels_per_pixel + 0.5) + 1
    total = torch.zeros(5, n, dtype=torch.float64, device=a.data.device)
    # The plane x = 0 holds both members of a Friedel pair, and half of the weight of each.
    share = torch.ones_like(a.weights[0])
    share[:, 0] = 0.5
    for z in range(1, 2 * origin):
        weights = torch.stack([a.weights[z], b.weights[z]])
        both = (weights > 0).all(0) & (shells[z] < n)
        first, second = a.values[z][both] / weights[0][both], b.values[z][both] / weights[1][both]
        part = share[both]
        terms = [
            (first * second.conj()).real * part,
            first.abs().square() * part,
            second.abs().square() * part,
            weights[:, both].mean(0),
            part,
        ]
        total.index_add_(1, shells[z][both], torch.stack(terms).double())
    return total


def halves_correlation(sums: Tensor) -> Tensor:
    """Fourier shell correlation (shells,) from `shell_sums`, nothing from the first shell without any on."""
    correlation = sums[0] / (sums[1] * sums[2]).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    seen = (correlation > 0).cumprod(0)
    return correlation * seen


def _shells(sums: SliceAccumulator) -> Tensor:
    """Shell of each voxel (z, y, x), int64."""
    axis = torch.arange(len(sums.data), device=sums.data.device) - (sums.limit + 1)
    square = (axis.square()[:, None, None] + axis.square()[:, None]) + axis[sums.limit + 1 :].square()
    return (square.sqrt() / sums.voxels_per_pixel).round().long()
