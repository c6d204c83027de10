"""What is known of a map before the images: the power of its signal."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from halfmap.search.backprojector import Backprojection

__all__ = ["Halves", "Regulariser"]

Halves = tuple[Backprojection, Backprojection]


class Regulariser(Protocol):
    """Gives the prior of both half maps from the sums of both."""

    def __call__(self, halves: Halves) -> tuple[Tensor, Tensor]:
        """Reciprocals of the signal's power, for `Backprojection.solve` of each half.

        Parameters
        ----------
        halves : pair of Backprojection
            Of one point group and radius, not symmetrised.

        Returns
        -------
        tuple of Tensor
            Each broadcast to the sums' voxels (z, y, x).
        """
        ...
