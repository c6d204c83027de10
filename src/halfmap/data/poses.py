"""Orientations and shifts of particles, as tensors in house conventions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from halfmap.errors import ShapeError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Poses:
    """Where particles look and where they sit.

    An image is the projection of the volume turned by its rotation, moved by minus its shift.

    Parameters
    ----------
    rotations : Tensor (n, 3, 3)
        Matrices that take volume coordinates (x, y, z) to image coordinates.
    shifts_A : Tensor (n, 2)
        Shift (x, y) in Å to apply to the image to centre it, as ``rlnOriginX/YAngst``.

    Raises
    ------
    ShapeError
        If the two do not belong together.
    """

    rotations: Tensor
    shifts_A: Tensor

    def __post_init__(self) -> None:
        n = len(self.rotations)
        if self.rotations.shape != (n, 3, 3) or self.shifts_A.shape != (n, 2):
            raise ShapeError(
                f"poses need rotations (n, 3, 3) and shifts (n, 2), not {tuple(self.rotations.shape)} "
                f"and {tuple(self.shifts_A.shape)}"
            )

    def __len__(self) -> int:
        return len(self.rotations)

    def __getitem__(self, index: slice | Tensor) -> Poses:
        return Poses(self.rotations[index], self.shifts_A[index])

    @property
    def euler(self) -> Tensor:
        """Euler angles (rot, tilt, psi) in degrees, (n, 3)."""
        from halfmap.ops.rotations import to_euler

        return to_euler(self.rotations)

    def to(self, device: str) -> Poses:
        """Give the same poses on another device."""
        return Poses(self.rotations.to(device), self.shifts_A.to(device))
