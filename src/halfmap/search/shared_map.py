"""Maps of classes that have most in common: what of their differences is there, and the rest shared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from halfmap.ops.fourier import irfft3, rfft3
from halfmap.ops.grids import frequency_radius
from halfmap.search.halfmaps import AnySums


def with_difference(shared: Tensor, difference: Tensor, correlation: Tensor) -> Tensor:
    """Map of a class: that of all particles, and of the difference as much as is there.

    Parameters
    ----------
    shared : Tensor (d, d, d)
        Map of all particles, filtered.
    difference : Tensor (d, d, d)
        Of unfiltered maps of the class and of all particles, masked.
    correlation : Tensor (shells,)
        Of the differences that two halves of the particles give.

    Returns
    -------
    Tensor (d, d, d)

    Notes
    -----
    A class has few particles, and differs from the others in few places. With the shared map for its prior's
    mean, and the power of the difference for its variance, what the class does not say is that of all
    particles and not nothing. Halves whose differences correlate by f give Wiener's factor of their mean,
    2 f / (1 + f), shell by shell.
    """
    shape = tuple(difference.shape)
    shells = (frequency_radius(shape, dtype=torch.float64) * shape[0]).round().long()
    kept = correlation.clamp(0, 1).to(difference)
    kept = (2 * kept / (1 + kept))[shells.clamp_max(len(kept) - 1).to(difference.device)]
    return shared + irfft3(rfft3(difference) * kept, shape=shape)


def added(parts: Sequence[AnySums]) -> AnySums:
    """Sums of several parts, in their order."""
    whole = parts[0]
    for part in parts[1:]:
        whole = whole + part
    return whole
