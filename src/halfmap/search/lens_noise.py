"""Noise of images of which a part, that of the ice, has passed the lens as the particle has."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfmap.ops.fourier import irfft2, rfft2
from halfmap.ops.grids import ring_index, ring_sums
from halfmap.search.disc import FourierDisc

_RIDGE = 1e-3
"""Variance of the squared CTF over its squared mean, below which images do not tell the parts apart."""

_FLOOR = 1e-3
"""Power over the mean of all rings that there is on each ring at least."""

_LEAST = 0.1
"""Part of the noise that has not passed the lens, at least."""


@dataclass(frozen=True, eq=False)
class LensNoise:
    """Power of the noise on rings, group by group.

    Attributes
    ----------
    detector, specimen : Tensor (groups, rings)
        Power that is there in all images, and that which is multiplied by the squared CTF.

    Notes
    -----
    Ice scatters as the particle does, so that its power has the image's Thon rings. Taken for the mean over
    all images, noise is too low just where the signal is strong, and posteriors are too sure.
    """

    detector: Tensor
    specimen: Tensor

    def of_images(self, group: Tensor, transfer: Tensor) -> Tensor:
        """Power (b, rings) of images of some groups (b,), whose mean squared CTFs on rings are (b, rings)."""
        rings = transfer.shape[1]
        return self.detector[group, :rings] + self.specimen[group, :rings] * transfer


@dataclass(frozen=True, eq=False)
class NoiseSums:
    """Sums over images, for the regression of their power on the squared CTF.

    Attributes
    ----------
    moments : Tensor (5, groups, rings), float64
        Of one, the squared CTF, its square, the power, and the product of power and squared CTF.
    """

    moments: Tensor

    @classmethod
    def empty(cls, groups: int, rings: int) -> NoiseSums:
        """Sums of nothing."""
        return cls(torch.zeros(5, groups, rings, dtype=torch.float64))

    def add(self, power: Tensor, transfer: Tensor, group: Tensor) -> None:
        """Add images with their power and mean squared CTF on rings (b, rings), in place."""
        y, c = power.double().cpu(), transfer.double().cpu()
        self.moments.index_add_(1, group.cpu(), torch.stack([torch.ones_like(y), c, c * c, y, y * c]))

    def fit(self) -> LensNoise:
        """Both parts of the noise, neither negative; groups without images have the mean of the others."""
        whole = self.moments.sum(1, keepdim=True)
        moments = torch.where(self.moments[:1] > 0, self.moments, whole)
        _, c, cc, y, yc = moments / moments[:1].clamp_min(1)
        variance = cc - c.square() + _RIDGE * c.square()
        slope = torch.where(variance > 0, (yc - y * c) / variance, 0.0)
        slope = slope.clamp_min(0).minimum((1 - _LEAST) * y / c.clamp_min(1e-9))
        # Images whose mean was taken away have no power on the innermost ring.
        detector = (y - slope * c).maximum(_FLOOR * y.mean(-1, keepdim=True))
        return LensNoise(detector.float(), slope.float())


def leakage(mask: Tensor) -> Tensor:
    """Where the power of noise goes when images are masked.

    Parameters
    ----------
    mask : Tensor (n, n)
        Soft, round about the centre.

    Returns
    -------
    Tensor (n // 2, n // 2), float64
        In each row the parts that the rings of whole images have in the power on a ring of the masked ones,
        which is relative to that of white noise: rows sum to 1.

    Notes
    -----
    A mask convolves the spectrum with its own. Where that of the noise is flat it stays as it is; where it
    falls steeply, as that of images that were low-passed, a ring holds more from its neighbours than of its
    own.
    """
    shape, n = tuple(mask.shape), len(mask) // 2
    correlation = irfft2(rfft2(mask.double()).abs().square(), shape=shape)
    index = ring_index(shape, device=mask.device)
    spread = (rfft2(irfft2((index == ring).double(), shape=shape) * correlation).real for ring in range(n))
    sums = torch.stack([ring_sums(part, shape=shape)[:n] for part in spread], dim=1)
    return sums / sums.sum(1, keepdim=True)


def ring_means(disc: FourierDisc, values: Tensor) -> Tensor:
    """Mean (b, rings) over each ring of values (b, p) in a disc."""
    sums = values.new_zeros(len(values), disc.radius + 1)
    sums.index_add_(1, disc.rings, values * disc.multiplicity)
    count = disc.multiplicity.new_zeros(disc.radius + 1).index_add_(0, disc.rings, disc.multiplicity)
    return sums / count
