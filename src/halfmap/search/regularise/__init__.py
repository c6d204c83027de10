"""What lies between two iterations: how sums of half sets become the maps that are compared with next.

A regulariser looks at what an iteration has found, and gives a filter. The filter is given the sums of both
half sets without some of their images, several times over: those images are compared with what it makes of
the others. Half maps, their correlation and every resolution are made without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from halfmap.search.halfmaps import Sums, solved

__all__ = ["Evidence", "Filter", "Pair", "Regulariser", "each_alone"]

Pair = tuple[Sums, Sums]


@dataclass(frozen=True, eq=False)
class Evidence:
    """What an iteration has found.

    Attributes
    ----------
    maps : pair of Tensor (d, d, d)
        Half maps, unfiltered.
    mask : Tensor (d, d, d)
        Of the particle, 0 to 1.
    correlation : Tensor (shells,)
        Of the half maps within the mask, corrected for it; 0 from where it has first fallen to nothing.
    prior : Tensor (2, shells)
        Reciprocals of the signal's power for the sums of each half set, by this correlation; for `solved`.
    least : Tensor (2, shells)
        Weight that voxels of the sums which the filter is given count for at least in unfiltered maps.
    pixel_size : float
        Of the maps, Å.
    box : int
        Of the images; the maps' is smaller where these hold no finer detail.
    iteration : int
        From 1.
    stage : str
        Of the next iteration: ``everywhere``, ``near`` or ``last``.
    """

    maps: tuple[Tensor, Tensor]
    mask: Tensor
    correlation: Tensor
    prior: Tensor
    least: Tensor
    pixel_size: float
    box: int
    iteration: int
    stage: str

    def shell(self, threshold: float) -> int:
        """Last shell before the correlation first falls below a threshold."""
        return int((self.correlation[1:] >= threshold).int().cumprod(0).sum())


class Filter(Protocol):
    """Makes maps of sums."""

    def __call__(self, halves: Pair, name: str) -> tuple[Tensor, Tensor]:
        """Maps (d, d, d) of both half sets, each by what is in its own sums alone.

        Parameters
        ----------
        halves : pair of Backprojection or StoredSums
            Of some images of each half set, with all symmetry applied.
        name : str
            Of these images, for files.
        """
        ...


class Regulariser(Protocol):
    """Chooses a filter by what an iteration has found."""

    def __call__(self, evidence: Evidence) -> Filter:
        """Filter for all sums of an iteration."""
        ...


def each_alone(evidence: Evidence, function: Callable[[Tensor, int], Tensor]) -> Filter:
    """Filter that makes a map of an unfiltered one, half set by half set.

    Parameters
    ----------
    evidence : Evidence
        Of the iteration.
    function : callable
        Takes an unfiltered map (d, d, d) and the number of its half set, 0 or 1, and gives the map to compare
        with. It should know of the other half set what both have agreed in, and no more.
    """

    def made(halves: Pair, name: str) -> tuple[Tensor, Tensor]:
        first, second = (
            function(solved(own, least=evidence.least[half]), half) for half, own in enumerate(halves)
        )
        return first, second

    return made
