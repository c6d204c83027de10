"""A map: an array of density and the size of its voxels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from halfmap.errors import ParameterError, ShapeError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Volume:
    """A three-dimensional map.

    Parameters
    ----------
    array : Tensor (d, h, w)
        Density, axes (z, y, x); the origin is voxel ``n // 2`` of each axis.
    pixel_size : float
        Edge of a voxel in Å.

    Raises
    ------
    ShapeError
        If the array is not three-dimensional or empty.
    ParameterError
        If the pixel size is not a positive number.
    """

    array: Tensor
    pixel_size: float

    def __post_init__(self) -> None:
        if self.array.ndim != 3 or 0 in self.array.shape:
            raise ShapeError(f"a volume has three axes, not the shape {tuple(self.array.shape)}")
        if not (math.isfinite(self.pixel_size) and self.pixel_size > 0):
            raise ParameterError(f"a volume's pixel size must be positive, not {self.pixel_size}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along z, y, x."""
        depth, height, width = self.array.shape
        return depth, height, width

    @property
    def box_size(self) -> int:
        """Voxels along an edge of a cubic map.

        Raises
        ------
        ShapeError
            If the map is not a cube.
        """
        if len(set(self.shape)) != 1:
            raise ShapeError(f"the map has {self.shape} voxels, not a cube", hint="pad or crop it first")
        return self.shape[0]
