"""The noise of two maps by their half maps: how strong it is about each voxel."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from halfmap.errors import ShapeError
from halfmap.io.half_maps import read_half_maps
from halfmap.io.volumes import MapFile
from halfmap.ops.filters import radial_average, radial_profile_to_grid
from halfmap.ops.fourier import irfft3, rfft3
from halfmap.ops.local_correlation import smoothed
from halfmap.ops.regrid import regrid
from halfmap.search.volume_alignment import Alignment

_VOXELS = 1e-3
"""Relative difference of the voxel sizes of map and half maps that rounding explains."""


@dataclass(frozen=True, eq=False)
class Halves:
    """Two half maps.

    Attributes
    ----------
    mean, apart : Tensor (n, n, n)
        Half of their sum, and of their difference, which has the noise of the mean.
    """

    mean: Tensor
    apart: Tensor

    def on_grid(self, pixel_size: float, *, box: int, new_pixel_size: float) -> Halves:
        """The same on another grid."""
        mean, apart = (
            regrid(each, pixel_size=pixel_size, box=box, new_pixel_size=new_pixel_size)
            for each in (self.mean, self.apart)
        )
        return Halves(mean, apart)

    def aligned(self, alignment: Alignment) -> Halves:
        """The same as their map came onto another."""
        return Halves(alignment.apply(self.mean), alignment.apply(self.apart))

    def noise_in(self, volume: Tensor, mask: Tensor) -> Tensor:
        """What the noise of a map is like that is their mean, but for a filter: (n, n, n).

        The filter is the ratio of amplitudes within a mask (n, n, n), shell by shell.
        """
        spectra = (rfft3(each * mask) for each in (volume, self.mean))
        own, theirs = (radial_average(each.abs().square(), shape=mask.shape).double() for each in spectra)
        gain = (own / theirs.clamp_min(1e-300)).sqrt().to(volume)
        return irfft3(rfft3(self.apart) * radial_profile_to_grid(gain, shape=mask.shape), shape=mask.shape)


def read_halves(path: Path, volume: MapFile, *, pixel_size: float | None) -> Halves:
    """Read the half maps of a map, the second by the name of the first.

    Raises
    ------
    FileFormatError, ShapeError
        If they cannot be used, or have another box than the map.
    """
    found = read_half_maps(path, pixel_size=pixel_size)
    same = abs(found.pixel_size - volume.pixel_size) <= _VOXELS * volume.pixel_size
    if (found.box,) * 3 != volume.array.shape or not same:
        raise ShapeError(
            f"has {found.box}³ voxels of {found.pixel_size:g} Å, but {volume.path} {len(volume.array)}³ of "
            f"{volume.pixel_size:g} Å",
            path=path,
            hint="give a half map of this map",
        )
    return Halves(found.mean, (found.first - found.second) / 2)


def deviation(first: Tensor, second: Tensor, *, width: float) -> Tensor:
    """Standard deviation (n, n, n) of the difference of two noises, in a window of a width in voxels.

    Without the floor, a voxel that a mask has set to one value would be infinitely sure.
    """
    variance = smoothed(first.square() + second.square(), width=width, over=torch.ones_like(first))
    return variance.clamp_min(1e-6 * float(variance.max())).clamp_min(torch.finfo(torch.float32).tiny).sqrt()
