"""FSC-Q: to what detail map and model agree around each atom, against that of the half maps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.ops.filters import radial_average, radial_profile_to_grid
from halfmap.ops.fourier import irfft3, rfft3
from halfmap.ops.interpolation import sample_volume
from halfmap.ops.local_correlation import Band, bands, shells, smoothed
from halfmap.steps.fit.compare import Agreement
from halfmap.steps.fit.place import Given

MODEL_LEVEL, HALVES_LEVEL = 0.67, 0.5
"""Local correlation of map and model, and of half maps, at which detail is read off."""

_COARSEST_A, _FIRST = 40.0, 3.0
"""Detail of the first band, or the shell that it is at least at."""

_OVERLAP = 2

_NOTHING = 1e-12
"""Power of a shell over the strongest one's, below which the model's map holds nothing there."""


@dataclass(frozen=True, eq=False)
class FscQ:
    """Local detail at atoms, Å (n,).

    Attributes
    ----------
    model : array
        To which the mean of the half maps agrees with the model.
    halves : array
        To which the half maps agree.
    """

    model: NDArray[np.float64]
    halves: NDArray[np.float64]

    @property
    def difference(self) -> NDArray[np.float64]:
        """FSC-Q (n,), Å: above 0 where the model does not explain the map."""
        return self.model - self.halves

    @property
    def relative(self) -> NDArray[np.float64]:
        """FSC-Qr (n,): over the half maps' local resolution."""
        return self.difference / self.halves


def fsc_q(given: Given, voxels: NDArray[np.float64], agreement: Agreement) -> FscQ:
    """Compare local correlations of half maps, and of their mean with the model, at atoms (n, 3) in voxels.

    Both are taken band by band of frequencies in the same windows, within the mask, and followed at each atom
    from coarse to fine detail until they fall below their level for the first time.
    """
    assert given.halves is not None
    halves, mask = given.halves, agreement.mask
    side = halves.box * halves.pixel_size
    middles = shells(halves.box, max(_FIRST, side / _COARSEST_A), overlap=_OVERLAP)
    middles = [each for each in middles if each <= halves.last_shell]
    outside = ((voxels < 0) | (voxels > halves.box - 1)).any(axis=1)
    points = torch.from_numpy(voxels)
    how = {"mask": mask, "middles": middles, "overlap": _OVERLAP}
    mean = halves.mean
    pairs = ((mean, _equalised(agreement.simulated, mean, mask)), (halves.first, halves.second))
    found = []
    for (one, two), level in zip(pairs, (MODEL_LEVEL, HALVES_LEVEL), strict=True):
        curves = np.stack([_at(band, points) for band in bands(one, two, **how)])
        found.append(np.where(outside, np.nan, side / _fallen(curves, np.array(middles), level)))
    return FscQ(found[0], found[1])


def _equalised(model: Tensor, volume: Tensor, mask: Tensor) -> Tensor:
    """Model's map with the power of the map in every shell: a shell without any would have no correlation."""
    shape = tuple(model.shape)
    ours, theirs = (
        radial_average(rfft3(each * mask).abs().square(), shape=shape) for each in (volume, model)
    )
    held = theirs > _NOTHING * theirs.max()
    factors = torch.where(held, ours / theirs.where(held, 1.0), 0.0).sqrt()
    return irfft3(rfft3(model) * radial_profile_to_grid(factors, shape=shape), shape=shape)


def _at(band: Band, points: Tensor) -> NDArray[np.float64]:
    """Correlation of the two maps of a band, about each point (n, 3) in voxels of the whole box."""
    one, two = band.mean + band.apart, band.mean - band.apart
    width = band.width * len(one) / band.box
    products = torch.stack([one * two, one.square(), two.square()])
    local = torch.stack([smoothed(each, width=width, over=band.inside) for each in products])
    cross, first, second = sample_volume(
        local.float(), (points * (len(one) / band.box)).float(), outside="nearest"
    ).double()
    norm = (first * second).clamp_min(0).sqrt()
    return torch.where(norm > 0, cross / norm.clamp_min(1e-30), 0.0).clamp(-1, 1).numpy()


def _fallen(curves: NDArray[np.float64], middles: NDArray[np.float64], level: float) -> NDArray[np.float64]:
    """Shell (n,) at which each curve (bands, n) falls below a level first; the last one if it never does."""
    below = curves < level
    band = np.where(below.any(axis=0), below.argmax(axis=0), len(middles) - 1)
    number = np.arange(curves.shape[1])
    here, before = curves[band, number], curves[np.maximum(band - 1, 0), number]
    part = np.where(below.any(axis=0) & (band > 0), (before - level) / np.maximum(before - here, 1e-12), 1.0)
    low = middles[np.maximum(band - 1, 0)]
    return low + part * (middles[band] - low)
