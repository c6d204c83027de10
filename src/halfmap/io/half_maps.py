"""Read two half maps that belong together, and the mask that they are compared in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from halfmap.errors import FileFormatError, ParameterError, ShapeError
from halfmap.io.volumes import MapFile, read_volume
from halfmap.log import log
from halfmap.ops.envelope import find_region
from halfmap.ops.filters import radial_average
from halfmap.ops.fourier import rfft3
from halfmap.ops.fsc import CorrectedFSC, corrected_fsc, fsc, resolution
from halfmap.ops.masks import around_region

_NAMES = (("half1", "half2"), ("half_map_1", "half_map_2"), ("half_A", "half_B"), ("half_a", "half_b"))
"""How RELION, the data bank and cryoSPARC tell half maps apart."""

_FALL, _WITHIN = 0.1, 3
"""Factor by which the noise of half maps falls within so many shells if a filter ends there."""

_FIRST = 4
"""Shell from which on a filter is looked for: noise may fall as steeply before."""

_SAME = 1e-5
"""Standard deviation of the difference of two maps over that of one, below which they are the same."""

_VOXELS = 1e-3
"""Relative difference of voxel sizes that rounding explains."""


@dataclass(frozen=True, eq=False)
class HalfMaps:
    """Two half maps.

    Attributes
    ----------
    first, second : Tensor (n, n, n), float32
    pixel_size : float
        Å.
    origin : tuple of 3 float
        (x, y, z) of the first voxel in Å.
    paths : pair of Path
    last_shell : int
        Beyond it there is no noise, and what half maps agree in is what a filter or a mask has left.
    """

    first: Tensor
    second: Tensor
    pixel_size: float
    origin: tuple[float, float, float]
    paths: tuple[Path, Path]
    last_shell: int

    @property
    def box(self) -> int:
        """Side in voxels."""
        return len(self.first)

    @property
    def mean(self) -> Tensor:
        """Of both."""
        return (self.first + self.second) / 2

    def corrected_fsc(
        self, mask: Tensor, *, randomise_below: float = 0.8, draws: int = 5, generator: torch.Generator
    ) -> CorrectedFSC:
        """Correlation within a mask, corrected for it; nothing beyond the last shell with noise of its own.

        Parameters
        ----------
        mask : Tensor (n, n, n)
        randomise_below, draws, generator
            As for `halfmap.ops.fsc.corrected_fsc`.
        """
        how = {"randomise_below": randomise_below, "draws": draws, "generator": generator}
        found = corrected_fsc(self.first, self.second, mask=mask, **how)
        known = torch.arange(len(found.corrected)) <= self.last_shell
        return found._replace(corrected=torch.where(known, found.corrected, 0.0))


def read_half_maps(first: Path, second: Path | None = None, *, pixel_size: float | None = None) -> HalfMaps:
    """Read two half maps.

    Parameters
    ----------
    first, second : path
        MRC files; without the second, the one whose name differs as those of half maps do.
    pixel_size : float, optional
        In Å, instead of the headers'.

    Raises
    ------
    FileFormatError
        If a file is no map, a network had a part in it, there is no second one, or both are the same.
    ShapeError
        If they are no cubes, or have not the same box and voxels.

    Notes
    -----
    Warns where both have been filtered, or the images were: what they correlate by says nothing beyond.
    """
    second = other_half(first) if second is None else second
    one, two = (read_volume(path, pixel_size=pixel_size, cubic=True) for path in (first, second))
    same = abs(one.pixel_size - two.pixel_size) <= _VOXELS * one.pixel_size
    if one.array.shape != two.array.shape or not same:
        mine, its = (_size(volume) for volume in (two, one))
        raise ShapeError(f"has {mine}, but {first} {its}", path=second, hint="give both halves of one map")
    maps, paths = [torch.from_numpy(each.array) for each in (one, two)], (first, second)
    last = _last_shell(maps[0], maps[1], paths)
    if last < len(maps[0]) // 2:
        log.warning(
            "the noise of the half maps ends at %.3g Å: they, or the particles, were filtered. What they "
            "agree in beyond says nothing; give unfiltered half maps if there are any",
            len(maps[0]) * one.pixel_size / last,
        )
    return HalfMaps(maps[0], maps[1], one.pixel_size, one.origin, paths, last)


def other_half(path: Path) -> Path:
    """Path of the second half map, by the name of the first.

    Raises
    ------
    FileFormatError
        If the name tells nothing, or there is no such file.
    """
    for one, two in _NAMES:
        if one in path.name:
            found = path.with_name(path.name.replace(one, two))
            if found.exists():
                return found
            raise FileFormatError(
                f"there is no {found.name} beside it", path=path, hint="give both half maps"
            )
    raise FileFormatError("the name does not say which half it is", path=path, hint="give both half maps")


def read_map_mask(path: Path, halves: HalfMaps) -> Tensor:
    """Read a mask of half maps' box.

    Raises
    ------
    ShapeError
        If it has another box or other voxels.
    ParameterError
        If it is not a mask.
    """
    found = read_volume(path, pixel_size=None, cubic=True, may_be_flat=True)
    same = abs(found.pixel_size - halves.pixel_size) <= 10 * _VOXELS * halves.pixel_size
    if len(found.array) != halves.box or not same:
        its = f"{halves.box}³ voxels of {halves.pixel_size:g} Å"
        hint = "make one in their box: halfmap mask"
        raise ShapeError(f"the mask has {_size(found)}, the half maps {its}", path=path, hint=hint)
    low, high = float(found.array.min()), float(found.array.max())
    if low < -0.01 or high > 1.01 or not high > 0:
        message = f"is no mask: its values go from {low:.3g} to {high:.3g}"
        raise ParameterError(message, path=path, hint="values must be 0 outside and 1 inside")
    return torch.from_numpy(found.array.clip(0, 1))


def particle_mask(halves: HalfMaps, path: Path | None = None) -> Tensor:
    """Mask of half maps: one that is given, or one that is made of their mean.

    Raises
    ------
    ShapeError, ParameterError
        If the one given cannot be used, or no particle stands out of the noise.
    """
    if path is not None:
        return read_map_mask(path, halves)
    try:
        found = find_region(halves.mean, pixel_size=halves.pixel_size)
    except ParameterError as error:
        hint = "give a --mask: halfmap mask"
        raise ParameterError(error.message, path=halves.paths[0], hint=hint) from None
    # The softest mask shows what the maps resolve, and this how soft it need be.
    softest = around_region(found.region, resolution=math.inf, pixel_size=halves.pixel_size)
    curve = fsc(halves.first * softest, halves.second * softest)
    detail = resolution(curve, pixel_size=halves.pixel_size, box=halves.box)
    return around_region(found.region, resolution=detail, pixel_size=halves.pixel_size)


def _size(volume: MapFile) -> str:
    return f"{volume.array.shape[0]}³ voxels of {volume.pixel_size:g} Å"


def _last_shell(first: Tensor, second: Tensor, paths: tuple[Path, Path]) -> int:
    """Last shell with noise of its own, by how steeply that of the difference falls."""
    apart, shape = first - second, tuple(first.shape)
    if float(apart.std()) <= _SAME * float(first.std()):
        raise FileFormatError(
            f"is the same map as {paths[0].name}: they agree in everything, noise too",
            path=paths[1],
            hint="give the two half maps of one refinement",
        )
    noise = radial_average(rfft3(apart).abs().square(), shape=shape).double().numpy()
    falls = noise[_FIRST + _WITHIN :] < _FALL * noise[_FIRST:-_WITHIN]
    return _FIRST + _WITHIN - 1 + int(np.argmax(falls)) if falls.any() else len(noise) - 1
