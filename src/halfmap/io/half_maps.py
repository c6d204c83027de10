"""Read two half maps that belong together, and the mask that they are compared in."""

from __future__ import annotations

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
from halfmap.ops.masks import soft_edge

_NAMES = (("half1", "half2"), ("half_map_1", "half_map_2"), ("half_A", "half_B"), ("half_a", "half_b"))
"""How RELION, the data bank and cryoSPARC tell half maps apart."""

_FALL, _WITHIN = 0.02, 3
"""Factor by which the noise of half maps falls within so many shells if a filter ends there."""

_EXTEND_PX, _EDGE_PX = 3.0, 6.0
"""What a mask that is made leaves around the particle's surface, and its soft edge."""

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
    """

    first: Tensor
    second: Tensor
    pixel_size: float
    origin: tuple[float, float, float]
    paths: tuple[Path, Path]

    @property
    def box(self) -> int:
        """Side in voxels."""
        return len(self.first)

    @property
    def mean(self) -> Tensor:
        """Of both."""
        return (self.first + self.second) / 2


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
        If a file is no map, there is no second one, or both are the same.
    ShapeError
        If they are no cubes, or have not the same box and voxels.

    Notes
    -----
    Warns where both have been filtered: what they correlate by then says nothing beyond the filter.
    """
    second = other_half(first) if second is None else second
    one, two = (read_volume(path, pixel_size=pixel_size, cubic=True) for path in (first, second))
    same = abs(one.pixel_size - two.pixel_size) <= _VOXELS * one.pixel_size
    if one.array.shape != two.array.shape or not same:
        mine, its = (_size(volume) for volume in (two, one))
        raise ShapeError(f"has {mine}, but {first} {its}", path=second, hint="give both halves of one map")
    halves = HalfMaps(
        torch.from_numpy(one.array), torch.from_numpy(two.array), one.pixel_size, one.origin, (first, second)
    )
    _check_apart(halves)
    return halves


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
    extend, width = (px * halves.pixel_size for px in (_EXTEND_PX, _EDGE_PX))
    return soft_edge(found.region, extend=extend, width=width, pixel_size=halves.pixel_size)


def _size(volume: MapFile) -> str:
    return f"{volume.array.shape[0]}³ voxels of {volume.pixel_size:g} Å"


def _check_apart(halves: HalfMaps) -> None:
    """Refuse half maps that are one; warn of those that were filtered."""
    apart = halves.first - halves.second
    scale = float(halves.first.std())
    if float(apart.std()) <= 1e-5 * scale:
        raise FileFormatError(
            f"is the same map as {halves.paths[0].name}: they agree in everything, noise too",
            path=halves.paths[1],
            hint="give the two half maps of one refinement",
        )
    shape = tuple(apart.shape)
    noise = radial_average(rfft3(apart).abs().square(), shape=shape).double().numpy()[1:]
    falls = noise[_WITHIN:] < _FALL * noise[:-_WITHIN]
    if falls.any():
        shell = int(np.argmax(falls)) + _WITHIN
        log.warning(
            "the half maps were filtered: their noise ends at %.3g Å. No resolution beyond is known, and a "
            "B-factor is that of the filter too; give the unfiltered half maps if there are any",
            halves.box * halves.pixel_size / shell,
        )
