"""Read maps for steps that work on them: checked, as float32, with voxel size and origin."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from halfmap.errors import FileFormatError, ShapeError
from halfmap.io.mrc import read_header, read_mrc

VIEWING = "For viewing only: a network had a part in it."
"""Label of maps that nothing is made or measured of."""


@dataclass(frozen=True, eq=False)
class MapFile:
    """A map as it was read.

    Attributes
    ----------
    path : Path
        File it came from.
    array : array (z, y, x) float32
        Finite densities.
    pixel_size : float
        Edge of a voxel in Å.
    origin : tuple of 3 float
        (x, y, z) of the first voxel in Å, as the header says.
    """

    path: Path
    array: NDArray[np.float32]
    pixel_size: float
    origin: tuple[float, float, float]


def read_volume(
    path: str | Path, *, pixel_size: float | None = None, cubic: bool = False, may_be_flat: bool = False
) -> MapFile:
    """Read a map.

    Parameters
    ----------
    path : path
        MRC, MAP or CCP4 file, also compressed.
    pixel_size : float, optional
        In Å, instead of the header's.
    cubic : bool
        Whether the map must have as many voxels along all axes.
    may_be_flat : bool
        Whether it may be the same everywhere, as a mask of the whole box is.

    Raises
    ------
    FileFormatError
        If it is no volume, states no voxel size, holds NaN or infinity, is the same everywhere but
        must not be, or is for viewing only.
    ShapeError
        If it is not cubic but has to be.
    """
    path = Path(path)
    header = read_header(path)
    if VIEWING in header.labels:
        raise FileFormatError(
            "is for viewing only: a network had a part in it, and no map and no resolution is made of it",
            path=path,
            hint="give a map of the images alone",
        )
    if header.shape[0] == 1 or ".mrcs" in path.suffixes:
        raise FileFormatError("holds images, not a volume", path=path, hint="give a 3D map")
    if cubic and len(set(header.shape)) != 1:
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
    if not may_be_flat and array.min() == array.max():
        raise FileFormatError("is the same everywhere", path=path, hint="give a map with density")
    # Headers hold float32, whose digits beyond the sixth are not what anybody entered.
    size = pixel_size if pixel_size is not None else float(f"{header.pixel_size:.6g}")
    return MapFile(path, array, size, header.origin)
