"""Check maps, half maps and masks, and copy them into a job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from halfmap.engine import Context, Out
from halfmap.errors import FileFormatError, ParameterError, ShapeError
from halfmap.log import log

if TYPE_CHECKING:
    import numpy as np

    from halfmap.steps.import_.step import ImportMap

KINDS = ("map", "half1", "half2", "mask")


@dataclass(frozen=True)
class Imported:
    """A volume as it was read: where from, its voxels (z, y, x), voxel size and origin (x, y, z) in Å."""

    path: Path
    array: np.ndarray
    pixel_size: float
    origin: tuple[float, float, float]


def check(step: ImportMap, ctx: Context) -> dict[str, Imported]:
    """Read all volumes by kind, and make sure that they are sound and belong together.

    Raises
    ------
    FileFormatError
        If one is no volume, holds NaN, states no voxel size, or a mask leaves 0 to 1.
    ShapeError
        If one is not cubic, or two differ in box or voxel size.
    """
    given = {kind: getattr(step, kind) for kind in KINDS}
    volumes = {
        kind: _read(ctx.resolve(path), step.pixel_size) for kind, path in given.items() if path is not None
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


def _size(volume: Imported) -> str:
    return f"has {volume.array.shape[0]}³ voxels of {volume.pixel_size:g} Å"


def _read(path: Path, pixel_size: float | None) -> Imported:
    import numpy as np

    from halfmap.io.mrc import read_header, read_mrc

    header = read_header(path)
    if header.shape[0] == 1 or ".mrcs" in path.suffixes:
        raise FileFormatError("holds images, not a volume", path=path, hint="give a 3D map")
    if len(set(header.shape)) != 1:
        z, y, x = header.shape
        hint = "cut or pad it to a cube first"
        raise ShapeError(f"is not cubic: {x} × {y} × {z} voxels (x, y, z)", path=path, hint=hint)
    if pixel_size is None:
        if header.pixel_size is None:
            hint = "give it with --pixel-size"
            raise FileFormatError("the header states no voxel size", path=path, hint=hint)
        if max(header.voxel_size) - min(header.voxel_size) > 0.01 * header.pixel_size:
            sizes = " × ".join(f"{size:g}" for size in header.voxel_size)
            hint = "give the right one with --pixel-size"
            raise FileFormatError(f"its voxels are not cubes: {sizes} Å", path=path, hint=hint)
    array = read_mrc(path).astype(np.float32)
    if not np.isfinite(array).all():
        message = f"holds {int((~np.isfinite(array)).sum())} voxels that are NaN or infinite"
        raise FileFormatError(message, path=path, hint="write the map again")
    # Headers hold float32, whose digits beyond the sixth are not what anybody entered.
    size = pixel_size if pixel_size is not None else float(f"{header.pixel_size:.6g}")
    return Imported(path, array, size, header.origin)


def _check_contents(volumes: dict[str, Imported]) -> None:
    import numpy as np

    mask = volumes.get("mask")
    if mask is not None and (mask.array.min() < 0 or mask.array.max() > 1 or not mask.array.any()):
        low, high = mask.array.min(), mask.array.max()
        message = f"is no mask: its values go from {low:.4g} to {high:.4g}"
        raise FileFormatError(message, path=mask.path, hint="a mask lies between 0 and 1")
    for kind, volume in volumes.items():
        if kind != "mask" and volume.array.min() == volume.array.max():
            raise FileFormatError("is the same everywhere", path=volume.path, hint="give a map with density")
    halves = [volumes[kind] for kind in ("half1", "half2") if kind in volumes]
    if len(halves) == 2 and np.array_equal(halves[0].array, halves[1].array):
        message = f"is identical to {halves[0].path}"
        raise ParameterError(
            message, path=halves[1].path, hint="half maps come from two halves of the particles"
        )


def write(ctx: Context, volumes: dict[str, Imported], outputs: Mapping[str, Out]) -> None:
    """Write the volumes into the job folder, origins kept so that fitted models still fit."""
    from halfmap.io.mrc import write_mrc

    for kind, volume in volumes.items():
        path = ctx.folder / outputs[kind].file
        write_mrc(path, volume.array, pixel_size=volume.pixel_size, origin=volume.origin, stack=False)
        log.info("%s %s", kind, _size(volume))
