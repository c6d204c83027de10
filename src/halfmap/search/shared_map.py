"""Maps of classes that have most in common: what of their differences is there, and the rest shared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.ops.fourier import irfft3, rfft3
from halfmap.ops.fsc import corrected_fsc
from halfmap.ops.grids import frequency_radius
from halfmap.search.halfmaps import AnySums, HalfSums, Sums, solved


@dataclass(frozen=True, eq=False)
class Folded:
    """Sums of some particles in folds, of which the first half are one half of the particles.

    Attributes
    ----------
    folds : list of Backprojection or StoredSums
    total : Backprojection or StoredSums
        Of all folds.
    sums : HalfSums
        Of both halves.
    maps : pair of Tensor (d, d, d)
        Unfiltered, of both halves.
    curve : Tensor (shells,)
        How these correlate within a mask, corrected for it.
    """

    folds: Sequence[Sums]
    total: Sums
    sums: HalfSums
    maps: tuple[Tensor, Tensor]
    curve: Tensor

    @classmethod
    def of(cls, folds: Sequence[AnySums], mask: Tensor, *, seed: int) -> Folded:
        """From sums of one radius, symmetrised, and a mask (d, d, d); `seed` is that of random phases."""
        half = len(folds) // 2
        halves = added(folds[:half]), added(folds[half:])
        sums = HalfSums.of(halves)
        maps = sums.unfiltered()
        generator = torch.Generator(device=mask.device).manual_seed(seed)
        curve = corrected_fsc(*maps, mask=mask, generator=generator).corrected
        return cls(folds, added(halves), sums, maps, curve.cpu().float().nan_to_num(nan=0.0))

    def unfiltered(self, without: Sums | None = None, *, half: int | None = None) -> Tensor:
        """Map (d, d, d) of all particles, or those of a half, but some; see `HalfSums.unfiltered`."""
        if half is None:
            return solved(self.total, least=self.sums.least.sum(0), without=without)
        return solved(self.sums.halves[half], least=self.sums.least[half], without=without)


@dataclass(frozen=True, eq=False)
class Chance:
    """Differences that classes have because noise is sorted by the maps that it is compared with.

    Attributes
    ----------
    sums : Tensor (folds, k, d, d, d)
    weights : Tensor (folds, k)

    Notes
    -----
    Noise that is likelier under one map is put there, and leaves its likeness. By Stein's lemma [1]_ this is
    the derivative of the probabilities: the map, less the mean of all as the particles of the class weigh
    them.

    References
    ----------
    .. [1] Stein 1981, Ann. Stat. 9, 1135-1151, DOI 10.1214/aos/1176345632
    """

    sums: Tensor
    weights: Tensor

    @classmethod
    def of(cls, references: Tensor, overlaps: NDArray[np.float64]) -> Chance:
        """Of maps (folds, k, d, d, d) that each fold was compared with.

        Parameters
        ----------
        references : Tensor (folds, k, d, d, d)
        overlaps : array (folds, k, k)
            Sums over the particles of each fold of products of the probabilities of two classes.
        """
        shared = torch.from_numpy(overlaps).to(references)
        weights = shared.sum(2)
        weighed = references * weights[:, :, None, None, None]
        return cls(weighed - torch.einsum("fkl,flzyx->fkzyx", shared, references), weights)

    def mean(self, number: int, folds: Sequence[int]) -> Tensor:
        """Difference (d, d, d) of a class from all in some folds."""
        folds = list(folds)
        return self.sums[folds, number].sum(0) / self.weights[folds, number].sum().clamp_min(1e-9)


def kept(difference: Tensor, correlation: Tensor, *, halves: float = 2) -> Tensor:
    """What is there of a difference, by the correlation of those that two halves of it give.

    Parameters
    ----------
    difference : Tensor (d, d, d)
    correlation : Tensor (shells,)
    halves : float
        Particles that the difference is of, in halves.

    Returns
    -------
    Tensor (d, d, d)

    Notes
    -----
    A class has few particles, and differs from the others in few places. With the map of all particles for
    its prior's mean, and the power of the difference for its variance, what the class does not say is that of
    all particles and not nothing. Halves whose differences correlate by f give Wiener's factor, shell by
    shell: 2 f / (1 + f) of their mean, h f / (1 - f + h f) of h of them.
    """
    shape = tuple(difference.shape)
    shells = (frequency_radius(shape, dtype=torch.float64) * shape[0]).round().long()
    factor = correlation.clamp(0, 1).to(difference)
    factor = (halves * factor / (1 + (halves - 1) * factor))[
        shells.clamp_max(len(factor) - 1).to(difference.device)
    ]
    return irfft3(rfft3(difference) * factor, shape=shape)


def where_strong(difference: Tensor, noise: float, *, sigma_px: float, least: float) -> Tensor:
    """Weight (d, d, d) of a difference by its power over that of noise nearby: Wiener's, place by place.

    Parameters
    ----------
    difference : Tensor (d, d, d)
    noise : float
        Mean square of the noise in it.
    sigma_px : float
        Standard deviation of what counts as nearby.
    least : float
        Weight that there is everywhere.
    """
    shape = tuple(difference.shape)
    waves = frequency_radius(shape, dtype=torch.float64).to(difference.device)
    blur = (-2 * (math.pi * waves * sigma_px).square()).exp().to(difference)
    power = irfft3(rfft3(difference.square()) * blur, shape=shape)
    return (1 - noise / power.clamp_min(1e-30)).clamp(least, 1)


def added(parts: Sequence[AnySums]) -> AnySums:
    """Sums of several parts, in their order."""
    whole = parts[0]
    for part in parts[1:]:
        whole = whole + part
    return whole
