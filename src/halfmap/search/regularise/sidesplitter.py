"""Detail that stands out of the noise, place by place, each half map judged by itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from halfmap.ops.filters import radial_profile_to_grid
from halfmap.ops.fourier import irfft3, rfft3
from halfmap.ops.grids import frequency_radius
from halfmap.ops.local_correlation import shells
from halfmap.search.halfmaps import solved
from halfmap.search.regularise import Evidence, Filter, Pair

_COARSEST = 3.0
"""Shell of the first band."""

_ORDER = 8
"""Of Butterworth's filter."""

_INSIDE = 0.99
"""Of the mask, where noise is measured."""

_THRESHOLD = 0.143
"""Correlation at which the finest detail ends."""


def sidesplitter(evidence: Evidence) -> Filter:
    """Keep of each voxel the finest detail to which it exceeds all noise.

    Half maps, filtered by their correlation, are made white: each band of frequencies gets the same power for
    its width. From fine detail to coarse they are passed low; a voxel of a half map whose white value is
    beyond the greatest one that noise has anywhere within the mask takes its value at this detail, and keeps
    it. Of the other half set a map learns the spectra and that one number for each detail, as half the
    difference of both is the noise. Which voxels are kept, each half map decides by itself.

    References
    ----------
    .. [1] Ramlaul, Palmer, Nakane & Aylett 2020, J. Struct. Biol. 211, 107545, DOI 10.1016/j.jsb.2020.107545
    .. [2] Ramlaul, Palmer & Aylett 2019, J. Struct. Biol. 205, 30-40, DOI 10.1016/j.jsb.2018.11.011
    """
    n = len(evidence.mask)
    inside = evidence.mask > _INSIDE
    if not bool(inside.any()):
        inside = evidence.mask >= evidence.mask.max()
    agreed = evidence.correlation.to(evidence.mask)
    first, second = (_of_shells(rfft3(each), agreed, n) for each in evidence.maps)
    last = max(evidence.shell(_THRESHOLD), math.ceil(_COARSEST) + 2)
    white, ends = _whitening(first, second, inside, last)
    limits = [_limit(first, second, white, end, inside) for end in ends]

    def made(halves: Pair, name: str) -> tuple[Tensor, Tensor]:
        one, two = (
            _kept(solved(own, evidence.prior[half]), white, ends, limits) for half, own in enumerate(halves)
        )
        return one, two

    return made


def _of_shells(spectrum: Tensor, profile: Tensor, n: int) -> Tensor:
    """A half-spectrum times a profile of shells, 0 beyond its end."""
    whole = profile.new_zeros(max(len(profile), n // 2 + 1))
    whole[: len(profile)] = profile
    return spectrum * radial_profile_to_grid(whole[: n // 2 + 1], shape=(n,) * 3)


def _whitening(first: Tensor, second: Tensor, inside: Tensor, last: int) -> tuple[Tensor, list[float]]:
    """Factors (n, n, n // 2 + 1) that make maps white to a shell, and the ends of bands."""
    n = len(inside)
    radius = _radius(n, first)
    factors, ends, low = torch.zeros_like(radius), list[float](), 0.0
    for end in shells(n, _COARSEST)[1:]:
        band = _low_pass(radius, end) - (_low_pass(radius, low) if low else 0.0)
        both = irfft3((first + second) * band, shape=(n,) * 3)[inside]
        power = float(both.square().mean())
        if power > 0:
            factors += band * ((end - low) / math.sqrt(power))
        ends.append(min(end, last))
        low = end
        if end >= last:
            break
    return factors, ends


def _limit(first: Tensor, second: Tensor, white: Tensor, end: float, inside: Tensor) -> float:
    """Greatest value that noise has in white maps passed low: that seen, or what chance would have."""
    n = len(inside)
    filtered = (first - second) / 2 * white * _low_pass(_radius(n, first), end)
    noise = irfft3(filtered, shape=(n,) * 3)[inside]
    expected = float(noise.square().mean().sqrt()) * math.sqrt(2 * math.log(max(noise.numel(), 2)))
    return max(float(noise.abs().max()), expected)


def _kept(volume: Tensor, white: Tensor, ends: list[float], limits: list[float]) -> Tensor:
    """Map (n, n, n) of what exceeds the limits."""
    n = len(volume)
    spectrum, out = rfft3(volume), torch.zeros_like(volume)
    radius = _radius(n, spectrum)
    left = torch.ones_like(volume, dtype=torch.bool)
    for end, limit in zip(reversed(ends), reversed(limits), strict=True):
        passed = spectrum * _low_pass(radius, end)
        taken = left & (irfft3(passed * white, shape=volume.shape).abs() > limit)
        out = torch.where(taken, irfft3(passed, shape=volume.shape), out)
        left &= ~taken
    # Edges of what is kept are sharper than anything that half maps agree in, and nearly the same in both.
    return irfft3(rfft3(out) * _low_pass(radius, ends[-1]), shape=volume.shape)


def _radius(n: int, like: Tensor) -> Tensor:
    return (frequency_radius((n,) * 3) * n).to(like.device)


def _low_pass(radius: Tensor, end: float) -> Tensor:
    """Butterworth's filter: half of the power at its end."""
    return (1 + (radius / end) ** (2 * _ORDER)).rsqrt()
