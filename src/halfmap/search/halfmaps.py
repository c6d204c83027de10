"""Two half maps from the sums of two half sets: unfiltered ones, filtered ones, their correlation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from halfmap.errors import FileFormatError, ParameterError, ShapeError
from halfmap.io.atomic import atomic_path
from halfmap.ops.fourier import irfft3, rfft3
from halfmap.ops.grids import frequency_radius
from halfmap.ops.slices import SliceAccumulator
from halfmap.search.backprojector import Backprojection
from halfmap.search.regularise import Halves
from halfmap.search.regularise.fsc import _shells, shell_sums

_LEAST, _MOST = 1e-3, 0.999
"""Range of the correlation that is believed: next to none beyond the signal, short of one within."""

_FLOOR = 1e-3
"""Weight over the mean of its shell below which a voxel is damped, in maps that are not filtered."""


@dataclass(frozen=True, eq=False)
class HalfSums:
    """Sums of both half sets, to be solved in more than one way.

    Attributes
    ----------
    halves : pair of Backprojection
        With all symmetry applied.
    weights : Tensor (shells,), float64
        Mean weight of each shell.
    """

    halves: Halves
    weights: Tensor

    @classmethod
    def of(cls, halves: Halves) -> HalfSums:
        """From sums of one radius, symmetrised."""
        sums = shell_sums(halves[0].sums, halves[1].sums)
        weights = (sums[3] / sums[4].clamp_min(1)).clamp_min(torch.finfo(torch.float32).tiny)
        return cls(halves, weights)

    def unfiltered(self) -> tuple[Tensor, Tensor]:
        """Maps (box, box, box) without any prior but where hardly anything was seen."""
        prior = self._spread(_FLOOR * self.weights)
        return self.halves[0].solve(prior), self.halves[1].solve(prior)

    def prior(self, correlation: Tensor) -> Tensor:
        """Reciprocal of the signal's power for `Backprojection.solve`, by the correlation of the halves.

        Parameters
        ----------
        correlation : Tensor (shells or more,)
            Of the half maps as they are to be used: of masked ones where they will be masked.

        Notes
        -----
        In a shell of mean weight w, whose averages have noise of power 1 / w, the correlation f makes the
        signal's power ``f / (1 - f) / w``, relative to the noise that is left after masking. See
        `regularise.fsc.FSCRegulariser`.
        """
        n = len(self.weights)
        if len(correlation) < n:
            raise ParameterError(f"a correlation of {len(correlation)} shells for maps of {n}")
        snr = correlation[:n].double().to(self.weights).clamp(_LEAST, _MOST)
        return self._spread(self.weights * (1 - snr) / snr)

    def _spread(self, shells: Tensor) -> Tensor:
        """Values of shells at the voxels of the sums."""
        sums = self.halves[0].sums
        return shells.to(sums.data)[_shells(sums).clamp_max(len(shells) - 1)]


def without(whole: Backprojection, part: Backprojection) -> Backprojection:
    """Sums without some of the images that were added to them."""
    if whole.sums.data.shape != part.sums.data.shape or whole.group != part.group:
        raise ShapeError("sums of different radii or point groups cannot be subtracted")
    data = whole.sums.data - part.sums.data
    # Rounding leaves less than nothing where all weight was the part's.
    data[..., 2].clamp_(min=0)
    return Backprojection(SliceAccumulator(data, whole.sums.box, whole.sums.padded_box), whole.group)


def save_sums(path: Path, sums: Backprojection) -> None:
    """Write symmetrised sums as one array, which `load_sums` maps into memory instead of reading it."""
    with atomic_path(path, durable=False) as temporary, temporary.open("wb") as file:
        np.save(file, sums.sums.data.cpu().numpy())


def load_sums(path: Path, box: int, padded_box: int, *, device: str = "cpu") -> Backprojection:
    """Sums that `save_sums` wrote, of images of `box` pixels; not to be added to in place.

    Raises
    ------
    FileFormatError
        If the file holds none.
    """
    try:
        data = np.load(path, mmap_mode="c")
    except (OSError, ValueError) as error:
        raise FileFormatError("holds no sums of slices", path=path) from error
    return Backprojection(SliceAccumulator(torch.from_numpy(data).to(device), box, padded_box))


def joined(own: Tensor, other: Tensor, *, radius: float) -> Tensor:
    """Map (d, d, d) of one half set with low frequencies, below a radius in Fourier pixels, of both.

    What is that coarse is common to both half sets anyhow; sharing it keeps them in one orientation.
    """
    shape = own.shape
    low = frequency_radius(tuple(shape), dtype=torch.float64).to(own.device) * shape[0] < radius
    spectrum = rfft3(own)
    return irfft3(torch.where(low, (spectrum + rfft3(other)) / 2, spectrum), shape=shape)


def believed(correlation: Tensor, *, least: float = 0.03) -> Tensor:
    """Correlation (shells,) up to where it first falls to nothing, and zero from there on."""
    seen = (correlation[1:] > least).int().cumprod(0)
    return torch.cat([correlation[:1].clamp_min(least), correlation[1:] * seen]).clamp(0, 1)


def radius_at(correlation: Tensor, threshold: float) -> int:
    """Last shell before a correlation (shells,) first falls below a threshold, 0 if it does at once."""
    return int((correlation[1:] >= threshold).int().cumprod(0).sum())
