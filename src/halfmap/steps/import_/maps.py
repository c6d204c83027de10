"""Check maps, half maps and masks, and copy them into a job."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from halfmap.engine import Context, Out
from halfmap.errors import FileFormatError, ParameterError, ShapeError
from halfmap.io.mrc import write_mrc
from halfmap.io.volumes import MapFile, read_volume
from halfmap.log import log

if TYPE_CHECKING:
    from halfmap.steps.import_.step import ImportMap

KINDS = ("map", "half1", "half2", "mask")


def check(step: ImportMap, ctx: Context) -> dict[str, MapFile]:
    """Read all volumes by kind, and make sure that they are sound and belong together.

    Raises
    ------
    FileFormatError
        If one is no volume, holds NaN, states no voxel size, or a mask leaves 0 to 1.
    ShapeError
        If one is not cubic, or two differ in box or voxel size.
    """
    read = functools.partial(read_volume, pixel_size=step.pixel_size, cubic=True)
    given = {kind: getattr(step, kind) for kind in KINDS}
    volumes = {
        kind: read(ctx.resolve(path), may_be_flat=kind == "mask")
        for kind, path in given.items()
        if path is not None
    }
    first = next(iter(volumes.values()))
    for volume in volumes.values():
        same = abs(volume.pixel_size - first.pixel_size) <= 1e-3 * first.pixel_size
        if volume.array.shape != first.array.shape or not same:
            message = f"{_size(volume)}, but {first.path} {_size(first)}"
            raise ShapeError(
                message, path=volume.path, hint="import volumes of one box and voxel size together"
            )
    _check_contents(volumes)
    return volumes


def _size(volume: MapFile) -> str:
    return f"has {volume.array.shape[0]}³ voxels of {volume.pixel_size:g} Å"


def _check_contents(volumes: dict[str, MapFile]) -> None:
    mask = volumes.get("mask")
    if mask is not None and (mask.array.min() < 0 or mask.array.max() > 1 or not mask.array.any()):
        low, high = mask.array.min(), mask.array.max()
        message = f"is no mask: its values go from {low:.4g} to {high:.4g}"
        raise FileFormatError(message, path=mask.path, hint="a mask lies between 0 and 1")
    halves = [volumes[kind] for kind in ("half1", "half2") if kind in volumes]
    if len(halves) == 2 and np.array_equal(halves[0].array, halves[1].array):
        message = f"is identical to {halves[0].path}"
        raise ParameterError(
            message, path=halves[1].path, hint="half maps come from two halves of the particles"
        )


def write(ctx: Context, volumes: dict[str, MapFile], outputs: Mapping[str, Out]) -> None:
    """Write the volumes into the job folder, origins kept so that fitted models still fit."""
    for kind, volume in volumes.items():
        path = ctx.folder / outputs[kind].file
        write_mrc(path, volume.array, pixel_size=volume.pixel_size, origin=volume.origin, stack=False)
        log.info("%s %s", kind, _size(volume))
