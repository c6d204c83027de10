"""Two maps on one grid: read, checked, and aligned."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from halfmap.errors import FileFormatError, ParameterError, ShapeError
from halfmap.io.volumes import MapFile, read_volume
from halfmap.log import log
from halfmap.ops.envelope import find_region
from halfmap.ops.fourier import resample
from halfmap.ops.masks import soft_edge, soft_sphere
from halfmap.ops.regrid import regrid
from halfmap.ops.rotations import angular_distance
from halfmap.search.volume_alignment import Alignment, align_volume, inverted
from halfmap.steps.compare.noise import Halves, read_halves

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.compare.step import CompareStep

_SAME = 1e-5
"""Standard deviation of what two maps differ by, over that of one, below which they are the same."""

_SIZES = 0.2, 5.0
"""Side of one box over the other's, beyond which the voxel size is doubted."""

_VOXELS = 1e-2
"""Relative difference of the voxel sizes of map and mask that rounding explains."""

_EXTEND_PX, _EDGE_PX = 3.0, 6.0
"""What a mask that is made leaves around the particle's surface, and its soft edge."""

_LIKELY = 0.2
"""Correlation of aligned maps over chance from which on they are of one structure."""

_SAMPLED = 2.5
"""Voxels of the grid of an alignment, for the finest detail compared."""


@dataclass(frozen=True, eq=False)
class Pair:
    """Two maps on the grid of the first.

    Attributes
    ----------
    a, b : Tensor (n, n, n)
    mask : Tensor (n, n, n)
        0 to 1.
    pixel_size : float
        Å.
    origin : tuple of 3 float
        (x, y, z) of the first voxel in Å.
    paths : pair of Path
    last_shell : int
        Beyond it the second map has no waves.
    halves : pair of Halves or None
        Half maps of both, if given.
    alignment : Alignment or None
        How b came onto a, shift in voxels of this grid.
    other_hand : float or None
        Correlation of the hand that was not taken.
    """

    a: Tensor
    b: Tensor
    mask: Tensor
    pixel_size: float
    origin: tuple[float, float, float]
    paths: tuple[Path, Path]
    last_shell: int
    halves: tuple[Halves, Halves] | None = None
    alignment: Alignment | None = None
    other_hand: float | None = None

    @property
    def box(self) -> int:
        """Side in voxels."""
        return len(self.a)

    @property
    def side(self) -> float:
        """Side in Å."""
        return len(self.a) * self.pixel_size

    @property
    def inside(self) -> Tensor:
        """Where figures are taken, (n, n, n) of bool."""
        return self.mask > 0.5


def read(step: CompareStep, ctx: Context) -> Pair:
    """Read both maps and the mask, or make one of the first map, and put the second onto the first's grid.

    Raises
    ------
    FileFormatError, ShapeError, ParameterError
        If a map or the mask cannot be used, or both maps are the same.
    """
    if len(step.maps) != 2:
        raise ParameterError(f"two maps are compared, not {len(step.maps)}", hint="give a first and a second")
    first, second = (ctx.resolve(path) for path in step.maps)
    one = read_volume(first, pixel_size=step.pixel_size_a, cubic=True)
    two = read_volume(second, pixel_size=step.pixel_size_b, cubic=True)
    sides = [len(each.array) * each.pixel_size for each in (one, two)]
    if not _SIZES[0] < sides[0] / sides[1] < _SIZES[1]:
        message = f"is {sides[1]:.0f} Å wide, but {one.path} {sides[0]:.0f} Å"
        hint = "are the voxel sizes right? Give --pixel-size-a or --pixel-size-b"
        raise ParameterError(message, path=two.path, hint=hint)
    a, b = (torch.from_numpy(each.array) for each in (one, two))
    own = len(b)
    b = regrid(b - _around(b), pixel_size=two.pixel_size, box=len(a), new_pixel_size=one.pixel_size)
    if len(a) != own or abs(one.pixel_size - two.pixel_size) > 1e-4 * one.pixel_size:
        log.info("%s was put on %d³ voxels of %.4g Å", two.path, len(a), one.pixel_size)
    _refuse_same(a, b, one, two)
    _tell_origins(one, two)
    mask = _mask(step, ctx, one, a)
    last = min(len(a) // 2, math.floor(sides[0] / (2 * two.pixel_size) + 1e-6))
    halves = _halves(step, ctx, one, two)
    return Pair(a, b, mask, one.pixel_size, one.origin, (one.path, two.path), last, halves)


def _halves(step: CompareStep, ctx: Context, one: MapFile, two: MapFile) -> tuple[Halves, Halves] | None:
    if step.half_a is None or step.half_b is None:
        return None
    first = read_halves(ctx.resolve(step.half_a), one, pixel_size=step.pixel_size_a)
    second = read_halves(ctx.resolve(step.half_b), two, pixel_size=step.pixel_size_b)
    box = len(one.array)
    return first, second.on_grid(two.pixel_size, box=box, new_pixel_size=one.pixel_size)


def aligned(step: CompareStep, pair: Pair) -> Pair:
    """Turn and move the second map onto the first, and mirror it if that fits better.

    Raises
    ------
    ParameterError
        If the box is too small for the detail to be compared.
    """
    finest = max(step.align_resolution, 3 * pair.pixel_size)
    # Alignment takes its time with voxels, and compares none of the detail that small ones hold.
    box = min(pair.box, 2 * round(_SAMPLED * pair.side / finest / 2))
    frequency = min(round(pair.side / finest), box // 2 - 1)
    if frequency < 4:
        raise ParameterError(
            f"a box of {pair.side:.0f} Å is too small to be aligned at {finest:.3g} Å",
            hint="give a smaller --align-resolution",
        )
    a, b, mask = (resample(each, new_shape=(box,) * 3) for each in (pair.a, pair.b, pair.mask))
    places = (mask > 0.5).nonzero().double() - box // 2
    radius = min(float(places.norm(dim=1).max()) + 2, 0.47 * box)
    sphere = soft_sphere((box,) * 3, radius=radius, edge=0.03 * box)
    how = {"mask": sphere, "radius_px": radius, "frequency": frequency, "hands": False}
    found = [align_volume(b, a, **how)]
    if step.hands:
        found.append(replace(align_volume(inverted(b), a, **how), mirrored=True))
    best = max(found, key=lambda one: one.correlation)
    best = replace(best, shift_px=best.shift_px * (pair.box / box))
    other = next((one.correlation for one in found if one.mirrored != best.mirrored), None)
    _tell_alignment(best, other, pair.pixel_size)
    halves = None if pair.halves is None else (pair.halves[0], pair.halves[1].aligned(best))
    return replace(pair, b=best.apply(pair.b), halves=halves, alignment=best, other_hand=other)


def _tell_alignment(found: Alignment, other: float | None, pixel_size: float) -> None:
    angle = float(angular_distance(found.rotation, torch.eye(3, dtype=torch.float64)))
    shift = float(found.shift_px.norm()) * pixel_size
    mirrored = ", mirrored" if found.mirrored else ""
    log.info(
        "the second map was turned by %.1f° and moved by %.1f Å%s: correlation %.3f",
        *(angle, shift, mirrored, found.correlation),
    )
    if other is not None:
        log.info("the other hand reaches a correlation of %.3f", other)
    if found.over_chance < _LIKELY:
        log.warning(
            "aligned, the maps are hardly more alike than any two of their outline: correlation %.3f, by "
            "chance %.3f. Do they show the same structure?",
            *(found.correlation, found.chance),
        )


def _mask(step: CompareStep, ctx: Context, one: MapFile, a: Tensor) -> Tensor:
    if step.mask is None:
        try:
            region = find_region(a, pixel_size=one.pixel_size).region
        except ParameterError as error:
            raise ParameterError(error.message, path=one.path, hint="give a --mask: halfmap mask") from None
        extend, width = (px * one.pixel_size for px in (_EXTEND_PX, _EDGE_PX))
        return soft_edge(region, extend=extend, width=width, pixel_size=one.pixel_size)
    found = read_volume(ctx.resolve(step.mask), cubic=True, may_be_flat=True, pixel_size=None)
    same = abs(found.pixel_size - one.pixel_size) <= _VOXELS * one.pixel_size
    if found.array.shape != one.array.shape or not same:
        sizes = [f"{len(each.array)}³ voxels of {each.pixel_size:g} Å" for each in (found, one)]
        message = f"the mask has {sizes[0]}, the first map {sizes[1]}"
        raise ShapeError(message, path=found.path, hint="make one of the first map: halfmap mask")
    low, high = float(found.array.min()), float(found.array.max())
    if low < -0.01 or high > 1.01 or not high > 0.5:
        message = f"is no mask: its values go from {low:.3g} to {high:.3g}"
        raise ParameterError(message, path=found.path, hint="values must be 0 outside and 1 inside")
    return torch.from_numpy(found.array.clip(0, 1))


def _refuse_same(a: Tensor, b: Tensor, one: MapFile, two: MapFile) -> None:
    """Refuse maps that are the same but for scale and offset, of which nothing could be said."""
    first, second = (each.double() - each.double().mean() for each in (a, b))
    size = float(first.norm())
    factor = float((first * second).sum() / second.square().sum().clamp_min(1e-30))
    if float((first - factor * second).norm()) > _SAME * size:
        return
    how = "" if abs(factor - 1) < _SAME else f", but for a factor of {1 / factor:.4g}"
    raise FileFormatError(
        f"is the same map as {one.path.name}{how}: there is nothing to compare",
        path=two.path,
        hint="give two different maps",
    )


def _tell_origins(one: MapFile, two: MapFile) -> None:
    middles = [np.array(each.origin) + len(each.array) // 2 * each.pixel_size for each in (one, two)]
    apart = float(np.linalg.norm(middles[0] - middles[1]))
    if apart > 2 * one.pixel_size and any(one.origin) and any(two.origin):
        log.warning(
            "by their headers' origins, the centres of the boxes are %.1f Å apart; they are put onto each "
            "other all the same. Give --align if the maps are not",
            apart,
        )


def _around(volume: Tensor) -> float:
    """Mean of what is at the borders of a box."""
    faces = torch.ones(volume.shape, dtype=torch.bool)
    faces[1:-1, 1:-1, 1:-1] = False
    return float(volume[faces].mean())
